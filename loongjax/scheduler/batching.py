"""Step 3 of 4: which dispatched prompts go together, on how many instances (section 5.3).

Minimises the sum of input latencies per token [s/token] by dynamic programming over prompts
sorted by length and instances in a row:

    f[i][k] = min( f[i][k-1],
                   min over 1 <= j <= i, l in degrees of
                       f[i-j][k-l] + T_l(batch) * sum over batch of 1 / len )

i: prompts taken, in order of length; k: instances passed; T_l: prefill time of the batch at
degree l [s]. The batch is prompts i-j+1 .. i, its group instances k-l+1 .. k. Unlike the
paper, a degree or group that the topology lacks is skipped, an instance may be left unused,
and a group must hold the batch's KV and its tokens (limits of a step). Ties: fewer instances,
then the lower degree.

T_l is taken as affine in its chunks, as `a + b * sum(len) + c * sum(len^2)` is: the times of
single prompts and one pair give all others. With R prompts, N instances and D degrees that
takes O(R * D) calls of the cost model, and O(R^2 * N * D) operations inside numpy. More
prompts than `_MOST_ITEMS` are first bundled with their neighbours in length.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float64, Int64

from loongjax.costmodel.protocol import ChunkWork, CostModel
from loongjax.plan import Group, InstanceId, Topology
from loongjax.scheduler.dispatch import Prompt

_MOST_ITEMS = 24
_MOST_DEGREES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one prefill step may hold for each rank: tokens, padding counted, and chunks."""

    tokens: int
    chunks: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillBatch:
    """Prompts that are computed together: their places in the input, and where."""

    prompts: tuple[int, ...]
    group: Group


def split_prefill(
    prompts: Sequence[Prompt],
    instances: Sequence[InstanceId],
    free: Sequence[int],
    topology: Topology,
    limits: Limits,
    cost: CostModel,
) -> tuple[PrefillBatch, ...] | None:
    """Splits prompts into batches and gives each a group: see the module.

    Args:
      prompts: Any order.
      instances: Those to be used, in a row; a group is a stretch of it.
      free: Free blocks of each of them.
      topology: Which stretches are groups.
      limits: What one step may hold.
      cost: Predicts prefill times.

    Returns:
      The batches, each prompt in one; None if there is no way.
    """
    order = sorted(range(len(prompts)), key=lambda i: prompts[i].tokens)
    if len(instances) == 1:  # they can only go together
        fits = topology.contains(tuple(instances)) and _fits(prompts, free[0], limits)
        alone = PrefillBatch(prompts=tuple(order), group=tuple(instances))
        return (alone,) if fits else None
    items = _bundle([prompts[i].tokens for i in order])
    degrees = few_degrees([d for d in topology.degrees if d <= len(instances)])
    if not degrees or not order:
        return None
    members = [order[start:end] for start, end in items]
    price = _prices([[prompts[i].tokens for i in item] for item in members], degrees, cost)
    price[_overflows(members, prompts, degrees, limits)] = np.inf
    blocks = np.cumsum([0, *(sum(prompts[i].blocks for i in item) for item in members)])
    space = _spaces(instances, free, degrees, topology)
    found = _solve(price, blocks, space, degrees)
    if found is None:
        return None
    return tuple(
        PrefillBatch(
            prompts=tuple(i for item in members[first:last] for i in item),
            group=tuple(sorted(instances[start:end])),
        )
        for first, last, start, end in found
    )


def _fits(prompts: Sequence[Prompt], free: int, limits: Limits) -> bool:
    """Whether one step on one instance can hold them."""
    tokens = sum(prompt.tokens for prompt in prompts)
    blocks = sum(prompt.blocks for prompt in prompts)
    return tokens <= limits.tokens and blocks <= free and len(prompts) <= limits.chunks


def few_degrees(degrees: Sequence[int]) -> tuple[int, ...]:
    """At most `_MOST_DEGREES` of them, the lowest and the highest kept, spread by ratio."""
    return _spread(tuple(degrees))


@lru_cache(maxsize=1024)
def _spread(degrees: tuple[int, ...]) -> tuple[int, ...]:
    if len(degrees) <= _MOST_DEGREES:
        return degrees
    wanted = np.geomspace(degrees[0], degrees[-1], _MOST_DEGREES)
    return tuple(sorted({degrees[i] for i in np.searchsorted(degrees, wanted - 1e-9)}))


