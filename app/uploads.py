"""Files that a browser sent and a job will read: data_dir/uploads/{token}-{name}, a file or a directory each."""

from __future__ import annotations

import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import visibility
from app.settings import Settings
from app.tables import Job, JobState

KEPT_SECONDS = 24 * 3600
"""A job that was cancelled or failed can be resumed for so long, if it had not read its upload."""


def home(settings: Settings) -> Path:
    return settings.data_dir / "uploads"


def fresh(settings: Settings, name: str) -> Path:
    """Return a path for an upload; nothing lies there yet."""
    home(settings).mkdir(parents=True, exist_ok=True)
    return home(settings) / f"{secrets.token_hex(6)}-{name}"


def forget(settings: Settings, path: str) -> None:
    """Delete what a browser sent. What lies anywhere else is the user's own."""
    if Path(path).parent == home(settings):
        delete(Path(path))


def delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(session: Session, settings: Settings, older_than: float = KEPT_SECONDS) -> None:
    """Delete uploads that no job will read: those of jobs that ended without reading them, and of broken requests."""
    waiting = (JobState.QUEUED, JobState.RUNNING, JobState.PAUSED)
    with visibility.unlimited(session):  # others' private jobs need their files too
        reading = select(Job.spec).where(Job.kind.in_(("bulk", "corpus", "import")), Job.state.in_(waiting))
        specs = session.scalars(reading).all()
    needed = {str(spec.get("root") or spec.get("path", "")) for spec in specs}
    for path in home(settings).glob("*"):
        with suppress(FileNotFoundError):  # another request may sweep too
            if str(path) not in needed and time.time() - path.stat().st_mtime > older_than:
                delete(path)
