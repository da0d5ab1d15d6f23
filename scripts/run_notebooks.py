"""Runs notebooks from their first cell to their last and stores what they show.

    python scripts/run_notebooks.py                             all of notebooks/, in place
    python scripts/run_notebooks.py --check notebooks/X.ipynb   runs it, stores nothing

A kernel is this very interpreter, whatever kernels are installed. What a run leaves that
depends on the machine (times of execution, versions, paths) is not stored, so that a change of
a file is a change of what it says. A cell that raises ends the run with exit code 1, and
nothing of its notebook is stored.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets import default

ROOT = Path(__file__).parents[1]
_CELL_S = 600
"""A cell that takes longer has failed [s]."""
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
_PATHS = [(str(ROOT), "."), *((str(home), "~") for home in [Path.home()] if home.name)]
"""What is written for which path; a home may be the root, which is a part of every path."""


class _ThisInterpreter(AsyncKernelManager):
    """Starts this interpreter, since it finds no other kernel."""

    @default("kernel_spec_manager")
    def _finds_nothing(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def run(notebook: Any, folder: Path) -> None:
    """Executes a notebook in a new kernel and a folder, and keeps its outputs.

    Raises:
      CellExecutionError: A cell raised.
    """
    NotebookClient(
        notebook,
        kernel_manager_class=_ThisInterpreter,
        kernel_name="python3",
        timeout=_CELL_S,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()


def scrub(notebook: Any) -> None:
    """Takes away what depends on the machine."""
    notebook.metadata = nbformat.from_dict(_METADATA)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        for output in cell.get("outputs", ()):
            _scrub_texts(output)


def _scrub_texts(value: Any) -> None:
    for key, inner in value.items():
        if isinstance(inner, dict):
            _scrub_texts(inner)
        elif isinstance(inner, str):
            for path, name in _PATHS:
                inner = inner.replace(path, name)
            value[key] = inner


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Runs notebooks and stores their outputs.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    parser.add_argument("--check", action="store_true", help="store nothing")
    options = parser.parse_args(arguments)
    for path in options.notebooks or _all():
        notebook = nbformat.read(path, as_version=4)
        try:
            run(notebook, path.parent)
        except CellExecutionError as error:
            print(f"{path}: {error}", file=sys.stderr)
            return 1
        if not options.check:
            scrub(notebook)
            nbformat.write(notebook, path)
        print(f"{path}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells ran")
    return 0


def _all() -> Iterator[Path]:
    yield from sorted((ROOT / "notebooks").glob("*.ipynb"))


if __name__ == "__main__":
    sys.exit(main())
