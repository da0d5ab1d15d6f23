"""Makes the calibrated cost models of a 7B model on A800 GPUs that loongjax ships.

    python scripts/fit_a800.py --data calibration_a800_lwm7b.csv

Reads a table of measured times (columns `source, sp, tp, masters, batch, input_len,
scale_down, prefill_ms, decode_ms`: LoongServe's public notebooks, Apache-2.0), and writes one
JSON file for each tensor parallelism. Prefill coefficients are the published ones, decode
coefficients are fitted to the table here; both are held against the table, and decode also
by leaving each row out in turn. What nobody measured is said to be inferred, and how.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import loongjax.costmodel
from loongjax.costmodel.fit import (
    DecodeFit,
    DecodeSample,
    MigrateFit,
    PrefillFit,
    PrefillSample,
    decode_errors,
    fit_decode,
    fit_prefill,
    leave_one_out,
    prefill_errors,
)
from loongjax.costmodel.protocol import ChunkWork, DecodeWork
from loongjax.costmodel.sib import Fingerprint, FitT, HostTime, ScalingInformationBase

MS = 1e-3
# Milliseconds: constant, per token, per token squared. From LoongServe's notebooks.
PUBLISHED = {
    (4, 2): (37.5, 0.010016, 1.939e-7),
    (2, 4): (37.4, 0.01109, 1.870e-7),
    (1, 8): (37.0, 0.01506, 1.778e-7),
    (8, 1): (43.8, 0.01163, 1.973e-7),
}
# Inferred: (sp, tp) in the same form. Two GPUs together take 0.04 ms a token and 7.76e-7 ms a
# squared one at every degree; constants fall towards the 18 ms of one GPU. The one row of a
# single GPU gives its own time a token.
INFERRED = {
    (1, 2): (18.0, 0.04, 7.76e-7),
    (2, 2): (24.0, 0.02, 3.88e-7),
    (3, 2): (31.0, 0.04 / 3, 7.76e-7 / 3),
    (1, 4): (30.0, 0.02218, 3.74e-7),
    (1, 1): (18.1, 0.0505, 1.55e-6),
}
# What the published request rate of LightLLM's SplitFuse comes to for each fused step.
RESUMED_MS = 11.0
KV_BYTES = 524_288  # of a token: 32 layers of 32 heads of 128, key and value, float16
LINK_BYTES_PER_S = 200e9 * 0.7  # NVLink of an A800 in one direction; 70 % assumed attained
POOL_SLOTS = {1: 110_000, 2: 210_000, 4: 500_000, 8: 900_000}
MEASURED_DECODE = {2: (4, 2), 4: (2, 4), 8: (1, 8)}  # tensor parallelism: group with enough rows


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    source: str
    group: tuple[int, int]
    prefill: PrefillSample
    decode: DecodeSample


def read_table(path: Path) -> list[Row]:
    """The lines of the table that were measured without scale-down."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["scale_down"] != "0":
                continue
            sp, batch, length = int(line["sp"]), int(line["batch"]), int(line["input_len"])
            work = DecodeWork(batch, batch * length, int(line["masters"]), length)
            rows.append(
                Row(
                    source=line["source"],
                    group=(sp, int(line["tp"])),
                    prefill=PrefillSample(
                        degree=sp,
                        chunks=(ChunkWork(length, 0),) * batch,
                        seconds=float(line["prefill_ms"]) * MS,
                    ),
                    decode=DecodeSample(
                        degree=sp, work=work, seconds=float(line["decode_ms"]) * MS
                    ),
                )
            )
    return rows


def published_prefill(group: tuple[int, int], history_s: float) -> PrefillFit:
    """The published, or else inferred, coefficients of a group."""
    constant, token, square = PUBLISHED.get(group) or INFERRED[group]
    return _short(
        PrefillFit(
            constant_s=constant * MS,
            resumed_constant_s=RESUMED_MS * MS,
            token_s=token * MS,
            square_s=square * MS,
            history_s=history_s,
        )
    )


def _short(fit: FitT) -> FitT:
    """With as many digits as mean something."""
    return replace(fit, **{name: float(f"{value:.5g}") for name, value in asdict(fit).items()})


