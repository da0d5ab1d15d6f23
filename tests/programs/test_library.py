"""A program is compiled once: then found in memory, rebound, or loaded from the folder."""

from __future__ import annotations

import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from loongjax.cluster.mesh import GroupMeshes, device_grid
from loongjax.errors import StepError
from loongjax.models.products import Products
from loongjax.programs import library as library_module
from loongjax.programs.build import ProgramShapes
from loongjax.programs.guard import CompileGuard
from loongjax.programs.key import program_key
from loongjax.programs.library import ProgramLibrary
from loongjax.programs.spec import ProgramSpec
from loongjax.programs.store import ProgramStore
from tests.esp.rig import TINY
from tests.programs.test_rebind import Hostile

MODEL = replace(TINY, layers=1, windows=(None,), vocab_size=64)
SHAPES = ProgramShapes(
    config=MODEL,
    tp=1,
    dtype=jnp.dtype("float32"),
    stored_dtype=jnp.dtype("float32"),
    stacked=False,
    products=Products.CPU,
    slots=64,
    block_size=4,
    table_entries=80,
)
DECODE = ProgramSpec(kind="decode", degree=1, bucket=4, rows=4)
PAIR = ProgramSpec(kind="decode", degree=2, bucket=4, rows=4)


pytestmark = pytest.mark.usefixtures("room")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `DECODE` and `PAIR` in it; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("programs")
    library = library_on(folder)
    library.get(DECODE, (0,))
    library.get(PAIR, (0, 1))
    assert how(library) == (2, 0, 0)
    assert library.counts.compile_s > 0 == library.counts.load_s
    return folder


def library_on(
    folder, shapes: ProgramShapes = SHAPES, guard: CompileGuard | None = None, trusted=None
) -> ProgramLibrary:
    store = None if folder is None else ProgramStore(folder, trusted)
    return ProgramLibrary(shapes, GroupMeshes(device_grid(8, 1)), store, guard)


def how(library: ProgramLibrary) -> tuple[int, int, int]:
    """Programs compiled, loaded and rebound."""
    return library.counts.compiled, library.counts.loaded, library.counts.rebound


def devices_of(program) -> list[int]:
    (weights, *_), _ = program.input_shardings
    return sorted(device.id for device in weights["embed"].device_set)


def test_a_second_library_on_the_same_folder_compiles_nothing(folder):
    library = library_on(folder)
    first = library.get(PAIR, (2, 5))
    assert how(library) == (0, 1, 0)
    assert library.get(PAIR, (2, 5)) is first
    assert how(library) == (0, 1, 0)
    assert devices_of(first) == [2, 5]
    assert devices_of(library.get(PAIR, (0, 7))) == [0, 7]
    library.get(DECODE, (3,))
    library.get(DECODE, (0,))
    assert how(library) == (0, 2, 2)
    assert library.counts.compile_s == 0
    assert min(library.counts.load_s, library.counts.rebind_s) > 0


def test_a_stored_program_says_what_memory_it_takes(folder):
    stored = ProgramStore(folder).load(program_key(PAIR, SHAPES, jax.devices()[0]), 2)
    assert stored.temporary_bytes > 0
    assert stored.code_bytes is not None


@pytest.fixture
def trivial_programs(monkeypatch):
    """Compiles next to nothing in place of programs."""

    def lower(spec, shapes, mesh):
        return jax.jit(lambda x: x).lower(jnp.zeros(1))

    monkeypatch.setattr(library_module, "lower", lower)


def test_without_a_folder_programs_live_in_memory_alone(request):
    library = library_on(None)
    library.get(DECODE, (0,))
    library.get(DECODE, (1,))
    assert how(library) == (1, 0, 1)
    library.clear()
    request.getfixturevalue("trivial_programs")
    library.get(DECODE, (1,))
    assert how(library) == (2, 0, 1)


