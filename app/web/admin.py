"""The admin's page: processes, queue, memory, disk and the latest errors."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import datetime

from fastapi import APIRouter, Request
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app import jobs, operations
from app.errors import AtlasError
from app.protocol import WorkerStatus
from app.settings import Settings
from app.tables import Job, JobState
from app.web.access import ADMIN
from app.web.pages import Config, Gpu, partial, render

router = APIRouter()


@dataclass(frozen=True)
class Process:
    name: str
    state: str
    """`ok`, `silent` or `gone`."""
    about: str
    job_id: int | None = None


@dataclass(frozen=True)
class AdminPage:
    processes: tuple[Process, ...]
    worker: WorkerStatus | None
    worker_error: str
    queue: operations.Queue
    failed: tuple[Job, ...]
    parts: tuple[operations.Part, ...]
    free: int
    database: str
    mistakes: tuple[operations.Mistake, ...]
    has_logs: bool
    at: str

    @property
    def used(self) -> int:
        return sum(part.n_bytes for part in self.parts)

    @property
    def largest(self) -> int:
        return max((part.n_bytes for part in self.parts), default=0) or 1

    @property
    def short_of_disk(self) -> bool:
        return self.free < operations.LEAST_FREE_BYTES


@router.get("/admin", dependencies=[ADMIN])
async def admin(request: Request, worker: Gpu, settings: Config) -> Response:
    """Show how the installation is doing; as a fragment every few seconds while the page is open."""
    status, error = None, ""
    try:
        status = await worker.status()
    except AtlasError as failed:
        error = failed.message
    page = await run_in_threadpool(_page, request, settings, status, error)
    return render(request, "_admin.html" if partial(request) else "admin.html", page)


def _page(request: Request, settings: Settings, status: WorkerStatus | None, error: str) -> AdminPage:
    with request.app.state.sessions() as session:
        processes = _processes(session, settings, status, error)
        queue = operations.queue(session)
        failed = tuple(job for job in jobs.recent(session, 50) if job.state == JobState.FAILED)[:5]
    return AdminPage(
        processes=processes,
        worker=status,
        worker_error=error,
        queue=queue,
        failed=failed,
        parts=request.app.state.sizes.parts(),
        free=operations.free_bytes(settings),
        database=make_url(settings.catalog_url).render_as_string(),
        mistakes=tuple(operations.mistakes(settings)),
        has_logs=any((settings.data_dir / "logs").glob("*.log")),
        at=datetime.now().astimezone().strftime("%H:%M:%S"),
    )


def _processes(session: Session, settings: Settings, status: WorkerStatus | None, error: str) -> tuple[Process, ...]:
    web = Process("web", "ok", f"{socket.gethostname()}, pid {os.getpid()}; the one that answered you")
    gpu = Process("gpu worker", "ok", f"{status.device}, {status.dtype}") if status else None
    trainers = [
        Process(
            f"trainer {t.executor}",
            "ok" if t.alive else "silent",
            f"{t.host}, pid {t.pid}; last sign of life {t.silent_seconds:,.0f} s ago",
            t.job_id,
        )
        for t in operations.trainers(session, settings)
    ]
    missing = [] if trainers else [Process("trainer", "gone", "none runs: jobs wait")]
    return (web, gpu or Process("gpu worker", "gone", error), *trainers, *missing)
