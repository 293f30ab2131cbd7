"""Verbs on durable jobs. The row is the request: trainers look for queued rows and hand them to dbos themselves.

So nothing is lost between the catalog and the queue, and the web never opens the job database. The caller commits.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app.errors import Busy, Conflict, NotFound
from app.settings import Settings
from app.tables import Beat, Job, JobMetric, JobState, now


def submit(session: Session, settings: Settings, kind: str, title: str, spec: dict[str, Any]) -> Job:
    """Add a queued job; a trainer takes it up within a second or two of the commit. Raises Busy when too many wait."""
    waiting = session.scalar(select(func.count()).where(Job.state == JobState.QUEUED)) or 0
    if waiting >= settings.max_waiting_jobs:
        raise Busy(
            f"{waiting} jobs wait already, {settings.max_waiting_jobs} may. Cancel some or wait for them.",
            retry_after=60,
        )
    job = Job(kind=kind, title=title[:200], spec=spec, result={}, workflow_id="")
    session.add(job)
    session.flush()
    return job


def recent(session: Session, limit: int = 50, offset: int = 0) -> list[Job]:
    """Return jobs, newest first."""
    return list(session.scalars(select(Job).order_by(Job.id.desc()).limit(limit).offset(offset)))


def moving(session: Session, kind: str, spec: dict[str, Any]) -> Job | None:
    """Return the newest job of a kind that waits or runs and whose spec holds these values."""
    waiting = select(Job).where(Job.kind == kind, Job.state.in_([JobState.QUEUED, JobState.RUNNING]))
    for job in session.scalars(waiting.order_by(Job.id.desc())):
        if all(job.spec.get(key) == value for key, value in spec.items()):
            return job
    return None


def get(session: Session, job_id: int) -> Job:
    job = session.get(Job, job_id) if 0 < job_id < 2**31 else None
    if job is None:
        raise NotFound(f"No job {job_id}.")
    return job


def metrics(session: Session, job_id: int) -> list[JobMetric]:
    """Return the points of a job's curves in the order of their steps."""
    return list(session.scalars(select(JobMetric).where(JobMetric.job_id == job_id).order_by(JobMetric.step)))


def cancel(session: Session, job_id: int) -> Job:
    """Cancel a job: at once when queued, at its next report when it runs. An ended job stays as it is."""
    waiting = update(Job).where(Job.id == job_id, Job.state == JobState.QUEUED)
    session.execute(waiting.values(state=JobState.CANCELLED, status="Cancelled before it started", ended_at=now()))
    running = update(Job).where(Job.id == job_id, Job.state == JobState.RUNNING)
    session.execute(running.values(cancel_requested=True))
    session.expire_all()
    return get(session, job_id)


def pause(session: Session, job_id: int) -> Job:
    """Stop a job so that it can be resumed: at once when queued, at its next report when it runs."""
    waiting = update(Job).where(Job.id == job_id, Job.state == JobState.QUEUED)
    session.execute(waiting.values(state=JobState.PAUSED, status="Paused before it started", ended_at=now()))
    running = update(Job).where(Job.id == job_id, Job.state == JobState.RUNNING)
    session.execute(running.values(pause_requested=True))
    session.expire_all()
    return get(session, job_id)


def resume(session: Session, job_id: int) -> Job:
    """Queue a failed, cancelled or paused job again; it goes on after the last step that was done."""
    job = get(session, job_id)
    if job.state not in (JobState.FAILED, JobState.CANCELLED, JobState.PAUSED):
        raise Conflict(f"Job {job_id} is {job.state}; only a failed, cancelled or paused job can be resumed.")
    job.state = JobState.QUEUED
    job.workflow_id = ""
    job.cancel_requested = job.pause_requested = False
    job.error = ""
    job.status = "Queued again"
    job.ended_at = None
    return job


def trainers(session: Session, settings: Settings) -> list[Beat]:
    """Return the trainers that gave a sign of life lately."""
    oldest = now() - timedelta(seconds=settings.takeover_seconds)
    return list(session.scalars(select(Beat).where(Beat.at > oldest, Beat.pid != 0).order_by(Beat.executor)))
