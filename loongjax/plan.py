"""The messages between scheduler, engine and executors, and nothing else.

Owns the vocabulary of a plan: what the scheduler sees (`Snapshot`), what it answers
(`Plan` of steps), and what comes back from an executor (`StepResult`). All of it is
frozen and picklable, so that a step can cross a process border and a snapshot can be
replayed. The scheduler counts tokens; slots of the KV pool do not appear here, they
belong to `loongjax.kvcache.BlockAllocator`.

Imports nothing of loongjax but the errors, and never jax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

InstanceId: TypeAlias = int
RequestId: TypeAlias = str
Group: TypeAlias = tuple[InstanceId, ...]
"""Instances that work on one batch, ascending; the position in the tuple is the rank."""


class Share(NamedTuple):
    """A number of KV tokens on one instance."""

    instance: InstanceId
    tokens: int


@runtime_checkable
class Topology(Protocol):
    """Which groups exist on this hardware."""

    @property
    def instances(self) -> int:
        """How many elastic instances there are; their ids count from 0."""
        ...

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees that have at least one group, ascending."""
        ...

    def groups(self, degree: int) -> Sequence[Group]:
        """All groups of this degree; empty if there is none."""
        ...

    def contains(self, group: Group) -> bool:
        """Whether this exact group exists."""
        ...

    def smallest_cover(
        self,
        instances: frozenset[InstanceId],
        allowed: frozenset[InstanceId] | None = None,
        degree: int = 1,
    ) -> Group | None:
        """The smallest group of at least `degree` that holds all of `instances` and uses
        none outside `allowed` (None: any); None if there is no such group.
        """
        ...


T = TypeVar("T")


def _quick(frozen: type[T]) -> type[T]:
    """Makes a frozen dataclass six times as quick to create, as quick as an open one: there are
    one or two new views for every token, and as many chunks where decodes ride along. Only type
    checkers hold it frozen from then on.
    """
    names = [
        (each.name, object, field(default=each.default))
        for each in fields(frozen)  # type: ignore[arg-type]
    ]
    plain = make_dataclass("_Plain", names, kw_only=True)
    frozen.__init__ = plain.__init__  # type: ignore[method-assign,misc]
    del frozen.__setattr__, frozen.__delattr__
    return frozen


@_quick
@dataclass(frozen=True, kw_only=True, slots=True)
class RequestView:
    """What the scheduler knows of a request. Replaced only when it changes.

    Attributes:
      id: Unique among live requests.
      prompt: Tokens of the prompt.
      computed: Tokens whose KV is in the pool.
      generated: Tokens produced so far. The newest has no KV yet.
      max_tokens: Tokens that may be generated at most; the request never needs more than
        `prompt + max_tokens - 1` slots, for the last token is never read.
      arrival: When it came [s, engine clock].
      kv: Where its KV lies, ascending by instance; counts sum to `computed`.
      tail: Where its last block is partly filled, and how many more tokens fit there
        without a new block. None when the next token needs a new block anywhere.
      holes: Slots in its blocks that its next tokens cannot take, ascending by instance. None
        with blocks of one token, nor as long as nothing but the tail is left partly filled.
      shared: Slots of its blocks that other answers to its prompt hold too, ascending by instance:
        dropping its KV alone does not free them. A move from there is a copy.
      deadline: When it should end [s, engine clock], or None.
      priority: Higher is served earlier.
      last_seq: The newest step that computed for it, or None before the first; a
        `MigrateStep` does not.
      first_token: When its first token was on the host [s, engine clock], or None before that.
    """

    id: RequestId
    prompt: int
    max_tokens: int
    arrival: float
    computed: int = 0
    generated: int = 0
    kv: tuple[Share, ...] = ()
    tail: Share | None = None
    holes: tuple[Share, ...] = ()
    shared: tuple[Share, ...] = ()
    deadline: float | None = None
    priority: int = 0
    last_seq: int | None = None
    first_token: float | None = None

    @property
    def length(self) -> int:
        """Tokens known: the prompt and what was generated."""
        return self.prompt + self.generated

    @property
    def uncomputed(self) -> int:
        """Known tokens without KV. A decoding request has exactly one, less one for each step
        in flight that works on it.
        """
        return self.length - self.computed

    @property
    def peak(self) -> int:
        """KV tokens that it needs at most before it ends."""
        return self.prompt + self.max_tokens - 1

    @property
    def homes(self) -> frozenset[InstanceId]:
        """Instances that hold any of its KV."""
        return frozenset([share[0] for share in self.kv])


@_quick
@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceView:
    """What the scheduler knows of an elastic instance.

    Attributes:
      id: Its number, from 0.
      slots: KV tokens that its pool holds.
      free_slots: Slots in blocks that nobody holds (room in partly filled blocks is in
        `RequestView.tail`), and that may be taken.
      withheld: Such slots that may not be taken, since the instance is to run empty; then
        `free_slots` is 0.
      busy_seq: The newest step in flight that involves it, or None when it is idle. Another
        one may run before it, on the same group (`Plan.ahead`).
      prefill_seq: The newest prefill step that was launched on it, in flight or done; None
        before the first. With `RequestView.last_seq` it tells whose decoding was put off.
    """

    id: InstanceId
    slots: int
    free_slots: int
    withheld: int = 0
    busy_seq: int | None = None
    prefill_seq: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """All that a policy may look at, at one moment. Immutable.

    Attributes:
      version: Grows with every change of the engine's state.
      next_seq: The `seq` of the next step; a plan numbers its steps from here.
      block_size: Tokens per block of the pool.
      max_chunk_tokens: Prompt tokens that one prefill step may hold for each rank.
      max_rows: Decoding requests that one rank may be master of in one step.
      waiting: Requests without KV, or with more than one token to compute, by arrival.
      running: The others: those that decode, by arrival.
      instances: Every instance, by id.
      in_flight: Requests that a submitted, unfinished step works on.
      topology: The groups that exist.
      flights: The steps in flight, by seq; those on one group run one after the other.
    """

    version: int
    next_seq: int
    block_size: int
    max_chunk_tokens: int
    max_rows: int
    waiting: tuple[RequestView, ...]
    running: tuple[RequestView, ...]
    instances: tuple[InstanceView, ...]
    in_flight: frozenset[RequestId]
    topology: Topology
    flights: tuple[Flight, ...] = ()


