"""Decoder rows straight from sae_weights.safetensors: its header, then a row by its offset. Loads nothing whole."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.errors import BadFile
from app.settings import Settings

_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    n_rows: int
    n_columns: int
    offset: int


def decoder_row(settings: Settings, sae_hash: str, index: int) -> npt.NDArray[np.float32]:
    """Return W_dec[index], [d_in]. Raises BadFile when the weights are gone or hold no W_dec [d_sae, d_in]."""
    return decoder_rows(settings, sae_hash, [index])[0]


def n_weights(settings: Settings, sae_hash: str) -> int:
    """Return how many numbers an SAE's weights are, from the header alone; 0 when they are gone."""
    path = settings.sae_dir(sae_hash) / "sae_weights.safetensors"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, _MAX_HEADER)))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def decoder_rows(settings: Settings, sae_hash: str, indices: list[int]) -> npt.NDArray[np.float32]:
    """Return some rows of W_dec, [len(indices), d_in]."""
    path = settings.sae_dir(sae_hash) / "sae_weights.safetensors"
    try:
        tensor = _decoder(path)
        with path.open("rb") as file:
            return np.stack([_row(file.fileno(), tensor, index) for index in indices])
    except OSError as error:
        raise BadFile(f"The weights of SAE {sae_hash} cannot be read; add the SAE again.") from error


def cosines(row: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the cosine of a vector [d_in] with each of others [n, d_in]; 0 where one has no length."""
    lengths = np.linalg.norm(others, axis=1) * np.linalg.norm(row)
    return np.where(lengths > 0, others @ row / np.maximum(lengths, 1e-30), 0.0).astype(np.float32)


@lru_cache(maxsize=256)
def _decoder(path: Path) -> _Tensor:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _MAX_HEADER:
            raise BadFile(f"{path.name} has a header of {size} bytes; up to {_MAX_HEADER} are read.")
        header = json.loads(file.read(size))
    found = header.get("W_dec")
    if not found or found["dtype"] not in _BYTES or len(found["shape"]) != 2:
        raise BadFile(f"{path.name} holds no W_dec of shape d_sae x d_in in floating point.")
    rows, columns = found["shape"]
    return _Tensor(found["dtype"], rows, columns, 8 + size + found["data_offsets"][0])


def _row(descriptor: int, tensor: _Tensor, index: int) -> npt.NDArray[np.float32]:
    if not 0 <= index < tensor.n_rows:
        raise BadFile(f"The weights hold {tensor.n_rows} latents; there is no {index}.")
    size = tensor.n_columns * _BYTES[tensor.dtype]
    raw = os.pread(descriptor, size, tensor.offset + index * size)
    match tensor.dtype:
        case "BF16":
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        case "F16":
            return np.frombuffer(raw, "<f2").astype(np.float32)
        case "F64":
            return np.frombuffer(raw, "<f8").astype(np.float32)
        case _:
            return np.frombuffer(raw, "<f4").copy()
