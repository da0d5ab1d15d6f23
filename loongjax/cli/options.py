"""Command line options that several commands share, and how they are read."""

from __future__ import annotations

import argparse
from typing import Any

from loongjax.errors import ConfigError
from pallas_kernels.backend_names import BACKENDS

# The keyword arguments of `loongjax.LLM` beside the model.
_ARGUMENTS = frozenset({
    "instances", "degrees", "tensor_parallel", "block_size", "pool_slots", "max_model_len",
    "max_chunk_tokens", "policy", "cost_model", "dtype", "attention_backend", "program_dir",
    "trust_library", "config",
})  # fmt: skip


def add_engine_options(
    parser: argparse.ArgumentParser, *, planning: bool = True, needs_model: bool = True
) -> None:
    """The options of `loongjax.LLM`; without `planning`, those for an engine without a policy."""
    group = parser.add_argument_group("engine")
    _add_model_option(group, needs_model)
    _add_cluster_options(group)
    _add_size_options(group)
    if planning:
        _add_planning_options(group)
    _add_program_options(group)


def _add_model_option(group: argparse._ArgumentGroup, is_needed: bool) -> None:
    group.add_argument(
        "--model",
        required=is_needed,
        help="demo, random:NAME, a folder, a .gguf file, or an id on the Hugging Face hub",
    )


def _add_cluster_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--config",
        metavar="FILE",
        help="a TOML file of the options below, such as pool_slots = 8192; those given here go "
        "before it",
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
        help="how many instances may work together, such as 1,2,4 (default: all that exist; on "
        "CPU the powers of two and --instances)",
    )
    group.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="devices of each instance (default 1)",
    )


def _add_size_options(group: argparse._ArgumentGroup) -> None:
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


def _add_planning_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--policy",
        default="elastic",
        metavar="P",
        help="who plans what runs where, such as loongserve, with settings after a colon "
        "(default elastic)",
    )
    group.add_argument(
        "--cost-model",
        metavar="FILE",
        help="times of steps on these devices, made by `loongjax profile`",
    )


def _add_program_options(group: argparse._ArgumentGroup) -> None:
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
    """The keyword arguments of `loongjax.LLM` beside the model, as far as the command has them."""
    for name in ("pool_slots", "max_model_len", "max_chunk_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    return {name: value for name, value in vars(options).items() if name in _ARGUMENTS}
