"""A small cluster with round times, and jobs for it."""

from __future__ import annotations

from dataclasses import replace

from loongjax.cluster.topology import EverySubset
from loongjax.costmodel.sib import HostTime
from loongjax.executor.protocol import ExecutorLimits
from loongjax.simulator import Deployment, Job
from tests.costmodel.sibs import toy_sib


def toy_deployment(
    *,
    instances: int = 2,
    slots: int = 4_096,
    block_size: int = 4,
    chunk: int = 2_048,
    host: HostTime | None = None,
) -> Deployment:
    """Times are those of `toy_sib`; no host time unless it is given."""
    sib = toy_sib(host=host)
    return Deployment(
        name="toy",
        topology=EverySubset(instances),
        pool_slots=slots,
        block_size=block_size,
        limits=ExecutorLimits(max_chunk_tokens=chunk, max_rows=64),
        cost=sib,
        reference=sib,
        reference_degree=instances,
        kv_bytes_per_token=100,
    )


def job(name: str, prompt: int = 50, output: int = 5, **fields: object) -> Job:
    """Arrives at 0 and may have up to 32 tokens, unless told otherwise."""
    made = Job(id=name, arrival=0.0, prompt=prompt, output=output, limit=max(32, output))
    return replace(made, **fields)  # type: ignore[arg-type]
