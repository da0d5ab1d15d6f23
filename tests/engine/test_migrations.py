"""KV that moves between instances: tokens stay right, and nothing is freed too early."""

from __future__ import annotations

from collections.abc import Callable

from loongjax.engine import RequestHandle, StepRecord
from loongjax.plan import (
    Chunk,
    DecodeRow,
    DecodeStep,
    Group,
    MigrateStep,
    Move,
    Placement,
    Plan,
    PrefillStep,
    RequestView,
    Share,
    Snapshot,
    Step,
)
from tests.engine.fake_executor import FakeExecutor, answer
from tests.engine.rig import Rig, Wrapped, collect, rig

PROMPT = (1, 2, 3, 4, 5)
ANSWER = answer(PROMPT, 12)


def prefill(snapshot: Snapshot, name: str, group: Group, **shares: int) -> Plan:
    """`i0=3, i1=2`: three tokens on instance 0, then two on instance 1."""
    kept = tuple(Share(int(key[1:]), tokens) for key, tokens in shares.items())
    chunk = Chunk(request=name, start=0, length=sum(s.tokens for s in kept), last=True)
    keep = Placement(request=name, shares=kept)
    return Plan(
        steps=(PrefillStep(seq=snapshot.next_seq, group=group, chunks=(chunk,), keep=(keep,)),)
    )


def migrate(snapshot: Snapshot, group: Group, *moves: Move) -> Plan:
    return Plan(steps=(MigrateStep(seq=snapshot.next_seq, group=group, moves=moves),))


def view_of(snapshot: Snapshot, name: str) -> RequestView | None:
    views = (*snapshot.waiting, *snapshot.running)
    return next((view for view in views if view.id == name), None)


def back_and_forth() -> Callable[[Snapshot], Plan | None]:
    """After every second token most of what `a` has goes to the other instance, or comes back."""

    def first(snapshot: Snapshot) -> Plan | None:
        view = view_of(snapshot, "a")
        if view is None or view.id in snapshot.in_flight or view.generated in moved:
            return None
        if view.kv and view.generated % 2:
            moved.add(view.generated)
            source, tokens = max(view.kv, key=lambda share: share.tokens)
            return migrate(snapshot, (0, 1), Move("a", source, 1 - source, tokens - 2))
        return None

    moved: set[int] = set()
    return first


def kinds(records: tuple[StepRecord, ...]) -> list[str]:
    return [record.kind for record in records]


def test_answer_does_not_depend_on_moves() -> None:
    policy = Wrapped(first=back_and_forth(), ahead=False)
    with rig(policy=policy) as it:
        tokens, end = collect(it.submit("a", PROMPT, max_tokens=12))
        assert (tokens, end.reason) == (ANSWER, "length")
        records = it.engine.steps_of("a")
        assert kinds(records).count("migrate") >= 6
        assert kinds(records).count("decode") == 11
        counts = {(c.kind, c.degree): c.count for c in it.engine.stats().steps}
        assert counts["migrate", 2] == kinds(records).count("migrate")
        assert it.engine.stats().generated_tokens == 12


def test_record_of_a_migration_says_what_arrived_where() -> None:
    with rig(policy=Wrapped(first=back_and_forth(), ahead=False)) as it:
        collect(it.submit("a", PROMPT, max_tokens=3))
        record = next(r for r in it.engine.steps_of("a") if r.kind == "migrate")
    assert (record.group, record.requests, record.tokens) == ((0, 1), ("a",), 3)
    assert record.kept == (Share(1, 3),)
    assert record.masters == ()


def test_migration_is_no_service() -> None:
    """A request whose decoding was put off is still owed a token after its KV has moved."""
    policy = Wrapped(first=back_and_forth(), ahead=False)
    with rig(policy=policy) as it:
        collect(it.submit("a", PROMPT, max_tokens=3))
    moved = [s for s in policy.seen if s.next_seq == 2]  # 0 was the prompt, 1 the move
    assert [view_of(s, "a").last_seq for s in moved if not s.in_flight] == [0]


def once(plan: Callable[[Snapshot], Plan | None]) -> Callable[[Snapshot], Plan | None]:
    """A plan until it was made, then none."""
    made: list[Plan] = []

    def first(snapshot: Snapshot) -> Plan | None:
        found = None if made else plan(snapshot)
        if found is not None:
            made.append(found)
        return found

    return first


