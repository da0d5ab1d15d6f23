"""How answers are written in JSON: whole or as events of a stream, of completions or of chats."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from loongjax.errors import LoongJaxError
from serving.errors import status_of
from serving.http.choices import ChoicePiece
from serving.http.errors import error_body

Kind: TypeAlias = Literal["text_completion", "chat.completion"]


@dataclass(kw_only=True)
class Answer:
    """What one request is told.

    Attributes:
      id: The request's name.
      kind: What it asked for.
      model: Whom it asked.
      with_usage: Whether a stream ends with a count of tokens.
      with_ids: Whether choices have their token ids beside their text.
      created: When it came [s, Unix time].
    """

    id: str
    kind: Kind
    model: str
    with_usage: bool = False
    with_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    _prompts: dict[int, int] = field(default_factory=dict)
    _tokens: int = 0

    def whole(self, pieces: Sequence[ChoicePiece], samples: int) -> dict[str, Any]:
        """The body of an answer that is not streamed; each prompt has so many samples."""
        texts: dict[int, list[str]] = {}
        ids: dict[int, list[int]] = {}
        reasons: dict[int, str | None] = {}
        for piece in pieces:
            self._count(piece, samples)
            texts.setdefault(piece.index, []).append(piece.text)
            ids.setdefault(piece.index, []).extend(piece.token_ids)
            reasons[piece.index] = piece.finish_reason
        listed = [
            {"index": index, "finish_reason": reasons[index], "logprobs": None}
            | self._said("".join(texts[index]))
            | self._ids(ids[index])
            for index in sorted(texts)
        ]
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
                choice: dict[str, Any] = {"index": piece.index, "logprobs": None}
                choice["finish_reason"] = piece.finish_reason
                choice |= self._ids(piece.token_ids)
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

    def _ids(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(ids)} if self.with_ids else {}

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


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
