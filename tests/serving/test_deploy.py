"""The container file and the systemd unit start what `loongjax serve` takes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from loongjax.cli.main import build_parser

DEPLOY = Path(__file__).parents[2] / "deploy"


def flags_of(words: list[str]) -> None:
    """Lets the command's own parser read them."""
    options = build_parser().parse_args([*words, "--model", "demo"])
    assert options.log_format == "json"


def test_the_container_starts_the_command():
    text = (DEPLOY / "Containerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.M)
    flags_of(json.loads(entry)[1:])
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M):
        for name in source.split():
            assert (DEPLOY.parent / name).exists(), name


def test_the_unit_starts_the_command():
    text = (DEPLOY / "loongjax.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", text, re.M)
    (options,) = re.findall(r"OPTIONS=(.*)$", text, re.M)
    words = shlex.split(start.replace("$OPTIONS", options))
    flags_of(words[1:])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_systemd_reads_the_unit(tmp_path):
    """It warns of each line that it does not know; that the program is absent here is no matter."""
    unit = tmp_path / "loongjax.service"
    unit.write_text((DEPLOY / "loongjax.service").read_text())
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    lines = [line for line in done.stderr.splitlines() if "loongjax.service" in line]
    assert all("is not executable" in line for line in lines), done.stderr
