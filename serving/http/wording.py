"""How answers are written in JSON: whole or as events of a stream, of completions or of chats."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, TypeAlias

from loongjax.errors import LoongJaxError
from serving.errors import status_of
from serving.http.choices import ChoicePiece
from serving.http.errors import error_body
from serving.http.logprobs import LogprobWriter

Kind: TypeAlias = Literal["text_completion", "chat.completion"]


@dataclass(kw_only=True)
class Answer:
    """What one request is told.

    Attributes:
      id: The request's name.
      kind: What it asked for.
      model: Whom it asked.
      writer: Writes its log-probabilities down.
      with_usage: Whether a stream ends with a count of tokens.
      with_ids: Whether choices have their token ids beside their text.
      created: When it came [s, Unix time].
    """

    id: str
    kind: Kind
    model: str
    writer: LogprobWriter
    with_usage: bool = False
    with_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _prompts: dict[int, int] = field(default_factory=dict)
    _offsets: dict[int, int] = field(default_factory=dict)  # lengths of what was written, by choice
    _tokens: int = 0

    def whole(self, pieces: Sequence[ChoicePiece], samples: int) -> dict[str, Any]:
        """The body of an answer that is not streamed; each prompt has so many samples."""
        by_choice: dict[int, list[ChoicePiece]] = {}
        for piece in pieces:
            self._count(piece, samples)
            by_choice.setdefault(piece.index, []).append(piece)
        wholes = [_joined(parts) for _, parts in sorted(by_choice.items())]
        listed = [self._choice(whole) | self._said(whole.text) for whole in wholes]
        return self._head(self.kind) | {"choices": listed, "usage": self._usage()}

    async def events(
        self, pieces: AsyncIterator[ChoicePiece], samples: int
    ) -> AsyncGenerator[bytes, None]:
        """The events of a stream; an error is the last one."""
        is_chat = self.kind == "chat.completion"
        kind = "chat.completion.chunk" if is_chat else self.kind
        head = self._head(kind) | ({"usage": None} if self.with_usage else {})
        begun: set[int] = set()
        try:
            async for piece in pieces:
                self._count(piece, samples)
                choice = self._choice(piece)
                if is_chat:
                    role = {} if piece.index in begun else {"role": "assistant"}
                    begun.add(piece.index)
                    choice["delta"] = role | {"content": piece.text}
                else:
                    choice["text"] = piece.text
                yield _event(head | {"choices": [choice]})
            if self.with_usage:
                yield _event(head | {"choices": [], "usage": self._usage()})
        except LoongJaxError as error:
            status = status_of(error)
            yield _event(error_body(status.message, status.grpc.name.lower()))
        yield b"data: [DONE]\n\n"

    def _said(self, text: str) -> dict[str, Any]:
        if self.kind == "chat.completion":
            return {"message": {"role": "assistant", "content": text}}
        return {"text": text}

    def _choice(self, piece: ChoicePiece) -> dict[str, Any]:
        """What a choice says, but for its text."""
        choice: dict[str, Any] = {
            "index": piece.index,
            "finish_reason": piece.finish_reason,
            "logprobs": self._logprobs(piece) if piece.logprobs else None,
        }
        if piece.prompt_logprobs:
            choice["prompt_logprobs"] = self.writer.of_prompt(piece.prompt_logprobs)
        if self.with_ids:
            choice["token_ids"] = list(piece.token_ids)
        return choice

    def _logprobs(self, piece: ChoicePiece) -> dict[str, Any]:
        if self.kind == "chat.completion":
            return self.writer.of_chat(piece.logprobs)
        offset = self._offsets.get(piece.index, 0)
        written = self.writer.of_completion(piece.logprobs, offset)
        self._offsets[piece.index] = offset + sum(map(len, written["tokens"]))
        return written

    def _count(self, piece: ChoicePiece, samples: int) -> None:
        self._tokens += len(piece.token_ids)
        self._prompts[piece.index // samples] = piece.prompt_tokens

    def _usage(self) -> dict[str, int]:
        prompt = sum(self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _joined(pieces: Sequence[ChoicePiece]) -> ChoicePiece:
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(chain.from_iterable(piece.token_ids for piece in pieces)),
        logprobs=tuple(chain.from_iterable(piece.logprobs for piece in pieces)),
        prompt_logprobs=tuple(chain.from_iterable(piece.prompt_logprobs for piece in pieces)),
    )


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
