"""`loongjax simulate`: what requests would do on some hardware, under some policy."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from loongjax.cli.options import add_json_option
from loongjax.costmodel import HostTime
from loongjax.errors import RequestError
from loongjax.scheduler.policies import create_policy, policy_layout, policy_names
from loongjax.simulator import (
    Deployment,
    Goodput,
    Job,
    Objective,
    at_rate,
    deploy,
    draw_jobs,
    find_goodput,
    is_workload,
    read_trace,
    report,
    simulate,
    workload_names,
)
from loongjax.timeline import Timeline

_EPILOG = """\
A trace is a CSV of Azure (TIMESTAMP,ContextTokens,GeneratedTokens), JSON lines of Mooncake
(timestamp in ms, input_length, output_length), or JSON lines of loongjax (arrival_s,
prompt_tokens, output_tokens; max_tokens and cancel_after_s where known); .gz is read too.

examples:
  loongjax simulate --hardware a800x8 --workload sharegpt --rate 20 --requests 1000
  loongjax simulate --hardware a800x8 --workload zipf:1.2 --requests 500 --goodput --json
  loongjax simulate --hardware v5ex64 --model-shape llama3-8b --workload trace.jsonl --rate 5
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `simulate` to the command's parser."""
    parser = commands.add_parser(
        "simulate",
        help="run a workload on simulated hardware",
        description="Runs a workload through the planner that serves, on hardware that is not "
        "there: its clock is virtual, its steps take what a cost model predicts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_cluster_options(parser.add_argument_group("hardware"))
    add_workload_options(parser.add_argument_group("workload"))
    parser.add_argument(
        "--policy",
        default="elastic",
        metavar="NAME",
        help=f"who plans: {', '.join(policy_names())} (default elastic); settings follow a "
        "colon, as in chunked_prefill:chunk=512,order=slack",
    )
    parser.add_argument(
        "--goodput",
        action="store_true",
        help="search the highest rate at which 90 %% of requests are served well; the rest of "
        "the report is of a run at the sustainable one",
    )
    parser.add_argument(
        "--explain",
        metavar="ID",
        help="tell what happened to one request and why: r0 is the first that came, unless its "
        "trace names it",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def _add_cluster_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--hardware",
        default="a800x8",
        metavar="NAMExN",
        help="so many chips of a kind, such as a800x8 or v5ex16, or a measured cost model (.json)"
        " (default a800x8: 4 instances of two GPUs with 210,000 KV slots each)",
    )
    group.add_argument(
        "--model-shape", default="llama2-7b", metavar="NAME", help="(default llama2-7b)"
    )
    group.add_argument(
        "--instances",
        type=int,
        metavar="N",
        help="elastic instances (default: as the policy is at its best)",
    )
    group.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="chips of each instance (default: usual for the hardware)",
    )
    group.add_argument(
        "--pool-slots",
        type=int,
        metavar="N",
        help="KV slots of each instance (default: as measured, or what memory leaves)",
    )
    group.add_argument(
        "--block-size", type=int, default=16, metavar="N", help="tokens per KV block (default 16)"
    )
    group.add_argument(
        "--max-chunk-tokens",
        type=int,
        metavar="N",
        help="prompt tokens of one step for each instance (default: as many as its pool holds)",
    )
    group.add_argument(
        "--host-us",
        type=host_time,
        metavar="TURN,STEP,ROW",
        help="what the engine's thread takes to look and plan, for each step, and for each "
        "request in it [µs] (default: that of the cost model)",
    )


def add_workload_options(group: argparse._ArgumentGroup) -> None:
    """What requests come, and when."""
    group.add_argument(
        "--workload",
        default="sharegpt",
        metavar="NAME|FILE",
        help=f"{', '.join(workload_names())}, or a trace (default sharegpt)",
    )
    group.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="requests a second in the mean; a trace keeps its own rate unless this is given",
    )
    group.add_argument(
        "--requests", type=int, metavar="N", help="how many (default 1000; of a trace: all)"
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of all draws (default 0)")
    group.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="CV",
        help="variation of the gaps between drawn arrivals: 1 is Poisson, more comes in bursts",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="answer limit that the scheduler is told (default: 1024; of a trace: its longest "
        "answer); how long an answer is, it never knows",
    )


def run(options: argparse.Namespace) -> None:
    """Simulates and prints the report, or the JSON object."""
    deployment = deploy(
        options.hardware,
        options.model_shape,
        instances=options.instances,
        tensor_parallel=options.tensor_parallel,
        pool_slots=options.pool_slots,
        block_size=options.block_size,
        max_chunk_tokens=options.max_chunk_tokens,
        layout=policy_layout(options.policy),
        host=options.host_us,
    )
    policy = create_policy(options.policy, deployment.cost)
    objective = Objective()
    jobs = read_jobs(options)
    goodput = None
    if options.goodput:
        goodput = find_goodput(jobs, deployment, policy, objective)
        if goodput.sustainable > 0.0:
            jobs = at_rate(jobs, goodput.sustainable)
    simulated = simulate(jobs, deployment, policy)
    result = report(
        simulated,
        deployment,
        policy=options.policy,
        workload=options.workload,
        objective=objective,
    )
    if goodput is not None:
        result["goodput"] = describe_goodput(goodput)
    if options.explain is not None:
        history = simulated.history
        timeline = Timeline.from_steps(history.steps(), requests=history.requests())
        result["explained"] = timeline.explain(options.explain).split("\n")
    if options.json:
        print(json.dumps(result), flush=True)
    else:
        print(describe(result, deployment), flush=True)


