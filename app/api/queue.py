"""The queue for programs: /api/jobs lists, shows, stops, resumes and orders jobs, with their curves and logs."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from app import jobs, readings
from app.catalog import parse_index
from app.errors import BadInput
from app.readings import Reader, Readings
from app.settings import Settings
from app.tables import Job, JobState
from app.web.access import EDITOR, VIEWER, Who
from app.web.pages import Config, Db

router = APIRouter(prefix="/jobs", tags=["jobs"])

_EXAMPLE: dict[str, Any] = {
    "id": 7,
    "kind": "train",
    "title": "Train smollm2-135m-instruct/12-demo: TopK k=32, d_sae=4,096",
    "state": "running",
    "done": 0.42,
    "status": "step 1,000 of 2,532, explained variance 0.801",
    "error": "",
    "owner": "ada",
    "priority": 0,
    "runNext": False,
    "place": None,
    "executor": "gpu-box-0",
    "spec": {"model": "smollm2-135m-instruct", "d_sae": 4096},
    "result": {},
    "url": "/jobs/7",
    "createdAt": "2026-11-25T15:11:00+00:00",
    "startedAt": "2026-11-25T15:11:02+00:00",
    "endedAt": None,
}


class JobView(BaseModel):
    """A job as it is now."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    id: int
    kind: str
    title: str
    state: JobState
    done: float
    status: str
    error: str
    owner: str
    priority: int
    runNext: bool
    place: int | None
    """Its place among the jobs that wait, 1 for the next; null when it does not wait."""
    executor: str
    spec: dict[str, Any]
    result: dict[str, Any]
    url: str
    createdAt: datetime
    startedAt: datetime | None
    endedAt: datetime | None


class JobList(BaseModel):
    jobs: list[JobView]
    trainers: list[str]
    """Trainers that are alive."""


class Place(BaseModel):
    """Where a waiting job should stand: a priority among its owner's jobs, or before all others."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"priority": 10}, {"next": True}]})

    priority: int | None = Field(
        None, ge=-jobs.MAX_PRIORITY, le=jobs.MAX_PRIORITY, description="Higher ones start first; 0 is usual."
    )
    next: bool = Field(False, description="Run it before everything else that waits.")


class Line(BaseModel):
    id: int
    at: datetime
    level: str
    text: str


class Lines(BaseModel):
    """A part of a log; ask again with `after` = `last` for what came since."""

    lines: list[Line]
    last: int
    ended: bool


class Curves(BaseModel):
    """The points of a job's curves in the order of their steps."""

    points: list[dict[str, Any]]


@router.get("", dependencies=[VIEWER])
def list_jobs(
    session: Db,
    settings: Config,
    state: JobState | None = None,
    kind: Annotated[str, Query(max_length=40)] = "",
    owner: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
) -> JobList:
    """List jobs, newest first, and the trainers that are alive."""
    found = jobs.recent(session, limit, offset, kind=kind, state=state or "", owner=owner)
    places = _places(session, settings)
    alive = [beat.executor for beat in jobs.trainers(session, settings)]
    return JobList(jobs=[view(job, places) for job in found], trainers=alive)


@router.get("/{job_id}", dependencies=[VIEWER])
def show(job_id: str, session: Db, settings: Config) -> JobView:
    """Return one job."""
    return now_of(session, settings, _number(job_id))


@router.post("/{job_id}/cancel", dependencies=[EDITOR])
def cancel(job_id: str, who: Who, session: Db, settings: Config) -> JobView:
    """Cancel a job: at once when it waits, within seconds when it runs. One that has ended stays as it is."""
    jobs.cancel(session, jobs.to_change(session, who, _number(job_id)).id)
    session.commit()
    return now_of(session, settings, _number(job_id))


@router.post("/{job_id}/pause", dependencies=[EDITOR])
def pause(job_id: str, who: Who, session: Db, settings: Config) -> JobView:
    """Stop a job so that it can be resumed where it stopped."""
    jobs.pause(session, jobs.to_change(session, who, _number(job_id)).id)
    session.commit()
    return now_of(session, settings, _number(job_id))


@router.post("/{job_id}/resume", dependencies=[EDITOR])
def resume(job_id: str, who: Who, session: Db, settings: Config) -> JobView:
    """Queue a failed, cancelled or paused job again; it goes on after the last step that was done."""
    jobs.resume(session, jobs.to_change(session, who, _number(job_id)).id)
    session.commit()
    return now_of(session, settings, _number(job_id))


@router.post("/{job_id}/priority", dependencies=[EDITOR])
def place(job_id: str, body: Place, who: Who, session: Db, settings: Config) -> JobView:
    """Change where a waiting job stands in the queue."""
    number = jobs.to_change(session, who, _number(job_id)).id
    if body.priority is None and not body.next:
        raise BadInput("Say either a priority or next: true.")
    if body.priority is not None:
        jobs.set_priority(session, number, body.priority)
    if body.next:
        jobs.run_next(session, number)
    session.commit()
    return now_of(session, settings, number)


@router.get("/{job_id}/logs", dependencies=[VIEWER])
def logs(
    job_id: str,
    session: Db,
    after: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=jobs.LINES_KEPT)] = 200,
) -> Lines:
    """Return the newest lines of a job's log, those after a line's id where one is given."""
    job = jobs.get(session, _number(job_id))
    found = jobs.lines(session, job.id, after, limit)
    return Lines(
        lines=[Line(id=line.id, at=line.at, level=line.level, text=line.text) for line in found],
        last=found[-1].id if found else after,
        ended=JobState(job.state).ended,
    )


@router.get("/{job_id}/metrics", dependencies=[VIEWER])
def metrics(
    request: Request, job_id: str, session: Db, points: Annotated[int | None, Query(ge=4, le=100_000)] = None
) -> Curves:
    """Return a job's curves: one point a step, with the values that the trainer wrote there.

    With `points` each curve is thinned to about so many, as the job's page draws it: of neighbours the smallest and the
    largest stay, and both ends. A step then has the values of those curves that keep it.
    """
    job = jobs.get(session, _number(job_id))
    if points is None:
        return Curves(points=[{"step": point.step, **point.values} for point in jobs.metrics(session, job.id)])
    reader: Reader = request.app.state.readings
    return Curves(points=_thinned(reader.read(session, job.id), points))


def _thinned(columns: Readings, n: int) -> list[dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for name, column in columns.items():
        kept = readings.thinned(column, n)
        for step, value in zip(kept.steps.tolist(), kept.values.tolist(), strict=True):
            found.setdefault(step, {"step": step})[name] = value
    return [found[step] for step in sorted(found)]


def view(job: Job, places: dict[int, int]) -> JobView:
    return JobView(
        id=job.id,
        kind=job.kind,
        title=job.title,
        state=JobState(job.state),
        done=min(max(job.done, 0.0), 1.0),
        status=job.status,
        error=job.error,
        owner=job.owner,
        priority=job.priority,
        runNext=job.run_next,
        place=places.get(job.id),
        executor=job.executor,
        spec=job.spec,
        result=job.result,
        url=f"/jobs/{job.id}",
        createdAt=job.created_at,
        startedAt=job.started_at,
        endedAt=job.ended_at,
    )


def now_of(session: Session, settings: Settings, job_id: int) -> JobView:
    """A job as it is now, with its place among those that wait."""
    return view(jobs.get(session, job_id), _places(session, settings))


def _places(session: Session, settings: Settings) -> dict[int, int]:
    return {job_id: place for place, job_id in enumerate(jobs.in_order(session, settings), 1)}


def _number(text: str) -> int:
    return parse_index(text)
