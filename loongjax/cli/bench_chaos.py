"""`loongjax bench chaos`: what a server does among hostile clients and failing steps."""

from __future__ import annotations

import argparse
import json

from loongjax.cli.options import add_json_option
from loongjax.errors import BenchError, ConfigError

_DESCRIPTION = """\
Starts a server of a small random model in a process of its own, lets its steps fail now and then,
and sends it requests of every kind: ordinary and impossible ones, aborts, dropped connections,
expired deadlines, hostile messages, slow readers, while instances drain and come back. Ends with
exit code 1 if a request had no end, an answer was wrong, or anything leaked.
"""


def add_command(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `chaos` to the parser of `bench`."""
    parser = benches.add_parser(
        "chaos",
        help="a server among hostile clients and failing steps",
        description=_DESCRIPTION,
        epilog="example:\n  loongjax bench chaos --requests 5000 --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for flag, default, text in (
        ("--requests", 5000, "how many to send"),
        ("--instances", 4, "elastic instances of the server"),
        ("--seed", 0, "of everything that is drawn"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default {default})"
        )
    parser.add_argument(
        "--failure-rate",
        type=float,
        default=0.002,
        metavar="P",
        help="share of steps that fail (default 0.002)",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Runs it, and prints what came of it."""
    try:
        from serving.bench.chaos import run_chaos
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this needs the package of {error.name}; pip install 'loongjax[serve,dev]'"
        ) from error
    if options.requests < 10 or options.instances < 1:
        raise ConfigError(
            f"--requests must be at least 10 and --instances at least 1, not {options.requests} "
            f"and {options.instances}"
        )
    if not 0.0 <= options.failure_rate < 1.0:
        raise ConfigError(f"--failure-rate must be in [0, 1), not {options.failure_rate}")
    report = run_chaos(
        flaky_server(options.failure_rate, options.seed),
        requests=options.requests,
        instances=options.instances,
        seed=options.seed,
    )
    if options.json:
        print(json.dumps(report), flush=True)
    else:
        for name, value in report.items():
            print(f"{name:>16}  {value}")
    if not report["passed"]:
        raise BenchError(f"chaos did not pass: {report['problems'][:3]}")


def flaky_server(failure_rate: float, seed: int) -> list[str]:
    """What Python runs for a server of which that share of steps fails."""
    return ["-m", "loongjax.cli.flaky_server", str(failure_rate), str(seed)]
