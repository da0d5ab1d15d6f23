"""A program is compiled once: then found in memory, rebound, or loaded from the folder."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from loongjax.cluster.mesh import GroupMeshes, device_grid
from loongjax.models.products import Products
from loongjax.programs import key
from loongjax.programs import library as library_module
from loongjax.programs.build import ProgramShapes
from loongjax.programs.library import ProgramCounts, ProgramLibrary
from loongjax.programs.spec import ProgramSpec
from loongjax.programs.store import ProgramStore
from tests.esp.rig import TINY

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

OTHERS = {
    "block size": replace(SHAPES, block_size=8),
    "slots": replace(SHAPES, slots=65),
    "table": replace(SHAPES, table_entries=96),
    "dtype": replace(SHAPES, dtype=jnp.dtype("bfloat16"), stored_dtype=jnp.dtype("uint16")),
    "model": replace(SHAPES, config=replace(MODEL, norm_eps=1e-6)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `DECODE` and `PAIR` in it."""
    folder = tmp_path_factory.mktemp("programs")
    library = library_on(folder)
    library.get(DECODE, (0,))
    library.get(PAIR, (0, 1))
    assert library.counts == ProgramCounts(compiled=2)
    return folder


def library_on(folder, shapes: ProgramShapes = SHAPES) -> ProgramLibrary:
    store = None if folder is None else ProgramStore(folder)
    return ProgramLibrary(shapes, GroupMeshes(device_grid(8, 1)), store)


def devices_of(program) -> list[int]:
    (weights, *_), _ = program.input_shardings
    return sorted(device.id for device in weights["embed"].device_set)


def test_a_second_library_on_the_same_folder_compiles_nothing(folder):
    library = library_on(folder)
    first = library.get(PAIR, (2, 5))
    assert library.counts == ProgramCounts(loaded=1)
    assert library.get(PAIR, (2, 5)) is first
    assert library.counts == ProgramCounts(loaded=1)
    assert devices_of(first) == [2, 5]
    assert devices_of(library.get(PAIR, (0, 7))) == [0, 7]
    library.get(DECODE, (3,))
    library.get(DECODE, (0,))
    assert library.counts == ProgramCounts(loaded=2, rebound=2)


@pytest.fixture
def trivial_programs(monkeypatch):
    """Compiles next to nothing in place of programs."""

    def lower(*_):
        return jax.jit(lambda x: x).lower(jnp.zeros(1))

    monkeypatch.setattr(library_module, "lower", lower)


def test_without_a_folder_programs_live_in_memory_alone(request):
    library = library_on(None)
    library.get(DECODE, (0,))
    library.get(DECODE, (1,))
    assert library.counts == ProgramCounts(compiled=1, rebound=1)
    library.clear()
    request.getfixturevalue("trivial_programs")
    library.get(DECODE, (1,))
    assert library.counts == ProgramCounts(compiled=2, rebound=1)


@pytest.mark.usefixtures("trivial_programs")
@pytest.mark.parametrize("shapes", OTHERS.values(), ids=OTHERS)
def test_other_shapes_are_compiled_anew(folder, shapes):
    library = library_on(folder, shapes)
    library.get(DECODE, (0,))
    assert library.counts == ProgramCounts(compiled=1)


@pytest.mark.usefixtures("trivial_programs")
def test_a_program_that_cannot_be_kept_runs_all_the_same(tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(ProgramStore, "save", fail)
    library = library_on(tmp_path / "full")
    assert library.get(DECODE, (0,)) is library.get(DECODE, (0,))
    assert "could not keep compiled program decode-d1-t4-r4: no space left" in caplog.text


CHANGES = {
    "source": lambda patch: patch.setattr(key, "source_digest", lambda: "changed"),
    "cpu": lambda patch: patch.setattr(key, "cpu_features_digest", lambda: "changed"),
    "jax": lambda patch: patch.setattr(key.jax, "__version__", "0.0.1"),
    "flags": lambda patch: patch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere"),
}


@pytest.mark.usefixtures("trivial_programs")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_what_made_the_programs_compiles_anew(folder, monkeypatch, change):
    change(monkeypatch)
    library = library_on(folder)
    library.get(DECODE, (0,))
    assert library.counts == ProgramCounts(compiled=1)


def test_the_digest_of_the_source_covers_all_that_programs_are_traced_from(monkeypatch, tmp_path):
    folders = ("loongjax/esp", "loongjax/programs", "loongjax/models", "pallas_kernels")
    for name in (*folders, "loongjax/engine"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "part.py").write_text("x = 1")
    monkeypatch.setattr(key, "__file__", str(tmp_path / "loongjax" / "programs" / "key.py"))
    digests = [key.source_digest.__wrapped__()]
    for name in folders:
        (tmp_path / name / "part.py").write_text("x = 2")
        digests.append(key.source_digest.__wrapped__())
    assert len(set(digests)) == len(digests)
    (tmp_path / "loongjax" / "engine" / "part.py").write_text("x = 2")
    assert key.source_digest.__wrapped__() == digests[-1]
