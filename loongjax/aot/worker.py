"""Sizes a pool, or compiles one program, in a process of its own: compilers may abort.

    python -m loongjax.aot.worker JOB      inside the compiler's environment

JOB is one line of JSON (`Job`); one line of JSON answers it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from loongjax.aot.hlo import parse
from loongjax.aot.report import CompiledProgram, HbmBytes, describe
from loongjax.aot.request import AotPlan, AotRequest, plan_aot
from loongjax.cluster.mesh import GroupMeshes, grid_of
from loongjax.errors import UserError
from loongjax.executor.memory import MemoryPlan, given_slots
from loongjax.executor.program_plan import with_slots
from loongjax.executor.sizing import size_pool
from loongjax.programs.build import lower
from loongjax.programs.key import program_key
from loongjax.programs.library import serialize
from loongjax.programs.store import ProgramStore

_LEAST_EFFORT = -1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a worker has to do.

    Attributes:
      request: The server.
      out: The program library.
      program: The name of the program to compile; None: find the size of the pool.
      slots: KV slots of each instance; None: find them.
    """

    request: AotRequest
    out: str
    program: str | None = None
    slots: int | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Job:
        """The job of a line."""
        fields = json.loads(line)
        request = fields.pop("request")
        if request["degrees"] is not None:
            request["degrees"] = tuple(request["degrees"])
        return cls(request=AotRequest(**request), **fields)


def run(job: Job) -> Mapping[str, Any]:
    """Does a job. Raises UserError where what is asked for does not fit."""
    plan = plan_aot(job.request)
    if job.request.quick:
        jax.config.update("jax_exec_time_optimization_effort", _LEAST_EFFORT)
    meshes = _meshes(plan)
    with tempfile.TemporaryDirectory() as unkept:
        store = ProgramStore(Path(unkept if job.request.quick else job.out))
        if job.program is None:
            return {"slots": _size(plan, meshes, store).slots}
        assert job.slots is not None
        return asdict(_compile(plan, meshes, store, job.program, job.slots))


def _meshes(plan: AotPlan) -> GroupMeshes:
    devices = plan.target.devices()
    return GroupMeshes(grid_of(devices, plan.instances, plan.request.tensor_parallel))


def _size(plan: AotPlan, meshes: GroupMeshes, store: ProgramStore) -> MemoryPlan:
    shapes, catalogue = plan.programs.shapes, plan.programs.catalogue
    if plan.request.pool_slots is not None:
        return given_slots(plan.room, plan.request.pool_slots)
    return size_pool(plan.room, shapes, catalogue, meshes, store)


def _compile(
    plan: AotPlan, meshes: GroupMeshes, store: ProgramStore, name: str, slots: int
) -> CompiledProgram:
    catalogue = plan.programs.catalogue
    spec = next(spec for spec in catalogue.specs if spec.name == name)
    group = spec.placement or catalogue.topology.groups(spec.degree)[0]
    shapes, mesh = with_slots(plan.programs.shapes, slots), meshes[group]
    started = time.monotonic()
    program = lower(spec, shapes, mesh).compile()
    seconds = time.monotonic() - started
    memory = program.memory_analysis()
    cost = program.cost_analysis() or {}
    found = describe(
        spec,
        shapes,
        plan.hardware,
        hlo=parse(program.as_text(), layers=plan.model.layers),
        hbm_bytes=HbmBytes(
            arguments=memory.argument_size_in_bytes,
            temporaries=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
        ),
        compiler_flops=cost.get("flops"),
        compile_s=seconds,
    )
    device = np.asarray(mesh.devices).flat[0]
    store.save(program_key(spec, shapes, device), serialize(program, mesh))
    return found


def _main(line: str) -> None:
    try:
        answer = run(Job.from_json(line))
    except UserError as error:
        answer = {"refused": str(error)}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
