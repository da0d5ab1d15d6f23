"""A token for each byte: the tokenizer of models with random weights.

Ids 0 to 255 are bytes. A random model also produces ids above; they are shown as `<300>`,
so that its output can be read and compared. That form is not read back.
"""

from __future__ import annotations

from loongjax.text.tokenizer import Tokenizer

_BYTES = 256


class ByteVocabulary:
    """UTF-8 bytes as tokens; no special ones."""

    size = _BYTES
    drops_leading_space = False

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """The text's UTF-8 bytes; there is nothing special to add."""
        return list(text.encode("utf-8"))

    def piece(self, token: int) -> bytes:
        """The byte, or the id in angle brackets."""
        return bytes((token,)) if 0 <= token < _BYTES else b"<%d>" % token

    def is_special(self, token: int) -> bool:
        """Never."""
        return False


def byte_tokenizer() -> Tokenizer:
    """The byte-level tokenizer: no BOS, no end token, no chat template."""
    return Tokenizer(vocabulary=ByteVocabulary(), backend="bytes")
