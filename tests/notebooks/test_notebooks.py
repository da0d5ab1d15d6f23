"""Every notebook runs from its first cell to its last, and the file shows what that gave.

One group, so that notebooks run one after the other: each starts a kernel that wants all cores.
Kernels get the environment of a user and not that of the tests, so that they share the programs
which the demo keeps in the user's cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from scripts import run_notebooks
from tests.environment import user_environment

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_CELLS, MAX_BYTES = 14, 400_000

pytestmark = pytest.mark.xdist_group("notebooks")


def by_name(path: Path) -> str:
    return path.stem


def run_script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "run_notebooks.py", *arguments],
        capture_output=True,
        text=True,
        env=user_environment(),
    )


def made_of(folder: Path, *sources: str) -> Path:
    """A notebook with these cells of code."""
    path = folder / "made.ipynb"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in sources])
    nbformat.write(book, path)
    return path


def outputs_of(path: Path) -> list[list[dict[str, Any]]]:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    return [cell["outputs"] for cell in cells if cell["cell_type"] == "code"]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_it_runs(path: Path) -> None:
    done = run_script("--check", path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", NOTEBOOKS, ids=by_name)
def test_the_file_holds_a_whole_run_and_nothing_of_the_machine(path: Path) -> None:
    text = path.read_text("utf-8")
    book = nbformat.reads(text, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert len(book.cells) <= MAX_CELLS
    assert len(text.encode()) <= MAX_BYTES
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs) or "<img" in text
    assert code[-1].outputs
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
    for personal in (str(ROOT), sys.prefix, "site-packages", ".venv"):
        assert personal not in text
    assert book.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert not any(cell.metadata for cell in book.cells)


def test_a_run_is_stored_without_the_machine(tmp_path: Path) -> None:
    path = made_of(
        tmp_path,
        "import sys",
        f"print({str(ROOT)!r} + '/y')",
        "sys.executable",
    )
    done = run_script(path)
    assert done.returncode == 0, done.stderr
    assert f"{path}: 3 cells ran" in done.stdout
    silent, printed, shown = outputs_of(path)
    assert silent == []
    assert "".join(printed[0]["text"]) == "./y\n"
    here = sys.executable
    for found, name in run_notebooks._PATHS:
        here = here.replace(found, name)
    assert "".join(shown[0]["data"]["text/plain"]) == repr(here)


def test_a_check_stores_nothing_and_a_failing_cell_is_told(tmp_path: Path) -> None:
    path = made_of(tmp_path, "print('once')", "assert 1 == 2, 'no such luck'")
    before = path.read_bytes()
    for options in (("--check",), ()):
        done = run_script(*options, path)
        assert done.returncode == 1
        assert "no such luck" in done.stderr
        assert path.read_bytes() == before


def test_without_arguments_all_notebooks_are_meant() -> None:
    assert list(run_notebooks._all()) == NOTEBOOKS
