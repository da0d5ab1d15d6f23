"""`loongjax.v1.Cluster` of a real server: the instances, watched and steered."""

from __future__ import annotations

import json

import grpc
import pytest

from serving.stubs import cluster_pb2 as pb
from serving.stubs import cluster_pb2_grpc as pb_grpc
from serving.stubs import inference_pb2, inference_pb2_grpc
from tests.serving.server import ENDLESS, PATIENCE_S
from tests.serving.test_inference import generate, ids_of, request

pytestmark = pytest.mark.xdist_group("server")


@pytest.fixture(scope="module")
def stub(channel):
    return pb_grpc.ClusterStub(channel)


@pytest.fixture(scope="module")
def inference(channel):
    return inference_pb2_grpc.InferenceStub(channel)


def refusal(call) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return caught.value.details()


def test_the_state_is_told_again_and_again(stub, inference):
    call = inference.Generate(request(**ENDLESS))
    watch = stub.Watch(pb.WatchRequest(interval_s=0.1), timeout=PATIENCE_S)
    states = [next(watch)]
    while not states[-1].groups or not states[-1].running:
        states.append(next(watch))
    state = states[-1]
    assert [each.id for each in state.instances] == [0, 1]
    assert sum(each.used for each in state.instances) > 0
    assert state.policy == "elastic"
    names = [name for group in state.groups for name in group.requests]
    assert names
    watch.cancel()
    call.cancel()


def test_an_interval_has_a_limit(stub):
    call = stub.Watch(pb.WatchRequest(interval_s=0.01), timeout=PATIENCE_S)
    assert "interval_s must be a time of at least 0.1 s, not 0.01" in refusal(lambda: next(call))


def test_steps_are_told_as_they_end(stub, inference, running):
    running.wait_until_idle()
    steps = stub.WatchSteps(pb.WatchStepsRequest(), timeout=PATIENCE_S)
    steps.initial_metadata()
    generate(inference, request(max_tokens=4))
    seen = []
    while sum(step.tokens for step in seen) < 5 + 3:
        seen.append(next(steps))
    assert [step.kind for step in seen] == [pb.STEP_KIND_PREFILL] + 3 * [pb.STEP_KIND_DECODE]
    assert seen[0].tokens == sum(kept.tokens for kept in seen[0].kept) == 5
    assert all(step.ended >= step.started for step in seen)
    assert [step.seq for step in seen] == sorted(step.seq for step in seen)
    steps.cancel()


def test_an_instance_is_drained_and_resumed(stub, inference, running):
    running.wait_until_idle()
    stub.DrainInstance(pb.DrainInstanceRequest(instance=0), timeout=PATIENCE_S)
    said = refusal(lambda: stub.DrainInstance(pb.DrainInstanceRequest(instance=1)))
    assert "instance 1 is the last of 2" in said
    assert "no instance 7" in refusal(
        lambda: stub.ResumeInstance(pb.ResumeInstanceRequest(instance=7))
    )
    steps = stub.WatchSteps(pb.WatchStepsRequest(), timeout=PATIENCE_S)
    steps.initial_metadata()
    batch = [request(max_tokens=9) for _ in range(4)]
    message = inference_pb2.GenerateBatchRequest(requests=batch)
    assert len(list(inference.GenerateBatch(message, timeout=PATIENCE_S))) == 4
    (state, *_) = stub.Watch(pb.WatchRequest(), timeout=PATIENCE_S), None
    assert [each.is_draining for each in next(state).instances] == [True, False]
    state.cancel()
    seen = 0
    while seen < 4 * (5 + 8):
        step = next(steps)
        assert {kept.instance for kept in step.kept} == {1}
        seen += step.tokens
    steps.cancel()
    stub.ResumeInstance(pb.ResumeInstanceRequest(instance=0), timeout=PATIENCE_S)


def test_the_policy_can_be_changed(stub, inference):
    before = ids_of(generate(inference, request()))
    headroom = "first_come:headroom=0"
    found = stub.SetPolicy(pb.SetPolicyRequest(policy=headroom), timeout=PATIENCE_S)
    assert found.previous == "elastic"
    assert ids_of(generate(inference, request())) == before
    back = stub.SetPolicy(pb.SetPolicyRequest(policy="elastic"), timeout=PATIENCE_S)
    assert back.previous == headroom
    assert "no policy is called 'best'" in refusal(
        lambda: stub.SetPolicy(pb.SetPolicyRequest(policy="best"))
    )


def test_the_cost_model_in_force_says_that_it_is_an_estimate(stub):
    content = json.loads(stub.GetCostModel(pb.GetCostModelRequest(), timeout=PATIENCE_S).json)
    assert content["fingerprint"]["software"] == "estimate"
    assert content["prefill"].keys() == {"1", "2"}
