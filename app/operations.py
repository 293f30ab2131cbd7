"""How the installation is doing: trainers, queue, disk, errors. Reads the catalog, the data directory and its logs."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import jobs
from app.settings import Settings
from app.tables import Beat, Job, JobState, now

LEAST_FREE_BYTES = 2**28
"""Free disk below which writes are about to fail."""
MAX_LOG_BYTES = 2**18
"""Of the end of each log that is searched for errors."""
KINDS = {"models": "models", "saes": "SAEs", "corpora": "corpora", "jobs": "jobs", "activations": "kept activations"}
SIZES_KEPT_SECONDS = 60.0

_CONSOLE = re.compile(r"^(\S+) \[(error|critical|warning) *\] (.*)$")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Trainer:
    executor: str
    host: str
    pid: int
    alive: bool
    silent_seconds: float
    job_id: int | None


@dataclass(frozen=True)
class Queue:
    states: dict[str, int]
    """State -> number of jobs, every state named."""
    waiting: dict[str, int]
    """Kind -> number of queued jobs."""
    oldest_seconds: float
    """How long the job that waits longest has waited; 0 when none does."""


@dataclass(frozen=True)
class Part:
    """Bytes on disk of one kind of thing."""

    name: str
    n_bytes: int


@dataclass(frozen=True)
class Mistake:
    """An error or warning from a log."""

    at: str
    process: str
    level: str
    text: str


def trainers(session: Session, settings: Settings) -> list[Trainer]:
    """Return every trainer that ever gave a sign of life and did not leave, the silent ones too."""
    alive = {beat.executor for beat in jobs.trainers(session, settings)}
    moment = now()
    return [
        Trainer(b.executor, b.host, b.pid, b.executor in alive, (moment - b.at).total_seconds(), b.job_id)
        for b in session.scalars(select(Beat).where(Beat.pid != 0).order_by(Beat.executor))
    ]


def queue(session: Session) -> Queue:
    found = session.execute(select(Job.state, func.count()).group_by(Job.state)).all()
    waiting = select(Job.kind, func.count(), func.min(Job.id)).where(Job.state == JobState.QUEUED).group_by(Job.kind)
    kinds = session.execute(waiting).all()
    oldest = session.scalar(select(func.min(Job.created_at)).where(Job.state == JobState.QUEUED))
    age = 0.0 if oldest is None else (now() - oldest).total_seconds()
    states = dict.fromkeys((str(state) for state in JobState), 0) | {row[0]: row[1] for row in found}
    return Queue(states, {row[0]: row[1] for row in kinds}, max(age, 0.0))


def free_bytes(settings: Settings) -> int:
    return shutil.disk_usage(settings.data_dir).free


class Sizes:
    """Bytes of each kind of thing on disk, counted again after a minute: walking many files takes its time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._at = -SIZES_KEPT_SECONDS
        self._parts: tuple[Part, ...] = ()

    def parts(self) -> tuple[Part, ...]:
        if time.monotonic() - self._at >= SIZES_KEPT_SECONDS:
            root = self._settings.data_dir
            kinds = [Part(name, _size(root / folder)) for folder, name in KINDS.items()]
            databases = sum(path.stat().st_size for path in root.glob("*.sqlite*"))
            rest = [Part("databases here", databases), Part("logs", _size(root / "logs"))]
            self._parts = (*kinds, *rest)
            self._at = time.monotonic()
        return self._parts


def mistakes(settings: Settings, limit: int = 30) -> list[Mistake]:
    """Return the latest errors and warnings of the logs in the data directory, newest first."""
    found = [mistake for path in sorted((settings.data_dir / "logs").glob("*.log")) for mistake in _mistakes(path)]
    return sorted(found, key=lambda mistake: mistake.at, reverse=True)[:limit]


def _mistakes(path: Path) -> Iterator[Mistake]:
    with path.open("rb") as log:
        log.seek(max(path.stat().st_size - MAX_LOG_BYTES, 0))
        lines = log.read(MAX_LOG_BYTES).decode("utf-8", "replace").splitlines()
    for line in lines:
        if line.startswith("{"):
            mistake = _from_json(line, path.stem)
        else:
            match = _CONSOLE.match(_COLOURS.sub("", line))
            mistake = Mistake(match[1], path.stem, match[2], match[3].strip()[:500]) if match else None
        if mistake is not None:
            yield mistake


def _from_json(line: str, process: str) -> Mistake | None:
    try:
        row = json.loads(line)
        if row["level"] not in ("warning", "error", "critical"):
            return None
        rest = {k: v for k, v in row.items() if k not in ("level", "timestamp", "event", "process", "exception")}
        last = str(row.get("exception", "")).strip().splitlines()[-1:]
        words = [str(row["event"]), *(f"{key}={value}" for key, value in rest.items()), *last]
        return Mistake(str(row["timestamp"]), process, row["level"], " ".join(words)[:500])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files, of each once however many names it has."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for at, _, names in os.walk(folder, followlinks=False):
        for name in names:
            try:
                facts = os.stat(os.path.join(at, name))
            except OSError:
                continue
            if (facts.st_dev, facts.st_ino) not in seen:
                seen.add((facts.st_dev, facts.st_ino))
                total += facts.st_size
    return total
