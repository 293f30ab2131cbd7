"""Evidence into what a page shows: windows of shaded tokens, histograms, lists. Pure: no database, no HTTP, no markup.

Shades are levels 0..10 (0 is inactive), so that a style sheet and not an inline style colours them.
"""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from app.catalog import DENSE, FeatureRow
from app.evidence import Effect, Example, FeatureEvidence, Floats, Interval, Ints, Silent
from app.tokens import Vocabulary

LEVELS = 10
PER_BAND = 5
"""Examples shown of a band of activation, where there are that many."""
WIDTHS = {"5": 5, "16": 16, "all": 100_000}
"""Tokens shown on each side of an example's peak, by the name of the width in addresses."""

Width = Literal["5", "16", "all"]
Contexts = Callable[[int], Sequence[int]]
"""Token ids of a context of the corpus, first position included."""
Titles = Callable[[int, int], str]
"""Title of the document that holds a position of a context."""

PART = "part of the next character"
"""What is said of a token without text: its bytes begin a character that a later token ends."""

_CHART_WIDTH, _CHART_HEIGHT = 300.0, 60.0


class Piece(NamedTuple):
    """A run of text in a window: one active token, one special token, or a stretch of inactive ones.

    A tuple, since a page makes five hundred of them.
    """

    text: str
    level: int = 0
    tip: str = ""
    peak: bool = False
    """The token to look at first: the strongest, or, where nothing is active, the one that might have been."""
    special: bool = False


class Window(NamedTuple):
    """The part of a context around a feature's peak. A tuple as its pieces are: a page makes fifty."""

    context: int
    pieces: tuple[Piece, ...]
    cut_before: bool
    cut_after: bool
    max: float
    peak: int
    title: str

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces if not piece.special)


@dataclass(frozen=True)
class Vote:
    """A token whose probability a feature changes, and by how much of 1."""

    token: str
    change: float


@dataclass(frozen=True)
class EffectView:
    """What leaving the feature out at an example's peak does to the model's next token."""

    loss_change: float | None
    """Nats by which the actual next token gets less likely; None at the end of the corpus."""
    kl: float
    up: tuple[Vote, ...]
    down: tuple[Vote, ...]
    n_later: int = 0
    """Tokens behind the peak over which the same was followed; the means of both follow."""
    later_loss_change: float | None = None
    later_kl: float = 0.0


class Shown(NamedTuple):
    """A window and the ones left out because they read the same."""

    window: Window
    more: tuple[Window, ...]
    effect: EffectView | None = None


@dataclass(frozen=True)
class Quiet:
    """A context without an activation, and why it is shown."""

    window: Window
    neighbour: FeatureRow | None
    """The feature with a similar direction that peaks there; None where the token is one this feature peaks on."""


@dataclass(frozen=True)
class Group:
    """Examples whose peak lies in one band of activation."""

    low: float
    high: float
    count: int
    share: float
    """Of the feature's active tokens, how many lie in the band."""
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Tick:
    at: float
    text: str
    anchor: Literal["start", "middle", "end"]


@dataclass(frozen=True)
class Chart:
    """A histogram as one SVG path in a box of `width` x `height` units, and words that say the same."""

    path: str
    width: float
    height: float
    ticks: tuple[Tick, ...]
    title: str
    tallest: str
    """The count of the highest bin, with what is counted."""
    zero: float | None = None
    """Where the value 0 lies, when inside."""


@dataclass(frozen=True)
class Logit:
    token: str
    value: float
    level: int


@dataclass(frozen=True)
class Neighbour:
    feature: FeatureRow
    value: float


@dataclass(frozen=True)
class Neuron:
    index: int
    value: float
    share: float
    """Of the decoder row's L1 norm."""


@dataclass(frozen=True)
class FeatureView:
    """All figures of a feature page."""

    n_active: int
    n_tokens: int
    density: float
    max_act: float
    mean_act: float
    counts_derived: bool
    """The number of active tokens follows from other numbers of an import: about right."""
    kind: Literal["dead", "dense", "usual"]
    top: tuple[Shown, ...]
    groups: tuple[Group, ...]
    activations: Chart | None
    logits: Chart | None
    positive: tuple[Logit, ...]
    negative: tuple[Logit, ...]
    neighbours: tuple[Neighbour, ...]
    correlated: tuple[Neighbour, ...]
    neurons: tuple[tuple[int, float], ...]
    has_text: bool
    """False when the corpus's tokens are not on this machine."""
    skew: float | None = None
    """Of the effects on the logits; None where the evidence does not say, as for kurtosis."""
    kurtosis: float | None = None
    silent: tuple[Quiet, ...] = ()
    """Contexts drawn at random from those without an activation."""
    hard_negatives: tuple[Quiet, ...] = ()
    """Contexts without an activation where one might have expected it."""


