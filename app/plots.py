"""Curves over steps or tokens as SVG paths, with their axes and the numbers behind them. Pure: no database, no HTTP."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from app.present import amount

WIDTH, HEIGHT = 360.0, 150.0
STYLES = 8
"""Colours; after them the same come dashed."""
Scale = Literal["linear", "log"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One curve of a plot."""

    name: str
    """Whose it is, as its legend says; untrusted text."""
    style: int
    """Its number among all curves of the page: the same SAE looks the same everywhere."""
    x: Floats
    y: Floats


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Line:
    name: str
    css: str
    """Classes of its colour and dash."""
    path: str
    dots: str
    """Its points, where they are few: a curve of one point has no line."""


@dataclass(frozen=True)
class Plot:
    """Curves in one frame."""

    id: str
    heading: str
    about: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_name: str
    title: str
    """What it shows, in words."""
    data: dict[str, Any]
    """The points and the frame's bounds, for the crosshair."""
    version: str
    """Changes when the picture does."""
    width: float = WIDTH
    height: float = HEIGHT


def css(style: int) -> str:
    """Return the classes of a curve by its number."""
    return f"s{style % STYLES} d{style // STYLES % 4}"


def plot(
    name: str,
    heading: str,
    about: str,
    curves: Sequence[Series],
    *,
    x_name: str = "step",
    scale: Scale = "linear",
    floor: float | None = None,
    span: tuple[float, float] | None = None,
    version: str = "",
) -> Plot:
    """Draw curves. `floor`: nothing below it decides about the frame; such points lie on its lower edge.

    `span` is what the axis reaches over, so that plots beside each other have the same one; the curves' own without it.
    """
    curves = [curve for curve in curves if curve.y.size]
    low, high = _bounds(curves, scale, floor)
    first, last = _span(curves, span)
    left, right = _numbers(first, last, whole=True), _numbers(low, high)

    def across(x: Floats) -> Floats:
        return (x - first) / (last - first) * WIDTH

    def up(y: Floats) -> Floats:
        place = _logs(y) if scale == "log" else y
        return HEIGHT - np.clip((place - low) / (high - low), 0, 1) * HEIGHT

    lines = tuple(_line(curve, across(curve.x), up(curve.y)) for curve in curves)
    x_ticks = tuple(Tick(round(float(across(np.array(x))), 1), short(x)) for x in left)
    marks = _decades(low, high) if scale == "log" else [(y, _mark(y)) for y in right]
    y_ticks = tuple(Tick(round(HEIGHT - (y - low) / (high - low) * HEIGHT, 1), text) for y, text in marks)
    data = {
        "first": first,
        "last": last,
        "low": low,
        "high": high,
        "log": scale == "log",
        "lines": [
            {"name": c.name, "css": css(c.style), "x": c.x.tolist(), "y": [float(f"{y:.5g}") for y in c.y.tolist()]}
            for c in curves
        ],
    }
    return Plot(name, heading, about, lines, x_ticks, y_ticks, x_name, _title(heading, curves, x_name), data, version)


def _mark(value: float) -> str:
    """Return a number of an axis, narrow enough to stand beside it and told from its neighbours: 1.05e-4."""
    if not 0 < abs(value) < 0.01:
        return amount(value)
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def short(value: float) -> str:
    """Return a count in few characters: 1,200 or 3.5M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:,.0f}"


def _line(curve: Series, x: Floats, y: Floats) -> Line:
    points = [f"{a:.1f} {b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    dots = "".join(f"M{point}h0" for point in points) if len(points) <= 12 else ""
    return Line(curve.name, css(curve.style), "M" + "L".join(points), dots)


def _bounds(curves: Sequence[Series], scale: Scale, floor: float | None) -> tuple[float, float]:
    """The frame's lower and upper edge, in logarithms where the scale is."""
    read: Callable[[Floats], Floats] = _logs if scale == "log" else lambda y: y
    found = [read(curve.y) for curve in curves]
    if not found:
        return 0.0, 1.0
    low, high = min(float(y.min()) for y in found), max(float(y.max()) for y in found)
    if floor is not None and scale == "linear":
        low = max(low, min(floor, high))
    room = (high - low) * 0.05 or abs(high) * 0.1 or 0.5
    # What cannot be negative has no axis below zero.
    return (max(low - room, 0.0) if low >= 0 and scale == "linear" else low - room), high + room


def _logs(y: Floats) -> Floats:
    """Logarithms; what has none stands at the smallest that does."""
    positive = y[y > 0]
    least = float(positive.min()) if positive.size else 1e-12
    return np.log10(np.maximum(y, least))


def _span(curves: Sequence[Series], given: tuple[float, float] | None) -> tuple[float, float]:
    if given is None and not curves:
        return 0.0, 1.0
    first, last = given or (min(float(c.x[0]) for c in curves), max(float(c.x[-1]) for c in curves))
    return (first, last) if last > first else (first - 1, last + 1)


def _numbers(low: float, high: float, n: int = 4, *, whole: bool = False) -> list[float]:
    """Return about n round numbers between two."""
    raw = max((high - low) / n, 1.0 if whole else 0.0)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[tuple[float, str]]:
    """Return (logarithm, text) of round numbers: 1, 2 and 5 of each decade where there are few decades."""
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    every = max(1, round((high - low) / 5))
    found: list[tuple[float, str]] = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        found += [
            (at, amount(10.0**at))
            for at in (power + math.log10(f) for f in factors)
            if low <= at <= high and power % every == 0
        ]
    return found if len(found) >= 2 else [(low, amount(10.0**low)), (high, amount(10.0**high))]


def _title(heading: str, curves: Sequence[Series], x_name: str) -> str:
    if not curves:
        return f"{heading}: no points yet."
    if len(curves) > 1:
        return f"{heading} of {len(curves)} runs by {x_name}; the table has their last values."
    y = curves[0].y
    return (
        f"{heading} by {x_name}, from {amount(float(y[0]))} to {amount(float(y[-1]))}; "
        f"between {amount(float(y.min()))} and {amount(float(y.max()))}."
    )
