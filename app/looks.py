"""Looks at an SAE while it is trained (app.curves' snapshots) as figures and shaded text. Reads files, no database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from app import curves
from app.curves import Example, FeatureNow, Histogram, Snapshot
from app.present import Chart, Piece, Tick, Window, amount, level, percent

WIDTH, HEIGHT = 240.0, 60.0
MULTIPLES = 6
"""Looks shown beside each other."""


@dataclass(frozen=True)
class Small:
    """The activations at one look, in small."""

    look: int
    step: int
    chart: Chart
    chosen: bool


@dataclass(frozen=True)
class Moment:
    """A followed feature at one look."""

    step: int
    density: float
    max_act: float
    windows: tuple[Window, ...]


@dataclass(frozen=True)
class Followed:
    """A feature, now and through the training."""

    index: int
    now: Moment
    before: tuple[Moment, ...]
    """At the looks shown beside each other, each with its strongest example."""


@dataclass(frozen=True)
class Looks:
    """What the looks at one SAE show."""

    sources: tuple[str, ...]
    source: str
    steps: tuple[int, ...]
    look: int
    """Which is shown, from 1; 0 where there is none yet."""
    newest: bool
    """The newest is shown, and the next one will be."""
    tokens: int
    n_probe: int
    n_silent: int
    d_sae: int
    activations: tuple[Small, ...]
    densities: Chart | None
    features: tuple[Followed, ...]

    @property
    def step(self) -> int:
        return self.steps[self.look - 1] if self.look else 0


def looks(job_dir: Path, sources: Sequence[str], source: str, look: int, d_sae: int) -> Looks:
    """Return what a look shows, the newest where it is 0 or not there."""
    steps = curves.snapshot_steps(job_dir, source)
    if not steps:
        return Looks(tuple(sources), source, (), 0, True, 0, 0, 0, d_sae, (), None, ())
    chosen = look if 0 < look <= len(steps) else len(steps)
    some = spread(len(steps), chosen)
    found = {number: curves.read_snapshot(job_dir, source, steps[number - 1]) for number in {*some, chosen}}
    now = found[chosen]
    most = max(max(found[number].activations.counts, default=0) for number in some)
    return Looks(
        sources=tuple(sources),
        source=source,
        steps=steps,
        look=chosen,
        newest=not 0 < look <= len(steps),
        tokens=now.tokens,
        n_probe=now.n_probe,
        n_silent=now.n_silent,
        d_sae=d_sae,
        activations=tuple(
            Small(number, steps[number - 1], _activations(found[number], most), number == chosen) for number in some
        ),
        densities=_densities(now),
        features=tuple(_followed(now, place, [found[number] for number in some]) for place in range(len(now.features))),
    )


def spread(n: int, chosen: int) -> list[int]:
    """Return at most MULTIPLES of 1..n, evenly spread, the chosen one among them."""
    places = np.unique(np.linspace(1, n, min(n, MULTIPLES)).round().astype(int)).tolist()
    if chosen not in places:
        nearest = min(range(len(places)), key=lambda i: abs(places[i] - chosen))
        places[nearest] = chosen
    return sorted(places)


def _activations(snapshot: Snapshot, most: int) -> Chart:
    found = snapshot.activations
    n, ends = sum(found.counts), (amount(10.0 ** found.edges[0]), amount(10.0 ** found.edges[-1]))
    title = f"Histogram of {n:,} activations at step {snapshot.step:,}, by size on a logarithmic scale."
    return _bars(found, most, ends, "", f"step {snapshot.step:,}", title)


def _densities(snapshot: Snapshot) -> Chart:
    found = snapshot.densities
    ends = percent(10.0 ** found.edges[0]), percent(10.0 ** found.edges[-1])
    n, most = sum(found.counts), max(found.counts, default=0)
    title = f"Histogram of the densities of {n:,} latents at step {snapshot.step:,}; {snapshot.n_silent:,} are silent."
    return _bars(found, most, ends, "density", f"{most:,} latents", title)


def _bars(found: Histogram, most: int, ends: tuple[str, str], axis: str, tallest: str, title: str) -> Chart:
    """Counts as bars, `most` of which take the whole height."""
    step = WIDTH / max(len(found.counts), 1)
    tall = [max(count / max(most, 1) * HEIGHT, 0.8 if count else 0.0) for count in found.counts]
    path = "".join(f"V{HEIGHT - height:.1f}H{(i + 1) * step:.1f}" for i, height in enumerate(tall))
    middle = (Tick(WIDTH / 2, axis, "middle"),) if axis else ()
    ticks = (Tick(0, ends[0], "start"), *middle, Tick(WIDTH, ends[1], "end"))
    return Chart(f"M0 {HEIGHT:g}{path}V{HEIGHT:g}Z", WIDTH, HEIGHT, ticks, title, tallest)


def _followed(now: Snapshot, place: int, looked: Sequence[Snapshot]) -> Followed:
    feature = now.features[place]
    before = [_same(snapshot, feature.index) for snapshot in looked]
    return Followed(
        feature.index,
        _moment(now, feature, len(feature.examples)),
        tuple(_moment(snapshot, then, 1) for snapshot, then in zip(looked, before, strict=True) if then is not None),
    )


def _same(snapshot: Snapshot, index: int) -> FeatureNow | None:
    return next((feature for feature in snapshot.features if feature.index == index), None)


def _moment(snapshot: Snapshot, feature: FeatureNow, n: int) -> Moment:
    windows = tuple(window(example, feature.max_act) for example in feature.examples[:n])
    return Moment(snapshot.step, feature.density, feature.max_act, windows)


def window(example: Example, full: float) -> Window:
    """Return an example as shaded text; its shades are of the feature's maximum at that look."""
    peak = max(range(len(example.values)), key=lambda i: example.values[i], default=0)
    pieces: list[Piece] = []
    for place, (token, value) in enumerate(zip(example.tokens, example.values, strict=True)):
        pieces.append(Piece(token, level(value, full), amount(value) if value > 0 else "", peak=place == peak))
    largest = max(example.values, default=0.0)
    return Window(0, tuple(pieces), cut_before=True, cut_after=True, max=largest, peak=peak, title="")
