"""Where a model's tokenizer lies: the reference that `load_tokenizer` takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFiles:
    """A tokenizer that has not been read yet.

    Attributes:
      kind: `hf`: a folder with tokenizer files; `gguf`: a file with the vocabulary in its
        metadata; `bytes`: a token for each byte, which needs no file.
      path: The folder or the file; None for `bytes`.
    """

    kind: Literal["hf", "gguf", "bytes"]
    path: Path | None = None
