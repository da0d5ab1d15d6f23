"""Two made-up seconds in the life of four instances, told in step records.

A long prompt is read by all four and kept on two, which then decode; a short one is served
beside it; the long one's KV is moved together on one instance; a step fails; at the end the
long one's group grows over its neighbour's head.
"""

from __future__ import annotations

from loongjax.engine import PoolSample, RequestRecord, StepRecord
from loongjax.plan import Group, Share
from loongjax.timeline import Timeline

START = 1000.0
"""When the first step is launched [s, engine clock]: clocks do not start at 0."""
SLOTS = 2048


def prefill(
    seq: int,
    group: Group,
    begin: float,
    end: float,
    *requests: str,
    kept: dict[int, int],
    error: str | None = None,
) -> StepRecord:
    return StepRecord(
        seq=seq,
        kind="prefill",
        group=group,
        requests=requests,
        tokens=sum(kept.values()),
        kept=tuple(Share(*share) for share in sorted(kept.items())),
        started=START + begin,
        ended=START + end,
        error=error,
    )


def decode(
    seq: int,
    group: Group,
    begin: float,
    end: float,
    *requests: str,
    master: int | None = None,
    error: str | None = None,
) -> StepRecord:
    master = group[0] if master is None else master
    return StepRecord(
        seq=seq,
        kind="decode",
        group=group,
        requests=requests,
        tokens=len(requests),
        kept=(Share(master, len(requests)),),
        masters=(master,) * len(requests),
        started=START + begin,
        ended=START + end,
        error=error,
    )


def decodes(
    seq: int, count: int, group: Group, begin: float, each: float, *requests: str, **more: int
) -> list[StepRecord]:
    """`count` decode steps, with a little time of the host's between them."""
    return [
        decode(seq + i, group, begin + i * each, begin + (i + 0.9) * each, *requests, **more)
        for i in range(count)
    ]


def migrate(
    seq: int, group: Group, begin: float, end: float, request: str, target: int, tokens: int
) -> StepRecord:
    return StepRecord(
        seq=seq,
        kind="migrate",
        group=group,
        requests=(request,),
        tokens=tokens,
        kept=(Share(target, tokens),),
        started=START + begin,
        ended=START + end,
    )


def steps() -> list[StepRecord]:
    """Every kind of step, in one list."""
    return [
        prefill(0, (0, 1, 2, 3), 0.0, 0.8, "long", kept={0: 900, 1: 700}),
        *decodes(1, 30, (0, 1), 0.82, 0.02, "long"),
        prefill(31, (2,), 0.85, 1.05, "short", kept={2: 300}),
        *decodes(32, 20, (2,), 1.06, 0.015, "short"),
        prefill(52, (3,), 0.9, 1.2, "unlucky", kept={3: 500}, error="StepError: lost a chip"),
        migrate(53, (0, 1), 1.43, 1.55, "long", target=0, tokens=700),
        decode(54, (0,), 1.56, 1.6, "long"),
        prefill(55, (1, 3), 1.58, 1.9, "unlucky", "late", kept={1: 600, 3: 500}),
        *decodes(56, 10, (0, 2), 1.62, 0.025, "long", master=2),
        *decodes(66, 10, (1, 3), 1.92, 0.02, "unlucky", "late", master=3),
    ]


def requests() -> list[RequestRecord]:
    """The four requests; one of them is open still."""

    def request(
        name: str, prompt: int, arrival: float, first: float, token: float, end: float
    ) -> RequestRecord:
        return RequestRecord(
            id=name,
            prompt=prompt,
            generated=20,
            reason="length",
            arrival=START + arrival,
            first_scheduled=START + first,
            first_token=START + token,
            end=START + end,
        )

    return [
        request("long", 1600, -0.01, 0.0, 0.8, 1.87),
        request("short", 300, 0.3, 0.85, 1.05, 1.36),
        request("unlucky", 500, 0.88, 0.9, 1.9, 2.12),
        RequestRecord(id="late", prompt=600, generated=10, arrival=START + 1.2),
    ]


def pool() -> list[PoolSample]:
    """How the steps and ends of requests change the pool's use."""
    changes = [
        (0.0, 0, 900), (0.0, 1, 700), (0.85, 2, 300), (0.9, 3, 500), (1.2, 3, 0), (1.36, 2, 0),
        (1.43, 0, 1630), (1.55, 1, 0), (1.58, 1, 600), (1.58, 3, 500), (1.62, 2, 16),
        (1.87, 0, 0), (1.87, 2, 0), (2.12, 3, 10),
    ]  # fmt: skip
    return [PoolSample(START + time, instance, used) for time, instance, used in changes]


def timeline() -> Timeline:
    """All of it."""
    return Timeline.from_steps(
        steps(), instances=4, pool_slots=SLOTS, pool=pool(), requests=requests()
    )
