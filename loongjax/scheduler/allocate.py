"""Step 2 of 4: which instances the dispatched prompts get (section 5.2).

Idle instances without decodes come for nothing. Another one is added if what it gains is more
than what it costs, both in seconds per token (equations 3 and 4 of the paper):

    Gain(e)        = sum over r of (T(R, E) - T(R, E + e)) / r.input
    Cost, paused   = T(R, E + e) * sum over d on e of 1 / d.output
    Cost, migrated = V(e) / bandwidth * sum over d on e of 1 / d.output

R: the dispatched prompts; d: who decodes on e. Decodes are paused for as long as the prompts
run, or their KV is first moved to instances that are not used, for as long as that takes.
Instead of adding one instance after another, all degrees are compared by the sum that these
differences come from, and the lowest is taken:

    total(E) = (T + W + M) * sum over r of 1 / r.input + (W + M) * sum over b of 1 / b.input
             + (T if paused, M if migrated) * sum over d on E of 1 / d.output

W: how long until the last of E is idle [s]; M: time to migrate; b: who waits in line behind.
W is not in the paper, which plans for all instances at once; here they become idle one by one,
and a prompt may wait for some of them. Without W it would take what is idle now, however long
it runs there. Where the topology lacks the best instances of a degree as a group, groups
around each of the best are tried.

The published code moves KV at 400 GB/s of a 7B model; here the cost model knows.

Pure functions; O(candidates * log(candidates) + degrees * prompts) for each distinct W.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from loongjax.costmodel.protocol import ChunkWork, CostModel
from loongjax.plan import Group, InstanceId, Topology
from loongjax.scheduler.batching import Limits, few_degrees
from loongjax.scheduler.dispatch import Prompt

_SEEDS = 8
"""Instances to try a group around where the best ones form none."""


class Candidate(NamedTuple):
    """An instance that prompts may run on.

    Attributes:
      instance: Which.
      free: Free blocks that nobody is granted.
      blocks: The same once its decodes have moved away.
      wait: How long until it is idle [s]; 0: now.
      paused: The sum of 1 / output over who decodes there [1/token]; 0: nobody does.
      moved: KV tokens to move so that nobody decodes there; None: that cannot be done.
    """

    instance: InstanceId
    free: int
    blocks: int
    wait: float
    paused: float
    moved: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """What the prompts get.

    Attributes:
      group: Instances, ascending.
      migrate: Those of them whose KV is to be moved away first.
      total: What it costs [s/token]: see the module.
    """

    group: Group
    migrate: tuple[InstanceId, ...]
    total: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Demand:
    """What instances are wanted for.

    Attributes:
      prompts: The dispatched prompts.
      behind: The sum of 1 / input over those in line behind them [1/token].
      elsewhere: Blocks on instances that are no candidates that KV may be moved to.
      most: Instances that they may have at most. None: all.
    """

    prompts: Sequence[Prompt]
    behind: float = 0.0
    elsewhere: int = 0
    most: int | None = None


def allocate(
    demand: Demand,
    candidates: Sequence[Candidate],
    topology: Topology,
    limits: Limits,
    cost: CostModel,
) -> Allocation | None:
    """The group with the lowest total: see the module. Ties: lower degree.

    Returns:
      None if no group of candidates holds the prompts.
    """
    judge = _Judge(demand, candidates, cost)
    rankings = _rankings(candidates)
    most = len(candidates) if demand.most is None else min(demand.most, len(candidates))
    degrees = _degrees(demand.prompts, most, topology, limits)
    options = [
        option
        for rank, ranking in enumerate(rankings)
        for option in judge.first_ones(ranking, degrees, rank)
    ]
    heapify(options)
    while options:
        option = heappop(options)
        members = option.members or rankings[option.rank][: option.degree]
        group = _ids(members)
        if option.members or topology.contains(group):
            sources = tuple(member.instance for member in members if member.paused)
            migrate = sources if option.moves else ()
            return Allocation(group=group, migrate=migrate, total=option.total)
        for around in _around(rankings[option.rank], option.degree, topology):
            for other in judge.judge(around, option.rank):
                if other.moves == option.moves:
                    heappush(options, other)
    return None


class _Option(NamedTuple):
    """A group to choose: `members`, or if there are none, the first ones of a ranking, which
    may not form a group. `moves`: decodes migrate. `instances` settles ties among the former.
    """

    total: float
    degree: int
    moves: bool
    rank: int
    instances: Group
    members: tuple[Candidate, ...]


class _Judge:
    """Says what groups cost."""

    def __init__(self, demand: Demand, candidates: Sequence[Candidate], cost: CostModel) -> None:
        prompts = demand.prompts
        self._cost = cost
        self._chunks = [ChunkWork(prompt.tokens, 0) for prompt in prompts]
        self._times: dict[int, float] = {}
        self._needed = sum(prompt.blocks for prompt in prompts)
        self._inputs = sum(1.0 / prompt.tokens for prompt in prompts)
        self._behind = demand.behind
        self._room = demand.elsewhere + sum(candidate.free for candidate in candidates)

    def first_ones(
        self, ranking: Sequence[Candidate], degrees: Sequence[int], rank: int
    ) -> Iterator[_Option]:
        """The first ones of a ranking, at every degree that it has."""
        for sums in _running_sums(ranking, degrees):
            yield from self._options(sums, rank, ())

    def judge(self, members: tuple[Candidate, ...], rank: int) -> Iterator[_Option]:
        """One group."""
        (sums,) = _running_sums(members, (len(members),))
        yield from self._options(sums, rank, members)

    def _options(self, sums: _Sums, rank: int, members: tuple[Candidate, ...]) -> Iterator[_Option]:
        """Decodes paused, if there is memory, and migrated, if there is room elsewhere."""
        time, ids = self._time(sums.degree), _ids(members)
        if sums.free >= self._needed:
            delay = sums.wait * (self._inputs + self._behind)
            total = time * (self._inputs + sums.paused) + delay
            yield _Option(total, sums.degree, False, rank, ids, members)
        room = self._room - sums.free
        if sums.moved and sums.given <= room and sums.cleared >= self._needed:
            moving = self._cost.migrate(sums.moved)
            delay = (sums.wait + moving) * (self._inputs + self._behind)
            total = time * self._inputs + delay + moving * sums.paused
            yield _Option(total, sums.degree, True, rank, ids, members)

    def _time(self, degree: int) -> float:
        if degree not in self._times:
            self._times[degree] = self._cost.prefill(degree, self._chunks)
        return self._times[degree]


class _Sums(NamedTuple):
    """Of some candidates.

    Attributes:
      degree: How many.
      wait: Until all are idle [s].
      free, cleared: Free blocks, and those once nobody decodes there.
      paused: 1 / output over who decodes there [1/token].
      moved: KV tokens to move so that nobody does; None: that cannot be done.
      given: Blocks that those then take elsewhere.
    """

    degree: int
    wait: float
    free: int
    cleared: int
    paused: float
    moved: int | None
    given: int


def _running_sums(candidates: Sequence[Candidate], degrees: Sequence[int]) -> Iterator[_Sums]:
    """Of the first ones, as many as each of the degrees, which ascend, says."""
    wanted = set(degrees)
    most = degrees[-1] if degrees else 0
    wait = paused = 0.0
    free = cleared = given = 0
    moved: int | None = 0
    for count, candidate in enumerate(candidates[:most], 1):
        wait = max(wait, candidate.wait)
        free += candidate.free
        if candidate.paused:
            paused += candidate.paused
            cleared += candidate.blocks
            given += candidate.blocks - candidate.free
            moved = None if moved is None or candidate.moved is None else moved + candidate.moved
        else:
            cleared += candidate.free
        if count in wanted:
            yield _Sums(count, wait, free, cleared, paused, moved, given)


def _ids(candidates: Sequence[Candidate]) -> Group:
    return tuple(sorted(candidate.instance for candidate in candidates))


def _degrees(
    prompts: Sequence[Prompt], most: int, topology: Topology, limits: Limits
) -> tuple[int, ...]:
    """Degrees up to `most` at which one step, or one for each instance, can hold these prompts."""
    longest = max(prompt.tokens for prompt in prompts)
    all_tokens = sum(prompt.tokens for prompt in prompts)
    least = max(-(-max(longest, all_tokens) // limits.tokens), -(-len(prompts) // limits.chunks))
    return few_degrees([d for d in topology.degrees if least <= d <= most])


def _rankings(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """For each time by which some are idle: those, by what pausing costs, by what moving
    costs, and by memory; the best first. No order twice.
    """
    found: dict[tuple[InstanceId, ...], list[Candidate]] = {}
    for wait in sorted({candidate.wait for candidate in candidates}):
        there = [candidate for candidate in candidates if candidate.wait <= wait]
        for key in (_by_pause, _by_move, _by_room):
            ranking = sorted(there, key=key)
            found.setdefault(tuple(candidate.instance for candidate in ranking), ranking)
    return list(found.values())


def _by_pause(candidate: Candidate) -> tuple[float, int, InstanceId]:
    return (candidate.paused, -candidate.free, candidate.instance)


def _by_move(candidate: Candidate) -> tuple[float, int, InstanceId]:
    moved = 0 if not candidate.paused else candidate.moved
    tokens = float("inf") if moved is None else float(moved)
    return (tokens, -candidate.free, candidate.instance)


def _by_room(candidate: Candidate) -> tuple[int, InstanceId]:
    return (-candidate.free, candidate.instance)


def _around(
    ranking: Sequence[Candidate], degree: int, topology: Topology
) -> Iterator[tuple[Candidate, ...]]:
    """Groups of this degree around the first ones of a ranking."""
    by_id = {candidate.instance: candidate for candidate in ranking}
    allowed = frozenset(by_id)
    covers = (
        topology.smallest_cover(frozenset({seed.instance}), allowed, degree)
        for seed in ranking[:_SEEDS]
    )
    for group in dict.fromkeys(covers):
        if group is not None and len(group) == degree:
            yield tuple(by_id[instance] for instance in group)
