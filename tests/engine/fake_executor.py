"""An executor that "generates" by a checksum, on a virtual clock, and distrusts the engine.

It remembers which token of which request every slot of the pool holds, and refuses (by an
AssertionError, which kills the engine and so fails the test) whatever a real device would
answer with wrong tokens: a slot overwritten, KV missing or outside the group, KV that moves
from or to where it must not, a busy instance, a request dropped while a step works on it, a
step queued behind one that does not give it its tokens.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loongjax.executor.protocol import ExecutorLimits, RequestInput
from loongjax.kvcache.messages import DecodeSlots, MigrateSlots, MoveSlots, PrefillSlots, SlotPlan
from loongjax.plan import (
    DecodeStep,
    MigrateStep,
    PrefillStep,
    SampledToken,
    Step,
    StepResult,
    step_requests,
)
from loongjax.programs.counts import ProgramCounts

VOCAB = 1000
PATIENCE_S = 20.0


def next_token(tokens: Sequence[int], sample: int = 0) -> int:
    """The "model": a function of all tokens, of how many they are, and of the sample's index."""
    data = b"".join(token.to_bytes(4, "little") for token in tokens)
    return zlib.crc32(data, len(tokens) + (sample << 16)) % VOCAB


def answer(prompt: Sequence[int], count: int, sample: int = 0) -> tuple[int, ...]:
    """The first `count` tokens that follow a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, sample))
    return tuple(tokens[len(prompt) :])


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A step in flight: its virtual times."""

    step: Step
    started: float
    ends: float


def earliest(flights: Sequence[Flight]) -> int:
    """Which step ends next when nothing else is asked for."""
    return min(range(len(flights)), key=lambda i: (flights[i].ends, flights[i].step.seq))


