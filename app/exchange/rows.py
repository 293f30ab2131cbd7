"""One feature and its examples as rows under the column names of Neuronpedia and sae_dashboard, in both directions.

Foreign rows are judged here: shapes, sizes and numbers. What the formats lack is derived where it can be (tokens seen
from density and histogram) and empty where it cannot. Ours carry more, under names of their own: n_active, n_tokens,
mean_act; a way through them and back is exact. No files, no database.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from app.errors import BadFile
from app.evidence import N_INTERVALS, Effect, Example, FeatureEvidence, Interval

MAX_TOKENS = 4_096
MAX_EXAMPLES = 200
MAX_INDEX = 2**24
_LOGIT_MOMENTS = ("logits_mean", "logits_deviation", "logits_skew", "logits_kurtosis")


def _listed(value: Any) -> Any:
    return [] if value is None else value


def _number(value: Any) -> Any:
    """NaN and null are written where a correlation of a silent feature was divided by zero."""
    return 0.0 if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def _clean(value: Any) -> Any:
    return value.replace("\0", "").encode("utf-8", "replace").decode() if isinstance(value, str) else value


_MOST = 1e30
Number = Annotated[float, BeforeValidator(_number), Field(ge=-_MOST, le=_MOST)]
Token = Annotated[str, BeforeValidator(_clean), Field(max_length=1_000)]
Numbers = Annotated[list[Number], BeforeValidator(_listed), Field(max_length=1_000)]
Places = Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], BeforeValidator(_listed), Field(max_length=1_000)]
Tokens = Annotated[list[Token], BeforeValidator(_listed), Field(max_length=1_000)]


class Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, allow_inf_nan=False)


Share = tuple[Token, Number]


class EffectRow(Row):
    """What a feature does at one position: a field of our own."""

    position: Annotated[int, Field(ge=0, lt=MAX_TOKENS)]
    loss_change: Annotated[float | None, Field(ge=-_MOST, le=_MOST)] = None
    kl: Number = 0.0
    up: Annotated[list[Share], Field(max_length=100)] = Field(default_factory=list[Share])
    down: Annotated[list[Share], Field(max_length=100)] = Field(default_factory=list[Share])


class SilentRow(Row):
    """A context without an activation: a field of our own."""

    tokens: Annotated[list[Token], Field(min_length=1, max_length=MAX_TOKENS)]
    position: Annotated[int, Field(ge=0, lt=MAX_TOKENS)]
    neighbour: Annotated[int | None, Field(ge=0, lt=MAX_INDEX)] = None
    title: Annotated[str | None, Field(max_length=1_000)] = None


class ActivationRow(Row):
    """One example: a text's tokens with the feature's activation on each."""

    tokens: Annotated[list[Token], Field(min_length=1, max_length=MAX_TOKENS)]
    values: Annotated[list[Number], Field(max_length=MAX_TOKENS)]
    bin_min: Annotated[float | None, Field(alias="binMin", ge=-_MOST, le=_MOST)] = None
    bin_max: Annotated[float | None, Field(alias="binMax", ge=-_MOST, le=_MOST)] = None
    bin_contains: Annotated[float | None, Field(alias="binContains")] = None
    title: Annotated[str | None, Field(alias="dataTitle", max_length=1_000)] = None
    effect: EffectRow | None = None

    @property
    def is_top(self) -> bool:
        """The top group is marked by -1; rows without bounds are just examples, which makes them candidates too."""
        return self.bin_min is None or (self.bin_min == -1 and self.bin_contains in (-1, None))


class FeatureRow(Row):
    """One feature's statistics. sae_dashboard and Neuronpedia agree on all names but the index's."""

    index: Annotated[int, Field(ge=0, lt=MAX_INDEX)]
    max_act: Annotated[Number | None, Field(alias="maxActApprox")] = None
    frac_nonzero: Number = 0.0
    n_active: int | None = Field(None, ge=0, lt=2**63)
    n_tokens: int | None = Field(None, ge=0, lt=2**63)
    mean_act: Number | None = None
    freq_hist_data_bar_heights: Numbers = Field(default_factory=list[float])
    freq_hist_data_bar_values: Numbers = Field(default_factory=list[float])
    logits_hist_data_bar_heights: Numbers = Field(default_factory=list[float])
    logits_hist_data_bar_values: Numbers = Field(default_factory=list[float])
    pos_str: Tokens = Field(default_factory=list[str])
    pos_values: Numbers = Field(default_factory=list[float])
    neg_str: Tokens = Field(default_factory=list[str])
    neg_values: Numbers = Field(default_factory=list[float])
    topkCosSimIndices: Places = Field(default_factory=list[int])
    topkCosSimValues: Numbers = Field(default_factory=list[float])
    correlated_features_indices: Places = Field(default_factory=list[int])
    correlated_features_pearson: Numbers = Field(default_factory=list[float])
    neuron_alignment_indices: Places = Field(default_factory=list[int])
    neuron_alignment_values: Numbers = Field(default_factory=list[float])
    interval_counts: list[int] | None = Field(None, max_length=255)
    logits_low: Number | None = None
    logits_high: Number | None = None
    logits_mean: Number | None = None
    logits_deviation: Number | None = None
    logits_skew: Number | None = None
    logits_kurtosis: Number | None = None
    silent: list[SilentRow] = Field(default_factory=list[SilentRow], max_length=100)
    hard_negatives: list[SilentRow] = Field(default_factory=list[SilentRow], max_length=100)

    @property
    def counts_are_derived(self) -> bool:
        """The number of active tokens is not said; it follows from density and histogram, more or less."""
        return self.n_active is None or not self.n_tokens


class ExplanationRow(Row):
    index: Annotated[int, Field(ge=0, lt=MAX_INDEX)]
    description: Annotated[str, BeforeValidator(_clean), Field(min_length=1, max_length=100_000)]
    explanationModelName: Annotated[str | None, BeforeValidator(_clean)] = None
    typeName: Annotated[str | None, BeforeValidator(_clean)] = None
    authorName: Annotated[str | None, BeforeValidator(_clean)] = None


@dataclass(frozen=True)
class Sparse:
    """An example as it waits: where it is not zero, and the number of its context."""

    is_top: bool
    middle: float
    """Middle of its band of activation; the peak itself where there is no band."""
    positions: list[int]
    values: list[float]
    context: int = 0


def judged(kind: type[Any], row: Any, place: str) -> Any:
    """Validate a foreign row. Raises BadFile naming the place and the field."""
    try:
        return kind.model_validate(row)
    except (ValidationError, RecursionError) as error:
        if isinstance(error, RecursionError):
            raise BadFile(f"{place} is nested too deeply.") from None
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the row"
        raise BadFile(f"{place}: {where}: {first['msg']}; it is {str(first['input'])[:60]!r}.") from None


def sparse(row: ActivationRow, place: str) -> Sparse | None:
    """Return what is active in an example; None when nothing is. Raises BadFile when lengths differ."""
    if len(row.tokens) != len(row.values):
        raise BadFile(f"{place}: {len(row.tokens)} tokens, but {len(row.values)} values.")
    positions = [i for i, value in enumerate(row.values) if value > 0]
    if not positions:
        return None
    values = [row.values[i] for i in positions]
    bounds = (row.bin_min, row.bin_max)
    middle = max(values) if row.is_top or None in bounds else (bounds[0] + bounds[1]) / 2  # type: ignore[operator]
    return Sparse(row.is_top, float(middle), positions, values)


def evidence_of(
    row: FeatureRow, found: Sequence[Sparse], token_id: Callable[[str], int], d_sae: int, tokens_seen: int = 0
) -> FeatureEvidence:
    """Make evidence of a feature's row and its examples. `tokens_seen` is the run's, where it is known."""
    peak = max([row.max_act or 0.0, *(max(e.values) for e in found)], default=0.0)
    n_active, n_tokens = _counts(row, tokens_seen)
    low, high = _logit_ends(row)
    neighbours = [pair for pair in zip(row.topkCosSimIndices, row.topkCosSimValues, strict=False) if pair[0] < d_sae]
    correlated = [
        pair
        for pair in zip(row.correlated_features_indices, row.correlated_features_pearson, strict=False)
        if pair[0] < d_sae
    ]
    neurons = list(zip(row.neuron_alignment_indices, row.neuron_alignment_values, strict=False))
    positive = list(zip(row.pos_str, row.pos_values, strict=False))
    negative = list(zip(row.neg_str, row.neg_values, strict=False))
    return FeatureEvidence(
        n_active=n_active,
        n_tokens=n_tokens,
        max_act=peak,
        mean_act=row.mean_act if row.mean_act is not None else _mean(row),
        histogram=_histogram(row, peak),
        top=tuple(sorted((_example(e) for e in found if e.is_top), key=lambda e: -e.max)),
        intervals=_intervals([e for e in found if not e.is_top], peak, row),
        top_logit_ids=_ints(token_id(token) for token, _ in positive),
        top_logits=_floats(value for _, value in positive),
        bottom_logit_ids=_ints(token_id(token) for token, _ in negative),
        bottom_logits=_floats(value for _, value in negative),
        logits_low=low,
        logits_high=high,
        logits_histogram=_ints(_count(h) for h in row.logits_hist_data_bar_heights),
        neighbours=_ints(index for index, _ in neighbours),
        cosines=_floats(value for _, value in neighbours),
        correlated=_ints(index for index, _ in correlated),
        pearson=_floats(value for _, value in correlated),
        neurons=_ints(index for index, _ in neurons),
        neuron_weights=_floats(value for _, value in neurons),
        **_moments(row),
    )


def feature_row(evidence: FeatureEvidence, index: int, string: Callable[[int], str]) -> dict[str, Any]:
    """Return a feature's statistics under the common names, with ours beside them."""
    n_bins, n_logit_bins = len(evidence.histogram), len(evidence.logits_histogram)
    return {
        "index": str(index),
        "maxActApprox": evidence.max_act,
        "frac_nonzero": evidence.density,
        "n_active": evidence.n_active,
        "n_tokens": evidence.n_tokens,
        "mean_act": evidence.mean_act,
        "freq_hist_data_bar_heights": evidence.histogram.tolist(),
        "freq_hist_data_bar_values": centres(0.0, evidence.max_act, n_bins),
        "logits_hist_data_bar_heights": evidence.logits_histogram.tolist(),
        "logits_hist_data_bar_values": centres(evidence.logits_low, evidence.logits_high, n_logit_bins),
        "pos_str": [string(int(token)) for token in evidence.top_logit_ids],
        "pos_values": evidence.top_logits.tolist(),
        "neg_str": [string(int(token)) for token in evidence.bottom_logit_ids],
        "neg_values": evidence.bottom_logits.tolist(),
        "topkCosSimIndices": evidence.neighbours.tolist(),
        "topkCosSimValues": evidence.cosines.tolist(),
        "correlated_features_indices": evidence.correlated.tolist(),
        "correlated_features_pearson": evidence.pearson.tolist(),
        "correlated_features_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_pearson": [],
        "correlated_neurons_l1": [],
        "neuron_alignment_indices": evidence.neurons.tolist(),
        "neuron_alignment_values": evidence.neuron_weights.tolist(),
        "neuron_alignment_l1": [],
        "interval_counts": [interval.count for interval in evidence.intervals],
        "logits_low": evidence.logits_low,
        "logits_high": evidence.logits_high,
        **{name: _known(getattr(evidence, name)) for name in _LOGIT_MOMENTS},
    }


