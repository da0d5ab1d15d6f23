from __future__ import annotations

import pytest

from loongjax.costmodel import ChunkWork, DecodeWork, calibrated_sib
from loongjax.costmodel.analytic import (
    analytic_sib,
    dense_flops_per_token,
    least_tensor_parallel,
    parameters,
    pool_slots,
)
from loongjax.costmodel.hardware import hardware_names, hardware_of, load_hardware
from loongjax.errors import ConfigError
from loongjax.models.random_weights import random_config

LLAMA = random_config("llama2-7b")


def estimate(name: str, tensor_parallel: int = 2):
    return analytic_sib(
        load_hardware(name),
        LLAMA,
        model_name="llama2-7b",
        tensor_parallel=tensor_parallel,
        degrees=(1, 2, 4),
    )


def test_the_promised_hardware_is_described_with_sources():
    assert hardware_names() == ("a100", "a800", "cpu", "h100", "v5e", "v5p", "v6e")
    for name in hardware_names():
        found = load_hardware(name)
        assert found.name == name
        assert found.sources
        assert found.assumptions
        assert 1e11 < found.flops_per_s < 1e16
        assert 1e10 < found.hbm_bytes < 1e12


def test_unknown_hardware_is_refused_with_the_known_names():
    with pytest.raises(ConfigError, match=r"'b200'.*a100.*v6e"):
        load_hardware("b200")


@pytest.mark.parametrize(
    ("kind", "platform", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "gpu", "a100"),
        ("NVIDIA H200", "gpu", "h100"),
        ("TPU v5 lite", "tpu", "v5e"),
        ("TPU v5", "tpu", "v5p"),
        ("TPU v6 lite", "tpu", "v6e"),
        ("cpu", "cpu", "cpu"),
        ("NVIDIA B200", "gpu", "a100"),
    ],
)
def test_a_device_is_known_by_its_kind_or_by_its_platform(kind, platform, name):
    assert hardware_of(kind, platform).name == name


def test_a_device_of_no_known_platform_is_refused():
    with pytest.raises(ConfigError, match="platform 'abacus'"):
        hardware_of("abacus", "abacus")


def test_a_model_of_7_billion_has_so_many_weights():
    assert parameters(LLAMA) == pytest.approx(6.74e9, rel=0.01)
    assert dense_flops_per_token(LLAMA) == pytest.approx(13.2e9, rel=0.01)


def test_the_estimate_of_an_a800_is_near_the_measured_one():
    """Work alike within a quarter; constants are those of other programs."""
    estimated, measured = estimate("a800"), calibrated_sib("a800", "llama2-7b", 2)
    assert measured is not None
    for degree in (1, 4):
        chunks = [ChunkWork(100_000, 0)]
        assert estimated.prefill(degree, chunks) == pytest.approx(
            measured.prefill(degree, chunks), rel=0.25
        )
        work = DecodeWork(rows=100, kv_tokens=400_000, masters=1)
        assert estimated.decode(degree, work) == pytest.approx(
            measured.decode(degree, work), rel=0.25
        )


@pytest.mark.parametrize("name", ["h100", "v5e"])
def test_more_instances_compute_faster_and_never_for_free(name):
    sib = estimate(name)
    long, short = [ChunkWork(50_000, 0)], [ChunkWork(1, 0)]
    assert sib.prefill(1, long) > sib.prefill(2, long) > sib.prefill(4, long)
    assert sib.prefill(4, long) > sib.prefill(1, long) / 4
    assert sib.prefill(4, short) > sib.prefill(1, short)
    rows = DecodeWork(rows=8, kv_tokens=16, masters=1)
    assert sib.decode(4, rows) > sib.decode(1, rows)


def test_tensor_parallelism_divides_reading_and_adds_reductions():
    one, four = estimate("a100", 1), estimate("a100", 4)
    assert four.decode_fits[1].kv_token_s == pytest.approx(one.decode_fits[1].kv_token_s / 4)
    assert four.decode_fits[1].master_row_s > one.decode_fits[1].master_row_s / 4


def test_memory_decides_how_many_chips_an_instance_has():
    v5e = load_hardware("v5e")
    assert least_tensor_parallel(v5e, LLAMA) == 2
    assert pool_slots(v5e, LLAMA, 2) == pytest.approx((0.9 * 32e9 - 13.5e9) / 2**19, rel=0.01)
    with pytest.raises(ConfigError, match="tensor parallelism"):
        pool_slots(v5e, random_config("llama3-70b"), 4)
