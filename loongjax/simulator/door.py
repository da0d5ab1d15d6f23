"""Where simulated requests come from: the engine's `Door`, opened by a virtual clock.

Owns the jobs from before their arrival until their end, and their outcomes. A request is
stamped with its own arrival, even if the engine was busy at the time. Those that could never
fit the pool are turned away here, as the engine's front does it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

from loongjax.engine.front import Abort, Drain, Input, Submission
from loongjax.engine.handle import RequestHandle
from loongjax.engine.messages import Event, FinishedEvent, GenerationRequest
from loongjax.errors import RequestError
from loongjax.plan import InstanceId, RequestId
from loongjax.sampling.params import SamplingParams
from loongjax.simulator.jobs import Ending, Job, Outcome


class SimulatedDoor:
    """Lets jobs in at their time.

    Attributes:
      jobs: All of them, by id.
      outcomes: Of those that ended, in the order of their ends.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        refusal: Callable[[Job], str | None],
        drains: Sequence[tuple[float, InstanceId]] = (),
    ) -> None:
        """`refusal` gives the reason why a job can never run, or None; `drains` says when an
        instance is taken out of use [s].

        Raises:
          RequestError: Two jobs have the same id.
        """
        self.jobs: Mapping[RequestId, Job] = {job.id: job for job in jobs}
        if len(self.jobs) != len(jobs):
            raise RequestError(
                f"{len(jobs)} jobs have {len(self.jobs)} different ids; each needs its own"
            )
        self.outcomes: list[Outcome] = []
        self._line = sorted(jobs, key=lambda job: job.arrival)
        self._refusal = refusal
        self._now = 0.0
        self._next = 0
        self._open: dict[RequestId, RequestHandle] = {}
        self._aborts: list[tuple[float, RequestId]] = []
        self._drains = sorted(drains)

    # ---- the clock's side ------------------------------------------------------------

    @property
    def next_time(self) -> float | None:
        """When something will come next [s], if ever."""
        arrival = self._line[self._next].arrival if self._next < len(self._line) else None
        while self._aborts and self._aborts[0][1] not in self._open:
            heapq.heappop(self._aborts)
        if not self._aborts and not self._drains:
            return arrival
        times = [] if arrival is None else [arrival]
        times += [line[0][0] for line in (self._aborts, self._drains) if line]
        return min(times, default=None)

    def advance(self, now: float) -> None:
        """Time went on: what came up to `now` can be taken."""
        self._now = now

    # ---- the loop's side: see `Door` -------------------------------------------------

    @property
    def closing(self) -> bool:
        """Whether everybody came and went."""
        return self._next == len(self._line) and not self._open

    @property
    def has_input(self) -> bool:
        """See `Door`."""
        coming = self.next_time
        return coming is not None and coming <= self._now

    def take(self) -> list[Input]:
        """See `Door`."""
        taken: list[Input] = []
        while self._next < len(self._line) and self._line[self._next].arrival <= self._now:
            job = self._line[self._next]
            self._next += 1
            reason = self._refusal(job)
            if reason is None:
                taken.append(self._submission(job))
            else:
                self.outcomes.append(_rejected(job, reason))
        while self._aborts and self._aborts[0][0] <= self._now:
            handle = self._open.get(heapq.heappop(self._aborts)[1])
            if handle is not None:
                taken.append(Abort(handle=handle))
        while self._drains and self._drains[0][0] <= self._now:
            taken.append(Drain(instance=self._drains.pop(0)[1], draining=True))
        return taken

    def retire(self, request: RequestId) -> None:
        """See `Door`."""
        del self._open[request]

    def shut(self, reason: str) -> list[Input]:
        """See `Door`. A simulated loop ends by itself, when everybody has left."""
        return []

    # ---- events ----------------------------------------------------------------------

    def _submission(self, job: Job) -> Submission:
        def on_event(event: Event) -> None:
            if isinstance(event, FinishedEvent):
                self._finish(job, event)

        handle = RequestHandle(job.id, _cannot_abort, on_event)
        self._open[job.id] = handle
        if job.cancel_after is not None:
            heapq.heappush(self._aborts, (job.arrival + job.cancel_after, job.id))
        request = GenerationRequest(id=job.id, token_ids=range(job.prompt), params=_GREEDY)
        return Submission(request=request, handle=handle, max_tokens=job.limit, arrival=job.arrival)

    def _finish(self, job: Job, event: FinishedEvent) -> None:
        times = event.timings
        ending: Ending = "cancelled" if event.reason == "abort" else "completed"
        if event.reason == "error":
            ending = "rejected" if times.first_scheduled is None else "failed"
        self.outcomes.append(
            Outcome(
                job=job,
                ending=ending,
                first_token=times.first_token,
                end=times.end,
                error=event.error,
            )
        )


def _rejected(job: Job, reason: str) -> Outcome:
    return Outcome(job=job, ending="rejected", first_token=None, end=job.arrival, error=reason)


_GREEDY = SamplingParams(temperature=0.0, seed=0)


def _cannot_abort(handle: RequestHandle) -> None:
    """An outcome could not be noted: the simulator is wrong, and says so at once."""
    raise RequestError(f"the outcome of job {handle.id!r} could not be noted; see the log")
