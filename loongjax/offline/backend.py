"""Who answers the lines of a job: an engine of this process, or a server."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from loongjax.errors import LoongJaxError
from loongjax.offline.task import Answer, Prompt
from loongjax.sampling.params import SamplingParams


class LineFailedError(LoongJaxError):
    """A line was not answered, for no fault of its own: worth another try."""


@runtime_checkable
class Backend(Protocol):
    """See the module. Belongs to one asyncio loop."""

    @property
    def generated_tokens(self) -> int:
        """Tokens that it has generated so far, as far as known here."""
        ...

    def degrees(self) -> tuple[int, ...]:
        """How many instances work together now, for each group that works; empty: not known."""
        ...

    async def answer(self, prompt: Prompt, params: SamplingParams) -> Answer:
        """Answers a prompt; cancelling it frees what it took.

        Raises:
          RequestError: The prompt cannot be answered, now or later.
          LineFailedError: It failed, and others need not.
          LoongJaxError: It failed as all others would, so that the job has to stop.
        """
        ...
