"""The entrance, the byte tokenizer, and what importing costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.errors import ModelError, RequestError
from loongjax.text import Tokenizer, TokenizerFiles, load_tokenizer


def test_no_files_no_tokenizer() -> None:
    assert load_tokenizer(None) is None


@pytest.mark.parametrize(("kind", "what"), [("gguf", "file"), ("hf", "folder")])
def test_a_path_is_asked_for(kind: Literal["gguf", "hf"], what: str) -> None:
    with pytest.raises(ModelError, match=f"kind '{kind}' needs the path of its {what}"):
        load_tokenizer(TokenizerFiles(kind=kind))


def test_loading_a_tokenizer_imports_neither_jax_nor_torch(demo_file: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from loongjax.text import *\n"
        f"load_tokenizer(TokenizerFiles(kind='gguf', path=Path({str(demo_file)!r})))\n"
        "print(sorted({'jax', 'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_bytes_are_tokens(byte_tokens: Tokenizer) -> None:
    assert byte_tokens.encode("aé", add_special=True) == [0x61, 0xC3, 0xA9]
    assert (byte_tokens.vocab_size, byte_tokens.bos_id, byte_tokens.eos_ids) == (256, None, ())
    assert byte_tokens.backend == "bytes"


def test_ids_beyond_the_bytes_are_shown(byte_tokens: Tokenizer) -> None:
    assert byte_tokens.decode([0x61, 300, 0xC3, 31_999, 0x62]) == "a<300>\ufffd<31999>b"


@given(text=st.text())
def test_bytes_round_trip(byte_tokens: Tokenizer, text: str) -> None:
    assert byte_tokens.decode(byte_tokens.encode(text, add_special=False)) == text


@pytest.mark.parametrize("kind", ["demo", "byte_tokens"])
def test_half_a_surrogate_pair_is_refused_by_place(
    kind: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    with pytest.raises(RequestError, match=r"character 2 is '\\ud83d'"):
        tokenizer.encode("ab\ud83d", add_special=False)
