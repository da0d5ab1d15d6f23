"""Pieces of text join to the whole, are final, and cost no look back."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loongjax.text import IncrementalDetokenizer, Tokenizer
from loongjax.text.tokenizer import Vocabulary
from tests.text.text_samples import TEXTS

EMOJI = "👩‍👩‍👧‍👦 ok 🇩🇪 日本"
# The demo model has no tokens for some bytes of unassigned characters.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn", "Co"), exclude_characters="\ufffd")
KINDS = ["demo", "byte_tokens", "llama"]


@pytest.fixture(scope="session")
def tokenizers(demo: Tokenizer, byte_tokens: Tokenizer, llama: Tokenizer) -> dict[str, Tokenizer]:
    return {"demo": demo, "byte_tokens": byte_tokens, "llama": llama}


def streamed(tokenizer: Tokenizer, ids: list[int], cuts: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [detokenizer.push(ids[start:end]) for start, end in pairwise(borders)]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
@given(
    # Low ids are bytes and marks: broken UTF-8 in most draws. High ones: whole words, or none.
    ids=st.lists(st.integers(0, 300) | st.integers(0, 60_000), max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=24),
)
def test_pieces_of_any_tokens_join_to_the_whole(
    tokenizers: dict[str, Tokenizer], kind: str, ids: list[int], cuts: list[int]
) -> None:
    tokenizer = tokenizers[kind]
    assert "".join(streamed(tokenizer, ids, cuts)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(ASSIGNED, max_size=20) | st.sampled_from([*TEXTS, EMOJI]), data=st.data())
def test_no_piece_holds_half_a_character(
    tokenizers: dict[str, Tokenizer], kind: str, text: str, data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special=False)
    whole = tokenizer.decode(ids)
    cuts = data.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids)))
    pieces = streamed(tokenizer, ids, cuts)
    assert "".join(pieces) == whole
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""


def test_an_emoji_comes_out_with_its_last_byte(byte_tokens: Tokenizer) -> None:
    ids = list("a😀b".encode())
    assert streamed(byte_tokens, ids, list(range(1, 6))) == ["a", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_comes_out_at_the_end(byte_tokens: Tokenizer) -> None:
    assert streamed(byte_tokens, list("é".encode())[:1], []) == ["", "\ufffd"]


def test_only_the_first_space_of_a_sentencepiece_text_is_dropped(llama: Tokenizer) -> None:
    ids = llama.encode("the moon", add_special=True)
    pieces = streamed(llama, ids, list(range(1, len(ids))))
    assert "".join(pieces) == "the moon"
    assert pieces[0] == ""  # BOS, which must not count as the text's beginning


class Counting:
    """A vocabulary that counts how often it is asked for a piece."""

    def __init__(self, inner: Vocabulary) -> None:
        self.inner = inner
        self.asked = 0
        self.size = inner.size
        self.drops_leading_space = inner.drops_leading_space

    def encode(self, text: str, *, add_special: bool) -> list[int]:
        return self.inner.encode(text, add_special=add_special)

    def piece(self, token: int) -> bytes:
        self.asked += 1
        return self.inner.piece(token)

    def to_json(self, ids: int) -> str:
        return self.inner.to_json(ids)

    def is_special(self, token: int) -> bool:
        return self.inner.is_special(token)


def test_each_token_is_read_once_even_if_no_character_ends(byte_tokens: Tokenizer) -> None:
    counting = Counting(byte_tokens.vocabulary)
    detokenizer = IncrementalDetokenizer(dataclasses.replace(byte_tokens, vocabulary=counting))
    text = "".join(detokenizer.push([0x80]) for _ in range(1000)) + detokenizer.flush()
    assert text == "\ufffd" * 1000
    assert counting.asked == 1000
