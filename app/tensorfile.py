"""Safetensors files without torch, trusting nothing in them: a header is judged before a tensor is read.

Every refusal is a BadFile that names the file and what is wrong, with both numbers. Knows nothing of SAEs.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt

from app.errors import BadFile

MAX_HEADER_BYTES = 2**20
"""An SAE has a handful of tensors; their header takes less than 1 kB."""
CHUNK_BYTES = 2**23
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an item of each type that an SAE's parameters come in."""
INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

Arrays = dict[str, npt.NDArray[np.float32]]
_Json = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One tensor as the header tells of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def load(path: Path, max_bytes: int) -> Arrays:
    """Return all tensors in float32; integers (counters of a trainer) are left out. Raises BadFile."""
    size = path.stat().st_size
    if size > max_bytes:
        raise BadFile(f"{path.name} takes {size:,} bytes; {max_bytes:,} are allowed.")
    entries, start = read_header(path, size, FLOATS | INTEGERS)
    return {entry.name: _floats(path, start, entry) for entry in entries if entry.dtype in FLOATS}


def write(path: Path, arrays: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Write float32 tensors as safetensors, one at a time."""
    header: _Json = {}
    position = 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [position, position + array.size * 4]}
        position += array.size * 4
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)  # so that the data is aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array, "<f4").data)


def to_float32(raw: bytes | memoryview, dtype: str) -> npt.NDArray[np.float32]:
    """Decode the bytes of a tensor, [n]. numpy has no bfloat16: it is the upper half of a float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32)


def _floats(path: Path, start: int, entry: Entry) -> npt.NDArray[np.float32]:
    parts = [to_float32(chunk, entry.dtype) for chunk in chunks(path, start + entry.begin, entry.end - entry.begin)]
    return np.concatenate([np.zeros(0, np.float32), *parts]).reshape(entry.shape)


def read_header(path: Path, size: int, types: Mapping[str, int] = FLOATS) -> tuple[list[Entry], int]:
    """Parse a header; return its tensors in file order and where their bytes begin. Raises BadFile."""
    what = path.name
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise BadFile(f"{what} ends after {size} bytes; a header's length alone takes 8.")
        if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
            raise BadFile(f"{what} is a renamed pickle, which could run code when read. Save it as safetensors.")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            raise BadFile(f"{what}: the header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read.")
        if 8 + length > size:
            raise BadFile(f"{what} is cut off: the header claims {length:,} bytes, {size - 8:,} follow.")
        raw = file.read(length)
    entries = json_object(raw, f"{what}: the header")
    tensors = [_entry(what, name, entry, types) for name, entry in entries.items() if name != "__metadata__"]
    tensors.sort(key=lambda t: (t.begin, t.end))
    _check_layout(what, tensors, size - 8 - length)
    return tensors, 8 + length


def json_object(raw: str | bytes, what: str) -> _Json:
    """Parse JSON that must hold an object, no key twice, no NaN, no endless nesting. Raises BadFile about `what`."""

    def unique(pairs: list[tuple[str, Any]]) -> _Json:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise BadFile(f"{what} names {twice[:80]!r} twice.")
        return found

    try:
        found = json.loads(raw, object_pairs_hook=unique, parse_constant=_no_constant)
    except RecursionError:
        raise BadFile(f"{what} is nested too deeply; 3 levels are usual.") from None
    except ValueError as error:
        raise BadFile(f"{what} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise BadFile(f"{what} holds a {type(found).__name__}; it must hold an object.")
    return cast(_Json, found)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _entry(what: str, name: str, entry: Any, types: Mapping[str, int]) -> Entry:
    fields = cast(_Json, entry) if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _naturals(shape) and _naturals(offsets) and len(cast(list[int], offsets)) == 2):
        raise BadFile(f"{what}: the header's entry {name[:80]!r} lacks a dtype, a shape or two data_offsets.")
    if dtype not in types:
        raise BadFile(f"{what}: {name[:80]!r} is of type {dtype[:20]}; an SAE has {', '.join(FLOATS)}.")
    sizes, (begin, end) = tuple(cast(list[int], shape)), cast(list[int], offsets)
    expected = math.prod(sizes) * types[dtype]
    if end - begin != expected:
        raise BadFile(
            f"{what}: {name[:80]!r} of shape {list(sizes)} takes {expected:,} bytes; its offsets span {end - begin:,}."
        )
    return Entry(name, dtype, sizes, begin, end)


def _naturals(value: Any) -> bool:
    if not isinstance(value, list) or len(cast(list[Any], value)) > 4:
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in cast(list[Any], value))


def _check_layout(what: str, tensors: list[Entry], data_bytes: int) -> None:
    """Tensors must fill the data exactly: no overlap, no gap, nothing missing, nothing behind."""
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            how = "overlaps the tensor before it" if tensor.begin < position else "leaves a gap before it"
            raise BadFile(f"{what}: {tensor.name[:80]!r} {how}: it begins at {tensor.begin:,}, not {position:,}.")
        position = tensor.end
    if position > data_bytes:
        raise BadFile(f"{what} is cut off: its tensors take {position:,} bytes, {data_bytes:,} are there.")
    if position < data_bytes:
        raise BadFile(f"{what}: {data_bytes - position:,} bytes follow the last tensor, which ends at {position:,}.")


def chunks(path: Path, start: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while length > 0:
            chunk = file.read(min(CHUNK_BYTES, length))
            if not chunk:
                raise BadFile(f"{path.name} became shorter while it was read; {length:,} bytes are missing.")
            length -= len(chunk)
            yield chunk


def first_not_finite(chunk: bytes, dtype: str) -> int | None:
    if dtype == "BF16":
        # numpy has no bfloat16: not finite is an exponent of all ones.
        bad: npt.NDArray[np.bool_] = (np.frombuffer(chunk, "<u2") & 0x7F80) == 0x7F80
    else:
        bad = ~np.isfinite(np.frombuffer(chunk, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]))
    return int(bad.argmax()) if bad.any() else None
