"""The service `loongjax.v1.Cluster`: the elastic instances, to watch and to steer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from loongjax.engine import StepRecord
from loongjax.errors import RequestError
from loongjax.plan import Group, Step, step_requests
from serving.grpc.guarding import Context
from serving.steering import Steering
from serving.steps import StepFeed
from serving.stubs import cluster_pb2 as pb
from serving.stubs import cluster_pb2_grpc as pb_grpc

_LEAST_INTERVAL_S = 0.1
_KINDS = {
    "prefill": pb.STEP_KIND_PREFILL,
    "decode": pb.STEP_KIND_DECODE,
    "migrate": pb.STEP_KIND_MIGRATE,
}


class ClusterServicer(pb_grpc.ClusterServicer):
    """See the module, and `protos/loongjax/v1/cluster.proto`."""

    def __init__(self, steering: Steering, feed: StepFeed) -> None:
        self._steering = steering
        self._engine = steering.engine
        self._feed = feed

    async def Watch(self, request: pb.WatchRequest, context: Context) -> None:
        interval_s = request.interval_s or 1.0
        if not _LEAST_INTERVAL_S <= interval_s < float("inf"):
            raise RequestError(
                f"interval_s must be a time of at least {_LEAST_INTERVAL_S} s, not {interval_s}"
            )
        while True:
            await context.write(self._state())
            await asyncio.sleep(interval_s)

    async def WatchSteps(self, request: pb.WatchStepsRequest, context: Context) -> None:
        with self._feed.follow() as steps:
            await context.send_initial_metadata(())  # tells the client when "from now on" is
            async for record in steps:
                await context.write(_step(record))

    async def DrainInstance(
        self, request: pb.DrainInstanceRequest, context: Context
    ) -> pb.DrainInstanceResponse:
        self._engine.drain(request.instance)
        return pb.DrainInstanceResponse()

    async def ResumeInstance(
        self, request: pb.ResumeInstanceRequest, context: Context
    ) -> pb.ResumeInstanceResponse:
        self._engine.resume(request.instance)
        return pb.ResumeInstanceResponse()

    async def SetPolicy(
        self, request: pb.SetPolicyRequest, context: Context
    ) -> pb.SetPolicyResponse:
        return pb.SetPolicyResponse(previous=self._steering.set_policy(request.policy))

    async def GetCostModel(
        self, request: pb.GetCostModelRequest, context: Context
    ) -> pb.GetCostModelResponse:
        return pb.GetCostModelResponse(json=self._steering.cost_model_json())

    def _state(self) -> pb.ClusterState:
        stats = self._engine.stats()
        return pb.ClusterState(
            time=self._engine.now(),
            instances=[
                pb.Instance(id=each.id, slots=each.slots, used=each.used, is_draining=each.draining)
                for each in stats.instances
            ],
            groups=_groups(self._engine.in_flight),
            waiting=stats.waiting,
            running=stats.running,
            policy=self._steering.policy,
        )


def _groups(steps: Sequence[Step]) -> list[pb.Group]:
    """Who works together now; of steps that are queued behind each other, the first one runs."""
    running: dict[Group, Step] = {}
    for step in steps:
        running.setdefault(step.group, step)
    return [
        pb.Group(instances=group, requests=step_requests(step)) for group, step in running.items()
    ]


def _step(record: StepRecord) -> pb.Step:
    return pb.Step(
        seq=record.seq,
        kind=_KINDS[record.kind],
        group=record.group,
        requests=record.requests,
        tokens=record.tokens,
        kept=[pb.KeptTokens(instance=share.instance, tokens=share.tokens) for share in record.kept],
        masters=record.masters,
        started=record.started,
        ended=record.ended,
        error=record.error or "",
    )
