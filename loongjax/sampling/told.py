"""From a program's numbers to log-probabilities: the host's side of `loongjax.sampling.scores`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from loongjax.plan import TokenLogprobs
from loongjax.sampling.fields import MAX_LOGPROBS


def token_logprobs(said_RxS: Int32[np.ndarray, "R S"], top: int) -> list[TokenLogprobs]:
    """What is said of some tokens (`loongjax.sampling.fields.SAID`); `top` likely ones each."""
    number_RxS = np.ascontiguousarray(said_RxS).view(np.float32)
    ids = said_RxS[:, 3 : 3 + top].tolist()
    values = number_RxS[:, 3 + MAX_LOGPROBS : 3 + MAX_LOGPROBS + top].tolist()
    own = said_RxS[:, 0].tolist(), number_RxS[:, 1].tolist(), said_RxS[:, 2].tolist()
    return [
        TokenLogprobs(token, logprob, rank, tuple(zip(top_ids, top_values, strict=True)))
        for token, logprob, rank, top_ids, top_values in zip(*own, ids, values, strict=True)
    ]