def test_failed_migration_costs_its_requests_their_kv() -> None:
    def fail(step: Step) -> str | None:
        return "a link broke" if isinstance(step, MigrateStep) else None

    policy = Wrapped(first=once(back_and_forth()))
    with rig(policy=policy, executor=FakeExecutor(fail=fail)) as it:
        tokens, end = collect(it.submit("a", PROMPT, max_tokens=8))
        assert (tokens, end.reason) == (ANSWER[:8], "length")
        assert kinds(it.engine.steps_of("a"))[:4] == ["prefill", "migrate", "prefill", "decode"]
        assert it.engine.steps_of("a")[1].error == "a link broke"
        assert it.engine.stats().recomputed_requests == 1


def scattered(snapshot: Snapshot) -> Plan | None:
    """`a` on 0 and 1, `b` on 0; then KV of `a` moves from 1 to 2 while `b` runs."""
    if snapshot.next_seq > 2:
        return None
    if snapshot.in_flight:
        return Plan()
    match snapshot.next_seq:
        case 0:
            return prefill(snapshot, "a", (0, 1), i0=3, i1=2)
        case 1:
            return prefill(snapshot, "b", (0,), i0=5)
    move = migrate(snapshot, (1, 2), Move("a", 1, 2, 2))
    row = DecodeRow("b", 0, 0)
    return Plan(steps=(*move.steps, DecodeStep(seq=3, group=(0,), rows=(row,))))


def failing(*seqs: int) -> FakeExecutor:
    """The decode step, 3, ends before the migration, 2."""
    return FakeExecutor(
        fail=lambda step: "no power" if step.seq in seqs else None,
        order=lambda flights: max(range(len(flights)), key=lambda i: flights[i].step.seq),
    )


def test_kv_lost_elsewhere_while_it_moves_is_dropped_when_it_has_arrived() -> None:
    policy = Wrapped(first=scattered, ahead=False)
    with rig(policy=policy, executor=failing(3), instances=3) as it:
        handles = submit_both(it)
        assert [collect(handle)[0] for handle in handles] == [ANSWER[:4]] * 2
        assert it.engine.stats().recomputed_requests == 2
        assert kinds(it.engine.steps_of("a"))[:3] == ["prefill", "migrate", "prefill"]
    (during,) = [s for s in policy.seen if s.next_seq == 4 and s.in_flight == {"a"}]
    assert view_of(during, "a").homes == {0, 2}  # not dropped yet
    assert view_of(during, "b").computed == 0


def test_failure_of_both_steps_is_two_failures() -> None:
    with rig(
        policy=Wrapped(first=scattered, ahead=False), executor=failing(2, 3), instances=3
    ) as it:
        a, b = submit_both(it)
        tokens, end = collect(a)
        assert tokens == ANSWER[:1]
        assert end.error.startswith("its KV was lost to 2 failed steps, the last being step 2 on")
        assert collect(b)[0] == ANSWER[:4]


def submit_both(it: Rig) -> list[RequestHandle]:
    """`b` is there when the first step of `a` ends."""
    it.executor.hold()
    handles = [it.submit(name, PROMPT, max_tokens=4) for name in "ab"]
    it.executor.wait_for(lambda executor: executor.known == {"a", "b"})
    it.executor.release()
    return handles


def test_abort_frees_slots_when_the_migration_has_ended() -> None:
    def first(snapshot: Snapshot) -> Plan | None:
        plan = move(snapshot)
        if plan is not None:
            executor.hold()
        return plan

    move = back_and_forth()

    executor = FakeExecutor()
    with rig(policy=Wrapped(first=first), executor=executor) as it:
        handle = it.submit("a", PROMPT, max_tokens=8)
        executor.wait_for(lambda executor: executor.flights and len(executor.submitted) == 2)
        handle.abort()
        tokens, end = collect(handle)
        assert (tokens, end.reason) == (ANSWER[:1], "abort")
        executor.wait_idle()
        assert it.used == 8  # two tokens stayed in a block, three arrived in another
        assert executor.known == {"a"}
        executor.release()
        executor.wait_for(lambda executor: not executor.known)
        executor.wait_idle()
        assert it.used == 0