def decode_fits(rows: Sequence[Row]) -> dict[int, DecodeFit]:
    """By tensor parallelism; one GPU alone is inferred from two."""
    fits = {
        tp: fit_decode([row.decode for row in rows if row.group == group])
        for tp, group in MEASURED_DECODE.items()
    }
    alone = [row.decode for row in rows if row.group == (1, 1)]
    constant = min(sample.seconds for sample in alone)
    fits[1] = replace(
        fits[2],
        constant_s=constant,
        kv_token_s=2 * fits[2].kv_token_s,
        longest_s=2 * fits[2].longest_s,
        master_row_s=2 * fits[2].master_row_s,
    )
    return fits


def make_sib(tensor_parallel: int, decode: DecodeFit) -> ScalingInformationBase:
    """The cost model of instances of so many GPUs."""
    groups = [group for group in (*PUBLISHED, *INFERRED) if group[1] == tensor_parallel]
    measured = MEASURED_DECODE.get(tensor_parallel)
    basis = (
        "LoongServe (SOSP '24), public notebooks, LWM-1M-Text (Llama-2 7B) on 8 A800. Prefill: "
        f"published fit for {sorted(set(groups) & set(PUBLISHED))} (degree, tensor parallel), "
        f"inferred for {sorted(set(groups) & set(INFERRED))}. Decode: "
        + (f"fitted to the rows of {measured}, " if measured else "inferred from two GPUs, ")
        + "taken to be alike for each rank at other degrees. Steps with history: constant from "
        "LightLLM's published rate, reading as in decode. Migration: NVLink at 70 %. Host: an "
        "estimate"
    )
    return ScalingInformationBase(
        fingerprint=Fingerprint(
            hardware="a800",
            model="llama2-7b",
            tensor_parallel=tensor_parallel,
            dtype="float16",
            software="LoongServe",
        ),
        basis=basis,
        prefill_fits={
            sp: published_prefill((sp, tp), decode.kv_token_s / sp) for sp, tp in sorted(groups)
        },
        decode_fits={measured[0] if measured else 1: decode},
        migrate_fit=_short(
            MigrateFit(constant_s=MS, token_s=KV_BYTES / (LINK_BYTES_PER_S * tensor_parallel))
        ),
        host=HostTime(turn_s=0.0003, step_s=0.0005, row_s=0.00001),
        pool_slots=POOL_SLOTS[tensor_parallel],
    )


def report(rows: Sequence[Row]) -> str:
    """How well the formulas describe the table: at the rows, and at rows left out.

    Left out are rows of one experiment (source and group) with at least five others, so that
    what remains still spans the sizes; a lone small row would be the only one to know the
    constant.
    """
    lines = ["group (sp, tp), rows: mean and largest error of prefill; of decode"]
    experiments: dict[tuple[str, tuple[int, int]], list[Row]] = {}
    for row in rows:
        experiments.setdefault((row.source, row.group), []).append(row)
    for (source, group), found in experiments.items():
        if len(found) < 6:
            continue
        prefills, decodes = [row.prefill for row in found], [row.decode for row in found]
        inside = prefill_errors(published_prefill(group, 0.0), prefills)
        fitted = decode_errors(fit_decode(decodes), decodes)
        left = leave_one_out(prefills, lambda others, one: fit_prefill(others).seconds(one.chunks))
        left_decode = leave_one_out(
            decodes, lambda others, one: fit_decode(others).seconds(one.degree, one.work)
        )
        lines += [
            f"{source} {group}, {len(found)}: in sample {inside.mean:.1%} {inside.worst:.1%}; "
            f"{fitted.mean:.1%} {fitted.worst:.1%}",
            f"{'':18}leave one out {left.mean:.1%} {left.worst:.1%}; "
            f"{left_decode.mean:.1%} {left_decode.worst:.1%}",
        ]
    return "\n".join(lines)


def main() -> None:
    """Reads the table, writes the files, prints the errors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the table of measured times")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(loongjax.costmodel.__file__).parent / "measured",
        help="folder of the files (default: where loongjax looks for them)",
    )
    options = parser.parse_args()
    rows = read_table(options.data)
    for tensor_parallel, decode in sorted(decode_fits(rows).items()):
        sib = make_sib(tensor_parallel, _short(decode))
        made_for = sib.fingerprint
        path = options.out / f"{made_for.hardware}-{made_for.model}-tp{tensor_parallel}.json"
        sib.save(path)
        print(f"wrote {path}")
    print(report(rows))


if __name__ == "__main__":
    main()