@_quick
@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Consecutive tokens of one request that a prefill step computes.

    `last` says that the chunk ends the known tokens, so that the step samples the next.
    """

    request: RequestId
    start: int
    length: int
    last: bool


@_quick
@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Which instances keep the KV of a chunk, and how many tokens each.

    Token order: the first share takes the chunk's first tokens, and so on.
    """

    request: RequestId
    shares: tuple[Share, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillStep:
    """Computes chunks on a group; `keep` has one placement for each chunk, in order.

    A group larger than the instances in `keep` is the paper's proactive scale-down: the
    KV is retained while it passes in the ring, at no extra communication.
    """

    seq: int
    group: Group
    chunks: tuple[Chunk, ...]
    keep: tuple[Placement, ...]


class DecodeRow(NamedTuple):
    """One request in a decode step.

    master: runs its dense layers; home: stores the KV of the token that goes in.
    """

    request: RequestId
    master: InstanceId
    home: InstanceId


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeStep:
    """One token for each row. The group contains every instance with KV of any row."""

    seq: int
    group: Group
    rows: tuple[DecodeRow, ...]


class Move(NamedTuple):
    """KV that goes from one instance to another: the newest `tokens` of those that `source`
    holds of a request.
    """

    request: RequestId
    source: InstanceId
    target: InstanceId
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MigrateStep:
    """Moves KV inside a group; computes nothing. Its requests do not run meanwhile.

    The group is the sources and the targets, rounded up to one that exists; it may lack other
    instances with KV of its requests. Moves of one request from one instance follow each
    other: the first takes the newest tokens there. An instance does not both give and take
    KV of one request.
    """

    seq: int
    group: Group
    moves: tuple[Move, ...]


Step: TypeAlias = PrefillStep | DecodeStep | MigrateStep


class Flight(NamedTuple):
    """A step in flight, and when it was launched [s, engine clock]."""

    step: Step
    launched: float


class Rejection(NamedTuple):
    """A waiting request that can never be served, and why."""

    request: RequestId
    reason: str


class Reason(NamedTuple):
    """Why a request runs where it does, or waits. As long as that stays so the text stays the
    same, for only changes are kept.
    """

    request: RequestId
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a policy decided.

    Attributes:
      steps: To be submitted in this order; seq ascending from `Snapshot.next_seq`.
      preempt: Requests whose KV is dropped first; they wait and are computed anew.
      reject: Waiting requests that are turned away.
      ahead: Groups that go on by themselves until the next plan: behind a decode step of such
        a group, of this plan or in flight, the engine launches the next one with the same rows
        before the first one's tokens are known. A group that is left out becomes idle when
        what is in flight on it has ended. Nothing of the group can be preempted, moved or
        regrouped before that, so leave out what anybody waits for.
      reasons: Why some of the requests run or wait; for people, nothing depends on them.
    """

    steps: tuple[Step, ...] = ()
    preempt: tuple[RequestId, ...] = ()
    reject: tuple[Rejection, ...] = ()
    ahead: frozenset[Group] = frozenset()
    reasons: tuple[Reason, ...] = ()


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: of the token there, and of the most likely ones.

    They are the model's own, before temperature or anything else.

    Attributes:
      token: The token, with its log-probability and its rank; 1 is the most likely.
      top: The most likely tokens, as many as were asked for, with their log-probabilities.
    """

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


class SampledToken(NamedTuple):
    """The token that a step produced for a request; `logprobs` if that asked for them."""

    request: RequestId
    token: int
    logprobs: TokenLogprobs | None = None


class PromptLogprobs(NamedTuple):
    """Log-probabilities of a prompt's tokens from position `start` on, which a step computed."""

    request: RequestId
    start: int
    tokens: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What became of a step.

    Attributes:
      seq: The step.
      tokens: One for each row, or for each chunk with `last`, in the step's order.
      prompts: For chunks whose requests asked for them.
      error: Why it failed; the KV on its group's instances is lost then. None: it ran.
      started: When it was launched, or when the step ended that it was queued behind, if that
        was later [s, executor clock].
      ended: When its tokens were on the host [s, executor clock].
    """

    seq: int
    tokens: tuple[SampledToken, ...] = ()
    prompts: tuple[PromptLogprobs, ...] = ()
    error: str | None = None
    started: float
    ended: float


def step_requests(step: Step) -> tuple[RequestId, ...]:
    """The requests that a step works on, in its order."""
    if isinstance(step, PrefillStep):
        return tuple([chunk.request for chunk in step.chunks])
    if isinstance(step, MigrateStep):
        return tuple(dict.fromkeys([move.request for move in step.moves]))
    return tuple([row[0] for row in step.rows])
