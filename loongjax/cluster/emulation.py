"""Emulated CPU devices: what has to be set before the jax backend starts.

A process gets its devices when the backend starts, and cannot get more afterwards. So this
asks for a few more than needed: a notebook can try another degree without a restart.
"""

from __future__ import annotations

import os

import jax

from loongjax.errors import BackendStartedError

_SPARE_DEVICES = 8
# The CPU client sizes its thread pool by NPROC. With a thread for each core, programs of
# disjoint groups in flight together can wait for each other's threads forever.
_POOL_THREADS = 64


def prepare_devices(needed: int) -> None:
    """Makes jax emulate at least `needed` devices if it runs on CPU.

    Emulates 64 at most; does nothing to accelerators. Raises BackendStartedError if jax has
    started already and was not set up so; the message says what to run first.
    """
    wanted = min(max(needed, _SPARE_DEVICES), _POOL_THREADS)  # a thread for each device
    threads = os.environ.get("NPROC")
    enough = threads is not None and int(threads) >= _POOL_THREADS
    if not enough:
        os.environ["NPROC"] = str(_POOL_THREADS)
    try:
        if (jax.config.jax_num_cpu_devices or 0) < wanted:
            jax.config.update("jax_num_cpu_devices", wanted)
        elif not enough:
            # A change raises if the backend runs, and then its pool was made without NPROC.
            jax.config.update("jax_num_cpu_devices", jax.config.jax_num_cpu_devices + 1)
    except RuntimeError as error:
        if not enough:  # too late, and the next to ask must see that, too
            os.environ.pop("NPROC")
            os.environ.update({} if threads is None else {"NPROC": threads})
        _check_started(needed, enough, error)


def _check_started(needed: int, pool_is_large: bool, error: RuntimeError) -> None:
    if jax.default_backend() != "cpu":
        return
    have = len(jax.devices())
    if needed > _POOL_THREADS:
        return  # never to be had here; whoever takes the devices says so
    if have >= needed and (needed == 1 or pool_is_large):
        return
    raise BackendStartedError(
        f"jax started with {have} CPU device(s) before loongjax could set up {needed} emulated "
        f"instance device(s) and a thread pool for them. Create the LLM before other code uses "
        f"jax, or run first: import os; os.environ['NPROC'] = '{_POOL_THREADS}'; "
        f"os.environ['JAX_NUM_CPU_DEVICES'] = '{max(needed, _SPARE_DEVICES)}'"
    ) from error
