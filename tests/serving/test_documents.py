"""Every flag and every error of the server stands in docs/operations.md."""

from __future__ import annotations

import argparse
import re

import pytest

from loongjax.cli import bench_chaos, bench_serve, serve
from serving import errors
from tests.serving.documents import section


@pytest.mark.parametrize(
    ("module", "name"),
    [(serve, "serve"), (bench_serve, "bench serve"), (bench_chaos, "bench chaos")],
)
def test_flags(module, name):
    commands = argparse.ArgumentParser().add_subparsers()
    module.add_command(commands)
    parser = commands.choices[name.split()[-1]]
    told = section(name) + section("generate")  # it shares the engine's options
    for flag in set(re.findall(r"--[a-z][a-z-]*[a-z]", parser.format_help())) - {"--help"}:
        assert f"`{flag}`" in told, flag


def test_errors():
    told = section("serve")
    for kind, code, http in errors._CODES:
        if kind.__module__ == errors.__name__:
            assert f"`{kind.__name__}`" in told
        (row,) = [line for line in told.splitlines() if line.startswith(f"| {code.name} |")]
        assert str(http) in row
