"""What only a chip can confirm: run this where there is one. Prints PASS, FAIL or SKIP for each.

    python scripts/confirm_on_chip.py
    python scripts/confirm_on_chip.py --target h100x8 --library library --model-shape llama3-8b

Kernels were compared with float32 in interpretation, and compiled by the real compilers; here they
run. Memory, rebinding, and programs compiled elsewhere are what the compilers could not show.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from loongjax import LLM, SamplingParams
from loongjax.aot.targets import target_of
from loongjax.cluster.emulation import prepare_devices
from loongjax.costmodel.hardware import load_hardware
from pallas_kernels.backends import Kernels, default_backend, kernels_of
from pallas_kernels.paged_attention import RowTables, chunk_entries
from pallas_kernels.partials import empty_carry, finish
from pallas_kernels.reference import attention
from pallas_kernels.tuning import chip_of

_HEADS, _KV_HEADS, _HEAD_DIM = 8, 2, 128
_BLOCK, _BLOCKS = 16, 64
_ERROR = {"float32": 1e-4, "bfloat16": 2e-2}  # of the norm
_PROMPTS = ["the ring and the pool", "a much longer prompt " * 60]


class Unconfirmed(Exception):
    """The chip does something else than was expected."""


class NotHere(Exception):
    """No machine like this one can say."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is known of this machine."""

    model: str
    target: str | None
    library: Path | None
    model_shape: str | None


