"""Conversions: the same model in another layout, begun again wherever it stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from loongjax.checkpoint import convert, hf_writer
from loongjax.cli.main import main
from loongjax.errors import ConfigError, ModelError
from loongjax.models.random_weights import RandomSource, random_config
from loongjax.models.resolve import resolve
from loongjax.models.safetensors import open_safetensors
from loongjax.models.weights import iter_specs, shard_index, weight_specs
from loongjax.text import load_tokenizer

TINY = random_config("tiny")
PARTS = {"embed", "final_norm", "lm_head", "layers.0", "layers.1"}
MISSING = "weights/layers.1/down"


@pytest.fixture(scope="module")
def orbax(tmp_path_factory):
    """`random:tiny` as Orbax checkpoints."""
    folder = tmp_path_factory.mktemp("orbax") / "tiny"
    done = convert("random:tiny", folder, to="orbax")
    assert (done.pieces, done.resumed, done.tensors) == (5, 0, 21)
    return folder


@pytest.fixture
def copied(orbax, tmp_path):
    """A copy that may be spoiled."""
    return shutil.copytree(orbax, tmp_path / "copy")


def assert_same_weights(folder, source, config, dtype=np.float32):
    found = resolve(str(folder))
    assert found.config == config
    for tp in (1, 2):
        for spec in iter_specs(weight_specs(config, tp)):
            for rank in range(tp):
                index = shard_index(spec, rank, tp)
                values = found.source.read(spec, index)
                assert values.dtype == dtype
                np.testing.assert_array_equal(values, source.read(spec, index).astype(dtype))


def test_orbax_holds_the_same_model(orbax):
    assert {part.name for part in (orbax / "weights").iterdir()} == PARTS
    assert_same_weights(orbax, RandomSource(config=TINY), TINY)
    tokenizer = load_tokenizer(resolve(str(orbax)).tokenizer)
    assert tokenizer.decode(tokenizer.encode("héllo", add_special=True)) == "héllo"


def test_orbax_itself_reads_it(orbax):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as reader:
        tree = reader.restore(orbax / "weights" / "layers.1")
    source = resolve("random:tiny").source
    specs = weight_specs(TINY)["layers"][1]
    assert set(tree) == set(specs)
    for key, spec in specs.items():
        np.testing.assert_array_equal(tree[key], source.read(spec, shard_index(spec, 0, 1)))


@pytest.mark.parametrize("to", ["orbax", "hf"])
def test_it_goes_on_where_it_stopped(tmp_path, to, monkeypatch):
    monkeypatch.setattr(hf_writer, "_FILE_BYTES", 100_000)
    folder = tmp_path / "half"

    class Stopped(Exception):
        pass

    def stop_at_half(done, total, what):
        if done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        convert("random:tiny", folder, to=to, dtype="bfloat16", on_progress=stop_at_half)
    with pytest.raises(ModelError, match="is not whole; run the same `loongjax convert` again"):
        resolve(str(folder))
    with pytest.raises(ConfigError, match="holds another conversion"):
        convert("random:tiny", folder, to=to)
    if to == "orbax":
        left = folder / "weights" / "layers.1.orbax-checkpoint-tmp"
        shutil.copytree(folder / "weights" / "embed", left)  # by a process that was killed
    done = convert("random:tiny", folder, to=to, dtype="bfloat16")
    assert 0 < done.resumed < done.pieces
    assert_same_weights(folder, RandomSource(config=TINY), TINY, np.dtype(ml_dtypes.bfloat16))
    assert not [path for path in folder.rglob("*") if "tmp" in path.name or "part" in path.name]
    again = convert("random:tiny", folder, to=to, dtype="bfloat16")
    assert again.resumed == again.pieces


def test_back_to_safetensors_from_orbax(orbax, tmp_path):
    convert(str(orbax), tmp_path / "hf", to="hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert_same_weights(tmp_path / "hf", RandomSource(config=TINY), TINY)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_text() == (orbax / name).read_text()


def test_several_files_have_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer, "_FILE_BYTES", 100_000)
    config = dataclasses.replace(TINY, family="qwen3", qk_norm=True, tied_embeddings=True)
    source, specs = RandomSource(config=config), list(iter_specs(weight_specs(config)))
    writer = hf_writer.HfWriter(tmp_path, source, specs, "float16")
    for piece in writer.pieces:
        writer.write(piece)
    writer.finish()
    assert len(list(tmp_path.glob("model-0*-of-00003.safetensors"))) == len(writer.pieces) == 3
    total = json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]
    assert total["total_size"] == 2 * sum(np.prod(spec.stored_shape) for spec in specs)
    found = open_safetensors(tmp_path, config)
    for spec in specs:
        index = shard_index(spec, 0, 1)
        expected = source.read(spec, index).astype(np.float16)
        np.testing.assert_array_equal(found.read(spec, index), expected)


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        convert("random:tiny", tmp_path, to="hf")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match="cannot be written"):
        convert("random:tiny", tmp_path / "notes.txt" / "sub", to="hf")


def spoil(folder, what):
    """Spoils a copy of the checkpoint."""
    place = folder / MISSING
    header = json.loads((place / ".zarray").read_text())
    if what == "absent":
        shutil.rmtree(place)
    elif what == "chunk":
        for chunk in place.glob("[0-9]*"):
            chunk.unlink()
    elif what == "shape":
        (place / ".zarray").write_text(json.dumps(header | {"shape": [64, 64]}))
    elif what == "dtype":
        (place / ".zarray").write_text(json.dumps(header | {"dtype": "<i4"}))
    else:
        shutil.copytree(place, place.with_name("extra"))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", "'layers.1.down' is missing or damaged"),
        ("chunk", "'layers.1.down' cannot be read"),
        ("shape", r"'layers.1.down' has shape \[64, 64\], config.json expects \[64, 128\]"),
        ("dtype", "'layers.1.down' has dtype int32"),
        ("extra", "extra: this tensor has no place"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(copied, what, message):
    spoil(copied, what)
    spec = weight_specs(TINY)["layers"][1]["down"]
    with pytest.raises(ModelError, match=message):
        resolve(str(copied)).source.read(spec, shard_index(spec, 0, 1))


def test_the_command(tmp_path, capsys):
    folder = tmp_path / "hf"
    assert main(["convert", "random:tiny", str(folder), "--to", "hf", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["folder"] == str(folder)
    assert (report["pieces"], report["resumed"], report["tensors"]) == (1, 0, 21)
    assert main(["convert", "random:tiny", str(folder), "--to", "hf"]) == 0
    assert "1 of them there before" in capsys.readouterr().err
    assert main(["convert", "random:none", str(folder)]) == 2
