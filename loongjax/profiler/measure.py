"""A point becomes samples: its steps are run until their time is known.

The median of some runs counts, and more are made where they differ: other processes take a
machine's cores for moments, and a single run may fall into one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, median

from loongjax.costmodel.fit import DecodeSample, MigrateSample, PrefillSample
from loongjax.costmodel.padding import Padding
from loongjax.costmodel.protocol import ChunkWork, DecodeWork
from loongjax.costmodel.sib import Crowding
from loongjax.plan import DecodeStep, PrefillStep, RequestId, Step
from loongjax.profiler.design import Decode, Migration, Point, Walk
from loongjax.profiler.runner import Runner

_FEWEST, _MOST = 3, 7
_ALIKE = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """What a point, or several, gave."""

    prefill: tuple[PrefillSample, ...] = ()
    decode: tuple[DecodeSample, ...] = ()
    migrate: tuple[MigrateSample, ...] = ()

    def __add__(self, other: Samples) -> Samples:
        return Samples(
            prefill=self.prefill + other.prefill,
            decode=self.decode + other.decode,
            migrate=self.migrate + other.migrate,
        )


def measure(point: Point, runner: Runner) -> list[float]:
    """The times of a point's steps [s], in their order: of a walk one for each of its chunks."""
    match point:
        case Walk():
            return _walk(point, runner)
        case Decode():
            return [_decode(point, runner)]
        case Migration():
            return [_migrate(point, runner)]


def samples(point: Point, seconds: Sequence[float], padding: Padding) -> Samples:
    """What the times of a point say, in the words of the fits."""
    match point:
        case Walk(degree=degree, lengths=lengths):
            made = []
            for i, time in enumerate(seconds):
                chunks = tuple(ChunkWork(length, i * length) for length in lengths)
                computed = padding.tokens(degree, chunks)
                made.append(
                    PrefillSample(
                        degree=degree,
                        chunks=tuple(padding.tiled(degree, chunks)),
                        seconds=time,
                        computed=computed,
                    )
                )
            return Samples(prefill=tuple(made))
        case Decode(degree=degree, rows=rows, context=context, masters=masters):
            bare = DecodeWork(rows, rows * context, masters, context)
            work = padding.work(degree, bare)
            return Samples(decode=(DecodeSample(degree=degree, work=work, seconds=seconds[0]),))
        case Migration(tokens=tokens):
            return Samples(migrate=(MigrateSample(tokens=tokens, seconds=seconds[0]),))


def crowding(runner: Runner, padding: Padding) -> Crowding:
    """Measures steps on two instances, at once and alone: prompts of the largest chunk, and
    decodes of one request each after them. 0 if there is one instance.
    """
    if runner.topology.instances < 2:
        return Crowding()
    groups = runner.topology.groups(1)[:2]
    length = min(padding.chunks[-1], runner.allocator.usable // 2)

    def prompts() -> list[PrefillStep]:
        runner.close_all()
        return [runner.prefill_step(group, [(runner.open(length), length)]) for group in groups]

    def decode(after: PrefillStep) -> DecodeStep:
        return runner.decode_step(after.group, [after.chunks[0].request], 1)

    two_prompts = _slower(runner, prompts)
    computed = prompts()
    runner.together(computed)
    two_decodes = _slower(runner, lambda: [decode(prompt) for prompt in computed])
    prompt, beside_it = _mixed(runner, prompts, decode)
    runner.close_all()
    return Crowding(
        prefill_prefill=two_prompts,
        prefill_decode=prompt,
        decode_prefill=beside_it,
        decode_decode=two_decodes,
    )


def _slower(runner: Runner, make: Callable[[], Sequence[Step]]) -> float:
    """By what part of their time steps take longer at once than one by one."""
    at_once = _settled(lambda: runner.together(make()))
    alone = _settled(lambda: mean([runner.together([step]) for step in make()]))
    return max(0.0, at_once / alone - 1.0)


def _mixed(
    runner: Runner,
    prompts: Callable[[], Sequence[PrefillStep]],
    decode: Callable[[PrefillStep], DecodeStep],
) -> tuple[float, float]:
    """By what part of their time a prompt and decodes of another group take longer at once."""
    slower: list[tuple[float, float]] = []

    def run() -> float:
        prompt, before = prompts()
        whole = runner.together([before])
        single = _settled(lambda: runner.together([decode(before)]))
        beside_decodes, found = runner.beside(prompt, lambda: decode(before))
        slower.append((beside_decodes / whole, found.slowness(single)))
        return beside_decodes

    _settled(run)
    prompt, decodes = [median(each) for each in zip(*slower[1:], strict=True)]
    return max(0.0, prompt - 1.0), max(0.0, decodes - 1.0)


def _walk(point: Walk, runner: Runner) -> list[float]:
    group = runner.group(point.degree)
    runs: list[list[float]] = []

    def run() -> float:
        names = [runner.open(length * point.chunks) for length in point.lengths]
        times = [
            runner.prefill(group, list(zip(names, point.lengths, strict=True)))
            for _ in range(point.chunks)
        ]
        runner.close_all()
        runs.append(times)
        return sum(times)

    _settled(run)
    return [median(times) for times in zip(*runs[1:], strict=True)]


def _decode(point: Decode, runner: Runner) -> float:
    group = runner.group(point.degree)
    names = _open_rows(point, runner)
    seconds = _settled(lambda: runner.decode(group, names, point.masters))
    runner.close_all()
    return seconds


def _open_rows(point: Decode, runner: Runner) -> list[RequestId]:
    """Requests with their context computed, as many together as steps take."""
    group, limits = runner.group(point.degree), runner.executor.limits
    names = [runner.open(point.context) for _ in range(point.rows)]
    room = limits.max_chunk_tokens * len(group)
    for start in range(0, point.context, room):
        length = min(room, point.context - start)
        padded = -(-length // len(group)) * len(group)
        together = min(max(1, room // padded), limits.max_rows)
        for i in range(0, len(names), together):
            runner.prefill(group, [(name, length) for name in names[i : i + together]])
    return names


def _migrate(point: Migration, runner: Runner) -> float:
    """There and back again."""
    group, tokens = runner.group(1), point.tokens
    other = next(i for i in range(runner.topology.instances) if i not in group)
    name = runner.open(tokens)
    room = runner.executor.limits.max_chunk_tokens
    for start in range(0, tokens, room):
        runner.prefill(group, [(name, min(room, tokens - start))])
    ends = [group[0], other]

    def there() -> float:
        ends.reverse()
        return runner.migrate(name, ends[1], ends[0])

    seconds = _settled(there)
    runner.close_all()
    return seconds


def _settled(run: Callable[[], float]) -> float:
    """The median of some runs, after one that is not counted; of more where they differ."""
    run()
    times = [run() for _ in range(_FEWEST)]
    while len(times) < _MOST and not _agree(times):
        times.append(run())
    return median(times)


def _agree(times: Sequence[float]) -> bool:
    middle = median(times)
    return median(abs(time - middle) for time in times) <= _ALIKE * middle