def effect_row(effect: Effect, skipped: int, string: Callable[[int], str]) -> dict[str, Any]:
    """Return a causal effect with its tokens as strings, positions counted behind the skipped ones."""
    return {
        "position": max(effect.position - skipped, 0),
        "loss_change": _known(effect.loss_change),
        "kl": effect.kl,
        "up": [[string(token), share] for token, share in effect.up],
        "down": [[string(token), share] for token, share in effect.down],
    }


def effect_of(row: EffectRow, context: int, token_id: Callable[[str], int]) -> Effect:
    loss_change = math.nan if row.loss_change is None else row.loss_change
    up, down = (tuple((token_id(token), share) for token, share in side) for side in (row.up, row.down))
    return Effect(context, row.position, loss_change, row.kl, up, down)


def _moments(row: FeatureRow) -> dict[str, Any]:
    return {name: math.nan if getattr(row, name) is None else getattr(row, name) for name in _LOGIT_MOMENTS}


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def examples_of(evidence: FeatureEvidence) -> Iterable[tuple[Example, tuple[float, float, float]]]:
    """Yield every example with its (bin_min, bin_max, bin_contains); the top group's are (-1, max, -1)."""
    for example in evidence.top:
        yield example, (-1.0, evidence.max_act, -1.0)
    for band in evidence.intervals:
        for example in band.examples:
            yield example, (band.low, band.high, band.count / max(evidence.n_active, 1))


