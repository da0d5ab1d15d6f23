"""Makes all programs before the first request, so that no step waits for a compilation.

Every program of the catalogue is compiled or loaded, and bound to a group; then to the other
groups of its degree, one group after the other. Every group that has its programs runs one empty
step, which puts its views of the weights together and, on GPU, has its communicators made. Where
any subset of instances is a group there may be very many: past a bound, or where no more code can
be mapped, they are bound when they are first needed, and the log says so. That takes milliseconds
for a small model, and seconds for a deep one on CPU.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice, takewhile
from typing import TypeAlias

from loongjax.errors import StepError
from loongjax.executor.jax_executor import JaxExecutor
from loongjax.kvcache.messages import DecodeSlots
from loongjax.plan import DecodeStep, Group
from loongjax.programs import mappings
from loongjax.programs.spec import ProgramSpec

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
    firsts, others = _work(executor)
    work = firsts | others
    total = sum(len(specs) + 1 for specs in work.values())  # each group runs a step
    done = 0
    bound: Counter[Group] = Counter()
    # Nothing is unbound to bind what may never be needed.
    for group, spec in chain(
        _pairs(firsts), takewhile(lambda _: mappings.has_room(), _pairs(others))
    ):
        tell(done, total, spec.name)
        executor.programs.get(spec, group)
        bound[group] += 1
        done += 1
    ready = [group for group, specs in work.items() if bound[group] == len(specs)]
    if unready := len(work) - len(ready):
        _log.warning(
            "warm-up: %d groups have no room for their programs (sysctl vm.max_map_count is %d); "
            "they are bound when first needed",
            *(unready, mappings.most_mappings()),
        )
    for group in ready:
        tell(done, total, "first steps")
        _run_empty_step(executor, group, seq=done)
        done += 1
    tell(total, total, "")
    executor.programs.guard.armed = True
    counts = executor.program_counts
    _log.info(
        "warm-up: %d programs on %d groups in %.1f s (%d compiled, %d loaded, %d rebound)",
        *(len(executor.catalogue.specs), len(ready), time.monotonic() - started),
        *(counts.compiled, counts.loaded, counts.rebound),
    )


def _pairs(work: Mapping[Group, Sequence[ProgramSpec]]) -> Iterator[tuple[Group, ProgramSpec]]:
    return ((group, spec) for group, specs in work.items() for spec in specs)


def _work(
    executor: JaxExecutor,
) -> tuple[dict[Group, list[ProgramSpec]], dict[Group, list[ProgramSpec]]]:
    """What is to be bound to which groups: all that has to be made, and what is only rebound."""
    catalogue = executor.catalogue
    firsts: dict[Group, list[ProgramSpec]] = {}
    others: dict[Group, list[ProgramSpec]] = {}
    for degree in catalogue.topology.degrees:
        specs = [spec for spec in catalogue.specs if spec.degree == degree]
        first, *rest = _groups(executor, degree)
        if catalogue.placed:
            for group in (first, *rest):
                firsts[group] = [spec for spec in specs if spec.placement == group]
        else:
            firsts[first] = specs
            others |= dict.fromkeys(rest, specs)
    return firsts, others


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
