"""Rigs that the property tests of a module share."""

from __future__ import annotations

import pytest

from tests.esp.rig import Rig, probing


@pytest.fixture(scope="module")
def rigs(tmp_path_factory):
    """Makes each rig once; programs are traced while `sample` is replaced by a probe."""
    made: dict[tuple, Rig] = {}
    folder = tmp_path_factory.mktemp("programs")
    with probing():

        def make(**options) -> Rig:
            key = tuple(sorted(options.items(), key=str))
            if key not in made:
                made[key] = Rig(program_dir=folder, **options)
            return made[key]

        yield make
        for rig in made.values():
            rig.executor.close()
