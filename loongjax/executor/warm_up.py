"""Makes all programs before the first request, so that no step waits for a compilation.

Every program of the catalogue is compiled or loaded, and bound to the groups of its degree;
then every group runs one empty step, which puts its views of the weights together and, on
GPU, has its communicators made. Where any subset of instances is a group there may be very
many: beyond a bound they are bound when they are first needed, which takes milliseconds, and
the log says so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import islice
from typing import TypeAlias

from loongjax.errors import StepError
from loongjax.executor.jax_executor import JaxExecutor
from loongjax.kvcache.messages import DecodeSlots
from loongjax.plan import DecodeStep, Group

_log = logging.getLogger(__name__)
_GROUPS_OF_A_DEGREE = 64
_PATIENCE_S = 600.0

OnProgress: TypeAlias = Callable[[int, int, str], object]
"""Called with what is done, of how much, and what comes next."""


def warm_up(executor: JaxExecutor, on_progress: OnProgress | None = None) -> None:
    """Makes the catalogue's programs and arms the guard; before any request is known.

    Raises StepError where an empty step fails.
    """
    started = time.monotonic()
    tell = on_progress or (lambda done, total, what: None)
    catalogue = executor.catalogue
    groups = {degree: _groups(executor, degree) for degree in catalogue.topology.degrees}
    work = [
        (spec, group)
        for spec in catalogue.specs
        for group in ([spec.placement] if spec.placement else groups[spec.degree])
    ]
    everyone = [group for some in groups.values() for group in some]
    total = len(work) + len(everyone)
    for done, (spec, group) in enumerate(work):
        tell(done, total, spec.name)
        executor.programs.get(spec, group)
    for done, group in enumerate(everyone, len(work)):
        tell(done, total, "first steps")
        _run_empty_step(executor, group, seq=done)
    tell(total, total, "")
    executor.programs.guard.armed = True
    counts = executor.program_counts
    _log.info(
        "warm-up: %d programs on %d groups in %.1f s (%d compiled, %d loaded, %d rebound)",
        *(len(catalogue.specs), len(everyone), time.monotonic() - started),
        *(counts.compiled, counts.loaded, counts.rebound),
    )


def _groups(executor: JaxExecutor, degree: int) -> list[Group]:
    """The groups of a degree that are warmed."""
    catalogue = executor.catalogue
    found = catalogue.topology.groups(degree)
    if catalogue.placed:  # each has programs of its own
        return list(found)
    warmed = list(islice(iter(found), _GROUPS_OF_A_DEGREE + 1))
    if len(warmed) > _GROUPS_OF_A_DEGREE:
        warmed.pop()
        _log.info(
            "warm-up binds %d groups of degree %d; others are bound when first needed",
            *(len(warmed), degree),
        )
    return warmed


def _run_empty_step(executor: JaxExecutor, group: Group, seq: int) -> None:
    step = DecodeStep(seq=seq, group=group, rows=())
    executor.submit(step, DecodeSlots(seq=seq, slots=(), positions=()))
    deadline = executor.now() + _PATIENCE_S
    while not (results := executor.poll(timeout=1.0)):
        if executor.now() > deadline:
            raise StepError(f"an empty step on group {group} did not end in {_PATIENCE_S} s")
    if results[0].error is not None:
        raise StepError(f"an empty step on group {group} failed: {results[0].error}")
