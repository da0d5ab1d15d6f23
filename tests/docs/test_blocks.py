"""Every code block of the README and of docs/ runs, or is checked as far as it can be.

What is not run stands in `NOT_RUN`, with the reason; a block or command that is in neither table
fails, and so does a row that no page needs any more.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from loongjax import LLM
from loongjax.cli.main import build_parser
from tests.docs.blocks import ROOT, Block, all_blocks, blocks_of, commands_of, shape_of
from tests.environment import user_environment

BLOCKS = all_blocks()
COMMANDS = [(block, words) for block in BLOCKS for words in commands_of(block)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHAPES = [block for block in BLOCKS if shape_of(block)]

# By how they begin.
RUN = (
    "loongjax generate --help",
    "loongjax doctor",
    "loongjax bench scheduler --case 1000,256,16",
    "from loongjax import LLM, SamplingParams",
    '{"text"',
    '{"line"',
    '{"lines"',
    '{"policy", "workload"',
    '{"versions"',
)
NOT_RUN = {
    "make": "a virtual environment of its own, or all tests; targets are looked up",
    "pip": "installs; files and extras are looked up",
    "curl": "wants a server at a fixed port; tests/serving/test_http.py sends such requests",
    "from serving.client": "wants a server at a fixed port; it is compiled and imported",
    "loongjax serve": "never ends; parsed",
    "loongjax convert": "writes a model; parsed",
    "import grpc": "wants a server at a fixed port; it is compiled and imported",
    "from openai": "wants a server at a fixed port; it is compiled and imported",
    "smg": "never ends; tests/serving/test_gateway.py starts it with these options",
    "guidellm": "a package that is not here, and wants a server",
    "grpc.health.v1.Health": "what a transcript's client printed",
    "['demo']": "what a transcript's client printed",
    '{"id"': "what a transcript's client printed",
    "loongjax generate --model demo": "the demo runs as Python, and below on random:tiny; parsed",
    "loongjax simulate --hardware": "ten seconds and more, or a trace that is not here; parsed",
    "loongjax simulate --workload sharegpt": "a minute; parsed",
    "loongjax simulate --workload zipf": "minutes; parsed",
    "loongjax profile": "minutes; parsed",
    "loongjax bench engine": "26 minutes; parsed",
    "loongjax bench policies": "minutes; tests/bench/test_policies.py runs a shorter one; parsed",
    "loongjax bench serve": "a minute; tests/serving/test_bench.py runs a shorter one; parsed",
    "loongjax bench chaos": "a minute; tests/serving/test_bench.py runs a shorter one; parsed",
    '{"instances", "policies"': "what `bench policies` prints; its test looks at it",
    "r22 came at": "what `simulate --explain` prints; tests/cli/test_simulate.py looks at it",
    "loongjax bench offline": "minutes, and tests/bench/test_offline.py runs a shorter one; parsed",
    "loongjax bench scheduler --case 10000": "a minute; parsed",
    "loongjax aot": "compilers of 600 MB; parsed",
    "python scripts/bench_peers.py": "installs some gigabytes; parsed",
    "python scripts/profile_cell.py": "minutes; parsed",
    "python scripts/compile_kernels.py": "compilers of 600 MB; parsed",
    "python scripts/tune_kernels.py": "compilers of 600 MB; parsed",
    "python scripts/reproduce_paper.py": "minutes; parsed",
    "python scripts/evaluate_elastic.py": "minutes; parsed",
    "python scripts/check_fidelity.py": "minutes, and wants a cost model; parsed",
    "python scripts/generate_offline.py": "wants a server; parsed",
    "pytest": "the tests themselves; its path is looked up",
    'LLM("demo"': "compiles for minutes; its arguments are looked up",
    '{"cells"': "what 26 minutes of `bench engine` print",
    '{"dtype", "lines"': "what `bench offline` prints; tests/bench/test_offline.py looks at it",
    '{"policy", "protocol"': "what minutes of `bench serve` print",
    '{"passed"': "what `bench chaos` prints; tests/serving/test_bench.py has a shorter one",
    "instance   0": "a drawing",
    "loongjax.cli, scripts": "a drawing",
    "layers ·": "a formula",
    "constant +": "a formula",
}

pytestmark = pytest.mark.xdist_group("notebooks")


def place(block: Block) -> str:
    return block.place


def wording(case: tuple[Block, list[str]]) -> str:
    return f"{case[0].place}:{' '.join(case[1][:4])}"


def is_run(head: str) -> bool:
    return any(head.startswith(begin) for begin in RUN)


def heads() -> list[str]:
    """How every command begins, and every block without any."""
    alone = [block.head for block in BLOCKS if not commands_of(block)]
    return alone + [" ".join(words) for _, words in COMMANDS]


def run(*words: str | Path, folder: Path, code: int = 0) -> str:
    """What a command of this environment prints. It gets a user's environment, not the tests'."""
    env = user_environment()
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == code, f"{words}: {done.stderr}"
    return done.stdout


def loongjax(*words: str, folder: Path = ROOT, code: int = 0) -> str:
    return run(sys.executable, "-m", "loongjax.cli.main", *words, folder=folder, code=code)


def last_line(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])


# ---- the tables ----------------------------------------------------------------------


def test_everything_is_run_or_there_is_a_reason() -> None:
    known = [*RUN, *NOT_RUN]
    missing = [head for head in heads() if not any(head.startswith(begin) for begin in known)]
    assert not missing
    stale = [begin for begin in known if not any(head.startswith(begin) for head in heads())]
    assert not stale


def test_blocks_are_found() -> None:
    text = (
        "words\n\n    loongjax a \\\n        --b 'c d'  # e\n\nwords\n    no block\n\n"
        '```bash\nmake x\n```\n- item\n\n  ```\n  {"a", "b": {"c"}, "d": [{"e"}]}\n  ```\n'
    )
    first, second, third = blocks_of("page", text)
    assert commands_of(first) == [["loongjax", "a", "--b", "c d"]]
    assert (commands_of(second), second.line, second.place) == ([["make", "x"]], 9, "page:9")
    assert shape_of(third) == {"a", "b", "d"}
    (unknown,) = blocks_of("page", "```bash\nrm -r x\n```\n")
    with pytest.raises(ValueError, match=r"page:1: 'rm -r x' begins with no program"):
        commands_of(unknown)


# ---- Python --------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in PYTHON if is_run(b.head)], ids=place)
def test_python_runs(block: Block, tmp_path: Path) -> None:
    run(sys.executable, "-c", block.text, folder=tmp_path)


@pytest.mark.parametrize("block", [b for b in PYTHON if not is_run(b.head)], ids=place)
def test_other_python_compiles_and_imports(block: Block) -> None:
    tree = compile(block.text, block.place, "exec", ast.PyCF_ONLY_AST)
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    exec(compile(tree, block.place, "exec"), {})


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.head.startswith("LLM(")], ids=place)
def test_arguments_exist(block: Block) -> None:
    call = ast.parse(block.text, mode="eval").body
    assert isinstance(call, ast.Call)
    known = inspect.signature(LLM.__init__).parameters
    assert {keyword.arg for keyword in call.keywords} <= set(known)


# ---- commands ------------------------------------------------------------------------


class Parsed(Exception):
    """A script got as far as its arguments."""


@pytest.mark.parametrize("case", COMMANDS, ids=wording)
def test_a_command_is_one(
    case: tuple[Block, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Every flag exists, every choice is one, and what is named is there."""
    block, (program, *words) = case
    if program == "loongjax":
        check_arguments(words)
    elif program == "python":
        script, *arguments = words
        check_script(script, arguments, monkeypatch)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words)
    elif program == "pip":
        assert words[:2] == ["install", "-c"]
        assert (ROOT / words[2]).exists()
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(re.findall(r"\[(\w+)\]", words[-1])) <= set(extras["optional-dependencies"])
    elif program == "pytest":
        assert (ROOT / words[-1]).exists()
    elif program == "curl":
        assert json.loads(words[-1])["model"] == "demo"
    else:
        raise AssertionError(f"{block.place}: nobody checks {program}")