def dense(example: Example, n: int, skipped: int) -> list[float]:
    """Return an example's activation on each of its n tokens behind the skipped first ones."""
    values = np.zeros(n + skipped)
    values[example.positions.astype(np.int64)] = example.values.astype(np.float64)
    return values[skipped:].tolist()


def centres(low: float, high: float, n: int) -> list[float]:
    return (low + (np.arange(n) + 0.5) * (high - low) / max(n, 1)).tolist()


def _counts(row: FeatureRow, tokens_seen: int) -> tuple[int, int]:
    if not row.counts_are_derived and row.n_active is not None and row.n_tokens:
        return min(row.n_active, row.n_tokens), row.n_tokens
    # Every active token is in the histogram, so its heights count them; density then says how many tokens were seen.
    n_active = round(sum(max(h, 0.0) for h in row.freq_hist_data_bar_heights))
    share = min(max(row.frac_nonzero, 0.0), 1.0)
    if tokens_seen:
        return min(n_active or round(share * tokens_seen), tokens_seen), tokens_seen
    if n_active and share:
        return n_active, max(round(n_active / share), n_active)
    exact = Fraction(share).limit_denominator(1_000_000)
    return exact.numerator, exact.denominator if exact.numerator else 0


def _mean(row: FeatureRow) -> float:
    heights, values = row.freq_hist_data_bar_heights, row.freq_hist_data_bar_values
    total = sum(heights)
    return sum(h * v for h, v in zip(heights, values, strict=False)) / total if total > 0 else 0.0


