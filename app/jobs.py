"""Verbs on durable jobs. The row is the request: trainers look for queued rows and hand them to dbos themselves.

So nothing is lost between the catalog and the queue, and the web never opens the job database. The caller commits.

Who is next: the job that was marked to run next; else the owners take turns, the one with the fewest running jobs and
the longest wait first, each with the highest priority and then the oldest of their jobs. A thousand jobs of one owner
so delay another's first by one job at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import case, delete, func, select, update
from sqlalchemy.orm import Session

from app import visibility
from app.errors import BadInput, Busy, Conflict, NotFound
from app.people import Actor
from app.settings import Settings
from app.tables import Beat, Job, JobLine, JobMetric, JobState, Source, now
from app.visibility import Visibility

MAX_PRIORITY = 100
LINES_KEPT = 2_000
"""Lines of a job's log that stay; older ones go."""
LINE_CHARS = 4_000


def submit(
    session: Session, settings: Settings, kind: str, title: str, spec: dict[str, Any], *, private: bool = False
) -> Job:
    """Add a queued job; a trainer takes it up within a second or two of the commit. Raises Busy when too many wait.

    Only its owner sees a private one, and one that is about a private SAE.
    """
    waits = select(func.count()).where(Job.state == JobState.QUEUED)
    with visibility.unlimited(session):
        waiting = session.scalar(waits) or 0
    if waiting >= settings.max_waiting_jobs:
        raise Busy(
            f"{waiting} jobs wait already, {settings.max_waiting_jobs} may. Cancel some or wait for them.",
            retry_after=60,
        )
    owner = settings.owner_name
    own = session.scalar(waits.where(Job.owner == owner)) or 0
    if own >= settings.max_waiting_jobs_per_owner:
        raise Busy(
            f"{own} jobs of {owner} wait already, {settings.max_waiting_jobs_per_owner} of one owner may. "
            "Cancel some or wait for them.",
            retry_after=60,
        )
    job = Job(kind=kind, title=title[:200], spec=spec, result={}, workflow_id="", owner=owner)
    if private or _about_private(session, spec):
        job.visibility = Visibility.PRIVATE
    session.add(job)
    session.flush()
    return job


def hide_about(session: Session, source: Source) -> None:
    """Make private what names an SAE that was made private, whoever asked for it: titles and results tell of it."""
    place = f"{source.model_id}/{source.name}"
    with visibility.unlimited(session):
        seen = select(Job.id, Job.spec, Job.result).where(Job.visibility != Visibility.PRIVATE)
        ids = [
            number
            for number, spec, result in session.execute(seen)
            if (source.name in _named(spec) and _model(spec) == source.model_id)
            or result.get("url") == f"/{place}"
            or place in (result.get("sources") or ())
        ]
        session.execute(update(Job).where(Job.id.in_(ids)).values(visibility=Visibility.PRIVATE, link=""))


def _named(spec: Mapping[str, Any]) -> list[str]:
    """Return the names of SAEs in a spec."""
    named = [spec.get("source"), spec.get("other"), *(spec.get("sources") or ())]
    named += [f.get("source") or f.get("layer") for f in spec.get("features") or () if isinstance(f, Mapping)]
    return [name for name in named if isinstance(name, str)]


def _model(spec: Mapping[str, Any]) -> str:
    model = spec.get("model") or spec.get("modelId")
    return model if isinstance(model, str) else ""


def _about_private(session: Session, spec: Mapping[str, Any]) -> bool:
    """Tell whether a job names an SAE that only its owner sees: its title and results then are theirs too."""
    names, model = _named(spec), _model(spec)
    if not names or not model:
        return False
    private = select(Source.id).where(Source.model_id == model, Source.name.in_(names))
    return session.scalar(private.where(Source.visibility == Visibility.PRIVATE).limit(1)) is not None


def recent(
    session: Session, limit: int = 50, offset: int = 0, *, kind: str = "", state: str = "", owner: str = ""
) -> list[Job]:
    """Return jobs, newest first; of one kind, state or owner where that is given."""
    wanted = select(Job).order_by(Job.id.desc()).limit(limit).offset(offset)
    for column, value in ((Job.kind, kind), (Job.state, state), (Job.owner, owner)):
        wanted = wanted.where(column == value) if value else wanted
    return list(session.scalars(wanted))


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


