"""The tokenizer that the rest of loongjax sees, whatever files it came from.

Owns the rules that hold for every model: how ids become text, how a chat becomes ids, and
what is refused. A `Vocabulary` knows the tokens of one model; a `ChatTemplate` its chats.

Promises: `decode` joins the bytes of the tokens and replaces what is not UTF-8, so that
`IncrementalDetokenizer` can give the same text piece by piece; a chat never gets a second
beginning-of-sequence token.
Not here: stop strings, and the ids that end an answer beside the tokenizer's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from loongjax.errors import RequestError
from loongjax.text.chat_template import ChatTemplate

Backend: TypeAlias = Literal["tokenizers", "transformers", "gguf", "bytes"]
Message: TypeAlias = Mapping[str, Any]
"""One message of a chat: `role` and `content`, both strings, and what else the template knows."""


@runtime_checkable
class Vocabulary(Protocol):
    """The tokens of one model."""

    @property
    def size(self) -> int:
        """One more than the highest id that has a token."""
        ...

    @property
    def drops_leading_space(self) -> bool:
        """Whether a text loses one space at its start when decoded (SentencePiece)."""
        ...

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Ids of a text that is valid Unicode; `add_special` adds BOS where the model wants it."""
        ...

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; empty for an id without a token."""
        ...

    def is_special(self, token: int) -> bool:
        """Whether a token is a mark for the model, no part of the text."""
        ...

    def to_json(self, ids: int) -> str:
        """It as the content of a `tokenizer.json`, for a model that produces so many ids."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokenizer:
    """Text to ids and back. Any thread may call it.

    Attributes:
      vocabulary: The tokens.
      backend: Which reader built it. `transformers` is the slow way in, for folders without
        a `tokenizer.json`.
      bos_id: The token that begins a text, or None.
      eos_ids: Tokens that end an answer, as far as the tokenizer's files say.
      chat_template: How a chat is written for this model; None: it cannot chat.
    """

    vocabulary: Vocabulary
    backend: Backend
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: ChatTemplate | None = None

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that has a token."""
        return self.vocabulary.size

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` and `encode_chat` work."""
        return self.chat_template is not None

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        """Turns a text into ids.

        The written form of a special token, such as `<|im_end|>`, becomes that token even in
        a user's text: so do the models' own tools. Who must not allow it filters the text.

        Args:
          text: Any valid Unicode.
          add_special: Add what the model wants round a raw prompt (mostly BOS, or nothing).

        Raises:
          RequestError: The text holds half a surrogate pair, which no tokenizer can encode.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode: character {error.start} is "
                f"{text[error.start]!r}, half of a surrogate pair; remove or replace it"
            ) from None
        return self.vocabulary.encode(text, add_special=add_special)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Turns ids into text. What is not UTF-8 becomes U+FFFD; ids without a token, nothing."""
        data = b"".join(self.pieces(ids, skip_special))
        if self.vocabulary.drops_leading_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def pieces(self, ids: Iterable[int], skip_special: bool = True) -> Iterable[bytes]:
        """The bytes of each token; a special one is left out if `skip_special`."""
        vocabulary = self.vocabulary
        for token in map(int, ids):
            if not (skip_special and vocabulary.is_special(token)):
                yield vocabulary.piece(token)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> str:
        """Writes a chat as the model was trained to read it, special tokens spelled out.

        Args:
          messages: At least one; their further keys reach the template as they are.
          add_generation_prompt: End with the words that open the assistant's answer.

        Raises:
          RequestError: There is no chat template, a message lacks something, or the template
            refuses the chat.
        """
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template, so it cannot take messages; send a plain "
                "prompt, or use a chat model"
            )
        return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a chat up to where the assistant's answer begins.

        Raises:
          RequestError: As `apply_chat_template` and `encode`.
        """
        # The template writes BOS itself where the model wants it.
        return self.encode(self.apply_chat_template(messages), add_special=False)
