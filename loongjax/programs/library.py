"""Programs ready to run: found in memory, rebound, loaded from disk, or compiled.

A program is compiled once per spec. Where compiled code does not depend on the devices, it
is then rebound to every group of its degree that asks for it; elsewhere each group has its
own spec (`ProgramSpec.placement`). Where the process can map no more code, the programs that
were used longest ago are unbound; they stay in memory serialized, and are rebound when needed.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import replace

import jax
from jax.sharding import Mesh

from loongjax.cluster.mesh import GroupMeshes
from loongjax.plan import Group
from loongjax.programs import mappings
from loongjax.programs.build import ProgramShapes, argument_shapes, lower
from loongjax.programs.counts import ProgramCounts
from loongjax.programs.guard import CompileGuard
from loongjax.programs.key import program_key
from loongjax.programs.rebind import from_bytes, to_bytes
from loongjax.programs.spec import ProgramSpec
from loongjax.programs.store import ProgramStore, StoredProgram

_log = logging.getLogger(__name__)


class ProgramLibrary:
    """All programs of one engine. Not thread-safe: the executor's thread owns it.

    Attributes:
      shapes: What its programs have in common.
      guard: Told of warm-up's end, it counts or refuses what is compiled from then on.
    """

    def __init__(
        self,
        shapes: ProgramShapes,
        meshes: GroupMeshes,
        store: ProgramStore | None,
        guard: CompileGuard | None = None,
    ) -> None:
        """`store` None keeps programs in memory only."""
        self.shapes = shapes
        self.guard = guard or CompileGuard()
        self._counts = ProgramCounts(attention_backend=shapes.attention_backend)
        self._meshes = meshes
        self._store = store
        self._serialized: dict[ProgramSpec, StoredProgram] = {}
        self._bound: OrderedDict[tuple[ProgramSpec, Group], jax.stages.Compiled] = OrderedDict()

    @property
    def counts(self) -> ProgramCounts:
        """How its programs came to be, so far. Any thread may ask."""
        return replace(self._counts, compiled_after_warm_up=self.guard.compiled)

    def get(self, spec: ProgramSpec, group: Group) -> jax.stages.Compiled:
        """The program of a spec, bound to a group's devices.

        Raises StepError where the guard forbids to compile it.
        """
        key = (spec, group)
        program = self._bound.get(key)
        if program is None:
            self._make_room()
            program = self._bound[key] = self._make(spec, group)
        else:
            self._bound.move_to_end(key)
        return program

    def clear(self) -> None:
        """Drops all programs and what they hold on the devices."""
        self._bound.clear()
        self._serialized.clear()

    def _make_room(self) -> None:
        while self._bound and not mappings.has_room():
            (spec, group), _ = self._bound.popitem(last=False)
            if self._counts.unbound:  # one warning is enough; to count mappings takes long
                _log.debug("unbinding %s from group %s", spec.name, group)
            else:
                _log.warning(
                    "unbinding %s from group %s: this process has %d memory mappings of %d (sysctl "
                    "vm.max_map_count); raise that, or serve with fewer degrees or instances",
                    *(spec.name, group, mappings.count_mappings(), mappings.most_mappings()),
                )
            self._count(unbound=1)

    def _make(self, spec: ProgramSpec, group: Group) -> jax.stages.Compiled:
        mesh = self._meshes[group]
        return self._rebind(spec, mesh) or self._load(spec, mesh) or self._compile(spec, mesh)

    def _rebind(self, spec: ProgramSpec, mesh: Mesh) -> jax.stages.Compiled | None:
        stored = self._serialized.get(spec)
        if stored is None:
            return None
        started = time.monotonic()
        program = self._bind(spec, stored, mesh)
        if program is not None:
            self._count(rebound=1, rebind_s=time.monotonic() - started)
        return program

    def _load(self, spec: ProgramSpec, mesh: Mesh) -> jax.stages.Compiled | None:
        if self._store is None:
            return None
        started = time.monotonic()
        stored = self._store.load(self._key(spec, mesh), devices=mesh.devices.size)
        program = None if stored is None else self._bind(spec, stored, mesh)
        if stored is not None and program is not None:
            self._serialized[spec] = stored
            self._count(loaded=1, load_s=time.monotonic() - started)
        return program

    def _compile(self, spec: ProgramSpec, mesh: Mesh) -> jax.stages.Compiled:
        self.guard.refuse(spec.name)
        _log.info("compiling %s", spec.name)
        started = time.monotonic()
        with self.guard.watch(spec.name):
            program = lower(spec, self.shapes, mesh).compile()
        seconds = time.monotonic() - started
        self._count(compiled=1, compile_s=seconds)
        _log.info("compiled %s in %.1f s", spec.name, seconds)
        self._serialized[spec] = stored = serialize(program, mesh)
        if self._store:
            try:
                self._store.save(self._key(spec, mesh), stored)
            except OSError as error:  # the program runs all the same; the next start compiles
                _log.warning("could not keep compiled program %s: %s", spec.name, error)
        return program

    def _key(self, spec: ProgramSpec, mesh: Mesh) -> dict[str, object]:
        return program_key(spec, self.shapes, mesh.devices.flat[0])

    def _bind(
        self, spec: ProgramSpec, stored: StoredProgram, mesh: Mesh
    ) -> jax.stages.Compiled | None:
        """A serialized program on the devices of a mesh; None, with a word in the log, if it
        cannot be used there.
        """
        devices = list(mesh.devices.flat)
        if spec.placement is not None and stored.compiled_for != _ids(mesh):
            _log.warning("not using %s: it is for devices %s", spec.name, stored.compiled_for)
            return None
        arguments = argument_shapes(spec, self.shapes, mesh)
        try:
            return from_bytes(
                stored.data,
                compiled_for=stored.compiled_for,
                devices=devices,
                in_tree=jax.tree.structure((arguments, {})),
                out_tree=jax.tree.structure(
                    (self.shapes.pool_shapes(spec.degree), *range(spec.outputs))
                ),
            )
        except Exception as error:  # bytes from a disk, read by whatever jax is installed
            _log.warning("not using stored program %s: %s", spec.name, error)
            return None

    def _count(self, **more: int | float) -> None:
        fields = {name: getattr(self._counts, name) + value for name, value in more.items()}
        self._counts = replace(self._counts, **fields)


def serialize(program: jax.stages.Compiled, mesh: Mesh) -> StoredProgram:
    """A program that was compiled for a mesh, and the memory that it says it takes."""
    memory = program.memory_analysis()
    return StoredProgram(
        data=to_bytes(program),
        compiled_for=_ids(mesh),
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        code_bytes=getattr(memory, "generated_code_size_in_bytes", None),
    )


def _ids(mesh: Mesh) -> tuple[int, ...]:
    return tuple(device.id for device in mesh.devices.flat)
