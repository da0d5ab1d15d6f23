"""Jobs over files: one line out for each line in, whatever happens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.errors import ConfigError, LoongJaxError
from loongjax.offline.native import NativeFormat
from loongjax.offline.output import Output
from loongjax.sampling.params import SamplingParams
from tests.offline.echo import Echo, run_native

ROOT = Path(__file__).parents[2]
KILLS = 20


def write(path: Path, *lines) -> Path:
    path.write_bytes(
        b"".join(
            line if type(line) is bytes else json.dumps(line).encode() + b"\n" for line in lines
        )
    )
    return path


def read(path: Path) -> list[dict]:
    assert path.read_bytes().endswith(b"\n")
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_line(path: Path) -> dict[int, dict]:
    found = read(path)
    assert len({line["line"] for line in found}) == len(found)
    return {line["line"]: line for line in found}


def test_each_line_has_its_answer_and_what_is_wrong_its_error(tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        {"id": "a", "prompt": "one"},
        b"\n",
        b"{nonsense\n",
        {"id": "b", "prompt": "two", "temprature": 0},
        {"id": 7, "messages": [{"role": "user", "content": "three"}], "max_tokens": 3},
        {"prompt": list(b"four"), "temperature": 0.5, "n": 2},
        {"id": "c", "prompt": "refuse"},
        b"[1]\n",
        b'{"prompt": "\xff"}\n',
        {"id": "d", "prompt": "five", "max_tokens": 0},
    )
    echo = Echo()
    report = run_native(source, tmp_path / "out.jsonl", echo, defaults=SamplingParams(max_tokens=9))
    found = by_line(tmp_path / "out.jsonl")
    assert found[1] == {
        "line": 1,
        "id": "a",
        "text": "one",
        "token_ids": [*b"one"],
        "finish_reason": "stop",
        "prompt_tokens": 3,
    }
    assert (found[5]["id"], found[5]["text"]) == (7, "three")
    assert [each["text"] for each in found[6]["outputs"]] == ["four", "four'"]
    errors = {line: told["error"] for line, told in found.items() if "error" in told}
    assert all(set(found[line]) == {"line", "error"} for line in errors)
    assert set(errors) == {3, 4, 7, 8, 9, 10}
    assert "not JSON" in errors[3]
    assert errors[4] == "unknown field 'temprature'; did you mean 'temperature'?"
    assert errors[7] == "refused"
    assert "an object" in errors[8]
    assert "not UTF-8" in errors[9]
    assert errors[10] == "max_tokens must be at least 1, not 0"
    assert [params.max_tokens for _, params in echo.asked] == [9, 3, 9, 9]
    assert (report.lines, report.answered, report.errors, report.failed) == (9, 3, 6, 0)
    assert (report.prompt_tokens, report.generated_tokens) == (12, 16)


def test_a_second_run_does_what_is_left_alone(tmp_path):
    source = write(tmp_path / "in.jsonl", *({"id": i, "prompt": f"p{i}"} for i in range(5)))
    target = tmp_path / "out.jsonl"
    run_native(source, target, Echo())
    lines = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(lines[3] + lines[0] + lines[1][:-1])  # the last one is torn
    echo = Echo()
    report = run_native(source, target, echo)
    assert len(echo.asked) == report.answered == 3
    assert report.resumed == 2
    assert {line["id"] for line in read(target)} == set(range(5))
    again = Echo()
    assert run_native(source, target, again).resumed == 5
    assert not again.asked
    assert run_native(source, target, again, overwrite=True).answered == 5


@settings(max_examples=60)
@given(st.data())
def test_an_output_cut_anywhere_is_completed(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    texts = data.draw(st.lists(st.text(max_size=8), min_size=1, max_size=6))
    source = write(folder / "in.jsonl", *({"id": t, "prompt": "x" + t} for t in texts))
    target = folder / "out.jsonl"
    run_native(source, target, Echo())
    whole = target.read_bytes()
    assert len(read(target)) == len(texts)  # whatever a program takes for the end of a line
    target.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    run_native(source, target, Echo())
    assert sorted(target.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_killed_at_random_moments_it_loses_and_repeats_no_line(tmp_path):
    count = 1_000
    source = write(
        tmp_path / "in.jsonl",
        *({"id": f"n{i}", "prompt": f"{i}-" * (i % 7 * 400)} for i in range(1, count)),
        b"not JSON\n",
    )
    target = tmp_path / "out.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.offline.echo", str(source), str(target), str(KILLS)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    sizes = json.loads(done.stdout)
    assert len({*sizes}) > KILLS // 2, "most runs were killed at work"
    run_native(source, target, Echo())
    found = by_line(target)
    assert set(found) == set(range(1, count + 1))
    assert "error" in found[count]
    for i in range(1, count):
        if i % 7:
            assert (found[i]["id"], found[i]["text"]) == (f"n{i}", f"{i}-" * (i % 7 * 400))


def test_what_failed_is_left_for_the_next_run(tmp_path):
    source = write(tmp_path / "in.jsonl", {"prompt": "fail"}, {"prompt": "fine"})
    report = run_native(source, tmp_path / "out.jsonl", Echo())
    assert (report.answered, report.failed, report.failure) == (1, 1, "a step failed")
    assert set(by_line(tmp_path / "out.jsonl")) == {2}


def test_what_stops_the_job_keeps_what_was_written(tmp_path):
    source = write(tmp_path / "in.jsonl", {"prompt": "fine"}, {"prompt": "die"}, {"prompt": "x"})
    with pytest.raises(LoongJaxError, match="the engine died"):
        run_native(source, tmp_path / "out.jsonl", Echo(), in_flight=1)
    assert set(by_line(tmp_path / "out.jsonl")) == {1}


@pytest.mark.parametrize("in_flight", [1, 3])
def test_so_many_lines_are_in_work_at_once(tmp_path, in_flight):
    source = write(tmp_path / "in.jsonl", *({"prompt": f"p{i}"} for i in range(10)))
    echo = Echo(delay_s=0.001)
    run_native(source, tmp_path / "out.jsonl", echo, in_flight=in_flight)
    assert echo.at_once == in_flight


def test_the_longest_first(tmp_path):
    source = write(tmp_path / "in.jsonl", *({"prompt": "x" * n} for n in (2, 9, 1, 5)))
    echo = Echo()
    run_native(source, tmp_path / "out.jsonl", echo, order="longest")
    assert [len(prompt) for prompt, _ in echo.asked] == [9, 5, 2, 1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"line": 1, "id": "other"}], "its line 1 is called 'other' there and 'a' in"),
        ([{"line": 9, "error": "x"}], "no record at line 9"),
        ([{"id": "a"}], "line 1, is no answer"),
        ([{"line": 1, "error": "x"}, {"line": 1, "error": "x"}], "line 2, is no answer"),
        ([b"my novel\n"], "line 1, is no answer"),
        ([["a"]], "line 1, is no answer"),
    ],
)
def test_a_file_that_is_not_this_jobs_is_left_alone(tmp_path, lines, message):
    source = write(tmp_path / "in.jsonl", {"id": "a", "prompt": "x"})
    target = write(tmp_path / "out.jsonl", *lines)
    before = target.read_bytes()
    with pytest.raises(ConfigError, match=message):
        run_native(source, target, Echo())
    assert target.read_bytes() == before


def test_one_process_writes_at_a_time(tmp_path):
    form = NativeFormat(defaults=SamplingParams())
    with (
        Output(tmp_path / "out.jsonl", form),
        pytest.raises(ConfigError, match="another process writes"),
    ):
        Output(tmp_path / "out.jsonl", form, overwrite=True)


def test_a_full_disk_is_told(tmp_path):
    form = NativeFormat(defaults=SamplingParams())
    with pytest.raises(ConfigError, match="must be a file"):
        Output(Path("/dev/full"), form)
    with pytest.raises(ConfigError, match="cannot be written"):
        Output(tmp_path / "no" / "out.jsonl", form)
