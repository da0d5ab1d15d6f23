"""What a request asks of its sampling holds on any group, one step ahead, and in any company."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from loongjax.plan import Chunk, DecodeRow, DecodeStep, StepResult, TokenLogprobs
from loongjax.sampling.fields import RECENT
from loongjax.sampling.params import SamplingParams
from tests.esp.rig import GREEDY, TINY, Rig, reference_logits

STEPS = RECENT + 4  # so that tables are sent anew on the way
TOLERANCE = 1e-4
PENALISED = SamplingParams(
    temperature=0,
    repetition_penalty=1.2,
    frequency_penalty=0.4,
    presence_penalty=0.3,
    logit_bias={5: 2.0, 9: -100.0},
    logprobs=3,
)
SCORED = SamplingParams(temperature=0, prompt_logprobs=2)


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    rig = Rig(
        instances=2,
        block_size=4,
        max_chunk_tokens=128,
        program_dir=tmp_path_factory.mktemp("programs"),
    )
    yield rig
    rig.executor.close()


def tokens_of(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, TINY.vocab_size, length).tolist()


def shaped(logits: np.ndarray, prompt: list[int], answer: list[int]) -> np.ndarray:
    x = logits.astype(np.float64)
    for token, bias in PENALISED.logit_bias:
        x[token] += bias
    for token in {*prompt, *answer}:
        x[token] *= 1 / 1.2 if x[token] > 0 else 1.2
    for token in set(answer):
        x[token] -= 0.3 + 0.4 * answer.count(token)
    return x


def assert_follows(prompt: list[int], answer: list[int], wanted) -> None:
    """Every token is the best of what is wanted, or as good within the tolerance."""
    logits = reference_logits([*prompt, *answer])
    for i, token in enumerate(answer):
        x = wanted(logits[len(prompt) + i - 1], prompt, answer[:i])
        assert x.max() - x[token] <= 2 * TOLERANCE * np.abs(logits).max()


def assert_scored(found: TokenLogprobs, logits: np.ndarray, token: int, top: int) -> None:
    expected = np.asarray(jax.nn.log_softmax(logits))
    bound = 4 * TOLERANCE * np.abs(logits).max()
    assert found.token == token
    assert abs(found.logprob - expected[token]) <= bound
    better = (expected > expected[token] + bound).sum()
    assert better < found.rank <= 1 + (expected > expected[token] - bound).sum()
    assert len(found.top) == top
    best = np.sort(expected)[::-1]
    for (other, value), wanted in zip(found.top, best, strict=False):
        assert abs(value - expected[other]) <= bound
        assert abs(value - wanted) <= bound


def decode(rig: Rig, group: tuple[int, ...], names: list[str], ahead: int) -> list[StepResult]:
    """Steps, of which so many are launched behind the one that runs."""
    rows = tuple(DecodeRow(name, group[i % len(group)], group[-1]) for i, name in enumerate(names))
    results: list[StepResult] = []
    for number in range(STEPS):
        step = DecodeStep(seq=rig.next_seq(), group=group, rows=rows)
        rig.executor.submit(step, rig.allocator.apply(step))
        while len(results) < number + 1 - ahead:
            results += wait(rig, 1)
    return results + wait(rig, STEPS - len(results))


def wait(rig: Rig, count: int) -> list[StepResult]:
    results: list[StepResult] = []
    while len(results) < count:
        results += rig.executor.poll(60.0)
    assert all(result.error is None for result in results)
    return results


@pytest.mark.parametrize(("group", "ahead"), [((0,), 0), ((1,), 1), ((0, 1), 1)])
def test_penalties_follow_the_answer(rig, group, ahead):
    prompts = {"a": tokens_of(1, 20), "b": tokens_of(2, 9)}
    rig.admit("a", prompts["a"], params=PENALISED)
    rig.admit("b", prompts["b"], params=GREEDY)
    lengths = {name: len(prompt) for name, prompt in prompts.items()}
    keep = {name: {group[0]: length} for name, length in lengths.items()}
    results = [rig.prefill(group, lengths, keep), *decode(rig, group, list(prompts), ahead)]
    said = [{sampled.request: sampled for sampled in result.tokens} for result in results]
    answers = {name: [each[name].token for each in said] for name in prompts}
    for name in prompts:
        rig.release(name)
    assert_follows(prompts["a"], answers["a"], shaped)
    assert_follows(prompts["b"], answers["b"], lambda logits, prompt, answer: logits)
    logits = reference_logits([*prompts["a"], *answers["a"]])
    for i, each in enumerate(said):
        assert each["b"].logprobs is None
        assert_scored(each["a"].logprobs, logits[19 + i], each["a"].token, 3)


def test_more_than_one_step_ahead_fails_a_request_with_penalties(rig):
    """Its penalties would lack tokens that only the device knows."""
    rig.admit("a", tokens_of(1, 20), params=PENALISED)
    rig.prefill((0,), {"a": 20}, {"a": {0: 20}})
    for _ in range(3):
        step = DecodeStep(seq=rig.next_seq(), group=(0,), rows=(DecodeRow("a", 0, 0),))
        rig.executor.submit(step, rig.allocator.apply(step))
    results: list[StepResult] = []
    while len(results) < 3:
        results += rig.executor.poll(60.0)
    rig.release("a")
    assert "launch one step ahead at most" in next(filter(None, (r.error for r in results)))


@pytest.mark.parametrize("group", [(0,), (0, 1)])
def test_prompts_are_scored(rig, group):
    """In chunks with and without history, beside a prompt that nobody wants scored."""
    prompt, other = tokens_of(3, 90), tokens_of(4, 11)
    rig.admit("a", prompt, params=SCORED)
    rig.admit("b", other)
    share = {group[0]: 11}
    first = rig.extend(
        group,
        [
            Chunk(request="b", start=0, length=11, last=True),
            Chunk(request="a", start=0, length=40, last=False),
        ],
        {"b": share, "a": {group[0]: 40}},
    )
    second = rig.extend(
        group, [Chunk(request="a", start=40, length=50, last=True)], {"a": {group[-1]: 50}}
    )
    for name in ("a", "b"):
        rig.release(name)
    found: list[TokenLogprobs] = []
    for result in (first, second):
        (scores,) = result.prompts
        assert (scores.request, scores.start) == ("a", len(found) + 1)
        found += scores.tokens
    logits = reference_logits(prompt)
    assert len(found) == len(prompt) - 1
    for position, each in enumerate(found, 1):
        assert_scored(each, logits[position - 1], prompt[position], 2)
