"""From a step and its slots to the int32 vectors that its program reads: host work, in numpy.

Owns the correspondence between requests and rows, tokens and stripes. Ranks are places in
the step's group; see `loongjax.esp.meta` for the fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from loongjax.errors import StepError
from loongjax.esp.history import Trips, item_entries
from loongjax.esp.migrate import TILE
from loongjax.executor.noted_rows import NotedRows
from loongjax.executor.token_log import TokenLog
from loongjax.kvcache.messages import DecodeSlots, MigrateSlots, PrefillSlots
from loongjax.kvcache.tables import BlockTable
from loongjax.plan import (
    Chunk,
    DecodeStep,
    InstanceId,
    MigrateStep,
    PrefillStep,
    RequestId,
)
from loongjax.programs.spec import ProgramSpec
from loongjax.sampling.fields import FIELDS, NO_TOKEN


class ScoredChunk(NamedTuple):
    """A chunk whose prompt's log-probabilities are wanted.

    Attributes:
      start: The position of the first token that is scored.
      top: How many likely tokens are told of at each.
      tokens: Those that are scored.
      places: Where in the program's second output each stands.
    """

    request: RequestId
    start: int
    top: int
    tokens: Int32[np.ndarray, " T"]
    places: Int32[np.ndarray, " T"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """What goes to the device, and where the answers will stand.

    Attributes:
      metas: int32 [n, size], one vector for each rank; the program runs once for each item.
      rows: The requests that get a token, with their places in the program's output.
      told: How many likely tokens those are told of who asked for log-probabilities.
      scored: Chunks of prompts that are scored.
    """

    metas: tuple[np.ndarray, ...]
    rows: tuple[tuple[RequestId, int], ...]
    told: Mapping[RequestId, int]
    scored: tuple[ScoredChunk, ...] = ()


def stripe_tokens(length: int, degree: int) -> int:
    """Local tokens that a chunk of `length` takes on every rank (padded to equal parts)."""
    return -(-length // degree)


def prefill_inputs(
    spec: ProgramSpec,
    step: PrefillStep,
    slots: PrefillSlots,
    logs: Mapping[RequestId, TokenLog],
    trash: int,
) -> StepInputs:
    """Fills the vectors of a prefill step; `trash` is the slot for what is not kept."""
    layout, degree = spec.layout, spec.degree
    meta = np.zeros((degree, layout.size), np.int32)
    fields = [layout.views(vector) for vector in meta]
    for field in fields:
        field["first"][:] = np.arange(spec.bucket)
        field["keep"][:] = trash
        field["sample_index"][:] = NO_TOKEN
    kept = _slots_by_token(step, slots, trash)
    used = 0
    rows: list[tuple[RequestId, int]] = []
    scored: list[ScoredChunk] = []
    for chunk in step.chunks:
        for rank, field in enumerate(fields):
            _stripe(chunk, rank, degree, used, field, logs[chunk.request])
            slot_t = kept.get((chunk.request, step.group[rank]))
            if slot_t is not None:
                for hop in range(degree):
                    passing = slot_t[(rank - hop) % degree :: degree]
                    field["keep"][hop, used : used + len(passing)] = passing
        if chunk.last:
            index, owner = divmod(chunk.length - 1, degree)
            row, rank = divmod(len(rows), degree)
            place = rank * spec.rows + row
            fields[owner]["sample_index"][place] = used + index
            _sampling(fields[rank], row, logs[chunk.request], chunk.start + chunk.length)
            rows.append((chunk.request, place))
        scored += _score(spec, chunk, used, fields, logs[chunk.request])
        used += stripe_tokens(chunk.length, degree)
    for field in fields:
        field["used"][...] = used
        field["rows_used"][...] = -(-len(rows) // degree)
    told = _told((name, logs[name]) for name, _ in rows)
    return StepInputs(metas=(meta,), rows=tuple(rows), told=told, scored=tuple(scored))


def add_history(
    spec: ProgramSpec,
    step: PrefillStep,
    inputs: StepInputs,
    tables: Sequence[BlockTable],
    trips: Callable[[int, int], Trips],
) -> None:
    """Adds what an extend step needs to know of its chunks' history.

    `tables[rank]` are the block tables of the group, without the chunks' own entries;
    `trips` decides the way from the new tokens and the most work items of a rank.
    """
    layout = spec.layout
    fields = [layout.views(vector) for vector in inputs.metas[0]]
    used = 0
    items = [0] * spec.degree
    for c, chunk in enumerate(step.chunks):
        end = used + stripe_tokens(chunk.length, spec.degree)
        for rank, (field, table) in enumerate(zip(fields, tables, strict=True)):
            start, entries = table.region(chunk.request)
            field["chunk_begin"][c], field["chunk_end"][c] = used, end
            field["chunk_start"][c] = chunk.start
            field["history_start"][c], field["history_entries"][c] = start, entries
            items[rank] += -(-entries // item_entries(table.block_size, spec.degree))
        used = end
    chosen = trips(used, max(items))
    for field in fields:
        # Unused chunks begin and end behind all queries.
        field["chunk_begin"][len(step.chunks) :] = field["chunk_end"][len(step.chunks) :] = (
            spec.bucket
        )
        field["query_trips"][...], field["key_trips"][...] = chosen


def _stripe(
    chunk: Chunk, rank: int, degree: int, at: int, field: Mapping[str, np.ndarray], log: TokenLog
) -> None:
    """Puts one rank's stripe of a chunk at local index `at`."""
    local = stripe_tokens(chunk.length, degree)
    tokens = log.every(degree, chunk.start + rank, chunk.start + chunk.length)
    field["token"][at : at + len(tokens)] = tokens
    positions = chunk.start + rank + degree * np.arange(len(tokens))
    field["position"][at : at + len(tokens)] = positions
    field["first"][at : at + local] = at


