"""How answers and models look: in a notebook as HTML, elsewhere in one line.

Promises: whatever a model, a prompt or an error says is escaped. Pictures are the timeline's
(`loongjax.timeline`); where matplotlib is not installed the tables stand alone.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import islice
from typing import TYPE_CHECKING

from loongjax.engine import EngineStats
from loongjax.timeline import Timeline

if TYPE_CHECKING:
    from loongjax.api.outputs import CompletionOutput, RequestOutput

_LINE = 60
"""Characters of an answer in one line."""
_ROWS = 50
"""Requests of a batch that a table shows."""


def timeline_of(answers: Iterable[CompletionOutput]) -> Timeline:
    """The steps that worked on any of these answers, each once."""
    return Timeline.from_steps(
        {record.seq: record for answer in answers for record in answer.records}.values()
    )


# ---- in one line ---------------------------------------------------------------------


def answer_line(answer: CompletionOutput) -> str:
    """What an answer says, how it ended and how fast it came."""
    said = "" if answer.text is None else f"{_short(answer.text)!r}, "
    return said + _ending(answer)


def stats_line(stats: EngineStats) -> str:
    """What an engine has, and how busy it is."""
    if not stats.alive:
        return "closed"
    used, slots = (sum(getattr(each, of) for each in stats.instances) for of in ("used", "slots"))
    return (
        f"{_count(len(stats.instances), 'instance')}, {used:,} of {slots:,} KV slots in use, "
        f"{stats.running:,} running, {stats.waiting:,} waiting"
    )


def _ending(answer: CompletionOutput) -> str:
    parts = [answer.finish_reason, _count(len(answer.token_ids), "token")]
    if answer.ttft_s is not None:
        parts.append(f"the first after {_seconds(answer.ttft_s)}")
    if answer.decode_tokens_per_s is not None:
        parts.append(f"then {answer.decode_tokens_per_s:.1f} tokens/s")
    if answer.error is not None:
        parts.append(answer.error)
    return ", ".join(parts)


# ---- as HTML -------------------------------------------------------------------------


def request_html(output: RequestOutput) -> str:
    """The answers to one prompt with the steps of each, and a picture of all of them."""
    prompt = f"<p>Prompt of {_count(len(output.prompt_token_ids), 'token')}</p>"
    answers = "".join(map(answer_html, output.outputs))
    return f"<div>{prompt}{answers}{_picture(output.timeline())}</div>"


def answer_html(answer: CompletionOutput) -> str:
    """One answer and its steps, run-length encoded."""
    said = answer.text if answer.text is not None else " ".join(map(str, answer.token_ids))
    return (
        f'<pre style="white-space: pre-wrap">{escape(said)}</pre>'
        f"<p>{escape(_ending(answer))}</p>"
        + _table(("steps", "kind", "degree", "instances", "tokens", "time"), _run_rows(answer))
    )


def batch_html(outputs: Sequence[RequestOutput]) -> str:
    """A row for each request of a batch, and a picture of what all of them took."""
    shown = outputs[:_ROWS]
    rows = (
        (
            number,
            f"{len(output.prompt_token_ids):,}",
            _short(answer.text or answer.error or ""),
            answer.finish_reason,
            f"{len(answer.token_ids):,}",
            _seconds(answer.ttft_s),
            "" if answer.decode_tokens_per_s is None else f"{answer.decode_tokens_per_s:.1f}",
        )
        for number, output in enumerate(shown)
        for answer in output.outputs
    )
    head = ("", "prompt tokens", "answer", "ended by", "tokens", "first token", "then tokens/s")
    left = len(outputs) - len(shown)
    rest = f"<p>and {_count(left, 'request')} more</p>" if left else ""
    picture = _picture(timeline_of(answer for output in shown for answer in output.outputs))
    return f"<div>{_table(head, rows)}{rest}{picture}</div>"


def served_html(name: str, stats: EngineStats, timeline: Timeline) -> str:
    """What serves, how full and how busy it is, and what it did so far."""
    instances = (
        (
            each.id,
            f"{each.used:,}",
            f"{each.slots:,}",
            "busy" if each.busy else "draining" if each.draining else "",
        )
        for each in stats.instances
    )
    steps = ((each.kind, each.degree, f"{each.count:,}") for each in stats.steps)
    return (
        f"<div><p><b>{escape(name)}</b>: {escape(stats_line(stats))}</p>"
        + _table(("instance", "KV slots in use", "of", ""), instances)
        + _table(("steps", "degree", "count"), steps)
        + _picture(timeline)
        + "</div>"
    )


def _run_rows(answer: CompletionOutput) -> Iterator[tuple[object, ...]]:
    records = iter([record for record in answer.records if record.error is None])
    for run in answer.steps:
        own = tuple(islice(records, run.count))
        yield (
            f"{run.count:,}",
            run.kind,
            run.degree,
            ", ".join(map(str, run.instances)),
            f"{sum(record.tokens for record in own):,}" if own else "",
            _seconds(own[-1].ended - own[0].started if own else None),
        )


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of whatever the cells say; nothing without a row."""
    body = "".join(f"<tr>{_cells('td', row)}</tr>" for row in rows)
    return body and f"<table><tr>{_cells('th', head)}</tr>{body}</table>"


def _cells(tag: str, values: Iterable[object]) -> str:
    return "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)


def _picture(timeline: Timeline) -> str:
    png = timeline._repr_png_() if timeline.steps else None
    if png is None:
        return ""
    data = base64.b64encode(png).decode()
    headline = escape(timeline.headline())
    return f'<img alt="{headline}" style="max-width: 100%" src="data:image/png;base64,{data}">'


def _short(text: str) -> str:
    return text if len(text) <= _LINE else text[: _LINE - 1] + "…"


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.3g} s"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
