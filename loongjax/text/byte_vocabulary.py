"""A token for each byte: the tokenizer of models with random weights.

Ids 0 to 255 are bytes. A random model also produces ids above; they are shown as `<300>`,
so that its output can be read and compared. That form is not read back.
"""

from __future__ import annotations

import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as ByteLevelSplit

from loongjax.text.native_vocabulary import byte_of_character
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

    def to_json(self, ids: int) -> str:
        """Byte-pair encoding without a pair; ids above the bytes are spelled as `piece` does."""
        vocabulary = byte_of_character() | {f"<{token}>": token for token in range(_BYTES, ids)}
        model = BPE(vocab=vocabulary, merges=[])
        native = tokenizers.Tokenizer(model)
        native.pre_tokenizer = ByteLevelSplit(add_prefix_space=False, use_regex=False)
        native.decoder = ByteLevelDecoder()
        return native.to_str()


def byte_tokenizer() -> Tokenizer:
    """The byte-level tokenizer: no BOS, no end token, no chat template."""
    return Tokenizer(vocabulary=ByteVocabulary(), backend="bytes")
