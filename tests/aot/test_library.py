"""A library's programs are compiled one by one, and a compiler that dies costs one of them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from loongjax.aot import library
from loongjax.aot.library import compile_library
from loongjax.aot.request import AotRequest
from loongjax.aot.worker import Job
from loongjax.errors import ConfigError, StepError

REQUEST = AotRequest(
    target="h100x8", model_shape="llama2-7b", degrees=(1, 2), layers=1, tensor_parallel=2
)


@pytest.fixture
def workers(monkeypatch):
    """Puts scripts in the place of the compilers; gives the jobs that they got."""
    jobs: list[Job] = []

    def use(size: str, program: str) -> list[Job]:
        def start(compiler, folder, arguments, **options):
            job = Job.from_json(arguments[-1])
            jobs.append(job)
            script = size if job.program is None else program
            return subprocess.Popen([sys.executable, "-c", script], text=True, **options)

        monkeypatch.setattr(library, "start", start)
        return jobs

    return use


SIZED = "print('noise'); print('{\"slots\": 4100}')"
DONE = f"print({json.dumps(json.dumps({'name': 'x', 'kind': 'decode'}))})"
DIES = (
    "import os, sys; print('F0000 check failed', file=sys.stderr); sys.stderr.flush(); os.abort()"
)


def test_every_program_of_the_catalogue_is_compiled_with_the_size_found(workers, tmp_path):
    jobs = workers(SIZED, DONE)
    seen = []
    report = compile_library(
        REQUEST,
        tmp_path,
        tmp_path,
        only=lambda name: name.startswith("decode"),
        on_progress=lambda done, total, what: seen.append((done, total)),
    )
    assert [job.slots for job in jobs] == [None, 4100, 4100, 4100, 4100, 4100, 4100]
    assert len(report.programs) == 6
    assert report.failed == {}
    assert report.kv_tokens == {"per_instance": 4096, "total": 4 * 4096}
    assert seen == [(done, 6) for done in range(7)]


def test_a_compiler_that_dies_costs_its_program_alone(workers, tmp_path):
    workers(SIZED, DIES)
    report = compile_library(REQUEST, tmp_path, tmp_path, only=lambda name: "migrate" in name)
    assert report.programs == []
    (words,) = report.failed.values()
    assert "does not compile for h100x8 (exit code -6)" in words
    assert "check failed" in words


def test_a_pool_that_does_not_fit_is_the_users_error(workers, tmp_path):
    workers('print(\'{"refused": "no room"}\')', DONE)
    with pytest.raises(ConfigError, match="no room"):
        compile_library(REQUEST, tmp_path, tmp_path)


def test_without_the_size_of_the_pool_nothing_goes_on(workers, tmp_path):
    jobs = workers(DIES, DONE)
    with pytest.raises(StepError, match="the size of the pool does not compile"):
        compile_library(REQUEST, tmp_path, tmp_path)
    assert len(jobs) == 1
