"""Which decodes of `LoongServe` go on by themselves (`Plan.ahead`), so that devices do not wait
for plans, nor plans cost time, while there is nothing to decide.

Nobody goes on while a prompt waits for anything but memory: whether it is worth a pause is asked
again after every step. Memory alone is free when somebody ends, and then everything is planned
anew. Nor do decodes go on beside one that has no step and could get one from their instances.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from loongjax.costmodel.protocol import CostModel
from loongjax.plan import DecodeStep, Group, InstanceId, RequestId, RequestView, step_requests
from loongjax.scheduler.policies.seats import groups_in_flight, larger_degrees, parts
from loongjax.scheduler.policies.worktable import Worktable
from loongjax.scheduler.scaling import scale_up


def groups_to_go_on(
    table: Worktable, planned: Sequence[DecodeStep], *, grows: bool, cost: CostModel
) -> frozenset[Group]:
    """Groups that decode by this plan, or already, and may go on as they are.

    Args:
      table: As the whole plan leaves it; no prompt waits for instances.
      planned: The plan's decode steps.
      grows: Whether groups grow for compute.
      cost: Predicts decode times.
    """
    seated = {name for step in planned for name in step_requests(step)}
    wanted = _wanted(table, seated)
    going = {step.group for step in planned if wanted.isdisjoint(step.group)}
    if not table.soon:
        return frozenset(going)
    quiet = frozenset(filter(table.is_empty, table.idle)) if grows else frozenset()
    for group, rows in groups_in_flight(table.snapshot, table.soon).items():
        if wanted.isdisjoint(group) and _stays(table, group, rows, quiet, cost):
            going.add(group)
    return frozenset(going)


def _wanted(table: Worktable, seated: Set[RequestId]) -> set[InstanceId]:
    """Instances that somebody who decodes, and has no step, waits for."""
    found: set[InstanceId] = set()
    for view in table.resting:
        if view.id not in seated and view.id not in table.stuck:
            found |= view.homes if view.tail is not None else table.reach(view.homes)
    return found


def _stays(
    table: Worktable,
    group: Group,
    rows: Sequence[RequestView],
    quiet: frozenset[InstanceId],
    cost: CostModel,
) -> bool:
    """Whether these would be planned again on this group, with `quiet` instances to be had."""
    topology, least = table.snapshot.topology, -(-len(rows) // table.snapshot.max_rows)
    size = len(group)
    if size > 1:
        together = parts(view.homes for view in rows)
        cover = topology.smallest_cover(together[0], frozenset(group), least)
        if cover is None or len(together) > 1:
            return False
        size = len(cover)
    elif least > 1:
        return False
    degrees = larger_degrees(topology, size, len(group) + len(quiet))
    if not degrees:
        return size == len(group)
    tokens = sum([view.computed for view in rows])
    return scale_up(len(rows), tokens, size, degrees, cost) == len(group)
