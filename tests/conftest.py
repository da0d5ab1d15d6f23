"""Set-up shared by all tests: emulated devices, checked shapes, repeatable property tests."""

from __future__ import annotations

import gc
import os

# Read when the jax backend starts, so they are set before anything imports jax.
os.environ["NPROC"] = "64"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

install_import_hook(["loongjax", "pallas_kernels"], "beartype.beartype")

settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="module")
def without_shape_checks():
    """For modules of very many cases: checking every call takes most of their time. The same
    code is called with checks by other tests.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs():
    """Compiled code takes memory mappings, of which a process has a bounded number: what the
    modules before left in jax's caches is not to use up what the next one needs.
    """
    from loongjax.programs import mappings

    yield
    if mappings.count_mappings() > 10_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def room(monkeypatch):
    """Room for programs, whatever other modules' tests have mapped; tests of too little room take
    it away again.
    """
    monkeypatch.setattr("loongjax.programs.mappings.has_room", lambda: True)
