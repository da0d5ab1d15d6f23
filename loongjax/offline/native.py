"""The project's own lines: `{"id", "prompt" or "messages", sampling fields}`.

An answer is `{"line", "id", "text", "token_ids", "finish_reason", "prompt_tokens"}`, with
`outputs` beside it where `n` asked for several, and with `logprobs` and `prompt_logprobs` where
those were asked for, lists of `{"token", "logprob", "rank", "top": {token: logprob}}`. What
cannot be answered is `{"line", "error"}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loongjax.api.outputs import CompletionOutput
from loongjax.errors import RequestError
from loongjax.offline.records import Record
from loongjax.offline.task import Answer, Name, Prompt, Task, as_name
from loongjax.offline.template import PromptTemplate
from loongjax.offline.values import parse_json, sampling_fields, unknown_field, with_fields
from loongjax.plan import TokenLogprobs
from loongjax.sampling.params import SamplingParams

_OWN = ("id", "prompt", "messages")


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeFormat:
    """See `loongjax.offline.task.Format`.

    Attributes:
      defaults: Sampling of lines that do not say otherwise.
      template: Makes the prompt of a record's fields, which may then have any name; None: it is
        in `prompt` or `messages`, and unknown fields are refused.
      chats: A prompt that is a text is a user's message of a chat.
    """

    defaults: SamplingParams
    template: PromptTemplate | None = None
    chats: bool = False

    def name(self, record: Record) -> Name:
        """Its `id`."""
        return as_name(record.fields.get("id"))

    def name_written(self, written: Mapping[str, Any]) -> Name:
        """Its `id`, which errors do not have."""
        return as_name(written.get("id"))

    def read(self, record: Record) -> Task:
        """See `Format.read`."""
        fields = record.fields
        if fields.get("id") is not None and self.name(record) is None:
            raise RequestError("id must be a text or a whole number")
        prompt = self._prompt(record)
        if self.chats and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        wanted = {name: fields[name] for name in sampling_fields() if name in fields}
        return Task(
            line=record.line,
            name=self.name(record),
            prompt=prompt,
            params=with_fields(self.defaults, wanted, is_text=record.is_text),
        )

    def answered(self, task: Task, answer: Answer) -> dict[str, Any]:
        """See the module."""
        first = as_json(answer.completions[0])
        told = {"line": task.line, "id": task.name, **first, "prompt_tokens": answer.prompt_tokens}
        if task.params.prompt_logprobs is not None:
            told["prompt_logprobs"] = _logprobs(answer.prompt_logprobs)
        if task.params.n > 1:
            told["outputs"] = [as_json(each) for each in answer.completions]
        return told

    def refused(self, record: Record, message: str) -> dict[str, Any]:
        """See the module."""
        return {"line": record.line, "error": message}

    def _prompt(self, record: Record) -> Prompt:
        fields = record.fields
        if self.template is not None:
            return self.template.fill(fields)
        for name in fields:
            if name not in _OWN and name not in sampling_fields():
                raise RequestError(unknown_field(name, (*_OWN, *sampling_fields())))
        prompt, messages = fields.get("prompt"), fields.get("messages")
        if (prompt is None) == (messages is None):
            raise RequestError("a line needs a prompt or messages, and not both")
        if messages is not None:
            return _messages(parse_json(messages) if record.is_text else messages)
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return tuple(prompt)
        if not isinstance(prompt, str):
            raise RequestError("prompt must be a text or a list of token ids")
        return prompt


def _messages(value: Any) -> Prompt:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        raise RequestError("messages must be a list of at least one object with role and content")
    return value


def as_json(completion: CompletionOutput) -> dict[str, Any]:
    """An answer as it stands in a line."""
    told: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
    }
    if completion.logprobs is not None:
        told["logprobs"] = _logprobs(completion.logprobs)
    return told


def _logprobs(logprobs: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    return [
        {"token": each.token, "logprob": each.logprob, "rank": each.rank, "top": dict(each.top)}
        for each in logprobs
    ]
