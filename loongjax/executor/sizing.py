"""How large the KV pool is: given, found at an earlier start, or measured.

The size of the pool is a compiled shape, and what it may be depends on what programs need.
So the largest programs are compiled once with a nominal pool, what they say of their memory
is subtracted from what there is, and the result is kept beside the programs: the next start
finds the same number, and with it the same programs.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import replace

import jax

from loongjax.cluster.mesh import GroupMeshes
from loongjax.errors import ConfigError
from loongjax.executor.memory import MemoryPlan, ProgramMemory, Room
from loongjax.kvcache.pool import padded_slots
from loongjax.programs.build import ProgramShapes, lower
from loongjax.programs.catalogue import Catalogue
from loongjax.programs.key import platform_key, shapes_key
from loongjax.programs.store import ProgramStore

_log = logging.getLogger(__name__)


def size_pool(
    room: Room,
    nominal: ProgramShapes,
    catalogue: Catalogue,
    meshes: GroupMeshes,
    store: ProgramStore,
) -> MemoryPlan:
    """The plan for a pool that the user gave no size for.

    `nominal` are the programs' shapes but for the pool. A stored size is used if it fits into
    what is free now, and is not less than half of what would be chosen now.

    Raises ConfigError where memory is too small for any pool.
    """
    key = _size_key(room, nominal, catalogue, meshes.grid[0][0])
    note = store.load_note(key)
    measured = is_measured(meshes.grid[0][0].platform)
    try:
        stored = None if note is None else _Size.of(note)
    except (KeyError, TypeError, ValueError) as error:
        _log.warning("not using the stored size of the KV pool: %r", error)
        stored = None
    if stored is not None and (stored.programs is not None) == measured:
        room = _with_programs(room, stored.programs)
        if stored.slots <= room.most and 2 * stored.slots >= room.slots:
            return MemoryPlan(room=room, slots=stored.slots, origin="stored")
        _log.warning(
            "the KV pool gets %d slots; an earlier start had %d, for which memory is too %s now. "
            "Programs are compiled anew",
            *(room.slots, stored.slots, "small" if stored.slots > room.most else "large"),
        )
    elif measured:
        room = _with_programs(room, measure(nominal, catalogue, meshes))
    size = _Size(slots=room.slots, programs=room.programs)
    try:
        store.save_note(key, dataclasses.asdict(size))
    except OSError as error:
        _log.warning("could not keep the size of the KV pool: %s", error)
    return MemoryPlan(room=room, slots=size.slots, origin="measured")


def is_measured(platform: str) -> bool:
    """Whether programs are asked for the memory that they need (see `executor.memory`)."""
    return platform != "cpu"


def measure(nominal: ProgramShapes, catalogue: Catalogue, meshes: GroupMeshes) -> ProgramMemory:
    """Compiles the largest programs, with a nominal pool, to see what memory they need.

    Extend does all that prefill does, and more; decode is the other kind. Code is taken to be
    as large for all programs of a kind as for the largest.
    """
    group = catalogue.topology.groups(max(catalogue.topology.degrees))[0]
    largest = (
        catalogue.extend(group, catalogue.max_chunk_tokens),
        catalogue.decode(group, catalogue.max_rows),
    )
    found = []
    for spec in largest:
        _log.info("compiling %s to see what memory it needs", spec.name)
        memory = lower(spec, nominal, meshes[group]).compile().memory_analysis()
        if memory is None:
            raise ConfigError(
                f"{jax.default_backend()} does not say what memory programs need; give pool slots"
            )
        found.append(memory)
    chunk_programs, other_programs = programs_per_instance(catalogue)
    extend, decode = found
    pool_bytes = decode.alias_size_in_bytes
    return ProgramMemory(
        weight_bytes=decode.argument_size_in_bytes - pool_bytes,
        slot_bytes=-(-pool_bytes // padded_slots(nominal.slots, nominal.block_size)),
        temporary_bytes=max(memory.temp_size_in_bytes for memory in found),
        code_bytes=chunk_programs * extend.generated_code_size_in_bytes
        + other_programs * decode.generated_code_size_in_bytes,
    )


def programs_per_instance(catalogue: Catalogue) -> tuple[int, int]:
    """Programs that one instance has loaded once all groups ran: for chunks, and others.

    A program that is rebound is loaded once for each group.
    """
    topology = catalogue.topology
    chunks = others = 0
    for degree in topology.degrees:
        groups = sum(0 in group for group in topology.groups(degree))
        chunks += groups * len(catalogue.chunk_buckets)
        others += groups * (len(catalogue.row_buckets) + (degree > 1))
    return chunks, others


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Size:
    """What is kept on disk."""

    slots: int
    programs: ProgramMemory | None

    @classmethod
    def of(cls, note: dict) -> _Size:
        programs = note["programs"]
        return cls(
            slots=int(note["slots"]),
            programs=None if programs is None else ProgramMemory(**programs),
        )


def _with_programs(room: Room, programs: ProgramMemory | None) -> Room:
    """`room` with what the compiler said; its layouts may pad what was reckoned before."""
    if programs is None:
        return room
    return replace(
        room,
        weight_bytes=max(room.weight_bytes, programs.weight_bytes),
        slot_bytes=max(room.slot_bytes, programs.slot_bytes),
        programs=programs,
    )


def _size_key(
    room: Room, nominal: ProgramShapes, catalogue: Catalogue, device: jax.Device
) -> dict[str, object]:
    topology = catalogue.topology
    return {
        "name": "pool",
        "topology": repr(topology),
        "max_chunk_tokens": catalogue.max_chunk_tokens,
        "max_rows": catalogue.max_rows,
        "wanted": room.wanted,
        **shapes_key(nominal),
        **platform_key(device),
    }
