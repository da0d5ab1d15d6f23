"""Draws a timeline with matplotlib: two panels over one time axis.

Above, a row for each instance with a box for each run of steps: colour says which group,
filling which kind, and a box covers the rows of its whole group. Below, a lane for each
instance, filled as its KV pool is. Works on `Figure` alone, without pyplot or a display.
"""

from __future__ import annotations

import io
from collections import defaultdict

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from loongjax.engine.messages import PoolSample
from loongjax.plan import InstanceId
from loongjax.timeline.boxes import draw_boxes
from loongjax.timeline.style import (
    ARRIVAL,
    EDGE,
    FAILED,
    FONT_PT,
    GREY,
    GRID,
    INK,
    LANE,
    MASTER,
    POOL,
    STYLES,
    Scale,
    mix,
)
from loongjax.timeline.timeline import Timeline

_WIDTH_IN = 12.0
_LEFT_IN, _RIGHT_IN, _TOP_IN, _BOTTOM_IN, _GAP_IN = 0.9, 0.75, 0.9, 0.55, 0.4
_DPI = 120


class _Picture(Figure):
    """A figure that notebooks show by itself, whichever backend pyplot has, if any."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def draw(timeline: Timeline) -> Figure:
    """A figure of the timeline; see the module."""
    rows = max(timeline.instances, 1)
    row_in = min(0.62, max(0.2, 8.0 / rows))
    strip_in = 0.55 * row_in
    pool_in = strip_in * rows + _GAP_IN if timeline.pool else 0.0
    height = _TOP_IN + rows * row_in + pool_in + _BOTTOM_IN
    figure = _Picture(figsize=(_WIDTH_IN, height), dpi=_DPI, facecolor="white")
    begin, end = timeline.bounds
    length = (end - begin) or 1.0
    wide = _WIDTH_IN - _LEFT_IN - _RIGHT_IN

    def panel(bottom: float, tall: float) -> Axes:
        place = (_LEFT_IN / _WIDTH_IN, bottom / height, wide / _WIDTH_IN, tall / height)
        axes = figure.add_axes(place, facecolor="white")
        axes.set_xlim(begin - 0.005 * length, begin + 1.005 * length)
        return axes

    above = panel(_BOTTOM_IN + pool_in, rows * row_in)
    _draw_head(above, timeline)
    _draw_steps(above, timeline, Scale(second=wide / (1.01 * length), row=row_in))
    if timeline.pool:
        above.tick_params(labelbottom=False)
        _draw_pool(panel(_BOTTOM_IN, rows * strip_in), timeline)
    figure.axes[-1].set_xlabel("seconds since the first step", color=INK)
    return figure


def _draw_head(axes: Axes, timeline: Timeline) -> None:
    """Title, a line of numbers, and the legend of what there is to see, one below the other."""
    axes.set_title("What ran where", loc="left", color=INK, fontweight="bold", pad=42)
    axes.annotate(
        f"{timeline.headline()}; each group of instances has its colour",
        (0, 1),
        xytext=(0, 27),
        xycoords="axes fraction",
        textcoords="offset points",
        color=INK,
        fontsize=FONT_PT + 1,
    )
    kinds = {step.kind for step in timeline.steps}
    handles: list[Artist] = [
        Patch(
            facecolor=mix(GREY, style.tint),
            edgecolor=GREY,
            hatch=style.hatch,
            label=style.legend,
        )
        for kind, style in STYLES.items()
        if kind in kinds
    ]
    if any(step.error for step in timeline.steps):
        handles.append(Patch(facecolor="white", edgecolor=FAILED, linewidth=2, label="failed"))
    if "decode" in kinds:
        handles.append(Line2D([], [], **MASTER, label="master of its rows"))
    if timeline.requests:
        handles.append(Line2D([], [], **ARRIVAL, label="a request arrives"))
    if handles:
        axes.legend(
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(-0.008, 1.0),
            ncols=len(handles),
            frameon=False,
            fontsize=FONT_PT + 0.5,
            labelcolor=INK,
            columnspacing=1.6,
        )


def _draw_steps(axes: Axes, timeline: Timeline, scale: Scale) -> None:
    rows = timeline.instances
    _draw_lanes(axes, timeline)
    draw_boxes(axes, timeline, scale)
    for row in range(1, rows):
        axes.axhline(row - 0.5, color="white", linewidth=0.8, alpha=0.7, zorder=3)
    begin, _ = timeline.bounds
    arrivals = [max(begin, request.arrival - timeline.zero) for request in timeline.requests]
    axes.plot(arrivals, [-0.5] * len(arrivals), **ARRIVAL, clip_on=False, label="arrivals")
    axes.set_ylim(rows - 0.4, -0.6)


def _draw_pool(axes: Axes, timeline: Timeline) -> None:
    by_instance: dict[InstanceId, list[PoolSample]] = defaultdict(list)
    for sample in timeline.pool:
        by_instance[sample.instance].append(sample)
    full = timeline.pool_slots or max(sample.used for sample in timeline.pool) or 1
    begin, end = timeline.bounds
    _draw_lanes(axes, timeline)
    for row in range(timeline.instances):
        times = [begin, *(sample.time - timeline.zero for sample in by_instance[row]), end]
        used = [0, *(sample.used for sample in by_instance[row])]
        used.append(used[-1])
        axes.fill_between(
            times,
            row + 0.4,
            [row + 0.4 - 0.8 * slots / full for slots in used],
            step="post",
            color=POOL,
            linewidth=0,
            zorder=2,
            label=f"KV of instance {row}",
        )
        axes.annotate(
            f"peak {max(used) / full:.0%}",
            (1, row),
            xytext=(4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=FONT_PT,
            color=INK,
        )
    axes.set_ylim(timeline.instances - 0.5, -0.5)
    axes.set_title(
        f"KV pool in use; a full lane is {full:,} slots",
        loc="left",
        color=INK,
        fontsize=FONT_PT + 1,
    )


def _draw_lanes(axes: Axes, timeline: Timeline) -> None:
    """Axes with a named, empty lane for each instance: what stays of it was idle."""
    rows = range(timeline.instances)
    axes.set_yticks(rows, [f"instance {row}" for row in rows])
    axes.tick_params(axis="y", length=0, labelsize=FONT_PT + 1, labelcolor=INK)
    axes.tick_params(axis="x", labelsize=FONT_PT + 1, labelcolor=INK, color=EDGE)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(EDGE)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for row in rows:
        axes.fill_between(timeline.bounds, row - 0.4, row + 0.4, color=LANE, linewidth=0)
