"""Compiles a whole program library for hardware that is not here.

Every program is compiled in a process of its own, several at a time: a compiler that aborts costs
one program, which the report then names.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from loongjax.aot.compilers import start
from loongjax.aot.request import AotPlan, AotRequest, plan_aot
from loongjax.aot.targets import Compiler
from loongjax.aot.worker import Job
from loongjax.errors import ConfigError, StepError

_LAST_WORDS = 10  # lines
_PATIENCE_S = 3600.0

OnProgress: TypeAlias = Callable[[int, int, str], object]
"""Called with how many programs are done, of how many, and which came last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AotReport:
    """What was compiled.

    Attributes:
      target: For what.
      programs: Each program as `loongjax.aot.report.CompiledProgram`, in the catalogue's order.
      kv_tokens: That fit beside weights and programs: `per_instance` and in `total`.
      failed: The programs that did not compile, and the compiler's last words.
    """

    target: str
    programs: Sequence[Mapping[str, Any]]
    kv_tokens: Mapping[str, int]
    failed: Mapping[str, str]


def compile_library(
    request: AotRequest,
    out: Path,
    compilers: Path,
    *,
    jobs: int = 1,
    only: Callable[[str], bool] = lambda name: True,
    on_progress: OnProgress = lambda done, total, what: None,
) -> AotReport:
    """Sizes the pool and compiles the catalogue's programs into a program library.

    Args:
      request: The server.
      out: The library's folder.
      compilers: Where the compilers are installed.
      jobs: Processes at a time.
      only: Chooses programs by name, for a quick look.
      on_progress: Told of each program.

    Raises:
      ConfigError: As `plan_aot`; a compiler that is not installed; no memory for a pool.
      StepError: The compiler died while the pool was sized.
    """
    plan = plan_aot(request)
    names = [spec.name for spec in plan.programs.catalogue.specs if only(spec.name)]
    on_progress(0, len(names), "size of the pool")
    slots = _size(plan, out, compilers)
    found: dict[str, Mapping[str, Any]] = {}
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        work = {
            pool.submit(
                _answer,
                Job(request=request, out=str(out), program=name, slots=slots),
                plan.target.compiler,
                compilers,
            ): name
            for name in names
        }
        try:
            for done, future in enumerate(as_completed(work), 1):
                name = work[future]
                try:
                    found[name] = future.result()
                except StepError as error:
                    failed[name] = str(error)
                on_progress(done, len(names), name)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    usable = slots // request.block_size * request.block_size
    return AotReport(
        target=plan.target.name,
        programs=[found[name] for name in names if name in found],
        kv_tokens={"per_instance": usable, "total": usable * plan.instances},
        failed=failed,
    )


def _size(plan: AotPlan, out: Path, compilers: Path) -> int:
    job = Job(request=plan.request, out=str(out))
    return int(_answer(job, plan.target.compiler, compilers)["slots"])


def _answer(job: Job, compiler: Compiler, compilers: Path) -> Mapping[str, Any]:
    """What a worker answers.

    Raises ConfigError for what it refuses, and StepError, with its last words, where it died.
    """
    process = start(
        compiler,
        compilers,
        ["-m", "loongjax.aot.worker", job.to_json()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = process.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        err = f"not done after {_PATIENCE_S:g} s"
        out = ""
    finally:
        process.kill()
        process.wait()
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode != 0 or not lines:
        words = "\n".join(err.strip().splitlines()[-_LAST_WORDS:])
        raise StepError(
            f"{job.program or 'the size of the pool'} does not compile for {job.request.target} "
            f"(exit code {process.returncode}):\n{words}"
        )
    answer: Mapping[str, Any] = json.loads(lines[-1])
    if "refused" in answer:
        raise ConfigError(str(answer["refused"]))
    return answer
