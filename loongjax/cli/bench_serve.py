"""`loongjax bench serve`: a server under load, measured by its clients."""

from __future__ import annotations

import argparse
import json
from typing import Any

from loongjax.cli.options import add_engine_options, add_json_option, llm_arguments
from loongjax.errors import ConfigError

_DESCRIPTION = """\
Starts a server in a process of its own, sends it requests, and measures the time to the first
token, the time of each further token, and how many requests a second meet an objective. With
--rate requests come as a Poisson process, with --trace at a trace's times; else --clients of them
each send their next request when they have their answer. Wants an otherwise idle machine.
"""

_EPILOG = """\
examples:
  loongjax bench serve --model random:bench58m --instances 2 --rate 1,2,4 --json
  loongjax bench serve --model random:bench58m --clients 16 --protocol http --bare
"""


def add_command(benches: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `serve` to the parser of `bench`."""
    parser = benches.add_parser(
        "serve",
        help="a server under load",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_engine_options(parser)
    load = parser.add_argument_group("load")
    load.add_argument(
        "--rate", type=_rates, default=(), metavar="R,R,…", help="requests a second, a run for each"
    )
    load.add_argument("--trace", metavar="FILE", help="times and lengths, as simulate reads them")
    for flag, default, text in (
        ("--clients", 8, "of a closed loop"),
        ("--requests", 100, "in each run"),
        ("--prompt-tokens", 64, "of a prompt, from half to one and a half of it"),
        ("--answer-tokens", 32, "of an answer, likewise"),
        ("--seed", 0, "of all draws"),
    ):
        load.add_argument(
            flag, type=int, default=default, metavar="N", help=f"{text} (default {default})"
        )
    load.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="default grpc")
    load.add_argument(
        "--bare", action="store_true", help="also run the closed loop on an engine without a server"
    )
    load.add_argument("--slo-ttft-s", type=float, default=1.0, metavar="S", help="default 1")
    load.add_argument("--slo-tpot-s", type=float, default=0.1, metavar="S", help="default 0.1")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures, and prints a table or the JSON object."""
    try:
        from serving.bench.report import Objective
        from serving.bench.serve import Load, run_serve_bench
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs the package of {error.name}; pip install 'loongjax[serve]'"
        ) from error
    for name in ("clients", "requests", "prompt_tokens", "answer_tokens"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least 1, not {getattr(options, name)}")
    load = Load(
        rates=options.rate,
        clients=options.clients,
        requests=options.requests,
        prompt_tokens=options.prompt_tokens,
        answer_tokens=options.answer_tokens,
        trace=options.trace,
        protocol=options.protocol,
        seed=options.seed,
    )
    objective = Objective(ttft_s=options.slo_ttft_s, tpot_s=options.slo_tpot_s)
    arguments = _server_arguments(options)
    report = run_serve_bench(
        ["-m", "loongjax.cli.main", "serve", *arguments],
        options.model,
        load,
        objective,
        bare=["-m", "loongjax.cli.bare_engine", *arguments] if options.bare else None,
    )
    report = {"policy": options.policy} | report
    if options.json:
        print(json.dumps(report), flush=True)
    else:
        _print(report)


def _server_arguments(options: argparse.Namespace) -> list[str]:
    """The options of the engine and of planning, as `loongjax serve` takes them."""
    found = ["--model", options.model]
    for name, value in llm_arguments(options).items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            found += [f"--{name.replace('_', '-')}", text]
    return found


def _print(report: dict[str, Any]) -> None:
    for each in report["runs"]:
        pace = f"{each['rate']}/s" if "rate" in each else f"{each['clients']} clients"
        ttft, tpot = each["ttft_s"]["p50"], each["tpot_s"]["p50"]
        print(
            f"{pace:>12}: {each['completed']}/{each['requests']} answered, TTFT {_ms(ttft)}, "
            f"TPOT {_ms(tpot)}, {each['output_tokens_per_s']} tokens/s, goodput "
            f"{each['goodput_per_s']}/s, service {each['service_us_per_token']} µs a token"
        )
    if "ratio_to_bare_engine" in report:
        print(f"of the bare engine's tokens a second: {report['ratio_to_bare_engine']}")


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or min(rates) <= 0:
        raise argparse.ArgumentTypeError(f"rates are numbers above 0, such as 1,2,4, not {text!r}")
    return rates
