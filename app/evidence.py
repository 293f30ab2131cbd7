"""The evidence of one feature and its compact, versioned blob. numpy only: no database, no torch, no tokens' text.

Every blob begins with b"SAEV" and a version byte; the rest is zlib, little-endian. Version 2, which `pack` writes:
    _HEAD_2  max_act, mean_act, then low, high, mean, deviation, skew and kurtosis of the logit effects, all f32
    u32      bytes of the whole numbers that follow
    ints     LEB128 varints: n_active, n_tokens, n_top, then for each of _INTS its length and its items
    u32      number of fractions that follow
    u16      fractions, all high bytes, then all low bytes: of max_act for activations; of [low, high] for top and
             bottom logits, which come last
    f16      cosines, pearson, neuron_weights, each as long as its list of whole numbers
Positions are stored as differences within an example. An activation is off by less than max_act / 131070, a logit by
less than (high - low) / 131070. Version 1, still read: zlib of
    n_active u64, n_tokens u64, max_act f32, mean_act f32, n_top u8, n_intervals u8, logits_low f32, logits_high f32
    then arrays in the order of _ARRAYS_1, each as length u32 and its items.

Causal effects lie in a blob of their own (`pack_effects`), since not every harvest measures them.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer]
Floats = npt.NDArray[np.floating]

VERSION = 2
N_INTERVALS = 5
_MAGIC = b"SAEV"
_HEAD_1 = struct.Struct("<QQffBBff")
_ARRAYS_1: tuple[tuple[str, str], ...] = (
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
_HEAD_2 = struct.Struct("<8f")
_INTS = (
    "histogram",
    "interval_counts",
    "interval_sizes",
    "contexts",
    "lengths",
    "positions",
    "top_logit_ids",
    "bottom_logit_ids",
    "logits_histogram",
    "neighbours",
    "correlated",
    "neurons",
    "silent",
    "hard_negatives",
)
_HALVES = (("cosines", "neighbours"), ("pearson", "correlated"), ("neuron_weights", "neurons"))
_KEPT = (
    *("histogram", "top_logit_ids", "bottom_logit_ids", "logits_histogram", "neighbours", "correlated", "neurons"),
    *(name for name, _ in _HALVES),
)
"""Columns of a blob that are fields of FeatureEvidence as they are."""
_EFFECTS_MAGIC = b"SAEC"
_EFFECTS_VERSION = 2
_EFFECT_1, _EFFECT = struct.Struct("<ff"), struct.Struct("<ffff")


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
class Silent:
    """A context in which the feature has no activation at all."""

    context: int
    position: int
    """The token to look at: where one might have expected an activation, or the middle of a context drawn at random."""
    neighbour: int | None = None
    """The latent with a similar decoder row that peaks there; None when the token is one the feature peaks on."""


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
    logits_mean: float = math.nan
    """Mean effect on the logits of the vocabulary; NaN, as the next three, where a blob of version 1 did not say."""
    logits_deviation: float = math.nan
    """Standard deviation of the effects, over N."""
    logits_skew: float = math.nan
    """Third standardised moment: above 0 promotes a few tokens strongly, below 0 suppresses a few."""
    logits_kurtosis: float = math.nan
    """Fourth standardised moment, 3 for a normal distribution."""
    silent: tuple[Silent, ...] = ()
    """True non-activating examples: contexts drawn at random from those without an activation."""
    hard_negatives: tuple[Silent, ...] = ()
    """Contexts near the positives without an activation: with a token it peaks on, or where a neighbour peaks."""

    @property
    def density(self) -> float:
        return self.n_active / self.n_tokens if self.n_tokens else 0.0


@dataclass(frozen=True)
class Effect:
    """What a feature does at the peak of one top example, measured by ablating it there.

    Ablating subtracts activation x decoder row from the tensor at the SAE's (output) hook at that one position and
    leaves everything else, the SAE's error included, as it was. With p the model's next-token distribution without and
    q with the ablation, all numbers are of those at the peak, but for the last three, which follow the same ablation
    to the positions behind it.
    """

    context: int
    position: int
    loss_change: float
    """ln p(next) - ln q(next) in nats, next being the token that follows in the corpus: above 0, the feature helped to
    predict it. NaN at the very end of the corpus."""
    kl: float
    """KL(p || q) in nats."""
    up: tuple[tuple[int, float], ...]
    """Tokens the feature votes up: the largest p - q above 0, as (token, p - q), largest first."""
    down: tuple[tuple[int, float], ...]
    """Tokens it votes down: the most negative p - q, most negative first."""
    n_later: int = 0
    """Positions behind the peak, in the same context, over which the effect was followed."""
    later_loss_change: float = math.nan
    """Mean of the loss changes there, over those whose next token is in the corpus; NaN where there is none."""
    later_kl: float = math.nan
    """Mean of the KL divergences there; NaN where the effect was not followed."""


def pack(evidence: FeatureEvidence) -> bytes:
    """Return the blob of version 2."""
    examples = [*evidence.top, *(e for interval in evidence.intervals for e in interval.examples)]
    whole: dict[str, npt.NDArray[Any]] = {
        "interval_counts": np.array([i.count for i in evidence.intervals]),
        "interval_sizes": np.array([len(i.examples) for i in evidence.intervals]),
        "contexts": np.array([e.context for e in examples]),
        "lengths": np.array([len(e.positions) for e in examples]),
        "positions": _joined([np.diff(e.positions.astype(np.int64), prepend=0) for e in examples]),
        "silent": _silent_numbers(evidence.silent),
        "hard_negatives": _silent_numbers(evidence.hard_negatives),
    }
    numbers: list[npt.NDArray[Any]] = [np.array([evidence.n_active, evidence.n_tokens, len(evidence.top)])]
    for name in _INTS:
        items = np.asarray(whole[name] if name in whole else getattr(evidence, name))
        numbers += [np.array([items.size]), items]
    ints = varints(np.concatenate([n.astype(np.uint64) for n in numbers]))
    low, high = (float(np.float32(bound)) for bound in (evidence.logits_low, evidence.logits_high))
    fractions = np.concatenate(
        [
            _fractions(_joined([e.values for e in examples]), 0.0, evidence.max_act),
            _fractions(evidence.top_logits, low, high),
            _fractions(evidence.bottom_logits, low, high),
        ]
    )
    planes = fractions.astype(">u2").view(np.uint8).reshape(-1, 2).T
    head = _HEAD_2.pack(
        evidence.max_act,
        evidence.mean_act,
        low,
        high,
        evidence.logits_mean,
        evidence.logits_deviation,
        evidence.logits_skew,
        evidence.logits_kurtosis,
    )
    halves = [np.asarray(getattr(evidence, name)).astype("<f2").tobytes() for name, _ in _HALVES]
    body = [head, struct.pack("<I", len(ints)), ints, struct.pack("<I", len(fractions)), planes.tobytes(), *halves]
    return _MAGIC + bytes([VERSION]) + zlib.compress(b"".join(body), 9)


def unpack(blob: bytes) -> FeatureEvidence:
    """Read a blob of any known version. Raises ValueError naming the version it cannot read."""
    if blob[:4] != _MAGIC:
        raise ValueError("not an evidence blob")
    match blob[4]:
        case 1:
            return _unpack_1(zlib.decompress(blob[5:]))
        case 2:
            return _unpack_2(zlib.decompress(blob[5:]))
        case version:
            raise ValueError(f"evidence blob of version {version}; this SAE Atlas reads versions 1 to {VERSION}")


def pack_effects(effects: Sequence[Effect]) -> bytes:
    """Return the blob of a feature's causal effects: b"SAEC", version u8, then zlib, little-endian, of

    the number of effects u16, the bytes of the varints u32, of each the loss change and KL at the peak and their means
    behind it (f32), varints (context, position, positions followed, number up, number down, token ids), and p - q of
    all tokens (f16). Version 1, still read, has nothing of what is behind the peak.
    """
    floats = b"".join(_EFFECT.pack(e.loss_change, e.kl, e.later_loss_change, e.later_kl) for e in effects)
    whole = [
        np.array([e.context, e.position, e.n_later, len(e.up), len(e.down), *(token for token, _ in (*e.up, *e.down))])
        for e in effects
    ]
    ints = varints(_joined(whole).astype(np.uint64))
    shares = np.array([share for e in effects for _, share in (*e.up, *e.down)], dtype="<f2")
    body = struct.pack("<HI", len(effects), len(ints)) + floats + ints + shares.tobytes()
    return _EFFECTS_MAGIC + bytes([_EFFECTS_VERSION]) + zlib.compress(body, 9)


def unpack_effects(blob: bytes) -> tuple[Effect, ...]:
    """Read a blob of causal effects. Raises ValueError naming the version it cannot read."""
    if blob[:4] != _EFFECTS_MAGIC:
        raise ValueError("not a blob of causal effects")
    version = blob[4]
    if version not in (1, _EFFECTS_VERSION):
        raise ValueError(f"effects of version {version}; this SAE Atlas reads versions 1 to {_EFFECTS_VERSION}")
    fixed = _EFFECT_1 if version == 1 else _EFFECT
    body = zlib.decompress(blob[5:])
    n, n_bytes = struct.unpack_from("<HI", body)
    start = 6 + n * fixed.size
    numbers = iter(read_varints(body[start : start + n_bytes]).tolist())
    shares = iter(np.frombuffer(body, "<f2", offset=start + n_bytes).tolist())
    found: list[Effect] = []
    for loss_change, kl, *later in fixed.iter_unpack(body[6:start]):
        context, position = next(numbers), next(numbers)
        n_later = next(numbers) if later else 0
        n_up, n_down = next(numbers), next(numbers)
        up, down = (tuple((next(numbers), next(shares)) for _ in range(size)) for size in (n_up, n_down))
        found.append(Effect(context, position, loss_change, kl, up, down, n_later, *later))
    return tuple(found)


def varints(numbers: npt.NDArray[np.uint64]) -> bytes:
    """Encode whole numbers as LEB128: seven bits a byte, lowest first, the top bit set where more follow."""
    lengths = np.ones(len(numbers), dtype=np.int64)
    for bits in range(7, 64, 7):
        lengths += numbers >> np.uint64(bits) > 0
    ends = np.cumsum(lengths)
    place = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    parts = (np.repeat(numbers, lengths) >> (7 * place).astype(np.uint64)) & np.uint64(127)
    return (parts | (place < np.repeat(lengths, lengths) - 1).astype(np.uint64) << np.uint64(7)).astype("u1").tobytes()


def read_varints(content: bytes) -> npt.NDArray[np.int64]:
    """Decode all LEB128 numbers of a buffer."""
    parts = np.frombuffer(content, "u1").astype(np.int64)
    if not len(parts):
        return parts
    last = parts < 128
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    place = np.arange(len(parts)) - np.repeat(starts, np.diff(np.append(starts, len(parts))))
    return np.add.reduceat((parts & 127) << (7 * place), starts)


def _unpack_2(body: bytes) -> FeatureEvidence:
    max_act, mean_act, low, high, mean, deviation, skew, kurtosis = _HEAD_2.unpack_from(body)
    (n_bytes,) = struct.unpack_from("<I", body, _HEAD_2.size)
    offset = _HEAD_2.size + 4
    numbers = read_varints(body[offset : offset + n_bytes])
    offset += n_bytes
    n_active, n_tokens, n_top = numbers[:3].tolist()
    columns: dict[str, npt.NDArray[Any]] = {}
    at = 3
    for name in _INTS:
        size = int(numbers[at])
        columns[name] = numbers[at + 1 : at + 1 + size]
        at += 1 + size
    (n_fractions,) = struct.unpack_from("<I", body, offset)
    planes = np.frombuffer(body, "u1", 2 * n_fractions, offset + 4).reshape(2, -1).astype(np.uint16)
    fractions = (planes[0] << 8 | planes[1]).astype(np.float64) / 65535
    offset += 4 + 2 * n_fractions
    for name, like in _HALVES:
        columns[name] = np.frombuffer(body, "<f2", len(columns[like]), offset)
        offset += 2 * len(columns[like])
    n_values = int(columns["lengths"].sum())
    values = (fractions[:n_values] * max_act).astype(np.float32)
    n_promoted = len(columns["top_logit_ids"])
    logits = (low + fractions[n_values:] * (high - low)).astype(np.float32)
    deltas, lengths = columns["positions"], columns["lengths"]
    ends = np.cumsum(lengths)
    totals = np.cumsum(deltas)
    before = np.concatenate([[0], totals])[ends - lengths] if len(ends) else ends
    columns["positions"] = totals - np.repeat(before, lengths)
    top, intervals = _grouped(columns, values, n_top, max_act)
    kept: dict[str, Any] = {name: columns[name] for name in _KEPT}
    return FeatureEvidence(
        n_active=n_active,
        n_tokens=n_tokens,
        max_act=max_act,
        mean_act=mean_act,
        top=top,
        intervals=intervals,
        top_logits=logits[:n_promoted],
        bottom_logits=logits[n_promoted:],
        logits_low=low,
        logits_high=high,
        logits_mean=mean,
        logits_deviation=deviation,
        logits_skew=skew,
        logits_kurtosis=kurtosis,
        silent=_silent(columns["silent"]),
        hard_negatives=_silent(columns["hard_negatives"]),
        **kept,
    )


def _unpack_1(body: bytes) -> FeatureEvidence:
    n_active, n_tokens, max_act, mean_act, n_top, _, low, high = _HEAD_1.unpack_from(body)
    offset = _HEAD_1.size
    columns: dict[str, npt.NDArray[Any]] = {}
    for name, dtype in _ARRAYS_1:
        (size,) = struct.unpack_from("<I", body, offset)
        columns[name] = np.frombuffer(body, dtype, size, offset + 4)
        offset += 4 + size * np.dtype(dtype).itemsize
    values = columns.pop("values").astype(np.float32) * np.float32(max_act / 65535)
    top, intervals = _grouped(columns, values, n_top, max_act)
    kept: dict[str, Any] = {k: v for k, v in columns.items() if k in FeatureEvidence.__dataclass_fields__}
    return FeatureEvidence(
        n_active=n_active,
        n_tokens=n_tokens,
        max_act=max_act,
        mean_act=mean_act,
        top=top,
        intervals=intervals,
        logits_low=low,
        logits_high=high,
        **kept,
    )


def _grouped(
    columns: dict[str, npt.NDArray[Any]], values: Floats, n_top: int, max_act: float
) -> tuple[tuple[Example, ...], tuple[Interval, ...]]:
    """Cut the examples into the top ones and those of each interval."""
    ends = np.cumsum(columns["lengths"].astype(np.int64)).tolist()
    starts = [0, *ends][: len(ends)]
    positions = columns["positions"]
    examples = [
        Example(context, positions[start:end], values[start:end])
        for context, start, end in zip(columns["contexts"].tolist(), starts, ends, strict=True)
    ]
    sizes = [n_top, *columns["interval_sizes"].tolist()]
    last = np.cumsum(sizes).tolist()
    groups = [tuple(examples[end - size : end]) for size, end in zip(sizes, last, strict=True)]
    counts = columns["interval_counts"].tolist()
    bounds = np.linspace(max_act, 0.0, len(counts) + 1).tolist()
    intervals = tuple(Interval(bounds[i + 1], bounds[i], counts[i], groups[i + 1]) for i in range(len(counts)))
    return groups[0], intervals


def _silent_numbers(examples: Sequence[Silent]) -> npt.NDArray[Any]:
    """Context, position and neighbour + 1 (0 for none) of each, one after the other."""
    return np.array(
        [n for e in examples for n in (e.context, e.position, 0 if e.neighbour is None else e.neighbour + 1)]
    )


def _silent(numbers: Ints) -> tuple[Silent, ...]:
    return tuple(
        Silent(context, position, neighbour - 1 if neighbour else None)
        for context, position, neighbour in numbers.reshape(-1, 3).tolist()
    )


def _fractions(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint16]:
    """Values as 65535ths of [low, high]."""
    if not high > low:
        return np.zeros(np.size(values), dtype=np.uint16)
    scaled = (np.asarray(values, dtype=np.float64) - low) / (float(high) - low) * 65535
    return np.rint(np.clip(scaled, 0, 65535)).astype(np.uint16)


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros(0)
