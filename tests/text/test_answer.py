"""Texts that end an answer: found however tokens are cut, and never given out in part."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from loongjax.sampling.params import SamplingParams
from loongjax.text.answer import AnswerText
from loongjax.text.stops import StopFinder

TEXTS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def first_end(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Begin and end of the stop text that is complete first, by definition."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return end - max(map(len, ending)), end
    return None


@given(TEXTS, STOPS, st.lists(st.integers(0, 12), max_size=6), st.booleans())
def test_the_first_complete_stop_text_ends_the_answer(text, stops, cuts, keeps):
    finder = StopFinder(stops, keeps=keeps)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    out = ""
    for begin, end in pairwise(edges):
        out += finder.push(text[begin:end])
        assert text.startswith(out)
        if finder.found is None:  # what is held back can still become a stop text
            held = text[len(out) : end]
            assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    match = first_end(text, stops)
    if match is None:
        assert finder.found is None
        assert out + finder.flush() == text
    else:
        assert finder.found == text[match[0] : match[1]]
        assert out == text[: match[1] if keeps else match[0]]
        assert finder.flush() == ""
        assert finder.push("more") == ""


def test_a_stop_text_that_comes_too_early_is_text():
    finder = StopFinder(["ab"])
    assert finder.push("xab", may_stop=False) == "xab"
    assert finder.push("ab") == ""
    assert finder.found == "ab"


def test_what_is_held_back_may_end_later():
    finder = StopFinder(["ab", "xaby"])
    assert finder.push("xab", may_stop=False) == ""
    assert finder.push("z") == "xabz"
    assert finder.push("xa", may_stop=False) == ""
    assert finder.push("b") == "x"
    assert finder.found == "ab"


def answer(tokenizer, text: str, **asked) -> tuple[AnswerText, str, list[int]]:
    found = AnswerText(tokenizer, SamplingParams(**asked))
    out, used = "", []
    for token in tokenizer.encode(text, add_special=False):
        out += found.push((token,))
        used.append(token)
        if found.stop is not None:
            break
    return found, out + found.flush(), used


def test_an_answer_ends_across_tokens(byte_tokens):
    found, out, used = answer(byte_tokens, "one two three", stop=["two t", "x"])
    assert (found.stop, out, len(used)) == ("two t", "one ", 9)
    found, out, _ = answer(byte_tokens, "one two", stop="two", include_stop_str_in_output=True)
    assert (found.stop, out) == ("two", "one two")


def test_min_tokens_let_stop_texts_pass(byte_tokens):
    found, out, used = answer(byte_tokens, "aaaa", stop="a", min_tokens=3)
    assert (found.stop, out, len(used)) == ("a", "aa", 3)


def test_half_a_stop_text_and_half_a_character_are_text_in_the_end(byte_tokens):
    found = AnswerText(byte_tokens, SamplingParams(stop="two"))
    ids = byte_tokens.encode("a tw€", add_special=False)
    assert found.push(ids[:-1]) == "a "
    assert found.flush() == "tw�"


def test_the_token_that_ended_it_is_no_text_unless_asked_for(byte_tokens):
    ids = byte_tokens.encode("abc", add_special=False)
    assert AnswerText(byte_tokens, SamplingParams()).push(ids, stopped=True) == "ab"
    keeps = SamplingParams(include_stop_str_in_output=True, stop="x")
    assert AnswerText(byte_tokens, keeps).push(ids, stopped=True) == "abc"
    assert AnswerText(None, SamplingParams()).push(ids) == ""
