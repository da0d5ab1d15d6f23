"""What a line asks for, what it is told, and who knows how lines are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from loongjax.api.outputs import CompletionOutput
from loongjax.offline.records import Record
from loongjax.plan import TokenLogprobs
from loongjax.sampling.params import SamplingParams

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text; token ids; or a chat: messages with `role` and `content`, oldest first."""

Name: TypeAlias = str | int | None
"""What the input calls a line, to be found again in the output."""


def as_name(value: object) -> Name:
    """A value as a name, None if it cannot be one."""
    return value if type(value) in (str, int) else None  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A line that can be answered.

    Attributes:
      line: Its place in the input; see `Record`.
      name: What the input calls it, or None.
      prompt: What to go on from.
      params: How.
      asked: What its format wants to have when it writes the answer.
    """

    line: int
    name: Name
    prompt: Prompt
    params: SamplingParams
    asked: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of a task.

    Attributes:
      prompt_tokens: The length of its prompt.
      completions: `params.n` of them.
      prompt_logprobs: Of the prompt's tokens but the first; empty if not asked for.
    """

    prompt_tokens: int
    completions: tuple[CompletionOutput, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@runtime_checkable
class Format(Protocol):
    """What the lines of input and output look like. Every line written has `line` and `error`
    (None or absent unless it is an error): so much of it the output file knows.
    """

    def name(self, record: Record) -> Name:
        """What the input calls a record, whatever else is wrong with it."""
        ...

    def name_written(self, written: Mapping[str, Any]) -> Name:
        """What a line of the output says the input called it; None: it does not say."""
        ...

    def read(self, record: Record) -> Task:
        """What a readable record asks for.

        Raises:
          RequestError: It makes no sense; the message is for the output.
        """
        ...

    def answered(self, task: Task, answer: Answer) -> dict[str, Any]:
        """The line of output for an answer."""
        ...

    def refused(self, record: Record, message: str) -> dict[str, Any]:
        """The line of output for a record that cannot be answered."""
        ...