@pytest.mark.usefixtures("trivial_programs")
def test_a_program_that_cannot_be_kept_runs_all_the_same(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(ProgramStore, "save", fail)
    library = library_on(tmp_path / "full")
    assert library.get(DECODE, (0,)) is library.get(DECODE, (0,))
    assert "could not keep compiled program decode-d1-t4-r4: no space left" in caplog.text


# ---- files that must not be loaded ---------------------------------------------------------


def store_with(folder, data: bytes) -> ProgramStore:
    """A store that holds some bytes for `DECODE`, all checks of the file satisfied."""
    store = ProgramStore(folder)
    good = library_module.StoredProgram(data=data, compiled_for=(0,))
    store.save(program_key(DECODE, SHAPES, jax.devices()[0]), good)
    return store


@pytest.fixture
def never_unpickled(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("it was unpickled")

    monkeypatch.setattr(library_module, "from_bytes", fail)


@pytest.mark.usefixtures("trivial_programs")
def test_a_hostile_file_with_the_right_digest_runs_nothing(tmp_path, caplog):
    """Whoever wrote it could write our folder; still nothing but a program is unpickled."""
    marker, folder = tmp_path / "it-ran", tmp_path / "programs"
    store_with(folder, pickle.dumps(Hostile(marker)))
    library = library_on(folder)
    library.get(DECODE, (0,))
    assert how(library) == (1, 0, 0)
    assert not marker.exists()
    assert "not using stored program decode-d1-t4-r4" in caplog.text
    assert "system has no place in a compiled program" in caplog.text


def spoil_digest(folder) -> None:
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes() + b".")


def make_foreign(folder) -> None:
    (path,) = folder.iterdir()
    path.chmod(0o666)


def open_folder(folder) -> None:
    folder.chmod(0o777)


def cut_short(folder) -> None:
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.usefixtures("trivial_programs", "never_unpickled")
@pytest.mark.parametrize("spoil", [spoil_digest, make_foreign, open_folder, cut_short])
def test_a_refused_file_is_compiled_anew_and_never_unpickled(tmp_path, caplog, spoil):
    folder = tmp_path / "programs"
    store_with(folder, pickle.dumps(Hostile(tmp_path / "it-ran")))
    library = library_on(folder)
    spoil(folder)
    library.get(DECODE, (0,))
    assert how(library) == (1, 0, 0)
    assert "not using compiled program" in caplog.text
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.usefixtures("trivial_programs")
def test_bytes_that_are_no_program_are_compiled_anew(tmp_path, caplog):
    """As after an upgrade that the key does not know."""
    folder = tmp_path / "programs"
    store_with(folder, b"rubbish")
    library = library_on(folder)
    library.get(DECODE, (0,))
    assert how(library) == (1, 0, 0)
    assert "not using stored program decode-d1-t4-r4" in caplog.text
    assert library_on(folder).get(DECODE, (0,)) is not None  # replaced by what was compiled


def test_a_library_made_elsewhere_is_used_if_it_is_named(folder, tmp_path):
    own = tmp_path / "own"
    library = library_on(own, trusted=folder)
    assert devices_of(library.get(PAIR, (2, 3))) == [2, 3]
    assert how(library) == (0, 1, 0)
    assert list(own.iterdir()) == []


def test_where_rebinding_fails_the_program_is_compiled_for_the_group(monkeypatch, caplog):
    """The fallback, for a jax whose internals are other ones."""
    library = library_on(None)
    library.get(DECODE, (0,))

    def fail(*_, **__):
        raise AttributeError("no such function in this jax")

    monkeypatch.setattr(library_module, "from_bytes", fail)
    program = library.get(DECODE, (3,))
    assert devices_of(program) == [3]
    assert how(library) == (2, 0, 0)
    assert "not using stored program decode-d1-t4-r4: no such function" in caplog.text


@pytest.mark.usefixtures("trivial_programs")
def test_a_placed_program_is_loaded_onto_its_own_devices_alone(tmp_path, monkeypatch, caplog):
    """On TPU routing is compiled in: the same spec for other devices is another program."""
    placed = replace(PAIR, placement=(2, 3))
    bound, program = [], jax.jit(lambda x: x).lower(jnp.zeros(1)).compile()
    monkeypatch.setattr(
        library_module, "from_bytes", lambda *_, devices, **__: bound.append(devices) or program
    )
    library_on(tmp_path).get(placed, (2, 3))
    again = library_on(tmp_path)
    again.get(placed, (2, 3))
    assert how(again) == (0, 1, 0)
    assert [[device.id for device in devices] for devices in bound] == [[2, 3]]

    other_devices = GroupMeshes(tuple(reversed(device_grid(8, 1))))  # as on another slice
    elsewhere = ProgramLibrary(SHAPES, other_devices, ProgramStore(tmp_path))
    elsewhere.get(placed, (2, 3))
    assert how(elsewhere) == (1, 0, 0)
    assert "decode-d2-t4-r4-on-2-3: it is for devices (2, 3)" in caplog.text


# ---- the guard -----------------------------------------------------------------------------


@pytest.mark.usefixtures("trivial_programs")
def test_what_is_compiled_after_warm_up_is_counted_and_named(caplog):
    library = library_on(None)
    library.get(DECODE, (0,))
    assert library.counts.compiled_after_warm_up == 0
    library.guard.armed = True
    library.get(DECODE, (0,))
    assert library.counts.compiled_after_warm_up == 0
    library.get(PAIR, (0, 1))
    assert library.counts.compiled_after_warm_up == 1
    assert "for decode-d2-t4-r4 after warm-up" in caplog.text


@pytest.mark.usefixtures("trivial_programs")
def test_strict_mode_refuses_to_compile_after_warm_up():
    library = library_on(None, guard=CompileGuard(strict=True))
    library.get(DECODE, (0,))
    library.guard.armed = True
    with pytest.raises(StepError, match="program decode-d2-t4-r4 would have to be compiled"):
        library.get(PAIR, (0, 1))
    library.get(DECODE, (0,))
    assert how(library) == (1, 0, 0)


def test_the_guard_sees_compilations_that_jax_makes_by_itself(caplog):
    guard, armed = CompileGuard(), CompileGuard()
    armed.armed = True
    for number, watcher in enumerate([guard, armed]):
        with watcher.watch("step 7"):
            (jnp.zeros(1013 + number) + 1).block_until_ready()
    (jnp.zeros(1091) + 1).block_until_ready()  # nobody watches
    assert guard.compiled == 0
    assert armed.compiled >= 1
    assert "for step 7 after warm-up" in caplog.text
    before = armed.compiled
    with armed.watch("step 8"):  # compiled already
        np.asarray(jnp.zeros(1014) + 1)
    assert armed.compiled == before


def test_what_cannot_be_mapped_is_unbound_and_comes_back(folder, monkeypatch, caplog):
    library = library_on(folder)
    library.get(PAIR, (0, 1))
    library.get(DECODE, (0,))
    library.get(PAIR, (0, 1))  # now the other one was used longest ago
    rooms = [False, True]
    monkeypatch.setattr(library_module.mappings, "has_room", lambda: rooms.pop(0))
    library.get(DECODE, (1,))
    assert (how(library), library.counts.unbound) == ((0, 2, 1), 1)
    assert "unbinding decode-d1-t4-r4 from group (0,)" in caplog.text
    library.get(PAIR, (0, 1))
    rooms = [True]
    library.get(DECODE, (0,))
    assert (how(library), library.counts.unbound) == ((0, 2, 2), 1)


def test_one_program_is_bound_however_little_room_there_is(folder, monkeypatch):
    library = library_on(folder)
    monkeypatch.setattr(library_module.mappings, "has_room", lambda: False)
    for group in ((0,), (1,), (0,)):
        library.get(DECODE, group)
    assert (how(library), library.counts.unbound) == ((0, 1, 2), 2)
