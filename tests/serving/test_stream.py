"""An `AnswerStream` loses nothing, whenever its reader comes."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from loongjax.engine import FinishedEvent, TokensEvent
from loongjax.engine.messages import Timings
from serving.stream import AnswerStream, Progress

_END = FinishedEvent(
    reason="length",
    timings=Timings(arrival=0.0, first_scheduled=0.0, first_token=0.0, end=1.0),
)


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=4), data=st.data())
def test_each_answer_is_whole_and_ends_once(counts, data):
    """`counts`: the tokens of each answer; they come in any order that keeps each answer's own."""
    answers = {sample: list(range(count)) for sample, count in enumerate(counts)}
    left = [sample for sample, tokens in answers.items() for _ in [*tokens, "end"]]
    left = data.draw(st.permutations(left), label="of which answer each event is")
    sent = dict.fromkeys(answers, 0)
    stream = AnswerStream(len(answers))

    def put_some(least: int) -> None:
        count = data.draw(st.integers(min(least, len(left)), len(left)), label="events")
        for sample in left[:count]:
            is_end = sent[sample] == len(answers[sample])
            stream.put(sample, _END if is_end else TokensEvent(token_ids=(sent[sample],)))
            sent[sample] += 1
        del left[:count]

    async def read() -> list[Progress]:
        pieces = []
        put_some(1)
        while taken := await stream.take():
            pieces += taken
            put_some(1)  # the reader is away
        return pieces

    pieces = asyncio.run(read())
    for sample, tokens in answers.items():
        own = [piece for piece in pieces if piece.sample == sample]
        assert [token for piece in own for token in piece.token_ids] == tokens
        assert [piece.end for piece in own] == [None] * (len(own) - 1) + [_END]
