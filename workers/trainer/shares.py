"""Shares of a job: steps that any trainer on the same database and data directory may do.

The job's own trainer walks its steps in order and takes each share unless somebody has it; idle trainers take shares
from the other end. A share is claimed by a row of job_shares. The claim of a trainer that fell silent is taken over;
what a share writes is written whole or not at all and is the same whoever writes it, so that doing one twice is
harmless. The steps of a phase read what all earlier phases wrote.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import groupby

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError

from app.tables import Beat, JobShare, now
from workers.trainer.kinds import JobContext

Work = Callable[[str], None]
_WAIT_SECONDS = 0.2


def phases(steps: Sequence[str]) -> list[list[str]]:
    """Group steps by their first word, in order; previews belong to the leading trainer alone."""
    shared = [step for step in steps if not step.startswith("preview")]
    return [list(group) for _, group in groupby(shared, key=lambda step: step.partition(" ")[0])]


def take(context: JobContext, phases: Sequence[Sequence[str]], step: str, work: Work) -> None:
    """Do a step, unless another trainer does or did. Every earlier phase is complete before."""
    for phase in phases:
        if step in phase:
            break
        _complete(context, phase, work)
    if _claim(context, step):
        work(step)
        _settle(context, step)


def complete(context: JobContext, phases: Sequence[Sequence[str]], work: Work) -> None:
    """Return when all shares are done, by whomever."""
    for phase in phases:
        _complete(context, phase, work)


def help_with(context: JobContext, phases: Sequence[Sequence[str]], work: Work) -> None:
    """Do free shares of the first phase that is not complete, last ones first, and then of the next."""
    for phase in phases:
        for step in reversed(phase):
            context.check()
            if _claim(context, step):
                work(step)
                _settle(context, step)
        if _undone(context, phase):
            return


def counts(context: JobContext, verb: str) -> tuple[int, int]:
    """Return how many shares of a phase are done, and how many trainers work on one."""
    with context.sessions() as session:
        rows = session.execute(
            select(JobShare.done, func.count())
            .where(JobShare.job_id == context.job_id, JobShare.name.startswith(f"{verb} "))
            .group_by(JobShare.done)
        ).all()
    found = {done: n for done, n in rows}  # noqa: C416 - rows are no mapping
    return found.get(True, 0), found.get(False, 0)


def free(context: JobContext, phases: Sequence[Sequence[str]]) -> bool:
    """Tell whether a share of the first incomplete phase is unclaimed."""
    with context.sessions() as session:
        rows = session.execute(select(JobShare.name, JobShare.done).where(JobShare.job_id == context.job_id)).all()
    known = {name: done for name, done in rows}  # noqa: C416 - rows are no mapping
    for phase in phases:
        if any(step not in known for step in phase):
            return True
        if not all(known[step] for step in phase):
            return False
    return False


def forget(context: JobContext) -> None:
    """Delete all claims: the job begins anew."""
    with context.sessions.begin() as session:
        session.execute(delete(JobShare).where(JobShare.job_id == context.job_id))


def _complete(context: JobContext, phase: Sequence[str], work: Work) -> None:
    while undone := _undone(context, phase):
        for step in undone:
            if _claim(context, step):
                work(step)
                _settle(context, step)
        if _undone(context, phase):
            context.check()
            time.sleep(_WAIT_SECONDS)


def _undone(context: JobContext, phase: Sequence[str]) -> list[str]:
    with context.sessions() as session:
        done = set(session.scalars(select(JobShare.name).where(JobShare.job_id == context.job_id, JobShare.done)))
    return [step for step in phase if step not in done]


def _claim(context: JobContext, step: str) -> bool:
    """Take a share that is free, that this trainer left unfinished when it died, or whose trainer fell silent."""
    try:
        with context.sessions.begin() as session:
            session.add(JobShare(job_id=context.job_id, name=step, executor=context.worker))
        return True
    except IntegrityError:
        pass
    with context.sessions.begin() as session:
        share = session.get_one(JobShare, (context.job_id, step))
        if share.done:
            return False
        owner = share.executor
        if owner == context.worker:
            return True
        oldest = now() - timedelta(seconds=context.settings.takeover_seconds)
        alive = session.scalar(select(Beat.at).where(Beat.executor == owner, Beat.at > oldest, Beat.pid != 0))
        if alive is not None:
            return False
        won = session.execute(
            update(JobShare)
            .where(
                JobShare.job_id == context.job_id,
                JobShare.name == step,
                JobShare.executor == owner,
                JobShare.done.is_(False),
            )
            .values(executor=context.worker)
        )
        return getattr(won, "rowcount", 0) == 1


def _settle(context: JobContext, step: str) -> None:
    with context.sessions.begin() as session:
        session.execute(
            update(JobShare).where(JobShare.job_id == context.job_id, JobShare.name == step).values(done=True)
        )