def check_arguments(words: list[str]) -> None:
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args(words)
    else:
        build_parser().parse_args(words)


def check_script(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = argparse.ArgumentParser.parse_known_args  # also by parse_args, and for a subcommand

    def parse(parser: argparse.ArgumentParser, *given: Any) -> None:
        _, unknown = whole(parser, *given)
        assert not unknown
        raise Parsed

    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    with pytest.raises(Parsed):
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("words", [["generate", "--modell", "demo"], ["simulate", "--rate", "x"]])
def test_a_wrong_command_is_seen(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        check_arguments(words)


@pytest.mark.parametrize(
    "words", [words for _, words in COMMANDS if is_run(" ".join(words))], ids=" ".join
)
def test_a_cheap_command_runs(words: list[str]) -> None:
    assert loongjax(*words[1:])


# ---- what commands print -------------------------------------------------------------


def test_printed_objects_have_the_names_that_are_told(tmp_path: Path) -> None:
    """A name may be there only with some option, so what is told may be more."""
    told = {block.head.split(",")[0].split(":")[0]: shape_of(block) for block in SHAPES}
    told["simulate"] = next(shape_of(b) for b in SHAPES if b.head.startswith('{"policy", "work'))
    tiny = ("--model", "random:tiny", "--pool-slots", "64", "--max-tokens", "2")
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n{"prompt": ""}\n')
    job = ("--input", "in.jsonl", "--output", "out.jsonl", "--json")
    code = 3  # one line has no answer
    summary = loongjax("generate", *tiny, *job, folder=tmp_path, code=code)
    assert set(last_line(summary)) <= told['{"lines"']
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        assert set(json.loads(line)) <= told['{"line"'] | {"error"}
    one = loongjax("generate", *tiny, "--prompt", "hello", "--json", folder=tmp_path)
    assert set(last_line(one)) <= told['{"text"']
    simulated = loongjax("simulate", "--requests", "20", "--rate", "1", "--json", folder=tmp_path)
    assert set(last_line(simulated)) <= told["simulate"]
    doctor = loongjax("doctor", "--model", "random:tiny", "--json", folder=tmp_path)
    assert set(last_line(doctor)) <= told['{"versions"']
