"""One simulation: jobs, a deployment and a policy in; what became of the jobs out.

Runs the engine's own loop, with its own state, validation and allocator, in the caller's
thread: what a policy does here, it does when it serves. Only the executor and the door, where
requests come in, are simulated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loongjax.engine.history import History
from loongjax.engine.loop import Loop
from loongjax.engine.state import State
from loongjax.errors import RequestError
from loongjax.executor.host_time import HostTime
from loongjax.kvcache import BlockAllocator
from loongjax.plan import InstanceId
from loongjax.scheduler.policy import Policy
from loongjax.simulator.deployment import Deployment
from loongjax.simulator.door import SimulatedDoor
from loongjax.simulator.executor import END, VirtualExecutor
from loongjax.simulator.jobs import Job, Outcome
from loongjax.simulator.ledger import Ledger


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What happened in a simulation.

    Attributes:
      outcomes: Of all jobs, in the order of their ends.
      history: The engine's records of it: steps, requests, use of the pool.
      started: When the first job came [s].
      last_arrival: When the last one came [s].
      ended: When the last one ended [s].
      steps: Steps that ran.
      preemptions: How often a request lost its KV to make room.
      scale_ups, scale_downs: See `ScalingCounter`.
      migrated_bytes: KV that moved between instances.
      busy_fraction: The part of all instances' time in which they worked.
      wall_s: What the simulation itself took [s].
    """

    outcomes: tuple[Outcome, ...]
    history: History
    started: float
    last_arrival: float
    ended: float
    steps: int
    preemptions: int
    scale_ups: int
    scale_downs: int
    migrated_bytes: int
    busy_fraction: float
    wall_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The engine's own parts around a simulated executor and door."""

    allocator: BlockAllocator
    door: SimulatedDoor
    executor: VirtualExecutor
    state: State
    history: History
    loop: Loop


def assemble(
    jobs: Sequence[Job],
    deployment: Deployment,
    policy: Policy,
    make_state: Callable[..., State] = State,
    drains: Sequence[tuple[float, InstanceId]] = (),
) -> Cluster:
    """Puts a simulation together, ready to serve; see `simulate`.

    Raises:
      RequestError: There are no jobs, or two with one id.
    """
    if not jobs:
        raise RequestError("there are no jobs to simulate; give at least one")
    allocator = BlockAllocator(
        instances=deployment.instances,
        slots=deployment.pool_slots,
        block_size=deployment.block_size,
    )
    door = SimulatedDoor(jobs, refusal=deployment.refusal, drains=drains)
    executor = VirtualExecutor(
        door=door,
        ledger=Ledger(allocator),
        cost=deployment.cost,
        host=deployment.cost.host,
        limits=deployment.limits,
        crowding=deployment.cost.crowding,
    )
    state = make_state(allocator=allocator, topology=deployment.topology, limits=deployment.limits)
    history = History()
    loop = Loop(
        executor=executor,
        policy=policy,
        state=state,
        front=door,
        history=history,
        host_time=HostTime(),
        eos_ids=frozenset({END}),
        vocab_size=END + 1,
    )
    return Cluster(
        allocator=allocator,
        door=door,
        executor=executor,
        state=state,
        history=history,
        loop=loop,
    )


def simulate(
    jobs: Sequence[Job],
    deployment: Deployment,
    policy: Policy,
    drains: Sequence[tuple[float, InstanceId]] = (),
) -> Run:
    """Runs all jobs to their end.

    Args:
      jobs: What comes.
      deployment: What serves it.
      policy: How.
      drains: When instances are taken out of use [s], for good: who has KV there goes on.

    Raises:
      PlanError: The policy broke a rule.
      IntegrityError: The books of the pool do not agree.
      StepError: The policy came to a standstill.
      RequestError: There are no jobs, or two with one id.
    """
    started = time.perf_counter()
    cluster = assemble(jobs, deployment, policy, drains=drains)
    allocator, door, executor = cluster.allocator, cluster.door, cluster.executor
    cluster.loop.serve()
    allocator.check_integrity()
    first = min(job.arrival for job in jobs)
    ended = max(outcome.end for outcome in door.outcomes)
    state, programs = cluster.state.published, executor.program_counts
    stats = cluster.history.stats(state, programs, (), alive=False)
    time_of_all = deployment.instances * max(executor.now() - first, 1e-9)
    return Run(
        outcomes=tuple(door.outcomes),
        history=cluster.history,
        started=first,
        last_arrival=max(job.arrival for job in jobs),
        ended=ended,
        steps=executor.steps,
        preemptions=stats.preemptions,
        scale_ups=executor.scaling.ups,
        scale_downs=executor.scaling.downs,
        migrated_bytes=executor.scaling.migrated_tokens * deployment.kv_bytes_per_token,
        busy_fraction=executor.busy_s / time_of_all,
        wall_s=time.perf_counter() - started,
    )
