"""The engine's loop: inbox, snapshot, plan, submit, poll, hand tokens out.

Runs on one thread and makes all calls to policy, allocator and executor. It waits in
`Executor.poll` alone; a new request, an abort or a finished step makes it plan anew, and
while nothing happens it does nothing. New steps are submitted before the last ones' tokens
are handed out, so that devices do not wait for callers. It decides when a request ends;
`loongjax.engine.ends` tells its caller, and frees what it has.

Where the policy lets a group go on (`Plan.ahead`), a decode step is queued behind the one that
runs, and the policy is not asked again before there is news: input, an end, a failure, or an
instance that became idle.

Refuses to go on with a plan that breaks a rule: the policy is wrong then, and guessing
would corrupt the pool. Every open request ends with an error and the engine is dead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from loongjax.engine.ends import Ends
from loongjax.engine.forks import Forks, make_stem
from loongjax.engine.front import Abort, ChangePolicy, Door, Drain, Samples, Submission
from loongjax.engine.handle import RequestHandle
from loongjax.engine.history import History
from loongjax.engine.messages import FinishReason, StopWatch, TokensEvent
from loongjax.engine.request import Request
from loongjax.engine.state import State
from loongjax.errors import RequestError
from loongjax.executor.host_time import HostTime
from loongjax.executor.protocol import Executor, RequestInput
from loongjax.plan import Group, Plan, RequestId, SampledToken, Snapshot, Step, StepResult
from loongjax.sampling.params import SamplingParams
from loongjax.scheduler import validate
from loongjax.scheduler.learning import Learning
from loongjax.scheduler.policy import Policy

_log = logging.getLogger(__name__)

Watcher: TypeAlias = Callable[[SamplingParams], StopWatch]
"""Makes what reads one answer of a request."""

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
        vocab_size: int,
        watch: Watcher | None = None,
    ) -> None:
        """`watch` makes what looks for texts that end an answer; see `Engine`."""
        self._executor = executor
        self._policy = policy
        self._state = state
        self._front = front
        self._history = history
        self._host_time = host_time
        self._eos_ids = eos_ids
        self._watch = watch
        self._vocab_size = vocab_size
        self._lost: dict[RequestId, tuple[Request, Step, str]] = {}
        self._forks = Forks()
        self._ends = Ends(
            executor=executor, state=state, front=front, history=history, forks=self._forks
        )
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
            self._ends.deliver()
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
            self._admit(request)
        for item in taken:
            if isinstance(item, Abort):
                self._abort(item.handle)
        return bool(taken)

    def _request(self, submission: Submission) -> Request:
        params = submission.request.params
        eos_ids = frozenset() if params.ignore_eos else self._eos_ids
        return Request(
            submission=submission,
            stop_ids=eos_ids.union(params.stop_token_ids),
            watch=self._watch(params) if self._watch is not None and params.stop else None,
        )

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
            sample.score_prompt(1, stem.prompt_logprobs)
            self._admit(sample)
            if not sample.ended and self._state.fork(stem, sample):
                self._executor.fork(stem.id, sample.id)
        self._ends.close(stem)

    def _admit(self, admitted: Request) -> None:
        request, next_id = admitted.submission.request, admitted.next_id
        seed = request.params.seed
        self._executor.admit(
            RequestInput(
                id=request.id,
                token_ids=request.token_ids,
                next_id=next_id,
                params=request.params,
                seed=_draw_seed() if seed is None else seed,
                sample=request.sample,
                end_ids=admitted.stop_ids,
                is_masked=request.mask is not None,
            )
        )
        self._restrict(admitted)

    def _restrict(self, request: Request) -> None:
        """Tells the executor which tokens may come next, if that is up to the request's mask."""
        mask = request.submission.request.mask
        if mask is None:
            return
        try:
            allowed = np.asarray(mask(tuple(request.generated)), np.bool_)
            if allowed.shape != (self._vocab_size,) or not allowed.any():
                raise RequestError(
                    f"it gave {allowed.sum()} tokens in the shape {allowed.shape}; it must allow "
                    f"one at least, in the shape ({self._vocab_size},)"
                )
        except Exception as error:
            text = f"the request's token mask failed: {type(error).__name__}: {error}"
            self._ends.end(request, "error", error=text, time=self._executor.now())
        else:
            self._executor.restrict(request.id, allowed)

    def _abort(self, handle: RequestHandle) -> None:
        request = self._state.open.get(handle.id)
        if request is not None and request.handle is handle:
            self._ends.end(request, "abort", time=self._executor.now())
        elif waiting := self._forks.leave(handle):
            sample, stem = waiting
            self._ends.end_sample(sample, "abort", time=self._executor.now())
            if stem is not None:
                self._ends.end(self._state.open[stem], "abort", time=self._executor.now())

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
        if plan.reasons:
            self._history.add_reasons(self._executor.now(), plan.reasons)
        for rejection in plan.reject:
            request = self._state.open[rejection.request]
            self._ends.end(request, "error", error=rejection.reason, time=self._executor.now())
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
        self._ends.end(
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
            self._ends.forget(gone)
        if result.error is not None:
            self._fail_step(step, result.error)
        self._drop_lost_kv()
        for name, start, logprobs in result.prompts:
            if request := self._state.open.get(name):
                request.score_prompt(start, logprobs)
        accepted, requests = 0, self._state.open
        for sampled in result.tokens:
            request = requests.get(sampled.request)
            if request is None:  # it had ended already: nobody hears of this token
                continue
            if request.is_stem:
                self._branch(request)
            else:
                accepted += 1
                self._accept(request, sampled, result.ended)
        self._history.add_tokens(accepted)
        someone_ended = bool(ended) or len(self._state.open) < before
        return someone_ended or result.error is not None or not self._state.queue(step.group)

    def _accept(self, request: Request, sampled: SampledToken, time: float) -> None:
        is_first = not request.generated
        reason = request.append(sampled.token, time)
        stop_token = sampled.token if sampled.token in request.stop_ids else None
        event = TokensEvent(
            token_ids=(sampled.token,),
            stopped=stop_token is not None,
            logprobs=() if sampled.logprobs is None else (sampled.logprobs,),
            prompt_logprobs=tuple(request.prompt_logprobs) if is_first else (),
        )
        self._ends.outbox.append((request.handle, event))
        if reason is not None:
            self._ends.end(request, reason, stop_token=stop_token, time=time)
        else:
            self._restrict(request)

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
                self._ends.end(
                    request,
                    "error",
                    error=(
                        f"its KV was lost to {request.failures} failed steps, the last being "
                        f"step {step.seq} on group {step.group}: {error}"
                    ),
                    time=self._executor.now(),
                )

    def _recompute(self, request: Request) -> None:
        """Drops a request's KV; it waits again."""
        self._state.release_kv(request)
        self._executor.drop_kv(request.id)

    # The end

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
            self._ends.announce(
                request, reason, time=time, error=message if reason == "error" else None
            )
        self._ends.deliver()
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
