"""Points of curves in memory: read on, thinned without losing a spike, bounded; and the plots drawn from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app import db, plots, readings
from app.plots import Series, plot
from app.readings import Column, Reader
from app.tables import Job, JobMetric


def column(values: list[float], every: int = 10) -> Column:
    return Column(np.arange(1, len(values) + 1) * every, np.array(values, dtype=np.float64))


@pytest.fixture
def job(engine: Engine) -> Iterator[tuple[Session, int]]:
    with db.sessions(engine)() as session:
        made = Job(kind="train", title="t", spec={}, result={}, workflow_id="")
        session.add(made)
        session.commit()
        yield session, made.id


def add(session: Session, job_id: int, steps: range, **names: float) -> None:
    session.add_all([JobMetric(job_id=job_id, step=s, values={"loss": 1.0 / s, **names}) for s in steps])
    session.commit()


def test_a_second_look_reads_only_what_came_since(job: tuple[Session, int]) -> None:
    session, job_id = job
    reader = Reader()
    add(session, job_id, range(1, 4))
    assert reader.read(session, job_id)["loss"].steps.tolist() == [1, 2, 3]
    session.get(JobMetric, (job_id, 1)).values = {"loss": 9.0}  # type: ignore[union-attr]
    add(session, job_id, range(4, 6), l0=32.0)
    found = reader.read(session, job_id)
    assert found["loss"].values.tolist() == [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
    assert found["l0"].steps.tolist() == [4, 5]


def test_values_that_are_no_numbers_are_left_out() -> None:
    assert readings.parsed('{"a": NaN, "b": 1}')["b"] == 1
    assert math.isnan(readings.parsed('{"a": NaN}')["a"])


def test_a_job_of_too_many_points_is_thinned_and_keeps_its_extremes(
    job: tuple[Session, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, job_id = job
    monkeypatch.setattr(readings, "MAX_VALUES", 300)
    monkeypatch.setattr(readings, "_ROWS", 50)
    add(session, job_id, range(1, 901))
    session.get(JobMetric, (job_id, 333)).values = {"loss": 77.0}  # type: ignore[union-attr]
    session.commit()
    found = Reader().read(session, job_id)["loss"]
    assert found.values.size <= 350
    assert found.values.max() == 77.0
    assert (found.steps[0], found.steps[-1]) == (1, 900)


def test_only_the_jobs_looked_at_last_are_kept(job: tuple[Session, int]) -> None:
    session, job_id = job
    reader = Reader()
    for number in range(job_id, job_id + 2 * readings.MAX_JOBS):
        reader.read(session, number)
    assert len(reader.jobs) == readings.MAX_JOBS


@pytest.mark.parametrize("n", [4, 7, 50, 333])
def test_thinning_keeps_ends_and_every_stretchs_extremes_as_a_plain_loop_does(n: int) -> None:
    whole = column(np.random.default_rng(n).normal(size=1000).tolist())
    found = readings.thinned(whole, n)
    edges = np.linspace(0, 1000, max(n // 2, 2) + 1).astype(int)
    kept = {0, 999}
    for start, stop in itertools.pairwise(edges):
        part = whole.values[start:stop]
        kept |= {int(start + part.argmin()), int(start + part.argmax())}
    assert found.steps.tolist() == [(i + 1) * 10 for i in sorted(kept)]
    assert found.values.tolist() == whole.values[sorted(kept)].tolist()


def test_smoothing_is_the_mean_of_what_came_before() -> None:
    found = readings.smoothed(column([float(i) for i in range(10)]), 0.3)
    assert found.values.tolist() == [0, 0.5, *(float(i) - 1 for i in range(2, 10))]
    assert readings.smoothed(column([1.0, 5.0]), 0.02).values.tolist() == [1.0, 5.0]


def test_a_part_of_a_column_has_both_its_ends() -> None:
    assert readings.between(column([1.0] * 9), 20, 40).steps.tolist() == [20, 30, 40]
    assert readings.between(column([1.0] * 9), None, 5).steps.size == 0


# Plots ------------------------------------------------------------------------------------------------------------


def series(y: list[float], x: list[float] | None = None) -> Series:
    return Series("run", 0, np.array(x or [10.0 * (i + 1) for i in range(len(y))]), np.array(y))


def test_a_plots_path_goes_from_corner_to_corner() -> None:
    found = plot("loss", "loss", "", [series([2.0, 1.0])])
    assert found.lines[0].path == f"M0.0 {150 * 0.05 / 1.1:.1f}L360.0 {150 * 1.05 / 1.1:.1f}"
    assert [tick.text for tick in found.y_ticks] == ["1.00", "1.50", "2.00"]
    assert found.data["lines"][0]["y"] == [2.0, 1.0]


def test_values_far_below_do_not_squash_the_rest() -> None:
    found = plot("ev", "ev", "", [series([-50.0, 0.5, 0.75])], floor=-0.2)
    assert found.data["low"] == pytest.approx(-0.2 - 0.95 * 0.05)
    assert found.lines[0].path.startswith("M0.0 150.0L")


def test_a_logarithmic_scale_names_round_numbers_and_bears_zeros() -> None:
    found = plot("l0", "l0", "", [series([0.0, 3.0, 1000.0])], scale="log")
    assert {"10.0", "100", "1,000"} <= {tick.text for tick in found.y_ticks}
    assert "nan" not in found.lines[0].path


@pytest.mark.parametrize("y", [[], [0.0], [5.0, 5.0], [1e-9, 2e-9], [1e12, -1e12]])
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_any_values_make_a_plot(y: list[float], scale: plots.Scale) -> None:
    found = plot("x", "x", "", [series(y)], scale=scale)
    assert len(found.lines) == bool(y)
    assert all(0 <= tick.at <= 150 for tick in found.y_ticks)
    assert len(found.y_ticks) < 20


def test_what_cannot_be_negative_has_no_axis_below_zero() -> None:
    assert plot("dead", "dead", "", [series([0.0, 0.0])]).data["low"] == 0.0


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (950, "950"), (9_500, "9,500"), (12_000, "12k"), (2_500_000, "2.5M"), (3e9, "3B")]
)
def test_counts_are_short(value: float, text: str) -> None:
    assert plots.short(value) == text


def test_curves_after_the_eighth_are_told_by_dashes() -> None:
    assert [plots.css(n) for n in (0, 7, 8, 17)] == ["s0 d0", "s7 d0", "s0 d1", "s1 d2"]


def test_small_numbers_on_an_axis_are_short_and_told_apart() -> None:
    curve = Series("a", 0, np.array([10.0]), np.array([1e-4]))
    drawn = plot("lr", "learning rate", "", [curve], x_name="step", scale="linear", version="")
    texts = [tick.text for tick in drawn.y_ticks]
    assert texts == ["9e-5", "9.5e-5", "1e-4", "1.05e-4", "1.1e-4"]
    assert max(map(len, texts)) <= 7
