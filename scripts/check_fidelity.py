"""Holds the simulator against the real engine: one trace, served by both.

    loongjax profile --model random:bench58m --instances 2 --out cost.json
    python scripts/check_fidelity.py --model random:bench58m --instances 2 --cost-model cost.json

Requests of random lengths come at random times to an engine on the devices at hand, and to a
simulated one with the cost model that was measured there. They come twice, and the first time does
not count: a program's first run on a group takes up to a second longer than others, which no cost
model foretells. Prints the mean times to the first token and from token to token of both, how far
the simulator is off, and, as `cold`, the engine's times of the first time. Wants an otherwise idle
machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from loongjax.api.build import BuiltEngine, build_engine
from loongjax.config import engine_config
from loongjax.costmodel import ScalingInformationBase
from loongjax.engine import Engine, Event, FinishedEvent, GenerationRequest
from loongjax.errors import UserError
from loongjax.sampling.params import SamplingParams
from loongjax.scheduler.policies import create_policy
from loongjax.simulator import Job, deploy, simulate
from loongjax.simulator.jobs import Outcome

_PROMPTS = (32, 1500)
_OUTPUTS = (8, 64)
_LEAD_S = 0.5
_PAUSE_S = 5.0


def draw(requests: int, rate: float, seed: int) -> list[Job]:
    """A trace: Poisson arrivals; log-uniform prompts, uniform answers."""
    chance, now, jobs = random.Random(seed), 0.0, []
    for i in range(requests):
        now += chance.expovariate(rate)
        low, high = _PROMPTS
        prompt = round(low * (high / low) ** chance.random())
        output = chance.randint(*_OUTPUTS)
        jobs.append(Job(id=f"r{i}", arrival=now, prompt=prompt, output=output, limit=output))
    return jobs


def twice(jobs: Sequence[Job]) -> list[Job]:
    """A trace, and the same once more after a pause."""
    later = jobs[-1].arrival + _PAUSE_S
    again = [replace(job, id=f"{job.id}-again", arrival=job.arrival + later) for job in jobs]
    return [*jobs, *again]


def serve(built: BuiltEngine, jobs: Sequence[Job]) -> list[Outcome]:
    """What becomes of the trace on a real engine."""
    engine = built.engine
    outcomes: dict[str, Outcome] = {}
    done = threading.Semaphore(0)
    began = engine.now() + _LEAD_S

    for job in jobs:

        def hear(event: Event, job: Job = job) -> None:
            if isinstance(event, FinishedEvent):
                outcomes[job.id] = _outcome(job, event, began)
                done.release()

        time.sleep(max(0.0, began + job.arrival - engine.now()))
        _submit(engine, job, hear)
    for _ in jobs:
        done.acquire()
    return [outcomes[job.id] for job in jobs]


def _submit(engine: Engine, job: Job, on_event: Callable[[Event], None]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=job.output, ignore_eos=True)
    request = GenerationRequest(id=job.id, token_ids=tuple(range(1, job.prompt + 1)), params=params)
    engine.submit(request, on_event=on_event)


def _outcome(job: Job, event: FinishedEvent, began: float) -> Outcome:
    times = event.timings
    assert times.first_token is not None, event.error
    return Outcome(
        job=job,
        ending="completed" if event.error is None else "failed",
        first_token=times.first_token - began,
        end=times.end - began,
        error=event.error,
    )


def means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Times in the mean [s]."""
    tpots = [outcome.tpot for outcome in outcomes if outcome.tpot is not None]
    ttfts = [outcome.ttft for outcome in outcomes]
    return {"ttft_s": sum(ttfts) / len(ttfts), "tpot_s": sum(tpots) / len(tpots)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves twice and compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="random:NAME")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--pool-slots", type=int, default=16_384)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--max-chunk-tokens", type=int, default=2048)
    parser.add_argument("--cost-model", type=Path, required=True)
    parser.add_argument("--policy", default="loongserve")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    jobs = twice(draw(options.requests, options.rate, options.seed))
    config = engine_config(
        instances=options.instances,
        pool_slots=options.pool_slots,
        dtype=options.dtype,
        max_chunk_tokens=options.max_chunk_tokens,
        policy=options.policy,
        cost_model=options.cost_model,
        warm_up=True,
    )
    try:
        built = build_engine(options.model, config)
    except UserError as error:
        sys.exit(f"check_fidelity: {error}")
    with built.engine:
        served = serve(built, jobs)
    cold, real = means(served[: options.requests]), means(served[options.requests :])
    sib = ScalingInformationBase.load(options.cost_model)
    shape = options.model.removeprefix("random:")
    deployment = deploy(
        str(options.cost_model), shape, instances=options.instances, pool_slots=options.pool_slots
    )
    run = simulate(jobs, deployment, create_policy(options.policy, sib))
    counted = {job.id for job in jobs[options.requests :]}
    simulated = means([outcome for outcome in run.outcomes if outcome.job.id in counted])
    errors = {name: simulated[name] / real[name] - 1.0 for name in real}
    print(json.dumps({"real": real, "simulated": simulated, "error": errors, "cold": cold}))


if __name__ == "__main__":
    main()
