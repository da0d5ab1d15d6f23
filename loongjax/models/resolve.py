"""From what a user calls a model to its description, its weights and its tokenizer.

Owns the meaning of a model's name, in this order: `demo`; `random:NAME`; a folder in the
Hugging Face layout, or one that `loongjax convert` made; a `.gguf` file; else an id on the
Hugging Face hub. What looks like a path is never looked up on the network. Only headers are read
here. Imports no jax.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig
from loongjax.models.tokenizer_files import TokenizerFiles
from loongjax.models.weights import WeightSource

CONVERSION = "loongjax_conversion.json"
"""The note in a folder that `loongjax convert` writes, or has written."""
_RANDOM = "random:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
"""What lies beside a model's `config.json` and weights, as patterns."""
_HUB_PATTERNS = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *COMPANION_FILES,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """A model that was found and checked, and whose weights are still to be read.

    Attributes:
      name: What the user called it.
      config: Its description.
      source: Its weights; every tensor of `config` is there in the right shape.
      tokenizer: Where its tokenizer lies; None when it has none.
      folder: Where its `config.json` lies; None when it has none.
    """

    name: str
    config: ModelConfig
    source: WeightSource
    tokenizer: TokenizerFiles | None
    folder: Path | None = None


def resolve(model: str) -> ResolvedModel:
    """Finds a model by name, path, or hub id; may download.

    Raises ModelError, saying what was tried, for one that is absent, damaged or not
    supported.
    """
    if model == "demo":
        from loongjax.models.demo import fetch_demo

        return _from_gguf(model, fetch_demo())
    if model.startswith(_RANDOM):
        return _from_random(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(model, path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(
                f"{model}: a model is a folder with config.json and safetensors files, or a "
                ".gguf file"
            )
        return _from_gguf(model, path)
    if _looks_like_path(model):
        where = "" if path.is_absolute() else f", looked for at {path.absolute()}"
        raise ModelError(f"{model}: no such file or folder{where}")
    return _from_folder(model, _download(model))


def _from_random(model: str) -> ResolvedModel:
    from loongjax.models.random_weights import RandomSource, random_config

    config = random_config(model.removeprefix(_RANDOM))
    return ResolvedModel(
        name=model,
        config=config,
        source=RandomSource(config=config),
        tokenizer=TokenizerFiles(kind="bytes"),
    )


def _from_gguf(model: str, path: Path) -> ResolvedModel:
    from loongjax.models.gguf import open_gguf

    config, source = open_gguf(path)
    return ResolvedModel(
        name=model,
        config=config,
        source=source,
        tokenizer=TokenizerFiles(kind="gguf", path=path),
    )


def _from_folder(model: str, folder: Path) -> ResolvedModel:
    from loongjax.models.safetensors import read_folder_config

    inside = sorted(folder.glob("*.gguf"))
    if inside and not (folder / "config.json").exists():
        raise ModelError(f"{folder}: to serve a GGUF file, name the file itself: {inside[0]}")
    if (folder / CONVERSION).exists() and not (folder / "config.json").exists():
        raise ModelError(f"{folder} is not whole; run the same `loongjax convert` again to end it")
    config = read_folder_config(folder)
    has_tokenizer = any((folder / name).exists() for name in _TOKENIZER_FILES)
    return ResolvedModel(
        name=model,
        config=config,
        source=_open_weights(folder, config),
        tokenizer=TokenizerFiles(kind="hf", path=folder) if has_tokenizer else None,
        folder=folder,
    )


def _open_weights(folder: Path, config: ModelConfig) -> WeightSource:
    from loongjax.models.orbax_weights import WEIGHTS, open_orbax
    from loongjax.models.safetensors import open_safetensors

    if (folder / WEIGHTS).is_dir():
        return open_orbax(folder, config)
    return open_safetensors(folder, config)


def _looks_like_path(model: str) -> bool:
    """Whether a name that is no file can only have been meant as one."""
    parent = Path(model).parent
    return (
        not _HUB_ID.fullmatch(model)
        or model.lower().endswith(_FILE_ENDINGS)
        or (parent != Path() and parent.is_dir())
    )


def _download(model: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(_HUB_PATTERNS)))
    except Exception as error:  # its errors share no base: HTTP, validation, storage
        raise ModelError(
            f"{model!r} is no file or folder here ({Path(model).absolute()}), and could not be "
            f"fetched from the Hugging Face hub: {error}. Known without a network: 'demo', "
            "'random:NAME', a folder, a .gguf file"
        ) from error
