"""The stubs in the repository are what the .proto files say."""

from __future__ import annotations

from scripts.generate_stubs import STUBS, generate


def test_stubs_are_current():
    kept = {path.name: path.read_text() for path in STUBS.glob("*_pb2*")}
    made = generate()
    assert kept.keys() == made.keys()
    stale = [name for name in made if made[name] != kept[name]]
    assert not stale, f"run `python scripts/generate_stubs.py`: {stale}"