def host_time(text: str) -> HostTime:
    """Three numbers with commas between them, in microseconds."""
    try:
        turn, step, row = (float(part) * 1e-6 for part in text.split(","))
    except ValueError:
        turn = step = row = -1.0
    if not all(0.0 <= each < math.inf for each in (turn, step, row)):
        raise argparse.ArgumentTypeError(
            f"give three numbers of microseconds, such as 300,500,10, not {text!r}"
        )
    return HostTime(turn_s=turn, step_s=step, row_s=row)


def read_jobs(options: argparse.Namespace) -> list[Job]:
    """The workload that the options ask for."""
    for name in ("requests", "max_tokens"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if is_workload(options.workload):
        if options.rate is None and not options.goodput:
            raise RequestError(
                f"say at which --rate the requests of {options.workload} come, or search one "
                "with `loongjax simulate --goodput`"
            )
        return draw_jobs(
            options.workload,
            1000 if options.requests is None else options.requests,
            rate=1.0 if options.rate is None else options.rate,
            seed=options.seed,
            cv=options.burstiness,
            limit=options.max_tokens,
        )
    if not Path(options.workload).exists():
        raise RequestError(
            f"there is no workload {options.workload!r}, and no trace file of that name; workloads "
            f"are {', '.join(workload_names())}"
        )
    jobs = read_trace(options.workload, count=options.requests, limit=options.max_tokens)
    return jobs if options.rate is None else at_rate(jobs, options.rate)


def describe_goodput(goodput: Goodput) -> dict[str, Any]:
    """What `--json` says of a search."""
    return {
        "paper": goodput.paper,
        "every_class": goodput.every_class,
        "sustainable": goodput.sustainable,
        "saturated": goodput.saturated,
        "bound": goodput.bound,
        "probes": [
            {
                "rate": probe.rate,
                "requests": probe.requests,
                "slo_attainment": probe.attained.total,
                "by_class": probe.attained.by_class,
            }
            for probe in goodput.probes
        ],
    }


def describe(result: dict[str, Any], deployment: Deployment) -> str:
    """A few lines for people."""
    made = deployment.cost.fingerprint
    lines = [
        f"{result['policy']} on {deployment.name}: {deployment.instances} instances of "
        f"{made.tensor_parallel}, {deployment.pool_slots:,} KV slots each ({made.model})",
        f"{result['workload']}: {result['requests']} requests at {_number(result['rate'])}/s; "
        f"{result['completed']} completed, {result['unfinished']} unfinished, "
        f"{result['rejected']} rejected, {result['cancelled']} cancelled",
        "",
        f"{'':12}{'requests':>9}{'served well':>13}{'ttft p50, p90, p99 [s]':>30}{'tpot [ms]':>24}",
    ]
    rows = {"all": result, **result["by_class"]}
    for name, row in rows.items():
        if not row["requests"]:
            continue
        tpot = {key: None if x is None else 1e3 * x for key, x in row["tpot_s"].items()}
        good = row["slo_attainment"]
        lines.append(
            f"{name:12}{row['requests']:9}{'-' if good is None else f'{good:.1%}':>13}"
            f"{_triple(row['ttft_s']):>30}{_triple(tpot):>24}"
        )
    latency = ", ".join(f"{name} {_number(x)}" for name, x in result["normalized_ms"].items())
    lines += [
        "",
        f"latency a token [ms]: {latency}",
        f"{result['throughput_tokens_per_s']:,.0f} tokens/s, "
        f"{_number(result['bound_fraction'])} of the fluid bound; {result['duration_s']:,.1f} s, "
        f"{result['drain_s']:,.1f} of them after the last arrival",
        f"{result['steps']:,} steps, {result['scale_ups']} scale-ups, {result['scale_downs']} "
        f"scale-downs, {result['migrated_bytes'] / 2**30:,.1f} GiB migrated, "
        f"{result['preemptions']} preemptions; simulated in {result['wall_s']:.1f} s",
    ]
    if "goodput" in result:
        found = result["goodput"]
        names = ("paper", "every_class", "sustainable", "saturated", "bound")
        rates = ", ".join(f"{name} {_number(found[name])}" for name in names)
        lines.append(f"goodput [requests/s]: {rates}")
    if "explained" in result:
        lines += ["", *result["explained"]]
    return "\n".join(lines)


def _triple(percentiles: dict[str, float | None]) -> str:
    return "  ".join(_number(value) for value in percentiles.values())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
