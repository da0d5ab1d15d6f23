"""What is refused before anything is compiled, and what a server on a target is."""

from __future__ import annotations

import pytest

from loongjax.aot.request import AotRequest, plan_aot
from loongjax.aot.worker import Job
from loongjax.errors import ConfigError, ModelError


def request(**changes) -> AotRequest:
    return AotRequest(**({"target": "v5p:2x2x2", "model_shape": "llama2-7b"} | changes))


def test_tpu_has_a_program_for_every_aligned_slice():
    plan = plan_aot(request())
    specs = plan.programs.catalogue.specs
    assert plan.instances == 8
    assert {spec.placement for spec in specs if spec.degree == 4} == {(0, 1, 2, 3), (4, 5, 6, 7)}
    assert plan.programs.shapes.attention_backend == "pallas-tpu"


def test_gpu_programs_serve_every_group_of_their_degree():
    plan = plan_aot(request(target="h100x8", tensor_parallel=2, degrees=(4, 1)))
    specs = plan.programs.catalogue.specs
    assert plan.instances == 4
    assert {(spec.degree, spec.placement) for spec in specs} == {(1, None), (4, None)}
    assert plan.room.available_bytes == 0.8 * plan.hardware.hbm_bytes


def test_layers_are_cut():
    assert plan_aot(request(layers=2)).programs.shapes.config.layers == 2


def test_chunks_may_be_as_long_as_requests():
    def chunk(**changes) -> int:
        plan = plan_aot(request(max_chunk_tokens=16_384, **changes))
        return plan.programs.catalogue.max_chunk_tokens

    assert chunk() == 4096
    assert chunk(max_model_len=524_288) == 16_384


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": "h200x8"}, ConfigError, "must be one of v5e:2x4, .*not 'h200x8'"),
        ({"model_shape": "gpt"}, ModelError, "no random model is called 'gpt'"),
        ({"layers": 33}, ConfigError, "has 32 layers, .*not 33"),
        ({"layers": 0}, ConfigError, "not 0"),
        ({"tensor_parallel": 3}, ConfigError, "8 chips, which do not divide into instances of 3"),
        (
            {"tensor_parallel": 2, "degrees": (8,)},
            ConfigError,
            "degree 8 of instances of 2 chips needs 16 chips, and v5p:2x2x2 has 8",
        ),
        ({"degrees": (3,)}, ConfigError, "no power of two"),
        (
            {"model_shape": "llama3-70b", "target": "v5e:2x4", "tensor_parallel": 8},
            ConfigError,
            "takes 17.6 GB of weights on each of the 8 chips of an instance, .* has 16.0 GB",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        plan_aot(request(**changes))


def test_a_job_survives_the_way_to_its_process():
    job = Job(request=request(degrees=(1, 8)), out="x", program="decode", slots=7)
    assert Job.from_json(job.to_json()) == job