def _score(
    spec: ProgramSpec,
    chunk: Chunk,
    at: int,
    fields: Sequence[Mapping[str, np.ndarray]],
    log: TokenLog,
) -> list[ScoredChunk]:
    """Asks for the log-probabilities of the prompt's tokens that follow those of a chunk."""
    degree, start = spec.degree, chunk.start + 1
    tokens = log.to_score(start, start + chunk.length)
    if log.prompt_logprobs is None or not len(tokens):
        return []
    end = at + stripe_tokens(len(tokens), degree)
    for rank, field in enumerate(fields):
        target = tokens[rank::degree]
        field["target"][at : at + len(target)] = target
        if field["score_end"] == 0:
            field["score_begin"][...] = at
        field["score_end"][...] = end
    index, rank_t = np.divmod(np.arange(len(tokens), dtype=np.int32), np.int32(degree))
    places = rank_t * np.int32(spec.bucket) + np.int32(at) + index
    return [ScoredChunk(chunk.request, start, log.prompt_logprobs, tokens, places)]


def _told(logs: Iterable[tuple[RequestId, TokenLog]]) -> Mapping[RequestId, int]:
    return {name: log.logprobs for name, log in logs if log.logprobs is not None}


def _slots_by_token(
    step: PrefillStep, slots: PrefillSlots, trash: int
) -> dict[tuple[RequestId, InstanceId], np.ndarray]:
    """For each request and instance that keeps some of its chunk: a slot for every token."""
    chunks = {chunk.request: chunk for chunk in step.chunks}
    found: dict[tuple[RequestId, InstanceId], np.ndarray] = {}
    for share in slots.shares:
        chunk = chunks[share.request]
        slot_t = np.full(chunk.length, trash, np.int32)
        # The share's entries follow each other in position.
        first = share.entries[0, 1] - chunk.start
        kept = _slots_of(share.entries)
        slot_t[first : first + len(kept)] = kept
        found[share.request, share.instance] = slot_t
    return found


