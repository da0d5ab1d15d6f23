"""The one way to a tokenizer: from the files that a model names."""

from __future__ import annotations

from pathlib import Path

from loongjax.errors import ModelError
from loongjax.models.tokenizer_files import TokenizerFiles
from loongjax.text.byte_vocabulary import byte_tokenizer
from loongjax.text.gguf_tokenizer import load_gguf_tokenizer
from loongjax.text.hf_folder import load_hf_tokenizer
from loongjax.text.tokenizer import Tokenizer


def load_tokenizer(files: TokenizerFiles | None) -> Tokenizer | None:
    """Reads a tokenizer; None, for a model without one, gives None.

    Raises:
      ModelError: The files are missing, broken, or of a kind that loongjax does not know.
    """
    if files is None:
        return None
    if files.kind == "bytes":
        return byte_tokenizer()
    path = _required_path(files)
    return load_gguf_tokenizer(path) if files.kind == "gguf" else load_hf_tokenizer(path)


def _required_path(files: TokenizerFiles) -> Path:
    if files.path is None:
        what = "file" if files.kind == "gguf" else "folder"
        raise ModelError(f"a tokenizer of kind {files.kind!r} needs the path of its {what}")
    return files.path
