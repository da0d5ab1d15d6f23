"""LoongServe's plans, one transition at a time."""

from __future__ import annotations

import pytest

from loongjax.cluster.topology import EverySubset
from loongjax.errors import ConfigError
from loongjax.plan import (
    DecodeStep,
    InstanceView,
    MigrateStep,
    Move,
    Plan,
    PrefillStep,
    RequestView,
    Share,
    Snapshot,
    Step,
    step_requests,
)
from loongjax.scheduler import validate
from loongjax.scheduler.policies import create_policy
from loongjax.scheduler.policies.loongserve import LoongServe
from tests.scheduler.analytic_cost import AnalyticCost

SLOTS = 100_000
PATIENCE = 1000.0


def waiting(name: str, prompt: int, **fields: object) -> RequestView:
    return RequestView(id=name, prompt=prompt, **{"max_tokens": 100, "arrival": 5.0} | fields)


def decoding(name: str, *kv: tuple[int, int], generated: int = 50, **fields: object) -> RequestView:
    computed = sum(tokens for _, tokens in kv)
    return RequestView(
        id=name,
        prompt=computed - generated + 1,
        computed=computed,
        generated=generated,
        kv=tuple(Share(*share) for share in kv),
        **{"max_tokens": 500, "arrival": 1.0, "last_seq": 7} | fields,
    )


def plan(
    *views: RequestView,
    instances: int = 4,
    busy: dict[int, int] | None = None,
    prefilled: dict[int, int] | None = None,
    slots: int = SLOTS,
    now: float = 5.0,
    **settings: object,
) -> Plan:
    """Of a snapshot in which these are all; `busy`: step by instance; so `prefilled`."""
    held = [sum(dict(view.kv).get(i, 0) for view in views) for i in range(instances)]
    prefill_seq = prefilled or {}
    snapshot = Snapshot(
        version=0,
        next_seq=10,
        block_size=1,
        max_chunk_tokens=slots,
        max_rows=64,
        waiting=tuple(view for view in views if view.uncomputed > 1),
        running=tuple(view for view in views if view.uncomputed == 1),
        instances=tuple(
            InstanceView(
                id=i,
                slots=slots,
                free_slots=slots - held[i],
                busy_seq=(busy or {}).get(i),
                prefill_seq=prefill_seq.get(i),
            )
            for i in range(instances)
        ),
        in_flight=frozenset(v.id for v in views if v.last_seq in (busy or {}).values()),
        topology=EverySubset(instances),
    )
    policy = LoongServe(**{"cost": AnalyticCost()} | settings)
    found = policy.schedule(now, snapshot)
    validate(snapshot, found)
    return found


def groups(steps: tuple[Step, ...]) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    kinds = {PrefillStep: "prefill", DecodeStep: "decode", MigrateStep: "migrate"}
    return [(kinds[type(step)], step.group, step_requests(step)) for step in steps]


def degrees(found: Plan) -> list[int]:
    return [len(step.group) for step in found.steps]


# ---- prompts -------------------------------------------------------------------------


def test_long_prompt_uses_all_idle_instances_and_scales_down_for_free() -> None:
    (step,) = plan(waiting("a", 50_000)).steps
    assert step.group == (0, 1, 2, 3)
    assert isinstance(step, PrefillStep)
    assert [len(placement.shares) for placement in step.keep] == [1]


def test_prompt_uses_idle_instances_while_others_decode() -> None:
    found = plan(waiting("a", 20_000), decoding("d", (0, 1_000)))
    assert groups(found.steps) == [("prefill", (1, 2, 3), ("a",)), ("decode", (0,), ("d",))]


def test_short_prompts_do_not_run_with_a_long_one() -> None:
    found = plan(waiting("long", 90_000), waiting("s", 50, arrival=6.0))
    assert [step_requests(step) for step in found.steps] == [("s",), ("long",)]


def test_decodes_are_paused_when_that_gains_more_than_it_costs() -> None:
    views = [decoding(f"d{i}", (i, 1_000), generated=400) for i in range(4)]
    found = plan(*views, *(waiting(f"w{i}", 100) for i in range(20)), migrates=False)
    kinds = groups(found.steps)
    assert kinds[0][0] == "prefill"
    assert len(kinds) == 4, "the others decode on"


def test_between_two_prompts_whoever_was_paused_gets_a_token() -> None:
    views = [decoding(f"d{i}", (i, 1_000), generated=400) for i in range(4)]
    queue = [waiting(f"w{i}", 100) for i in range(20)]
    found = plan(*views, *queue, prefilled=dict.fromkeys(range(4), 8), migrates=False)
    assert {kind for kind, _, _ in groups(found.steps)} == {"decode"}


def test_decodes_migrate_to_make_room_for_prompts() -> None:
    views = [decoding(f"d{i}", (i, 1_000), generated=9) for i in range(2)]
    found = plan(*views, *(waiting(f"w{i}", 100) for i in range(10)), instances=2)
    moves = [step for step in found.steps if isinstance(step, MigrateStep)]
    assert [step.moves for step in moves] == [(Move("d0", 0, 1, 1_000),)]


def test_idle_instances_are_kept_for_a_prompt_whose_others_are_busy_for_a_moment() -> None:
    found = plan(waiting("a", 90_000), busy={0: 9, 1: 9})
    assert found == Plan()


