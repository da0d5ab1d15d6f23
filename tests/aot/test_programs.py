"""Programs of a model of 7B width, compiled for every target by its own compiler.

For each: a prefill with retention, a chunk over history and a decode program, on half of the chips,
two layers deep, or eight on GPU, where layers are unrolled and could pile up. On TPU only the
prefill gets the compiler's whole effort, most of a minute, without which hops are not hidden. The
first run installs the compilers, some hundred megabytes; they stay.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from loongjax.aot.compilers import default_folder, install, start
from loongjax.aot.report import activation_bytes, collective_bytes, step_flops
from loongjax.aot.request import AotRequest, plan_aot
from loongjax.aot.targets import TARGETS, Target
from loongjax.aot.worker import Job
from loongjax.executor.program_plan import with_slots

NAMES = ("prefill-d4-t4096", "extend-d4-t8192", "decode-d4-t8")
SLOTS = 65_536  # a layer's keys do not fit into a chip's own memory, where XLA would put them
# All in one process for each target: starting one takes longer than some programs.
COMPILE = """
import json, sys
from loongjax.aot.worker import Job, run
for line in sys.argv[1:]:
    print(json.dumps(run(Job.from_json(line))), flush=True)
"""


def server(target: Target) -> AotRequest:
    return AotRequest(
        target=target.name,
        model_shape="llama3-8b",
        degrees=(4,),
        layers=2 if target.compiler == "tpu" else 8,
        max_chunk_tokens=8192,
        pool_slots=SLOTS,
    )


def is_quick(target: Target, kind: str) -> bool:
    return target.compiler == "tpu" and kind != "prefill"


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def compiled(request, tmp_path_factory):
    """Target, plan, and what is known of each program, with its spec."""
    target = request.param
    install(target.compiler, default_folder())
    plan = plan_aot(server(target))
    every = plan.programs.catalogue.specs
    specs = [next(spec for spec in every if spec.name.startswith(name)) for name in NAMES]
    out = str(tmp_path_factory.mktemp("library"))
    jobs = [
        Job(
            request=replace(plan.request, quick=is_quick(target, spec.kind)),
            out=out,
            program=spec.name,
            slots=SLOTS,
        ).to_json()
        for spec in specs  # prefill first: effort is lowered for the rest of the process
    ]
    process = start(
        target.compiler,
        default_folder(),
        ["-c", COMPILE, *jobs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    lines, err = process.communicate()
    found = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
    assert len(found) == len(specs), err[-2000:]
    kept = sum(not is_quick(target, spec.kind) for spec in specs)
    assert len(list(Path(out).glob("*.program"))) == kept
    return target, plan, dict(zip(specs, found, strict=True))


def test_what_compilers_say_of_a_servers_programs(compiled):
    target, plan, found = compiled
    shapes = with_slots(plan.programs.shapes, SLOTS)
    for spec, program in found.items():
        temporaries = program["hbm_bytes"]["temporaries"]
        assert program["pool_copies"] == 0, spec.name
        if spec.kind == "decode":
            assert program["overlap"] is None
            logits = 4 * spec.rows * shapes.config.vocab_size
            assert temporaries < shapes.config.width**2 + 8 * logits  # no weight is copied
        else:
            assert temporaries <= 2 * activation_bytes(spec, shapes), spec.name
            assert program["long"], spec.name
            if not is_quick(target, spec.kind):
                assert program["overlap"] == 1.0, spec.name
        if spec.kind != "extend":  # whose transfers depend on how much history there is
            assert program["collective_bytes"] == collective_bytes(spec, shapes), spec.name
        if spec.kind == "prefill" and target.compiler == "tpu":  # Triton's work is not counted
            counted = program["compiler_flops"]  # of one of the layers
            assert counted == pytest.approx(step_flops(spec, shapes) / 2, rel=0.01)
