"""A tokenizer from the metadata of a GGUF file.

Owns what GGUF leaves to the reader's knowledge: how each named kind of vocabulary splits
text. `gpt2` is byte-level BPE, `llama` is SentencePiece BPE, whose merges follow from the
scores of its tokens.

Refuses, as `ModelError`: other kinds, and pre-tokenizers that are not in `_SPLITTINGS`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from loongjax.errors import ModelError
from loongjax.models.gguf_file import read_gguf
from loongjax.text.chat_template import ChatTemplate
from loongjax.text.native_vocabulary import NativeVocabulary
from loongjax.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_Mark: TypeAlias = tuple[str, int]  # a special token's text and id

# Token types of the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "\u2581"  # how SentencePiece writes a space

_DIGITS = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Splitting:
    """How text is cut before merging.

    Attributes:
      patterns: Applied in turn, each to the parts that the last one left.
      nfc: Characters are composed first.
      whole_words: A part that is a token is taken as it is, without merging.
      adds_bos: What a file that does not say means.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False
    adds_bos: bool = False


_LLAMA3 = _Splitting(
    patterns=(f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_SIGNS_AND_SPACES}",),
    whole_words=True,
    adds_bos=True,
)
_SPLITTINGS = {
    "default": _Splitting(patterns=(r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Splitting(patterns=(_GPT2,)),
    "smollm": _Splitting(patterns=(_DIGITS, _GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Splitting(
        patterns=(f"{_CONTRACTIONS}|{_WORDS}|{_DIGITS}|{_SIGNS_AND_SPACES}",), nfc=True
    ),
}


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """Builds the tokenizer of a GGUF file.

    Raises:
      ModelError: The file cannot be read, lacks a tokenizer, or has one of an unknown kind.
    """
    return tokenizer_from_metadata(read_gguf(path).metadata, origin=str(path))


def tokenizer_from_metadata(metadata: Mapping[str, Any], *, origin: str) -> Tokenizer:
    """Builds a tokenizer from GGUF metadata; `origin` names the file in messages.

    Raises:
      ModelError: The metadata lack a tokenizer, or have one of an unknown kind.
    """
    source = _Source(metadata=metadata, origin=origin)
    kind = source.required("model")
    if kind not in _BUILDERS:
        raise ModelError(
            f"{origin}: tokenizer kind {kind!r} is not known; loongjax reads {sorted(_BUILDERS)}. "
            "Use the model's Hugging Face folder instead"
        )
    try:
        native = _BUILDERS[kind](source)
        _add_marked_tokens(native, source)
    except ModelError:
        raise
    except Exception as error:  # the library raises bare Exception for contradictory vocabularies
        raise ModelError(f"{origin}: its tokenizer cannot be built: {error}") from error
    adds_bos = kind == "llama" or _SPLITTINGS[source.optional("pre", "default")].adds_bos
    bos = source.token("bos") if source.optional("add_bos_token", adds_bos) else None
    eos = source.token("eos") if source.optional("add_eos_token", False) else None
    _add_around(native, before=bos, after=eos)
    return Tokenizer(
        vocabulary=NativeVocabulary(native, origin=origin),
        backend="gguf",
        bos_id=source.token_id("bos"),
        eos_ids=source.eos_ids(),
        chat_template=source.chat_template(),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """Typed access to the tokenizer's part of the metadata."""

    metadata: Mapping[str, Any]
    origin: str

    def optional(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}", default)

    def required(self, key: str) -> Any:
        value = self.optional(key)
        if value is None:
            raise ModelError(
                f"{self.origin} lacks tokenizer.ggml.{key}; convert the model again, "
                "with its tokenizer"
            )
        return value

    @property
    def tokens(self) -> list[str]:
        tokens: list[str] = self.required("tokens")
        return tokens

    @property
    def types(self) -> list[int]:
        types: list[int] = self.optional("token_type") or [_NORMAL] * len(self.tokens)
        return types

    def token_id(self, name: str) -> int | None:
        """The id of a token by its role, such as `bos`."""
        token: int | None = self.optional(f"{name}_token_id")
        if token is not None and not 0 <= token < len(self.tokens):
            raise ModelError(
                f"{self.origin}: {name}_token_id is {token}, of {len(self.tokens)} tokens"
            )
        return token

    def token(self, name: str) -> _Mark | None:
        """A token by its role, as text and id."""
        token = self.token_id(name)
        return None if token is None else (self.tokens[token], token)

    def eos_ids(self) -> tuple[int, ...]:
        """Ends of a text, of a turn, of a message; each once."""
        ends = (self.token_id(name) for name in ("eos", "eot", "eom"))
        return tuple(dict.fromkeys(end for end in ends if end is not None))

    def chat_template(self) -> ChatTemplate | None:
        template = self.metadata.get("tokenizer.chat_template")
        if template is None:
            return None
        roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        named = {f"{short}_token": self.token(name) for short, name in roles.items()}
        variables = {name: token[0] for name, token in named.items() if token is not None}
        return ChatTemplate(template, variables=variables, origin=self.origin)


def _byte_level(source: _Source) -> tokenizers.Tokenizer:
    name = source.optional("pre")
    if name is None:
        _log.warning(
            "%s does not say how its tokenizer splits text (tokenizer.ggml.pre); "
            "taking 'default', which may differ from how the model was trained",
            source.origin,
        )
        name = "default"
    if name not in _SPLITTINGS:
        raise ModelError(
            f"{source.origin}: pre-tokenizer {name!r} is not known; loongjax knows "
            f"{sorted(_SPLITTINGS)}. Use the model's Hugging Face folder instead"
        )
    splitting = _SPLITTINGS[name]
    merges = [tuple(merge.split(" ", 1)) for merge in source.required("merges")]
    native = tokenizers.Tokenizer(
        models.BPE(vocab=_vocabulary(source), merges=merges, ignore_merges=splitting.whole_words)
    )
    if splitting.nfc:
        native.normalizer = normalizers.NFC()
    native.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in splitting.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    native.decoder = decoders.ByteLevel()
    return native


def _sentencepiece(source: _Source) -> tokenizers.Tokenizer:
    unknown = source.token("unknown")
    native = tokenizers.Tokenizer(
        models.BPE(
            vocab=_vocabulary(source),
            merges=_merges_by_score(source.tokens, source.required("scores"), source.types),
            unk_token=None if unknown is None else unknown[0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced = source.optional("add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if spaced else []
    native.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if spaced else []
    native.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return native


_BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _vocabulary(source: _Source) -> dict[str, int]:
    return {token: index for index, token in enumerate(source.tokens)}


def _merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """Every way to join two tokens to a third, the highest-scored result first.

    SentencePiece merges the neighbours whose union scores best; a ranked list of merges does
    the same. Marks and byte tokens never arise from text, so they take no part.
    """
    ids = {token: i for i, token in enumerate(tokens) if types[i] == _NORMAL}
    merges: list[tuple[str, str]] = []
    for token in sorted(ids, key=lambda token: -scores[ids[token]]):
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _add_marked_tokens(native: tokenizers.Tokenizer, source: _Source) -> None:
    """Marks are special, also where only their role says so; user-defined tokens are text."""
    roles = {source.token_id(name) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    for index, (token, kind) in enumerate(zip(source.tokens, source.types, strict=True)):
        special = kind in (_UNKNOWN, _CONTROL) or index in roles
        if special or kind == _USER_DEFINED:
            native.add_tokens([AddedToken(token, special=special, normalized=False)])


def _add_around(native: tokenizers.Tokenizer, *, before: _Mark | None, after: _Mark | None) -> None:
    """Makes `native` add these tokens when it is asked to add special ones, and no others."""
    # Named by place, for the pieces of a template cannot hold every token's text.
    marks = {name: mark for name, mark in (("before", before), ("after", after)) if mark}
    native.post_processor = processors.TemplateProcessing(
        single=[
            *(["before:0"] if before else []),
            "$A:0",
            *(["after:0"] if after else []),
        ],
        special_tokens=[
            {"id": name, "ids": [token], "tokens": [text]} for name, (text, token) in marks.items()
        ],
    )
