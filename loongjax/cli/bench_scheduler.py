"""`loongjax bench scheduler`: how long a policy takes to decide."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

import numpy as np

from loongjax.cli.options import add_json_option
from loongjax.scheduler.policies import policy_names
from loongjax.simulator.deciding import Deciding, time_deciding

_log = logging.getLogger(__name__)

_CASES = ((250, 64, 4), (1_000, 256, 16), (4_000, 1_024, 64), (10_000, 4_000, 256))


def add_command(parts: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `scheduler` to the parser of `bench`."""
    parser = parts.add_parser(
        "scheduler",
        help="time of a plan, snapshot included, by how many requests there are",
        description="Times every plan of a replay on the virtual clock while so many requests "
        "wait and decode, and fits how the time grows with them.",
    )
    parser.add_argument(
        "--case",
        type=case,
        action="append",
        metavar="W,R,N",
        help="requests that wait and that run, and instances; may be repeated (default: "
        "1000,256,16 and 10000,4000,256, one smaller and one between)",
    )
    parser.add_argument(
        "--plans", type=int, default=300, metavar="N", help="plans of each case (default 300)"
    )
    parser.add_argument(
        "--policy",
        default="elastic",
        metavar="NAME",
        help=f"who plans: {', '.join(policy_names())} (default elastic)",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def case(text: str) -> tuple[int, int, int]:
    """`1000,256,16` as numbers."""
    try:
        waiting, running, instances = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a case is three numbers with commas between them, such as 1000,256,16, not {text!r}"
        ) from None
    return waiting, running, instances


def run(options: argparse.Namespace) -> None:
    """Times all cases and prints them."""
    found = []
    for waiting, running, instances in options.case or _CASES:
        times = time_deciding(
            options.policy,
            waiting=waiting,
            running=running,
            instances=instances,
            plans=options.plans,
        )
        found.append(describe_case(waiting, running, times))
        _log.info("%s", line(found[-1]))
    result = {"policy": options.policy, "cases": found, "exponent": exponent(found)}
    if options.json:
        print(json.dumps(result), flush=True)
        return
    for each in found:
        print(line(each))
    if result["exponent"] is not None:
        print(f"time grows as requests to the power of {result['exponent']:.2f}")


def describe_case(waiting: int, running: int, times: Deciding) -> dict[str, Any]:
    """What `--json` says of a case."""
    return {
        "waiting": waiting,
        "running": running,
        "instances": times.instances,
        "seen": {"waiting": times.waiting, "running": times.running},
        "plans": len(times.seconds),
        "p50_ms": times.percentile_ms(50),
        "p99_ms": times.percentile_ms(99),
    }


def exponent(cases: list[dict[str, Any]]) -> float | None:
    """The slope of log(p50) over log(requests); None with fewer than two sizes."""
    sizes = [each["seen"]["waiting"] + each["seen"]["running"] for each in cases]
    if len(set(sizes)) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log([each["p50_ms"] for each in cases]), 1)[0])


def line(each: dict[str, Any]) -> str:
    """A case for people."""
    return (
        f"{each['waiting']:,} waiting, {each['running']:,} running, {each['instances']} instances: "
        f"p50 {each['p50_ms']:.2f} ms, p99 {each['p99_ms']:.2f} ms"
    )