def _bundle(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Stretches of the sorted prompts that stay together, at most `_MOST_ITEMS`.

    Up to the limit each is on its own; beyond, all have about the same number of tokens.
    """
    if len(tokens) <= _MOST_ITEMS:
        return [(i, i + 1) for i in range(len(tokens))]
    ends = np.cumsum(tokens)
    parts = np.arange(1, _MOST_ITEMS + 1) * (ends[-1] / _MOST_ITEMS)
    cuts = sorted({0, *(int(i) + 1 for i in np.searchsorted(ends, parts - 1e-6))})
    return list(itertools.pairwise(cuts))


def _prices(
    items: Sequence[Sequence[int]], degrees: Sequence[int], cost: CostModel
) -> Float64[np.ndarray, "degrees items1 items1"]:
    """`[l, i, h]`: T_l * sum(1 / len) of items h .. i-1, in one batch; inf where h >= i."""
    count = len(items)
    single = np.empty((len(degrees), count))
    base = np.empty(len(degrees))
    for row, degree in enumerate(degrees):
        shortest = ChunkWork(items[0][0], 0)
        alone = cost.prefill(degree, [shortest])
        base[row] = max(0.0, 2 * alone - cost.prefill(degree, [shortest, shortest]))
        single[row] = [
            cost.prefill(degree, [ChunkWork(tokens, 0) for tokens in item]) for item in items
        ]
    ends = np.zeros((len(degrees), count + 1))
    np.cumsum(single - base[:, None], axis=1, out=ends[:, 1:])
    weight = np.cumsum([0.0, *(sum(1.0 / tokens for tokens in item) for item in items)])
    time = base[:, None, None] + ends[:, :, None] - ends[:, None, :]
    price = time * (weight[:, None] - weight[None, :])
    price[:, np.arange(count + 1)[:, None] <= np.arange(count + 1)] = np.inf
    return price


def _overflows(
    members: Sequence[Sequence[int]],
    prompts: Sequence[Prompt],
    degrees: Sequence[int],
    limits: Limits,
) -> Bool[np.ndarray, "degrees items1 items1"]:
    """Whether items h .. i-1 are too much for one step of a degree."""
    count = np.cumsum([0, *(len(item) for item in members)])
    chunks = count[:, None] - count[None, :]
    over = np.empty((len(degrees), len(count), len(count)), bool)
    for row, degree in enumerate(degrees):
        padded = (sum(-(-prompts[i].tokens // degree) for i in item) for item in members)
        ends = np.cumsum([0, *padded])
        too_long = ends[:, None] - ends[None, :] > limits.tokens
        over[row] = too_long | (chunks > limits.chunks * degree)
    return over


def _spaces(
    instances: Sequence[InstanceId],
    free: Sequence[int],
    degrees: Sequence[int],
    topology: Topology,
) -> Int64[np.ndarray, "degrees instances1"]:
    """`[l, k]`: free blocks of the group of degree l that ends before k; -1: there is none."""
    ends = np.cumsum([0, *free])
    space = np.full((len(degrees), len(instances) + 1), -1)
    for row, degree in enumerate(degrees):
        for end in range(degree, len(instances) + 1):
            if topology.contains(tuple(sorted(instances[end - degree : end]))):
                space[row, end] = ends[end] - ends[end - degree]
    return space


def _solve(
    price: Float64[np.ndarray, "degrees items1 items1"],
    blocks: Int64[np.ndarray, " items1"],
    space: Int64[np.ndarray, "degrees instances1"],
    degrees: Sequence[int],
) -> list[tuple[int, int, int, int]] | None:
    """The batches of the best way as (first item, last item, first instance, last), each
    end exclusive; None if there is no way.
    """
    rows, width = len(degrees), space.shape[1]
    count = len(blocks) - 1
    best = np.full((count + 1, width), np.inf)
    best[0] = 0.0
    # shifted[l, h, k] = f[h][k - l]: what came before a group of degree l that ends at k
    shifted = np.full((rows, count + 1, width), np.inf)
    choice = np.zeros((count + 1, width), np.int64)
    at = np.zeros((count + 1, width), np.int64)
    for row, degree in enumerate(degrees):
        shifted[row, 0, degree:] = 0.0
    columns = np.arange(width)
    for i in range(1, count + 1):
        total = shifted[:, :i] + price[:, i, :i, None]
        needed = blocks[i] - blocks[:i]
        total[needed[None, :, None] > space[:, None, :]] = np.inf
        flat = total.reshape(rows * i, width)
        pick = flat.argmin(axis=0)
        value = flat[pick, columns]
        reached = np.minimum.accumulate(value)
        # where the minimum was first reached: there the last group ends
        improves = np.concatenate([[True], reached[1:] < reached[:-1]])
        at[i] = np.maximum.accumulate(np.where(improves, columns, 0))
        choice[i] = pick
        best[i] = reached
        for row, degree in enumerate(degrees):
            shifted[row, i, degree:] = reached[: width - degree]
    if not np.isfinite(best[count, -1]):
        return None
    found = []
    i, k = count, width - 1
    while i:
        end = int(at[i, k])
        row, first = divmod(int(choice[i, end]), i)
        found.append((first, i, end - degrees[row], end))
        i, k = first, end - degrees[row]
    return found[::-1]
