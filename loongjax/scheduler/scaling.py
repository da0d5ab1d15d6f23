"""Step 4 of 4: how groups shrink after prefill, and grow while they decode (section 5.4).

Scale-down. The KV of a prefill batch is retained on the smallest part of its group that holds
it and leaves headroom: room for what its requests, and who decodes there already, are granted
to grow by. Among parts of one size, instances that decode already come first: they share
their steps, and the others are free for prompts. The published code leaves no headroom.

Scale-up. A group that decodes grows when memory is bound (its instances have no room for the
next tokens: the caller finds that out, token by token) and when compute is bound: when its
step is quicker on more instances, each of them master of fewer rows. The paper compares the
batch with a threshold from the profile; the cost model predicts the step itself.

Masters. Rows are spread evenly over as many masters as make the step quickest, and a row
stands with the master that holds most of its KV. The published code fills a master up to 128
rows before it takes the next.

Pure functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from loongjax.costmodel.protocol import CostModel, DecodeWork
from loongjax.plan import DecodeRow, Group, InstanceId, RequestView, Share

_WORTH = 0.9
"""A group takes instances that it could do without if its step takes at most this part of the
time then. They are lost to prompts for a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """An instance of a prefill group.

    Attributes:
      instance: Which.
      spare: Free blocks that nobody is granted.
      decodes: Whether anyone decodes there.
    """

    instance: InstanceId
    spare: int
    decodes: bool


class Need(NamedTuple):
    """Blocks that a prompt's KV takes now, and those that it is granted in the end."""

    now: int
    later: int


def scale_down(needs: Sequence[Need], rooms: Sequence[Room]) -> list[list[tuple[InstanceId, int]]]:
    """Which instances keep the KV of a prefill batch: see the module.

    A prompt stays in one piece where it can end, else in one piece where most is spare, else
    it is split, last on the instance that has most room left: its next tokens follow.

    Args:
      needs: One for each prompt.
      rooms: The group; its spare blocks hold all prompts at their ends.

    Returns:
      For each prompt its instances, in the order of its tokens, with blocks that sum to `now`.
    """
    spare = {room.instance: room.spare for room in smallest_part(needs, rooms)}
    found: list[list[tuple[InstanceId, int]]] = [[] for _ in needs]
    for i in sorted(range(len(needs)), key=lambda i: -needs[i].now):
        now, later = needs[i]
        order = sorted(spare, key=lambda instance: (-spare[instance], instance))
        tight = [instance for instance in spare if spare[instance] >= later]
        left = now
        for instance in tight[:1] or order:
            taken = min(left, max(0, spare[instance]))
            if taken:
                found[i].append((instance, taken))
                left -= taken
        found[i].sort(key=lambda piece: (spare[piece[0]] - piece[1], piece[0]))
        for instance, taken in found[i]:
            spare[instance] -= taken
        spare[found[i][-1][0]] -= later - now
    return found


def smallest_part(needs: Sequence[Need], rooms: Sequence[Room]) -> list[Room]:
    """The fewest of a group that have room for all ends, those that decode first."""
    later = sum(need.later for need in needs)
    by_spare = sorted(rooms, key=lambda room: (-room.spare, room.instance))
    sums = enumerate(accumulate(room.spare for room in by_spare), 1)
    count = next((count for count, total in sums if total >= later), len(rooms))
    decoding = sorted(by_spare, key=lambda room: not room.decodes)[:count]
    return decoding if sum(room.spare for room in decoding) >= later else by_spare[:count]


def scale_up(
    rows: int, kv_tokens: int, degree: int, degrees: Sequence[int], cost: CostModel
) -> int:
    """The degree at which a decode step is quickest, if that is worth the instances.

    Args:
      rows: Requests in the batch.
      kv_tokens: Their KV.
      degree: The least that holds it.
      degrees: Those that could be had, ascending.
      cost: Predicts decode times.
    """
    best, quickest = degree, _decode_time(degree, rows, kv_tokens, cost)
    for larger in degrees:
        if larger > best:
            time = _decode_time(larger, rows, kv_tokens, cost)
            if time <= _WORTH * quickest:
                best, quickest = larger, time
    return best


def masters_needed(rows: int, kv_tokens: int, degree: int, least: int, cost: CostModel) -> int:
    """How many masters make a decode step quickest: `least`, twice as many, and so on up to
    all. Ties: fewer.
    """
    most = max(least, min(degree, rows))
    counts = [least]
    while counts[-1] < most:
        counts.append(min(2 * counts[-1], most))
    return min(counts, key=lambda count: cost.decode(degree, DecodeWork(rows, kv_tokens, count)))


def choose_masters(
    rows: Sequence[tuple[RequestView, InstanceId]], group: Group, masters: int
) -> tuple[DecodeRow, ...]:
    """Gives each row a master: the one that holds most of its KV, if it has a row left.

    Args:
      rows: Requests, each with the home of its next token.
      group: Where they decode.
      masters: How many of the group are masters: those that hold most KV.
    """
    if len(group) == 1:
        return tuple(DecodeRow(view.id, group[0], home) for view, home in rows)
    left = _rows_left(rows, group, masters)
    found = []
    for view, home in rows:
        master = max(
            (share for share in view.kv if left.get(share.instance)),
            key=lambda share: (share.tokens, -share.instance),
            default=None,
        )
        chosen = _emptiest(left) if master is None else master.instance
        left[chosen] -= 1
        found.append(DecodeRow(view.id, chosen, home))
    return tuple(found)


def _rows_left(
    rows: Sequence[tuple[RequestView, InstanceId]], group: Group, masters: int
) -> dict[InstanceId, int]:
    """An even part of the rows for each master, those with most KV first."""
    tokens = dict.fromkeys(group, 0)
    for view, _ in rows:
        for instance, count in view.kv:
            tokens[instance] += count
    order = sorted(group, key=lambda instance: (-tokens[instance], instance))[:masters]
    each, more = divmod(len(rows), len(order))
    return {instance: each + (i < more) for i, instance in enumerate(order)}


def _emptiest(left: Mapping[InstanceId, int]) -> InstanceId:
    return max(left, key=lambda instance: (left[instance], -instance))


def _decode_time(degree: int, rows: int, kv_tokens: int, cost: CostModel) -> float:
    return cost.decode(degree, DecodeWork(rows, kv_tokens, min(degree, rows)))


def shares(
    pieces: Sequence[tuple[InstanceId, int]], tokens: int, block_size: int
) -> tuple[Share, ...]:
    """Blocks as tokens: all pieces are full but the last."""
    surplus = sum(blocks for _, blocks in pieces) * block_size - tokens
    found = [Share(instance, blocks * block_size) for instance, blocks in pieces]
    last = found[-1]
    return (*found[:-1], Share(last.instance, last.tokens - surplus))
