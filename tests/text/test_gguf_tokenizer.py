"""Tokenizers from GGUF metadata, against transformers and sentencepiece."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from loongjax.errors import ModelError
from loongjax.text import Tokenizer
from loongjax.text.gguf_tokenizer import tokenizer_from_metadata
from loongjax.text.native_vocabulary import byte_of_character
from tests.text.text_samples import TEXTS

# Control characters are no tokens of the demo model, nor are some bytes of unassigned ones.
WRITABLE = st.text(st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co")), max_size=30)
CHAT = [
    {"role": "user", "content": "Hi <|im_end|> there"},
    {"role": "assistant", "content": " Hello! "},
    {"role": "user", "content": "Who are you?"},
]


@pytest.fixture(scope="module")
def demo_oracle(demo_file: Path) -> Any:
    """The demo file as transformers reads it.

    Only the pre-tokenizer is set here, to that of the model's own tokenizer.json: transformers
    does not know the name 'smollm' and would take GPT-2's.
    """
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast.from_pretrained(
        str(demo_file.parent), gguf_file=demo_file.name
    )
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return oracle


# --- the demo model: byte-level BPE ---------------------------------------------------------


def test_the_demo_tokenizer_knows_its_marks(demo: Tokenizer) -> None:
    assert (demo.vocab_size, demo.bos_id, demo.eos_ids) == (49_152, 1, (2,))
    assert demo.backend == "gguf"
    marked = "<|im_start|>user<|im_end|>"
    assert demo.encode(marked, add_special=False) == [1, 4093, 2]
    assert demo.decode([1, 4093, 2]) == "user"
    assert demo.decode([1, 4093, 2], skip_special=False) == marked


@pytest.mark.parametrize("text", TEXTS)
def test_demo_ids_are_those_of_transformers(demo: Tokenizer, demo_oracle: Any, text: str) -> None:
    ids = demo.encode(text, add_special=True)
    assert ids == demo_oracle.encode(text)
    assert demo.decode(ids) == text


@given(text=st.text(st.sampled_from("ab XY 019\n\t.,'é日😀<|>Ω\u0301½"), max_size=40))
def test_demo_ids_of_mixed_texts_are_those_of_transformers(
    demo: Tokenizer, demo_oracle: Any, text: str
) -> None:
    assert demo.encode(text, add_special=True) == demo_oracle.encode(text)


@given(text=WRITABLE)
def test_demo_texts_round_trip(demo: Tokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text, add_special=True)) == text


@given(ids=st.lists(st.integers(0, 300) | st.integers(0, 49_151), max_size=20))
def test_demo_texts_of_any_ids_are_those_of_transformers(
    demo: Tokenizer, demo_oracle: Any, ids: list[int]
) -> None:
    assert demo.decode(ids) == demo_oracle.decode(ids, skip_special_tokens=True)
    assert demo.decode(ids, skip_special=False) == demo_oracle.decode(ids)


def test_ids_without_a_token_are_no_text(demo: Tokenizer) -> None:
    assert demo.decode([4093, 49_152, 10**9, -1]) == "user"


def test_demo_chats_are_those_of_transformers(demo: Tokenizer, demo_oracle: Any) -> None:
    for prompt in (True, False):
        assert demo.apply_chat_template(CHAT, prompt) == demo_oracle.apply_chat_template(
            CHAT, add_generation_prompt=prompt, tokenize=False
        )
    expected = demo_oracle.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert demo.encode_chat(CHAT) == expected


# --- SentencePiece --------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_llama_ids_are_those_of_sentencepiece(
    llama: Tokenizer, sentencepiece_oracle: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    ids = llama.encode(text, add_special=False)
    assert ids == sentencepiece_oracle.encode(text)
    assert llama.decode(ids) == text
    assert llama.encode(text, add_special=True) == [1, *ids]


@given(text=st.text(st.sampled_from("the moon 19\n\t.,'é日😀▁"), max_size=30))
def test_llama_ids_of_mixed_texts_are_those_of_sentencepiece(
    llama: Tokenizer, sentencepiece_oracle: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert llama.encode(text, add_special=False) == sentencepiece_oracle.encode(text)


def test_llama_without_space_prefix_keeps_the_first_space() -> None:
    spaced = llama_metadata()
    plain = tokenizer_from_metadata(
        spaced | {"tokenizer.ggml.add_space_prefix": False}, origin="test"
    )
    assert pieces(plain, " ab", add_special=False) == [b" ", b"ab"]
    assert plain.decode(plain.encode(" ab", add_special=False)) == " ab"
    prefixed = tokenizer_from_metadata(spaced, origin="test")
    assert pieces(prefixed, "ab", add_special=False) == [b" ", b"ab"]
    assert prefixed.decode(prefixed.encode("ab", add_special=False)) == "ab"


def test_a_broken_byte_does_not_spoil_its_neighbours(llama: Tokenizer) -> None:
    first_byte = 3  # after <unk>, <s> and </s>
    assert llama.decode([first_byte + byte for byte in b"A\xffB"]) == "A\ufffdB"


# --- small vocabularies, made here ----------------------------------------------------------


def byte_level_metadata(pre: str | None, merges: list[str], **more: Any) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary: two marks, all bytes, what the merges make."""
    spelled = {byte: character for character, byte in byte_of_character().items()}
    tokens = ["<s>", "</s>", *(spelled[byte] for byte in range(256))]
    tokens += [merge.replace(" ", "") for merge in merges]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        **({} if pre is None else {"tokenizer.ggml.pre": pre}),
        **{f"tokenizer.{key}": value for key, value in more.items()},
    }


