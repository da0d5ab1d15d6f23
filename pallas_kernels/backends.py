"""Which implementation of the kernels runs: the one place that picks them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

from pallas_kernels import kv_write as xla_write
from pallas_kernels import paged_attention as xla_paged
from pallas_kernels import striped_attention as xla_striped
from pallas_kernels.backend_names import Backend
from pallas_kernels.causal_tiles import Tiles
from pallas_kernels.partials import Partial
from pallas_kernels.tuning import Tuning, tunings

_log = logging.getLogger(__name__)
_OF_PLATFORM: dict[str, Backend] = {"tpu": "pallas-tpu", "gpu": "pallas-triton"}
_TUNED = ("pallas-tpu", "pallas-triton")
_NEEDS_PLATFORM = {"pallas-tpu": "tpu", "pallas-triton": "gpu", "pallas-hopper": "gpu"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """The three kernels of a backend.

    Attributes:
      backend: Its name.
      fold_stripe: See `pallas_kernels.striped_attention.fold_stripe`.
      fold_tiles: Its tiles for a stripe of so many tokens, a head size, and bytes of a number;
        raises ValueError for what it does not fit.
      paged_attention: See `pallas_kernels.paged_attention.paged_attention`; also takes
        `rows_at_once`, how many neighbouring rows may share their entries.
      kv_write: See `pallas_kernels.kv_write.kv_write`.
      shares_keys: Whether `paged_attention` fetches a key once for rows that share it, so that
        it serves chunks of many queries, too.
    """

    backend: Backend
    fold_stripe: Callable[..., Any]
    fold_tiles: Callable[[int, int, int], Tiles]
    paged_attention: Callable[..., Partial]
    kv_write: Callable[..., Any]
    shares_keys: bool


def default_backend(platform: str) -> Backend:
    """The backend of a platform, as jax names it."""
    return _OF_PLATFORM.get(platform, "xla")


def unsupported(
    backend: Backend, *, platform: str, head_dim: int, itemsize: int, chunk_tokens: int
) -> str | None:
    """Why a backend cannot serve a model on a platform; None if it can.

    `itemsize` are the bytes of a number, `chunk_tokens` the shortest stripe.
    """
    needed = _NEEDS_PLATFORM.get(backend, platform)
    if platform != needed:
        return f"it needs a {needed}, and this is a {platform}"
    try:
        kernels_of(backend).fold_tiles(chunk_tokens, head_dim, itemsize)
    except ValueError as error:
        return str(error)
    return None


@cache
def kernels_of(backend: Backend, chip: str = "") -> Kernels:
    """The kernels of a backend, with a chip's tiles where there is a table of them
    (`pallas_kernels.tuning`). Imports them when they are first asked for.
    """
    tuning = tunings().get(chip)
    untuned = _untuned(backend)
    return untuned if tuning is None or backend not in _TUNED else _tuned(untuned, tuning)


def _tuned(kernels: Kernels, tuning: Tuning) -> Kernels:
    """The kernels, their tiles from the table unless a call names others."""

    def fold_tiles(tokens: int, head_dim: int, itemsize: int) -> Tiles:
        own = kernels.fold_tiles(tokens, head_dim, itemsize)  # or its ValueError
        return tuning.tiles(head_dim, itemsize, tokens) or own

    def fold_stripe(carry: Any, q_HxTxD: Any, *rest: Any, **options: Any) -> Any:
        _, tokens, head_dim = q_HxTxD.shape
        tiles = fold_tiles(tokens, head_dim, q_HxTxD.dtype.itemsize)
        return kernels.fold_stripe(carry, q_HxTxD, *rest, **{"tiles": tiles, **options})

    return replace(kernels, fold_tiles=fold_tiles, fold_stripe=fold_stripe)


def _untuned(backend: Backend) -> Kernels:
    if backend == "xla":
        return Kernels(
            backend=backend,
            fold_stripe=xla_striped.fold_stripe,
            fold_tiles=_square_tiles,
            paged_attention=_one_by_one,
            kv_write=xla_write.kv_write,
            shares_keys=False,
        )
    if backend == "pallas-hopper":
        return _hopper()
    make = _triton if backend in ("pallas-triton", "interpret") else _mosaic
    return make(backend, interpret=backend.startswith("interpret"))


def _hopper() -> Kernels:
    from pallas_kernels.gpu import hopper_attention

    _log.warning(
        "attention_backend 'pallas-hopper' is unconfirmed: no GPU has run its attention. Compare "
        "with scripts/confirm_on_chip.py, or use 'pallas-triton'"
    )
    return replace(
        _triton("pallas-hopper", interpret=False),
        fold_stripe=hopper_attention.fold_stripe,
        fold_tiles=hopper_attention.tiles_for,
    )


def _triton(backend: Backend, *, interpret: bool) -> Kernels:
    from pallas_kernels.gpu import kv_write, paged_attention, striped_attention

    return Kernels(
        backend=backend,
        fold_stripe=partial(striped_attention.fold_stripe, interpret=interpret),
        fold_tiles=striped_attention.tiles_for,
        paged_attention=partial(paged_attention.paged_attention, interpret=interpret),
        kv_write=partial(kv_write.kv_write, interpret=interpret),
        shares_keys=True,
    )


def _mosaic(backend: Backend, *, interpret: bool) -> Kernels:
    from pallas_kernels.tpu import kv_write, paged_attention, striped_attention

    return Kernels(
        backend=backend,
        fold_stripe=partial(striped_attention.fold_stripe, interpret=interpret),
        fold_tiles=lambda tokens, head_dim, itemsize: striped_attention.tiles_for(tokens),
        paged_attention=partial(paged_attention.paged_attention, interpret=interpret),
        kv_write=partial(kv_write.kv_write, interpret=interpret),
        shares_keys=True,
    )


def _square_tiles(tokens: int, head_dim: int, itemsize: int) -> Tiles:
    tile = xla_striped.tile_size(tokens)
    return Tiles(tile, tile)


def _one_by_one(*args: Any, rows_at_once: int = 1, **options: Any) -> Partial:
    del rows_at_once  # every row fetches its own keys
    return xla_paged.paged_attention(*args, **options)