def feature_view(
    evidence: FeatureEvidence,
    words: Vocabulary,
    others: Mapping[int, FeatureRow],
    contexts: Contexts | None,
    titles: Titles | None,
    *,
    bos: int | None,
    special: frozenset[int] = frozenset(),
    width: Width = "16",
    per_example: bool = False,
    effects: Sequence[Effect] = (),
    counts_derived: bool = False,
) -> FeatureView:
    """Return what the page of a feature shows. Without contexts there are numbers but no examples.

    per_example shades each example by its own highest activation instead of the feature's.
    """

    def window(example: Example) -> Window:
        assert contexts is not None
        full = example.max if per_example else evidence.max_act
        title = titles(example.context, example.peak) if titles else ""
        return window_of(example, contexts(example.context), words, WIDTHS[width], full, bos, special, title)

    def quiet(silent: Silent) -> Quiet:
        assert contexts is not None
        title = titles(silent.context, silent.position) if titles else ""
        shown = silent_window(silent, contexts(silent.context), words, WIDTHS[width], bos, special, title)
        return Quiet(shown, None if silent.neighbour is None else _row(silent.neighbour, others))

    readable = contexts is not None
    measured = {(e.context, e.position): effect_view(e, words) for e in effects}
    return FeatureView(
        n_active=evidence.n_active,
        n_tokens=evidence.n_tokens,
        density=evidence.density,
        max_act=evidence.max_act,
        mean_act=evidence.mean_act,
        counts_derived=counts_derived,
        kind="dead" if evidence.n_active == 0 else "dense" if evidence.density > DENSE else "usual",
        top=_with_effects(fold([window(example) for example in evidence.top]), measured) if readable else (),
        groups=_groups(evidence, window) if readable else (),
        activations=_activations_chart(evidence),
        logits=_logits_chart(evidence),
        positive=_logits(evidence.top_logit_ids, evidence.top_logits, words),
        negative=_logits(evidence.bottom_logit_ids, evidence.bottom_logits, words),
        neighbours=_neighbours(evidence.neighbours, evidence.cosines, others),
        correlated=_neighbours(evidence.correlated, evidence.pearson, others),
        neurons=tuple(zip(evidence.neurons.tolist(), evidence.neuron_weights.tolist(), strict=False)),
        has_text=readable,
        skew=_finite(evidence.logits_skew),
        kurtosis=_finite(evidence.logits_kurtosis),
        silent=tuple(quiet(s) for s in evidence.silent) if readable else (),
        hard_negatives=tuple(quiet(s) for s in evidence.hard_negatives) if readable else (),
    )


def effect_view(effect: Effect, words: Vocabulary) -> EffectView:
    up, down = (tuple(Vote(words.string(t), share) for t, share in votes) for votes in (effect.up, effect.down))
    later = (effect.n_later, _finite(effect.later_loss_change), effect.later_kl)
    return EffectView(_finite(effect.loss_change), effect.kl, up, down, *later)


def weight(shown: Sequence[Shown | Quiet]) -> int:
    """Return about how many bytes of markup some examples take."""
    total = 0
    for example in shown:
        more = example.more if isinstance(example, Shown) else ()
        total += 250 + (450 if isinstance(example, Shown) and example.effect else 0)
        for window in (example.window, *more):
            total += sum(
                len(p.text.encode("utf-8", "replace")) + 46 * p.text.count("\n") + (70 if p.level else 0)
                for p in window.pieces
            )
    return total


def level(value: float, full: float) -> int:
    """Return the shade of a value: 0 for inactive, 1..LEVELS in equal bands of (0, full]."""
    if not value > 0 or not full > 0:
        return 0
    return max(1, min(LEVELS, math.ceil(LEVELS * value / full)))


def window_of(
    example: Example,
    ids: Sequence[int],
    words: Vocabulary,
    width: int,
    full: float,
    bos: int | None,
    special: frozenset[int] = frozenset(),
    title: str = "",
) -> Window:
    """Return the tokens within `width` of an example's peak, shaded relative to `full`. The BOS token is not shown."""
    positions, activations = example.positions.tolist(), example.values.tolist()
    highest = max(activations)
    peak = positions[activations.index(highest)]  # as Example.peak, which asks numpy
    return _window(example.context, positions, activations, highest, peak, ids, words, width, full, bos, special, title)


def silent_window(
    silent: Silent,
    ids: Sequence[int],
    words: Vocabulary,
    width: int,
    bos: int | None,
    special: frozenset[int] = frozenset(),
    title: str = "",
) -> Window:
    """Return the tokens around the one to look at in a context without an activation."""
    return _window(silent.context, [], [], 0.0, silent.position, ids, words, width, 0.0, bos, special, title)


