"""Programs ready to run: found in memory, rebound, loaded from disk, or compiled.

A program is compiled once per spec. Where compiled code does not depend on the devices, it
is then rebound to every group of its degree that asks for it; elsewhere each group has its
own spec (`ProgramSpec.placement`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import jax
from jax.sharding import Mesh

from loongjax.cluster.mesh import GroupMeshes
from loongjax.plan import Group
from loongjax.programs.build import ProgramShapes, argument_shapes, lower
from loongjax.programs.counts import ProgramCounts
from loongjax.programs.key import program_key
from loongjax.programs.rebind import from_bytes, to_bytes
from loongjax.programs.spec import ProgramSpec
from loongjax.programs.store import ProgramStore, StoredProgram

_log = logging.getLogger(__name__)


class ProgramLibrary:
    """All programs of one engine. Not thread-safe: the executor's thread owns it."""

    def __init__(
        self, shapes: ProgramShapes, meshes: GroupMeshes, store: ProgramStore | None
    ) -> None:
        """`store` None keeps programs in memory only."""
        self.shapes = shapes
        self.counts = ProgramCounts()
        self._meshes = meshes
        self._store = store
        self._serialized: dict[ProgramSpec, StoredProgram] = {}
        self._bound: dict[tuple[ProgramSpec, Group], jax.stages.Compiled] = {}

    def get(self, spec: ProgramSpec, group: Group) -> jax.stages.Compiled:
        """The program of a spec, bound to a group's devices."""
        program = self._bound.get((spec, group))
        if program is None:
            program = self._make(spec, group)
            self._bound[spec, group] = program
        return program

    def clear(self) -> None:
        """Drops all programs and what they hold on the devices."""
        self._bound.clear()
        self._serialized.clear()

    def _make(self, spec: ProgramSpec, group: Group) -> jax.stages.Compiled:
        mesh = self._meshes[group]
        stored = self._serialized.get(spec)
        if stored is not None:
            self.counts = replace(self.counts, rebound=self.counts.rebound + 1)
            return self._bind(spec, stored, mesh)
        key = program_key(spec, self.shapes)
        stored = self._store.load(key) if self._store else None
        if stored is not None:
            self.counts = replace(self.counts, loaded=self.counts.loaded + 1)
            self._serialized[spec] = stored
            return self._bind(spec, stored, mesh)
        _log.info("compiling %s, once for all groups of its degree", spec.name)
        started = time.monotonic()
        program = lower(spec, self.shapes, mesh).compile()
        self.counts = replace(self.counts, compiled=self.counts.compiled + 1)
        _log.info("compiled %s in %.1f s", spec.name, time.monotonic() - started)
        stored = StoredProgram(data=to_bytes(program), compiled_for=_ids(mesh))
        self._serialized[spec] = stored
        if self._store:
            try:
                self._store.save(key, stored)
            except OSError as error:  # the program runs all the same; the next start compiles
                _log.warning("could not keep compiled program %s: %s", spec.name, error)
        return program

    def _bind(self, spec: ProgramSpec, stored: StoredProgram, mesh: Mesh) -> jax.stages.Compiled:
        arguments = argument_shapes(spec, self.shapes, mesh)
        return from_bytes(
            stored.data,
            compiled_for=stored.compiled_for,
            devices=list(mesh.devices.flat),
            in_tree=jax.tree.structure((arguments, {})),
            out_tree=jax.tree.structure((self.shapes.pool_shapes(spec.degree), 0)),
        )


def _ids(mesh: Mesh) -> tuple[int, ...]:
    return tuple(device.id for device in mesh.devices.flat)
