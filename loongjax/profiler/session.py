"""A whole profile: points in order, fits, and the check on points that no fit has seen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import TypeAlias

from loongjax.costmodel import Crowding, Fingerprint, HostTime, ScalingInformationBase
from loongjax.costmodel.fit import (
    DecodeFit,
    MigrateFit,
    PrefillFit,
    fit_decode,
    fit_migrate,
    fit_prefill,
)
from loongjax.profiler.design import (
    Point,
    Series,
    Sizes,
    decodes,
    migrations,
    walks,
)
from loongjax.profiler.log import PointLog
from loongjax.profiler.measure import Samples, crowding, measure, samples
from loongjax.profiler.runner import Runner

_log = logging.getLogger(__name__)

_GOOD = 0.1
"""A point that was foretold with no larger error says that the fit is good there."""
_GOOD_IN_A_ROW = 2

OnProgress: TypeAlias = Callable[[int, int, str], object]
"""Called with what is done, of how much at most, and what comes next."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Relative errors of one kind of step at held-out points."""

    median: float
    worst: float
    points: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What was found.

    Attributes:
      sib: The cost model.
      held_out: Its errors by kind of step; kinds without such points are left out.
      points: How many were measured, and how many of them by an earlier, broken-off run.
      resumed: See `points`.
    """

    sib: ScalingInformationBase
    held_out: Mapping[str, Check]
    points: int
    resumed: int


class Session:
    """Measures and fits; see the module."""

    def __init__(
        self,
        runner: Runner,
        sizes: Sizes,
        log: PointLog,
        on_progress: OnProgress = lambda done, total, what: None,
    ) -> None:
        self._runner = runner
        self._sizes = sizes
        self._log = log
        self._tell = on_progress
        self._padding = sizes.padding
        self._done = 0
        degrees = runner.topology.degrees
        self._walks = {degree: walks(degree, sizes) for degree in degrees}
        self._decodes = {degree: decodes(degree, sizes) for degree in degrees}
        moves = runner.topology.instances > 1 and degrees[-1] > 1
        self._moves = migrations(sizes) if moves else Series(corners=(), between=(), held_out=())
        everything = [*self._walks.values(), *self._decodes.values(), self._moves]
        self._total = sum(len(series.all()) for series in everything) + 1

    def run(self, fingerprint: Fingerprint, basis: str) -> Profile:
        """All but the host's time, which is left at 0.

        Raises:
          StepError: A step failed.
          ConfigError: The pool is too small for enough points.
        """
        prefill = {d: self._fit_prefill(series) for d, series in self._walks.items()}
        decode = {d: self._fit_decode(series) for d, series in self._decodes.items()}
        migrate = self._fit_migrate()
        sib = ScalingInformationBase(
            fingerprint=fingerprint,
            basis=basis,
            prefill_fits=prefill,
            decode_fits=decode,
            migrate_fit=migrate,
            host=HostTime(turn_s=0.0, step_s=0.0, row_s=0.0),
            pool_slots=self._sizes.slots,
            padding=self._padding,
            crowding=self._crowding(),
        )
        held_out = self._check(sib)
        self._tell(self._total, self._total, "")
        return Profile(sib=sib, held_out=held_out, points=self._done, resumed=self._log.resumed)

    # ---- points ----------------------------------------------------------------------

    def _take(self, point: Point) -> Samples:
        self._tell(self._done, self._total, point.name)
        seconds = self._log.get(point.name)
        if seconds is None:
            seconds = measure(point, self._runner)
            self._log.put(point.name, seconds)
        self._done += 1
        return samples(point, seconds, self._padding)

    def _crowding(self) -> Crowding:
        name = "crowding"
        self._tell(self._done, self._total, name)
        names = [each.name for each in fields(Crowding)]
        known = self._log.get(name)
        if known is None or len(known) != len(names):  # another loongjax measured other numbers
            known = list(asdict(crowding(self._runner, self._padding)).values())
            self._log.put(name, known)
        self._done += 1
        return Crowding(**dict(zip(names, known, strict=True)))

    def _explore(
        self, series: Series, errors: Callable[[Samples, Samples], list[float]]
    ) -> Samples:
        """Corners, and points in between until the fit of what came before foretells them.

        `errors` fits its first argument and gives the errors at the second.
        """
        taken = Samples()
        for point in series.corners:
            taken += self._take(point)
        good = 0
        for point in series.between:
            if good == _GOOD_IN_A_ROW:
                break
            new = self._take(point)
            off = max(map(abs, errors(taken, new)))
            good = good + 1 if off <= _GOOD else 0
            _log.info("%s: foretold with an error of %.1f %%", point.name, 100 * off)
            taken += new
        return taken

    # ---- fits ------------------------------------------------------------------------

    def _fit_prefill(self, series: Series) -> PrefillFit:
        def errors(known: Samples, new: Samples) -> list[float]:
            fit = fit_prefill(known.prefill)
            return [fit.seconds(s.chunks, s.computed) / s.seconds - 1.0 for s in new.prefill]

        return fit_prefill(self._explore(series, errors).prefill)

    def _fit_decode(self, series: Series) -> DecodeFit:
        def errors(known: Samples, new: Samples) -> list[float]:
            fit = fit_decode(known.decode)
            return [fit.seconds(s.degree, s.work) / s.seconds - 1.0 for s in new.decode]

        return fit_decode(self._explore(series, errors).decode)

    def _fit_migrate(self) -> MigrateFit:
        """Of nothing where there is one instance: nothing ever moves there."""
        if not self._moves.corners:
            return MigrateFit(constant_s=0.0, token_s=0.0)
        taken = Samples()
        for point in self._moves.corners:
            taken += self._take(point)
        return fit_migrate(taken.migrate)

    # ---- check -----------------------------------------------------------------------

    def _check(self, sib: ScalingInformationBase) -> dict[str, Check]:
        off: dict[str, list[float]] = {"prefill": [], "decode": [], "migrate": []}
        series = [*self._walks.values(), *self._decodes.values(), self._moves]
        for point in [point for each in series for point in each.held_out]:
            taken = self._take(point)
            for prefill in taken.prefill:
                found = sib.prefill(prefill.degree, prefill.chunks)
                off["prefill"].append(found / prefill.seconds - 1.0)
            for decode in taken.decode:
                found = sib.decode(decode.degree, decode.work)
                off["decode"].append(found / decode.seconds - 1.0)
            for move in taken.migrate:
                off["migrate"].append(sib.migrate(move.tokens) / move.seconds - 1.0)
        return {kind: _summary(errors) for kind, errors in off.items() if errors}


def _summary(errors: Sequence[float]) -> Check:
    sizes = [abs(error) for error in errors]
    return Check(median=median(sizes), worst=max(sizes), points=len(sizes))
