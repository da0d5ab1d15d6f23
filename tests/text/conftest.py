"""Tokenizers that several tests share: the demo model's, and a small SentencePiece one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import pytest
import sentencepiece

from loongjax.models.demo import fetch_demo
from loongjax.text import Tokenizer, TokenizerFiles, load_tokenizer
from tests.text.text_samples import SENTENCES, write_gguf


def load(kind: Literal["hf", "gguf", "bytes"], path: Path | None = None) -> Tokenizer:
    tokenizer = load_tokenizer(TokenizerFiles(kind=kind, path=path))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="session")
def demo_file() -> Path:
    return fetch_demo()


@pytest.fixture(scope="session")
def demo(demo_file: Path) -> Tokenizer:
    return load("gguf", demo_file)


@pytest.fixture(scope="session")
def byte_tokens() -> Tokenizer:
    return load("bytes")


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    """A BPE model with byte fallback, as Llama 2's: identity normalization, dummy prefix."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def sentencepiece_oracle(sentencepiece_model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)


@pytest.fixture(scope="session")
def llama_gguf(
    sentencepiece_oracle: sentencepiece.SentencePieceProcessor,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The SentencePiece model above as a GGUF file."""
    oracle = sentencepiece_oracle
    ids = range(oracle.get_piece_size())
    unknown, control, byte, normal = 2, 3, 6, 1
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    write_gguf(
        path,
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [oracle.id_to_piece(i) for i in ids],
            "tokenizer.ggml.scores": [oracle.get_score(i) for i in ids],
            "tokenizer.ggml.token_type": [
                unknown
                if oracle.is_unknown(i)
                else control
                if oracle.is_control(i)
                else byte
                if oracle.is_byte(i)
                else normal
                for i in ids
            ],
            "tokenizer.ggml.bos_token_id": oracle.bos_id(),
            "tokenizer.ggml.eos_token_id": oracle.eos_id(),
            "tokenizer.ggml.unknown_token_id": oracle.unk_id(),
        },
    )
    return path


@pytest.fixture(scope="session")
def llama(llama_gguf: Path) -> Tokenizer:
    return load("gguf", llama_gguf)
