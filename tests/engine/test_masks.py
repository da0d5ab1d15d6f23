"""A mask decides which tokens may come, and never runs ahead of what it has to know."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest

from loongjax.engine import GenerationRequest, TokenMask
from loongjax.sampling.params import SamplingParams
from tests.engine.fake_executor import VOCAB, answer
from tests.engine.rig import Rig, collect, rig

PROMPT = (1, 2, 3, 4, 5)


def only(*tokens: int) -> np.ndarray:
    allowed = np.zeros(VOCAB, bool)
    allowed[list(tokens)] = True
    return allowed


def counting(generated: Sequence[int]) -> np.ndarray:
    """Lets 10, 11, 12, … come one after the other."""
    assert list(generated) == list(range(10, 10 + len(generated)))
    return only(10 + len(generated))


def submit(it: Rig, name: str, mask: TokenMask, n: int = 1):
    params = SamplingParams(max_tokens=6, n=n)
    request = GenerationRequest(id=name, token_ids=PROMPT, params=params, mask=mask)
    return it.engine.submit_samples(request)


def test_an_answer_is_what_its_mask_lets() -> None:
    with rig() as it:
        (masked,) = submit(it, "masked", counting)
        free = it.submit("free", (7, 8), max_tokens=6)
        assert collect(masked)[0] == tuple(range(10, 16))
        assert collect(free)[0] == answer((7, 8), 6)
        for handle in submit(it, "many", counting, n=3):
            assert collect(handle)[0] == tuple(range(10, 16))
        ahead = [name for step in it.executor.queued for name in (row.request for row in step.rows)]
        assert not {name for name in ahead if name != "free"}


def broken(generated: Sequence[int]) -> np.ndarray:
    if len(generated) == 2:
        raise ValueError("no such rule")
    return only(4)


@pytest.mark.parametrize(
    ("mask", "tokens", "message"),
    [
        (broken, 2, "the request's token mask failed: ValueError: no such rule"),
        (lambda generated: only(), 0, r"it gave 0 tokens in the shape \(1000,\)"),
        (lambda generated: np.ones(3, bool), 0, r"it gave 3 tokens in the shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_a_mask_that_fails_ends_its_request_alone(mask, tokens, message, n) -> None:
    with rig() as it:
        free = it.submit("free", (7, 8), max_tokens=6)
        for handle in submit(it, "masked", mask, n=n):
            said, end = collect(handle)
            assert (len(said), end.reason) == (tokens, "error")
            assert end.error is not None
            assert re.search(message, end.error)
        assert collect(free)[0] == answer((7, 8), 6)
