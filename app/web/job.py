"""The jobs page and a job's page: how far each is, its curves, and ways to cancel and resume it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from sqlalchemy.orm import Session
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from app import harvests, jobs, visibility
from app.catalog import parse_index
from app.errors import BadInput
from app.harvests import Gathered
from app.jobs import MAX_PRIORITY
from app.people import Role
from app.settings import Settings
from app.tables import Job, JobMetric, JobState, now
from app.web.access import EDITOR, GUEST, VIEWER, Who, actor_of
from app.web.guard import CHART_POLICY
from app.web.harvests import address
from app.web.pages import Config, Db, partial, render
from app.web.sharing import Sharing, sharing_of

router = APIRouter()

_CURVES = {
    "loss": "loss",
    "explained_variance": "explained variance",
    "l0": "l0",
    "dead": "dead features",
    "dead_fraction": "dead fraction",
}
_WHOLE = re.compile(r"[+-]?[0-9]{1,9}")
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
    owner: str
    priority: int
    place: int
    """Among the jobs that wait; 0 when it does not."""
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
class LogLine:
    at: str
    level: str
    text: str


@dataclass(frozen=True)
class JobPage:
    job: JobCard
    log: tuple[LogLine, ...]
    """The newest lines, oldest first."""
    spec: str
    result: tuple[tuple[str, str], ...]
    figures: tuple[dict[str, Any], ...]
    latest: tuple[tuple[str, str], ...]
    again: str
    """The form filled in as this job was asked for; nothing where its kind has none."""
    evidence: tuple[Gathered, ...]
    """What it gathered, or has gathered so far."""
    sharing: Sharing | None
    may_change: bool


@router.get("/jobs", dependencies=[VIEWER])
def jobs_page(request: Request, session: Db, settings: Config) -> Response:
    places = _places(session, settings)
    cards = tuple(_card(job, places) for job in jobs.recent(session))
    page = JobsPage(cards, len(jobs.trainers(session, settings)))
    return render(request, "_jobs.html" if partial(request) else "jobs.html", page)


@router.get("/jobs/{job_id}", dependencies=[GUEST])
def job_page(request: Request, job_id: str, session: Db, settings: Config) -> Response:
    return _show(request, session, settings, parse_index(job_id))


@router.get("/jobs/{job_id}/log.txt", dependencies=[GUEST])
def log(job_id: str, session: Db) -> Response:
    """The whole log that is kept, as text."""
    job = jobs.get(session, parse_index(job_id))
    text = "\n".join(f"{line.at}  {line.text}" for line in _log(session, job.id, jobs.LINES_KEPT))
    return PlainTextResponse(f"{text}\n".encode("utf-8", "replace"))


@router.post("/jobs/{job_id}/priority", dependencies=[EDITOR])
def place(
    request: Request,
    job_id: str,
    who: Who,
    session: Db,
    settings: Config,
    priority: Annotated[str, Form()] = "",
    next: Annotated[str, Form()] = "",
) -> Response:
    number = jobs.to_change(session, who, parse_index(job_id)).id
    if next:
        jobs.run_next(session, number)
    else:
        jobs.set_priority(session, number, _whole(priority))
    session.commit()
    return _after(request, session, settings, number)


@router.post("/jobs/{job_id}/cancel", dependencies=[EDITOR])
def cancel(request: Request, job_id: str, who: Who, session: Db, settings: Config) -> Response:
    number = jobs.to_change(session, who, parse_index(job_id)).id
    jobs.cancel(session, number)
    session.commit()
    return _after(request, session, settings, number)


@router.post("/jobs/{job_id}/pause", dependencies=[EDITOR])
def pause(request: Request, job_id: str, who: Who, session: Db, settings: Config) -> Response:
    number = jobs.to_change(session, who, parse_index(job_id)).id
    jobs.pause(session, number)
    session.commit()
    return _after(request, session, settings, number)


@router.post("/jobs/{job_id}/resume", dependencies=[EDITOR])
def resume(request: Request, job_id: str, who: Who, session: Db, settings: Config) -> Response:
    number = jobs.to_change(session, who, parse_index(job_id)).id
    jobs.resume(session, number)
    session.commit()
    return _after(request, session, settings, number)


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


def _show(request: Request, session: Session, settings: Settings, job_id: int) -> Response:
    job = jobs.get(session, job_id)
    points = jobs.metrics(session, job_id)
    result = tuple((k, v if isinstance(v, str) else json.dumps(v)) for k, v in job.result.items() if k != "url")
    last = points[-1].values if points else {}
    page = JobPage(
        job=_card(job, _places(session, settings)),
        log=_log(session, job_id, 200),
        spec=json.dumps(job.spec, indent=2, ensure_ascii=False),
        result=result,
        figures=figures(points),
        latest=tuple(
            (_CURVES.get(k, k.replace("_", " ")), f"{v:.4g}" if isinstance(v, float) else str(v))
            for k, v in last.items()
        ),
        again=_again(job),
        evidence=tuple(harvests.gathered(session, job_id=job.id)) if job.kind == "harvest" else (),
        sharing=sharing_of(request, "job", job),
        may_change=_may_change(request, job),
    )
    return render(request, "_job.html" if partial(request) else "job.html", page, headers=dict(_HEADERS))


def _may_change(request: Request, job: Job) -> bool:
    who = actor_of(request)
    return visibility.may_change(who, job.owner) and who is not None and who.role != Role.VIEWER


def _again(job: Job) -> str:
    if job.kind == "harvest":
        return address(job.spec)
    return f"/train?clone={job.id}" if job.kind == "train" else ""


def _after(request: Request, session: Session, settings: Settings, job_id: int) -> Response:
    if partial(request):
        return _show(request, session, settings, job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303)


def _log(session: Session, job_id: int, limit: int) -> tuple[LogLine, ...]:
    return tuple(
        LogLine(
            f"{line.at:%Y-%m-%d %H:%M:%S}",
            line.level,
            line.text if line.level == "info" else f"{line.level.upper()} {line.text}",
        )
        for line in jobs.lines(session, job_id, limit=limit)
    )


def _places(session: Session, settings: Settings) -> dict[int, int]:
    return {job_id: place for place, job_id in enumerate(jobs.in_order(session, settings), 1)}


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise BadInput(f"{text[:40]!r} is no priority; write a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}.")
    return int(text)


def _card(job: Job, places: dict[int, int]) -> JobCard:
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
        owner=job.owner,
        priority=job.priority,
        place=places.get(job.id, 0),
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
