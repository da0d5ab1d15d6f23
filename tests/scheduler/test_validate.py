"""Every rule of a plan, broken once; and that what the rules allow, the allocator can do."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from loongjax.cluster.topology import EverySubset
from loongjax.errors import PlanError
from loongjax.kvcache import BlockAllocator
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    Group,
    InstanceView,
    MigrateStep,
    Move,
    Placement,
    Plan,
    PrefillStep,
    Rejection,
    RequestView,
    Share,
    Snapshot,
    Step,
)
from loongjax.scheduler import validate

SEQ = 412
BLOCK = 4


def request(name: str, prompt: int = 10, **fields: object) -> RequestView:
    return RequestView(id=name, prompt=prompt, **({"max_tokens": 20, "arrival": 0.0} | fields))


WAITS = request("waits")
BEGUN = request("begun", computed=6, kv=(Share(1, 6),), tail=Share(1, 2))
RUNS = request("runs", computed=10, generated=1, kv=(Share(0, 8), Share(3, 2)), tail=Share(3, 2))
FULL = request("full", prompt=8, computed=8, generated=1, kv=(Share(0, 8),))
FLIES = request("flies", computed=10, generated=1, kv=(Share(2, 10),), tail=Share(2, 2))
SNAPSHOT = Snapshot(
    version=1,
    next_seq=SEQ,
    block_size=BLOCK,
    max_chunk_tokens=16,
    max_rows=2,
    waiting=(WAITS, BEGUN),
    running=(RUNS, FULL, FLIES),
    instances=(
        InstanceView(id=0, slots=32, free_slots=16),
        InstanceView(id=1, slots=32, free_slots=24),
        InstanceView(id=2, slots=32, free_slots=20, busy_seq=411),
        InstanceView(id=3, slots=32, free_slots=28),
    ),
    in_flight=frozenset({"flies"}),
    topology=EverySubset(4, (1, 2, 4)),
)


def prefill(
    *placements: Placement, group: Group = (0, 1), seq: int = SEQ, **changes: object
) -> PrefillStep:
    """Whole prompts of the waiting requests, kept as said; `changes` go to the last chunk."""
    views = {view.id: view for view in (*SNAPSHOT.waiting, *SNAPSHOT.running)}
    chunks = []
    for placement in placements:
        view = views.get(placement.request, WAITS)
        chunk = Chunk(
            request=placement.request, start=view.computed, length=view.uncomputed, last=True
        )
        chunks.append(chunk)
    chunks[-1] = replace(chunks[-1], **changes)
    return PrefillStep(seq=seq, group=group, chunks=tuple(chunks), keep=placements)


def place(name: str, *shares: tuple[int, int]) -> Placement:
    return Placement(request=name, shares=tuple(Share(*share) for share in shares))


def decode(*rows: tuple[str, int, int], group: Group = (0, 3), seq: int = SEQ) -> DecodeStep:
    return DecodeStep(seq=seq, group=group, rows=tuple(DecodeRow(*row) for row in rows))


def migrate(
    *moves: tuple[str, int, int, int], group: Group = (0, 3), seq: int = SEQ
) -> MigrateStep:
    return MigrateStep(seq=seq, group=group, moves=tuple(Move(*move) for move in moves))


def check(*steps: Step, snapshot: Snapshot = SNAPSHOT, **parts: object) -> None:
    validate(snapshot, Plan(steps=steps, **parts))


def refuses(message: str, *steps: Step, snapshot: Snapshot = SNAPSHOT, **parts: object) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        check(*steps, snapshot=snapshot, **parts)


def with_free(instance: int, slots: int) -> Snapshot:
    views = list(SNAPSHOT.instances)
    views[instance] = replace(views[instance], free_slots=slots)
    return replace(SNAPSHOT, instances=tuple(views))


def with_more_room(snapshot: Snapshot, slots: int) -> Snapshot:
    instances = tuple(
        replace(view, slots=view.slots + slots, free_slots=view.free_slots + slots)
        for view in snapshot.instances
    )
    return replace(snapshot, instances=instances)


def allows(allocator: BlockAllocator, step: Step) -> bool:
    try:
        allocator.apply(step)
    except PlanError:
        return False
    return True


def with_waiting(*views: RequestView) -> Snapshot:
    return replace(SNAPSHOT, waiting=views)


WAITS_KEPT = place("waits", (0, 4), (1, 6))
RUNS_ROW = ("runs", 0, 3)


def test_good_plans_pass() -> None:
    check()
    check(prefill(WAITS_KEPT))
    check(prefill(place("begun", (1, 4)), group=(1,)))
    check(decode(RUNS_ROW, ("full", 3, 0)))
    check(decode(RUNS_ROW), prefill(place("waits", (1, 10)), group=(1,), seq=SEQ + 1))
    check(migrate(("runs", 3, 0, 2), ("full", 0, 3, 5)))
    check(migrate(("begun", 1, 0, 6), ("runs", 0, 1, 3), group=(0, 1)))  # 'runs' is on 3 too
    check(preempt=("runs", "begun"), reject=(Rejection("waits", "too late"),))


def test_full_message_says_what_is_wrong_and_what_mends_it() -> None:
    refuses(
        "step 412 (DecodeStep): group (0, 1) lacks instance 3, which holds 2 KV tokens of request "
        "'runs'. Add 3 to the group.",
        decode(("runs", 0, 0), group=(0, 1)),
    )


# ---- every step ----------------------------------------------------------------------


def test_seqs_are_consecutive() -> None:
    refuses("step 413 (DecodeStep): its seq should be 412", decode(RUNS_ROW, seq=413))
    refuses(
        "step 412 (PrefillStep): its seq should be 413",
        decode(RUNS_ROW),
        prefill(place("waits", (1, 10)), group=(1,)),
    )


@pytest.mark.parametrize("group", [(0, 1, 3), (3, 0), (0, 0), (0, 4), ()])
def test_group_exists(group: Group) -> None:
    refuses(f"group {group} does not exist", decode(RUNS_ROW, group=group))


def test_groups_of_a_plan_are_disjoint() -> None:
    refuses(
        "step 413 (PrefillStep): group (0, 1) shares instance 0 with step 412 of this plan",
        decode(RUNS_ROW),
        prefill(WAITS_KEPT, seq=413),
    )


def test_busy_instances_are_left_alone() -> None:
    refuses(
        "instance 2 of group (1, 2) is busy with step 411",
        prefill(place("waits", (1, 10)), group=(1, 2)),
    )


# ---- requests ------------------------------------------------------------------------


def test_requests_exist() -> None:
    refuses("there is no request 'ghost'", decode(("ghost", 0, 0)))


def test_request_is_planned_once() -> None:
    refuses("request 'runs' is in step 412 too", decode(RUNS_ROW, RUNS_ROW))
    begun = place("begun", (1, 4))
    refuses("request 'begun' is in step 412 too", prefill(begun, begun))


def test_request_in_flight_is_left_alone() -> None:
    idle = tuple(replace(view, busy_seq=None) for view in SNAPSHOT.instances)
    refuses(
        "a step in flight works on request 'flies'",
        decode(("flies", 2, 2), group=(2,)),
        snapshot=replace(SNAPSHOT, instances=idle),
    )


def test_decode_is_for_those_who_run_but_a_prefill_step_may_carry_them_along() -> None:
    refuses("request 'waits' does not run", decode(("waits", 0, 0)))
    validate(SNAPSHOT, Plan(steps=(prefill(place("full", (0, 1))),)))


def test_step_works_on_something() -> None:
    refuses("it works on no request", decode())
    refuses("it works on no request", PrefillStep(seq=SEQ, group=(0,), chunks=(), keep=()))


def test_preempted_or_rejected_requests_are_in_no_step() -> None:
    refuses("'runs' is preempted or rejected in this plan", decode(RUNS_ROW), preempt=("runs",))
    refuses(
        "'waits' is preempted or rejected in this plan",
        prefill(WAITS_KEPT),
        reject=(Rejection("waits", "late"),),
    )


# ---- prefill -------------------------------------------------------------------------


def test_chunk_starts_where_the_kv_ends() -> None:
    refuses(
        "the chunk of request 'begun' starts at token 5, but its KV has 6 tokens",
        prefill(place("begun", (1, 4)), start=5),
    )


@pytest.mark.parametrize("length", [0, 11])
def test_chunk_takes_what_is_left(length: int) -> None:
    refuses(
        f"the chunk of request 'waits' has {length} tokens; 10 are left",
        prefill(WAITS_KEPT, length=length),
    )


def test_last_is_said_of_the_last_chunk_alone() -> None:
    refuses("says last=False. Set last=True", prefill(WAITS_KEPT, last=False))
    refuses("ends at token 4 of 10, but says last=True", prefill(WAITS_KEPT, length=4))


def test_placements_match_chunks() -> None:
    step = prefill(WAITS_KEPT)
    refuses("but placements of ()", replace(step, keep=()))
    refuses("but placements of ('begun',)", replace(step, keep=(place("begun", (1, 10)),)))


def test_placement_keeps_every_token_once() -> None:
    refuses("keeps 9 of 10 tokens", prefill(place("waits", (0, 4), (1, 5))))
    refuses("names an instance twice: [0, 0]", prefill(place("waits", (0, 4), (0, 6))))
    refuses("keeps 0 tokens on instance 1", prefill(place("waits", (0, 10), (1, 0))))
    refuses(
        "group (0, 1) lacks instance 3, which is to keep 10 tokens of request 'waits'",
        prefill(place("waits", (3, 10))),
    )


def test_group_of_a_chunk_holds_the_earlier_kv() -> None:
    refuses(
        "group (0,) lacks instance 1, which holds 6 KV tokens of request 'begun'",
        prefill(place("begun", (0, 4)), group=(0,)),
    )


def test_chunk_tokens_for_each_rank_are_limited_padding_counted() -> None:
    odd = [request(f"odd{i}", prompt=7) for i in range(4)]
    snapshot = replace(with_waiting(*odd), max_rows=8)
    step = PrefillStep(
        seq=SEQ,
        group=(0, 1),
        chunks=tuple(Chunk(request=v.id, start=0, length=7, last=True) for v in odd),
        keep=tuple(place(v.id, (i % 2, 7)) for i, v in enumerate(odd)),
    )
    check(step, snapshot=snapshot)  # 4 chunks of ceil(7 / 2) = 4
    refuses(
        "each rank gets 16 tokens (every chunk padded to a multiple of 2); the limit is 15",
        step,
        snapshot=replace(snapshot, max_chunk_tokens=15),
    )


def test_number_of_chunks_is_limited() -> None:
    short = [request(f"short{i}", prompt=2) for i in range(3)]
    step = PrefillStep(
        seq=SEQ,
        group=(0,),
        chunks=tuple(Chunk(request=v.id, start=0, length=2, last=True) for v in short),
        keep=tuple(place(v.id, (0, 2)) for v in short),
    )
    refuses("3 chunks exceed 2 (2 for each of 1 ranks)", step, snapshot=with_waiting(*short))


# ---- decode --------------------------------------------------------------------------


def test_master_and_home_are_in_the_group() -> None:
    refuses("group (0, 3) lacks instance 1, the master of request 'runs'", decode(("runs", 1, 3)))
    refuses("group (0, 3) lacks instance 1, the home of request 'runs'", decode(("runs", 0, 1)))


def test_rows_of_a_master_are_limited() -> None:
    views = [request(f"r{i}", computed=10, generated=1, kv=(Share(0, 10),)) for i in range(3)]
    snapshot = replace(SNAPSHOT, running=tuple(views))
    rows = [(view.id, 0, 3) for view in views]
    refuses("instance 0 is master of 3 rows; the limit is 2", decode(*rows), snapshot=snapshot)
    check(decode(*rows[:2], ("r2", 3, 3)), snapshot=snapshot)


# ---- capacity ------------------------------------------------------------------------


def test_new_blocks_fit_what_is_free() -> None:
    step = prefill(WAITS_KEPT)  # 1 block on instance 0, 2 on instance 1
    check(step, snapshot=with_free(1, 8))
    refuses(
        "instance 1 would need 8 slots in new blocks of 4, and has 4",
        step,
        snapshot=with_free(1, 4),
    )


def test_token_in_the_partly_filled_block_needs_no_room() -> None:
    check(decode(RUNS_ROW), snapshot=with_free(3, 0))
    refuses(
        "instance 0 would need 4 slots in new blocks of 4, and has 0",
        decode(("runs", 0, 0)),  # away from its tail
        snapshot=with_free(0, 0),
    )
    refuses("instance 0 would need 4", decode(("full", 0, 0)), snapshot=with_free(0, 0))


def test_only_the_first_share_fills_the_partly_filled_block() -> None:
    check(prefill(place("begun", (1, 2), (0, 2))), snapshot=with_free(1, 0))
    refuses(
        "instance 1 would need 4 slots",
        prefill(place("begun", (0, 2), (1, 2))),
        snapshot=with_free(1, 0),
    )


def test_blocks_of_preempted_requests_are_free() -> None:
    step = decode(("full", 0, 0), group=(0,))
    check(step, snapshot=with_free(0, 0), preempt=("runs",))
    refuses("instance 0 would need 4", step, snapshot=with_free(0, 0), preempt=("begun",))


def test_blocks_are_counted_as_the_allocator_does() -> None:
    """The same steps are refused by both, at every number of free blocks."""
    for taken in range(9):
        allocator = BlockAllocator(instances=2, slots=32, block_size=BLOCK)
        begun = Chunk(request="begun", start=0, length=6, last=False)
        allocator.apply(
            PrefillStep(seq=0, group=(1,), chunks=(begun,), keep=(place("begun", (1, 6)),))
        )
        if taken:
            filler = Chunk(request="filler", start=0, length=taken * BLOCK, last=True)
            shares = [(0, min(taken, 8) * BLOCK)]
            allocator.apply(
                PrefillStep(seq=1, group=(0,), chunks=(filler,), keep=(place("filler", *shares),))
            )
        snapshot = replace(
            with_waiting(WAITS, BEGUN),
            instances=tuple(
                InstanceView(id=i, slots=32, free_slots=allocator.free_slots(i)) for i in range(2)
            ),
            topology=EverySubset(2),
        )
        step = prefill(place("begun", (1, 3), (0, 1)), place("waits", (0, 10)))
        if taken <= 4:  # 8 - taken blocks are free, 1 + 3 are wanted
            check(step, snapshot=snapshot)
            allocator.apply(step)
        else:
            refuses("instance 0 would need 16 slots", step, snapshot=snapshot)
            with pytest.raises(PlanError, match="wants 16 slots"):
                allocator.apply(step)


# ---- migrate -------------------------------------------------------------------------


def test_source_and_target_are_in_the_group() -> None:
    refuses(
        "group (0, 1) lacks instance 3, the source of a move of request 'runs'",
        migrate(("runs", 3, 0, 1), group=(0, 1)),
    )
    refuses(
        "group (0, 3) lacks instance 1, the target of a move of request 'runs'",
        migrate(("runs", 3, 1, 1)),
    )


def test_no_instance_gives_and_takes_kv_of_one_request() -> None:
    refuses("moves both to instance 0 and away from it", migrate(("runs", 0, 0, 1)))
    refuses(
        "KV of request 'runs' moves both to instance 3 and away from it",
        migrate(("runs", 3, 0, 1), ("runs", 0, 3, 1)),
    )


def test_only_kv_that_is_there_moves() -> None:
    refuses("0 KV tokens of request 'runs' are to leave instance 3", migrate(("runs", 3, 0, 0)))
    refuses("3 KV tokens of request 'runs' are to leave instance 3, which holds 2 then",
        migrate(("runs", 3, 0, 3)))  # fmt: skip
    refuses("which holds 0 then", migrate(("waits", 0, 3, 1)))
    twice = migrate(("runs", 0, 1, 5), ("runs", 0, 2, 4), group=(0, 1, 2, 3))
    idle = tuple(replace(view, busy_seq=None) for view in SNAPSHOT.instances)
    refuses("4 KV tokens of request 'runs' are to leave instance 0, which holds 3 then",
        twice, snapshot=replace(SNAPSHOT, instances=idle))  # fmt: skip


def test_request_that_moves_does_nothing_else() -> None:
    refuses("there is no request 'ghost'", migrate(("ghost", 0, 3, 1)))
    refuses("'runs' is preempted or rejected", migrate(("runs", 0, 3, 1)), preempt=("runs",))
    refuses("it works on no request", migrate())
    refuses(
        "request 'begun' is in step 412 too",
        migrate(("begun", 1, 0, 1), group=(0, 1)),
        migrate(("begun", 1, 3, 1), group=(3,), seq=SEQ + 1),
    )
    idle = tuple(replace(view, busy_seq=None) for view in SNAPSHOT.instances)
    refuses(
        "a step in flight works on request 'flies'",
        migrate(("flies", 2, 1, 1), group=(1, 2)),
        snapshot=replace(SNAPSHOT, instances=idle),
    )


def test_moves_fit_what_is_free_at_their_targets() -> None:
    step = migrate(("full", 0, 3, 5))  # out of two blocks of four
    check(step, snapshot=with_free(3, 8))
    refuses("instance 3 would need 8 slots in new blocks of 4, and has 4", step,
        snapshot=with_free(3, 4))  # fmt: skip
    # What a step empties serves later steps alone.
    refuses("instance 0 would need 4", migrate(("runs", 3, 0, 2), ("full", 0, 3, 8)),
        snapshot=with_free(0, 0))  # fmt: skip


@settings(max_examples=300)
@given(
    st.sampled_from([1, 3, 4]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 9)), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 12)), max_size=3),
    st.integers(0, 2),
    st.lists(st.tuples(st.integers(1, 2), st.integers(1, 6)), min_size=1, max_size=3),
    st.integers(0, 5),
)
@example(4, [(0, 2), (1, 1)] * 4, [], 0, [(1, 8)], 2)  # positions with gaps: a block for each
@example(4, [(0, 8)], [], 0, [(1, 3), (2, 5)], 1)  # both touch one block
@example(3, [(0, 7)], [], 0, [(1, 5)], 2)  # a cut block is filled up
@example(3, [(0, 11)], [], 0, [(1, 1), (1, 5), (1, 1)], 4)  # several meet in one block
def test_valid_moves_are_never_refused_by_the_allocator(
    size: int,
    chunks: list[tuple[int, int]],
    before: list[tuple[int, int, int]],
    source: int,
    moves: list[tuple[int, int]],
    room: int,
) -> None:
    """Whatever chunks and earlier moves have made of the blocks."""
    allocator = BlockAllocator(instances=3, slots=48, block_size=size)
    for home, tokens in chunks:
        start = allocator.computed("a")
        chunk = Chunk(request="a", start=start, length=tokens, last=False)
        allocator.apply(
            PrefillStep(seq=0, group=(0,), chunks=(chunk,), keep=(place("a", (home, tokens)),))
        )
    for move in before:
        with suppress(PlanError):
            allocator.apply(migrate(("a", *move)))
    for home in range(3):  # leave little room
        length = max(0, allocator.free_slots(home) - room * size)
        chunk = Chunk(request=f"{home}", start=0, length=length, last=True)
        keep = place(f"{home}", (home, length))
        allocator.apply(PrefillStep(seq=0, group=(0,), chunks=(chunk,), keep=(keep,)))
    found = allocator.whereabouts("a")
    view = request("a", prompt=99, computed=found.computed, kv=found.shares,
        tail=found.tail, holes=found.holes)  # fmt: skip
    snapshot = replace(
        with_waiting(view),
        block_size=size,
        instances=tuple(
            InstanceView(id=i, slots=48, free_slots=allocator.free_slots(i)) for i in range(3)
        ),
        topology=EverySubset(3),
    )
    source = found.shares[source % len(found.shares)].instance
    step = migrate(
        *(("a", source, (source + offset) % 3, tokens) for offset, tokens in moves),
        group=(0, 1, 2),
    )
    try:
        check(step, snapshot=snapshot)
    except PlanError as refusal:
        event(re.sub(r"\d+", "N", str(refusal).split(":")[1])[:40])
        if size == 1:  # then blocks are counted exactly
            with pytest.raises(PlanError):
                allocator.apply(step)
        elif not view.holes and allows(allocator, step):  # then hardly too many
            check(step, snapshot=with_more_room(snapshot, len(moves) * size))
    else:
        event("allowed")
        allocator.apply(step)
        allocator.check_integrity()
    check(preempt=("a",), snapshot=snapshot)


def test_preempted_blocks_are_counted_with_their_holes() -> None:
    holey = request(
        "holey", computed=5, kv=(Share(0, 5),), tail=Share(0, 2), holes=(Share(0, 5),)
    )  # three blocks
    step = prefill(place("waits", (0, 10)), group=(0,))
    snapshot = replace(with_free(0, 0), waiting=(WAITS, holey))
    check(step, snapshot=snapshot, preempt=("holey",))


# ---- ahead ---------------------------------------------------------------------------


def test_groups_that_go_on_exist() -> None:
    check(decode(("runs", 0, 3)), ahead=frozenset({(0, 3), (2,)}))
    refuses("ahead: group (0, 2, 3) does not exist", ahead=frozenset({(0, 2, 3)}))


# ---- preempt and reject --------------------------------------------------------------


def test_only_kv_that_nothing_works_on_is_dropped() -> None:
    refuses("preempt: there is no request 'ghost'", preempt=("ghost",))
    refuses("preempt: request 'runs' appears twice", preempt=("runs", "runs"))
    refuses("preempt: a step in flight works on request 'flies'", preempt=("flies",))
    refuses("preempt: request 'waits' has no KV", preempt=("waits",))


def test_only_requests_that_were_not_begun_are_turned_away() -> None:
    late = Rejection("waits", "late")
    refuses("reject: request 'waits' appears twice", reject=(late, late))
    refuses("reject: request 'runs' does not wait", reject=(Rejection("runs", "late"),))
    refuses(
        "reject: request 'begun' was begun (6 tokens have KV)", reject=(Rejection("begun", "late"),)
    )
