"""The order of a TPU's chips in which neighbours on the ring are neighbours on the mesh.

Instances are numbered in this order, so that each hop of the ring is one link, in every aligned
slice: chips 0 to 3 form a ring, 4 to 7 another, and all eight a third. Pure; imports no jax.
"""

from __future__ import annotations

from collections.abc import Sequence

_MOST_STEPS = 100_000


def ring_order(coords: Sequence[Sequence[int]]) -> list[int] | None:
    """Indices of chips at these coordinates; None where no such order is found.

    Each chip is one link from the one before it, and the last of an aligned slice of 4, 8, 16, …
    chips one link from its first. Links that wrap round a torus are not needed. Found by search,
    which is given up after 100,000 steps.
    """
    links = [[j for j, b in enumerate(coords) if _distance(a, b) == 1] for a in coords]
    steps = 0

    def complete(order: list[int]) -> bool:
        nonlocal steps
        steps += 1
        if len(order) == len(coords):
            return True
        if steps > _MOST_STEPS:
            return False
        firsts = _slices_ended(len(order))
        for chip in links[order[-1]]:
            if chip not in order and all(order[first] in links[chip] for first in firsts):
                order.append(chip)
                if complete(order):
                    return True
                order.pop()
        return False

    for start in range(len(coords)):
        order = [start]
        if complete(order):
            return order
    return None


def _slices_ended(at: int) -> list[int]:
    """Where the aligned slices of four chips or more begin that end at place `at`."""
    found, size = [], 4
    while (at + 1) % size == 0:
        found.append(at + 1 - size)
        size *= 2
    return found


def _distance(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))
