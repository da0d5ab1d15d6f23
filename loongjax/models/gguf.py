"""Weights from a GGUF file: its tensors, dequantized one at a time as they are read.

Owns the GGUF names of the weight tree, dequantization by rows (with the `gguf` package,
imported at the first quantized tensor), and the order of the rows of Q and K: files of
architecture `llama` hold them for rotary pairs (2i, 2i+1), loongjax rotates (i, i + D/2).
What the metadata says of the model is in `gguf_config`.

Promises: a slice reads and dequantizes the rows it needs, and of a row the quantization
blocks it needs; peak memory is the answer and about 16 MiB.
Refuses, by name: split files, absent or unexpected tensors, types that `gguf` cannot
dequantize, files cut short.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from loongjax.errors import ModelError
from loongjax.models.config import ModelConfig
from loongjax.models.gguf_config import ROPE_FACTORS, config_from_gguf
from loongjax.models.gguf_file import GgufFile, GgufTensor, read_gguf
from loongjax.models.weights import Index, WeightSpec, iter_specs, weight_specs

_TOP_NAMES = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "lm_head": "output.weight",
}
_LAYER_NAMES = {
    "attn_norm": "attn_norm.weight",
    "q": "attn_q.weight",
    "k": "attn_k.weight",
    "v": "attn_v.weight",
    "o": "attn_output.weight",
    "q_bias": "attn_q.bias",
    "k_bias": "attn_k.bias",
    "v_bias": "attn_v.bias",
    "o_bias": "attn_output.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "gate_bias": "ffn_gate.bias",
    "up_bias": "ffn_up.bias",
    "down_bias": "ffn_down.bias",
}
_PLAIN = {  # ggml type numbers that need no dequantization
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    30: np.dtype(ml_dtypes.bfloat16),
}
_CHUNK_VALUES = 1 << 20
"""Values dequantized at once: 4 MiB of float32, and a few times that while it runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufSource:
    """Reads tensors of one mapped GGUF file by their place in the weight tree.

    Attributes:
      path: The file.
      tensors: Every tensor in it, by its GGUF name.
      data: Its bytes, mapped.
      head_dim: D.
      interleaved: Whether rows of Q and K stand in the order of rotary pairs (2i, 2i+1).
    """

    path: Path
    tensors: Mapping[str, GgufTensor] = field(repr=False)
    data: np.ndarray = field(repr=False)
    head_dim: int
    interleaved: bool

    def read(self, spec: WeightSpec, index: Index) -> np.ndarray:
        """Part of a tensor; quantized ones as float32. See `WeightSource.read`."""
        tensor = self._find(spec)
        rows = index[0]
        permuted = self.interleaved and spec.key in ("q", "k", "q_bias", "k_bias")
        wanted = _paired_rows(rows, self.head_dim) if permuted else rows
        if tensor.type in _PLAIN:
            whole = self._bytes(tensor).view(_PLAIN[tensor.type]).reshape(tensor.shape)
            values: np.ndarray = whole[(wanted, *index[1:])]
            return values
        block, width = _block(tensor.type)
        columns = index[-1]
        first, last = columns.start // block, -(-columns.stop // block)
        quantized = self._bytes(tensor).reshape(math.prod(tensor.shape[:-1]), -1)
        whole_blocks = _dequantize(
            quantized[wanted, first * width : last * width], tensor.type, (last - first) * block
        )
        return whole_blocks[:, columns.start - first * block : columns.stop - first * block]

    def check(self, config: ModelConfig) -> None:
        """Raises ModelError unless the file holds exactly the tensors of `config`."""
        wanted = {ROPE_FACTORS}
        for spec in iter_specs(weight_specs(config)):
            tensor = self._find(spec)
            _check_type(self.path, _gguf_name(spec), tensor)
            end = tensor.offset + _stored_bytes(tensor)
            if end > self.data.size:
                raise ModelError(
                    f"{self.path}: truncated: tensor {_gguf_name(spec)!r} ends at byte "
                    f"{end}, the file has {self.data.size}. Download it again"
                )
            wanted.add(_gguf_name(spec))
        unexpected = sorted(set(self.tensors) - wanted)
        if unexpected:
            raise ModelError(
                f"{self.path}: {len(unexpected)} tensors have no place in a "
                f"{config.family} model of {config.layers} layers, such as {unexpected[0]!r}; "
                "serving without them would give wrong answers"
            )

    def _find(self, spec: WeightSpec) -> GgufTensor:
        name = _gguf_name(spec)
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(
                f"{self.path}: tensor {name!r} is missing; the file lists "
                f"{len(self.tensors)} tensors"
            )
        if tensor.shape != spec.stored_shape:
            raise ModelError(
                f"{self.path}: tensor {name!r} has shape {list(tensor.shape)}, its metadata "
                f"implies {list(spec.stored_shape)}"
            )
        return tensor

    def _bytes(self, tensor: GgufTensor) -> np.ndarray:
        return self.data[tensor.offset : tensor.offset + _stored_bytes(tensor)]


