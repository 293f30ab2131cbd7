"""Figures of a whole SAE, from a harvest's summary and its map, as SVG paths. Pure: no database, no HTTP.

Engine and bundles may leave any part of a summary out; what is missing is not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from app.maps import Map
from app.present import Chart, Tick, amount, density_chart, histogram, percent

WIDTH, HEIGHT = 240.0, 72.0
THUMBNAIL = 240.0
_THUMBNAIL_POINTS = 1_500


@dataclass(frozen=True)
class Figure:
    """A chart with what it says in words."""

    heading: str
    kind: str
    chart: Chart
    about: str


def figures(summary: Mapping[str, Any]) -> tuple[Figure, ...]:
    """Return the figures that a harvest's summary holds."""
    found = (
        ("Densities", "densities", density_chart(summary), "How often features are active, on a logarithmic scale."),
        ("l0", "l0", l0_chart(summary), "Features active on a token, over tokens."),
        (
            "Explained variance by position",
            "by-position",
            variance_chart(summary),
            "How much of the variance about a position's mean the reconstruction keeps.",
        ),
        ("Decoder norms", "norms", norms_chart(summary), "Lengths of the features' output directions."),
    )
    return tuple(Figure(heading, kind, chart, about) for heading, kind, chart, about in found if chart is not None)


def l0_chart(summary: Mapping[str, Any]) -> Chart | None:
    binned = _binned(summary.get("l0_histogram"))
    if binned is None:
        return None
    counts, low, high = binned
    middles = low + (np.arange(counts.size) + 0.5) * (high - low) / counts.size
    mean = float((middles * counts).sum() / max(counts.sum(), 1))
    title = f"Histogram of the number of active features on {int(counts.sum()):,} tokens; their mean is {amount(mean)}."
    chart = histogram(counts, low, high, "active features", "tokens", title)
    return chart and _ticked(chart, f"{max(math.ceil(low), 0)}", "active features", f"{math.floor(high)}")


def norms_chart(summary: Mapping[str, Any]) -> Chart | None:
    binned = _binned(summary.get("decoder_norms"))
    if binned is None:
        return None
    counts, low, high = binned
    title = f"Histogram of the norms of {int(counts.sum()):,} decoder rows."
    return histogram(counts, low, high, "norm", "features", title)


def variance_chart(summary: Mapping[str, Any]) -> Chart | None:
    """Return explained variance over positions; null ones, such as the first, are gaps."""
    found = summary.get("explained_variance_by_position")
    if not isinstance(found, list):
        return None
    values = [float(v) if isinstance(v, int | float) and math.isfinite(v) else None for v in found]
    known = [v for v in values if v is not None]
    if not known:
        return None
    path = _steps([max(v, 0.0) if v is not None else 0.0 for v in values], 1.0)
    title = (
        f"Explained variance at {len(known)} positions, between {min(known):.3f} and {max(known):.3f}; "
        "the full height is 1."
    )
    ticks = (
        Tick(0, "0", "start"),
        Tick(WIDTH / 2, "position in the context", "middle"),
        Tick(WIDTH, str(len(values) - 1), "end"),
    )
    return Chart(path, WIDTH, HEIGHT, ticks, title, f"{min(known):.3f} to {max(known):.3f}", None)


@dataclass(frozen=True)
class Overlay:
    """Two densities' curves over one axis."""

    first: str
    second: str
    """SVG paths."""
    width: float
    height: float
    low: str
    high: str
    """What the axis' ends mean."""
    title: str


def overlay(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]) -> Overlay | None:
    """Return the density curves of two SAEs, each as a share of its features; None unless both are known."""
    binned = [_binned(summary.get("density_histogram")) for summary in (one, other)]
    if binned[0] is None or binned[1] is None:
        return None
    both = (binned[0], binned[1])
    low, high = min(b[1] for b in both), max(b[2] for b in both)
    edges = np.linspace(low, high, 41)
    shares: list[npt.NDArray[np.float64]] = []
    for counts, first, last in both:
        own = np.linspace(first, last, counts.size + 1)
        total = np.concatenate([[0.0], np.cumsum(counts)]) / max(counts.sum(), 1)
        shares.append(np.diff(np.interp(edges, own, total)))
    top = max(float(share.max()) for share in shares) or 1.0
    paths = [_steps(share.tolist(), top) for share in shares]
    title = f"Densities of the live features of {names[0]} (filled) and {names[1]} (line), as shares of each."
    return Overlay(paths[0], paths[1], WIDTH, HEIGHT, percent(10.0**low), percent(10.0**high), title)


@dataclass(frozen=True)
class Thumbnail:
    """A map as dots, few enough to stand in a page."""

    path: str
    """Dots as strokes of no length."""
    size: float
    title: str


def thumbnail(drawn: Map) -> Thumbnail:
    step = max(1, -(-len(drawn.coordinates) // _THUMBNAIL_POINTS))
    places = np.rint((drawn.coordinates[::step] + 1) / 2 * THUMBNAIL * 2) / 2
    path = "".join(f"M{x:g} {THUMBNAIL - y:g}h0" for x, y in places.tolist())
    return Thumbnail(path, THUMBNAIL, f"Map of {len(drawn.coordinates):,} features in {len(drawn.clusters)} clusters.")


def _binned(found: Any) -> tuple[npt.NDArray[np.int64], float, float] | None:
    if not isinstance(found, Mapping):
        return None
    entry: Mapping[str, Any] = found
    counts, edges = np.array(entry.get("counts") or [], dtype=np.int64), entry.get("edges") or []
    if not counts.size or not counts.any() or len(edges) != counts.size + 1:
        return None
    return counts, float(edges[0]), float(edges[-1])


def _ticked(chart: Chart, low: str, axis: str, high: str) -> Chart:
    ticks = (
        Tick(0, low, "start"),
        Tick(chart.width / 2, axis, "middle"),
        Tick(chart.width, high, "end"),
    )
    return replace(chart, ticks=ticks, zero=None)


def _steps(values: Sequence[float], top: float) -> str:
    step = WIDTH / len(values)
    path = [f"M0 {HEIGHT:g}"]
    path += [f"V{HEIGHT - min(v / top, 1) * HEIGHT:.1f}H{(i + 1) * step:.1f}" for i, v in enumerate(values)]
    return "".join(path) + f"V{HEIGHT:g}Z"
