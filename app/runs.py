"""What the curves of jobs show: runs, their plots, last values and warnings. Pure but for plan.json: no database.

A run is one SAE of a training job, or a whole job of another kind: a row of the table and a line in each plot. Metrics
are named as app.curves says; what belongs to the whole job, such as tokens a second, has one line a job.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from app import curves, readings
from app.curves import Curve, Warning
from app.plots import Plot, Scale, Series, plot
from app.readings import Column, Readings
from app.tables import Job
from app.trainspecs import SaeSpec, TrainSpec

POINTS = 2_400
"""Points of all lines of one plot together."""
MAX_LINES = 128


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    heading: str
    about: str
    floor: float | None = None
    """A plot's frame is not stretched below it: the first values of some metrics are far off."""
    whole_job: bool = False
    in_table: bool = False
    log: bool = True
    """Whether a logarithmic scale says anything."""


METRICS: dict[str, Metric] = {
    "loss": Metric("loss", "error over variance, plus penalties", in_table=True),
    "explained_variance": Metric(
        "explained variance",
        "of the batch; the mean scores 0",
        floor=-0.2,
        in_table=True,
        log=False,
    ),
    "l0": Metric("l0", "latents active on a token", in_table=True),
    "dead_fraction": Metric("dead fraction", "latents silent for long", in_table=True, log=False),
    "ce_loss_score": Metric(
        "ce loss score, held out", "1 as without the SAE, 0 as with zeros", -0.5, in_table=True, log=False
    ),
    "held_out_explained_variance": Metric(
        "explained variance, held out", "on text not trained on", floor=-0.2, in_table=True, log=False
    ),
    "tokens_per_second": Metric("tokens a second", "activations, steps and looks together", whole_job=True),
    "lr": Metric("learning rate", "Adam's, with warm-up and decay"),
}
"""Those that every training shows, in this order."""
MORE: dict[str, Metric] = {
    "held_out_l0": Metric("l0, held out", "latents active on a token of held-out text"),
    "grad_norm": Metric("gradient norm", "before clipping"),
    "penalty": Metric("penalty", "what is added to the loss: L1, L0 or AuxK, weighted"),
    "coefficient": Metric("penalty's coefficient", "it rises in the warm-up"),
}
_SILENT = {"tokens", "seconds_left", "step", "seconds"}
"""Written at every point for other uses than a curve."""


class View(BaseModel):
    """How plots are looked at, as it stands in addresses."""

    model_config = ConfigDict(frozen=True)

    x: Literal["step", "tokens"] = "step"
    scale: Scale = "linear"
    smooth: Literal["0", "2", "10"] = "0"
    """Percent of the points that a running mean takes."""
    first: int | None = Field(default=None, ge=0, lt=2**53)
    last: int | None = Field(default=None, ge=0, lt=2**53)
    """Steps, or tokens where these are the axis, between which is shown."""
    hide: tuple[str, ...] = Field(default=(), max_length=MAX_LINES)
    """Keys of runs without a line."""
    more: bool = False
    """Show the rarer curves too."""
    sae: str = Field(default="", max_length=200)
    """Whose snapshots are shown; empty is the first."""
    look: int = Field(default=0, ge=0, lt=2**31)
    """Which snapshot, counted from 1; 0 is the newest."""

    @field_validator("first", "last", "look", mode="before")
    @classmethod
    def _empty(cls, value: Any, info: Any) -> Any:
        return (0 if info.field_name == "look" else None) if value == "" else value


@dataclass(frozen=True)
class Run:
    key: str
    """What addresses call it: the source's name, with the job's number before it where several jobs are shown."""
    name: str
    style: int
    job: Job
    spec: SaeSpec | None
    columns: Readings
    """By metric; those of the whole job too."""

    def last(self, metric: str) -> float | None:
        column = self.columns.get(metric)
        return column.last if column else None

    @property
    def last_step(self) -> int:
        return max((int(column.steps[-1]) for column in self.columns.values()), default=0)


def spec_of(job: Job) -> TrainSpec | None:
    """Return the spec of a training job; None for other kinds, and for one that this version does not read."""
    if job.kind != "train":
        return None
    try:
        return TrainSpec.model_validate(job.spec)
    except ValidationError:
        return None


def runs_of(job: Job, found: Readings, first_style: int = 0, *, among_others: bool = False) -> list[Run]:
    """Return the runs of a job; with the job's number in their names where others are shown beside it."""
    spec = spec_of(job)
    if spec is None:
        key, name = (f"{job.id}", f"job {job.id}") if among_others else ("", job.kind)
        return [Run(key, name, first_style, job, None, found)]
    shared = {name: column for name, column in found.items() if "/" not in name}
    runs: list[Run] = []
    for number, sae in enumerate(spec.saes):
        prefix = f"{sae.source}/"
        own = {name.removeprefix(prefix): column for name, column in found.items() if name.startswith(prefix)}
        key = f"{job.id}/{sae.source}" if among_others else sae.source
        name = f"{job.id} · {sae.source}" if among_others else sae.source
        runs.append(Run(key, name, first_style + number, job, sae, shared | own))
    return runs


