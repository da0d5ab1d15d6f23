"""Answers and models in a notebook: what they say, that it is escaped, and that it is short."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser

import pytest

from loongjax import SamplingParams
from loongjax.api.outputs import CompletionOutput, RequestOutput, RequestOutputs, StepRun
from loongjax.api.showing import served_html
from loongjax.engine import StepRecord
from loongjax.timeline import Timeline
from tests.api.test_llm import FOUR, llm_over
from tests.engine.fake_executor import FakeExecutor
from tests.timeline.story import decode, decodes, prefill

HOSTILE = "</pre><script>alert('x')</script> & more"


class Page(HTMLParser):
    """The tags of a page, the cells of its tables, and all its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.images: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attrs)["src"] or "")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def told(text: str | None = "Mercury.", records: tuple[StepRecord, ...] = ()) -> CompletionOutput:
    return CompletionOutput(
        token_ids=(1, 2, 3, 4),
        text=text,
        finish_reason="stop",
        steps=(
            StepRun(kind="prefill", instances=(0, 1), count=1),
            StepRun(kind="decode", instances=(1,), count=3),
        ),
        records=records,
        ttft_s=0.5,
        decode_tokens_per_s=25.0,
    )


STORY = (
    prefill(0, (0, 1), 0.0, 0.5, "a", kept={1: 40}),
    decode(1, (0,), 0.5, 0.6, "a", error="sabotage"),
    *decodes(2, 3, (1,), 1.0, 0.1, "a"),
)


def test_a_line_says_what_came_and_how() -> None:
    output = RequestOutput(prompt_token_ids=(7,) * 1000, outputs=(told(),))
    assert repr(output) == (
        "<RequestOutput: 'Mercury.', stop, 4 tokens, the first after 0.5 s, then 25.0 tokens/s>"
    )
    assert repr(told(text=None)).startswith("<CompletionOutput: stop, 4 tokens, ")
    assert len(repr(told(text="long " * 1000))) < 150
    assert repr(RequestOutput(prompt_token_ids=(), outputs=(told(), told()))).count("Mercury") == 2


def test_html_has_the_text_the_runs_and_a_picture() -> None:
    page = Page(told(records=STORY)._repr_html_())
    assert page.text.startswith("Mercury.stop, 4 tokens")
    assert page.rows == [
        ["steps", "kind", "degree", "instances", "tokens", "time"],
        ["1", "prefill", "2", "0, 1", "40", "0.5 s"],
        ["3", "decode", "1", "1", "3", "0.29 s"],
    ]
    whole = RequestOutput(prompt_token_ids=(7,), outputs=(told(records=STORY),))
    page = Page(whole._repr_html_())
    assert page.text.startswith("Prompt of 1 token")
    (image,) = page.images
    assert image.startswith("data:image/png;base64,")


def test_answers_of_one_prompt_share_steps_that_are_drawn_once() -> None:
    output = RequestOutput(prompt_token_ids=(7,), outputs=(told(records=STORY),) * 2)
    assert output.timeline().steps == STORY


def test_steps_that_are_not_known_in_full_still_make_a_table() -> None:
    page = Page(told()._repr_html_())
    assert page.rows[1:] == [
        ["1", "prefill", "2", "0, 1", "", ""],
        ["3", "decode", "1", "1", "", ""],
    ]
    assert not page.images


@pytest.mark.parametrize("text", [HOSTILE, None])
def test_whatever_is_said_is_escaped(text: str | None) -> None:
    bad = CompletionOutput(token_ids=(), text=text, finish_reason="error", error=HOSTILE)
    output = RequestOutput(prompt_token_ids=(), outputs=(bad,))
    with llm_over() as (llm, _):
        named = served_html(HOSTILE, llm.stats(), Timeline.from_steps([]))
    for html in (output._repr_html_(), RequestOutputs([output])._repr_html_(), named):
        page = Page(html)
        assert "script" not in page.tags
        assert "<script>alert('x')" in page.text


def test_a_batch_is_a_table_of_its_requests() -> None:
    executor = FakeExecutor(duration=lambda step: 2.0)
    with llm_over(executor=executor, instances=1) as (llm, _):
        outputs = llm.generate([[1, 2, 3], []], FOUR)
        page = Page(outputs._repr_html_())
    head, good, bad = page.rows
    assert head[1:4] == ["prompt tokens", "answer", "ended by"]
    assert (good[1], good[3:]) == ("3", ["length", "4", "2 s", "0.5"])
    assert (bad[1], bad[3:]) == ("0", ["error", "0", "", ""])
    assert "is empty" in bad[2]
    assert len(page.images) == 1


def test_a_long_batch_shows_its_beginning() -> None:
    output = RequestOutput(prompt_token_ids=(7,), outputs=(told(),))
    page = Page(RequestOutputs([output] * 70)._repr_html_())
    assert len(page.rows) == 51
    assert "and 20 requests more" in page.text
    assert Page(RequestOutputs()._repr_html_()).rows == []


def test_records_are_those_of_the_request_alone() -> None:
    with llm_over() as (llm, _):
        outputs = llm.generate(["hello", "other"], SamplingParams(max_tokens=6))
        first, second = (output.outputs[0] for output in outputs)
        assert sum(run.count for run in first.steps) == len(first.records)
        assert {record.seq for record in first.records + second.records} == {
            record.seq for record in llm.steps()
        }
        assert set(outputs[0].timeline().steps) == set(first.records)


def test_an_llm_says_how_full_and_how_busy_it_is() -> None:
    with llm_over(instances=2, slots=256) as (llm, it):
        assert repr(llm) == ("<LLM: 2 instances, 0 of 512 KV slots in use, 0 running, 0 waiting>")
        llm.generate("hello", FOUR)
        it.executor.wait_idle()
        page = Page(llm._repr_html_())
        assert page.text.startswith("LLM: 2 instances, ")
        assert page.rows[:3] == [
            ["instance", "KV slots in use", "of", ""],
            ["0", "0", "256", ""],
            ["1", "0", "256", ""],
        ]
        assert ["decode", "1", "3"] in page.rows
        assert len(page.images) == 1
        llm.close()
        assert repr(llm) == "<LLM: closed>"
        assert Page(llm._repr_html_()).images


def test_without_matplotlib_the_tables_stand_alone() -> None:
    script = (
        "import importlib.util as util, sys\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'matplotlib' else find(name, *rest)\n"
        "sys.modules['matplotlib'] = None\n"
        "from loongjax.api.outputs import RequestOutput\n"
        "from tests.api.test_showing import STORY, told\n"
        "html = RequestOutput(prompt_token_ids=(), outputs=(told(records=STORY),))._repr_html_()\n"
        "assert '<table>' in html and '<img' not in html, html\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
