"""The engine's loop: inbox, snapshot, plan, submit, poll, hand tokens out.

Runs on one thread and makes all calls to policy, allocator and executor. It waits in
`Executor.poll` alone; a new request, an abort or a finished step makes it plan anew, and
while nothing happens it does nothing. New steps are submitted before the last ones' tokens
are handed out, so that devices do not wait for callers.

Where the policy lets a group go on (`Plan.ahead`), a decode step is queued behind the one that
runs, and the policy is not asked again before there is news: input, an end, a failure, or an
instance that became idle.

Refuses to go on with a plan that breaks a rule: the policy is wrong then, and guessing
would corrupt the pool. Every open request ends with an error and the engine is dead.
"""

from __future__ import annotations

import logging
import os

from loongjax.engine.forks import Forks, make_stem
from loongjax.engine.front import Abort, ChangePolicy, Door, Drain, Samples, Submission
from loongjax.engine.handle import RequestHandle
from loongjax.engine.history import History
from loongjax.engine.messages import (
    Event,
    FinishedEvent,
    FinishReason,
    GenerationRequest,
    TokensEvent,
)
from loongjax.engine.request import Request
from loongjax.engine.state import State
from loongjax.executor.host_time import HostTime
from loongjax.executor.protocol import Executor, RequestInput
from loongjax.plan import Group, Plan, RequestId, Snapshot, Step, StepResult
from loongjax.scheduler import validate
from loongjax.scheduler.learning import Learning
from loongjax.scheduler.policy import Policy

_log = logging.getLogger(__name__)

_POLL_S = 60.0
"""How long one poll may wait. Nothing depends on it: whatever happens ends the wait."""

_PUBLISH_S = 0.25
"""While steps run, what others may look at (`State.published`) is hardly older than this."""

_MAX_FAILURES = 2
"""A request that this many failed steps hit is not tried again: it may be their cause."""


