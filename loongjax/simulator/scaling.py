"""How often the number of instances that work on requests changed, and how much KV moved."""

from __future__ import annotations

from loongjax.plan import DecodeStep, MigrateStep, PrefillStep, RequestId, Step


class ScalingCounter:
    """Counts changes from step to step.

    A scale-down is a prefill step that keeps KV on fewer instances than worked on it, or a
    decode step on fewer than the last one of any of its requests; a scale-up is a decode step
    on more than the last one of every one of them.

    Attributes:
      ups, downs: Scale-ups and scale-downs.
      migrated_tokens: KV tokens that migration steps moved.
    """

    def __init__(self) -> None:
        self.ups = 0
        self.downs = 0
        self.migrated_tokens = 0
        self._degrees: dict[RequestId, int] = {}

    def add(self, step: Step) -> None:
        """A step was launched."""
        if isinstance(step, MigrateStep):
            self.migrated_tokens += sum(move.tokens for move in step.moves)
        elif isinstance(step, DecodeStep):
            self._decode(step)
        else:
            self._prefill(step)

    def forget(self, request: RequestId) -> None:
        """A request ended."""
        self._degrees.pop(request, None)

    def _prefill(self, step: PrefillStep) -> None:
        homes = {share.instance for placement in step.keep for share in placement.shares}
        self.downs += len(homes) < len(step.group)
        for placement in step.keep:
            self._degrees[placement.request] = len(placement.shares)

    def _decode(self, step: DecodeStep) -> None:
        degree = len(step.group)
        known = self._degrees.get
        before = {known(row[0], degree) for row in step.rows}
        self.ups += degree > max(before)
        self.downs += degree < min(before)
        if before != {degree}:
            self._degrees.update((row.request, degree) for row in step.rows)