class FakeExecutor:
    """See the module.

    Attributes:
      flights: Steps in flight, by launch.
      submitted: Every step that was ever submitted.
      queued: Those of them that were submitted behind another one.
      inputs: Every request that was ever admitted, by id.
      polls: How often `poll` was called.
      closed: Whether `close` was called.
    """

    def __init__(
        self,
        *,
        limits: ExecutorLimits | None = None,
        duration: Callable[[Step], float] = lambda step: 1.0,
        order: Callable[[Sequence[Flight]], int] = earliest,
        fail: Callable[[Step], str | None] = lambda step: None,
    ) -> None:
        self._limits = limits or ExecutorLimits(max_chunk_tokens=64, max_rows=8, steps_ahead=1)
        self._duration = duration
        self._order = order
        self._fail = fail
        self._changed = threading.Condition()
        self._time = 0.0
        self._held = False
        self._woken = False
        self._idle = False
        self._tokens: dict[str, list[int]] = {}
        self._kv: dict[str, dict[int, tuple[int, int]]] = {}
        self._pool: dict[tuple[int, int], tuple[str, int]] = {}
        self._author: dict[tuple[str, int], str] = {}  # who computed a token's KV, if forked
        self._doomed: dict[int, str] = {}
        self._allowed: dict[str, np.ndarray] = {}
        self._free_at: dict[int, float] = {}
        self.flights: list[Flight] = []
        self.submitted: list[Step] = []
        self.queued: list[Step] = []
        self.inputs: dict[str, RequestInput] = {}
        self.polls = 0
        self.closed = False

    # What tests use

    def hold(self) -> None:
        """No step ends until `release`."""
        with self._changed:
            self._held = True

    def release(self) -> None:
        """Lets steps end again."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def advance(self, seconds: float) -> None:
        """Moves the clock on."""
        with self._changed:
            self._time += seconds

    def wait_for(self, condition: Callable[[FakeExecutor], object]) -> None:
        """Waits until `condition(self)` holds; it is looked at whenever something changes."""
        with self._changed:
            met = self._changed.wait_for(lambda: condition(self), timeout=PATIENCE_S)
        assert met, "the engine did not get there"

    def wait_idle(self) -> None:
        """Waits until the engine waits in `poll` and nothing can end by itself."""
        self.wait_for(lambda executor: executor._idle and not executor._woken)

    @property
    def known(self) -> set[str]:
        """Requests that were admitted and not forgotten."""
        return set(self._tokens)

    # The protocol

    @property
    def limits(self) -> ExecutorLimits:
        return self._limits

    @property
    def program_counts(self) -> ProgramCounts:
        return ProgramCounts(compiled=3)

    def now(self) -> float:
        return self._time

    def admit(self, request: RequestInput) -> None:
        assert request.id not in self._tokens
        assert 0 <= request.seed < 2**31
        with self._changed:
            self.inputs[request.id] = request
            self._tokens[request.id] = list(request.token_ids)
            self._kv[request.id] = {}
            self._changed.notify_all()

    def submit(self, step: Step, slots: SlotPlan) -> None:
        with self._changed:
            self._check_launch(step)
            self._write(step, slots)
            started = max(self._time, self._free_at.get(step.group[0], 0.0))
            self._free_at[step.group[0]] = ends = started + self._duration(step)
            self.flights.append(Flight(step=step, started=started, ends=ends))
            self.submitted.append(step)
            self._changed.notify_all()

    def poll(self, timeout: float) -> list[StepResult]:
        with self._changed:
            self.polls += 1
            self._idle = True
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._woken or (self.flights and not self._held), timeout=timeout
            )
            self._idle = False
            self._woken = False
            if not self.flights or self._held:
                return []
            firsts = [f for f in self.flights if self._queue(f.step.group)[0] is f]
            flight = firsts[self._order(firsts)]
            self.flights.remove(flight)
            self._time = max(self._time, flight.ends)
            return [self._finish(flight)]

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def drop_kv(self, request: str) -> None:
        self._check_grounded(request)
        self._drop(request)

    def restrict(self, request: str, allowed: np.ndarray) -> None:
        assert self.inputs[request].is_masked
        assert request not in [
            name for flight in self.flights for name in step_requests(flight.step)
        ]
        self._allowed[request] = allowed

    def fork(self, source: str, target: str) -> None:
        self._check_grounded(source)
        assert not self._kv[target]
        for position, place in self._kv[source].items():
            self._kv[target][position] = place
            self._author[target, position] = self._author.get((source, position), source)
            assert self._tokens[target][position] == self._tokens[source][position]

    def forget(self, request: str) -> None:
        self._check_grounded(request)
        with self._changed:
            self._drop(request)
            del self._tokens[request], self._kv[request]
            self._changed.notify_all()

    def close(self) -> None:
        assert not self.closed
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _drop(self, request: str) -> None:
        for position in self._kv[request]:
            self._author.pop((request, position), None)
        self._kv[request] = {}

    # What it checks

    def _check_launch(self, step: Step) -> None:
        assert not self.submitted or step.seq > self.submitted[-1].seq
        queue = self._queue(step.group)
        others = [flight.step for flight in self.flights if flight not in queue]
        busy = {instance for other in others for instance in other.group}
        assert busy.isdisjoint(step.group), "two groups in flight on one instance"
        if queue:
            self._check_queued(step, [flight.step for flight in queue])
        for name in step_requests(step):
            assert all(name not in step_requests(other) for other in others)
            homes = {instance for instance, _ in self._kv[name].values()}
            assert homes <= set(step.group) or isinstance(step, MigrateStep), "KV outside the group"

    def _check_queued(self, step: Step, queue: list[Step]) -> None:
        """It decodes what the step before it decodes, with the same masters."""
        assert len(queue) <= self._limits.steps_ahead
        assert isinstance(step, DecodeStep)
        assert isinstance(queue[-1], DecodeStep)
        masters = {row.request: row.master for row in queue[-1].rows}
        assert all(masters.get(row.request) == row.master for row in step.rows)
        self.queued.append(step)

    def _queue(self, group: tuple[int, ...]) -> list[Flight]:
        """What is in flight on a group, in the order of the launches."""
        return [flight for flight in self.flights if flight.step.group == group]

    def _check_grounded(self, request: str) -> None:
        for flight in self.flights:
            assert request not in step_requests(flight.step), "a step works on it"

    def _write(self, step: Step, slots: SlotPlan) -> None:
        match step, slots:
            case PrefillStep(), PrefillSlots():
                for share in slots.shares:
                    for position, slot in _places(share.entries).items():
                        self._put(share.request, position, share.instance, slot)
            case DecodeStep(), DecodeSlots():
                rows = zip(step.rows, slots.slots, slots.positions, strict=True)
                for row, slot, position in rows:
                    self._put(row.request, position, row.home, slot)
            case MigrateStep(), MigrateSlots():
                assert [
                    (move.request, move.source, move.target, len(_places(move.given)))
                    for move in slots.moves
                ] == list(step.moves)
                assert {i for move in step.moves for i in move[1:3]} <= set(step.group)
                for move in slots.moves:
                    self._move(move)
            case _:
                raise AssertionError("slots of another kind of step")

    def _move(self, move: MoveSlots) -> None:
        """KV goes from `taken`, where it lies, to `given`; what stays is `left`."""
        kv = self._kv[move.request]
        old, new = _places(move.taken), _places(move.given)
        assert list(old) == list(new), "other tokens arrive than left"
        for position, slot in old.items():
            assert kv[position] == (move.source, slot), "KV moves from where it is not"
            assert self._is_there(move.request, position), "KV was overwritten before it moved"
            del kv[position]
        stays = {p: slot for p, (instance, slot) in kv.items() if instance == move.source}
        assert stays == _places(move.left)
        assert all(p < min(old) for p in stays), "older tokens moved than stayed"
        for position, slot in new.items():
            self._put(move.request, position, move.target, slot)

    def _put(self, request: str, position: int, instance: int, slot: int) -> None:
        assert position not in self._kv[request], "KV computed twice"
        self._kv[request][position] = (instance, slot)
        self._author.pop((request, position), None)
        self._pool[instance, slot] = (request, position)

    def _finish(self, flight: Flight) -> StepResult:
        step = flight.step
        times = {"started": flight.started, "ended": self._time}
        if error := self._doomed.pop(step.seq, None) or self._fail(step):
            for behind in self._queue(step.group):
                self._doomed[behind.step.seq] = f"step {step.seq} failed before it"
            for place in [place for place in self._pool if place[0] in step.group]:
                del self._pool[place]
            return StepResult(seq=step.seq, error=error, **times)
        for name, position in self._arrived(step):
            assert self._is_there(name, position)
        tokens = []
        for name, end in _ends(step, self._tokens):
            known = self._tokens[name]
            assert all(self._is_there(name, position) for position in range(end))
            if end == len(known):
                token = next_token(known, self.inputs[name].sample)
                if self.inputs[name].is_masked:  # the next one that is allowed, for this step alone
                    allowed = self._allowed.pop(name)
                    token = (token + int(np.roll(allowed, -token).argmax())) % VOCAB
                tokens.append(SampledToken(name, token))
                known.append(tokens[-1].token)
        return StepResult(seq=step.seq, tokens=tuple(tokens), **times)

    def _arrived(self, step: Step) -> Iterator[tuple[str, int]]:
        """The tokens of all requests that a migration moved KV of, as far as in its group."""
        for name in step_requests(step) if isinstance(step, MigrateStep) else ():
            for position, (instance, _) in self._kv[name].items():
                if instance in step.group:
                    yield name, position

    def _is_there(self, request: str, position: int) -> bool:
        """Whether KV is where it was written, not overwritten and not lost."""
        author = self._author.get((request, position), request)
        return self._pool.get(self._kv[request][position]) == (author, position)


def _places(entries: np.ndarray) -> dict[int, int]:
    """The slot of every position in some entries."""
    return {
        position + i: slot + i for slot, position, count in entries.tolist() for i in range(count)
    }


def _ends(step: Step, tokens: dict[str, list[int]]) -> list[tuple[str, int]]:
    """Each request of a step, and up to which position it has KV afterwards."""
    if isinstance(step, PrefillStep):
        ends = [(chunk.request, chunk.start + chunk.length) for chunk in step.chunks]
        for chunk, (name, end) in zip(step.chunks, ends, strict=True):
            assert chunk.last == (end == len(tokens[name]))
        return ends
    if isinstance(step, MigrateStep):
        return []
    return [(row.request, len(tokens[row.request])) for row in step.rows]