def _window(
    context: int,
    positions: Sequence[int],
    activations: Sequence[float],
    highest: float,
    peak: int,
    ids: Sequence[int],
    words: Vocabulary,
    width: int,
    full: float,
    bos: int | None,
    special: frozenset[int],
    title: str,
) -> Window:
    first = 0 if bos is None else 1
    start, end = max(first, peak - width), min(len(ids), peak + width + 1)
    strings = _strings(words, ids, start, end, first)
    # A dense feature is active on hundreds of tokens of a context, of which a window shows a few.
    inside = slice(bisect_left(positions, start), bisect_left(positions, end))
    values = {at: value for at, value in zip(positions[inside], activations[inside], strict=True) if value > 0}
    pieces: list[Piece] = []
    done = start
    # A page has dozens of windows, with a few marked tokens each: what lies between them is joined, not walked through.
    for position in _marked(values, peak, ids, start, end, special):
        value, token, string = values.get(position, 0.0), int(ids[position]), strings[position - start]
        if position > done:
            pieces.append(Piece("".join(strings[done - start : position - start])))
        tip = f"{amount(value)} · position {position} · token {token}"
        tip += "" if string else f" · {PART}"
        pieces.append(Piece(string, level(value, full), tip, position == peak, token in special))
        done = position + 1
    if done < end:
        pieces.append(Piece("".join(strings[done - start :])))
    return Window(context, tuple(pieces), start > first, end < len(ids), highest, peak, title)


def _marked(
    active: Iterable[int], peak: int, ids: Sequence[int], start: int, end: int, special: frozenset[int]
) -> list[int]:
    """Return the positions in a window that are shown apart: active ones, the peak, special tokens."""
    marked = set(active)
    if start <= peak < end:
        marked.add(peak)
    if not special.isdisjoint(ids[start:end]):
        marked.update(position for position in range(start, end) if ids[position] in special)
    return sorted(marked)


def fold(windows: Sequence[Window]) -> tuple[Shown, ...]:
    """Put windows that read the same under the first of them."""
    seen: dict[str, list[Window]] = {}
    for window in windows:
        seen.setdefault(" ".join(window.text.split()).casefold(), []).append(window)
    return tuple(Shown(same[0], tuple(same[1:])) for same in seen.values())


@dataclass(frozen=True)
class ShadedToken:
    """A token of somebody's own text."""

    position: int
    text: str
    value: float
    level: int
    special: bool
    """A token that the text does not hold, such as BOS."""


def shaded(
    ids: Sequence[int], values: Sequence[float], words: Vocabulary, special: frozenset[int], full: float
) -> tuple[ShadedToken, ...]:
    """Return every token of a text with its shade, one string a token."""
    strings = words.strings(ids)
    return tuple(
        ShadedToken(position, string, value, level(value, full), token in special)
        for position, (token, string, value) in enumerate(zip(ids, strings, values, strict=True))
    )


def histogram(counts: Ints, low: float, high: float, axis: str, unit: str, title: str) -> Chart | None:
    """Return counts of `unit` in equal bins over [low, high] of `axis`; None when there is nothing to show."""
    if counts.size == 0 or not counts.any() or not high > low:
        return None
    heights = counts.astype(np.float64) / counts.max() * _CHART_HEIGHT
    step = _CHART_WIDTH / counts.size
    path = [f"M0 {_CHART_HEIGHT:g}"]
    for i, tall in enumerate(heights.tolist()):
        # A bin that holds anything shows at least a hairline: the rare high activations are what people look for.
        tall = max(tall, 0.8) if tall > 0 else 0.0
        path.append(f"V{_CHART_HEIGHT - tall:.1f}H{(i + 1) * step:.1f}")
    path.append(f"V{_CHART_HEIGHT:g}Z")
    zero = (0 - low) / (high - low) * _CHART_WIDTH if low < 0 < high else None
    ticks = (
        Tick(0, amount(low), "start"),
        Tick(_CHART_WIDTH / 2, axis, "middle"),
        Tick(_CHART_WIDTH, amount(high), "end"),
    )
    return Chart("".join(path), _CHART_WIDTH, _CHART_HEIGHT, ticks, title, f"{int(counts.max()):,} {unit}", zero)


def density_chart(summary: Mapping[str, Any]) -> Chart | None:
    """Return the densities of all live features of an SAE, binned over their logarithm, from a harvest's summary."""
    found = summary.get("density_histogram")
    if not isinstance(found, dict):
        return None
    counts, edges = np.array(found.get("counts", []), dtype=np.int64), found.get("edges", [])
    if not edges:
        return None
    low, high = float(edges[0]), float(edges[-1])
    title = f"Histogram of the densities of {int(counts.sum()):,} live features."
    chart = histogram(counts, low, high, "density", "features", title)
    if chart is None:
        return None
    ticks = (
        Tick(0, percent(10.0**low), "start"),
        Tick(_CHART_WIDTH / 2, "density, log scale", "middle"),
        Tick(_CHART_WIDTH, percent(10.0**high), "end"),
    )
    return replace(chart, ticks=ticks, zero=None)


