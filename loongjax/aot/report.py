"""What a compiler says of a program, and what follows from it by the chip's numbers."""

from __future__ import annotations

from dataclasses import dataclass

from loongjax.aot.hlo import Program, hops, moves_of, traffic
from loongjax.aot.overlap import fold_flops, overlap, ring_step
from loongjax.costmodel.analytic import dense_flops_per_token
from loongjax.costmodel.hardware import HardwareDescription
from loongjax.kvcache.pool import padded_slots
from loongjax.plan import Group
from loongjax.programs.build import ProgramShapes
from loongjax.programs.spec import ProgramSpec

_KINDS = {
    "prefill": "prefill",
    "extend": "prefill_over_history",
    "decode": "decode",
    "migrate": "migrate",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HbmBytes:
    """Memory of one chip that a program takes: weights and pool, the rest, its code."""

    arguments: int
    temporaries: int
    code: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CompiledProgram:
    """One compiled program. All numbers are of one chip.

    Attributes:
      name: As the library calls it.
      kind: `prefill`, `prefill_over_history`, `decode` or `migrate`.
      degree: Instances that it runs on.
      bucket: Tokens of its step: prompt tokens or rows of all ranks together, or tokens that a
        rank sends to each other (migrate).
      placement: The one group that it runs on; None: any of its degree.
      compile_s: Lowering and compiling.
      hbm_bytes: Memory.
      flops: Of one step whose chunks or rows fill it, but for attention to KV in the pool, which
        has no compiled size. Attention of a chunk to itself is counted from the kernel's grid.
      compiler_flops: The same as the compiler adds it up, with one run of the loop over layers;
        None where it does not.
      collective_bytes: What it receives from others; a loop whose trips are known only when it
        runs counts as one.
      estimated_s: What such a step takes at the rates that programs attain on that chip: weights
        read or arithmetic, whatever is longer, and the communication that is not hidden.
      long: Whether attention of a ring step takes longer than its transfer, both at peak rates;
        None without a ring.
      overlap: The share of the ring's bytes whose hop is hidden; None without a ring.
      pool_copies: Instructions that copy the KV pool, or a layer of it.
    """

    name: str
    kind: str
    degree: int
    bucket: int
    placement: Group | None
    compile_s: float
    hbm_bytes: HbmBytes
    flops: float
    compiler_flops: float | None
    collective_bytes: int
    estimated_s: float
    long: bool | None
    overlap: float | None
    pool_copies: int


def describe(
    spec: ProgramSpec,
    shapes: ProgramShapes,
    hardware: HardwareDescription,
    *,
    hlo: Program,
    hbm_bytes: HbmBytes,
    compiler_flops: float | None,
    compile_s: float,
) -> CompiledProgram:
    """Puts together what is known of a compiled program."""
    sent = traffic(hlo).result_bytes.total()
    has_ring = spec.kind in ("prefill", "extend") and spec.degree > 1
    step = ring_step(shapes, hardware, spec.bucket) if has_ring else None
    hidden = None if step is None else overlap(hlo, hops(hlo), step)
    flops = step_flops(spec, shapes)
    hidden_bytes = (hidden or 0.0) * sum(hop.bytes * hop.runs for hop in hops(hlo))
    return CompiledProgram(
        name=spec.name,
        kind=_KINDS[spec.kind],
        degree=spec.degree,
        bucket=spec.bucket * (1 if spec.kind == "migrate" else spec.degree),
        placement=spec.placement,
        compile_s=compile_s,
        hbm_bytes=hbm_bytes,
        flops=flops,
        compiler_flops=compiler_flops,
        collective_bytes=sent,
        estimated_s=_seconds(spec, shapes, hardware, flops, sent - hidden_bytes),
        long=None if step is None else step.is_long,
        overlap=hidden,
        pool_copies=len(pool_copies(hlo, shapes)),
    )


def step_flops(spec: ProgramSpec, shapes: ProgramShapes) -> float:
    """Arithmetic of one rank's chip in a step that fills the program; see `CompiledProgram`."""
    if spec.kind == "migrate":
        return 0.0
    c = shapes.config
    unembedding = 2.0 * c.vocab_size * c.width
    layers = dense_flops_per_token(c) - unembedding
    dense = (spec.bucket * layers + spec.rows * unembedding) / shapes.tp
    if spec.kind == "decode":
        return dense
    return dense + c.layers * spec.degree * fold_flops(shapes, spec.bucket)


def pool_copies(hlo: Program, shapes: ProgramShapes) -> list[str]:
    """Instructions that make an array as large as a layer of the pool, and shaped like it."""
    c = shapes.config
    slots = padded_slots(shapes.slots, shapes.block_size)
    layer = slots * (c.kv_heads // shapes.tp) * c.head_dim
    return [text for text in moves_of(layer, hlo) if _has_dimension(text, slots)]


def collective_bytes(spec: ProgramSpec, shapes: ProgramShapes) -> int:
    """What one rank of an instance of one chip receives by design, in bytes: the formula that
    compiled programs are held against.

    prefill: the stripes' K and V round the ring in each layer, and the hidden states of sampled
    rows. Retention is not in it: it adds nothing.

    decode: q, k and v of all new tokens in each layer, their partial results (o and lse, float32),
    and the tokens of the step before.
    """
    c, n, size = shapes.config, spec.degree, shapes.dtype.itemsize
    if n == 1:
        return 0
    if spec.kind == "decode":
        rows = n * spec.rows
        new = rows * (c.heads + 2 * c.kv_heads) * c.head_dim * size
        partials = rows * c.heads * (c.head_dim + 1) * 4
        return c.layers * (new + partials) + rows * 4
    if spec.kind == "prefill":
        stripe = spec.bucket * 2 * c.kv_heads * c.head_dim * size
        return c.layers * (n - 1) * stripe + spec.rows * c.width * size
    raise ValueError(f"what a program of kind {spec.kind} sends depends on its run-time trips")


def _seconds(
    spec: ProgramSpec,
    shapes: ProgramShapes,
    hardware: HardwareDescription,
    flops: float,
    exposed_bytes: float,
) -> float:
    attained = hardware.attained
    exposed = exposed_bytes / (hardware.neighbour_bytes_per_s * attained.link)
    if spec.kind == "migrate":
        return exposed
    weights = dense_flops_per_token(shapes.config) / 2 / shapes.tp * shapes.dtype.itemsize
    return exposed + max(
        flops / (hardware.flops_per_s * attained.compute),
        weights / (hardware.hbm_bytes_per_s * attained.memory),
    )


def _has_dimension(text: str, size: int) -> bool:
    result = text.split(" = ", 1)[1].split("(", 1)[0] if " = " in text else text
    dimensions = result[result.find("[") + 1 : result.find("]")]
    return str(size) in dimensions.split(",")


def activation_bytes(spec: ProgramSpec, shapes: ProgramShapes) -> int:
    """One copy of what a rank's chip holds of a step beside weights and pool: residual stream,
    Q, K, V and the MLP's two inner products, in the dtype of weights, and the running softmax in
    float32. Compiled programs are held against it.
    """
    c, tp = shapes.config, shapes.tp
    kept = c.width + (c.heads + 2 * c.kv_heads) * c.head_dim // tp + 2 * c.ffn // tp
    softmax = c.heads // tp * (c.head_dim + 2) * 4
    return spec.bucket * (kept * shapes.dtype.itemsize + softmax)
