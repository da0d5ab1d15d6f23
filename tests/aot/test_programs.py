"""Programs of a model of 7B width, compiled for every target by its own compiler.

One prefill with retention, one chunk over history and one decode program each, one layer deep. The
first run installs the compilers, some hundred megabytes; they are kept.
"""

from __future__ import annotations

import pytest

from loongjax.aot.compilers import default_folder, install
from loongjax.aot.library import compile_library
from loongjax.aot.report import activation_bytes, collective_bytes, step_flops
from loongjax.aot.request import AotRequest, plan_aot
from loongjax.aot.targets import TARGETS
from loongjax.executor.program_plan import with_slots

NAMES = ("prefill-d8-t4096", "extend-d8-t8192", "decode-d8-t8")
SLOTS = 16_384


@pytest.fixture(scope="module")
def compilers():
    found = default_folder()
    for compiler in ("tpu", "cuda"):
        install(compiler, found)
    return found


def server(target: str) -> AotRequest:
    return AotRequest(
        target=target,
        model_shape="llama3-8b",
        degrees=(8,),
        layers=1,
        max_chunk_tokens=8192,
        pool_slots=SLOTS,
    )


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def compiled(request, tmp_path_factory, compilers):
    out = tmp_path_factory.mktemp("library")
    report = compile_library(
        server(request.param.name), out, compilers, only=lambda name: name.startswith(NAMES)
    )
    assert report.failed == {}
    assert len(list(out.glob("*.program"))) == len(NAMES)
    return request.param, {each["name"]: each for each in report.programs}


def test_what_compilers_say_of_a_servers_programs(compiled):
    target, found = compiled
    plan = plan_aot(server(target.name))
    shapes = with_slots(plan.programs.shapes, SLOTS)
    specs = {spec.name: spec for spec in plan.programs.catalogue.specs}
    assert len(found) == len(NAMES)
    for name, program in found.items():
        spec = specs[name]
        assert program["pool_copies"] == 0, name
        assert program["hbm_bytes"]["temporaries"] <= 2 * activation_bytes(spec, shapes), name
        if spec.kind == "decode":
            assert program["overlap"] is None
        else:
            assert program["long"], name
            assert program["overlap"] == 1.0, name
        if spec.kind != "extend":  # whose transfers depend on how much history there is
            assert program["collective_bytes"] == collective_bytes(spec, shapes), name
        if spec.kind == "prefill" and target.compiler == "tpu":  # Triton's work is not counted
            assert program["compiler_flops"] == pytest.approx(step_flops(spec, shapes), rel=0.01)
