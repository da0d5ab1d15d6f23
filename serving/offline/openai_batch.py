"""OpenAI's batch files: `{"custom_id", "method", "url", "body"}` in, their results out.

Bodies are those of `/v1/chat/completions` and `/v1/completions`, checked by the very schemas that
the HTTP server has; `stream`, and several prompts in one body, are refused. Results stand in one
file, errors too: there, `response` is null and `error` has a code and a message. Every result has
`line`, its place in the input, beside OpenAI's own fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

from pydantic import ValidationError

from loongjax.errors import RequestError
from loongjax.offline.records import Record
from loongjax.offline.task import Answer, Name, Prompt, Task, as_name
from serving.http import schemas, wording
from serving.http.choices import ChoicePiece
from serving.http.errors import explain
from serving.http.logprobs import LogprobWriter

_KINDS: Mapping[str, wording.Kind] = {
    "/v1/chat/completions": "chat.completion",
    "/v1/completions": "text_completion",
}
_SCHEMAS: Mapping[wording.Kind, type[schemas.ChatRequest | schemas.CompletionRequest]] = {
    "chat.completion": schemas.ChatRequest,
    "text_completion": schemas.CompletionRequest,
}
_FIELDS = frozenset({"custom_id", "method", "url", "body"})


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenAIBatchFormat:
    """See `loongjax.offline.task.Format`.

    Attributes:
      model: What bodies have to call the model; None: anything, for whoever answers is asked.
    """

    model: str | None = None

    def name(self, record: Record) -> Name:
        """Its `custom_id`."""
        return as_name(record.fields.get("custom_id"))

    def name_written(self, written: Mapping[str, Any]) -> Name:
        """Its `custom_id`."""
        return as_name(written.get("custom_id"))

    def read(self, record: Record) -> Task:
        """See `Format.read`."""
        if record.is_text or set(record.fields) != _FIELDS:
            raise RequestError(f"a line of a batch has exactly {', '.join(sorted(_FIELDS))}")
        name = record.fields["custom_id"]
        if not isinstance(name, str):
            raise RequestError("custom_id must be a text")
        if record.fields["method"] != "POST":
            raise RequestError("method must be 'POST'")
        kind = _KINDS.get(str(record.fields["url"]))
        if kind is None:
            raise RequestError(f"url must be one of {', '.join(_KINDS)}")
        try:
            body = _SCHEMAS[kind].model_validate(record.fields["body"])
        except ValidationError as error:
            raise RequestError(f"body: {explain(error.errors())[1]}") from None
        if self.model is not None and body.model != self.model:
            raise RequestError(f"body: model {body.model!r} is not here; {self.model!r} is")
        if body.stream:
            raise RequestError("body: stream is not supported; a result is written whole")
        params = body.sampling()
        if params.logprobs is not None or params.prompt_logprobs is not None:
            raise RequestError(
                "body: logprobs are not written to OpenAI's files; lines with prompt or messages "
                "of their own have them"
            )
        return Task(
            line=record.line,
            name=name,
            prompt=_prompt(body),
            params=params,
            asked=(kind, body),
        )

    def answered(self, task: Task, answer: Answer) -> dict[str, Any]:
        """The result of an answer."""
        kind, body = task.asked
        name = uuid4().hex
        told = wording.Answer(
            id=f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{name}",
            kind=kind,
            model=body.model,
            writer=LogprobWriter(tokenizer=None),
            with_ids=bool(body.return_token_ids),
        )
        pieces = [
            ChoicePiece(
                index=each.index,
                text=each.text or "",
                token_ids=each.token_ids,
                logprobs=(),
                prompt_logprobs=(),
                prompt_tokens=answer.prompt_tokens,
                finish_reason=each.finish_reason,
            )
            for each in answer.completions
        ]
        response = {
            "status_code": 200,
            "request_id": name,
            "body": told.whole(pieces, task.params.n),
        }
        return _result(task.line, task.name) | {"response": response, "error": None}

    def refused(self, record: Record, message: str) -> dict[str, Any]:
        """The result of a record that cannot be answered."""
        error = {"code": "invalid_request", "message": message}
        return _result(record.line, self.name(record)) | {"response": None, "error": error}


def _result(line: int, name: Name) -> dict[str, Any]:
    return {"id": f"batch_req_{line}", "custom_id": name, "line": line}


def _prompt(body: schemas.ChatRequest | schemas.CompletionRequest) -> Prompt:
    if isinstance(body, schemas.ChatRequest):
        return [message.plain() for message in body.messages]
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return cast(Prompt, prompt)
    if len(prompt) > 1:
        raise RequestError(f"body: prompt has {len(prompt)} prompts; give each a line of its own")
    return cast(Prompt, prompt[0])
