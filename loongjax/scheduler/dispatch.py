"""Step 1 of 4: which pending requests to prefill now (LoongServe, SOSP '24, section 5.1).

Requests are taken in line; nobody overtakes. Three tests bound how many:

Memory. They and all who hold KV must never need more than the pool at the same time, if each
goes on to the length that is granted to it. With `held_j` tokens of KV now, `left_j` still to
come, and requests sorted by `left` descending, all of the first i are there when the i-th
ends, so that the peak of future KV is

    peak = max over i of  sum over j <= i of held_j  +  i * left_i        [tokens]

Compute. Up to a tipping point a longer batch costs little more; beyond it each request delays
all others of its batch for nothing. Every instance that is to be had counts for that many
tokens. A long prompt counts for at most all instances but one: those behind it may run on the
last, and batching decides whether they do. What instances have no free blocks for does not
run there.

Decodes. Instances that decode are used for further requests only if

    Gain = wait * sum over r of 1 / r.input  >  Cost = sum over d of delay(d) / d.output

where `wait` is how long they would otherwise wait for decodes to end [s], d goes over the
decodes on these instances, and `output` is what they have produced so far. A decode is delayed
by T(R, E), the prefill of all dispatched on the instances used, or by as long as it takes to
move its KV away, whichever is less. Both are seconds per token: equations 1 and 2 of the
paper. There r goes over the further requests; here over all behind them in line too, for they
wait as long.

Where the published code differs, the paper is followed: the code lets some requests overtake
(tuned for each data set), bounds a prefill by a fixed time instead of the tipping point, and
forgets, in the memory test, running requests behind the first undecided one.

Pure functions; O((holders + line) log(holders) log(line)).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from loongjax.costmodel.protocol import ChunkWork, CostModel

_LINEAR = 1.8
"""Twice the tokens take this many times as long at the tipping point: the constant part of a
step is a fifth of it there."""

_LONGEST_PROBE = 1 << 20


class Prompt(NamedTuple):
    """A whole prompt without KV.

    Attributes:
      tokens: To compute.
      growth: Tokens that it may add later.
      blocks: Those that hold both.
    """

    tokens: int
    growth: int
    blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """KV memory, and the requests that hold some of it already.

    Attributes:
      capacity: Tokens that it holds.
      block_size: Tokens per block. Everyone's end is rounded up to the end of a block.
      held: Tokens of KV of each holder.
      left: Tokens that each may still add.
    """

    capacity: int
    block_size: int
    held: Int64[np.ndarray, " holders"]
    left: Int64[np.ndarray, " holders"]


class Occupied(NamedTuple):
    """An instance on which others decode.

    Attributes:
      weight: The sum of 1 / output over them [1/token].
      migrate: How long it takes to move their KV away [s]; infinite if that cannot be done.
      blocks: Free blocks, at most: those that it has, or will have once their KV is away.
    """

    weight: float
    migrate: float
    blocks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Openings:
    """Instances to be had for prefill.

    Attributes:
      free: How many nobody decodes on.
      blocks: Free blocks on those.
      occupied: The others, those that it costs least to use first.
      wait: How long until decodes end by themselves [s].
    """

    free: int
    blocks: int
    occupied: tuple[Occupied, ...]
    wait: float


def dispatch(
    prompts: Sequence[Prompt],
    behind: float,
    pool: Pool | None,
    openings: Openings,
    degrees: Sequence[int],
    cost: CostModel,
    *,
    tip: int,
) -> int:
    """How many of the requests in line to prefill now, from the first on.

    Args:
      prompts: In line.
      behind: The sum of 1 / input over those in line behind them [1/token].
      pool: The memory that they are to share. None: it is known to suffice.
      openings: The instances that they may run on.
      degrees: Degrees that exist, ascending.
      cost: Predicts prefill times.
      tip: The `tipping_point` of the lowest degree.
    """
    tokens = [prompt.tokens for prompt in prompts]
    room = compute_allows(tokens, openings.free + len(openings.occupied), tip)
    if pool is not None:
        room = memory_allows(prompts[:room], pool)
    ends = list(accumulate(prompt.blocks for prompt in prompts[:room]))
    held = bisect_right(ends, openings.blocks)
    undisturbed = best = asked = compute_allows(tokens[:held], openings.free, tip)
    gained = openings.wait * (behind + sum([1.0 / length for length in tokens[undisturbed:]]))
    for more in _sizes(openings, degrees):
        blocks = openings.blocks + sum([each.blocks for each in openings.occupied[:more]])
        held = bisect_right(ends, blocks)
        count = compute_allows(tokens[:held], openings.free + more, tip)
        if count > asked:
            asked = count
            if gained > _price(tokens[:count], openings, more, degrees, cost):
                best = count
    return best


def peak_of_future_kv(
    held: Int64[np.ndarray, " n"], left: Int64[np.ndarray, " n"], block_size: int = 1
) -> int:
    """The most KV tokens that exist at once, if all grow in step: see the module."""
    if not len(held):
        return 0
    held = _ends(held + left, block_size) - left
    order = np.argsort(-left, kind="stable")
    there = np.cumsum(held[order])
    return int((there + np.arange(1, len(order) + 1) * left[order]).max())


def memory_allows(prompts: Sequence[Prompt], pool: Pool) -> int:
    """How many requests in line the pool can take, for the peak grows with each of them."""
    held = np.concatenate([pool.held, np.array([prompt.tokens for prompt in prompts], np.int64)])
    left = np.concatenate([pool.left, np.array([prompt.growth for prompt in prompts], np.int64)])
    holders = len(pool.held)
    together = np.cumsum(_ends(held + left, pool.block_size))[holders:]
    least = int(np.searchsorted(together, pool.capacity, side="right"))  # even all at their ends
    most = len(prompts)
    while least < most:
        count = (least + most + 1) // 2
        end = holders + count
        if peak_of_future_kv(held[:end], left[:end], pool.block_size) <= pool.capacity:
            least = count
        else:
            most = count - 1
    return least


def _ends(tokens: Int64[np.ndarray, " n"], block_size: int) -> Int64[np.ndarray, " n"]:
    return -(-tokens // block_size) * block_size


def tipping_point(degree: int, cost: CostModel) -> int:
    """Prompt tokens from which on a step of this degree takes time in proportion to them."""
    tokens = 32 * degree
    time = cost.prefill(degree, [ChunkWork(tokens, 0)])
    while tokens < _LONGEST_PROBE:
        twice = cost.prefill(degree, [ChunkWork(2 * tokens, 0)])
        if twice >= _LINEAR * time:
            break
        tokens, time = 2 * tokens, twice
    return tokens // degree


def compute_allows(lengths: Sequence[int], instances: int, tip: int) -> int:
    """How many requests in line keep `instances` busy up to the tipping point of each."""
    if not instances:
        return 0
    most = max(1, instances - 1) * tip
    total = 0
    for count, tokens in enumerate(lengths):
        total += min(tokens, most)
        if total > instances * tip:
            return count
    return len(lengths)


def _sizes(openings: Openings, degrees: Sequence[int]) -> list[int]:
    """Numbers of occupied instances to try: those that reach another degree, and all."""
    free, count = openings.free, len(openings.occupied)
    sizes = {degree - free for degree in degrees if free < degree < free + count}
    return sorted(sizes | {count}) if count else []


def _price(
    lengths: Sequence[int],
    openings: Openings,
    more: int,
    degrees: Sequence[int],
    cost: CostModel,
) -> float:
    """What it costs decodes if prompts of these lengths take `more` occupied instances too."""
    instances = openings.free + more
    degree = max((d for d in degrees if d <= instances), default=degrees[0])
    time = cost.prefill(degree, [ChunkWork(tokens, 0) for tokens in lengths])
    return sum([each.weight * min(time, each.migrate) for each in openings.occupied[:more]], 0.0)
