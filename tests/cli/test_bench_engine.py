"""The table of `loongjax bench engine`."""

from __future__ import annotations

from loongjax.cli.bench_engine import cell_table


def test_a_peer_without_a_dtype_has_an_empty_cell():
    same = {"what": "prefill 2048", "ours": 1500.4, "ratio_to_best": 1.5, "floor_ratio": 0.5}
    cells = [
        {**same, "dtype": "float32", "peers": {"a": 1000.0, "b": 2000.0}},
        {**same, "dtype": "bfloat16", "peers": {"a": 1000.0}},
    ]
    head, _, first, second = cell_table(cells).splitlines()
    assert "| a | b |" in head
    assert "| 1,500 | 1,000 | 2,000 | 1.50 | 0.50 |" in first
    assert "| 1,500 | 1,000 |  | 1.50 | 0.50 |" in second
