"""What docs/operations.md says of the server."""

from __future__ import annotations

from pathlib import Path

_OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def section(command: str) -> str:
    """The text under a command's heading."""
    _, _, rest = _OPERATIONS.read_text().partition(f"\n### `loongjax {command}`\n")
    assert rest, command
    return rest.partition("\n### ")[0]
