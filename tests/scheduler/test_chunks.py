"""How `FirstCome` computes prompts that are longer than a step, and keeps their memory."""

from __future__ import annotations

from loongjax.cluster.topology import EverySubset
from loongjax.plan import (
    DecodeStep,
    InstanceView,
    Plan,
    PrefillStep,
    RequestView,
    Share,
    Snapshot,
    step_requests,
)
from loongjax.scheduler import validate
from loongjax.scheduler.policies.first_come import FirstCome
from tests.scheduler.first_come_rig import begin, chunks, engine, homes, run_until, submit
from tests.scheduler.virtual_engine import prefills


def test_long_prompt_is_computed_in_chunks_over_its_own_kv() -> None:
    it = engine(max_chunk_tokens=8, slots=40)
    submit(it, "a", 75, tokens=2)  # needs two instances
    it.run()
    assert [(c.start, c.length, c.last) for c in chunks(it, "a")] == [
        (0, 32, False),
        (32, 32, False),
        (64, 11, True),
    ]
    assert it.jobs == {}


def test_chunks_follow_each_other_onto_the_same_instances() -> None:
    it = engine(max_chunk_tokens=8, slots=60, block_size=4)
    submit(it, "a", 75, tokens=30)  # two of four instances hold all that it needs
    begin(it, "a")
    assert len(homes(it, "a")) == 2
    degrees = [len(step.group) for _, plan in it.plans for step in prefills(plan.steps)]
    assert degrees == [4, 4, 2]  # the rest needs no more
    assert it.allocator.whereabouts("a").holes == ()


def test_partly_filled_block_is_filled_by_the_next_chunk() -> None:
    it = engine(1, max_chunk_tokens=6, slots=40, block_size=4)
    submit(it, "a", 15, tokens=2)
    begin(it, "a")
    assert it.allocator.used_slots(0) == 16
    assert it.allocator.whereabouts("a").holes == ()


def test_last_token_of_a_prompt_may_come_with_a_decode_step() -> None:
    it = engine(1, max_chunk_tokens=8)
    submit(it, "a", 9, tokens=3)
    begin(it, "a")
    assert [type(plan.steps[0]) for _, plan in it.plans] == [PrefillStep, DecodeStep]


def test_everybody_gets_a_token_between_two_chunks() -> None:
    it = engine(1, max_chunk_tokens=8)
    submit(it, "d", 2)
    begin(it, "d")
    submit(it, "long", 30)
    kinds = []
    for _ in range(8):
        (step,) = it.plan()
        kinds.append(type(step))
        it.end_one()
    assert kinds == [PrefillStep, DecodeStep] * 4


def test_begun_prompt_goes_before_all_who_were_not() -> None:
    it = engine(1, max_chunk_tokens=8)
    submit(it, "long", 12)
    it.plan()
    submit(it, "urgent", 2, priority=1)
    it.end_one()
    (step,) = it.plan()
    assert step_requests(step) == ("long", "urgent")
    assert [chunk.start for chunk in step.chunks] == [8, 0]


def test_memory_of_a_begun_prompt_is_not_given_to_others() -> None:
    it = engine(2, slots=32, max_chunk_tokens=8, headroom=0)
    submit(it, "long", 40, tokens=2)
    it.plan()
    submit(it, "other", 24, tokens=2)
    it.end_one()
    it.run()
    assert it.preempted == []
    assert it.finished == ["long", "other"]


def test_begun_prompt_takes_its_memory_back_from_those_behind_it() -> None:
    """The other one has taken two slots between its chunks, and would have no room to end."""
    it = engine(1, slots=20, max_chunk_tokens=4, headroom=0, steps_ahead=0)
    submit(it, "behind", 4, tokens=16)
    run_until(it, "behind", 5)
    submit(it, "first", 12, tokens=2, priority=1)
    it.run()
    assert it.preempted == ["behind"]
    assert it.finished == ["first", "behind"]
    assert [chunk.start for chunk in chunks(it, "first")] == [0, 4, 8]


def test_begun_prompt_waits_for_its_elders_or_makes_room_for_them() -> None:
    it = engine(1, slots=20, max_chunk_tokens=4, headroom=0)
    for name in "wxyz":
        submit(it, name, 1, tokens=5)  # 20 slots in the end
    begin(it, *"wxyz")
    submit(it, "last", 12, tokens=2)
    it.run()
    assert it.finished[-1] == "last"
    assert it.preempted == ["last"]


# ---- single plans --------------------------------------------------------------------


def request(name: str, prompt: int, *shares: tuple[int, int], **fields: object) -> RequestView:
    """Begun, or decoding where all of its prompt has KV."""
    computed = sum(tokens for _, tokens in shares)
    return RequestView(
        id=name,
        prompt=prompt,
        max_tokens=9,
        computed=computed,
        generated=int(computed == prompt),
        kv=tuple(Share(*share) for share in shares),
        **{"arrival": 1.0, "last_seq": 3} | fields,
    )


def plan_of(*views: RequestView, instances: list[tuple[int, int | None]], slots: int = 16) -> Plan:
    """Of instances as (free slots, step of its prefill in flight), and steps of 4 tokens each."""
    snapshot = Snapshot(
        version=0,
        next_seq=8,
        block_size=1,
        max_chunk_tokens=4,
        max_rows=4,
        waiting=tuple(view for view in views if view.uncomputed > 1),
        running=tuple(view for view in views if view.uncomputed == 1),
        instances=tuple(
            InstanceView(id=i, slots=slots, free_slots=free, busy_seq=busy, prefill_seq=busy)
            for i, (free, busy) in enumerate(instances)
        ),
        in_flight=frozenset(),
        topology=EverySubset(len(instances)),
    )
    plan = FirstCome(headroom=0).schedule(0.0, snapshot)
    validate(snapshot, plan)
    return plan


def test_begun_prompt_does_not_wait_behind_another_one() -> None:
    """`one` waits for instance 0, and 1 is kept for it."""
    views = (request("one", 12, (0, 4)), request("two", 12, (2, 4), arrival=2.0), request("new", 2))
    plan = plan_of(*views, instances=[(12, 7), (16, None), (12, None)])
    assert [(step.group, step_requests(step)) for step in plan.steps] == [((2,), ("two",))]


def test_nobody_gives_memory_back_before_the_prompt_can_use_it() -> None:
    """Instance 0 is kept for it until 1 is idle too."""
    views = (request("begun", 24, (0, 8), (1, 8)), request("behind", 7, (0, 7), arrival=2.0))
    plan = plan_of(*views, instances=[(1, None), (6, 7)])
    assert plan == Plan()
    plan = plan_of(*views, instances=[(1, None), (6, None)])
    assert plan.preempt == ("behind",)
    assert [step_requests(step) for step in plan.steps] == [("begun",)]


def test_nobody_gives_memory_back_while_it_would_not_be_enough() -> None:
    views = (
        request("elder", 9, (0, 9), arrival=0.0),
        request("begun", 12, (0, 4)),
        request("behind", 1, (0, 1), arrival=2.0),
    )
    plan = plan_of(*views, instances=[(2, None)])
    assert plan.preempt == ()
    assert [step_requests(step) for step in plan.steps] == [("elder", "behind")]