def llama_metadata(**more: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", "<0x41>", "\u2581", "a", "b", "ab", "<tool>"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 4 + [-9.0, -9.0, -9.0, -1.0, 0.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 6, 1, 1, 1, 1, 4],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.{key}": value for key, value in more.items()},
    }


def pieces(tokenizer: Tokenizer, text: str, *, add_special: bool = True) -> list[bytes]:
    ids = tokenizer.encode(text, add_special=add_special)
    return list(tokenizer.pieces(ids, skip_special=False))


MERGES = ["1 2", "12 3", "123 4", "' S", ". b", ". .", "b .", "Ġ Ġ", "Ċ Ċ", "Ċ b", "Ã ©"]


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("smollm", "1234", "1|2|3|4"),
        ("gpt-2", "1234", "1234"),
        ("default", "1234", "123|4"),
        ("llama-bpe", "1234", "<s>|123|4"),
        ("qwen2", "1234", "1|2|3|4"),
        ("smollm", "  1", "  |1"),
        ("gpt-2", "  1", " | |1"),
        ("gpt-2", "'S", "'|S"),
        ("llama-bpe", "'S", "<s>|'S"),
        ("qwen2", "'S", "'S"),
        ("gpt-2", ".b", ".|b"),
        ("llama-bpe", ".b", "<s>|.b"),
        ("qwen2", ".b", ".b"),
        ("gpt-2", "..", ".."),
        ("default", "b..", "b|.."),
        ("gpt-2", "\n\nb", "\n|\n|b"),
        ("qwen2", "\n\nb", "\n\n|b"),
        ("gpt-2", "<s>12", "<s>|12"),
    ],
)
def test_each_pre_tokenizer_cuts_where_it_should(pre: str, text: str, expected: str) -> None:
    tokenizer = tokenizer_from_metadata(byte_level_metadata(pre, MERGES), origin="test")
    assert b"|".join(pieces(tokenizer, text)).decode() == expected


def test_qwen_composes_characters_first() -> None:
    qwen, gpt = (
        tokenizer_from_metadata(byte_level_metadata(pre, MERGES), origin="test")
        for pre in ("qwen2", "gpt-2")
    )
    assert pieces(qwen, "e\u0301") == ["é".encode()]
    assert pieces(gpt, "e\u0301") == [b"e", b"\xcc", b"\x81"]