def size(n_bytes: int) -> str:
    """Return bytes in the unit that gives them one to four digits."""
    unit, scale = next(
        (unit, scale)
        for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))
        if n_bytes >= scale / 2 or scale == 2**10
    )
    return f"{n_bytes / scale:,.1f} {unit}"


def amount(value: float) -> str:
    """Return a number with the three digits that matter."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}"
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{decimals}f}" if size >= 0.01 else f"{value:.2g}"


def signed(value: float) -> str:
    """Return a change with its sign, and the three digits that matter."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{amount(abs(value))}"


def duration(seconds: float) -> str:
    """Return a span as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def percent(share: float) -> str:
    """Return a fraction as a percentage, exact enough for densities of one in a million."""
    value = share * 100
    if value == 0:
        return "0 %"
    if value >= 10:
        return f"{value:.1f} %"
    return f"{value:.2f} %" if value >= 0.1 else f"{value:.3f} %" if value >= 0.001 else f"{value:.1g} %"


def hidden(character: str) -> bool:
    """Tell whether a character would act on the text around it or not be seen: controls, overrides, zero widths."""
    odd_space = character != " " and unicodedata.category(character) == "Zs"
    return odd_space or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _strings(words: Vocabulary, ids: Sequence[int], start: int, end: int, first: int) -> list[str]:
    # Read a little more on both sides: a character cut across tokens belongs to the last of them.
    before, after = max(first, start - 4), min(len(ids), end + 4)
    strings = words.strings(ids[before:after])
    return strings[start - before : len(strings) - (after - end)]


def _groups(evidence: FeatureEvidence, window: Callable[[Example], Window]) -> tuple[Group, ...]:
    return tuple(
        Group(
            interval.low,
            interval.high,
            interval.count,
            interval.count / evidence.n_active if evidence.n_active else 0.0,
            fold([window(example) for example in _of_band(evidence, interval)]),
        )
        for interval in evidence.intervals
    )


def _of_band(evidence: FeatureEvidence, interval: Interval) -> list[Example]:
    """Return a band's examples. What the harvest kept leaves out the highest ones of the feature; they fill up."""
    kept = list(interval.examples)
    if len(kept) >= PER_BAND:
        return kept
    seen = {(example.context, example.peak) for example in kept}
    # The highest band is open above: a stored activation may be rounded beyond the bound.
    high = math.inf if interval.high >= evidence.max_act else interval.high
    more = [e for e in evidence.top if interval.low < e.max <= high and (e.context, e.peak) not in seen]
    return kept + more[: PER_BAND - len(kept)]


def _activations_chart(evidence: FeatureEvidence) -> Chart | None:
    title = (
        f"Histogram of {evidence.n_active:,} non-zero activations between 0 and {amount(evidence.max_act)}; "
        f"their mean is {amount(evidence.mean_act)}."
    )
    return histogram(evidence.histogram, 0.0, evidence.max_act, "activation", "tokens", title)


def _logits_chart(evidence: FeatureEvidence) -> Chart | None:
    low, high = evidence.logits_low, evidence.logits_high
    title = (
        f"Histogram of the feature's effect on the logits of {int(evidence.logits_histogram.sum()):,} tokens, "
        f"from {amount(low)} to {amount(high)}."
    )
    return histogram(evidence.logits_histogram, low, high, "effect on the logit", "tokens", title)


def _with_effects(shown: Sequence[Shown], measured: Mapping[tuple[int, int], EffectView]) -> tuple[Shown, ...]:
    return tuple(s._replace(effect=measured.get((s.window.context, s.window.peak))) for s in shown)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _row(index: int, others: Mapping[int, FeatureRow]) -> FeatureRow:
    return others.get(index) or FeatureRow(index, "", 0.0, 0.0, "", "")


def _logits(ids: Ints, values: Floats, words: Vocabulary) -> tuple[Logit, ...]:
    full = float(np.abs(values).max()) if values.size else 0.0
    return tuple(
        Logit(words.string(int(token)), float(value), level(abs(float(value)), full))
        for token, value in zip(ids, values, strict=True)
    )


def _neighbours(indices: Ints, values: Floats, others: Mapping[int, FeatureRow]) -> tuple[Neighbour, ...]:
    return tuple(
        Neighbour(_row(index, others), float(value))
        for index, value in zip(indices.tolist(), values.tolist(), strict=True)
        if math.isfinite(value)
    )
