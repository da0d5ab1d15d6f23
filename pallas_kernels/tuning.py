"""The tiles of striped attention on each chip: one table for each, in `tuned/`, and its reader.

A table says how its tiles were found: `estimated` by a search over what the chip's compiler takes
(`scripts/tune_kernels.py`), or `measured` on the chip (`loongjax profile --kernels`). What a table
does not name gets the tiles that the kernel would choose itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Literal

from pallas_kernels.causal_tiles import Tiles

_FOLDER = "tuned"
_LEAST_STRIPE = 128  # shorter ones, or such that it does not divide, have tiles of their own


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedTiles:
    """The tiles of one shape.

    Attributes:
      head_dim: Size of a head.
      itemsize: Bytes of a number.
      queries, keys: Of a tile; less where the stripe is shorter.
      seconds: What the shape took with them, of which `Tuning.method` says what it is.
    """

    head_dim: int
    itemsize: int
    queries: int
    keys: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """The table of one chip.

    Attributes:
      chip: Its name, that of its hardware description.
      device_kinds: How jax names it, lower case; longer names of GPUs may begin so.
      method: How the tiles were found.
      striped_attention: Tiles by shape.
    """

    chip: str
    device_kinds: tuple[str, ...]
    method: Literal["estimated", "measured"]
    striped_attention: tuple[TunedTiles, ...]

    def tiles(self, head_dim: int, itemsize: int, tokens: int) -> Tiles | None:
        """The tiles for a stripe; None where the table has none for it."""
        if tokens % _LEAST_STRIPE:
            return None
        for each in self.striped_attention:
            if (each.head_dim, each.itemsize) == (head_dim, itemsize):
                largest = tokens & -tokens  # power of two that divides it
                return Tiles(min(each.queries, largest), min(each.keys, largest))
        return None

    def to_json(self) -> str:
        """The table as its file has it."""
        return json.dumps(asdict(self), indent=2) + "\n"


def tuning_from(text: str) -> Tuning:
    """Reads a table. Raises ValueError, naming the fault, for one that kernels could not use."""
    content = json.loads(text)
    try:
        rows = tuple(TunedTiles(**row) for row in content.pop("striped_attention"))
        kinds: Sequence[str] = content.pop("device_kinds")
        found = Tuning(striped_attention=rows, device_kinds=tuple(kinds), **content)
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is no tuning table: {error}") from error
    for row in rows:
        for size in (row.queries, row.keys):
            if size < 1 or size & (size - 1):
                raise ValueError(f"tiles must be powers of two, not {row.queries} x {row.keys}")
    return found


@cache
def tunings() -> Mapping[str, Tuning]:
    """All tables, by chip."""
    folder = resources.files(__package__) / _FOLDER
    files = sorted(file.name for file in folder.iterdir() if file.name.endswith(".json"))
    found = [tuning_from((folder / name).read_text(encoding="utf-8")) for name in files]
    return {tuning.chip: tuning for tuning in found}


def chip_of(device_kind: str) -> str:
    """The chip that jax names so; empty for one that has no table.

    A GPU's name goes on with its memory and form. A TPU's is whole: "TPU v5" is v5p, and
    "TPU v5 lite" v5e.
    """
    kind = device_kind.lower()
    matches = [
        (len(known), tuning.chip)
        for tuning in tunings().values()
        for known in tuning.device_kinds
        if kind == known or (kind.startswith(known) and not known.startswith("tpu "))
    ]
    return max(matches)[1] if matches else ""
