"""The scaling information base: how long steps take on one kind of hardware, by degree.

Owns the fitted coefficients of one hardware, model and tensor parallelism, and their file. A
degree that was never measured is interpolated; what differs from degree to degree by the
division of work alone is scaled before. A file of another version, or made for something
else, is refused: a wrong cost model plans badly without anyone noticing.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from loongjax.costmodel.fit import DecodeFit, MigrateFit, PrefillFit
from loongjax.costmodel.padding import Padding
from loongjax.costmodel.protocol import ChunkWork, DecodeWork
from loongjax.errors import ConfigError

ESTIMATE = "estimate"
"""The software of a fingerprint that nobody measured with."""
VERSION = 4
"""Of the file. Raised whenever a field changes its meaning."""

FitT = TypeVar("FitT", PrefillFit, DecodeFit, MigrateFit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fingerprint:
    """What times were measured on; all of it must agree for them to be of use.

    Attributes:
      hardware: The device, such as `a800` or what jax calls it.
      model: The name of the model's shape.
      tensor_parallel: Devices of an instance.
      dtype: Of weights and KV.
      software: What ran it, where that matters.
    """

    hardware: str
    model: str
    tensor_parallel: int
    dtype: str
    software: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTime:
    """What the engine's one thread spends [s], while devices may wait for it.

    Attributes:
      turn_s: For looking at the cluster once and planning.
      step_s: For each step that it launches and whose results it takes.
      row_s: For each request in a step.
    """

    turn_s: float
    step_s: float
    row_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Crowding:
    """Part of its time by which a step takes longer while another group works on another: 0 on
    devices of their own, 1 or more where all share the same cores. Migrations are taken to be
    like decodes.

    Attributes:
      prefill_prefill, prefill_decode: Of a prompt beside another prompt, and beside a decode.
      decode_prefill, decode_decode: Of a decode, likewise.
    """

    prefill_prefill: float = 0.0
    prefill_decode: float = 0.0
    decode_prefill: float = 0.0
    decode_decode: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingInformationBase:
    """A `CostModel` of fitted coefficients.

    Attributes:
      fingerprint: What it is of.
      basis: Where its numbers come from, in words.
      prefill, decode: Fits by degree, at least one of each. Read only.
      migrate: Moving KV between two instances.
      host: Time of the engine itself.
      pool_slots: KV tokens that an instance of this kind holds, if that was found too.
      padding: The sizes to which steps are rounded up. None: to none.
      crowding: How groups that work at once slow each other down.
    """

    fingerprint: Fingerprint
    basis: str
    prefill_fits: Mapping[int, PrefillFit]
    decode_fits: Mapping[int, DecodeFit]
    migrate_fit: MigrateFit
    host: HostTime
    pool_slots: int | None = None
    padding: Padding | None = None
    crowding: Crowding = Crowding()
    _prefill: dict[int, PrefillFit] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )
    _decode: dict[int, DecodeFit] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for kind, fits in (("prefill", self.prefill_fits), ("decode", self.decode_fits)):
            if not fits or min(fits) < 1:
                raise ConfigError(
                    f"a cost model needs {kind} fits of at least one degree, all of them at "
                    f"least 1; it has {sorted(fits)}. Measure more degrees"
                )

    @property
    def is_estimate(self) -> bool:
        """Whether it was computed from what is known of the hardware, not measured."""
        return self.fingerprint.software == ESTIMATE

    # ---- CostModel -------------------------------------------------------------------

    def prefill(self, degree: int, chunks: Sequence[ChunkWork]) -> float:
        """See `CostModel`."""
        fit, padding = self.prefill_fit(degree), self.padding
        if padding is None:
            return fit.seconds(chunks)
        return fit.seconds(padding.tiled(degree, chunks), padding.tokens(degree, chunks))

    def decode(self, degree: int, work: DecodeWork) -> float:
        """See `CostModel`."""
        padded = work if self.padding is None else self.padding.work(degree, work)
        return self.decode_fit(degree).seconds(degree, padded)

    def migrate(self, tokens: int) -> float:
        """See `CostModel`."""
        return self.migrate_fit.seconds(tokens)

    # ---- coefficients ----------------------------------------------------------------

    def prefill_fit(self, degree: int) -> PrefillFit:
        """Coefficients at a degree, interpolated if it was not measured.

        Time for each token and square shrinks as 1 / degree; what is left of it, and the
        constants, are interpolated in a straight line. Outside of what was measured, the
        former stay as at the nearest degree, and constants follow the nearest two.
        """
        found = self._prefill.get(degree)
        if found is None:
            shared = ("token_s", "square_s", "history_s")
            whole = {d: _scaled(fit, shared, float(d)) for d, fit in self.prefill_fits.items()}
            found = _scaled(_between(whole, degree, shared), shared, 1 / degree)
            self._prefill[degree] = found
        return found

    def decode_fit(self, degree: int) -> DecodeFit:
        """Coefficients at a degree, interpolated if it was not measured; see `prefill_fit`.
        They are for each rank already, so that nothing is scaled.
        """
        found = self._decode.get(degree)
        if found is None:
            held = ("kv_token_s", "longest_s", "master_row_s", "row_s")
            found = self._decode[degree] = _between(self.decode_fits, degree, held)
        return found

    # ---- file ------------------------------------------------------------------------

    def save(self, path: Path | str) -> None:
        """Writes a JSON file that `load` reads."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """What stands in the file."""
        return {
            "version": VERSION,
            "fingerprint": asdict(self.fingerprint),
            "basis": self.basis,
            "prefill": {str(d): asdict(fit) for d, fit in sorted(self.prefill_fits.items())},
            "decode": {str(d): asdict(fit) for d, fit in sorted(self.decode_fits.items())},
            "migrate": asdict(self.migrate_fit),
            "host": asdict(self.host),
            "pool_slots": self.pool_slots,
            "padding": None if self.padding is None else asdict(self.padding),
            "crowding": asdict(self.crowding),
        }

    @classmethod
    def load(
        cls, path: Path | str, *, expected: Fingerprint | None = None
    ) -> ScalingInformationBase:
        """Reads a file.

        Args:
          path: What `save` wrote.
          expected: What it must be of. None: anything.

        Raises:
          ConfigError: The file cannot be read, is of another version, or was made for
            something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the cost model {path}: {error}") from error
        return cls.from_json(content, where=str(path), expected=expected)

    @classmethod
    def from_json(
        cls, content: object, *, where: str, expected: Fingerprint | None = None
    ) -> ScalingInformationBase:
        """Makes it of a file's content; see `load`."""
        version = content.get("version") if isinstance(content, dict) else None
        if not isinstance(content, dict) or version != VERSION:
            raise ConfigError(
                f"the cost model {where} has version {version}; this loongjax reads version "
                f"{VERSION}. Measure again with `loongjax profile`"
            )
        try:
            found = cls(
                fingerprint=Fingerprint(**content["fingerprint"]),
                basis=content["basis"],
                prefill_fits={int(d): PrefillFit(**v) for d, v in content["prefill"].items()},
                decode_fits={int(d): DecodeFit(**v) for d, v in content["decode"].items()},
                migrate_fit=MigrateFit(**content["migrate"]),
                host=HostTime(**content["host"]),
                pool_slots=content["pool_slots"],
                padding=_padding(content["padding"]),
                crowding=Crowding(**content["crowding"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"the cost model {where} is damaged ({type(error).__name__}: {error}). Measure "
                "again with `loongjax profile`"
            ) from error
        if expected is not None and found.fingerprint != expected:
            raise ConfigError(
                f"the cost model {where} is of {found.fingerprint}, but this is {expected}. "
                "Measure here with `loongjax profile`, or give the file that belongs here"
            )
        return found


def _padding(content: Mapping[str, Any] | None) -> Padding | None:
    if content is None:
        return None
    lists = {name: tuple(content[name]) for name in ("chunks", "resumed", "rows")}
    return Padding(**lists, tile=content["tile"])


def _scaled(fit: FitT, names: tuple[str, ...], factor: float) -> FitT:
    return replace(fit, **{name: getattr(fit, name) * factor for name in names})


def _between(fits: Mapping[int, FitT], degree: int, held: tuple[str, ...]) -> FitT:
    """The fit at a degree, in a straight line between its neighbours; beyond the ends, `held`
    fields stay as they are there, and the others go on, never below 0.
    """
    known = sorted(fits)
    if degree in fits:
        return fits[degree]
    if len(known) == 1:
        return fits[known[0]]
    right = min(max(bisect_left(known, degree), 1), len(known) - 1)
    low, high = known[right - 1], known[right]
    way = (degree - low) / (high - low)
    inside = min(max(way, 0.0), 1.0)
    first, second = fits[low], fits[high]
    values = {}
    for each in fields(first):
        a, b = getattr(first, each.name), getattr(second, each.name)
        values[each.name] = max(0.0, a + (b - a) * (inside if each.name in held else way))
    return replace(first, **values)
