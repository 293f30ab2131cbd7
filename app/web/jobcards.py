"""A job as lists and pages show it, and the lines of its log. Knows no routes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.orm import Session

from app import jobs
from app.settings import Settings
from app.tables import Job, JobState, now


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
class LogLine:
    at: str
    level: str
    text: str


def card(job: Job, places: dict[int, int]) -> JobCard:
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


def places(session: Session, settings: Settings) -> dict[int, int]:
    """Return the places of the jobs that wait, by their ids."""
    return {job_id: place for place, job_id in enumerate(jobs.in_order(session, settings), 1)}


def log_lines(session: Session, job_id: int, limit: int) -> tuple[LogLine, ...]:
    return tuple(
        LogLine(
            f"{line.at:%Y-%m-%d %H:%M:%S}",
            line.level,
            line.text if line.level == "info" else f"{line.level.upper()} {line.text}",
        )
        for line in jobs.lines(session, job_id, limit=limit)
    )


def _span(start: datetime | None, end: datetime | None) -> str:
    if start is None:
        return ""
    seconds = int(((end or now()) - start).total_seconds())
    minutes, hours = seconds // 60, seconds // 3600
    return (
        f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"
    )