class Loop:
    """Serves requests until the front asks it to close, or until something is wrong."""

    def __init__(
        self,
        *,
        executor: Executor,
        policy: Policy,
        state: State,
        front: Door,
        history: History,
        host_time: HostTime,
        eos_ids: frozenset[int],
    ) -> None:
        self._executor = executor
        self._policy = policy
        self._state = state
        self._front = front
        self._history = history
        self._host_time = host_time
        self._eos_ids = eos_ids
        self._outbox: list[tuple[RequestHandle, Event]] = []
        self._lost: dict[RequestId, tuple[Request, Step, str]] = {}
        self._forks = Forks()
        self._ahead: frozenset[Group] = frozenset()
        self._published_at = executor.now()
        self.alive = True
        self.close_error: Exception | None = None

    def run(self) -> None:
        """The thread's body: serves, then ends every open request and closes the executor."""
        reason: FinishReason = "abort"
        message = "the engine was closed; create another one"
        try:
            self.serve()
        except Exception as error:
            _log.exception("the engine died")
            reason = "error"
            message = f"the engine died of {type(error).__name__}: {error}; create another one"
        finally:
            self.alive = False
            self._shut(reason, message)

    def serve(self) -> None:
        """Serves until the front closes, in the caller's thread; raises whatever breaks it."""
        results: list[StepResult] = []
        while not self._front.closing:
            self._host_time.begin()
            news = self._take_inbox()
            for result in results:
                news = self._land(result) or news
            self._host_time.lap("landing")
            if news:
                self._history.add_pool(self._executor.now(), self._state.used())
                self._plan()
            elif self._executor.now() - self._published_at > _PUBLISH_S:
                self._snapshot()
            self._run_ahead()
            self._host_time.lap("planning")
            self._deliver()
            self._host_time.lap("delivering")
            results = self._executor.poll(_POLL_S)

    # Input

    def _take_inbox(self) -> bool:
        taken = self._front.take()
        new: list[Request] = []
        for item in taken:  # all are booked before anything can raise: none may lack an end
            if isinstance(item, Submission):
                new.append(self._request(item))
                self._state.add(new[-1])
            elif isinstance(item, Samples):
                new += self._add_samples(item)
            elif isinstance(item, Drain):
                self._state.drain(item.instance, item.draining)
            elif isinstance(item, ChangePolicy):
                self._policy = item.policy
        for request in new:
            self._admit(request.submission.request)
        for item in taken:
            if isinstance(item, Abort):
                self._abort(item.handle)
        return bool(taken)

    def _request(self, submission: Submission) -> Request:
        params = submission.request.params
        eos_ids = frozenset() if params.ignore_eos else self._eos_ids
        return Request(submission=submission, stop_ids=eos_ids.union(params.stop_token_ids))

    def _add_samples(self, item: Samples) -> list[Request]:
        """Takes in their stem, for which they wait, or else themselves; gives what it took."""
        samples = [self._request(submission) for submission in item.submissions]
        stem = make_stem(item.submissions[0], item.stem, self._state.block_size)
        if stem is None:
            self._front.retire(item.stem)
        else:
            self._forks.add(stem, samples)
        added = samples if stem is None else [stem]
        for request in added:
            self._state.add(request)
        return added

    def _branch(self, stem: Request) -> None:
        """A stem is computed: its samples begin where it ends, each with its KV if possible."""
        for sample in self._forks.take(stem):
            sample.first_scheduled = stem.first_scheduled
            self._state.add(sample)
            self._admit(sample.submission.request)
            if self._state.fork(stem, sample):
                self._executor.fork(stem.id, sample.id)
        self._close(stem)

    def _admit(self, request: GenerationRequest) -> None:
        seed = request.params.seed
        self._executor.admit(
            RequestInput(
                id=request.id,
                token_ids=request.token_ids,
                temperature=request.params.temperature,
                seed=_draw_seed() if seed is None else seed,
                sample=request.sample,
            )
        )

    def _abort(self, handle: RequestHandle) -> None:
        request = self._state.open.get(handle.id)
        if request is not None and request.handle is handle:
            self._end(request, "abort", time=self._executor.now())
        elif waiting := self._forks.leave(handle):
            sample, stem = waiting
            self._end_sample(sample, "abort", time=self._executor.now())
            if stem is not None:
                self._end(self._state.open[stem], "abort", time=self._executor.now())

    # Planning

    def _plan(self) -> None:
        """Plans until steps are submitted or there is nothing to do now."""
        while True:
            snapshot = self._snapshot()
            if not self._state.open:
                return
            plan = self._policy.schedule(self._executor.now(), snapshot)
            validate(snapshot, plan)
            self._carry_out(plan)
            self._ahead = plan.ahead
            if plan.steps:
                return
            if plan.preempt or plan.reject:
                continue
            if self._state.flying or self._front.has_input:
                return
            self._fail_stuck(snapshot)

    def _snapshot(self) -> Snapshot:
        self._published_at = self._executor.now()
        return self._state.snapshot()

    def _carry_out(self, plan: Plan) -> None:
        for rejection in plan.reject:
            request = self._state.open[rejection.request]
            self._end(request, "error", error=rejection.reason, time=self._executor.now())
        for name in plan.preempt:
            self._history.add_preemption()
            self._recompute(self._state.open[name])
        if plan.preempt:
            self._history.add_pool(self._executor.now(), self._state.used())
        for step in plan.steps:
            self._launch(step)

    def _run_ahead(self) -> None:
        """Queues steps behind the decode steps of groups that may go on."""
        if self._lost:  # what is queued behind a failed step has to end first
            return
        for group in self._ahead:
            queue = self._state.queue(group)
            while 0 < len(queue) <= self._executor.limits.steps_ahead:
                following = self._state.continuation(queue[-1])
                if following is None:
                    break
                self._launch(following)
                queue.append(following)

    def _launch(self, step: Step) -> None:
        self._host_time.lap("planning")
        now = self._executor.now()
        slots = self._state.launch(step, now)
        self._history.add_pool(now, self._state.used(step.group))
        self._host_time.lap("tables")
        self._executor.submit(step, slots)
        self._host_time.lap("launch")

    def _fail_stuck(self, snapshot: Snapshot) -> None:
        """Ends the oldest request: an idle engine that plans nothing would hang for ever."""
        view = (snapshot.waiting or snapshot.running)[0]
        free = sum(instance.free_slots for instance in snapshot.instances)
        draining = len(self._state.draining)
        self._end(
            self._state.open[view.id],
            "error",
            error=(
                f"policy {type(self._policy).__name__} plans no step although nothing is in "
                f"flight: {len(snapshot.waiting)} requests wait, {len(snapshot.running)} run, "
                f"{free} slots are free, {draining} instances are draining. This one is the "
                f"oldest; it needs up to {view.peak} KV slots. Give the pool more slots, or use "
                "another policy"
            ),
            time=self._executor.now(),
        )

    # Results

    def _land(self, result: StepResult) -> bool:
        """Books a result; says whether the policy should know."""
        if isinstance(self._policy, Learning):
            self._policy.observe(result)
        step, ended = self._state.land(result.seq)
        before = len(self._state.open)
        self._history.add_step(step, result)
        for gone in ended:
            self._forget(gone)
        if result.error is not None:
            self._fail_step(step, result.error)
        self._drop_lost_kv()
        accepted = 0
        for name, token in result.tokens:
            request = self._state.open.get(name)
            if request is None:  # it had ended already: nobody hears of this token
                continue
            if request.is_stem:
                self._branch(request)
            else:
                accepted += 1
                self._accept(request, token, result.ended)
        self._history.add_tokens(accepted)
        someone_ended = bool(ended) or len(self._state.open) < before
        return someone_ended or result.error is not None or not self._state.queue(step.group)

    def _accept(self, request: Request, token: int, time: float) -> None:
        reason = request.append(token, time)
        event = TokensEvent(token_ids=(token,), stopped=reason == "stop")
        self._outbox.append((request.handle, event))
        if reason is not None:
            stop_token = token if reason == "stop" else None
            self._end(request, reason, stop_token=stop_token, time=time)

    def _fail_step(self, step: Step, error: str) -> None:
        _log.error("step %d on group %s failed: %s", step.seq, step.group, error)
        for request in self._state.victims(step):
            before = self._lost.get(request.id)
            if before is not None and before[1].group == step.group:
                continue  # the step was queued behind the one that lost it
            request.failures += 1
            self._lost[request.id] = (request, step, error)

    def _drop_lost_kv(self) -> None:
        """Lets those who lost KV to a failed step wait again, or gives them up.

        Whom another step works on has to wait for that, be it queued behind the one that failed
        or a move elsewhere: nothing may be freed that a step in flight reads or writes.
        """
        lost, self._lost = self._lost, {}
        for name, (request, step, error) in lost.items():
            if request.ended:
                continue
            if request.in_flight is not None:
                self._lost[name] = (request, step, error)
            elif request.failures < _MAX_FAILURES:
                self._history.add_recompute()
                self._recompute(request)
            else:
                self._end(
                    request,
                    "error",
                    error=(
                        f"its KV was lost to {request.failures} failed steps, the last being "
                        f"step {step.seq} on group {step.group}: {error}"
                    ),
                    time=self._executor.now(),
                )

    # Ends

    def _recompute(self, request: Request) -> None:
        """Drops a request's KV; it waits again."""
        self._state.release_kv(request)
        self._executor.drop_kv(request.id)

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        time: float,
        error: str | None = None,
        stop_token: int | None = None,
    ) -> None:
        if request.is_stem:
            for sample in self._forks.take(request):
                self._end_sample(sample, reason, time=time, error=error)
        else:
            self._say_end(request, reason, time=time, error=error, stop_token=stop_token)
        self._close(request)

    def _end_sample(
        self, sample: Request, reason: FinishReason, *, time: float, error: str | None = None
    ) -> None:
        """Ends a sample that waits for its stem: nobody else knows it yet."""
        self._say_end(sample, reason, time=time, error=error)
        self._front.retire(sample.id)

    def _say_end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        time: float,
        error: str | None = None,
        stop_token: int | None = None,
    ) -> None:
        event = FinishedEvent(
            reason=reason, error=error, stop_token=stop_token, timings=request.timings(time)
        )
        self._outbox.append((request.handle, event))
        self._history.add_end(request.record(reason, time), reason)

    def _close(self, request: Request) -> None:
        """Frees what a request has, now or when the step that works on it has ended."""
        if self._state.end(request):
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self._state.release_kv(request)
        self._executor.forget(request.id)
        self._front.retire(request.id)

    def _deliver(self) -> None:
        outbox, self._outbox = self._outbox, []
        for handle, event in outbox:
            handle.deliver(event)

    def _shut(self, reason: FinishReason, message: str) -> None:
        queued: list[Submission] = []
        for item in self._front.shut(message):
            if isinstance(item, Submission):
                queued.append(item)
            elif isinstance(item, Samples):
                queued += item.submissions
        requests = [
            *(request for request in self._state.open.values() if not request.is_stem),
            *self._forks.waiting(),
            *(Request(submission=item, stop_ids=frozenset()) for item in queued),
        ]
        time = self._executor.now()
        for request in requests:
            self._say_end(request, reason, time=time, error=message if reason == "error" else None)
        self._deliver()
        try:
            self._executor.close()
        except Exception as error:
            _log.exception("the executor could not be closed")
            self.close_error = error
        if reason == "abort":  # nothing runs any more, and the books are in order
            self._state.clear()
            self._history.add_pool(time, self._state.used())


def _draw_seed() -> int:
    return int.from_bytes(os.urandom(4), "little") >> 1
