"""A tokenizer from a Hugging Face folder.

Reads `tokenizer.json` with the `tokenizers` library, and from `tokenizer_config.json` what
that file leaves open: which tokens begin and end a text, and how a chat is written. What is
added to a raw prompt, `tokenizer.json` alone says; `add_bos_token` in the config is ignored
beside it, as transformers 5 does.

A folder without `tokenizer.json` (a lone SentencePiece model, for instance) is converted by
transformers, which is slow and said in the log. Code from the folder never runs.

Refuses, as `ModelError`: folders without a tokenizer, broken files, tokenizers that need
the folder's own code.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from loongjax.errors import ModelError
from loongjax.text.chat_template import ChatTemplate
from loongjax.text.native_vocabulary import NativeVocabulary
from loongjax.text.tokenizer import Backend, Tokenizer

_log = logging.getLogger(__name__)

_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_ADDED_TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "tekken.json")


def load_hf_tokenizer(folder: Path) -> Tokenizer:
    """Builds the tokenizer of a model folder.

    Raises:
      ModelError: There is none, or it cannot be read.
    """
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder} to read a tokenizer from")
    config = _read_json(folder / "tokenizer_config.json")
    backend: Backend
    if (folder / "tokenizer.json").is_file():
        native, backend = _from_file(folder / "tokenizer.json"), "tokenizers"
        specials = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
        _complete(native, config, specials, folder)
    else:
        native, specials = _through_transformers(folder)
        backend = "transformers"
    bos, eos = (native.token_to_id(specials.get(role, "")) for role in ("bos_token", "eos_token"))
    return Tokenizer(
        vocabulary=NativeVocabulary(native, origin=str(folder)),
        backend=backend,
        bos_id=bos,
        eos_ids=() if eos is None else (eos,),
        chat_template=_chat_template(folder, config, specials),
    )


def _from_file(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path} cannot be read as a tokenizer: {error}") from error


def _complete(
    native: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    specials: Mapping[str, str],
    folder: Path,
) -> None:
    """Adds to `tokenizer.json` what only the other files say."""
    _add_listed_tokens(native, config.get("added_tokens_decoder", {}), folder)
    known = native.get_added_tokens_decoder()
    for role, text in specials.items():
        token = native.token_to_id(text)
        if token is None:
            _log.warning("%s: %s %r is not in the vocabulary; left out", folder, role, text)
        elif token not in known or not known[token].special:
            native.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _add_listed_tokens(
    native: tokenizers.Tokenizer, listed: Mapping[str, Mapping[str, Any]], folder: Path
) -> None:
    known = native.get_added_tokens_decoder()
    missing = {int(token): entry for token, entry in listed.items() if int(token) not in known}
    for token, entry in sorted(missing.items()):
        flags = {name: value for name, value in entry.items() if name in _ADDED_TOKEN_FLAGS}
        native.add_tokens([AddedToken(entry["content"], **flags)])
        got = native.token_to_id(entry["content"])
        if got != token:
            raise ModelError(
                f"{folder}: tokenizer_config.json gives {entry['content']!r} the id {token}, "
                f"tokenizer.json {got}; the two files belong to different models"
            )


def _through_transformers(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The converted tokenizer and its special tokens by role."""
    if not any((folder / name).is_file() for name in _SLOW_FILES):
        raise ModelError(
            f"{folder} has no tokenizer: neither tokenizer.json nor any of {_SLOW_FILES}. "
            "Copy the tokenizer's files there from where the model came"
        )
    _log.warning(
        "%s has no tokenizer.json: transformers converts its tokenizer at every start; "
        "save one there with AutoTokenizer(...).save_pretrained to avoid that",
        folder,
    )
    from transformers import AutoTokenizer  # takes seconds, and most folders do without

    try:
        converted = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # each tokenizer class fails in its own way
        raise ModelError(
            f"{folder}: transformers cannot convert its tokenizer: {error}. For SentencePiece "
            "models, see that sentencepiece and protobuf are installed"
        ) from error
    native = getattr(converted, "backend_tokenizer", None)
    if not isinstance(native, tokenizers.Tokenizer):
        raise ModelError(
            f"{folder}: its tokenizer ({type(converted).__name__}) is Python code of transformers, "
            "which cannot be streamed from; add a tokenizer.json"
        )
    return native, _special_tokens(converted.special_tokens_map)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role (`bos_token`, ...), as text; a role may be absent or null."""
    entries = {role: config.get(role) for role in _ROLES}
    return {
        role: entry["content"] if isinstance(entry, Mapping) else str(entry)
        for role, entry in entries.items()
        if entry is not None
    }


def _chat_template(
    folder: Path, config: Mapping[str, Any], specials: Mapping[str, str]
) -> ChatTemplate | None:
    """The template in its own file, or else the one in the config."""
    path = folder / "chat_template.jinja"
    source = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        if "default" not in named:
            raise ModelError(
                f"{folder} has chat templates named {sorted(named)}, but none named 'default'; "
                "put the one to use into chat_template.jinja"
            )
        source = named["default"]
    if source is None:
        return None
    return ChatTemplate(source, variables=specials, origin=str(folder))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content
