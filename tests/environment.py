"""The environment of a user, for processes that tests start."""

from __future__ import annotations

import os

OF_TESTS = ("NPROC", "JAX_NUM_CPU_DEVICES")
"""What `conftest.py` sets for the tests' own processes."""


def user_environment() -> dict[str, str]:
    """This process's environment, less what is the tests' own."""
    return {name: value for name, value in os.environ.items() if name not in OF_TESTS}
