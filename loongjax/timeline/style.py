"""Colours, fillings and sizes of the picture; shared by the modules that draw it."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.colors import to_rgb

from loongjax.engine.messages import StepKind
from loongjax.plan import Group

PALETTE = (
    "#3b6fb6", "#e08a2c", "#3f9b57", "#8c5fb0", "#2aa6b1",
    "#b5763a", "#c9569a", "#8a9a2e", "#5b6b8c", "#d4a72c",
)  # fmt: skip
FAILED = "#d01c1c"
INK = "#26303c"
GREY = "#666666"
LANE = "#f1f3f6"
GRID = "#e6e9ec"
EDGE = "#b8c0c8"
POOL = "#7f93a8"

FONT_PT = 8.0
INSET_IN = 0.05
"""What marks stay away from the edge of their box."""


class Style(NamedTuple):
    """How a kind of step looks, given its group's colour.

    tint: how much of the colour is in the filling, the rest being white.
    """

    tint: float
    hatch: str | None
    ink: str
    legend: str


STYLES: dict[StepKind, Style] = {
    "prefill": Style(1.0, None, "white", "prefill: reads prompts"),
    "decode": Style(0.25, "///", INK, "decode: a token a step"),
    "migrate": Style(0.0, "xxx", INK, "migrate: moves KV"),
}

MASTER: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 3.5, "color": INK}
ARRIVAL: dict[str, Any] = {"linestyle": "", "marker": 7, "markersize": 5, "color": INK}


class Scale(NamedTuple):
    """Inches that a second and a row have on paper."""

    second: float
    row: float


def group_colours(groups: Sequence[Group]) -> dict[Group, str]:
    """A colour for each group, by its place in `groups` alone."""
    colours = {}
    for place, group in enumerate(groups):
        if place < len(PALETTE):
            colours[group] = PALETTE[place]
        else:  # hues in steps of the golden ratio stay apart for any number of them
            rgb = colorsys.hsv_to_rgb(place * 0.618034 % 1, 0.55, 0.45 + 0.3 * (place % 2))
            colours[group] = "#" + "".join(f"{round(255 * part):02x}" for part in rgb)
    return colours


def mix(colour: str, share: float) -> tuple[float, float, float]:
    """`share` of a colour in white."""
    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return red, green, blue
