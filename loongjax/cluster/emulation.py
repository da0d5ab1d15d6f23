"""What has to be set before the jax backend starts: emulated CPU devices, a GPU's memory.

A process gets its devices and its threads when the backend starts. Several instances need many
threads, and get a few more devices than needed, so that a notebook can try another degree. One
instance alone is up to a third faster with a thread for each core. So a backend that was
started for fewer is started anew, as long as that takes nothing from anyone.
"""

from __future__ import annotations

import logging
import os

import jax
from jax.extend import backend

from loongjax.errors import BackendStartedError, ConfigError

GPU_MEMORY_SHARE = 0.8
"""The part of a GPU's memory that jax takes when it starts, unless the environment says another.
Its own choice is 75 %. With arguments of more than 80 % of the memory, weights and pool among them,
XLA hides no hop of the ring any more: its scheduler plans with so much, and holds what overlaps
to the rest.
"""
_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # not both: jax refuses
_DEVICES_TO_SHARE = 8
# The CPU client sizes its thread pools by NPROC, else by the cores. With a thread for each core,
# programs of disjoint groups in flight together can wait for each other's threads forever.
_POOL_THREADS = 64

_log = logging.getLogger(__name__)


def prepare_devices(needed: int) -> None:
    """Makes jax emulate at least `needed` devices on CPU, and take most of a GPU's memory.

    Emulates 64 at most. A backend that runs with too few is started anew if no array lives on
    it; jitted functions then compile again.

    Raises:
      BackendStartedError: An array does; the message says what to run first.
      ConfigError: NPROC is set, and is no whole number.
    """
    if not any(name in os.environ for name in _SHARES):
        os.environ[_SHARES[0]] = str(GPU_MEMORY_SHARE)
    if needed == 1:
        return  # there always is one
    wanted = min(max(needed, _DEVICES_TO_SHARE), _POOL_THREADS)  # a thread for each device
    have = jax.config.jax_num_cpu_devices or 0
    threads = os.environ.get("NPROC")
    enough = _pool_threads(threads) >= _POOL_THREADS
    if enough and have >= wanted:
        return
    if not enough:
        if threads:
            _log.warning(
                "NPROC=%s is too few threads for emulated devices, whose programs could wait for "
                "each other forever: this process takes %d",
                *(threads, _POOL_THREADS),
            )
        os.environ["NPROC"] = str(_POOL_THREADS)
    try:
        # A change raises if the backend runs; without NPROC, its pool would be small.
        jax.config.update("jax_num_cpu_devices", max(wanted, have if enough else have + 1))
    except RuntimeError as error:
        try:
            _start_anew(needed, wanted, enough, error)
        except BackendStartedError:
            os.environ.pop("NPROC")  # the next to ask must see that it was too late
            os.environ.update({} if threads is None else {"NPROC": threads})
            raise


def _pool_threads(nproc: str | None) -> int:
    """What NPROC says; 0 if it is not set, or empty."""
    try:
        return int(nproc or 0)
    except ValueError:
        raise ConfigError(
            f"NPROC in the environment must be a whole number, not {nproc!r}: jax sizes its CPU "
            f"thread pools by it. Unset it, or set it to {_POOL_THREADS} or more"
        ) from None


def _start_anew(needed: int, wanted: int, pool_is_large: bool, error: RuntimeError) -> None:
    if jax.default_backend() != "cpu":
        return
    have, alive = len(jax.devices()), len(jax.live_arrays())
    if needed > _POOL_THREADS or (have >= needed and pool_is_large):
        return  # more than 64 are never to be had: whoever takes the devices says so
    if alive:
        raise BackendStartedError(
            f"jax started with {have} CPU device(s) before loongjax could set up {needed} emulated "
            f"instance device(s) and a thread pool for them, and cannot start anew: {alive} "
            "array(s) are alive. Close other LLMs and delete arrays; or create this LLM before "
            f"other code uses jax; or run first: import os; os.environ['NPROC'] = "
            f"'{_POOL_THREADS}'; os.environ['JAX_NUM_CPU_DEVICES'] = "
            f"'{max(needed, _DEVICES_TO_SHARE)}'"
        ) from error
    _log.info("jax had %d CPU device(s); starting it anew with %d", have, wanted)
    backend.clear_backends()
    jax.config.update("jax_num_cpu_devices", wanted)
