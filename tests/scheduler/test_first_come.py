"""What `FirstCome` decides, case by case."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loongjax.cluster.topology import AlignedSlices, EverySubset, Neighbours
from loongjax.errors import ConfigError
from loongjax.plan import (
    Chunk,
    DecodeStep,
    InstanceView,
    PrefillStep,
    RequestView,
    Share,
    Snapshot,
    Topology,
    step_requests,
)
from loongjax.scheduler import validate
from loongjax.scheduler.policies.first_come import FirstCome
from tests.scheduler.first_come_rig import begin, chunks, engine, homes, run_until, submit
from tests.scheduler.virtual_engine import decodes, prefills


def snapshot_of(
    topology: Topology,
    instances: list[tuple[int, int | None, int | None]],
    *,
    running: tuple[RequestView, ...],
    waiting: tuple[RequestView, ...] = (),
) -> Snapshot:
    """Instances of 8 slots, as (free slots, busy_seq, prefill_seq)."""
    return Snapshot(
        version=0,
        next_seq=8,
        block_size=1,
        max_chunk_tokens=64,
        max_rows=4,
        waiting=waiting,
        running=running,
        instances=tuple(
            InstanceView(id=i, slots=8, free_slots=free, busy_seq=busy, prefill_seq=prompt)
            for i, (free, busy, prompt) in enumerate(instances)
        ),
        in_flight=frozenset(),
        topology=topology,
    )


# ---- degree --------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "degree"), [(2, 1), (16, 1), (17, 2), (48, 3), (64, 4)])
def test_degree_is_the_smallest_that_keeps_ranks_under_the_limit(prompt: int, degree: int) -> None:
    it = engine()
    submit(it, "a", prompt)
    assert [len(step.group) for step in it.plan()] == [degree]


def test_prompt_beyond_the_limit_at_every_degree_gets_the_largest() -> None:
    it = engine(slots=1000)
    submit(it, "a", 200)
    assert it.plan()[0].group == (0, 1, 2, 3)


def test_prompt_takes_fewer_instances_while_other_prompts_keep_them_busy() -> None:
    it = engine()
    submit(it, "a", 20)
    it.plan()
    submit(it, "b", 64)
    assert [step.group for step in it.plan()] == [(2, 3)]


def test_prompt_that_no_step_of_the_idle_ones_holds_begins_with_a_part() -> None:
    it = engine(max_chunk_tokens=16)
    submit(it, "a", 16)
    it.plan()
    submit(it, "b", 64)
    (step,) = it.plan()
    assert step.group == (1, 2, 3)
    assert step.chunks == (Chunk(request="b", start=0, length=48, last=False),)


def test_prompt_waits_for_decode_steps_rather_than_take_fewer_instances() -> None:
    it = engine(pick=lambda steps: 0)
    for name in "abcd":
        submit(it, name, 2)
    begin(it, *"abcd")
    assert len(decodes(it.plan())) == 4
    submit(it, "long", 64)
    while len(it.flying) > 1:
        it.end_one()
        assert it.plan() == ()  # what is idle is kept for it, and nothing is queued any more
    it.end_one()
    assert [step.group for step in it.plan()] == [(0, 1, 2, 3)]


def test_put_off_decodes_run_even_on_instances_that_are_kept_for_a_prompt() -> None:
    it = engine(2, slots=64)
    submit(it, "wide", 30, tokens=60)
    begin(it, "wide")
    assert homes(it, "wide") == (0, 1)
    submit(it, "short", 2, tokens=1)
    assert [len(step.group) for step in it.plan()] == [1]  # puts `wide` off
    submit(it, "long", 32, tokens=1)
    it.end_one()
    assert [step_requests(step) for step in it.plan()] == [("wide",)]
    it.end_one()
    assert [step_requests(step) for step in it.plan()] == [("long",)]
    assert it.preempted == []


def test_prompt_begins_only_where_it_can_end() -> None:
    """Of six instances, aligned slices of four are the first four alone."""
    it = engine(AlignedSlices(6), slots=16, headroom=0)
    for i in range(4):
        submit(it, f"r{i}", 2, tokens=3)
    begin(it, "r3")
    submit(it, "large", 10, tokens=30)  # needs three, though 4 and 5 are free now
    it.run()
    groups = {step.group for _, plan in it.plans for step in plan.steps}
    assert (4,) not in groups
    assert it.preempted == []


def test_prompt_that_lacks_memory_on_few_instances_gets_more() -> None:
    it = engine(slots=8, headroom=0)
    submit(it, "a", 12, tokens=2)
    (step,) = it.plan()
    assert len(step.group) == 2


def test_degrees_are_those_that_exist() -> None:
    it = engine(AlignedSlices(8))
    submit(it, "a", 40)  # wants 3
    assert it.plan()[0].group == (0, 1, 2, 3)
    it = engine(EverySubset(4, (2,)))
    submit(it, "a", 2, tokens=3)
    assert len(it.plan()[0].group) == 2
    it.run()


# ---- packing and order ---------------------------------------------------------------


def test_short_prompts_are_spread_over_idle_instances() -> None:
    it = engine(2)
    for i in range(4):
        submit(it, f"r{i}", 4)
    assert [step_requests(step) for step in it.plan()] == [("r0", "r1"), ("r2", "r3")]


def test_short_prompts_share_an_instance_while_a_long_one_needs_many() -> None:
    it = engine()
    for i in range(3):
        submit(it, f"r{i}", 3)
    submit(it, "long", 48)
    assert [(step.group, step_requests(step)) for step in it.plan()] == [
        ((0,), ("r0", "r1", "r2")),
        ((1, 2, 3), ("long",)),
    ]


def test_prompts_are_packed_up_to_the_limits_of_a_step() -> None:
    it = engine(1, slots=10_000, tokens_per_rank=1024, max_chunk_tokens=20, max_rows=4)
    for i in range(4):
        submit(it, f"long{i}", 9)
    assert [step_requests(step) for step in it.plan()] == [("long0", "long1")]
    it = engine(1, slots=10_000, tokens_per_rank=1024, max_chunk_tokens=20, max_rows=4)
    for i in range(6):
        submit(it, f"short{i}", 2)
    assert len(step_requests(it.plan()[0])) == 4


def test_nobody_overtakes_the_first_in_line() -> None:
    it = engine(1, slots=40)
    submit(it, "runs", 20, tokens=4)
    begin(it, "runs")
    submit(it, "large", 30, tokens=2)
    submit(it, "small", 2, tokens=2)
    (step,) = it.plan()
    assert step_requests(step) == ("runs",)  # there is room for `small`, but not for `large`
    it.end_one()
    it.run()
    assert it.finished == ["runs", "large", "small"]


def test_priority_goes_before_arrival() -> None:
    it = engine(1)
    submit(it, "early", 16)
    submit(it, "urgent", 16, priority=1)
    assert step_requests(it.plan()[0]) == ("urgent",)


# ---- retention -----------------------------------------------------------------------


def test_kv_is_kept_on_the_fewest_instances() -> None:
    it = engine()
    submit(it, "a", 64)
    (step,) = it.plan()
    assert step.group == (0, 1, 2, 3)
    assert [share.tokens for share in step.keep[0].shares] == [64]
    it.end_one()
    assert [len(step.group) for step in it.plan()] == [1]


def test_kv_of_a_request_that_outgrows_an_instance_is_balanced() -> None:
    it = engine(slots=64, block_size=4)
    submit(it, "a", 63, tokens=60)  # peak 122: needs two
    (step,) = it.plan()
    assert sorted(share.tokens for share in step.keep[0].shares) == [31, 32]
    assert step.keep[0].shares[-1].tokens == 31  # the partly filled block comes last
    it.run()


def test_kv_joins_instances_that_decode_already() -> None:
    it = engine(2)
    submit(it, "a", 4)
    begin(it, "a")
    submit(it, "b", 32)
    (step,) = prefills(it.plan())
    assert step.group == (0, 1)
    assert [share.instance for share in step.keep[0].shares] == list(homes(it, "a"))


# ---- decode --------------------------------------------------------------------------


def test_requests_that_share_an_instance_decode_together_with_masters_spread() -> None:
    it = engine(2, slots=64, tokens_per_rank=64, max_rows=3)
    submit(it, "wide", 76, tokens=20)
    begin(it, "wide")
    assert homes(it, "wide") == (0, 1)  # it may outgrow one
    for i in range(4):
        submit(it, f"r{i}", 2, tokens=5)
    begin(it, *(f"r{i}" for i in range(4)))
    (step,) = it.plan()
    assert isinstance(step, DecodeStep)
    assert step.group == (0, 1)
    assert sorted(step_requests(step)) == ["r0", "r1", "r2", "r3", "wide"]
    masters = [row.master for row in step.rows]
    assert sorted(map(masters.count, (0, 1))) == [2, 3]


def test_master_is_where_most_of_the_kv_lies() -> None:
    it = engine(2)
    submit(it, "a", 4)
    submit(it, "b", 4)
    begin(it, "a", "b")
    for step in it.plan():
        assert [(row.master, row.home) for row in step.rows] == [(step.group[0],) * 2]


def test_more_requests_than_rows_take_turns() -> None:
    it = engine(1, max_rows=2)
    for i in range(5):
        submit(it, f"r{i}", 2, tokens=20)
    run_until(it, "r4", 8)
    assert len(it.jobs) == 5
    counts = sorted(job.generated for job in it.jobs.values())
    assert counts[-1] - counts[0] <= 1


def test_groups_are_filled_up_with_instances_that_nobody_needs() -> None:
    fields = {"prompt": 2, "max_tokens": 4, "arrival": 0.0, "computed": 2, "generated": 1}
    one = RequestView(id="one", kv=(Share(2, 2),), last_seq=1, **fields)
    other = RequestView(id="other", kv=(Share(0, 2),), last_seq=2, **fields)
    instances = [(6, None, None), (8, None, None), (6, None, None), (8, None, None)]
    snapshot = snapshot_of(EverySubset(4, (2,)), instances, running=(one, other))
    plan = FirstCome().schedule(0.0, snapshot)
    validate(snapshot, plan)
    assert [step_requests(step) for step in plan.steps] == [("one",), ("other",)]


def test_group_grows_for_rows() -> None:
    fields = {"prompt": 1, "max_tokens": 3, "arrival": 0.0, "computed": 1, "generated": 1}
    views = tuple(RequestView(id=f"r{i}", kv=(Share(0, 1),), **fields) for i in range(5))
    instances = [(3, None, None), (8, None, None)]
    snapshot = snapshot_of(EverySubset(2), instances, running=views)
    (step,) = FirstCome().schedule(0.0, snapshot).steps
    assert step.group == (0, 1)  # a rank has 4 rows
    assert len(step.rows) == 5


def test_token_stays_in_the_partly_filled_block() -> None:
    it = engine(2, block_size=4, slots=32)
    submit(it, "a", 13, tokens=5)
    submit(it, "b", 2, tokens=12)
    begin(it, "a", "b")
    before = homes(it, "a")
    run_until(it, "a", 3)
    assert homes(it, "a") == before


def test_group_grows_when_memory_is_short_and_keeps_old_homes() -> None:
    it = engine(3, slots=16, headroom=0)
    for name in "abc":
        submit(it, name, 8, tokens=20 if name == "c" else 6)
    begin(it, "c")
    (before,) = homes(it, "c")
    run_until(it, "c", 12)
    assert before in homes(it, "c")
    assert len(homes(it, "c")) == 2
    assert it.allocator.used_slots(before) == 16
    assert it.preempted == []


def test_whole_pool_is_used_at_block_size_one() -> None:
    it = engine(4, slots=8, tokens_per_rank=2, headroom=256)
    for i in range(4):
        submit(it, f"r{i}", 2, tokens=7)  # 8 slots each at the end
    it.run()
    assert it.fullest == 4 * 8
    assert it.preempted == []
    it = engine(4, slots=8, tokens_per_rank=2)
    submit(it, "a", 2, tokens=31)
    it.run()
    assert it.fullest == 4 * 8


def test_uneven_requests_fill_the_pool_across_instances() -> None:
    it = engine(4, slots=8, tokens_per_rank=64)
    submit(it, "small", 2, tokens=10)
    submit(it, "large", 12, tokens=10)  # 11 + 21 slots at the end
    it.run()
    assert it.fullest == 4 * 8
    assert it.preempted == []


# ---- preemption ----------------------------------------------------------------------


def test_last_in_line_makes_room_and_is_computed_anew() -> None:
    it = engine(1, slots=20, headroom=0)
    for name in "abc":
        submit(it, name, 4, tokens=12)
    it.run()
    assert it.preempted[0] == "c"
    assert "a" not in it.preempted
    assert sorted(it.finished) == ["a", "b", "c"]
    assert it.finished[0] == "a"


def test_last_in_line_waits_rather_than_preempt_its_elders() -> None:
    it = engine(1, slots=20, headroom=0, block_size=4)
    submit(it, "old", 4, tokens=12)  # fills 4 blocks in the end, which leaves 1
    submit(it, "young", 4, tokens=9)
    it.run()
    assert it.preempted == ["young"]  # once `old` needs the room, and not before
    assert it.finished == ["old", "young"]


def test_headroom_prevents_preemption() -> None:
    it = engine(1, slots=20)
    for name in "abc":
        submit(it, name, 4, tokens=12)
    it.run()
    assert it.preempted == []


def test_request_longer_than_a_step_is_computed_anew_in_chunks() -> None:
    it = engine(1, slots=20, headroom=0, max_chunk_tokens=6)
    submit(it, "a", 4, tokens=12)
    submit(it, "b", 4, tokens=12)
    it.run()
    assert it.preempted == ["b"]
    assert it.finished == ["a", "b"]
    again = [chunk for chunk in chunks(it, "b") if chunk.start + chunk.length > 4]
    assert [(chunk.start, chunk.last) for chunk in again] == [(0, False), (6, True)]


# ---- fairness ------------------------------------------------------------------------


def test_decodes_and_an_endless_stream_of_prompts_take_turns() -> None:
    it = engine(1)
    submit(it, "d", 2, tokens=50)
    begin(it, "d")
    kinds = []
    for i in range(20):
        submit(it, f"p{i}", 16, tokens=1)
        (step,) = it.plan()
        kinds.append(type(step))
        it.end_one()
    assert kinds == [PrefillStep, DecodeStep] * 10


def test_request_on_two_instances_is_not_kept_from_running_by_others_on_each() -> None:
    """Decodes of different lengths on each of its instances would never be idle together."""
    it = engine(2, slots=64, pick=lambda steps: len(it.plans))
    submit(it, "wide", 30, tokens=60)
    begin(it, "wide")
    assert homes(it, "wide") == (0, 1)
    served = it.jobs["wide"].generated
    for i in range(30):
        submit(it, f"p{i}", 2, tokens=3)
        it.plan()
        it.end_one()
    assert "wide" not in it.jobs or it.jobs["wide"].generated >= served + 7


def test_who_has_no_room_does_not_keep_prompts_from_instances_that_others_could_free() -> None:
    """`late` waits for memory of `early`, `early` would wait for instance 2, and that would be
    kept for `prompt`: so `prompt` must not wait for `late`, whom a prompt on 1 has put off.
    """
    late = RequestView(
        id="late", prompt=11, max_tokens=4, arrival=2.0, computed=12, generated=2, last_seq=1,
        kv=(Share(0, 8), Share(1, 4)),
    )  # fmt: skip
    early = RequestView(
        id="early", prompt=4, max_tokens=4, arrival=1.0, computed=6, generated=3, last_seq=6,
        kv=(Share(1, 4), Share(2, 2)),
    )  # fmt: skip
    snapshot = snapshot_of(
        Neighbours(4, (1, 2)),
        [(0, None, None), (0, None, 5), (6, None, 5), (8, 7, 7)],
        running=(early, late),
        waiting=(RequestView(id="prompt", prompt=6, max_tokens=1, arrival=3.0),),
    )
    plan = FirstCome(tokens_per_rank=3, headroom=0).schedule(0.0, snapshot)
    validate(snapshot, plan)
    assert [(step.group, step_requests(step)) for step in plan.steps] == [((1, 2), ("prompt",))]


def test_overlapping_requests_take_turns_where_no_group_holds_both() -> None:
    it = engine(Neighbours(4, (1, 2)), slots=8, tokens_per_rank=4, headroom=0)
    for i in range(4):
        submit(it, f"r{i}", 4, tokens=13 if i % 2 else 9)
    it.run()
    assert len(it.finished) == 4


# ---- the object ----------------------------------------------------------------------


def test_same_snapshot_gets_the_same_plan() -> None:
    it = engine(2, slots=16, headroom=0)
    for i in range(6):
        submit(it, f"r{i}", 3 + i, tokens=6)
    it.run()
    for snapshot, plan in it.plans:
        assert it.policy.schedule(7.0, snapshot) == plan


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="tokens_per_rank must be at least 1, not 0"):
        FirstCome(tokens_per_rank=0)
    with pytest.raises(ConfigError, match="headroom must not be negative, got -1"):
        FirstCome(headroom=-1)


def test_scheduler_imports_no_jax() -> None:
    code = (
        "import loongjax.scheduler, loongjax.scheduler.policies.first_come, sys;"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