def test_nobody_overtakes_without_patience_to_lose() -> None:
    """`a` has no memory; `b` would have, but came later. Alone, `a` takes 37 ms."""
    full = decoding("d", (0, 90), (1, 60), max_tokens=51)
    views = (full, waiting("a", 80), waiting("b", 10, arrival=6.0))
    strict = plan(*views, instances=2, slots=100, now=9.0, headroom=0)
    assert [kind for kind, _, _ in groups(strict.steps)] == ["decode"]
    loose = plan(*views, instances=2, slots=100, now=9.0, headroom=0, patience=PATIENCE)
    assert ("b",) in [requests for _, _, requests in groups(loose.steps)]
    late = plan(*views, instances=2, slots=100, now=99.0, headroom=0, patience=PATIENCE)
    assert late == strict


def test_a_long_prompt_leaves_an_instance_to_those_who_come() -> None:
    """As long as it is patient, and unless it needs all. Alone, `a` takes 2.5 s."""
    polite = {"patience": PATIENCE, "block_s": 0.1}
    long, longer = waiting("a", 90_000), waiting("a", 350_000)
    assert degrees(plan(long)) == [4]
    assert degrees(plan(long, **polite)) == [3]
    assert degrees(plan(long, patience=PATIENCE, block_s=9.0)) == [4]
    assert degrees(plan(long, now=1e6, **polite)) == [4]
    assert degrees(plan(longer, **polite)) == [4]
    assert degrees(plan(long, waiting("b", 10, arrival=6.0), now=6.0, **polite)) == [3, 1]


def test_a_long_prompt_does_not_take_the_last_instance() -> None:
    busy = dict.fromkeys(range(3), 8)
    views = (waiting("a", 90_000), waiting("b", 10, arrival=6.0))
    settings = {"busy": busy, "prefilled": busy, "now": 6.0, "block_s": 0.1}
    found = plan(*views, patience=PATIENCE, **settings)
    assert [requests for _, _, requests in groups(found.steps)] == [("b",)]
    assert plan(views[0], patience=PATIENCE, **settings).steps == ()


@pytest.mark.parametrize(("decode_s", "homes"), [(0.045, 1), (0.03, 2), (0.02, 3)])
def test_long_kv_is_kept_where_it_decodes_in_time(decode_s: float, homes: int) -> None:
    """A step takes 18 ms, and 20 ms more for 100,000 tokens on its fullest instance; three
    of them are not in time either, but four hardly quicker.
    """
    (step,) = plan(waiting("a", 95_000), decode_s=decode_s).steps
    assert isinstance(step, PrefillStep)
    assert len(step.keep[0].shares) == homes


def test_a_prompt_waits_for_as_many_instances_as_it_decodes_on_in_time() -> None:
    """Two would compute it, were it not for the decode; three are to hold it."""
    views = [decoding("d", (0, 100)), decoding("e", (1, 100)), waiting("a", 95_000)]
    kinds = [kind for kind, _, _ in groups(plan(*views, migrates=False).steps)]
    assert kinds == ["prefill", "decode", "decode"]
    kinds = [kind for kind, _, _ in groups(plan(*views, migrates=False, decode_s=0.025).steps)]
    assert kinds == ["decode", "decode"]


def test_shorts_do_not_run_together_with_a_long_prompt_on_one_instance() -> None:
    """Dispatch counts on more instances than the prompt gets."""
    views = [waiting("s", 100), waiting("l", 60_000, arrival=6.0)]
    found = plan(*views, busy={1: 9, 2: 9, 3: 9}, prefilled={1: 9, 2: 9, 3: 9})
    assert groups(found.steps) == [("prefill", (0,), ("s",))]


# ---- decodes -------------------------------------------------------------------------


def test_group_grows_when_memory_is_short() -> None:
    found = plan(decoding("d", (0, 100)), instances=2, slots=100)
    (step,) = found.steps
    assert isinstance(step, DecodeStep)
    assert step.group == (0, 1)
    assert step.rows[0].home == 1


@pytest.mark.parametrize(("scale_up", "degree"), [(True, 4), (False, 1)])
def test_group_grows_when_compute_is_bound_and_has_several_masters(
    scale_up: bool, degree: int
) -> None:
    views = [decoding(f"d{i}", (0, 200)) for i in range(60)]
    (step,) = plan(*views, scale_up=scale_up, cost=AnalyticCost(row=1e-3)).steps
    assert isinstance(step, DecodeStep)
    assert len(step.group) == degree
    assert len({row.master for row in step.rows}) == degree


def test_last_in_line_gives_way_to_the_first_without_room() -> None:
    views = (decoding("d", (0, 60)), decoding("e", (0, 40), generated=30, arrival=2.0))
    found = plan(*views, instances=1, slots=100)
    assert found.preempt == ("e",)
    assert [step_requests(step) for step in found.steps] == [("d",)]


# ---- settings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"headroom": -1}, "headroom must not be negative, got -1"),
        ({"typical_answer": 0}, "typical_answer must be at least 1, not 0"),
        ({"patience": -0.5}, "patience must not be negative, got -0.5"),
        ({"patience": float("nan")}, "patience must not be negative, got nan"),
        ({"block_s": -1.0}, "block_s must not be negative, got -1.0"),
        ({"decode_s": 0.0}, "decode_s must be positive, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoongServe(cost=AnalyticCost(), **settings)


def test_is_made_by_name() -> None:
    cost = AnalyticCost()
    assert create_policy("loongserve", cost) == LoongServe(cost=cost)
