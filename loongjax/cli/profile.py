"""`loongjax profile`: how long steps take on the devices at hand."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loongjax.api.progress import progress_bar
from loongjax.cli.options import add_engine_options, add_json_option, llm_arguments
from loongjax.config import engine_config
from loongjax.errors import ConfigError

if TYPE_CHECKING:
    from loongjax.profiler.session import Profile

_log = logging.getLogger(__name__)

_EPILOG = """\
examples:
  loongjax profile --model random:bench58m --instances 4 --out cost.json
  loongjax serve --model random:bench58m --instances 4 --policy loongserve --cost-model cost.json
  loongjax profile --kernels --out tiles.json
"""
_TOLERATED = 0.1


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `profile` to the command's parser."""
    parser = commands.add_parser(
        "profile",
        help="measure steps on these devices, for policies that plan by time",
        description="Measures prefill, chunks over history, decode and migration at every degree, "
        "fits the cost model, and checks it on steps that it has not seen. Wants an otherwise idle "
        "machine. A run that was broken off goes on where it was.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_options(parser, planning=False, needs_model=False)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="where the cost model goes (JSON)"
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="time the tiles of attention on one TPU or GPU instead of steps of a model; --out is "
        "their table then",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures, writes the file, and tells how good it is."""
    if not options.out.absolute().parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no such folder")
    if options.kernels:
        _time_kernels(options)
        return
    if options.model is None:
        raise ConfigError("say whose steps to measure with --model, or measure --kernels")
    began = time.monotonic()
    config = engine_config(**llm_arguments(options))
    if config.cost_model is not None:
        raise ConfigError("profile makes a cost model and takes none; leave --cost-model out")
    config = replace(config, policy="first_come")
    from loongjax.profiler.run import profile

    with progress_bar("profile", unit="point") as on_progress:
        found = profile(options.model, config, options.out, on_progress)
    report = describe(found, options.out, time.monotonic() - began)
    for kind, check in found.held_out.items():
        if check.median > _TOLERATED:
            _log.warning(
                "%s: off by %.0f %% in the median on held-out steps; measure on an idle machine",
                *(kind, 100 * check.median),
            )
    if options.json:
        print(json.dumps(report), flush=True)
        return
    print(f"wrote {options.out}: {found.points} points in {report['wall_s']:.0f} s")
    for kind, check in found.held_out.items():
        print(
            f"{kind}: error on {check.points} held-out steps {100 * check.median:.1f} % in the "
            f"median, {100 * check.worst:.1f} % at worst"
        )


def _time_kernels(options: argparse.Namespace) -> None:
    """Times the candidates on the first device, and writes the table of the fastest."""
    from loongjax.profiler.kernels import measure_kernels

    with progress_bar("kernels", unit="shape") as on_progress:
        tuning = measure_kernels(on_progress)
    options.out.write_text(tuning.to_json(), encoding="utf-8")
    if options.json:
        print(json.dumps(dataclasses.asdict(tuning)), flush=True)
        return
    print(f"wrote {options.out}: tiles of {len(tuning.striped_attention)} shapes on {tuning.chip}")


def describe(found: Profile, out: Path, wall_s: float) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "out": str(out),
        "fingerprint": dataclasses.asdict(found.sib.fingerprint),
        "degrees": sorted(found.sib.decode_fits),
        "points": found.points,
        "resumed": found.resumed,
        "held_out": {kind: dataclasses.asdict(check) for kind, check in found.held_out.items()},
        "crowding": dataclasses.asdict(found.sib.crowding),
        "host": dataclasses.asdict(found.sib.host),
        "wall_s": round(wall_s, 3),
    }
