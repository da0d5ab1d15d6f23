"""Rigs that property tests share: a rig takes half a minute of compiling."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.esp.rig import Rig, probing


@pytest.fixture(scope="package")
def made_rigs() -> Iterator[dict[tuple, Rig]]:
    """All rigs of this process, by their options."""
    made: dict[tuple, Rig] = {}
    yield made
    for rig in made.values():
        rig.executor.close()


@pytest.fixture(scope="session")
def probed_programs(tmp_path_factory):
    """Where their programs are kept."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def rigs(made_rigs, probed_programs):
    """Makes each rig once; programs are traced while `sample` is replaced by a probe."""

    def make(**options) -> Rig:
        key = tuple(sorted(options.items(), key=str))
        if key not in made_rigs:
            made_rigs[key] = Rig(program_dir=probed_programs, **options)
        return made_rigs[key]

    with probing():
        yield make
