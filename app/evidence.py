"""The evidence of one feature and its compact, versioned blob. numpy only: no database, no torch, no tokens' text.

Blob layout, version 1, little-endian: b"SAEV", version u8, then zlib of
    n_active u64, n_tokens u64, max_act f32, mean_act f32, n_top u8, n_intervals u8, logits_low f32, logits_high f32
    then arrays in the order of _ARRAYS, each as length u32 and its items.
Activations are stored as u16 fractions of max_act (an error below max_act / 131070).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]

VERSION = 1
N_INTERVALS = 5
_MAGIC = b"SAEV"
_HEAD = struct.Struct("<QQffBBff")
_ARRAYS: tuple[tuple[str, str], ...] = (
    ("histogram", "<u4"),
    ("interval_counts", "<u4"),
    ("interval_sizes", "<u1"),
    ("contexts", "<u4"),
    ("lengths", "<u2"),
    ("positions", "<u2"),
    ("values", "<u2"),
    ("top_logit_ids", "<u4"),
    ("top_logits", "<f4"),
    ("bottom_logit_ids", "<u4"),
    ("bottom_logits", "<f4"),
    ("logits_histogram", "<u4"),
    ("neighbours", "<u4"),
    ("cosines", "<f2"),
    ("correlated", "<u4"),
    ("pearson", "<f2"),
    ("neurons", "<u4"),
    ("neuron_weights", "<f2"),
)


@dataclass(frozen=True)
class Example:
    """A context of the corpus with every activation of the feature in it."""

    context: int
    """Number of the context in the harvest's token stream."""
    positions: Ints
    """[n] positions with a non-zero activation, ascending; 0 is the BOS token where the model has one."""
    values: Floats
    """[n] their activations."""

    @property
    def peak(self) -> int:
        return int(self.positions[int(np.argmax(self.values))])

    @property
    def max(self) -> float:
        return float(np.max(self.values))


@dataclass(frozen=True)
class Interval:
    """A band (low, high] of activation values: its share of the active tokens and a sample of examples."""

    low: float
    high: float
    count: int
    """Active tokens whose activation lies in the band."""
    examples: tuple[Example, ...]


def _empty(dtype: str) -> Ints:
    return np.zeros(0, dtype=dtype)


@dataclass(frozen=True)
class FeatureEvidence:
    """What a harvest learnt of one feature. All arrays may be empty: a dead feature has no examples."""

    n_active: int
    """Tokens with a non-zero activation."""
    n_tokens: int
    """Tokens seen."""
    max_act: float
    mean_act: float
    """Mean over active tokens."""
    histogram: Ints
    """[bins] counts of active tokens in equal bins over (0, max_act]."""
    top: tuple[Example, ...]
    """Highest first, at most one per context."""
    intervals: tuple[Interval, ...]
    """Highest band first."""
    top_logit_ids: Ints
    """[10] tokens promoted most, through W_dec, the final norm's weight and the unembedding."""
    top_logits: Floats
    bottom_logit_ids: Ints
    bottom_logits: Floats
    logits_low: float
    logits_high: float
    logits_histogram: Ints
    """[bins] counts of vocabulary tokens in equal bins over [logits_low, logits_high]."""
    neighbours: Ints
    """Latents nearest by cosine of decoder rows."""
    cosines: Floats
    correlated: Ints
    """Latents whose activations correlate most over the corpus."""
    pearson: Floats
    neurons: Ints = field(default_factory=lambda: _empty("<u4"))
    """Basis directions with the largest decoder weights."""
    neuron_weights: Floats = field(default_factory=lambda: np.zeros(0, dtype="<f2"))

    @property
    def density(self) -> float:
        return self.n_active / self.n_tokens if self.n_tokens else 0.0


def pack(evidence: FeatureEvidence) -> bytes:
    """Return the blob of version 1."""
    examples = [*evidence.top, *(e for interval in evidence.intervals for e in interval.examples)]
    scale = 65535 / evidence.max_act if evidence.max_act > 0 else 0.0
    columns: dict[str, npt.NDArray[Any]] = {
        "histogram": evidence.histogram,
        "interval_counts": np.array([i.count for i in evidence.intervals]),
        "interval_sizes": np.array([len(i.examples) for i in evidence.intervals]),
        "contexts": np.array([e.context for e in examples]),
        "lengths": np.array([len(e.positions) for e in examples]),
        "positions": _joined([e.positions for e in examples]),
        "values": np.rint(_joined([e.values for e in examples]).astype(np.float64) * scale),
        **{
            name: getattr(evidence, name)
            for name, _ in _ARRAYS
            if name in FeatureEvidence.__dataclass_fields__ and name != "histogram"
        },
    }
    head = _HEAD.pack(
        evidence.n_active,
        evidence.n_tokens,
        evidence.max_act,
        evidence.mean_act,
        len(evidence.top),
        len(evidence.intervals),
        evidence.logits_low,
        evidence.logits_high,
    )
    parts = [head]
    for name, dtype in _ARRAYS:
        array = columns[name].astype(dtype)
        parts += [struct.pack("<I", array.size), array.tobytes()]
    return _MAGIC + bytes([VERSION]) + zlib.compress(b"".join(parts), 9)


def unpack(blob: bytes) -> FeatureEvidence:
    """Read a blob of any known version. Raises ValueError naming the version it cannot read."""
    if blob[:4] != _MAGIC:
        raise ValueError("not an evidence blob")
    if blob[4] != VERSION:
        raise ValueError(f"evidence blob of version {blob[4]}; this SAE Atlas reads version {VERSION}")
    body = zlib.decompress(blob[5:])
    n_active, n_tokens, max_act, mean_act, n_top, n_intervals, low, high = _HEAD.unpack_from(body)
    offset = _HEAD.size
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in _ARRAYS:
        (size,) = struct.unpack_from("<I", body, offset)
        columns[name] = np.frombuffer(body, dtype, size, offset + 4)
        offset += 4 + size * np.dtype(dtype).itemsize
    examples = _examples(columns, max_act)
    sizes = [n_top, *columns["interval_sizes"].tolist()]
    ends = np.cumsum(sizes).tolist()
    groups = [tuple(examples[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    bounds = np.linspace(max_act, 0.0, n_intervals + 1).tolist()
    intervals = tuple(
        Interval(bounds[i + 1], bounds[i], int(columns["interval_counts"][i]), groups[i + 1])
        for i in range(n_intervals)
    )
    kept = {k: v for k, v in columns.items() if k in FeatureEvidence.__dataclass_fields__}
    return FeatureEvidence(
        n_active=n_active,
        n_tokens=n_tokens,
        max_act=max_act,
        mean_act=mean_act,
        top=groups[0],
        intervals=intervals,
        logits_low=low,
        logits_high=high,
        **kept,
    )


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _examples(columns: dict[str, npt.NDArray[Any]], max_act: float) -> list[Example]:
    ends = np.cumsum(columns["lengths"].astype(np.int64)).tolist()
    values = columns["values"].astype(np.float32) * np.float32(max_act / 65535)
    starts = [0, *ends][: len(ends)]
    return [
        Example(int(context), columns["positions"][start:end], values[start:end])
        for context, start, end in zip(columns["contexts"], starts, ends, strict=True)
    ]
