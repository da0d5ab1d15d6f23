"""Command line options that several commands share, and how they are read."""

from __future__ import annotations

import argparse
from typing import Any

from loongjax.errors import ConfigError
from pallas_kernels.backend_names import BACKENDS


def add_engine_options(parser: argparse.ArgumentParser, *, needs_model: bool = True) -> None:
    """The options of `loongjax.LLM`."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--model",
        required=needs_model,
        help="demo, random:NAME, a folder, a .gguf file, or an id on the Hugging Face hub",
    )
    group.add_argument(
        "--instances",
        type=int,
        default=1,
        metavar="N",
        help="elastic instances, each with a replica of the weights and its own share of the KV "
        "pool (default 1); on CPU they are emulated",
    )
    group.add_argument(
        "--degrees",
        type=degree_list,
        metavar="D,D,…",
        help="how many instances may work together, such as 1,2,4 (default: all that exist)",
    )
    group.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="devices of each instance (default 1)",
    )
    group.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per KV block (default 16)"
    )
    group.add_argument(
        "--pool-slots",
        type=int,
        metavar="N",
        help="KV slots of each instance, taken exactly (default: by the memory at hand)",
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="prompt and answer together, in tokens (default: the model's context)",
    )
    group.add_argument(
        "--max-chunk-tokens",
        type=int,
        default=2048,
        metavar="N",
        help="prompt tokens that each instance computes in one step at most (default 2048)",
    )
    group.add_argument(
        "--policy",
        default="first_come",
        metavar="P",
        help="who plans what runs where, such as loongserve, with settings after a colon "
        "(default first_come, which needs no cost model)",
    )
    group.add_argument(
        "--cost-model",
        metavar="FILE",
        help="times of steps on these devices, made by `loongjax profile`",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights, KV and activations (default: float32 on CPU, else bfloat16)",
    )
    group.add_argument(
        "--attention-backend",
        choices=BACKENDS,
        help="which kernels run (default: pallas-tpu on TPU, pallas-triton on GPU, else xla)",
    )
    group.add_argument(
        "--program-dir",
        metavar="DIR",
        help="folder of compiled programs, yours alone (default: in ~/.cache/loongjax)",
    )
    group.add_argument(
        "--trust-library",
        metavar="DIR",
        help="also read programs compiled elsewhere from DIR, whoever owns it; whoever can "
        "write there can run code here",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """`--json`, which every command has."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line on stdout"
    )


def degree_list(text: str) -> tuple[int, ...]:
    """`1,2,4` as numbers, ascending and without repeats."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"degrees are numbers with commas between them, such as 1,2,4, not {text!r}"
        ) from None


def llm_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `loongjax.LLM` beside the model."""
    for name in ("pool_slots", "max_model_len", "max_chunk_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return {
        "instances": options.instances,
        "degrees": options.degrees,
        "tensor_parallel": options.tensor_parallel,
        "block_size": options.block_size,
        "pool_slots": options.pool_slots,
        "max_model_len": options.max_model_len,
        "max_chunk_tokens": options.max_chunk_tokens,
        "policy": options.policy,
        "cost_model": options.cost_model,
        "dtype": options.dtype,
        "attention_backend": options.attention_backend,
        "program_dir": options.program_dir,
        "trust_library": options.trust_library,
    }
