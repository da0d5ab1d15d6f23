"""A cost model with round numbers."""

from __future__ import annotations

from loongjax.costmodel.fit import DecodeFit, MigrateFit, PrefillFit
from loongjax.costmodel.sib import Fingerprint, HostTime, ScalingInformationBase

FINGERPRINT = Fingerprint(hardware="toy", model="tiny", tensor_parallel=1, dtype="float32")


def prefill_fit(degree: int) -> PrefillFit:
    return PrefillFit(
        constant_s=0.01 * (1 + degree),
        resumed_constant_s=0.01,
        token_s=1e-5 / degree,
        square_s=1e-9 / degree,
        history_s=1e-7 / degree,
    )


def decode_fit(degree: int) -> DecodeFit:
    return DecodeFit(
        constant_s=0.01 + 0.001 * degree,
        kv_token_s=1e-7,
        longest_s=0.0,
        master_row_s=1e-5,
        row_s=1e-6 * (degree > 1),
    )


def toy_sib(
    degrees: tuple[int, ...] = (1, 2, 4), host: HostTime | None = None
) -> ScalingInformationBase:
    return ScalingInformationBase(
        fingerprint=FINGERPRINT,
        basis="made up",
        prefill_fits={degree: prefill_fit(degree) for degree in degrees},
        decode_fits={degree: decode_fit(degree) for degree in degrees},
        migrate_fit=MigrateFit(constant_s=0.001, token_s=1e-6),
        host=host or HostTime(turn_s=0.0, step_s=0.0, row_s=0.0),
        pool_slots=1_000,
    )
