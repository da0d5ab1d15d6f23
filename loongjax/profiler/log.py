"""What was measured so far, in a file beside the result, so that a profile can be resumed.

One JSON line for what it is of, then one for each point. A log of something else is begun anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from loongjax.costmodel import Fingerprint


class PointLog:
    """Times of points, by name.

    Attributes:
      resumed: How many were there already.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        self._path = path
        self._times: dict[str, list[float]] = {}
        head = asdict(fingerprint)
        if path.exists():
            self._times = _read(path, head)
        if not self._times:
            path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        self.resumed = len(self._times)

    def get(self, name: str) -> list[float] | None:
        """The times of a point, if it was measured."""
        return self._times.get(name)

    def put(self, name: str, seconds: Sequence[float]) -> None:
        """Keeps the times of a point."""
        self._times[name] = list(seconds)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"point": name, "seconds": list(seconds)}) + "\n")

    def remove(self) -> None:
        """The profile is done."""
        self._path.unlink(missing_ok=True)


def _read(path: Path, head: dict[str, object]) -> dict[str, list[float]]:
    """The points; none if the file is of something else. A last line that was cut off is left."""
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[str, list[float]] = {}
    try:
        if not lines or json.loads(lines[0]) != head:
            return {}
        for line in lines[1:]:
            entry = json.loads(line)
            found[entry["point"]] = [float(value) for value in entry["seconds"]]
    except (ValueError, KeyError, TypeError):
        return found
    return found
