"""The key: a change of anything that a program depends on compiles it anew."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from loongjax.models.config import ModelConfig, RopeConfig
from loongjax.programs import key
from loongjax.programs import library as library_module
from loongjax.programs.build import ProgramShapes
from loongjax.programs.library import ProgramLibrary
from loongjax.programs.spec import ProgramSpec
from tests.programs.test_library import DECODE, MODEL, SHAPES, how, library_on

NO_PROGRAM_KNOWS = {"bos_id", "eos_ids"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a program for `DECODE`, next to nothing for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library_module, "lower", trivial)
        folder = tmp_path_factory.mktemp("programs")
        library_on(folder).get(DECODE, (0,))
        yield folder


def trivial(spec, shapes, mesh):
    return jax.jit(lambda x: x).lower(jnp.zeros(1))


@pytest.fixture(autouse=True)
def _nothing_is_unpickled(monkeypatch):
    """The program in the folder is not of `DECODE`'s form, so loading it is only noted."""
    program = trivial(None, None, None).compile()
    monkeypatch.setattr(library_module, "from_bytes", lambda *_, **__: program)


def on_folder(folder, shapes: ProgramShapes = SHAPES) -> ProgramLibrary:
    """A library that reads the folder, and leaves it as it is."""
    library = library_on(folder, shapes)
    library._store.save = lambda *_: None
    return library


def is_compiled(folder, spec: ProgramSpec = DECODE, shapes: ProgramShapes = SHAPES) -> bool:
    library = on_folder(folder, shapes)
    library.get(spec, tuple(range(spec.degree)) if spec.placement is None else spec.placement)
    assert how(library) in [(1, 0, 0), (0, 1, 0)]
    return how(library) == (1, 0, 0)


def test_nothing_changed_and_nothing_is_compiled(folder):
    assert not is_compiled(folder)


