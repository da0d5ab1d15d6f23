"""A cost model from data sheets alone: for hardware that nobody has measured yet.

Rooflines, without overlap: the time of a step is the sum of what its parts take at the part
of each peak that programs attain (`hardware.Attained`). So it is careful where compute and
communication would hide each other, and says nothing of effects that a data sheet does not
name. A measured SIB is better wherever there is one.
"""

from __future__ import annotations

from collections.abc import Iterable

from loongjax.costmodel.fit import DecodeFit, MigrateFit, PrefillFit
from loongjax.costmodel.hardware import HardwareDescription
from loongjax.costmodel.padding import Padding
from loongjax.costmodel.sib import ESTIMATE, Fingerprint, ScalingInformationBase
from loongjax.errors import ConfigError
from loongjax.models.config import ModelConfig

ITEMSIZE = 2
"""Bytes of a bfloat16."""
MEMORY_KEPT_FREE = 0.1
"""Part of a chip's memory that neither weights nor KV may take: programs, temporaries."""


def parameters(model: ModelConfig) -> int:
    """Weights of a model, without norms and biases."""
    embeddings = (1 if model.tied_embeddings else 2) * model.vocab_size * model.width
    return embeddings + model.layers * _layer_parameters(model)


def dense_flops_per_token(model: ModelConfig) -> float:
    """Operations of all products with weights, for one token: two for each weight used."""
    return 2.0 * (model.layers * _layer_parameters(model) + model.vocab_size * model.width)


def square_flops(model: ModelConfig) -> float:
    """Operations of causal attention for each unit of len^2: len^2 / 2 pairs of query and key,
    each 4 for every head and dimension, over all layers.
    """
    return 2.0 * model.layers * model.heads * model.head_dim


def pool_slots(hardware: HardwareDescription, model: ModelConfig, tensor_parallel: int) -> int:
    """KV tokens for which an instance has memory beside the weights.

    Raises:
      ConfigError: Not even for one.
    """
    memory = hardware.hbm_bytes * tensor_parallel * (1.0 - MEMORY_KEPT_FREE)
    weights = parameters(model) * ITEMSIZE
    slots = int((memory - weights) // model.kv_bytes_per_token(ITEMSIZE))
    if slots < 1:
        raise ConfigError(
            f"{tensor_parallel} {hardware.name} have {memory / 2**30:.0f} GiB for weights and KV, "
            f"and the weights alone take {weights / 2**30:.0f} GiB. Give an instance more devices "
            "with tensor parallelism"
        )
    return slots


def least_tensor_parallel(hardware: HardwareDescription, model: ModelConfig) -> int:
    """The smallest power of two of chips that has at least as much memory for KV as for
    weights.
    """
    weights = parameters(model) * ITEMSIZE
    chips = 1
    while hardware.hbm_bytes * chips * (1.0 - MEMORY_KEPT_FREE) < 2 * weights:
        chips *= 2
    return chips


def analytic_sib(
    hardware: HardwareDescription,
    model: ModelConfig,
    *,
    model_name: str,
    tensor_parallel: int,
    degrees: Iterable[int],
    slots: int | None = None,
    padding: Padding | None = None,
) -> ScalingInformationBase:
    """A cost model of instances of `tensor_parallel` chips.

    Args:
      hardware: The chip.
      model: Its shape.
      model_name: For the fingerprint.
      tensor_parallel: Chips of an instance.
      degrees: Those to describe; others are interpolated.
      slots: KV tokens of an instance. None: as many as memory leaves room for.
      padding: The sizes of an engine's programs. None: steps are not rounded up.
    """
    chosen = sorted(set(degrees))
    return ScalingInformationBase(
        fingerprint=Fingerprint(
            hardware=hardware.name,
            model=model_name,
            tensor_parallel=tensor_parallel,
            dtype="bfloat16",
            software=ESTIMATE,
        ),
        basis=f"estimated from the data sheet of {hardware.title}: {'; '.join(hardware.sources)}",
        prefill_fits={d: _prefill(hardware, model, tensor_parallel, d) for d in chosen},
        decode_fits={d: _decode(hardware, model, tensor_parallel, d) for d in chosen},
        migrate_fit=MigrateFit(
            constant_s=hardware.hop_s * model.layers,
            token_s=model.kv_bytes_per_token(ITEMSIZE) / _link(hardware, tensor_parallel),
        ),
        host=hardware.host,
        pool_slots=slots or pool_slots(hardware, model, tensor_parallel),
        padding=padding,
    )


def _layer_parameters(model: ModelConfig) -> int:
    attention = model.width * model.head_dim * 2 * (model.heads + model.kv_heads)
    return attention + 3 * model.width * model.ffn


def _link(hardware: HardwareDescription, chips: int) -> float:
    return hardware.link_bytes_per_s * hardware.attained.link * chips


def _memory(hardware: HardwareDescription, chips: int) -> float:
    return hardware.hbm_bytes_per_s * hardware.attained.memory * chips


def _row_seconds(hardware: HardwareDescription, model: ModelConfig, chips: int) -> float:
    """Dense layers of one token on one instance, with the two reductions of each layer."""
    compute = dense_flops_per_token(model) / (
        hardware.flops_per_s * hardware.attained.compute * chips
    )
    if chips == 1:
        return compute
    reduced = 2 * model.layers * model.width * ITEMSIZE * 2 * (chips - 1) / chips
    return compute + reduced / _link(hardware, 1)


def _constant(
    hardware: HardwareDescription, model: ModelConfig, chips: int, exchanges: int
) -> float:
    """What every step takes: reading the weights, layer by layer, and waiting for others."""
    weights = parameters(model) * ITEMSIZE / _memory(hardware, chips)
    reductions = 2 * model.layers * (chips - 1) * hardware.hop_s
    hops = model.layers * exchanges * hardware.hop_s
    return weights + model.layers * hardware.layer_overhead_s + reductions + hops


def _prefill(
    hardware: HardwareDescription, model: ModelConfig, chips: int, degree: int
) -> PrefillFit:
    kv_bytes = model.kv_bytes_per_token(ITEMSIZE)
    ring = kv_bytes * (degree - 1) / _link(hardware, chips)  # of a whole prompt, by each rank
    attention = hardware.flops_per_s * hardware.attained.attention * chips
    constant = _constant(hardware, model, chips, degree - 1)
    return PrefillFit(
        constant_s=constant,
        resumed_constant_s=constant,
        token_s=(_row_seconds(hardware, model, chips) + ring) / degree,
        square_s=square_flops(model) / attention / degree,
        history_s=kv_bytes / _memory(hardware, chips) / degree,
    )


def _decode(
    hardware: HardwareDescription, model: ModelConfig, chips: int, degree: int
) -> DecodeFit:
    kv_bytes = model.kv_bytes_per_token(ITEMSIZE)
    exchanged = 2 * (model.heads + model.kv_heads) * model.head_dim * ITEMSIZE * model.layers
    return DecodeFit(
        constant_s=_constant(hardware, model, chips, 2 * (degree - 1)),
        kv_token_s=kv_bytes / _memory(hardware, chips),
        longest_s=0.0,
        master_row_s=_row_seconds(hardware, model, chips),
        row_s=exchanged / _link(hardware, chips) if degree > 1 else 0.0,
    )
