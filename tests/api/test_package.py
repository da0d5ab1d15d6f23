"""`import loongjax` is cheap, and names what it promises."""

from __future__ import annotations

import subprocess
import sys

import pytest

import loongjax


def test_public_names_are_there_and_jax_is_not() -> None:
    script = (
        "import sys, loongjax\n"
        "for name in loongjax.__all__: getattr(loongjax, name)\n"
        "loaded = [name for name in ('jax', 'torch') if name in sys.modules]\n"
        "sys.exit(f'import loongjax loads {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_these() -> None:
    errors = {name for name in loongjax.__all__ if name.endswith("Error")}
    assert set(loongjax.__all__) - errors == {
        "AsyncLLM",
        "CompletionOutput",
        "LLM",
        "PendingRequest",
        "RequestOutput",
        "SamplingParams",
        "StepRun",
        "StreamChunk",
        "TokenLogprobs",
        "__version__",
    }
    from loongjax import errors as module

    assert errors == {name for name in vars(module) if name.endswith("Error")}
    assert dir(loongjax) == sorted(loongjax.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'loongjax' has no attribute 'LLMS'"):
        loongjax.LLMS  # noqa: B018