@pytest.mark.parametrize(
    "change",
    [{"kind": "extend"}, {"degree": 2}, {"bucket": 8}, {"rows": 8}, {"placement": (0,)}],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_a_spec(folder, change):
    assert is_compiled(folder, replace(DECODE, **change))


def test_all_parts_of_a_spec_are_tested():
    assert {field.name for field in dataclasses.fields(ProgramSpec)} == {
        *("kind", "degree", "bucket", "rows", "placement")
    }


def other(value: object) -> object:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case tuple():
            return (*value, 5)
        case RopeConfig():
            return replace(value, base=value.base + 1)
        case None:
            return 1
    return jnp.dtype("int8")


def changed(message, name: str):
    """A copy with one field changed, checked by nobody."""
    found = copy.copy(message)
    object.__setattr__(found, name, other(getattr(message, name)))
    return found


def names_of(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize("name", [name for name in names_of(ProgramShapes) if name != "config"])
def test_every_shape(folder, name):
    assert is_compiled(folder, shapes=changed(SHAPES, name))


@pytest.mark.parametrize("name", names_of(ModelConfig))
def test_every_field_of_the_model_but_its_token_ids(folder, name):
    shapes = replace(SHAPES, config=changed(MODEL, name))
    assert is_compiled(folder, shapes=shapes) == (name not in NO_PROGRAM_KNOWS)


@pytest.mark.parametrize("name", names_of(RopeConfig))
def test_every_field_of_its_positions(folder, name):
    shapes = replace(SHAPES, config=replace(MODEL, rope=changed(MODEL.rope, name)))
    assert is_compiled(folder, shapes=shapes)


def device(**fields: object) -> SimpleNamespace:
    client = SimpleNamespace(platform_version=fields.pop("platform_version", "cpu"))
    return SimpleNamespace(**({"platform": "cpu", "device_kind": "cpu"} | fields), client=client)


def with_device(patch, **fields: object) -> None:
    fake = device(**fields)
    on_fake = lambda spec, shapes, _: key.program_key(spec, shapes, fake)  # noqa: E731
    patch.setattr(library_module, "program_key", on_fake)


CHANGES = {
    "source": lambda patch: patch.setattr(key, "source_digest", lambda: "changed"),
    "cpu features": lambda patch: patch.setattr(key, "cpu_features_digest", lambda: "changed"),
    "jax": lambda patch: patch.setattr(key.jax, "__version__", "0.0.1"),
    "jaxlib": lambda patch: patch.setattr(key.jaxlib, "__version__", "0.0.1"),
    "flax": lambda patch: patch.setattr(key.flax, "__version__", "0.0.1"),
    "platform": lambda patch: with_device(patch, platform="gpu"),
    "plugin": lambda patch: with_device(patch, platform_version="cuda 13"),
    "device kind": lambda patch: with_device(patch, device_kind="H100"),
    "threads": lambda patch: patch.setenv("NPROC", "63"),
    "XLA flags": lambda patch: patch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere"),
    "TPU flags": lambda patch: patch.setenv("LIBTPU_INIT_ARGS", "--something"),
}


JAX_SETTINGS = (
    ("jax_default_matmul_precision", "highest"),
    ("jax_default_prng_impl", "rbg"),
    ("jax_enable_x64", True),
    ("jax_threefry_partitionable", False),
)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_compiles_and_for_what(folder, monkeypatch, change):
    change(monkeypatch)
    assert is_compiled(folder)


def test_all_parts_of_a_platform_are_tested():
    assert set(key.platform_key(device())) == {
        *("source", "jax", "jaxlib", "flax", "platform", "platform_version", "device_kind"),
        *("cpu_features", "cpu_threads", "flags", "jax_config"),
    }
    assert set(key._FLAGS) == {"XLA_FLAGS", "LIBTPU_INIT_ARGS"}
    assert set(key._JAX_CONFIG) == {name for name, _ in JAX_SETTINGS}


def test_on_gpu_the_plugin_counts_and_not_the_driver(monkeypatch):
    plugin = SimpleNamespace(name="jax-cuda13-pjrt", version="1.2")
    monkeypatch.setattr(key.metadata, "distributions", lambda: [plugin])
    found = [
        key.platform_key(device(platform="gpu", platform_version=driver)) for driver in ("a", "b")
    ]
    assert found[0] == found[1]
    assert found[0]["platform_version"] == "jax-cuda13-pjrt==1.2"


def test_a_fake_device_alone_changes_nothing(folder, monkeypatch):
    with_device(monkeypatch)
    assert not is_compiled(folder)


@pytest.mark.parametrize(("name", "value"), JAX_SETTINGS)
def test_settings_of_jax(folder, name, value):
    before = getattr(jax.config, name)
    assert before != value
    jax.config.update(name, value)
    try:
        assert is_compiled(folder)
    finally:
        jax.config.update(name, before)
    assert not is_compiled(folder)


def test_the_digest_of_the_cpu_knows_its_features_and_their_number(monkeypatch):
    digests = {key.cpu_features_digest.__wrapped__()}
    text = "processor: 0\nflags: avx2 amx_tile\n"
    monkeypatch.setattr(key.Path, "exists", lambda self: True)
    for content in (text, text.replace("amx_tile", ""), "Features: asimd\n", "nothing known\n"):
        monkeypatch.setattr(key.Path, "read_text", lambda self, content=content: content)
        digests.add(key.cpu_features_digest.__wrapped__())
    monkeypatch.setattr(key.os, "sched_getaffinity", lambda pid: set(range(99)))
    digests.add(key.cpu_features_digest.__wrapped__())
    assert len(digests) == 6


def test_the_digest_of_the_source_covers_all_that_programs_are_traced_from(monkeypatch, tmp_path):
    traced = {"esp", "models", "programs", "kvcache", "sampling", "cluster"}
    assert traced <= set(key._SOURCE_FOLDERS)
    folders = (*(f"loongjax/{name}" for name in key._SOURCE_FOLDERS), "pallas_kernels")
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
