"""Mistakes on the command line."""

from __future__ import annotations

import pytest

from loongjax.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("aot",), "the following arguments are required: --target, --model-shape, --out"),
        (
            ("generate", "--model", "random:tiny", "--prompt", "a", "--instances", "abc"),
            "argument --instances: invalid int value: 'abc'",
        ),
        (("bench", "engine", "--far"), "unrecognized arguments: --far"),
        (("simulate", "--rate", "fast"), "invalid float value: 'fast'"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("loongjax")
    assert told in line
    assert line.endswith("--help")


@pytest.mark.parametrize(
    ("planning", "told"),
    [
        (("--policy", "magic"), "no policy is called 'magic'"),
        (("--policy", "loongserve:patience=long"), "patience must be a number"),
        (("--policy", "elastic:chunk_s=0"), "chunk_s must be positive"),
        (("--cost-model", "absent.json"), "absent.json"),
    ],
)
def test_doctor_looks_at_policy_and_cost_model(planning, told, capsys):
    assert main(("doctor", "--model", "random:tiny", *planning)) == 2
    (*_, line) = capsys.readouterr().err.splitlines()
    assert line.startswith("loongjax: ")
    assert told in line
