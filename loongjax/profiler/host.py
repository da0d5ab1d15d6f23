"""What the engine's own thread takes for a step: a real engine serves a little, and tells."""

from __future__ import annotations

from loongjax.costmodel import HostTime
from loongjax.engine import Engine, GenerationRequest
from loongjax.sampling.params import SamplingParams

_TOKENS = 48
_PROMPT = 16


def measure_host(engine: Engine, rows: int) -> HostTime:
    """From one request alone, and from `rows` of them together, each after a first time that is
    not counted. What passes inside a program's call is the devices' time, not the host's.
    """
    _serve(engine, 1)
    turn, one = _serve(engine, 1)
    _serve(engine, rows)
    several = _serve(engine, rows)[1]
    row = max(0.0, several - one) / max(1, rows - 1)
    return HostTime(turn_s=turn, step_s=max(0.0, one - row), row_s=row)


def _serve(engine: Engine, rows: int) -> tuple[float, float]:
    """Seconds of planning, and of everything else on the host, for each step of a run."""
    before, launched = _phases(engine), len(engine.steps())
    params = SamplingParams(temperature=0.0, max_tokens=_TOKENS, ignore_eos=True)
    handles = [
        engine.submit(GenerationRequest(id=f"host-{i}", token_ids=(1,) * _PROMPT, params=params))
        for i in range(rows)
    ]
    for handle in handles:
        for _ in handle:
            pass
    after, steps = _phases(engine), len(engine.steps()) - launched
    spent = {phase: after[phase] - before[phase] for phase in after}
    others = ("tables", "launch", "landing", "delivering")
    return spent["planning"] / steps, sum(spent[phase] for phase in others) / steps


def _phases(engine: Engine) -> dict[str, float]:
    return {each.phase: each.seconds for each in engine.stats().host}