def _histogram(row: FeatureRow, peak: float) -> Any:
    """Counts in equal bins over (0, peak]; foreign bins begin at the lowest activation and go where their middle is."""
    heights, values = row.freq_hist_data_bar_heights, row.freq_hist_data_bar_values
    n = min(len(heights), len(values))
    bins = np.zeros(n, dtype=np.int64)
    for height, value in zip(heights, values, strict=False):
        bins[min(int(_share(value, peak) * n), n - 1)] += _count(height)
    return bins


def _share(value: float, peak: float) -> float:
    return min(max(value / peak, 0.0), 1.0) if peak > 0 else 0.0


def _count(height: float) -> int:
    return min(max(round(height), 0), 2**32 - 1)


def _intervals(found: list[Sparse], peak: float, row: FeatureRow) -> tuple[Interval, ...]:
    """Sort examples into our bands of equal width over [0, peak], highest first."""
    bounds = np.linspace(peak, 0.0, N_INTERVALS + 1).tolist()
    groups: list[list[Example]] = [[] for _ in range(N_INTERVALS)]
    for example in found:
        groups[_band(example.middle, peak)].append(_example(example))
    counts = row.interval_counts if len(row.interval_counts or ()) == N_INTERVALS else None
    if counts is None:
        bars = zip(row.freq_hist_data_bar_values, row.freq_hist_data_bar_heights, strict=False)
        counts = [0] * N_INTERVALS
        for value, height in bars:
            counts[_band(value, peak)] += _count(height)
    return tuple(Interval(bounds[i + 1], bounds[i], _count(counts[i]), tuple(groups[i])) for i in range(N_INTERVALS))


def _band(value: float, peak: float) -> int:
    return min(int((1 - _share(value, peak)) * N_INTERVALS), N_INTERVALS - 1)


def _logit_ends(row: FeatureRow) -> tuple[float, float]:
    """The range of logit effects: said, or the outer edges of the histogram's equal bins; no listed logit lies out."""
    middles = row.logits_hist_data_bar_values
    half = (middles[-1] - middles[0]) / max(len(middles) - 1, 1) / 2 if middles else 0.0
    edges = [middles[0] - half, middles[-1] + half] if middles else []
    if row.logits_low is not None and row.logits_high is not None:
        edges = [row.logits_low, row.logits_high]
    edges += [*row.pos_values, *row.neg_values]
    return min(edges, default=0.0), max(edges, default=0.0)


def _example(found: Sparse) -> Example:
    return Example(found.context, np.array(found.positions), np.array(found.values))


def _ints(values: Iterable[int]) -> Any:
    return np.array(list(values), dtype=np.int64)


def _floats(values: Iterable[float]) -> Any:
    return np.array(list(values), dtype=np.float64)
