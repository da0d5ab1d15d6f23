"""Ten seconds of what `scripts/soak.py` does for minutes."""

from __future__ import annotations

from scripts.soak import soak


def test_random_regrouping_neither_hangs_nor_leaks_nor_says_something_else(tmp_path):
    picture = tmp_path / "end.png"
    report = soak(seconds=10, instances=2, program_dir=tmp_path / "programs", picture=picture)
    assert report.passed, report
    assert report.requests["length"] > 5
    assert report.requests["abort"]
    kinds = {name.split("-")[0] for name in report.steps}
    assert kinds == {"prefill", "decode", "migrate"}
    assert {name.split("-")[1] for name in report.steps} == {"1", "2"}
    assert report.groups == 3
    assert min(report.scale_ups, report.scale_downs, report.moved_tokens) > 0
    assert report.side_by_side > 10
    assert picture.read_bytes().startswith(b"\x89PNG")