def test_llama3_takes_whole_words_without_their_merges() -> None:
    metadata = byte_level_metadata("llama-bpe", ["a b"])
    metadata["tokenizer.ggml.tokens"].append("xyz")
    metadata["tokenizer.ggml.token_type"].append(1)
    assert pieces(tokenizer_from_metadata(metadata, origin="t"), "xyz") == [b"<s>", b"xyz"]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    assert pieces(tokenizer_from_metadata(metadata, origin="t"), "xyz") == [b"x", b"y", b"z"]


def test_a_missing_pre_tokenizer_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="loongjax.text"):
        tokenizer = tokenizer_from_metadata(byte_level_metadata(None, MERGES), origin="f.gguf")
    assert "f.gguf does not say how its tokenizer splits text" in caplog.text
    assert pieces(tokenizer, "1234") == [b"123", b"4"]


def test_user_defined_tokens_stay_whole_and_are_text() -> None:
    tokenizer = tokenizer_from_metadata(llama_metadata(), origin="test")
    ids = tokenizer.encode("a<tool>", add_special=False)
    assert ids == [4, 5, 8]
    assert tokenizer.decode(ids) == "a<tool>"


def test_a_mark_by_role_is_special_even_if_its_type_does_not_say_so() -> None:
    metadata = byte_level_metadata("gpt-2", MERGES)
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = tokenizer_from_metadata(metadata, origin="test")
    assert tokenizer.encode("</s>", add_special=False) == [1]
    assert tokenizer.decode([0, 1]) == ""


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, b"12"),
        ({"ggml.add_bos_token": True}, b"<s>|12"),
        ({"ggml.add_bos_token": True, "ggml.add_eos_token": True}, b"<s>|12|</s>"),
    ],
)
def test_a_raw_prompt_gets_what_the_file_says(flags: dict[str, Any], expected: bytes) -> None:
    metadata = byte_level_metadata("gpt-2", MERGES, **flags)
    tokenizer = tokenizer_from_metadata(metadata, origin="test")
    assert b"|".join(pieces(tokenizer, "12")) == expected
    assert pieces(tokenizer, "12", add_special=False) == [b"12"]


@pytest.mark.parametrize(
    "metadata", [llama_metadata, lambda **m: byte_level_metadata("llama-bpe", MERGES, **m)]
)
def test_a_chat_has_one_bos(metadata: Any) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = tokenizer_from_metadata(metadata(chat_template=template), origin="test")
    ids = tokenizer.encode_chat([{"role": "user", "content": "ab"}])
    assert tokenizer.bos_id is not None
    assert ids.count(tokenizer.bos_id) == 1
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_ids[0]
    raw = tokenizer.encode(
        tokenizer.apply_chat_template([{"role": "u", "content": "ab"}]), add_special=True
    )
    assert raw.count(tokenizer.bos_id) == 2  # what encode_chat avoids


def test_all_ends_of_an_answer_are_known_once() -> None:
    metadata = byte_level_metadata("gpt-2", MERGES)
    more = {"tokenizer.ggml.eot_token_id": 0, "tokenizer.ggml.eom_token_id": 1}
    assert tokenizer_from_metadata(metadata | more, origin="test").eos_ids == (1, 0)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "t5"}, r"kind 't5' is not known; loongjax reads \['gpt2', 'llama'\]"),
        ({"model": None}, r"test lacks tokenizer\.ggml\.model"),
        ({"tokens": None}, r"test lacks tokenizer\.ggml\.tokens"),
        ({"merges": None}, r"test lacks tokenizer\.ggml\.merges"),
        ({"model": "llama"}, r"test lacks tokenizer\.ggml\.scores"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not known"),
        ({"bos_token_id": 10_000}, "bos_token_id is 10000, of 269 tokens"),
        ({"merges": ["x yz"]}, "tokenizer cannot be built"),
        ({"token_type": [1]}, "tokenizer cannot be built"),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], complaint: str) -> None:
    metadata = byte_level_metadata("gpt-2", MERGES)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ModelError, match=complaint):
        tokenizer_from_metadata(metadata, origin="test")
