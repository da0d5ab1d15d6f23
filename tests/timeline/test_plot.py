"""The picture holds what the records say, looks the same every time, and needs no display."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from loongjax.engine import StepRecord
from loongjax.timeline import Timeline
from loongjax.timeline.style import FAILED, PALETTE, group_colours
from tests.timeline.story import SLOTS, decodes, prefill, steps, timeline

PNG = b"\x89PNG"


def boxes(figure: Figure) -> dict[str, PolyCollection]:
    """The boxes of the upper panel, by what they are."""
    return {
        str(part.get_label()): part
        for part in figure.axes[0].collections
        if isinstance(part, PolyCollection) and " on " in str(part.get_label())
    }


def fills(figure: Figure) -> dict[str, str]:
    return {label: to_hex(part.get_facecolor()[0]) for label, part in boxes(figure).items()}


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def extent(part: PolyCollection) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of the first box."""
    x, y = part.get_paths()[0].vertices.T
    return x.min(), x.max(), y.min(), y.max()


def test_there_is_a_box_for_each_run_and_piece_of_its_group() -> None:
    found = {label: len(part.get_paths()) for label, part in boxes(timeline().plot()).items()}
    assert found == {
        "prefill on (0, 1, 2, 3)": 1,
        "decode on (0, 1)": 1,
        "prefill on (2,)": 1,
        "decode on (2,)": 1,
        "failed prefill on (3,)": 1,
        "migrate on (0, 1)": 1,
        "decode on (0,)": 1,
        "prefill on (1, 3)": 2,
        "decode on (0, 2)": 2,
        "decode on (1, 3)": 2,
    }


def test_boxes_cover_their_time_and_rows() -> None:
    found = boxes(timeline().plot())
    assert extent(found["decode on (0, 1)"]) == pytest.approx((0.82, 1.418, -0.4, 1.4))
    assert extent(found["prefill on (1, 3)"]) == pytest.approx((1.58, 1.9, 0.6, 1.4))


def test_pieces_that_lie_apart_are_joined() -> None:
    joins = {
        part.get_label(): [segment[:, 1].tolist() for segment in part.get_segments()]
        for part in timeline().plot().axes[0].collections
        if isinstance(part, LineCollection)
    }
    assert joins["join of (0, 2)"] == [[0.4, 1.6]]
    assert "join of (0, 1)" not in joins


def test_colour_says_which_group_and_filling_which_kind() -> None:
    found = boxes(timeline().plot())
    colour = dict(zip(timeline().groups, PALETTE, strict=False))
    for label, part in found.items():
        group = tuple(int(i) for i in label.split("(")[1].strip(",)").split(","))
        edge = to_hex(part.get_edgecolor()[0])
        assert edge == (FAILED if label.startswith("failed") else colour[group])
    assert fills(timeline().plot())["prefill on (2,)"] == colour[2,]
    assert {(label.split(" on ")[0], part.get_hatch()) for label, part in found.items()} == {
        ("prefill", None),
        ("failed prefill", None),
        ("decode", "///"),
        ("migrate", "xxx"),
    }


def test_colours_stay_when_looking_closer_and_when_more_happens() -> None:
    whole = fills(timeline().plot())
    part = fills(timeline().between(1.5, 2.0).plot())
    assert set(part) < set(whole)
    assert part.items() <= whole.items()
    longer = [*steps(), *decodes(90, 3, (0, 3), 2.5, 0.1, "more")]
    assert whole.items() <= fills(Timeline.from_steps(longer).plot()).items()


def test_many_groups_have_colours_of_their_own() -> None:
    assert len(set(group_colours([(i,) for i in range(60)]).values())) == 60


def test_boxes_say_what_they_have_room_for() -> None:
    found = words(timeline().plot().axes[0])
    assert {
        "prefill, degree 4\n1,600 tokens of long",
        "keeps 900 KV",
        "keeps 700 KV",
        "decode, degree 2\n30 steps of long",
        "prefill failed\ndegree 1\n500 tokens",
        "migrate\ndegree 2",
    } <= set(found)
    long, short = (
        Timeline.from_steps([prefill(0, (0,), 0.0, end, "a", kept={0: 1}), *rest])
        for end, rest in ((1.0, []), (0.001, decodes(1, 4, (0,), 1.0, 1.0, "a")))
    )
    assert "prefill, degree 1\n1 token of a" in words(long.plot().axes[0])
    assert not [text for text in words(short.plot().axes[0]) if "prefill" in text]


