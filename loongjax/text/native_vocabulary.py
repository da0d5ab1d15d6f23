"""Tokens held by the `tokenizers` library, whichever reader built them.

Encoding is the library's. Decoding is done here from the bytes of each token, as its
decoder describes them: the library's own decoders look at whole texts, so that with byte
fallback an answer could change after it was sent. For valid UTF-8 the text is the same; a
broken SentencePiece run keeps its readable bytes here, where the library replaces them all.

Refuses, as `ModelError`: decoders other than byte-level and SentencePiece ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from typing import Any

import tokenizers

from loongjax.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TAILS = ((), ("Fuse",), ("ByteFallback", "Fuse"), ("ByteFallback", "Fuse", "Strip"))
_STRIP_ONE_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


class NativeVocabulary:
    """The vocabulary of a `tokenizers.Tokenizer`."""

    def __init__(self, native: tokenizers.Tokenizer, *, origin: str) -> None:
        """Takes over a tokenizer; nobody else may change it afterwards.

        Args:
          native: With normalizer, pre-tokenizer, post-processor, decoder and added tokens set.
          origin: Where it came from, for messages.

        Raises:
          ModelError: Its decoder is of a kind that is not known here.
        """
        native.no_truncation()
        native.no_padding()
        self._native = native
        self._spelling = _spelling(native, origin)
        self._special = frozenset(
            token for token, added in native.get_added_tokens_decoder().items() if added.special
        )
        self._pieces: dict[int, bytes] = {}
        self.size = 1 + max(native.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def drops_leading_space(self) -> bool:
        """Whether the decoder takes one space off the start of a text."""
        return self._spelling.drops_leading_space

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Ids of a text; `add_special` lets the post-processor add its tokens."""
        return self._native.encode(text, add_special_tokens=add_special).ids

    def piece(self, token: int) -> bytes:
        """The bytes of a token; empty for an id without one."""
        piece = self._pieces.get(token)
        if piece is None:
            written = self._native.id_to_token(token) if 0 <= token < self.size else None
            piece = b"" if written is None else self._spelling.read(written)
            self._pieces[token] = piece
        return piece

    def is_special(self, token: int) -> bool:
        """Whether the token was added as a special one."""
        return token in self._special

    def to_json(self, ids: int) -> str:
        """As the library writes it."""
        return self._native.to_str()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Spelling:
    """How the tokens of a vocabulary spell bytes.

    Attributes:
      byte_level: Each byte is written as a printable character of its own (GPT-2).
      replaced: Characters that stand for others; SentencePiece writes a space as U+2581.
      byte_fallback: `<0x0A>` is the byte 10.
      drops_leading_space: A decoded text loses one space at its start.
    """

    byte_level: bool = False
    replaced: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    drops_leading_space: bool = False

    def read(self, written: str) -> bytes:
        """The bytes that a token stands for."""
        if self.byte_level:
            table = byte_of_character()
            # An added token is written plainly, with characters outside the byte alphabet.
            if all(character in table for character in written):
                return bytes(table[character] for character in written)
            return written.encode("utf-8")
        for old, new in self.replaced:
            written = written.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(written)):
            return bytes((int(match[1], 16),))
        return written.encode("utf-8")


def _spelling(native: tokenizers.Tokenizer, origin: str) -> _Spelling:
    decoder = native.decoder
    described = "{}" if decoder is None else decoder.__getstate__()
    description: dict[str, Any] = {"type": None} | json.loads(described)
    steps: list[dict[str, Any]] = description.get("decoders", [description])
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _Spelling(byte_level=True)
    replaces = list(takewhile(lambda step: "String" in step.get("pattern", ()), steps))
    tail = steps[len(replaces) :]
    kinds = tuple(step["type"] for step in tail)
    strips = kinds[-1:] == ("Strip",)
    if not replaces or kinds not in _TAILS or (strips and tail[-1] != _STRIP_ONE_SPACE):
        raise _unknown_decoder(steps, origin)
    return _Spelling(
        replaced=tuple((step["pattern"]["String"], step["content"]) for step in replaces),
        byte_fallback="ByteFallback" in kinds,
        drops_leading_space=strips,
    )


def _unknown_decoder(steps: Sequence[Mapping[str, Any]], origin: str) -> ModelError:
    return ModelError(
        f"{origin}: its tokenizer decodes with {[step['type'] for step in steps]}; loongjax "
        "knows ByteLevel, and SentencePiece's Replace, ByteFallback, Fuse, Strip. Convert the "
        "tokenizer, or use the model with token ids alone"
    )


@cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet: the byte that each of 256 printable characters stands for.

    Printable Latin-1 bytes stand for themselves; the others, in order, for the characters
    from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}
