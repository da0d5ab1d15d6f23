"""What tests of engines on devices share: executors, and quiet where failures are wanted."""

from __future__ import annotations

import logging
from functools import cache

import pytest

from tests.engine.on_devices import Stage, make_executor
from tests.engine.sabotage import forget_failed_callbacks


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Where the executors' programs are kept."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="package")
def executor(programs):
    """Makes the executor of a stage once; it is used in one process alone (xdist_group)."""
    made = cache(lambda stage: make_executor(stage, programs))
    used = set()

    def make(stage: Stage):
        used.add(stage)
        return made(stage)

    yield make
    for stage in used:
        made(stage).close()


@pytest.fixture(scope="module")
def quiet():
    """For injected failures, which would be logged with their tracebacks: that takes longer
    than the steps.
    """
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)
    forget_failed_callbacks()
