"""The points of jobs' curves in memory, read once and then read on, so that a long training's page stays fast.

JobMetric rows only grow at their end, but for those that a resumed trainer writes again with the same values. So each
look at a job reads what came since the last one. A job of very many points is thinned while it is read: of each few
neighbouring points the smallest and the largest stay, so that no spike is lost. The database keeps them all.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import orjson
from sqlalchemy import Text, select
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import Session

from app.tables import JobMetric

MAX_VALUES = 2_000_000
"""Of one job, in memory; twice 8 bytes each."""
MAX_JOBS = 8
_ROWS = 2_000

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Column:
    """One metric of a job: values at rising steps, none of them missing or infinite."""

    steps: Ints
    values: Floats

    @property
    def last(self) -> float | None:
        return float(self.values[-1]) if self.values.size else None


Readings = Mapping[str, Column]
"""Columns by the names that the trainer wrote them under."""


@dataclass
class _Job:
    columns: dict[str, Column] = field(default_factory=dict[str, Column])
    last_step: int = -1
    lock: Lock = field(default_factory=Lock)


class Reader:
    """Keeps the readings of the jobs looked at last. One for a process; safe between threads."""

    def __init__(self) -> None:
        self.jobs: OrderedDict[int, _Job] = OrderedDict()
        self.lock = Lock()

    def read(self, session: Session, job_id: int) -> Readings:
        """Return all columns of a job as they are now."""
        with self.lock:
            job = self.jobs.setdefault(job_id, _Job())
            self.jobs.move_to_end(job_id)
            while len(self.jobs) > MAX_JOBS:
                self.jobs.popitem(last=False)
        with job.lock:
            _read_on(session, job_id, job)
            return dict(job.columns)


def _read_on(session: Session, job_id: int, job: _Job) -> None:
    # As text: the database driver's own reading of JSON takes three times as long.
    wanted = select(JobMetric.step, sql_cast(JobMetric.values, Text)).where(JobMetric.job_id == job_id)
    rows = session.execute(wanted.where(JobMetric.step > job.last_step).order_by(JobMetric.step))
    for part in rows.partitions(_ROWS):
        fresh: dict[str, tuple[list[int], list[float]]] = {}
        for step, text in part:
            for name, value in parsed(text).items():
                if isinstance(value, int | float) and math.isfinite(value):
                    steps, values = fresh.setdefault(name, ([], []))
                    steps.append(step)
                    values.append(value)
        for name, (steps, values) in fresh.items():
            job.columns[name] = _joined(job.columns.get(name), np.array(steps), np.array(values, dtype=np.float64))
        job.last_step = part[-1][0]
        if sum(column.values.size for column in job.columns.values()) > MAX_VALUES:
            job.columns = {name: thinned(column, column.values.size // 2) for name, column in job.columns.items()}


def parsed(text: str) -> dict[str, Any]:
    """Return the values of one point. Python's own JSON writes NaN, which others do not read."""
    try:
        return cast(dict[str, Any], orjson.loads(text))
    except orjson.JSONDecodeError:
        return cast(dict[str, Any], json.loads(text))


def _joined(column: Column | None, steps: Ints, values: Floats) -> Column:
    if column is None:
        return Column(steps, values)
    return Column(np.concatenate([column.steps, steps]), np.concatenate([column.values, values]))


def between(column: Column, first: int | None, last: int | None) -> Column:
    """Return the part of a column from one step to another, both included."""
    start = 0 if first is None else int(np.searchsorted(column.steps, first, "left"))
    stop = column.steps.size if last is None else int(np.searchsorted(column.steps, last, "right"))
    return Column(column.steps[start:stop], column.values[start:stop])


def thinned(column: Column, n: int) -> Column:
    """Return at most about n points of a column: the smallest and largest of neighbours, and the ends."""
    size = column.values.size
    if size <= max(n, 4):
        return column
    edges = np.linspace(0, size, max(n // 2, 2) + 1).astype(np.int64)[:-1]
    lowest, highest = _places(column.values, edges, np.minimum), _places(column.values, edges, np.maximum)
    kept = np.unique(np.concatenate([[0], lowest, highest, [size - 1]]))
    return Column(column.steps[kept], column.values[kept])


def _places(values: Floats, edges: Ints, extreme: np.ufunc) -> Ints:
    """Where each stretch from edge to edge has its extreme, the first of equals."""
    found = np.repeat(extreme.reduceat(values, edges), np.diff(np.append(edges, values.size)))
    at = np.flatnonzero(values == found)
    stretch = np.searchsorted(edges, at, "right")
    return at[np.unique(stretch, return_index=True)[1]]


def smoothed(column: Column, share: float) -> Column:
    """Return a running mean over a share of the column's points, each of those before and at it; 0 changes nothing."""
    window = round(share * column.values.size)
    if window < 2:
        return column
    sums = np.concatenate([[0.0], np.cumsum(column.values)])
    ends = np.arange(1, column.values.size + 1)
    starts = np.maximum(0, ends - window)
    return Column(column.steps, (sums[ends] - sums[starts]) / (ends - starts))