class DecodeFrame:
    """What decode steps with the same rows have in common; `inputs` fills in the rest.

    While a group goes on as it is, a step costs one copy and one scatter of its few changing
    numbers, whatever its degree.

    Attributes:
      rows: Those of the steps that it serves.
      requests: Theirs; their tokens are kept as long as the frame is.
      spec: Their program.
      noted: Those of the rows that have a sampling table. A step lacks what was generated since
        the tables were gathered.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        step: DecodeStep,
        logs: Mapping[RequestId, TokenLog],
        trash: int,
        spare_entry: int,
    ) -> None:
        """`trash` is the slot for what is not kept, `spare_entry` a row of every block table that
        no request has.
        """
        self.spec = spec
        self.rows = step.rows
        layout, rank_of = spec.layout, {inst: rank for rank, inst in enumerate(step.group)}
        self._names = [row.request for row in step.rows]
        self.requests = frozenset(self._names)
        self._logs = [logs[name] for name in self._names]
        filled = [0] * spec.degree
        places = []
        for row in step.rows:
            master = rank_of[row.master]
            places.append(master * spec.rows + filled[master])
            filled[master] += 1
        self._places = tuple(zip(self._names, places, strict=True))
        self._told = _told(zip(self._names, self._logs, strict=True))
        self.noted = NotedRows(list(zip(self._logs, places, strict=True)))
        meta = self._meta = np.zeros((spec.degree, layout.size), np.int32)
        at = np.array(places, np.intp)  # none in a warm-up step
        mine = np.divmod(at, spec.rows)  # (rank, row) of the master
        field = partial(layout.of_all_ranks, meta)
        for name in FIELDS:
            field(name)[mine] = [log.fields[name] for log in self._logs]
        field("rows_used")[:] = max(filled)
        field("write")[:] = trash
        field("source")[:] = NO_TOKEN
        field("update")[:, :, 0] = spare_entry
        field("recent")[:] = NO_TOKEN
        # Where the numbers of a step stand, in the order in which `inputs` lists them.
        place = partial(layout.of_all_ranks, np.arange(meta.size).reshape(meta.shape))
        home = np.array([rank_of[row.home] for row in step.rows], np.intp)
        changing = [place(name)[mine] for name in ("token", "source", "sample_position")]
        changing.append(place("write")[home, at])
        for rank in range(spec.degree):
            changing += [place(name)[rank, at] for name in ("position", "start", "entries")]
        self._changing = np.concatenate(changing)

    def inputs(
        self,
        step: DecodeStep,
        slots: DecodeSlots,
        tables: Sequence[BlockTable],
        running: Mapping[RequestId, int],
    ) -> StepInputs:
        """Fills the vectors of a decode step; `tables[rank]` are the block tables of its group.

        The tables know the new tokens' slots already. Their pending updates are not taken here.
        `running` has the places, in the output of the group's last decode step, of tokens that
        are not on the host yet.

        Raises StepError for a row whose token is neither known nor to come from there.
        """
        positions = slots.positions
        tokens, sources = [], []
        for name, log, position in zip(self._names, self._logs, positions, strict=True):
            if position < len(log):
                tokens.append(log[position])
                sources.append(NO_TOKEN)
            elif name in running:
                if log.table is not None and position > len(log):
                    raise StepError(
                        f"step {step.seq}: the choice of request {name!r} depends on its token at "
                        f"position {len(log)}, which is not known; launch one step ahead at most"
                    )
                tokens.append(0)
                sources.append(running[name])
            else:
                raise StepError(
                    f"step {step.seq}: the token at position {position} of request {name!r} is "
                    "neither known nor an output of the last decode step on group "
                    f"{step.group}"
                )
        numbers = [*tokens, *sources, *[position + 1 for position in positions], *slots.slots]
        for table in tables:
            regions = [table.region(name) for name in self._names]
            numbers += positions
            numbers += [start for start, _ in regions]
            numbers += [entries for _, entries in regions]
        meta = self._meta.copy()
        meta.reshape(-1)[self._changing] = numbers
        for at, recent in self.noted.recent():
            rank, row = divmod(at, self.spec.rows)
            self.spec.layout.of_all_ranks(meta, "recent")[rank, row, : len(recent)] = recent
        return StepInputs(metas=(meta,), rows=self._places, told=self._told)


def migrate_inputs(
    spec: ProgramSpec, step: MigrateStep, slots: MigrateSlots, trash: int
) -> StepInputs:
    """Fills the vectors of a migrate step, as many as its longest list of slots needs."""
    rank_of = {instance: rank for rank, instance in enumerate(step.group)}
    lanes: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for move in slots.moves:
        source, target = rank_of[move.source], rank_of[move.target]
        pair = _slots_of(move.taken), _slots_of(move.given)
        lanes.setdefault((source, (target - source) % spec.degree), []).append(pair)
    joined = {
        lane: tuple(np.concatenate(side) for side in zip(*pairs, strict=True))
        for lane, pairs in lanes.items()
    }
    longest = max(len(taken) for taken, _ in joined.values())
    metas = tuple(_migrate_meta(spec, joined, at, trash) for at in range(0, longest, spec.bucket))
    return StepInputs(metas=metas, rows=(), told={})


def _migrate_meta(
    spec: ProgramSpec,
    lanes: Mapping[tuple[int, int], tuple[np.ndarray, ...]],
    at: int,
    trash: int,
) -> np.ndarray:
    """The tokens from `at` on of each (source rank, hop), up to one launch's worth."""
    layout = spec.layout
    meta = np.zeros((spec.degree, layout.size), np.int32)
    fields = [layout.views(vector) for vector in meta]
    for field in fields:
        field["send"][:] = field["receive"][:] = trash
    for (source, hop), (taken, given) in lanes.items():
        part = slice(at, at + spec.bucket)
        count = len(taken[part])
        fields[source]["send"][hop - 1, :count] = taken[part]
        fields[(source + hop) % spec.degree]["receive"][hop - 1, :count] = given[part]
        trips = -(-count // TILE)
        for field in fields:
            field["trips"][hop - 1] = max(field["trips"][hop - 1], trips)
    return meta


def _slots_of(entries: Int32[np.ndarray, "N 3"]) -> Int32[np.ndarray, " T"]:
    """The slots of all tokens that some entries name, in order."""
    slot, _, count = entries.T
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return (np.repeat(slot, count) + within).astype(np.int32)


def _sampling(field: Mapping[str, np.ndarray], row: int, log: TokenLog, position: int) -> None:
    for name, number in log.fields.items():
        field[name][row] = number
    field["sample_position"][row] = position
