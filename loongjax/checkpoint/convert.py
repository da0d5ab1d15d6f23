"""From any model that can be resolved to a folder in another layout.

Owns what a folder has beside the weights, and the order of writing: first a note of what is
converted, then the weights, piece by piece, then the tokenizer, and `config.json` last: a folder
with one is whole. A run that finds the note of the same conversion goes on where the other one
stopped; a folder with anything else in it is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from loongjax.checkpoint.pieces import Dtype, Writer, write_whole
from loongjax.errors import ConfigError
from loongjax.models.hf_config import config_to_hf
from loongjax.models.resolve import COMPANION_FILES, CONVERSION, ResolvedModel, resolve
from loongjax.models.weights import iter_specs, weight_specs
from loongjax.text import load_tokenizer
from loongjax.text.export import tokenizer_files

Layout: TypeAlias = Literal["orbax", "hf"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What a run came to.

    Attributes:
      folder: Where the model lies now.
      pieces: Files or checkpoints of weights there.
      resumed: Those of them that an earlier run had written.
      tensors: Tensors of the model.
    """

    folder: Path
    pieces: int
    resumed: int
    tensors: int


def convert(
    model: str,
    folder: Path,
    *,
    to: Layout,
    dtype: Dtype | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Conversion:
    """Writes a model into a folder, or goes on with it.

    Args:
      model: See `resolve`.
      folder: New, empty, or of the same conversion.
      to: `orbax`: what loongjax reads fastest, each shard for itself; `hf`: for everybody.
      dtype: Of all tensors; None: each as its source gives it (quantized ones float32).
      on_progress: Told of tensors done, their number, and what comes next.

    Raises:
      ModelError: The model cannot be read, or not be written in this layout.
      ConfigError: The folder holds something else, or cannot be written.
    """
    resolved = resolve(model)
    described = _described(resolved, dtype)
    try:
        _claim(
            folder, {"model": model, "to": to, "dtype": dtype, "config": asdict(resolved.config)}
        )
        writer = _writer(folder, resolved, to, dtype)
        resumed = _write_weights(writer, on_progress)
        _write_tokenizer(resolved, folder)
        write_whole(folder / "config.json", json.dumps(described, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error}") from error
    return Conversion(
        folder=folder,
        pieces=len(writer.pieces),
        resumed=resumed,
        tensors=sum(len(piece.tensors) for piece in writer.pieces),
    )


def _described(resolved: ResolvedModel, dtype: Dtype | None) -> dict[str, Any]:
    """The content of `config.json`: the source's own, if it has one."""
    if resolved.folder is None:
        described = config_to_hf(resolved.config)
    else:
        described = json.loads((resolved.folder / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        described |= {"dtype": dtype, "torch_dtype": dtype}
    return described


def _claim(folder: Path, note: dict[str, Any]) -> None:
    """Takes a folder for this conversion."""
    text = json.dumps(note, indent=2)
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / CONVERSION
    if mine.exists():
        if mine.read_text(encoding="utf-8") != text:
            raise ConfigError(f"{folder} holds another conversion ({mine}); choose another folder")
    elif any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; choose another folder")
    else:
        write_whole(mine, text)


def _writer(folder: Path, resolved: ResolvedModel, to: Layout, dtype: Dtype | None) -> Writer:
    specs = list(iter_specs(weight_specs(resolved.config)))
    if to == "hf":
        from loongjax.checkpoint.hf_writer import HfWriter

        return HfWriter(folder, resolved.source, specs, dtype)
    from loongjax.checkpoint.orbax_writer import OrbaxWriter

    return OrbaxWriter(folder, resolved.source, specs, dtype)


def _write_weights(writer: Writer, on_progress: Callable[[int, int, str], None]) -> int:
    total = sum(len(piece.tensors) for piece in writer.pieces)
    done = resumed = 0
    for piece in writer.pieces:
        on_progress(done, total, piece.name)
        if writer.is_there(piece):
            resumed += 1
        else:
            writer.write(piece)
        done += len(piece.tensors)
    writer.finish()
    on_progress(done, total, "")
    return resumed


def _write_tokenizer(resolved: ResolvedModel, folder: Path) -> None:
    if resolved.folder is not None:
        for pattern in COMPANION_FILES:
            for file in filter(Path.is_file, resolved.folder.glob(pattern)):
                shutil.copyfile(file, folder / file.name)
        return
    tokenizer = load_tokenizer(resolved.tokenizer)
    if tokenizer is not None:
        for name, content in tokenizer_files(tokenizer, resolved.config.vocab_size).items():
            write_whole(folder / name, content)
