"""What property tests draw: requests, groups, and where KV is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from loongjax.models.config import ModelConfig
from tests.esp.rig import reference_logits

EPSILON = 1e-4  # relative to the largest logit: DESIGN's float32 bound


@dataclass
class Life:
    """One request: all tokens it will ever have, and how many of them have KV."""

    name: str
    tokens: list[int]
    probe: int
    prompt: int
    computed: int = 0


def expect(life: Life, model: ModelConfig, got: float) -> None:
    """Holds a logit after the computed tokens against a plain forward pass."""
    reference = reference_logits(life.tokens, model)
    wanted = reference[life.computed - 1, life.probe]
    assert abs(got - wanted) <= EPSILON * np.abs(reference).max()


def draw_group(data, instances: int, needed: set[int]) -> tuple[int, ...]:
    """Any group that holds `needed`."""
    more = data.draw(st.sets(st.integers(0, instances - 1), min_size=0 if needed else 1))
    return tuple(sorted(needed | more))


def draw_shares(data, group: tuple[int, ...], tokens: int) -> dict[int, int]:
    """Any subset of the group, in any proportion."""
    order = data.draw(st.permutations(group), label="order")
    cuts = data.draw(
        st.lists(st.integers(0, tokens), min_size=len(group) - 1, max_size=len(group) - 1)
    )
    edges = [0, *sorted(cuts), tokens]
    return {i: b - a for i, a, b in zip(order, edges, edges[1:], strict=False)}
