"""Several answers to one prompt: its KV is computed once, and then shared.

A *stem* is a request that the engine makes for itself: the part of a prompt that all answers
share. Policy, allocator and executor see no difference. When it is computed, every *sample*
begins, as a request of its own that holds the stem's KV too; from there on they decode, move,
are preempted and end apart. The token that the stem's last step drew is nobody's.

A stem is made of whole blocks and leaves at least one token of the prompt to each sample: so
nobody writes into a block that others read, and each draws a first token of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from loongjax.engine.front import Submission
from loongjax.engine.handle import RequestHandle
from loongjax.engine.request import Request
from loongjax.plan import RequestId
from loongjax.sampling.params import SamplingParams


def make_stem(sample: Submission, name: RequestId, block_size: int) -> Request | None:
    """The stem of a sample's prompt, for it and its like; None if the prompt is too short."""
    request = sample.request
    shared = (len(request.token_ids) - 1) // block_size * block_size
    if shared == 0:
        return None
    submission = Submission(
        request=replace(
            request,
            id=name,
            token_ids=request.token_ids[:shared],
            params=SamplingParams(
                temperature=0, max_tokens=1, prompt_logprobs=request.params.prompt_logprobs
            ),
            sample=0,
            mask=None,
        ),
        handle=RequestHandle(name, lambda handle: None, lambda event: None),
        max_tokens=1,
        arrival=sample.arrival,
    )
    return Request(
        submission=submission,
        stop_ids=frozenset(),
        next_id=request.token_ids[shared],
        is_stem=True,
    )


class Forks:
    """Samples that have no end and whose stem is not computed yet."""

    def __init__(self) -> None:
        self._samples: dict[RequestId, list[Request]] = {}

    def add(self, stem: Request, samples: Sequence[Request]) -> None:
        """Lets samples wait for their stem."""
        self._samples[stem.id] = list(samples)

    def waiting(self) -> Iterator[Request]:
        """All of them, by arrival."""
        for samples in self._samples.values():
            yield from samples

    def take(self, stem: Request) -> list[Request]:
        """Those that wait for a stem; they do no more. None for one that was taken before."""
        return self._samples.pop(stem.id, [])

    def leave(self, handle: RequestHandle) -> tuple[Request, RequestId | None] | None:
        """Lets a sample wait no more; None if it does not.

        Returns:
          The sample, and the name of its stem if nobody waits for that any more.
        """
        for stem, samples in self._samples.items():
            for sample in samples:
                if sample.handle is handle:
                    samples.remove(sample)
                    return sample, None if samples else stem
        return None
