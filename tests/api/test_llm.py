"""`LLM` over a fake executor: batches, chats, streams, and what goes wrong in them."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from loongjax import LLM, SamplingParams
from loongjax.api.prompts import as_token_ids
from loongjax.errors import CapacityError, EngineClosedError, LoongJaxError, RequestError
from loongjax.plan import Plan, Rejection, Snapshot
from loongjax.text import AnswerText, Tokenizer, TokenizerFiles, load_tokenizer
from loongjax.text.chat_template import ChatTemplate
from tests.engine.fake_executor import FakeExecutor, answer
from tests.engine.rig import MODEL_LEN, Rig, Wrapped, rig

HELLO = tuple(b"hello")
FOUR = SamplingParams(max_tokens=4)
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def byte_tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer(TokenizerFiles(kind="bytes"))
    assert tokenizer is not None
    template = ChatTemplate(CHAT, variables={}, origin="the test")
    return dataclasses.replace(tokenizer, chat_template=template)


@contextmanager
def llm_over(tokenizer: Tokenizer | None = None, **options: object) -> Iterator[tuple[LLM, Rig]]:
    with rig(**options) as it:
        yield LLM.from_engine(it.engine, tokenizer or byte_tokenizer()), it


def test_batch_comes_back_in_order() -> None:
    prompts = ["hello", [1, 2, 3], "x" * 40, list(np.arange(5))]
    ids = [HELLO, (1, 2, 3), tuple(b"x" * 40), (0, 1, 2, 3, 4)]
    with llm_over() as (llm, _):
        outputs = llm.generate(prompts, FOUR)
        assert [output.prompt_token_ids for output in outputs] == ids
        assert [output.token_ids for output in outputs] == [answer(i, 4) for i in ids]
        assert llm.tokenizer is not None
        assert outputs[0].text == llm.tokenizer.decode(answer(HELLO, 4))
        assert {output.finish_reason for output in outputs} == {"length"}


def test_one_prompt_needs_no_list() -> None:
    with llm_over() as (llm, _):
        for prompt in ("hello", list(HELLO), HELLO, list(np.array(HELLO))):
            (output,) = llm.generate(prompt, FOUR)
            assert output.token_ids == answer(HELLO, 4)


def test_several_answers_to_each_prompt() -> None:
    with llm_over() as (llm, _):
        one, three = llm.generate(["hello", [1, 2, 3]], [FOUR, SamplingParams(n=3, max_tokens=4)])
        assert [given.token_ids for given in one.outputs] == [answer(HELLO, 4)]
        assert [given.index for given in three.outputs] == [0, 1, 2]
        assert [given.token_ids for given in three.outputs] == [
            answer((1, 2, 3), 4, i) for i in range(3)
        ]
        assert (three.token_ids, three.finish_reason) == (answer((1, 2, 3), 4), "length")
        assert three.text == three.outputs[0].text
        chatted = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(n=2, max_tokens=4))
        assert len(chatted.outputs) == 2
        assert sum(run.count for run in chatted.outputs[1].steps) == 5  # the stem's, and its own


def test_stream_is_one_answer() -> None:
    with llm_over() as (llm, _), pytest.raises(RequestError, match=r"one answer, but n = 2"):
        next(llm.stream("hello", SamplingParams(n=2)))


def test_no_prompts_give_no_outputs() -> None:
    with llm_over() as (llm, _):
        assert llm.generate([]) == []


def test_default_is_sampling_to_the_end_of_the_context() -> None:
    with llm_over() as (llm, it):
        (output,) = llm.generate("x" * 120)
        assert len(output.token_ids) == MODEL_LEN - 120
        (given,) = it.executor.inputs.values()
        assert given.params.temperature == 1.0


def test_each_prompt_may_have_its_own_params() -> None:
    each = [SamplingParams(max_tokens=n) for n in (1, 3)]
    with llm_over() as (llm, _):
        outputs = llm.generate(["a", "b"], each)
        assert [len(output.token_ids) for output in outputs] == [1, 3]
        with pytest.raises(RequestError, match="2 sampling params for 3 prompts"):
            llm.generate(["a", "b", "c"], each)


def test_stop_token_is_in_the_ids_but_not_in_the_text() -> None:
    tokens = answer(HELLO, 3)
    with llm_over(eos_ids=(tokens[2],)) as (llm, _):
        (output,) = llm.generate("hello", SamplingParams(max_tokens=9))
        assert output.token_ids == tokens
        assert output.stop_token == tokens[2]
        assert output.finish_reason == "stop"
        assert llm.tokenizer is not None
        assert output.text == llm.tokenizer.decode(tokens[:2])
        assert "".join(chunk.text or "" for chunk in llm.stream("hello")) == output.text


def test_a_text_ends_an_answer_wherever_it_is_seen() -> None:
    """The engine stops at the token that completes it; batch and stream cut the text there."""
    tokenizer = byte_tokenizer()
    prompt = next(  # an answer with three readable characters at its beginning
        text
        for text in map(str, range(10_000))
        if all(32 <= token < 127 for token in answer(tuple(text.encode()), 3))
    )
    a, b, c = map(chr, answer(tuple(prompt.encode()), 3))
    with llm_over(tokenizer, watch=lambda params: AnswerText(tokenizer, params)) as (llm, _):
        params = SamplingParams(max_tokens=9, stop=["no such text", b + c])
        (output,) = llm.generate(prompt, params)
        assert (output.text, output.stop_text, output.stop_token) == (a, b + c, None)
        assert (output.finish_reason, output.stop_reason) == ("stop", b + c)
        assert len(output.token_ids) == 3
        assert "".join(chunk.text or "" for chunk in llm.stream(prompt, params)) == a
        kept = dataclasses.replace(params, include_stop_str_in_output=True)
        assert llm.generate(prompt, kept)[0].text == a + b + c
        late = dataclasses.replace(params, min_tokens=4)
        assert llm.generate(prompt, late)[0].finish_reason == "length"


def test_a_model_without_text_refuses_stop_texts() -> None:
    with llm_over() as (llm, _), pytest.raises(RequestError, match="has no tokenizer"):
        llm.generate("hello", SamplingParams(stop="x"))


def test_a_request_can_be_held_read_and_aborted() -> None:
    with llm_over() as (llm, it):
        it.executor.hold()
        request = llm.submit("hello", FOUR, priority=3)
        other = llm.submit([1, 2, 3], SamplingParams(n=2, max_tokens=4))
        with pytest.raises(TimeoutError, match=r"no event within .* it goes on"):
            request.result(timeout=0.01)
        other.abort()
        it.executor.release()
        assert request.result().token_ids == answer(HELLO, 4)
        assert request.result().token_ids == answer(HELLO, 4)
        assert {given.finish_reason for given in other.result().outputs} == {"abort"}
        assert request.prompt_token_ids == HELLO
        stream = llm.submit("hello", FOUR)
        first = next(stream.stream())
        assert first.token_ids == answer(HELLO, 1)
        assert stream.result().token_ids == answer(HELLO, 4)


def test_chats_may_stand_among_prompts() -> None:
    chat = [{"role": "user", "content": "hi"}]
    with llm_over() as (llm, _):
        expected = llm.chat(chat, FOUR).token_ids
        assert llm.generate(chat, FOUR)[0].token_ids == expected
        assert llm.generate(["a", chat], FOUR)[1].token_ids == expected
        assert "".join(chunk.text or "" for chunk in llm.stream(chat, FOUR)) == (
            llm.chat(chat, FOUR).text
        )


def test_output_says_where_it_ran_and_how_fast() -> None:
    executor = FakeExecutor(duration=lambda step: 2.0)
    with llm_over(executor=executor, instances=1) as (llm, _):
        (output,) = llm.generate("hello", FOUR)
        assert [(run.kind, run.degree, run.instances, run.count) for run in output.steps] == [
            ("prefill", 1, (0,), 1),
            ("decode", 1, (0,), 3),
        ]
        assert output.ttft_s == 2.0
        assert output.decode_tokens_per_s == 0.5
        assert len(llm.steps()) == 4
        assert llm.stats().generated_tokens == 4
        (single,) = llm.generate("hello", SamplingParams(max_tokens=1))
        assert single.decode_tokens_per_s is None


def test_bad_prompts_of_a_batch_do_not_cost_the_others_answers() -> None:
    prompts = ["hello", [], [5000], "x" * 199, "x" * 300, "\ud800"]
    with llm_over(instances=4) as (llm, _):
        good, *bad = llm.generate(prompts, FOUR)
        assert good.token_ids == answer(HELLO, 4)
        assert [output.finish_reason for output in bad] == ["error"] * 5
        for output, words in zip(
            bad,
            [
                "is empty",
                "token id 5000",
                "exceed max_model_len 200",
                "has 300 tokens",
                "not valid Unicode",
            ],
            strict=True,
        ):
            assert output.error is not None
            assert words in output.error
            assert (output.token_ids, output.text) == ((), "")


def test_bad_prompt_given_alone_raises() -> None:
    with llm_over(slots=32) as (llm, it):
        with pytest.raises(RequestError, match=re.escape("outside the vocabulary [0, 1000)")):
            llm.generate([5000])
        with pytest.raises(CapacityError):
            llm.generate("hello", SamplingParams(max_tokens=150))
        assert not it.executor.inputs


def test_ids_must_be_integers() -> None:
    with pytest.raises(RequestError, match=r"a text or a list of token ids: 'float'"):
        as_token_ids([1, 2.5])


def turning_long_ones_away(snapshot: Snapshot) -> Plan | None:
    long = [Rejection(view.id, "no room today") for view in snapshot.waiting if view.prompt > 5]
    return Plan(reject=tuple(long)) if long else None


def test_request_that_fails_later_raises_alone_and_is_an_output_in_a_batch() -> None:
    with llm_over(policy=Wrapped(first=turning_long_ones_away)) as (llm, _):
        with pytest.raises(LoongJaxError, match="no room today"):
            llm.generate("too long", FOUR)
        with pytest.raises(LoongJaxError, match="no room today"):
            list(llm.stream("too long", FOUR))
        good, bad = llm.generate(["hello", "too long"], FOUR)
        assert good.token_ids == answer(HELLO, 4)
        assert (bad.finish_reason, bad.error) == ("error", "no room today")


def test_closed_engine_raises() -> None:
    with llm_over() as (llm, _):
        with llm:
            pass
        with pytest.raises(EngineClosedError):
            llm.generate("hello")
        with pytest.raises(EngineClosedError):
            llm.generate(["hello"])
        llm.close()


def test_dead_engine_raises_as_such() -> None:
    def first(snapshot: Snapshot) -> Plan:
        raise OSError("broken")

    died = pytest.raises(EngineClosedError, match="the engine died of OSError: broken")
    with llm_over(policy=Wrapped(first=first)) as (llm, _), died:
        llm.generate("hello", FOUR)


def test_chat_uses_the_models_template() -> None:
    with llm_over() as (llm, _):
        output = llm.chat([{"role": "user", "content": "hi"}], FOUR)
        assert bytes(output.prompt_token_ids) == b"user: hi\nassistant:"
        assert output.token_ids == answer(output.prompt_token_ids, 4)


def test_model_without_tokenizer_takes_ids_alone() -> None:
    with rig() as it:
        llm = LLM.from_engine(it.engine)
        (output,) = llm.generate([1, 2], FOUR)
        assert (output.token_ids, output.text) == (answer((1, 2), 4), None)
        assert [chunk.text for chunk in llm.stream([1, 2], FOUR)] == [None] * 5
        with pytest.raises(RequestError, match="no tokenizer; give token ids"):
            llm.generate("hello")
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.chat([{"role": "user", "content": "hi"}])


def test_stream_gives_tokens_as_they_come_and_then_its_end() -> None:
    with llm_over() as (llm, _):
        *chunks, last = llm.stream("hello", FOUR)
        assert [chunk.token_ids for chunk in chunks] == [(t,) for t in answer(HELLO, 4)]
        assert {chunk.finish_reason for chunk in chunks} == {None}
        assert (last.token_ids, last.finish_reason) == ((), "length")


def test_leaving_a_stream_aborts_it() -> None:
    with llm_over() as (llm, it):
        for chunk in llm.stream("hello"):
            if chunk.token_ids:
                break
        gc.collect()
        it.executor.wait_for(lambda executor: not executor.known)
        stream = llm.stream("hello", SamplingParams(max_tokens=100))
        next(stream)
        stream.close()
        it.executor.wait_for(lambda executor: not executor.known)
        it.executor.wait_idle()
        assert it.used == 0
        assert {r for r, _ in it.engine.stats().finished} <= {"abort", "length"}


def test_interrupt_aborts_the_requests_and_leaves_the_engine_usable() -> None:
    # A shell starts background jobs with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with llm_over() as (llm, it):
        it.executor.hold()

        def interrupt() -> None:
            it.executor.wait_for(lambda executor: executor.flights)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hello"] * 5, SamplingParams(max_tokens=50))
        thread.join()
        it.executor.release()
        it.executor.wait_for(lambda executor: not executor.known)
        it.executor.wait_idle()
        assert it.used == 0
        assert it.engine.stats().generated_tokens <= 5
        assert llm.generate("hello", FOUR)[0].token_ids == answer(HELLO, 4)
    signal.signal(signal.SIGINT, before)


def test_dropped_llm_gives_its_engine_back() -> None:
    with llm_over() as (llm, it):
        llm.generate("hello", FOUR)
        del llm
        gc.collect()
        it.executor.wait_for(lambda executor: executor.closed)


def test_several_threads_share_one() -> None:
    with llm_over() as (llm, _):
        results: dict[str, str | None] = {}

        def ask(word: str) -> None:
            results[word] = llm.generate([word] * 3, FOUR)[2].text

        threads = [threading.Thread(target=ask, args=(word,)) for word in ("a", "b", "c")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert llm.tokenizer is not None
        assert results == {
            word: llm.tokenizer.decode(answer(word.encode(), 4)) for word in ("a", "b", "c")
        }
