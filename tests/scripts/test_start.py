"""Scripts start as a user starts them: by their path, from anywhere, with what is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import user_environment

SCRIPTS = sorted(
    path
    for path in (Path(__file__).parents[2] / "scripts").glob("*.py")
    if any(word in path.read_text(encoding="utf-8") for word in ("ArgumentParser", "sys.argv"))
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_says_how_it_is_used(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, script, "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=user_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
