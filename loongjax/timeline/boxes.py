"""The boxes of the picture: one for each run of steps, and what it says of itself.

Boxes of one kind and group are one collection, so that a hundred thousand are drawn in
seconds; only those with room for words get any.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.patheffects import withStroke

from loongjax.engine.messages import StepKind
from loongjax.plan import Group
from loongjax.timeline.runs import Run, plural, row_pieces, runs_of, spans_of
from loongjax.timeline.style import (
    FAILED,
    FONT_PT,
    INSET_IN,
    MASTER,
    STYLES,
    Scale,
    group_colours,
    mix,
)
from loongjax.timeline.timeline import Timeline

_CHAR_IN = 0.56 * FONT_PT / 72
_LINE_IN = 1.35 * FONT_PT / 72
_DOT_IN = 0.08
_IDLE_SHARE = 1 / 50
"""A pause of more than this share of the time axis ends a run."""


def draw_boxes(axes: Axes, timeline: Timeline, scale: Scale) -> None:
    """All steps of a timeline, into rows numbered from 0; row 0 is instance 0."""
    begin, end = timeline.bounds
    colours = group_colours(timeline.groups)
    runs = runs_of(spans_of(timeline.steps, timeline.zero), (end - begin) * _IDLE_SHARE)
    alike: dict[tuple[StepKind, Group, bool], list[Run]] = defaultdict(list)
    for run in runs:
        alike[run.kind, run.group, run.failed].append(run)
    for (kind, group, failed), some in alike.items():
        _draw_alike(axes, kind, group, failed, some, colours[group])
        if len(row_pieces(group)) > 1:
            _draw_joins(axes, group, some, colours[group], INSET_IN / scale.second)
    for run in runs:
        _draw_words(axes, run, colours[run.group], scale, timeline.bounds)
    _draw_masters(axes, runs, scale)


def _draw_alike(
    axes: Axes, kind: StepKind, group: Group, failed: bool, runs: Sequence[Run], colour: str
) -> None:
    """One box for each run and piece of the group."""
    style = STYLES[kind]
    axes.add_collection(
        PolyCollection(
            [
                [(run.begin, top), (run.end, top), (run.end, bottom), (run.begin, bottom)]
                for run in runs
                for top, bottom in _box_edges(group)
            ],
            facecolor=mix(colour, style.tint),
            edgecolor=FAILED if failed else colour,
            linewidth=2.0 if failed else 0.8,
            hatch=style.hatch,
            label=f"{'failed ' if failed else ''}{kind} on {group}",
            zorder=2,
        )
    )


def _draw_joins(axes: Axes, group: Group, runs: Sequence[Run], colour: str, inset_s: float) -> None:
    """A line from piece to piece of a group whose rows lie apart."""
    axes.add_collection(
        LineCollection(
            [
                [(at, above[1]), (at, below[0])]
                for at in (min(run.begin + inset_s, (run.begin + run.end) / 2) for run in runs)
                for above, below in pairwise(_box_edges(group))
            ],
            color=colour,
            linewidth=2.0,
            label=f"join of {group}",
            path_effects=[withStroke(linewidth=4.0, foreground="white")],
            zorder=4,
        )
    )


def _draw_words(
    axes: Axes, run: Run, colour: str, scale: Scale, bounds: tuple[float, float]
) -> None:
    """What a box says of itself, if it has room; a prefill says where it keeps the KV too."""
    begin, end = max(run.begin, bounds[0]), min(run.end, bounds[1])
    width = (end - begin) * scale.second
    if width < 4 * _CHAR_IN:
        return
    room = width - 2 * _DOT_IN if run.masters else width
    for first, last in row_pieces(run.group):
        height = (last - first + 0.8) * scale.row
        words = next((text for text in _captions(run) if _fits(text, room, height)), "")
        if words:
            _write(axes, run, (begin + end) / 2, (first + last) / 2, words, colour)
        if run.kind == "prefill" and not run.failed:
            beside = (width - _width_in(words)) / 2
            _draw_kept(axes, run, range(first, last + 1), end - INSET_IN / scale.second, beside)


def _write(axes: Axes, run: Run, x: float, y: float, words: str, colour: str) -> None:
    style = STYLES[run.kind]
    ground = mix(colour, style.tint)
    axes.text(
        x,
        y,
        words,
        ha="center",
        va="center",
        fontsize=FONT_PT,
        color=style.ink,
        linespacing=1.15,
        bbox={"facecolor": ground, "edgecolor": "none", "boxstyle": "round,pad=0.15"},
        parse_math=False,  # names of requests may hold anything
        clip_on=True,
        zorder=5,
    )


def _draw_kept(axes: Axes, run: Run, rows: range, right: float, room: float) -> None:
    """How much KV a prefill left on which instance, up to `right` if there is room [inches]."""
    for instance, tokens in run.spans[0].step.kept:
        note = f"keeps {tokens:,} KV"
        if instance in rows and _width_in(note) <= room:
            axes.text(
                right,
                instance,
                note,
                ha="right",
                va="center",
                fontsize=FONT_PT,
                color=STYLES[run.kind].ink,
                clip_on=True,
                zorder=5,
            )


def _captions(run: Run) -> Iterable[str]:
    """What a box may say, from much to little."""
    names = {name for span in run.spans for name in span.step.requests}
    who = next(iter(names)) if len(names) == 1 else f"{len(names):,} requests"
    kind, degree = run.kind + " failed" * run.failed, f"degree {len(run.group)}"
    number, unit = (len(run.spans), "step") if run.kind == "decode" else (run.tokens, "token")
    size = plural(number, unit)
    yield f"{kind}, {degree}\n{size} of {who}"
    yield f"{kind}, {degree}\n{size}"
    yield f"{kind}\n{degree}\n{size}"
    yield f"{kind}, {degree}"
    yield f"{kind}\n{degree}"
    yield degree


def _fits(text: str, width: float, height: float) -> bool:
    lines = text.count("\n") + 1
    return lines * _LINE_IN <= height and _width_in(text) <= width


def _width_in(text: str) -> float:
    """About how wide a text is [inches], with a margin."""
    return (max(map(len, text.split("\n"))) + 1.2) * _CHAR_IN


def _draw_masters(axes: Axes, runs: Sequence[Run], scale: Scale) -> None:
    """A dot in each row that was master in a run, where the run is wide enough for it."""
    inset = _DOT_IN / scale.second
    dots = [
        (run.begin + inset, master)
        for run in runs
        if run.end - run.begin > 2 * inset
        for master in sorted(run.masters)
    ]
    axes.plot(
        [x for x, _ in dots],
        [row - 0.25 for _, row in dots],
        **MASTER,
        zorder=6,
        label="masters",
    )


def _box_edges(group: Group) -> list[tuple[float, float]]:
    return [(first - 0.4, last + 0.4) for first, last in row_pieces(group)]
