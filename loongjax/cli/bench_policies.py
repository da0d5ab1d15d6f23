"""`loongjax bench policies`: short prompts beside long ones, under each policy."""

from __future__ import annotations

import argparse
import json
from typing import Any

from loongjax.cli.options import add_json_option
from loongjax.errors import ConfigError

_DESCRIPTION = """\
Serves short prompts that keep coming while long ones are computed, under each policy in turn, on
emulated instances of random:bench58m in float32. Wants an otherwise idle machine, and is fairer
with a cost model of it: `loongjax profile --model random:bench58m --instances N --out FILE`.
"""

_EPILOG = """\
examples:
  loongjax bench policies --instances 2 --cost-model cost.json --json
"""


def add_command(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `policies` to the parser of `bench`."""
    parser = benches.add_parser(
        "policies",
        help="short prompts beside long ones, under each policy",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cost-model", metavar="FILE", help="times of steps here (default: estimated)"
    )
    for flag, default, text in (
        ("--instances", 2, "emulated instances"),
        ("--pool-slots", 65_536, "KV slots of each"),
        ("--short", 30, "short prompts at least, alone and then among the long ones"),
        ("--long", 2, "long prompts"),
        ("--long-tokens", 30_000, "tokens of a long prompt"),
    ):
        parser.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default {default})"
        )
    parser.add_argument(
        "--rate", type=float, default=0.5, metavar="R", help="short prompts a second (default 0.5)"
    )
    parser.add_argument(
        "--policy",
        action="append",
        metavar="P",
        help="may be repeated (default: elastic and loongserve)",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures, and prints a line for each policy or the JSON object."""
    from loongjax.bench.policies import Load, measure_policy
    from loongjax.config import engine_config

    if options.short < 1 or options.long < 1 or not options.rate > 0.0:
        raise ConfigError("--short and --long must be at least 1, and --rate above 0")
    load = Load(
        short=options.short, rate=options.rate, long=options.long, long_tokens=options.long_tokens
    )
    found: dict[str, Any] = {}
    for policy in options.policy or ["elastic", "loongserve"]:
        config = engine_config(
            instances=options.instances,
            pool_slots=options.pool_slots,
            dtype="float32",
            policy=policy,
            cost_model=options.cost_model,
            warm_up=True,
        )
        found[policy] = measure_policy("random:bench58m", config, load)
        if not options.json:
            _print(policy, found[policy])
    if options.json:
        print(json.dumps({"instances": options.instances, "policies": found}), flush=True)


def _print(policy: str, each: dict[str, Any]) -> None:
    short, alone = each["short_ttft_s"], each["unloaded_ttft_s"]
    print(
        f"{policy}: TTFT of short prompts p50 {short['p50']:.2f} s, p99 {short['p99']:.2f} s "
        f"(alone {alone['p50']:.2f}, {alone['p99']:.2f}); of long ones "
        f"{each['long_ttft_s']:.1f} s; longest chunk {each['longest_chunk_s']:.2f} s; "
        f"{each['tokens_per_s']:.0f} tokens/s"
    )
