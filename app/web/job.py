"""The jobs page, and what can be done with a job: cancel, pause, resume, its place. app.web.live shows one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Form, Request
from sqlalchemy.orm import Session
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from app import jobs
from app.catalog import parse_index
from app.errors import BadInput
from app.jobs import MAX_PRIORITY
from app.settings import Settings
from app.tables import JobState
from app.web import live
from app.web.access import EDITOR, GUEST, VIEWER, Who
from app.web.jobcards import JobCard, card, log_lines, places
from app.web.pages import Config, Db, partial, render

router = APIRouter()

_WHOLE = re.compile(r"[+-]?[0-9]{1,9}")


@dataclass(frozen=True)
class JobsPage:
    jobs: tuple[JobCard, ...]
    trainers: int

    @property
    def moving(self) -> bool:
        return any(job.moving for job in self.jobs)

    @property
    def comparable(self) -> bool:
        return sum(job.kind == "train" for job in self.jobs) > 1

    @property
    def stuck(self) -> bool:
        """Jobs wait, and nobody is there to take them up."""
        return self.trainers == 0 and any(job.state == JobState.QUEUED for job in self.jobs)


@router.get("/jobs", dependencies=[VIEWER])
def jobs_page(request: Request, session: Db, settings: Config) -> Response:
    where = places(session, settings)
    cards = tuple(card(job, where) for job in jobs.recent(session))
    page = JobsPage(cards, len(jobs.trainers(session, settings)))
    return render(request, "_jobs.html" if partial(request) else "jobs.html", page)


@router.get("/jobs/{job_id}/log.txt", dependencies=[GUEST])
def log(job_id: str, session: Db) -> Response:
    """The whole log that is kept, as text."""
    job = jobs.get(session, parse_index(job_id))
    text = "\n".join(f"{line.at}  {line.text}" for line in log_lines(session, job.id, jobs.LINES_KEPT))
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


def _after(request: Request, session: Session, settings: Settings, job_id: int) -> Response:
    if partial(request):
        return render(request, "_job.html", live.head_part(request, session, settings, job_id))
    return RedirectResponse(f"/jobs/{job_id}", 303)


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise BadInput(f"{text[:40]!r} is no priority; write a whole number from -{MAX_PRIORITY} to {MAX_PRIORITY}.")
    return int(text)