def plots_of(runs: Sequence[Run], view: View) -> tuple[Plot, ...]:
    """Return one plot for each metric; those of trainings are there before they have points."""
    training = [run for run in runs if run.spec is not None]
    known = {**METRICS, **MORE}
    names = list(METRICS) if training else []
    if view.more or not training:
        there = {name for run in runs for name in run.columns if name not in _SILENT}
        names += [name for name in MORE if name in there]
        names += sorted(there - set(names))
    span = _span(runs, view)
    return tuple(_plot(name, known.get(name, Metric(name.replace("_", " "), "")), runs, view, span) for name in names)


def _span(runs: Sequence[Run], view: View) -> tuple[float, float] | None:
    """What the axis of all plots reaches over: what is asked for, or as far as any run shown has come."""
    shown = [run for run in runs if run.key not in view.hide] or runs
    ends = [(column.steps[0], column.steps[-1]) for run in shown for column in run.columns.values()]
    if not ends:
        return None
    first, last = float(min(start for start, _ in ends)), float(max(stop for _, stop in ends))
    if view.x == "tokens":
        tokens = [run.columns["tokens"].values for run in shown if "tokens" in run.columns]
        if tokens:
            first, last = min(float(t[0]) for t in tokens), max(float(t[-1]) for t in tokens)
    first, last = max(first, view.first or first), min(last, view.last or last)
    return (first, last) if last > first else None


def _plot(name: str, metric: Metric, runs: Sequence[Run], view: View, span: tuple[float, float] | None) -> Plot:
    shown = [run for run in runs if run.key not in view.hide and name in run.columns]
    if metric.whole_job:
        shown = list({run.job.id: run for run in reversed(shown)}.values())[::-1]
    n = max(24, POINTS // max(len(shown), 1))
    scale: Scale = view.scale if metric.log else "linear"
    told: list[Any] = [name, view.x, scale, view.smooth, view.first, view.last, span]
    told += [(run.key, run.columns[name].values.size, int(run.columns[name].steps[-1])) for run in shown]
    version = hashlib.sha256(repr(told).encode()).hexdigest()[:10]
    series = [_series(run, run.columns[name], view, n, whole_job=metric.whole_job) for run in shown]
    x_name = "tokens" if view.x == "tokens" else "step"
    return plot(
        name,
        metric.heading,
        metric.about,
        series,
        x_name=x_name,
        scale=scale,
        floor=metric.floor,
        span=span,
        version=version,
    )


def _series(run: Run, column: Column, view: View, n: int, *, whole_job: bool) -> Series:
    first, last = view.first, view.last
    if view.x == "tokens":
        first, last = (None if bound is None else _step_at(run, bound) for bound in (first, last))
    part = readings.thinned(readings.smoothed(readings.between(column, first, last), int(view.smooth) / 100), n)
    x = part.steps.astype(np.float64)
    if view.x == "tokens" and "tokens" in run.columns:
        x = np.interp(x, run.columns["tokens"].steps, run.columns["tokens"].values)
    return Series(f"job {run.job.id}" if whole_job else run.name, run.style, x, part.values)


def _step_at(run: Run, n_tokens: int) -> int:
    tokens = run.columns.get("tokens")
    return n_tokens if tokens is None else int(np.interp(n_tokens, tokens.values, tokens.steps))


def n_steps_of(job: Job, job_dir: Path, runs: Sequence[Run]) -> int:
    """Return how many steps a training takes in all: as its plan says, or guessed from how far it is."""
    step = max((run.last_step for run in runs), default=0)
    try:
        plan: Any = json.loads((job_dir / "plan.json").read_text())
    except (OSError, ValueError):
        plan = None
    told: Any = cast(dict[str, Any], plan).get("n_steps") if isinstance(plan, dict) else None
    if isinstance(told, int) and told > 0:
        return told
    return step if job.state == "done" else round(step / max(job.done, 0.01))


def warnings_of(run: Run, n_steps: int) -> tuple[Warning, ...]:
    """Return what is worth a warning in a run by now."""
    if run.spec is None:
        return ()
    names = ("loss", "explained_variance", "l0", "dead_fraction")
    return curves.warnings({n: _curve(run.columns[n]) for n in names if n in run.columns}, run.spec, n_steps)


def _curve(column: Column, n_recent: int = 64) -> Curve:
    """The newest points as they are, what came before thinned: enough for judging, however long the training."""
    split = max(0, column.values.size - n_recent)
    old = readings.thinned(Column(column.steps[:split], column.values[:split]), 400)
    steps = np.concatenate([old.steps, column.steps[split:]])
    return list(zip(steps.tolist(), np.concatenate([old.values, column.values[split:]]).tolist(), strict=True))


def differences(specs: Sequence[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the fields in which specs differ, with the value of each; nested ones by their path."""
    flat = [dict(_flat(spec)) for spec in specs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    rows = [(name, tuple(one.get(name, "–") for one in flat)) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{path}.{key}" if path else str(key))]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return [(path, text[:200])]
