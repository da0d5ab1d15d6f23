"""`loongjax generate`: what it prints, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from loongjax.cli.main import main

MODEL = ["--model", "random:tiny", "--max-model-len", "512", "--pool-slots", "512"]
FIELDS = {
    "text",
    "token_ids",
    "prompt_tokens",
    "completion_tokens",
    "finish_reason",
    "steps",
    "programs",
    "ttft_s",
    "decode_tokens_per_s",
    "pool",
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder of compiled programs for all tests of this module."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(programs, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(programs))


@pytest.fixture
def ids_file(tmp_path):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(list(range(1, 101))))
    return str(path)


def generate(*arguments: str) -> int:
    return main(["generate", *arguments])


def test_json_is_the_last_line_and_complete(capsys, ids_file):
    code = generate(
        *(*MODEL, "--instances", "4", "--degrees", "2,4", "--token-ids-file", ids_file),
        *("--max-tokens", "5", "--ignore-eos", "--json"),
    )
    printed = capsys.readouterr().out.strip().splitlines()
    report = json.loads(printed[-1])
    assert code == 0
    assert len(printed) == 1
    assert set(report) == FIELDS
    assert report["prompt_tokens"] == 100
    assert report["completion_tokens"] == len(report["token_ids"]) == 5
    assert report["finish_reason"] == "length"
    assert report["pool"] == {"slots": 512, "used_after": 0}
    assert [step["kind"] for step in report["steps"]] == ["prefill", "decode"]
    assert sum(step["count"] for step in report["steps"]) == 5
    assert all(step["degree"] == len(step["instances"]) for step in report["steps"])
    assert {step["degree"] for step in report["steps"]} <= {2, 4}


def test_second_run_compiles_nothing_and_says_the_same(capsys, ids_file):
    command = [*MODEL, "--token-ids-file", ids_file, "--max-tokens", "4", "--json"]
    reports = []
    for _ in range(2):
        assert generate(*command) == 0
        reports.append(json.loads(capsys.readouterr().out))
    first, second = reports
    assert second["programs"]["compiled"] == 0
    assert second["programs"]["loaded"] == 2
    assert first["token_ids"] == second["token_ids"]


def test_degrees_do_not_change_the_answer(capsys, ids_file):
    answers = []
    for degrees in ("1", "2", "4"):
        command = [*MODEL, "--instances", "4", "--degrees", degrees, "--block-size", "1"]
        assert generate(*command, "--token-ids-file", ids_file, "--max-tokens", "6", "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert {step["degree"] for step in report["steps"]} == {int(degrees)}
        answers.append(report["token_ids"])
    assert answers[0] == answers[1] == answers[2]


def test_answers_of_a_prompt_and_what_ends_them(capsys):
    drawn = ["--prompt", "abc", "--max-tokens", "6", "--temperature", "1", "--seed", "3"]
    assert generate(*MODEL, *drawn, "--n", "2", "--logprobs", "1", "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    first, second = report["outputs"]
    assert first["token_ids"] == report["token_ids"] != second["token_ids"]
    assert report["completion_tokens"] == 12
    assert [each["token"] for each in second["logprobs"]] == second["token_ids"]
    assert all(len(each["top"]) == 1 for each in second["logprobs"])

    stop = first["text"][2:]
    assert generate(*MODEL, *drawn, "--stop", stop, "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["text"], report["finish_reason"]) == (first["text"][:2], "stop")


def test_text_for_people(capsys):
    assert generate(*MODEL, "--prompt", "abc", "--max-tokens", "3") == 0
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert "3 prompt tokens, 3 generated (length)" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "prompt"),
        (["--prompt", "a" * 600], "600"),
        (["--prompt", "abc", "--max-tokens", "510"], "512"),
        (["--prompt", "abc", "--max-tokens", "0"], "max_tokens must be at least 1, not 0"),
        (["--prompt", "abc", "--temperature", "-1"], "temperature"),
        (["--prompt", "abc", "--seed", "-5"], "seed"),
        (["--prompt", "abc", "--top-p", "2"], "top_p must be in (0, 1], not 2"),
        (["--prompt", "abc", "--n", "0"], "n must be in [1, 128], not 0"),
        (["--prompt", "abc", "--instances", "2", "--degrees", "3"], "3"),
        (["--prompt", "abc", "--instances", "0"], "instances"),
        (["--prompt", "abc", "--instances", "900"], "900"),
        (["--prompt", "abc", "--block-size", "0"], "block_size"),
        (["--prompt", "abc", "--tensor-parallel", "3"], "3"),
        (["--prompt", "abc", "--pool-slots", "0"], "pool-slots must be at least 1, not 0"),
        (["--prompt", "a" * 100, "--pool-slots", "64", "--max-tokens", "9"], "64"),
        (["--prompt", "abc", "--max-chunk-tokens", "0"], "max-chunk-tokens must be at least 1"),
        (["--prompt", "abc", "--policy", "magic"], "no policy is called 'magic'"),
        (["--prompt", "abc", "--policy", "elastic:chunk_s=0"], "chunk_s must be positive, got 0"),
        (["--prompt", "abc", "--cost-model", "/no/sib.json"], "cannot read the cost model /no/sib"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
        (["--prompt", "abc", "--chat"], "chat template"),
        (["--prompt", "abc", "--model", "random:nothing"], "no random model is called 'nothing'"),
        (["--prompt", "abc", "--model", "./no/such/folder"], "no/such/folder"),
    ],
)
def test_a_users_mistake_exits_2_with_one_line(capsys, arguments, message):
    assert generate(*MODEL, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if line.startswith("loongjax: ")]
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize("content", ["[1, 2", '{"a": 1}', "[1, 2.5]", '["x"]', "[1, 99999]", "[]"])
def test_bad_token_id_files(capsys, tmp_path, content):
    path = tmp_path / "ids.json"
    path.write_text(content)
    assert generate(*MODEL, "--token-ids-file", str(path)) == 2
    assert "loongjax: " in capsys.readouterr().err


def test_help_teaches():
    done = subprocess.run(
        [sys.executable, "-m", "loongjax.cli.main", "generate", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for word in ("--degrees", "--pool-slots", "examples:", "elastic instances"):
        assert word in done.stdout
