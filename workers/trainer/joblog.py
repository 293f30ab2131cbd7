"""What the trainer logs about a job, kept in the catalog so that the job's page and the command line show it.

A thread of its own writes: a line logged inside a transaction would otherwise wait for that transaction's own lock.
What is logged in the last moments before a kill -9 is lost here and stands in the trainer's own log only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, cast

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from app import jobs
from app.tables import JobLine

FLUSH_SECONDS = 0.3
WAITING_LINES = 10_000
_OWN = {"event", "job", "level", "timestamp", "process", "trace", "exception", "exc_info"}
"""What a line has a place of its own for, or that says nothing to its reader."""


class JobLog(logging.Handler):
    """Collects records that belong to a job. Bounded: while the database cannot be written, the oldest wait, new go."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        super().__init__()
        self.sessions = sessions
        self.lines: Queue[JobLine] = Queue(WAITING_LINES)
        self.lost = 0
        self.stop = Event()
        self.thread = Thread(target=self._write, name="job log", daemon=True)

    def emit(self, record: logging.LogRecord) -> None:
        given: Any = record.msg
        event = cast(dict[str, Any], given) if isinstance(given, dict) else {"event": record.getMessage()}
        job_id = event.get("job", structlog.contextvars.get_contextvars().get("job"))
        if not isinstance(job_id, int):
            return
        at = datetime.fromtimestamp(record.created, UTC)
        line = JobLine(job_id=job_id, at=at, level=record.levelname.lower(), text=_text(event))
        try:
            self.lines.put_nowait(line)
        except Full:
            self.lost += 1

    def _write(self) -> None:
        while not self.stop.wait(FLUSH_SECONDS):
            self.flush_lines()
        self.flush_lines()

    def flush_lines(self) -> None:
        """Write what waits. Lines that the database refuses are counted, and the next that it takes say how many."""
        waiting: list[JobLine] = []
        try:
            while len(waiting) < jobs.LINES_KEPT:
                waiting.append(self.lines.get_nowait())
        except Empty:
            pass
        if not waiting:
            return
        if self.lost:
            waiting[0].text = f"({self.lost} lines before this one were lost.)\n{waiting[0].text}"
        try:
            with self.sessions.begin() as session:
                jobs.write_lines(session, waiting)
            self.lost = 0
        except SQLAlchemyError:
            # A locked or full database; the same lines stand in the trainer's own log.
            self.lost += len(waiting)


@contextmanager
def recording(sessions: sessionmaker[Session]) -> Generator[JobLog]:
    """Keep what this process logs about jobs while the context lasts."""
    handler = JobLog(sessions)
    root = logging.getLogger()
    root.addHandler(handler)
    handler.thread.start()
    try:
        yield handler
    finally:
        root.removeHandler(handler)
        handler.stop.set()
        handler.thread.join(timeout=5)


def until_written(seconds: float = 5.0) -> None:
    """Wait until what was logged is in the catalog; for a process that is about to end itself."""
    deadline = time.monotonic() + seconds
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, JobLog)]
    while any(not h.lines.empty() for h in handlers) and time.monotonic() < deadline:
        time.sleep(0.05)


def _text(event: dict[str, Any]) -> str:
    """Return one event as a line: its words, then its numbers; a trace below."""
    details = ", ".join(f"{key}={_value(value)}" for key, value in event.items() if key not in _OWN)
    text = f"{event.get('event', '')}  {details}".rstrip()
    trace = str(event.get("trace", event.get("exception", ""))).strip()
    return f"{text}\n{trace}"[: jobs.LINE_CHARS] if trace else text[: jobs.LINE_CHARS]


def _value(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