def open_gguf(path: Path) -> tuple[ModelConfig, GgufSource]:
    """Reads a file's header, and checks every tensor's presence, shape, type and extent.

    Raises ModelError, naming the file and the tensor or key at fault.
    """
    file = read_gguf(path)
    data = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    config = config_from_gguf(file, _rope_factors(file, data))
    source = GgufSource(
        path=path,
        tensors=file.tensors,
        data=data,
        head_dim=config.head_dim,
        interleaved=file.metadata["general.architecture"] == "llama",
    )
    source.check(config)
    return config, source


def _gguf_name(spec: WeightSpec) -> str:
    if spec.layer is None:
        return _TOP_NAMES[spec.key]
    return f"blk.{spec.layer}.{_LAYER_NAMES[spec.key]}"


def _paired_rows(rows: slice, head_dim: int) -> np.ndarray:
    """Where the rows `rows`, in the order of pairs (i, i + D/2), stand in the file."""
    row = np.arange(rows.start, rows.stop)
    head, within = np.divmod(row, head_dim)
    half, i = np.divmod(within, head_dim // 2)
    return np.asarray(head * head_dim + 2 * i + half)


def _block(kind: int) -> tuple[int, int]:
    """Values in a quantization block of a type, and its bytes."""
    if kind in _PLAIN:
        return 1, _PLAIN[kind].itemsize
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return values, size


def _stored_bytes(tensor: GgufTensor) -> int:
    block, width = _block(tensor.type)
    return math.prod(tensor.shape) // block * width


def _check_type(path: Path, name: str, tensor: GgufTensor) -> None:
    """Raises ModelError unless the tensor's type can be dequantized, tried on zeros."""
    if tensor.type in _PLAIN:
        return
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    try:
        kind = GGMLQuantizationType(tensor.type)
        block, width = GGML_QUANT_SIZES[kind]
        dequantize(np.zeros((1, width), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        known = {kind.value: kind.name for kind in GGMLQuantizationType}
        raise ModelError(
            f"{path}: tensor {name!r} has type {known.get(tensor.type, tensor.type)}, which the "
            "gguf package cannot dequantize; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and "
            "the K and IQ types are read"
        ) from None
    if tensor.shape[-1] % block or len(tensor.shape) != 2:
        raise ModelError(
            f"{path}: tensor {name!r} of shape {list(tensor.shape)} cannot be {kind.name}, which "
            f"holds matrices in blocks of {block} columns"
        )


def _dequantize(quantized: np.ndarray, kind: int, columns: int) -> np.ndarray:
    """Rows of bytes to rows of float32, some rows at a time."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values = np.empty((len(quantized), columns), np.float32)
    step = max(1, _CHUNK_VALUES // columns)
    for start in range(0, len(quantized), step):
        part = np.ascontiguousarray(quantized[start : start + step])
        values[start : start + step] = dequantize(part, GGMLQuantizationType(kind))
    return values


def _rope_factors(file: GgufFile, data: np.ndarray) -> np.ndarray | None:
    tensor = file.tensors.get(ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.type != 0:
        raise ModelError(f"{file.path}: tensor {ROPE_FACTORS!r} must be F32, not {tensor.type}")
    return data[tensor.offset : tensor.offset + _stored_bytes(tensor)].view(np.float32)
