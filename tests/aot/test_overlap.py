"""When a hop counts as hidden, and what a ring step is by the chip's numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loongjax.aot.hlo import Hop, hops, parse
from loongjax.aot.kernel_cases import KernelCase
from loongjax.aot.kernels import kernels_on
from loongjax.aot.overlap import ATTENTION, fold_flops, overlap, ring_step
from loongjax.aot.report import step_flops
from loongjax.aot.request import AotRequest, plan_aot
from loongjax.aot.roofline import grid_work, least_work
from loongjax.aot.targets import TARGETS
from loongjax.costmodel.hardware import load_hardware
from pallas_kernels.backends import kernels_of
from tests.aot.test_hlo import KNOWN

PROGRAM = parse(KNOWN.replace("fold", ATTENTION))


def plan(target="v5e:2x4", shape="llama3-8b"):
    return plan_aot(AotRequest(target=target, model_shape=shape, layers=1))


def step(target, shape, tokens):
    found = plan(target, shape)
    return ring_step(found.programs.shapes, found.hardware, tokens)


def test_half_of_the_ring_is_hidden():
    long = step("v5e:2x4", "llama3-8b", 2048)
    assert long.is_long
    assert overlap(PROGRAM, hops(PROGRAM), long) == 0.5
    assert overlap(PROGRAM, [], long) is None


def test_attention_that_is_shorter_than_the_transfer_hides_nothing():
    short = step("v5e:2x4", "llama3-8b", 512)
    assert not short.is_long
    whole = replace(short, bytes=hops(PROGRAM)[0].bytes)
    assert overlap(PROGRAM, hops(PROGRAM), whole) == 0.0


def test_all_kernels_beside_a_hop_count_together():
    short = step("v5e:2x4", "llama3-8b", 512)
    (work,) = hops(PROGRAM)[0].between
    hop = Hop(bytes=short.bytes, runs=1, between=(work,) * 4)
    assert overlap(PROGRAM, [hop], short) == 1.0
    assert overlap(PROGRAM, [replace(hop, between=(work,))], short) == 0.0


@pytest.mark.parametrize(
    ("target", "shape", "least"),
    [
        ("v5e:2x4", "llama2-7b", 8192),
        ("v5e:2x4", "llama3-8b", 1024),
        ("a100x8", "llama3-8b", 512),
        ("h100x8", "llama2-7b", 8192),
    ],
)
def test_from_which_stripe_on_attention_hides_the_ring(target, shape, least):
    long = [t for t in (512, 1024, 2048, 4096, 8192) if step(target, shape, t).is_long]
    assert long[0] == least
    assert long == [t for t in (512, 1024, 2048, 4096, 8192) if t >= least]


@pytest.mark.parametrize("target", ["v5e:2x4", "h100x8"])
def test_the_kernel_says_the_work_that_its_grid_has(target):
    """The cost estimate that the compiler gets, against the tiles counted here."""
    shapes = plan(target).programs.shapes
    case = KernelCase(kernel="striped_attention")
    flops = grid_work(case, kernels_of(shapes.attention_backend, shapes.chip)).flops
    assert flops == fold_flops(shapes, case.tokens)


def test_a_prefill_steps_arithmetic_is_products_and_attention():
    found = plan(shape="llama2-7b")
    catalogue, shapes = found.programs.catalogue, found.programs.shapes
    group = catalogue.topology.groups(8)[0]
    spec = catalogue.prefill(group, 1024)
    layer = 4096 * 4096 * 4 + 3 * 4096 * 11008
    dense = 2 * (layer * 1024 + 32_000 * 4096 * spec.rows)
    assert step_flops(spec, shapes) == dense + 8 * fold_flops(shapes, 1024)
    assert step_flops(catalogue.migrate(group), shapes) == 0


def test_a_grid_does_little_more_than_the_least():
    """At 128K tokens and degree 8 tiles compute at most 10 % more than what is visible."""
    case = KernelCase(kernel="striped_attention", tokens=16_384)
    least = least_work(case)
    assert least.flops == 4 * 32 * 128 * 16_384 * 16_385 // 2
    kernels = [kernels_on(target, case) for target in TARGETS]
    for each in (*kernels, kernels_of("pallas-hopper")):
        assert 1.0 < grid_work(case, each).flops / least.flops < 1.1, each.backend
    hardware = load_hardware("v5e")
    assert least.seconds(hardware) == least.flops / hardware.flops_per_s


def test_writing_moves_each_token_in_and_out():
    case = KernelCase(kernel="kv_write", tokens=64)
    assert grid_work(case, kernels_of("pallas-tpu")) == least_work(case)
    assert least_work(case).bytes == 2 * 64 * 8 * 128 * 2
