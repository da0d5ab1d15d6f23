"""Partial attention results on their way between ranks."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from loongjax.cluster.mesh import SP
from pallas_kernels.partials import Partial


def return_to_masters(
    local: Partial, degree: int
) -> tuple[Float[Array, "n R H D"], Float[Array, "n R H"]]:
    """Each rank's partials for all rows of the group become all ranks' partials for its own.

    Rows are rank-major: `local` has those of rank 0, then those of rank 1, and so on.
    """
    packed = jnp.concatenate([local.o, local.lse[..., None]], axis=-1)
    packed = packed.reshape(degree, -1, *packed.shape[1:])
    if degree > 1:
        packed = lax.all_to_all(packed, SP, split_axis=0, concat_axis=0)
    return packed[..., :-1], packed[..., -1]
