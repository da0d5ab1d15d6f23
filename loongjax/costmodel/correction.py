"""What a cost model learns while it serves: a bounded factor for each kind of step and degree.

The fitted model says how times depend on work; load on the machine, clocks and temperature
shift all of them. The factor follows the measured times slowly and never leaves its bounds,
so that a stalled step cannot turn the planner's head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

from loongjax.costmodel.protocol import ChunkWork, CostModel, DecodeWork
from loongjax.errors import ConfigError

CostKind: TypeAlias = Literal["prefill", "decode", "migrate"]


class CorrectedCost:
    """A `CostModel` whose predictions are multiplied by what it learned. Not thread-safe.

    Attributes:
      bound: Factors stay in [1 / bound, bound].
      rate: The part of a new error that is taken over, in (0, 1]. Lower: calmer, slower.
    """

    def __init__(self, base: CostModel, *, bound: float = 2.0, rate: float = 0.1) -> None:
        """Starts with factors of 1.

        Raises:
          ConfigError: `bound` is below 1, or `rate` is outside (0, 1].
        """
        if not (bound >= 1.0 and 0.0 < rate <= 1.0):
            raise ConfigError(
                f"bound must be at least 1, and rate in (0, 1]; they are {bound} and {rate}"
            )
        self.bound = bound
        self.rate = rate
        self._base = base
        self._logs: dict[tuple[CostKind, int], float] = {}

    def prefill(self, degree: int, chunks: Sequence[ChunkWork]) -> float:
        """See `CostModel`."""
        return self._base.prefill(degree, chunks) * self.factor("prefill", degree)

    def decode(self, degree: int, work: DecodeWork) -> float:
        """See `CostModel`."""
        return self._base.decode(degree, work) * self.factor("decode", degree)

    def migrate(self, tokens: int) -> float:
        """See `CostModel`."""
        return self._base.migrate(tokens) * self.factor("migrate", 1)

    def factor(self, kind: CostKind, degree: int) -> float:
        """What predictions of this kind and degree are multiplied by."""
        return math.exp(self._logs.get((kind, degree), 0.0))

    def observe(self, kind: CostKind, degree: int, *, predicted: float, measured: float) -> None:
        """Takes a step's time in.

        Args:
          kind: What it was.
          degree: Of its group; a move has degree 1.
          predicted: What this object said [s].
          measured: What it took [s]; a time of 0 or less, of a clock that stood, is left out.
        """
        if predicted <= 0.0 or measured <= 0.0:
            return
        limit = math.log(self.bound)
        error = max(-2 * limit, min(2 * limit, math.log(measured / predicted)))
        moved = self._logs.get((kind, degree), 0.0) + self.rate * error
        self._logs[kind, degree] = max(-limit, min(limit, moved))
