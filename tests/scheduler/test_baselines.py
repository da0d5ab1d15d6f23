"""The policies without elasticity: what their plans look like, and what they promise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loongjax.cluster.topology import AlignedSlices, EverySubset
from loongjax.errors import ConfigError
from loongjax.plan import DecodeStep, PrefillStep, step_requests
from loongjax.scheduler import Policy
from loongjax.scheduler.policies import create_policy, policy_layout, policy_names
from loongjax.scheduler.policies.disaggregated import Disaggregated
from loongjax.scheduler.policies.elastic import Elastic
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.scheduler.policies.fixed_groups import FixedGroups
from loongjax.scheduler.policies.lane import lanes
from loongjax.scheduler.policies.loongserve import LoongServe
from tests.scheduler.analytic_cost import AnalyticCost
from tests.scheduler.loads import Load, engine, limits, loads, pools, serve
from tests.scheduler.virtual_engine import Job, VirtualEngine, decodes, migrations, prefills

COST = AnalyticCost()

headrooms = st.sampled_from([None, 0, 1, 8])
fixed = st.builds(
    FixedGroups,
    cost=st.just(COST),
    degree=st.sampled_from(["largest", "smallest"]),
    chunk=st.sampled_from([None, 1, 5, 64]),
    order=st.sampled_from(["arrival", "slack"]),
    slack_floor_s=st.sampled_from([0.0, 15.0]),
    headroom=headrooms,
)
apart = st.builds(Disaggregated, cost=st.just(COST), headroom=headrooms)


@settings(max_examples=100)
@given(
    st.sampled_from(["subsets", "neighbours", "slices"]),
    st.integers(1, 4),
    pools,
    st.one_of(fixed, apart),
    limits,
    st.lists(st.builds(replace, loads, aborted=st.booleans()), min_size=1, max_size=8),
    st.integers(0, 999),
    st.sampled_from([0.0, 0.0, 0.1]),
)
def test_everybody_ends_whatever_fails_or_is_aborted(
    kind: str,
    instances: int,
    pool: tuple[int, int],
    policy: FixedGroups | Disaggregated,
    limit: tuple[int, int],
    given_loads: list[Load],
    seed: int,
    failures: float,
) -> None:
    if isinstance(policy, Disaggregated):
        instances = max(2, instances)
    # a request fits a lane, whatever the lanes are
    small = [replace(load, peak=load.peak / instances) for load in given_loads]
    it = engine((kind, instances, set()), pool, policy, limit, seed, failures)
    serve(it, small)
    for snapshot, plan in it.plans:
        assert policy.schedule(0.0, snapshot) == plan


def rig(policy: Policy, instances: int = 1, **fields: int) -> VirtualEngine:
    options = {"slots": 64, "block_size": 1, "max_chunk_tokens": 64, "max_rows": 8} | fields
    return VirtualEngine(policy, EverySubset(instances), **options)


def submit(it: VirtualEngine, name: str, prompt: int, tokens: int = 4) -> None:
    it.submit(Job(id=name, prompt=prompt, max_tokens=tokens, tokens=tokens))


# ---- chunked prefill -----------------------------------------------------------------


def test_decodes_are_carried_along_by_chunks() -> None:
    it = rig(FixedGroups(cost=COST, chunk=8))
    submit(it, "a", 3)
    submit(it, "b", 12)
    plans = []
    while it.jobs:
        plans.append(it.plan())
        it.end_one()
    chunks = [
        [(chunk.request, chunk.start, chunk.length) for chunk in step.chunks]
        for step in prefills([step for steps in plans for step in steps])
    ]
    assert chunks == [[("a", 0, 3), ("b", 0, 5)], [("a", 3, 1), ("b", 5, 7)]]
    assert len(plans) == 5


def test_in_order_of_slack_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    first = {}
    for order in ("arrival", "slack"):
        policy = FixedGroups(cost=COST, chunk=8, order=order, slack_factor=1e6, slack_floor_s=0.0)
        it = rig(policy)
        submit(it, "long", 40)
        it.plan()
        it.end_one()
        submit(it, "short", 4)
        (step,) = it.plan()
        first[order] = step_requests(step)
    assert first == {"arrival": ("long",), "slack": ("short", "long")}


# ---- whole prompts -------------------------------------------------------------------


def test_whole_group_works_on_everything() -> None:
    it = rig(FixedGroups(cost=COST), instances=4)
    submit(it, "a", 10)
    (step,) = it.plan()
    assert step.group == (0, 1, 2, 3)
    assert isinstance(step, PrefillStep)
    assert sorted(share.tokens for share in step.keep[0].shares) == [1, 3, 3, 3]
    it.run()
    assert {step.group for _, plan in it.plans for step in plan.steps} == {(0, 1, 2, 3)}


def test_everybody_gets_a_token_between_two_prompts() -> None:
    it = rig(FixedGroups(cost=COST))
    it.steps_ahead = 0
    submit(it, "a", 5, tokens=9)
    kinds = []
    for name in "bcd":
        for _ in range(2):
            kinds += [type(step) for step in it.plan()]
            it.end_one()
        submit(it, name, 5)
    assert kinds == [PrefillStep, DecodeStep] * 3


def test_replicas_share_the_line() -> None:
    it = rig(FixedGroups(cost=COST, degree="smallest"), instances=3, max_chunk_tokens=8)
    for name in "abc":
        submit(it, name, 8)
    steps = it.plan()
    assert [(step.group, step_requests(step)) for step in steps] == [
        ((0,), ("a",)),
        ((1,), ("b",)),
        ((2,), ("c",)),
    ]


def test_what_no_replica_holds_is_turned_away() -> None:
    it = rig(FixedGroups(cost=COST, degree="smallest"), instances=2)
    submit(it, "long", 60, tokens=20)
    plan = it.policy.schedule(0.0, it.snapshot())
    ((name, reason),) = plan.reject
    assert name == "long"
    assert "needs up to 79 KV slots, and a group of this policy has 64" in reason


def test_kv_of_another_policy_is_computed_anew() -> None:
    it = rig(LoongServe(cost=AnalyticCost(token=1.0)), instances=4, slots=16)
    submit(it, "a", 40)
    it.plan()
    it.end_one()
    assert len(it.homes("a")) > 1
    it.policy = FixedGroups(cost=COST, degree="smallest")
    assert it.policy.schedule(0.0, it.snapshot()).preempt == ("a",)


# ---- disaggregated -------------------------------------------------------------------


def test_prompts_and_decodes_run_apart() -> None:
    it = rig(Disaggregated(cost=COST), instances=2)
    for name in "ab":
        submit(it, name, 5)
    it.run()
    steps = [step for _, plan in it.plans for step in plan.steps]
    assert {step.group for step in prefills(steps)} == {(0,)}
    assert {step.group for step in decodes(steps)} == {(1,)}
    assert [(step.group, step_requests(step)) for step in migrations(steps)] == [
        ((0, 1), ("a", "b"))
    ]
    assert it.moved == [10]


def test_finished_prompts_wait_for_memory_where_they_decode() -> None:
    it = rig(Disaggregated(cost=COST, headroom=None), instances=2, slots=16)
    submit(it, "a", 8, tokens=8)
    submit(it, "b", 8, tokens=8)
    it.run()
    steps = migrations([step for _, plan in it.plans for step in plan.steps])
    assert [step_requests(step) for step in steps] == [("a",), ("b",)]
    assert it.finished == ["a", "b"]


@pytest.mark.parametrize(("lanes", "instances"), [(None, 1), (2, 2)])
def test_both_kinds_of_lanes_are_needed(lanes: int | None, instances: int) -> None:
    it = rig(Disaggregated(cost=COST, prefill_lanes=lanes), instances=instances)
    with pytest.raises(ConfigError, match="Add instances, or lower prefill_lanes"):
        it.policy.schedule(0.0, it.snapshot())


# ---- names and settings --------------------------------------------------------------


def test_lanes_are_disjoint() -> None:
    assert lanes(EverySubset(4), 4) == [(0, 1, 2, 3)]
    assert lanes(EverySubset(4, [2]), 2) == [(0, 1), (2, 3)]
    assert lanes(AlignedSlices(3), 1) == [(0,), (1,), (2,)]


def test_policies_are_made_by_name() -> None:
    made = {name: create_policy(name, COST) for name in policy_names()}
    assert made == {
        "chunked_prefill": FixedGroups(cost=COST, chunk=2048),
        "disaggregated": Disaggregated(cost=COST),
        "elastic": Elastic(cost=COST),
        "first_come": FirstCome(),
        "loongserve": LoongServe(cost=COST),
        "replicated": FixedGroups(cost=COST, degree="smallest"),
        "static_sp": FixedGroups(cost=COST),
        "tp": FixedGroups(cost=COST),
    }
    assert [policy_layout(name) for name in ("tp", "disaggregated", "loongserve")] == [
        "one",
        "halves",
        "usual",
    ]


def test_settings_follow_the_name() -> None:
    policy = create_policy("chunked_prefill:chunk=512,order=slack,headroom=none", COST)
    assert policy == FixedGroups(cost=COST, chunk=512, order="slack", headroom=None)
    policy = create_policy("loongserve:migrates=false,patience=2.5", COST)
    assert policy == LoongServe(cost=COST, migrates=False, patience=2.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "no policy is called 'magic'; known are chunked_prefill, disaggregated"),
        ("tp:speed=9", "policy 'tp' has no setting 'speed=9'"),
        ("tp:cost=9", "has no setting 'cost=9'"),
        ("elastic:_alone=1", "has no setting '_alone=1'"),
        (
            "loongserve:migrates",
            "write NAME=VALUE with one of block_s, decode_s, headroom, migrates",
        ),
        ("tp:chunk=0", "chunk must be at least 1 token, not 0"),
        ("tp:headroom=-1", "headroom must not be negative, got -1"),
        ("tp:order=random", "random"),
        ("disaggregated:prefill_lanes=0", "prefill_lanes must be at least 1, not 0"),
        ("disaggregated:headroom=-2", "headroom must not be negative, got -2"),
        ("tp:chunk=many", "chunk must be a number, true, false or none, not 'many'"),
    ],
)
def test_wrong_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_policy(text, COST)
