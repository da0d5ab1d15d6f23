"""The notebook on scheduling runs from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "scheduling.ipynb"


def test_every_cell_runs_and_the_policy_of_the_cell_serves_everybody() -> None:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "outputs do not belong into the repository"
            source = "".join(cell["source"])
            exec(compile(source, str(NOTEBOOK), "exec", dont_inherit=True), names)
    for found in names["results"].values():
        assert all(each["completed"] == each["requests"] == names["REQUESTS"] for each in found)
