from __future__ import annotations

import gzip
import json

import pytest

from loongjax.errors import RequestError
from loongjax.simulator import read_trace, write_trace
from tests.simulator.rig import job

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:46.1805900,396,109
2023-11-16 18:15:50.9951690,879,0
2023-11-16 18:15:51.6805900,91,16
"""
MOONCAKE = [
    {"timestamp": 500, "input_length": 6_758, "output_length": 500, "hash_ids": [0, 1]},
    {"timestamp": 2_000, "input_length": 10, "output_length": 3, "hash_ids": [0]},
]


def test_azure(tmp_path):
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    jobs = read_trace(path)
    assert [(one.prompt, one.output) for one in jobs] == [(396, 109), (374, 44), (91, 16)]
    assert [one.arrival for one in jobs] == pytest.approx([0.0, 0.5, 5.5], abs=1e-6)
    assert {one.limit for one in jobs} == {109}
    assert len({one.id for one in jobs}) == 3


def test_mooncake_gzipped(tmp_path):
    path = tmp_path / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, MOONCAKE)).encode()))
    jobs = read_trace(path, limit=100)
    assert [(one.prompt, one.output, one.limit) for one in jobs] == [
        (6_758, 500, 500),
        (10, 3, 100),
    ]
    assert [one.arrival for one in jobs] == [0.0, 1.5]


def test_our_own_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "trace.jsonl"
    jobs = [job("a"), job("b", arrival=1.25, cancel_after=2.0, limit=77)]
    write_trace(path, jobs)
    assert read_trace(path) == jobs
    assert read_trace(path, count=1) == jobs[:1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (AZURE + "yesterday,1,1\n", "line 6 of the trace"),
        (AZURE + "2023-11-16 18:15:46.1,1\n", "line 6 of the trace"),
        ('{"timestamp": 1, "input_length": 5}\n', "line 1.*none of the known formats"),
        ('{"arrival_s": 1, "prompt_tokens": 5, "output_tokens": "many"}', "line 1"),
        ("[1, 2]\n", "line 1"),
        ("hello", "line 1"),
        ("", "holds no request"),
        (AZURE.splitlines()[0], "holds no request"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, content, message):
    path = tmp_path / "trace"
    path.write_text(content)
    with pytest.raises(RequestError, match=message):
        read_trace(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(RequestError, match="cannot read"):
        read_trace(tmp_path / "none.csv")
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(b"TIMESTAMP,")[:-4])
    with pytest.raises(RequestError, match="cannot read"):
        read_trace(broken)
