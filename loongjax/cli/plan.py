"""`loongjax plan`: the cheapest hardware and policy that serve a workload well."""

from __future__ import annotations

import argparse
import json
from typing import Any

from loongjax.cli.options import add_json_option
from loongjax.cli.simulate import add_workload_options, read_jobs
from loongjax.errors import ConfigError
from loongjax.scheduler.policies import policy_names
from loongjax.simulator import Objective
from loongjax.simulator.capacity import Budget, Option, describe_option, plan_capacity

_EPILOG = """\
example:
  loongjax plan --workload mixed --rate 0.2 --requests 300 --hardware a800x16 --hardware h100x8
      --price h100=2.2 --policy loongserve --policy chunked_prefill:chunk=4096
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `plan` to the command's parser."""
    parser = commands.add_parser(
        "plan",
        help="find the cheapest hardware and policy that serve a workload well",
        description="Simulates a workload on more and more chips of each kind, under each policy, "
        "until 90 % of requests in every class of length are served well, and names the cheapest.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("what to try")
    group.add_argument(
        "--hardware",
        action="append",
        metavar="NAMExN",
        help="at most so many chips of a kind; may be repeated (default a800x8)",
    )
    group.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="NAME=P",
        help="of one chip of a kind, in any unit (default 1)",
    )
    group.add_argument(
        "--policy",
        action="append",
        metavar="NAME",
        help=f"{', '.join(policy_names())}, with settings after a colon; may be repeated "
        "(default elastic)",
    )
    group.add_argument(
        "--model-shape", default="llama2-7b", metavar="NAME", help="(default llama2-7b)"
    )
    add_workload_options(parser.add_argument_group("workload"))
    goal = parser.add_argument_group("objective")
    default = Objective()
    goal.add_argument(
        "--ttft-factor",
        type=float,
        default=default.ttft_factor,
        metavar="X",
        help="time to first token: at most X times the prefill alone, (default 25)",
    )
    goal.add_argument(
        "--ttft-floor-s",
        type=float,
        default=default.ttft_floor_s,
        metavar="S",
        help="or this, if that is more (default 15)",
    )
    goal.add_argument(
        "--tpot-s",
        type=float,
        default=default.tpot_s,
        metavar="S",
        help="from token to token, in the mean (default 0.05)",
    )
    add_json_option(parser)
    parser.set_defaults(run=run, goodput=False)


def run(options: argparse.Namespace) -> None:
    """Plans and prints the answer and the curve behind it."""
    objective = Objective(
        ttft_factor=options.ttft_factor,
        ttft_floor_s=options.ttft_floor_s,
        tpot_s=options.tpot_s,
    )
    found = plan_capacity(
        read_jobs(options),
        options.model_shape,
        read_budgets(options.hardware or ["a800x8"], options.price),
        options.policy or ["elastic"],
        objective,
    )
    if options.json:
        best = None if found.best is None else describe(found.best)
        result = {"best": best, "options": [describe(option) for option in found.options]}
        print(json.dumps(result), flush=True)
        return
    for option in found.options:
        print(f"{option.price:10,.2f}  {describe_option(option)}")
    if found.best is None:
        print("nothing within the budget serves 90 % of every class well")
    else:
        print(f"cheapest: {describe_option(found.best)}")


def read_budgets(hardware: list[str], prices: list[str]) -> list[Budget]:
    """`a800x16` and `a800=2.5` as budgets."""
    price: dict[str, float] = {}
    for text in prices:
        name, _, number = text.partition("=")
        try:
            price[name] = float(number)
        except ValueError:
            raise ConfigError(f"--price is NAME=P, such as h100=2.2, not {text!r}") from None
    budgets: list[Budget] = []
    for text in hardware:
        name, _, number = text.rpartition("x")
        if not name or not number.isdigit():
            raise ConfigError(f"--hardware is NAMExN, such as a800x16, not {text!r}")
        if any(budget.chip == name for budget in budgets):
            raise ConfigError(f"--hardware names {name} twice; give the most chips there may be")
        budgets.append(Budget(chip=name, most=int(number), price=price.pop(name, 1.0)))
    if price:
        raise ConfigError(f"--price names {', '.join(price)}, but --hardware does not")
    return budgets


def describe(option: Option) -> dict[str, Any]:
    """What `--json` says of an option."""
    attained = option.attained
    return {
        "hardware": f"{option.chip}x{option.chips}",
        "policy": option.policy,
        "price": option.price,
        "instances": option.instances,
        "slo_attainment": None if attained is None else attained.total,
        "by_class": None if attained is None else attained.by_class,
        "good": option.good,
        "reason": option.reason,
    }