def main() -> int:
    """Returns the exit code: 1 if anything is not as expected."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="random:bench58m", help="(default %(default)s)")
    parser.add_argument("--target", metavar="NAME", help="what this machine is to loongjax aot")
    parser.add_argument("--library", type=Path, metavar="DIR", help="what loongjax aot wrote")
    parser.add_argument("--model-shape", metavar="NAME", help="what it was compiled for")
    options = Options(**vars(parser.parse_args()))
    prepare_devices(1)
    failed = [name for name, check in CHECKS.items() if not _passes(name, check, options)]
    return 1 if failed else 0


def _passes(name: str, check: Callable[[Options], str], options: Options) -> bool:
    try:
        verdict, words = "PASS", check(options)
    except NotHere as reason:
        verdict, words = "SKIP", str(reason)
    except Exception as error:  # a chip may fail in any way
        verdict, words = "FAIL", f"{type(error).__name__}: {error}".replace("\n", " ")
    print(f"{verdict} {name}: {words}", flush=True)
    return verdict != "FAIL"


def _kernels() -> Kernels:
    chip = chip_of(jax.devices()[0].device_kind)
    return kernels_of(default_backend(jax.default_backend()), chip)


def _random(seed: int, *shape: int, dtype: str) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _near(found: jax.Array, wanted: jax.Array, dtype: str) -> float:
    a, b = (np.asarray(x, np.float64) for x in (found, wanted))
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    if not error <= _ERROR[dtype]:
        raise Unconfirmed(f"{dtype}: relative error {error:.2e}, at most {_ERROR[dtype]:.0e}")
    return error


def striped_attention(options: Options) -> str:
    """A causal prompt, as one stripe."""
    errors = _stripe_errors(_kernels(), ["float32", "bfloat16"])
    return f"relative errors {errors[0]:.1e} in float32, {errors[1]:.1e} in bfloat16"


def hopper_attention(options: Options) -> str:
    """The same through Mosaic GPU, whose products no interpreter runs."""
    device = jax.devices()[0]
    if device.platform != "gpu" or not str(device.compute_capability).startswith("9."):
        raise NotHere("it takes a Hopper GPU")
    (error,) = _stripe_errors(kernels_of("pallas-hopper"), ["bfloat16"])
    return f"relative error {error:.1e} in bfloat16"


def _stripe_errors(kernels: Kernels, dtypes: list[str]) -> list[float]:
    tokens, errors = 1024, []
    for dtype in dtypes:
        q = _random(0, _HEADS, tokens, _HEAD_DIM, dtype=dtype)
        k, v = (_random(seed, _KV_HEADS, tokens, _HEAD_DIM, dtype=dtype) for seed in (1, 2))
        carry = jax.jit(
            lambda q, k, v: kernels.fold_stripe(
                *(empty_carry((_HEADS, tokens), _HEAD_DIM), q, k, v),
                jnp.zeros(tokens, jnp.int32),
                shift=jnp.int32(0),
                used=jnp.int32(tokens),
                scale=_HEAD_DIM**-0.5,
            )
        )(q, k, v)
        by_token = (x.swapaxes(0, 1) for x in (q, k, v))
        causal = jnp.tril(jnp.ones((tokens, tokens), bool))
        wanted = attention(*by_token, causal, scale=_HEAD_DIM**-0.5)
        errors.append(_near(finish(carry).o.swapaxes(0, 1), wanted.o, dtype))
    return errors


def paged_attention(options: Options) -> str:
    """Rows whose blocks lie in any order."""
    rows, slots, errors = 8, _BLOCK * _BLOCKS, []
    order = np.random.default_rng(5).permutation(_BLOCKS).reshape(rows, -1)
    table = np.zeros((_BLOCKS + chunk_entries(_BLOCK), 3), np.int32)
    for row, blocks in enumerate(order):
        for at, block in enumerate(blocks):
            table[row * len(blocks) + at] = block * _BLOCK, at * _BLOCK, _BLOCK
    each = order.shape[1]
    tables = RowTables(
        jnp.asarray(table),
        jnp.arange(rows, dtype=jnp.int32) * each,
        jnp.full(rows, each, jnp.int32),
        jnp.full(rows, slots, jnp.int32),
        jnp.zeros(rows, jnp.int32),
    )
    visible = np.zeros((rows, slots), bool)
    for row, blocks in enumerate(order):
        visible[row].reshape(_BLOCKS, _BLOCK)[blocks] = True
    for dtype in _ERROR:
        q = _random(0, rows, _HEADS, _HEAD_DIM, dtype=dtype)
        k, v = (_random(seed, 1, slots, _KV_HEADS, _HEAD_DIM, dtype=dtype) for seed in (1, 2))
        found = jax.jit(
            lambda q, k, v: _kernels().paged_attention(
                *(q, k, v, tables),
                layer=jnp.int32(0),
                block_size=_BLOCK,
                scale=_HEAD_DIM**-0.5,
                rows_at_once=1,
            )
        )(q, k, v)
        wanted = attention(q, k[0], v[0], jnp.asarray(visible), scale=_HEAD_DIM**-0.5)
        errors.append(_near(found.o, wanted.o, dtype))
    return f"relative errors {errors[0]:.1e} in float32, {errors[1]:.1e} in bfloat16"


def kv_write(options: Options) -> str:
    """Chosen tokens land in their slots, and the pool stays where it is."""
    pool = _random(0, 2, 4 * _BLOCK, _KV_HEADS, _HEAD_DIM, dtype="bfloat16")
    rows = _random(1, 3, _KV_HEADS, _HEAD_DIM, dtype="bfloat16")
    slots, wanted = jnp.asarray([5, 40, 6], jnp.int32), np.array(pool)
    wanted[1, np.asarray(slots)] = np.asarray(rows)
    before = pool.unsafe_buffer_pointer()
    write = jax.jit(
        lambda pool: _kernels().kv_write(pool, rows, slots, layer=jnp.int32(1)), donate_argnums=0
    )
    found = write(pool)
    if not np.array_equal(np.asarray(found), wanted):
        raise Unconfirmed("the pool holds something else than was written")
    if found.unsafe_buffer_pointer() != before:
        raise Unconfirmed("the pool was copied")
    return "written in place"


def degrees(options: Options) -> str:
    """In float32 a group of all devices says what one device says; nothing compiles late."""
    devices = len(jax.devices())
    if devices < 2:
        raise NotHere("it takes two devices or more")
    params = SamplingParams(temperature=0.0, max_tokens=32)
    answers, counts = [], None
    with tempfile.TemporaryDirectory() as folder:
        for instances in (1, devices):
            with LLM(
                options.model,
                instances=instances,
                degrees=(instances,),
                dtype="float32",
                pool_slots=8192,
                program_dir=folder,
                warm_up=True,
            ) as llm:
                found = llm.generate(_PROMPTS, params)
                answers.append([each.outputs[0].token_ids for each in found])
                counts = llm.stats().programs
    if answers[0] != answers[1]:
        raise Unconfirmed(f"one device says {answers[0]}, {devices} together {answers[1]}")
    if counts.compiled_after_warm_up:
        raise Unconfirmed(f"{counts.compiled_after_warm_up} compilations after warm-up")
    return f"{devices} devices together say what one says"


def rebinding(options: Options) -> str:
    """A program that was compiled for one group runs on others (GPU)."""
    devices = len(jax.devices())
    if jax.default_backend() != "gpu" or devices < 2:
        raise NotHere("it takes two GPUs or more")
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(
            options.model,
            instances=devices,
            degrees=(1,),
            pool_slots=8192,
            program_dir=folder,
            warm_up=True,
        ) as llm,
    ):
        counts = llm.stats().programs
    if counts.rebound != counts.compiled * (devices - 1):
        raise Unconfirmed(f"{counts.compiled} compiled, but {counts.rebound} rebound: {counts}")
    return f"{counts.rebound} in {counts.rebind_s:.2f} s; {counts.compiled} compiled"


def library(options: Options) -> str:
    """A server finds everything that `loongjax aot` compiled for it."""
    if options.library is None or options.model_shape is None:
        raise NotHere("say --library and --model-shape")
    with (
        tempfile.TemporaryDirectory() as folder,
        LLM(
            f"random:{options.model_shape}",
            instances=len(jax.devices()),
            program_dir=folder,
            trust_library=options.library,
            warm_up=True,
        ) as llm,
    ):
        counts = llm.stats().programs
    if counts.compiled:
        raise Unconfirmed(f"{counts.compiled} programs were compiled here: {counts}")
    return f"{counts.loaded} programs loaded in {counts.load_s:.1f} s, none compiled"


def memory(options: Options) -> str:
    """The chip gives as much memory as programs were sized for."""
    if options.target is None:
        raise NotHere("say --target")
    target = target_of(options.target)
    reckoned = load_hardware(target.chip).hbm_bytes * target.memory_share
    given = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if given < reckoned:
        raise Unconfirmed(f"{given / 1e9:.1f} GB, and {reckoned / 1e9:.1f} were reckoned with")
    return f"{given / 1e9:.1f} GB, {reckoned / 1e9:.1f} were reckoned with"


CHECKS: dict[str, Callable[[Options], str]] = {
    "striped attention is exact": striped_attention,
    "striped attention through Mosaic GPU is exact": hopper_attention,
    "paged attention is exact": paged_attention,
    "KV is written in place": kv_write,
    "answers do not depend on the degree": degrees,
    "programs are rebound": rebinding,
    "programs compiled elsewhere load": library,
    "memory is as reckoned": memory,
}

if __name__ == "__main__":
    sys.exit(main())
