"""What is measured: few steps for each degree, chosen so that every coefficient shows.

Pure. For each kind and degree there are corners, which are always measured; points in between,
which are measured in order until the fit foretells them; and points that no fit ever sees, for
the check at the end. Sizes follow from the compiled ones and the pool.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from loongjax.costmodel.padding import Padding

_SHORT = 64
"""A context that costs hardly anything."""
_WALK = 3
"""Chunks of a prompt that is computed in parts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Walk:
    """Prompts of these lengths in one step, and then `chunks - 1` steps more with as many new
    tokens of each, over what was computed before.
    """

    degree: int
    lengths: tuple[int, ...]
    chunks: int = 1

    @property
    def name(self) -> str:
        """Unique among points."""
        lengths = "+".join(map(str, self.lengths))
        return f"prefill {lengths} x {self.chunks} at degree {self.degree}"

    @property
    def tokens(self) -> int:
        """KV that it needs."""
        return sum(self.lengths) * self.chunks


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode:
    """`rows` requests of `context` tokens each, with so many masters."""

    degree: int
    rows: int
    context: int
    masters: int

    @property
    def name(self) -> str:
        """Unique among points."""
        return (
            f"decode {self.rows} x {self.context}, masters {self.masters}, at degree {self.degree}"
        )

    @property
    def tokens(self) -> int:
        """KV that it needs, with some steps of headroom."""
        return self.rows * (self.context + _SHORT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Migration:
    """So many tokens from one instance to another."""

    tokens: int

    @property
    def name(self) -> str:
        """Unique among points."""
        return f"migrate {self.tokens}"


Point: TypeAlias = Walk | Decode | Migration


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What there is to measure.

    Attributes:
      padding: Compiled sizes.
      slots: KV tokens of an instance.
    """

    padding: Padding
    slots: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """Points of one kind and degree; see the module."""

    corners: tuple[Point, ...]
    between: tuple[Point, ...]
    held_out: tuple[Point, ...]

    def all(self) -> tuple[Point, ...]:
        """Every one that may be measured."""
        return (*self.corners, *self.between, *self.held_out)


def walks(degree: int, sizes: Sizes) -> Series:
    """Prefill: whole prompts at every compiled size, packed ones, and chunks over history."""
    largest = sizes.padding.chunks[-1]
    whole = [Walk(degree=degree, lengths=(size * degree,)) for size in sizes.padding.chunks]
    packed = Walk(degree=degree, lengths=(largest // 4 * degree,) * 4)
    resumed = [
        Walk(degree=degree, lengths=(n * degree,), chunks=_WALK) for n in sizes.padding.resumed
    ]
    part = Walk(degree=degree, lengths=(largest // 2 * degree,), chunks=2 * _WALK)
    between = [
        Walk(degree=degree, lengths=(largest // 2 * degree, largest // 4 * degree)),
        Walk(degree=degree, lengths=(largest // 4 * degree,), chunks=2 * _WALK),
        Walk(degree=degree, lengths=(largest * degree,), chunks=2 * _WALK),  # takes longest
    ]
    held_out = [
        Walk(degree=degree, lengths=(largest * 3 // 4 * degree,), chunks=_WALK + 1),
        Walk(degree=degree, lengths=(largest // 3 * degree, largest // 5 * degree)),
        Walk(degree=degree, lengths=(sizes.padding.chunks[0] * 4 // 5 * degree,)),
    ]
    return _series(degree * sizes.slots, [*whole, packed, *resumed, part], between, held_out)


def decodes(degree: int, sizes: Sizes) -> Series:
    """Decode: every compiled number of rows, contexts of some lengths, one master and many."""
    long = sizes.padding.chunks[-1]
    several = sizes.padding.rows[min(1, len(sizes.padding.rows) - 1)]
    corners = [
        _decode(degree, sizes.padding.rows[0] * degree, _SHORT),
        _decode(degree, 1, 2 * long * degree),
        *(_decode(degree, rows * degree, _SHORT) for rows in sizes.padding.rows[1:]),
        _decode(degree, several * degree, long // 4),
        _decode(degree, several, long // 4, masters=1),
    ]
    between = [
        _decode(degree, 1, long),
        _decode(degree, several * degree // 2 or 1, long),
        _decode(degree, several * degree, long // 2),
    ]
    held_out = [
        _decode(degree, 1, long * 3 // 2),
        _decode(degree, several * degree * 3 // 4 or 1, long // 3),
        _decode(degree, several * degree, long // 8),
    ]
    return _series(degree * sizes.slots, corners, between, held_out)


def migrations(sizes: Sizes) -> Series:
    """Moves of one request."""
    corners = [Migration(tokens=tokens) for tokens in (_SHORT, 1024, 4096, sizes.slots // 4)]
    return _series(sizes.slots // 2, corners, (), [Migration(tokens=2048)])


def _decode(degree: int, rows: int, context: int, masters: int | None = None) -> Decode:
    most = min(degree, rows)
    return Decode(degree=degree, rows=rows, context=context, masters=masters or most)


def _series(
    room: int, corners: Sequence[Point], between: Sequence[Point], held_out: Sequence[Point]
) -> Series:
    """Those that fit so many KV tokens, each once."""
    seen: set[str] = set()

    def new(points: Sequence[Point]) -> Iterator[Point]:
        for point in points:
            if point.tokens <= room and point.name not in seen:
                seen.add(point.name)
                yield point

    return Series(
        corners=tuple(new(corners)), between=tuple(new(between)), held_out=tuple(new(held_out))
    )
