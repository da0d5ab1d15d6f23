"""The engine: a thread-safe front and the loop thread behind it.

    with Engine(executor=..., policy=..., ...) as engine:
        handle = engine.submit(GenerationRequest(id="a", token_ids=(1, 2, 3)))
        for event in handle:
            print(event)

Owns the loop's thread and, through it, the executor. Does not know text, models or jax.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterable
from types import TracebackType

from loongjax.engine.admission import Admission
from loongjax.engine.front import ChangePolicy, Drain, Front
from loongjax.engine.handle import OnEvent, OnSampleEvent, RequestHandle
from loongjax.engine.history import MAX_RECORDS, History
from loongjax.engine.loop import Loop, Watcher
from loongjax.engine.messages import (
    EngineStats,
    GenerationRequest,
    PoolSample,
    RequestRecord,
    StepRecord,
)
from loongjax.engine.state import State
from loongjax.errors import ConfigError, StepError
from loongjax.executor.host_time import HostTime
from loongjax.executor.protocol import Executor
from loongjax.kvcache import BlockAllocator
from loongjax.plan import InstanceId, RequestId, Step, Topology
from loongjax.scheduler.policy import Policy


class Engine:
    """Serves generation requests. Every method may be called from any thread.

    Attributes:
      limits: What a request may ask for.
      pool_slots: KV slots of each instance, as configured; whole blocks of them are used.
      host_time: Where the loop's thread spends its time.
      executor: Runs the steps. It is the loop's: not to be touched while anything runs.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        policy: Policy,
        allocator: BlockAllocator,
        topology: Topology,
        vocab_size: int,
        max_model_len: int,
        eos_ids: Iterable[int] = (),
        watch: Watcher | None = None,
        host_time: HostTime | None = None,
        kept_steps: int = MAX_RECORDS,
    ) -> None:
        """Starts the loop. From here on the executor belongs to the engine, which closes it.

        Args:
          executor: Runs the steps; its `now` is the engine's clock.
          policy: Decides what runs where.
          allocator: The slots of the pool that `executor` works on; none in use.
          topology: The groups that `executor` can run.
          vocab_size: Token ids are in [0, vocab_size).
          max_model_len: Tokens of prompt and answer together.
          eos_ids: Tokens that end an answer, unless a request ignores them.
          watch: Makes what looks for the texts that end an answer; None: the model has no text,
            and requests with such texts are refused.
          kept_steps: Steps, and ended requests, that are kept for looking back.
          host_time: The executor's, if it has one: it knows more phases than the engine sees.
        """
        limits = executor.limits
        self.limits = Admission(
            vocab_size=vocab_size,
            max_model_len=max_model_len,
            block_size=allocator.block_size,
            instance_slots=allocator.slots,
            degree=max(topology.degrees),
            has_text=watch is not None,
        )
        self.executor = executor
        self._allocator = allocator
        self.host_time = host_time or HostTime()
        self.pool_slots = allocator.slots
        self._front = Front(admission=self.limits, now=executor.now, wake=executor.wake)
        self._state = State(allocator=allocator, topology=topology, limits=limits)
        self._history = History(max_records=kept_steps)
        self._steering = threading.Lock()
        self._drained: frozenset[InstanceId] = frozenset()
        self._loop = Loop(
            executor=executor,
            policy=policy,
            state=self._state,
            front=self._front,
            history=self._history,
            host_time=self.host_time,
            eos_ids=frozenset(eos_ids),
            vocab_size=vocab_size,
            watch=watch,
        )
        self._thread = threading.Thread(target=self._loop.run, name="loongjax-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        """Whether the loop runs. False after `close`, and after a policy or executor broke."""
        return self._loop.alive

    def now(self) -> float:
        """The clock of deadlines, timings and records [s]."""
        return self.executor.now()

    def submit(
        self, request: GenerationRequest, *, on_event: OnEvent | None = None
    ) -> RequestHandle:
        """Queues a request and returns at once.

        Args:
          request: What to generate. It is checked here, not later.
          on_event: Gets the events, on the loop's thread, instead of the handle.

        Raises:
          RequestError: The prompt is empty, has an id outside the vocabulary or is too long,
            the request's id is in use, or it asks for several answers.
          CapacityError: It can never fit the pool.
          EngineClosedError: The engine was closed, or died; the message says of what.
        """
        return self._front.submit(request, on_event)

    def submit_samples(
        self, request: GenerationRequest, *, on_event: OnSampleEvent | None = None
    ) -> tuple[RequestHandle, ...]:
        """Queues a request for `params.n` answers and returns at once, with a handle for each.

        The prompt is computed once, and its KV shared, as far as whole blocks go. Answer 0 has
        the request's id, answer i `ID#i`; each is aborted by itself. Answer i is what it would
        be for any other n; n may be 1.

        Raises:
          RequestError, CapacityError, EngineClosedError: As `submit`.
        """
        return self._front.submit_samples(request, on_event)

    def abort(self, request_id: RequestId) -> None:
        """Ends a request with reason `abort`; nothing happens if it has ended.

        Its slots are free when the step that works on it, if any, has ended.
        """
        self._front.abort(request_id)

    def drain(self, instance: InstanceId) -> None:
        """Lets an instance run empty: no further block of its pool is taken.

        Requests with KV there go on: they grow elsewhere, or are computed anew where the policy
        finds no room for that. Nothing happens if it is draining.

        Raises:
          ConfigError: There is no such instance, or no other would be left.
          EngineClosedError: The engine was closed, or died.
        """
        self._check_instance(instance)
        with self._steering:
            draining = self._drained | {instance}
            if len(draining) == self._allocator.instances:
                raise ConfigError(
                    f"instance {instance} is the last of {self._allocator.instances} that takes "
                    "KV; resume another one first"
                )
            self._front.steer(Drain(instance=instance, draining=True))
            self._drained = draining

    def resume(self, instance: InstanceId) -> None:
        """Takes KV on a drained instance again; nothing happens if it does so already.

        Raises:
          ConfigError: There is no such instance.
          EngineClosedError: The engine was closed, or died.
        """
        self._check_instance(instance)
        with self._steering:
            self._front.steer(Drain(instance=instance, draining=False))
            self._drained = self._drained - {instance}

    def set_policy(self, policy: Policy) -> None:
        """Plans by another policy from the next plan on; what runs is not disturbed.

        Raises:
          EngineClosedError: The engine was closed, or died.
        """
        self._front.steer(ChangePolicy(policy=policy))

    @property
    def in_flight(self) -> tuple[Step, ...]:
        """The steps that run or are queued, by launch."""
        return tuple(self._state.flying.values())

    def stats(self) -> EngineStats:
        """The engine as it was a moment ago, and its counters."""
        return self._history.stats(
            self._state.published,
            self.executor.program_counts,
            self.host_time.times(),
            alive=self.alive,
            draining=self._state.draining,
        )

    def steps(self) -> tuple[StepRecord, ...]:
        """The latest steps, in the order in which they ended: `kept_steps` of them, or fewer where
        they name very many requests.
        """
        return self._history.steps()

    def steps_since(self, seen: int) -> tuple[tuple[StepRecord, ...], int]:
        """Records of the steps that ended after the first `seen`, as far as they are kept, and
        how many have ended: the `seen` of the next call.
        """
        return self._history.steps_since(seen)

    def steps_of(self, request_id: RequestId) -> tuple[StepRecord, ...]:
        """The latest steps that worked on a request, even after it ended."""
        return self._history.steps_of(request_id)

    def requests(self) -> tuple[RequestRecord, ...]:
        """The requests that ended last (`kept_steps` of them), and those that are open."""
        return self._history.requests(self._state.published)

    def pool_samples(self) -> tuple[PoolSample, ...]:
        """Every change of the KV pool's use, by time (two for each step that is kept)."""
        return self._history.pool()

    def check_integrity(self) -> None:
        """Proves the books of the KV pool; only while nothing runs, or after `close`.

        Raises:
          IntegrityError: With the numbers that do not match.
        """
        self._allocator.check_integrity()

    def close(self) -> None:
        """Aborts open requests, ends the loop and closes the executor. May be called again.

        Waits for steps in flight, unless it is called from an `on_event` callback.

        Raises:
          StepError: The executor could not be closed.
        """
        atexit.unregister(self.close)
        self._front.request_close()
        if threading.current_thread() is self._thread:
            return
        self._thread.join()
        error, self._loop.close_error = self._loop.close_error, None
        if error is not None:
            raise StepError(f"the executor could not be closed: {error}") from error

    def _check_instance(self, instance: InstanceId) -> None:
        if not 0 <= instance < self._allocator.instances:
            raise ConfigError(
                f"there is no instance {instance}; they are 0 to {self._allocator.instances - 1}"
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
