"""Emulated devices come before jax starts, or the error says what to run. In fresh processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loongjax.cluster.emulation import GPU_MEMORY_SHARE, prepare_devices
from loongjax.errors import ConfigError
from tests.environment import user_environment

SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

ROOT = Path(__file__).parents[2]
PREPARE = "from loongjax.cluster.emulation import prepare_devices; prepare_devices"
COUNT = "import jax; print(len(jax.devices()), jax.default_backend())"


def run(script: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = user_environment()
    inherited.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def output_of(script: str, **environment: str) -> str:
    done = run(script, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_fresh_process_gets_its_devices_and_some_to_spare():
    check = "import os; assert os.environ['NPROC'] == '64'"
    assert output_of(f"{PREPARE}(4); {check}; {COUNT}") == "8 cpu"
    assert output_of(f"{PREPARE}(12); {COUNT}") == "12 cpu"


def test_instances_work_together_in_a_fresh_process():
    script = f"""{PREPARE}(4)
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from loongjax.cluster.mesh import SP, GroupMeshes, device_grid
mesh = GroupMeshes(device_grid(4, 1))[0, 1, 2, 3]
total = jax.shard_map(lambda x: jax.lax.psum(x, SP), mesh=mesh, in_specs=P(SP), out_specs=P())
print(total(jnp.arange(4.0)))"""
    assert output_of(script) == "[6.]"


def test_more_than_one_engine_may_ask():
    assert output_of(f"{PREPARE}(4); {COUNT}; prepare_devices(8)") == "8 cpu"


def test_one_instance_alone_has_a_thread_for_each_core():
    check = "import os; assert 'NPROC' not in os.environ"
    assert output_of(f"{PREPARE}(1); {check}; {COUNT}") == "1 cpu"
    assert output_of(f"import jax; jax.devices(); {PREPARE}(1); {COUNT}") == "1 cpu"


STARTED_BEFORE = pytest.mark.parametrize(
    ("environment", "needed", "have"),
    [
        ({}, 4, 1),
        ({"JAX_NUM_CPU_DEVICES": "2", "NPROC": "64"}, 4, 2),
        ({"JAX_NUM_CPU_DEVICES": "4"}, 4, 4),  # devices enough, but a small pool of threads
        ({"JAX_NUM_CPU_DEVICES": "8"}, 12, 8),
    ],
)


@STARTED_BEFORE
def test_jax_starts_anew_where_no_array_is_alive(environment, needed, have):
    before = f"import os, jax; assert len(jax.devices()) == {have}; jax.jit(lambda: 1)()"
    check = "assert os.environ['NPROC'] == '64'"
    script = f"{before}; {PREPARE}({needed}); {check}; {COUNT}; print(jax.jit(lambda x: x + 1)(1))"
    assert output_of(script, **environment) == f"{max(needed, 8)} cpu\n2"


@STARTED_BEFORE
def test_arrays_from_before_are_an_error_that_says_what_to_run(environment, needed, have):
    before = "import jax; mine = jax.numpy.ones(3)"
    done = run(f"{before}; {PREPARE}({needed})", **environment)
    assert done.returncode != 0
    (message,) = re.findall(r"BackendStartedError: (.*)", done.stderr)
    assert f"jax started with {have} CPU device(s) before" in message
    assert f"{needed} emulated instance device(s)" in message
    assert "1 array(s) are alive" in message
    assert "create this LLM before other code uses jax" in message
    recipe = message.split("run first: ")[1]
    script = f"{recipe}\nimport jax; jax.devices(); {PREPARE}({needed}); {COUNT}"
    assert output_of(script, **environment) == f"{max(needed, 8)} cpu"


def test_a_refusal_leaves_the_environment_as_it_was():
    script = f"""import os, jax; mine = jax.numpy.ones(3)
{PREPARE}
for _ in range(2):
    try:
        prepare_devices(4)
    except ValueError:
        assert "NPROC" not in os.environ
    else:
        raise AssertionError
del mine
prepare_devices(4); {COUNT}"""
    assert output_of(script) == "8 cpu"


def test_an_nproc_that_is_too_small_is_overruled_and_the_log_says_so():
    check = "import os; assert os.environ['NPROC'] == '64'"
    done = run(f"{PREPARE}(4); {check}; prepare_devices(4); {COUNT}", NPROC="2")
    assert done.stdout.strip() == "8 cpu", done.stderr
    assert done.stderr.count("NPROC=2 is too few threads for emulated devices") == 1


def test_an_nproc_that_is_no_number_is_the_callers_mistake(monkeypatch):
    monkeypatch.setenv("NPROC", "abc")
    with pytest.raises(ConfigError, match=r"NPROC .* must be a whole number, not 'abc'.*Unset it"):
        prepare_devices(2)
    prepare_devices(1)  # nobody looks at it


def test_jax_takes_most_of_a_gpus_memory_unless_the_environment_says_another(monkeypatch):
    for name in SHARES:
        monkeypatch.delenv(name, raising=False)
    prepare_devices(1)
    assert os.environ[SHARES[0]] == str(GPU_MEMORY_SHARE)
    monkeypatch.delenv(SHARES[0])
    monkeypatch.setenv(SHARES[1], "0.5")
    prepare_devices(1)
    assert SHARES[0] not in os.environ