def test_words_stay_in_the_part_that_is_shown() -> None:
    axes = timeline().between(0.5, 1.0).plot().axes[0]
    (label,) = (text for text in axes.texts if text.get_text().startswith("prefill, degree 4"))
    assert 0.5 < label.get_position()[0] < 0.8


def test_masters_have_dots() -> None:
    (dots,) = (line for line in timeline().plot().axes[0].lines if line.get_label() == "masters")
    rows = Counter(round(y + 0.25) for y in dots.get_ydata())
    assert rows == {0: 2, 2: 2, 3: 1}


def test_arrivals_are_marked() -> None:
    (marks,) = (line for line in timeline().plot().axes[0].lines if line.get_label() == "arrivals")
    assert marks.get_xdata() == pytest.approx([0.0, 0.3, 0.88, 1.2])


def test_pool_is_as_full_as_the_samples_say() -> None:
    _, pool = timeline().plot().axes
    areas = {part.get_label(): part for part in pool.collections}
    *_, top, bottom = extent(areas["KV of instance 0"])
    assert bottom - top == pytest.approx(0.8 * 1630 / SLOTS)
    assert [text for text in words(pool) if "peak" in text] == [
        "peak 80%",
        "peak 34%",
        "peak 15%",
        "peak 24%",
    ]
    assert "2,048 slots" in pool.get_title(loc="left")


def test_unknown_pool_is_not_drawn() -> None:
    assert len(Timeline.from_steps(steps()).plot().axes) == 1


def test_legend_explains_what_there_is_and_no_more() -> None:
    def legend(found: Timeline) -> list[str]:
        box = found.plot().axes[0].get_legend()
        return [] if box is None else [text.get_text().split(":")[0] for text in box.get_texts()]

    assert legend(timeline()) == [
        "prefill",
        "decode",
        "migrate",
        "failed",
        "master of its rows",
        "a request arrives",
    ]
    assert legend(Timeline.from_steps([prefill(0, (0,), 0, 1, "a", kept={0: 1})])) == ["prefill"]
    assert legend(Timeline.from_steps([])) == []


def test_nothing_and_next_to_nothing_can_be_drawn(tmp_path) -> None:
    instant = prefill(0, (1,), 0.0, 0.0, "a", kept={1: 1})
    for found in (
        Timeline.from_steps([]),
        Timeline.from_steps([], instances=4, pool_slots=16),
        Timeline.from_steps([instant]),
        timeline().between(50.0),
    ):
        figure = found.plot(tmp_path / "nothing.png")
        assert sum(len(part.get_paths()) for part in boxes(figure).values()) <= 1


def test_names_of_requests_are_drawn_as_they_are(tmp_path) -> None:
    odd: StepRecord = replace(steps()[0], requests=(r"a$\frac{$_{",))
    figure = Timeline.from_steps([odd]).plot(tmp_path / "odd.png")
    assert any(r"a$\frac{$_{" in text for text in words(figure.axes[0]))


def test_it_is_saved_and_shown(tmp_path) -> None:
    figure = timeline().plot(tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(PNG)
    timeline().plot(str(tmp_path / "steps.svg"))
    assert b"<svg" in (tmp_path / "steps.svg").read_bytes()
    assert figure._repr_png_().startswith(PNG)
    shown = timeline()._repr_png_()
    assert shown is not None
    assert shown.startswith(PNG)


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_neither_pyplot_nor_jax_is_touched() -> None:
    script = (
        "import sys\n"
        "from tests.timeline.story import timeline\n"
        "assert 'matplotlib' not in sys.modules\n"
        "timeline()._repr_png_()\n"
        "print([name for name in ('matplotlib.pyplot', 'jax') if name in sys.modules])\n"
    )
    assert run(script) == "[]"


def test_without_matplotlib_the_error_names_the_extra_and_text_is_left() -> None:
    script = (
        "import sys\n"
        "from loongjax.errors import UserError\n"
        "from tests.timeline.story import timeline\n"
        "sys.modules['matplotlib'] = None\n"
        "assert timeline()._repr_png_() is None\n"
        "try: timeline().plot()\n"
        "except UserError as error: print(error)\n"
    )
    assert "pip install 'loongjax[notebook]'" in run(script)
