"""Text from tokens as they come.

Owns the little state between tokens: an unfinished UTF-8 character, and whether the text
has begun. Each token costs its own bytes, never a look back at earlier ones.

Promises: the pieces of `push` and the one of `flush`, joined, are `Tokenizer.decode` of all
the ids; a piece never changes later, and never holds half a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from loongjax.text.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """The text of one answer, special tokens left out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = _Utf8Decoder(errors="replace")
        self._drop_space = tokenizer.vocabulary.drops_leading_space

    def push(self, ids: Iterable[int]) -> str:
        """Takes the next tokens; returns the text that is final now, often empty."""
        data = b"".join(self._tokenizer.pieces(ids))
        if self._drop_space and data:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Ends the text: returns U+FFFD for a character that stayed unfinished, or nothing."""
        return self._utf8.decode(b"", final=True)
