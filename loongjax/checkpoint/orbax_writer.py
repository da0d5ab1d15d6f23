"""Weights as Orbax checkpoints: one for each part of the model (`loongjax.models.orbax_weights`).

Memory: twice the largest part, since Orbax copies what it is given. Imports jax, through Orbax.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from loongjax.checkpoint.pieces import Dtype, Piece, dtype_of
from loongjax.models.orbax_weights import WEIGHTS, part_of
from loongjax.models.weights import WeightSource, WeightSpec, read_into, shard_index

_CHUNK_BYTES = 8 * 2**20
"""A shard reads whole chunks, so that small ones waste less; each is a file."""


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns at every save that no OCDBT files are there to merge: none are asked for."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class OrbaxWriter:
    """See `Writer`."""

    def __init__(
        self, folder: Path, source: WeightSource, specs: Sequence[WeightSpec], dtype: Dtype | None
    ) -> None:
        self._folder = folder.absolute() / WEIGHTS
        self._source, self._dtype = source, dtype
        parts: dict[str, list[WeightSpec]] = {}
        for spec in specs:
            parts.setdefault(part_of(spec), []).append(spec)
        self.pieces = tuple(
            Piece(name=name, tensors=tuple(tensors)) for name, tensors in parts.items()
        )

    def is_there(self, piece: Piece) -> bool:
        """Orbax gives a checkpoint its name when it is whole."""
        return (self._folder / piece.name).is_dir()

    def write(self, piece: Piece) -> None:
        """See `Writer.write`."""
        self._folder.mkdir(exist_ok=True)
        for left in self._folder.glob(f"{piece.name}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left)  # by a run that died
        tree = {spec.key: self._read(spec) for spec in piece.tensors}
        arguments = ocp.args.PyTreeSave(
            tree, save_args={key: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for key in tree}
        )
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
        with _without_warnings(), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(self._folder / piece.name, args=arguments)

    def finish(self) -> None:
        """Parts have names of their own: nothing is left to write."""

    def _read(self, spec: WeightSpec) -> np.ndarray:
        values = np.empty(spec.stored_shape, dtype_of(self._source, spec, self._dtype))
        read_into(values, self._source, spec, shard_index(spec, 0, 1))
        return values
