"""What the allocator tells the executor: which slots a step writes.

An entry is one block, or the filled part of one, as `(slot, position, count)`: `count`
consecutive tokens of a request, the first at `position` of the request, lie in `count`
consecutive slots from `slot` on. An entry never crosses a block border, so
`count <= block_size`. Positions are kept because a sliding window needs them and because
a request's KV may lie on its instances in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from loongjax.plan import InstanceId, RequestId


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShareSlots:
    """Where one share of a chunk goes: `entries` is int32 [N, 3], positions ascending."""

    request: RequestId
    instance: InstanceId
    entries: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PrefillSlots:
    """Slots of a `PrefillStep`: one item for each non-empty share, in the step's order."""

    seq: int
    shares: tuple[ShareSlots, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSlots:
    """Slots of a `DecodeStep`, one for each row in the step's order.

    `positions[i]` is the position, in its request, of the token that goes in; its KV is
    written to `slots[i]` on the row's home.
    """

    seq: int
    slots: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MoveSlots:
    """Slots of one move.

    Attributes:
      request: Whose KV it is.
      source, target: From where to where.
      taken: int32 [N, 3], the moved tokens' old places, positions ascending.
      given: int32 [M, 3], their new places, positions ascending; counts sum to the same.
      left: int32 [K, 3], all entries that `source` still holds of the request after this move;
        positions ascending.
    """

    request: RequestId
    source: InstanceId
    target: InstanceId
    taken: np.ndarray
    given: np.ndarray
    left: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrateSlots:
    """Slots of a `MigrateStep`: one item for each move, in the step's order.

    The slots in `taken` are free as soon as the step is applied: steps on an instance run in
    the order of their launches, so nobody writes there before the KV has left.
    """

    seq: int
    moves: tuple[MoveSlots, ...]


SlotPlan: TypeAlias = PrefillSlots | DecodeSlots | MigrateSlots
