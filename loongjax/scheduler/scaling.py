"""Step 4 of 4: how groups shrink after prefill, and grow while they decode (section 5.4).

Scale-down. The KV of a prefill batch is retained on the smallest part of its group that holds
it, leaves headroom, room for what its requests, and who decodes there already, are granted to
grow by, and reads it in time: a decode step takes as long as its fullest instance needs for its
KV, so that a long context on few instances is slow for everyone there. Among parts of one size,
instances that decode already come first: they share their steps, and the others are free for
prompts. The published code leaves no headroom; paper and code look at memory alone.

Scale-up. A group that decodes grows when memory is bound (its instances have no room for the
next tokens: the caller finds that out, token by token) and when compute is bound: when its
step is quicker on more instances, each of them master of fewer rows; KV stays where it is, so
that reading it gets no quicker. The paper compares the batch with a threshold from the profile;
the cost model predicts the step itself.

Masters. Rows are spread evenly over as many masters as make the step quickest, and a row
stands with the master that holds most of its KV. The published code fills a master up to 128
rows before it takes the next.

Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from loongjax.costmodel.protocol import CostModel, DecodeWork
from loongjax.plan import DecodeRow, Group, InstanceId, RequestView, Share, Topology

_WORTH = 0.9
"""A group takes instances that it could do without if its step takes at most this part of the
time then. They are lost to prompts for a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """An instance of a prefill group.

    Attributes:
      instance: Which.
      spare: Free blocks that nobody is granted.
      used: Blocks that somebody holds.
      decodes: Whether anyone decodes there.
    """

    instance: InstanceId
    spare: int
    used: int
    decodes: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How quickly requests decode, by what lies on the fullest instance of their group.

    Attributes:
      limit_s: What a step should take at most [s].
      step_s: What it takes [s] with so many blocks there.
    """

    limit_s: float
    step_s: Callable[[int], float]


class Need(NamedTuple):
    """Blocks that a prompt's KV takes now, and those that it is granted in the end."""

    now: int
    later: int


def tokens_in_time(limit_s: float, most: int, cost: CostModel) -> int:
    """KV of one request on one instance that decodes within a time; at most `most` tokens."""
    if cost.decode(1, DecodeWork(1, most, 1, most)) <= limit_s:
        return most
    least = 0
    while most - least > 1 + least // 64:
        tokens = (least + most) // 2
        if cost.decode(1, DecodeWork(1, tokens, 1, tokens)) <= limit_s:
            least = tokens
        else:
            most = tokens
    return least


def scale_down(
    needs: Sequence[Need], rooms: Sequence[Room], pace: Pace, topology: Topology
) -> list[list[tuple[InstanceId, int]]]:
    """Which instances keep the KV of a prefill batch: see the module.

    A prompt stays in one piece where it can end and is read in time, else it is split evenly,
    last on the instance that has most room left: its next tokens follow.

    Args:
      needs: One for each prompt.
      rooms: The group; its spare blocks hold all prompts at their ends.
      pace: How quickly they should decode.
      topology: Which parts are groups, and can decode alone.

    Returns:
      For each prompt its instances, in the order of its tokens, with blocks that sum to `now`.
    """
    part = smallest_part(needs, rooms, pace, topology)
    limit_s = max(pace.limit_s, pace.step_s(_fullest(needs, part)))
    spare = {room.instance: room.spare for room in part}
    used = {room.instance: room.used for room in part}
    found: list[list[tuple[InstanceId, int]]] = [[] for _ in needs]
    for i in sorted(range(len(needs)), key=lambda i: -needs[i].now):
        now, later = needs[i]
        in_time = (
            home
            for home in spare
            if spare[home] >= later and pace.step_s(used[home] + now) <= limit_s
        )
        whole = next(in_time, None)
        roomy = {home: blocks for home, blocks in spare.items() if blocks > 0}
        taken = balance(roomy, now) if whole is None else {whole: now}
        found[i] = [(home, blocks) for home, blocks in taken.items() if blocks]
        found[i].sort(key=lambda piece: (spare[piece[0]] - piece[1], piece[0]))
        for home, blocks in found[i]:
            spare[home] -= blocks
            used[home] += blocks
        spare[found[i][-1][0]] -= later - now
    return found


def smallest_part(
    needs: Sequence[Need], rooms: Sequence[Room], pace: Pace, topology: Topology
) -> Sequence[Room]:
    """The fewest of a group that have room for all ends and are read in time; if no part is, the
    one from which on more hardly help. Those that decode come first.
    """
    later = sum(need.later for need in needs)
    best, quickest = rooms, math.inf
    for part in _parts(later, rooms, topology):
        time = pace.step_s(_fullest(needs, part))
        if time <= _WORTH * quickest:
            best, quickest = part, time
        if quickest <= pace.limit_s:
            break
    return best


def _parts(later: int, rooms: Sequence[Room], topology: Topology) -> Iterator[Sequence[Room]]:
    """At each degree the best part with so many spare blocks that is a group, if there is one."""
    by_spare = sorted(rooms, key=lambda room: (-room.spare, room.instance))
    decoding_first = sorted(by_spare, key=lambda room: not room.decodes)
    by_id = {room.instance: room for room in rooms}
    members, spare = frozenset(by_id), 0
    for degree, room in enumerate(by_spare, 1):
        spare += room.spare
        if spare < later or degree not in topology.degrees:
            continue
        covers = (
            topology.smallest_cover(frozenset({seed.instance}), members, degree)
            for seed in decoding_first
        )
        around = ([by_id[instance] for instance in cover or ()] for cover in covers)
        for part in chain([decoding_first[:degree], by_spare[:degree]], around):
            group = tuple(sorted(each.instance for each in part))
            enough = sum(each.spare for each in part) >= later
            if len(part) == degree and enough and topology.contains(group):
                yield part
                break


def _fullest(needs: Sequence[Need], part: Sequence[Room]) -> int:
    """Blocks on the fullest instance of a part that these are spread over evenly."""
    total = sum(room.used for room in part) + sum(need.now for need in needs)
    return max(-(-total // len(part)), *(room.used for room in part))


def balance(free: Mapping[InstanceId, int], blocks: int) -> dict[InstanceId, int]:
    """Blocks to take from each, so that what remains free is as equal as it can be."""
    level = max(0, (sum(free.values()) - blocks) // len(free))
    taken = {instance: max(0, room - level) for instance, room in free.items()}
    surplus = sum(taken.values()) - blocks
    for instance in sorted(free, key=lambda instance: (free[instance], -instance)):
        less = min(taken[instance], surplus)
        taken[instance] -= less
        surplus -= less
    return taken


def scale_up(
    rows: int, kv_tokens: int, degree: int, degrees: Sequence[int], cost: CostModel
) -> int:
    """The degree at which a decode step is quickest, if that is worth the instances.

    Args:
      rows: Requests in the batch.
      kv_tokens: Their KV; at any degree, the instances of `degree` hold it.
      degree: The least that holds it.
      degrees: Those that could be had, ascending.
      cost: Predicts decode times.
    """
    best, quickest = degree, _decode_time(degree, rows, kv_tokens, cost)
    for larger in degrees:
        if larger > best:
            as_full = kv_tokens * larger // degree
            time = _decode_time(larger, rows, as_full, cost)
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
        return tuple([DecodeRow(view.id, group[0], home) for view, home in rows])
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
