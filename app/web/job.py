"""The jobs page and a job's page: how far each is, its curves, and ways to cancel and resume it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app import jobs
from app.catalog import parse_index
from app.tables import Job, JobMetric, JobState, now
from app.web.guard import CHART_POLICY
from app.web.pages import Config, Db, partial, render

router = APIRouter()

_CURVES = {
    "loss": "loss",
    "explained_variance": "explained variance",
    "l0": "l0",
    "dead": "dead features",
    "dead_fraction": "dead fraction",
}
_HEADERS = {"content-security-policy": CHART_POLICY}


@dataclass(frozen=True)
class JobCard:
    id: int
    kind: str
    title: str
    state: str
    share: float
    status: str
    error: str
    url: str
    created: str
    took: str
    cancelling: bool
    pausing: bool

    @property
    def path(self) -> str:
        return f"/jobs/{self.id}"

    @property
    def moving(self) -> bool:
        return self.state in (JobState.QUEUED, JobState.RUNNING)

    @property
    def resumable(self) -> bool:
        return self.state in (JobState.FAILED, JobState.CANCELLED, JobState.PAUSED)

    @property
    def percent(self) -> int:
        return round(self.share * 100)


@dataclass(frozen=True)
class JobsPage:
    jobs: tuple[JobCard, ...]
    trainers: int

    @property
    def moving(self) -> bool:
        return any(job.moving for job in self.jobs)

    @property
    def stuck(self) -> bool:
        """Jobs wait, and nobody is there to take them up."""
        return self.trainers == 0 and any(job.state == JobState.QUEUED for job in self.jobs)


@dataclass(frozen=True)
class JobPage:
    job: JobCard
    spec: str
    result: tuple[tuple[str, str], ...]
    figures: tuple[dict[str, Any], ...]
    latest: tuple[tuple[str, str], ...]


@router.get("/jobs")
def jobs_page(request: Request, session: Db, settings: Config) -> Response:
    page = JobsPage(tuple(_card(job) for job in jobs.recent(session)), len(jobs.trainers(session, settings)))
    return render(request, "_jobs.html" if partial(request) else "jobs.html", page)


@router.get("/jobs/{job_id}")
def job_page(request: Request, job_id: str, session: Db) -> Response:
    return _show(request, session, parse_index(job_id))


@router.post("/jobs/{job_id}/cancel")
def cancel(request: Request, job_id: str, session: Db) -> Response:
    number = parse_index(job_id)
    jobs.cancel(session, number)
    session.commit()
    return _after(request, session, number)


@router.post("/jobs/{job_id}/pause")
def pause(request: Request, job_id: str, session: Db) -> Response:
    number = parse_index(job_id)
    jobs.pause(session, number)
    session.commit()
    return _after(request, session, number)


@router.post("/jobs/{job_id}/resume")
def resume(request: Request, job_id: str, session: Db) -> Response:
    number = parse_index(job_id)
    jobs.resume(session, number)
    session.commit()
    return _after(request, session, number)


def figures(points: Sequence[JobMetric]) -> tuple[dict[str, Any], ...]:
    """Return a job's curves as plotly figures, one a metric, in a fixed order; what the trainer adds comes last."""
    names = sorted(
        {name for point in points for name, value in point.values.items() if isinstance(value, int | float)},
        key=lambda name: (list(_CURVES).index(name) if name in _CURVES else len(_CURVES), name),
    )
    return tuple(_figure(name, points) for name in names if name not in ("step", "seconds"))


def _figure(name: str, points: Sequence[JobMetric]) -> dict[str, Any]:
    pairs = [(point.step, point.values[name]) for point in points if name in point.values]
    return {
        "name": _CURVES.get(name, name.replace("_", " ")),
        "data": [{"x": [x for x, _ in pairs], "y": [y for _, y in pairs], "type": "scatter", "mode": "lines"}],
    }


def _show(request: Request, session: Session, job_id: int) -> Response:
    job = jobs.get(session, job_id)
    points = jobs.metrics(session, job_id)
    result = tuple((k, v if isinstance(v, str) else json.dumps(v)) for k, v in job.result.items() if k != "url")
    last = points[-1].values if points else {}
    page = JobPage(
        job=_card(job),
        spec=json.dumps(job.spec, indent=2, ensure_ascii=False),
        result=result,
        figures=figures(points),
        latest=tuple(
            (_CURVES.get(k, k.replace("_", " ")), f"{v:.4g}" if isinstance(v, float) else str(v))
            for k, v in last.items()
        ),
    )
    return render(request, "_job.html" if partial(request) else "job.html", page, headers=dict(_HEADERS))


def _after(request: Request, session: Session, job_id: int) -> Response:
    if partial(request):
        return _show(request, session, job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)


def _card(job: Job) -> JobCard:
    url = str(job.result.get("url", ""))
    return JobCard(
        id=job.id,
        kind=job.kind,
        title=job.title,
        state=job.state,
        share=min(max(job.done, 0.0), 1.0),
        status=job.status,
        error=job.error,
        url=url if url.startswith("/") and not url.startswith("//") else "",
        created=job.created_at.strftime("%Y-%m-%d %H:%M UTC"),
        took=_span(job.started_at, job.ended_at),
        cancelling=job.cancel_requested and job.state == JobState.RUNNING,
        pausing=job.pause_requested and job.state == JobState.RUNNING,
    )


def _span(start: datetime | None, end: datetime | None) -> str:
    if start is None:
        return ""
    seconds = int(((end or now()) - start).total_seconds())
    minutes, hours = seconds // 60, seconds // 3600
    return (
        f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
    )