def to_change(session: Session, who: Actor, job_id: int) -> Job:
    """Return a job that somebody may stop, resume or move. Raises NotFound, or Forbidden for another's."""
    job = get(session, job_id)
    visibility.check_may_change(who, job.owner, f"Job {job_id}")
    return job


def metrics(session: Session, job_id: int) -> list[JobMetric]:
    """Return the points of a job's curves in the order of their steps."""
    return list(session.scalars(select(JobMetric).where(JobMetric.job_id == job_id).order_by(JobMetric.step)))


def points(session: Session, job_id: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (step, values) of a job's curves in the order of the steps, read as they are taken."""
    wanted = select(JobMetric.step, JobMetric.values).where(JobMetric.job_id == job_id).order_by(JobMetric.step)
    yield from session.execute(wanted.execution_options(yield_per=1_000))


def seconds_left(session: Session, job_id: int) -> float | None:
    """Return how long a job still takes, as its newest point says: that is written again while no new one comes."""
    newest = select(JobMetric.values).where(JobMetric.job_id == job_id).order_by(JobMetric.step.desc()).limit(1)
    left = (session.scalar(newest) or {}).get("seconds_left")
    return float(left) if isinstance(left, int | float) else None


def metric_names(session: Session, job_id: int) -> list[str]:
    """Return the names of all values in a job's curves, in the order in which they first come up."""
    return list(dict.fromkeys(name for _, values in points(session, job_id) for name in values))


def harvest_after(session: Session, job: Job, sources: Sequence[str]) -> Job | None:
    """Return the harvest of these SAEs that a training queued."""
    later = select(Job).where(Job.kind == "harvest", Job.id > job.id).order_by(Job.id).limit(100)
    for harvest in session.scalars(later):
        same = harvest.spec.get("model") == job.spec.get("model")
        if same and set(sources) <= set(harvest.spec.get("sources") or ()):
            return harvest
    return None


def cancel(session: Session, job_id: int) -> Job:
    """Cancel a job: at once when queued, at its next report when it runs. An ended job stays as it is."""
    waiting = update(Job).where(Job.id == job_id, Job.state == JobState.QUEUED)
    session.execute(
        waiting.values(state=JobState.CANCELLED, status="Cancelled before it started", ended_at=now(), run_next=False)
    )
    running = update(Job).where(Job.id == job_id, Job.state == JobState.RUNNING)
    session.execute(running.values(cancel_requested=True))
    session.expire_all()
    return get(session, job_id)


def pause(session: Session, job_id: int) -> Job:
    """Stop a job so that it can be resumed: at once when queued, at its next report when it runs."""
    waiting = update(Job).where(Job.id == job_id, Job.state == JobState.QUEUED)
    session.execute(
        waiting.values(state=JobState.PAUSED, status="Paused before it started", ended_at=now(), run_next=False)
    )
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


# The order of the queue ------------------------------------------------------------------------------------------


@dataclass
class _Turn:
    """How far an owner is in the queue."""

    running: int
    active: float
    """When they last had a trainer, in seconds; later ones wait longer."""
    jobs: list[int]
    """Waiting jobs, the next one last."""


def in_order(session: Session, settings: Settings) -> Iterator[int]:
    """Yield the ids of waiting jobs as they will start, were nothing added; those over an owner's limit come last."""
    with visibility.unlimited(session):  # others' jobs take places, whoever asks
        rows = session.execute(
            select(Job.id, Job.owner, Job.run_next)
            .where(Job.state == JobState.QUEUED, Job.workflow_id == "")
            .order_by(Job.priority, Job.id.desc())
        ).all()
        if not rows:
            return
        turns = _turns(session, {row.owner for row in rows})
    first = next((row.id for row in rows if row.run_next and _may_run(settings, turns[row.owner])), None)
    for row in rows:
        if row.id != first:
            turns[row.owner].jobs.append(row.id)
    if first is not None:
        yield first
    start = max(turn.active for turn in turns.values())
    for place in range(sum(len(turn.jobs) for turn in turns.values())):
        waiting = [turn for turn in turns.values() if turn.jobs]
        turn = min(waiting, key=lambda t: (not _may_run(settings, t), t.running, t.active))
        yield turn.jobs.pop()
        turn.running, turn.active = turn.running + 1, start + place + 1


def next_job(session: Session, settings: Settings) -> int | None:
    """Return the waiting job that a free trainer should take, None where none waits or may start."""
    job_id = next(in_order(session, settings), None)
    if job_id is None:
        return None
    owner = get(session, job_id).owner
    return job_id if _may_run(settings, _turns(session, {owner})[owner]) else None


def _turns(session: Session, owners: set[str]) -> dict[str, _Turn]:
    """How many jobs each owner has on trainers, and when one of theirs last was on one."""
    on = (Job.state == JobState.RUNNING) | ((Job.state == JobState.QUEUED) & (Job.workflow_id != ""))
    counted = select(
        Job.owner, func.sum(case((on, 1), else_=0)), func.max(Job.started_at), func.max(Job.ended_at)
    ).where(Job.owner.in_(owners))
    return {
        owner: _Turn(int(running), max((t.timestamp() for t in (started, ended) if t), default=0.0), [])
        for owner, running, started, ended in session.execute(counted.group_by(Job.owner))
    }


def _may_run(settings: Settings, turn: _Turn) -> bool:
    return settings.max_running_jobs_per_owner == 0 or turn.running < settings.max_running_jobs_per_owner


def set_priority(session: Session, job_id: int, priority: int) -> Job:
    """Change a waiting job's priority. Raises Conflict once it has started, BadInput beyond the bounds."""
    if abs(priority) > MAX_PRIORITY:
        raise BadInput(f"A priority of {priority} is out of bounds; it goes from -{MAX_PRIORITY} to {MAX_PRIORITY}.")
    _waiting(session, job_id).priority = priority
    return get(session, job_id)


def run_next(session: Session, job_id: int) -> Job:
    """Put a waiting job before all others. The mark moves: what had it before takes its turn again."""
    job = _waiting(session, job_id)
    with visibility.unlimited(session):
        session.execute(update(Job).where(Job.run_next, Job.id != job_id).values(run_next=False))
    job.run_next = True
    return job


def _waiting(session: Session, job_id: int) -> Job:
    job = get(session, job_id)
    if job.state != JobState.QUEUED:
        raise Conflict(f"Job {job_id} is {job.state}; only the place of a job that waits can be changed.")
    return job


# Logs ------------------------------------------------------------------------------------------------------------


def write_lines(session: Session, lines: Sequence[JobLine]) -> None:
    """Add lines to the logs of their jobs, and drop what is older than the newest LINES_KEPT of each."""
    session.add_all(lines)
    session.flush()
    for job_id in {line.job_id for line in lines}:
        newest = select(JobLine.id).where(JobLine.job_id == job_id).order_by(JobLine.id.desc())
        oldest = session.scalar(newest.offset(LINES_KEPT).limit(1))
        if oldest is not None:
            session.execute(delete(JobLine).where(JobLine.job_id == job_id, JobLine.id <= oldest))


def lines(session: Session, job_id: int, after: int = 0, limit: int = LINES_KEPT) -> list[JobLine]:
    """Return the newest lines of a job's log that come after the one of that id, oldest first."""
    wanted = select(JobLine).where(JobLine.job_id == job_id, JobLine.id > after)
    return list(session.scalars(wanted.order_by(JobLine.id.desc()).limit(limit)))[::-1]


def last_line(session: Session, job_id: int) -> int:
    """Return the id of the newest line of a job's log, 0 where there is none."""
    return session.scalar(select(func.max(JobLine.id)).where(JobLine.job_id == job_id)) or 0


def trainers(session: Session, settings: Settings) -> list[Beat]:
    """Return the trainers that gave a sign of life lately."""
    oldest = now() - timedelta(seconds=settings.takeover_seconds)
    return list(session.scalars(select(Beat).where(Beat.at > oldest, Beat.pid != 0).order_by(Beat.executor)))
