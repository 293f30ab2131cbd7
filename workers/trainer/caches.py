"""Where the activations of training jobs lie, and which caches make room for others.

    {data_dir}/training/{key}/{hook_name}/...     workers.activations' shards, for every job with the same key
                             /used-by-{job_id}    bytes that a job needs there; touched when it begins to use them

A cache is deleted when its room is needed and no running job uses it; whoever misses a shard makes it again. What
running jobs need, shards that are still to come among it, never exceeds the budget: a job that comes later is refused.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from sqlalchemy import select

from app.errors import TooLarge
from app.settings import Settings
from app.tables import Job, JobState
from workers.trainer.kinds import JobContext

_USED = "used-by-"


class NoRoom(TooLarge):
    """Running jobs use the room that a cache needs."""


def cache_dir(settings: Settings, *parts: object) -> Path:
    """Return the directory of a cache; `parts` are all that its rows depend on but the hook and their number."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
    return settings.data_dir / "training" / digest


def use(context: JobContext, directory: Path, needed: int) -> None:
    """Say that a job uses a cache that will grow to `needed` bytes, and make room for it.

    Raises TooLarge, or NoRoom where running jobs use the room, with both numbers.
    """
    budget = context.settings.cache_bytes
    if needed > budget:
        raise TooLarge(
            f"Caching the activations takes {needed / 1e9:.1f} GB, the limit is {budget / 1e9:.1f} GB. Lower n_tokens, "
            "choose cache: buffer, or raise SAE_ATLAS_CACHE_BYTES."
        )
    _make_room(context, directory, needed)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{_USED}{context.job_id}").write_text(str(needed))


def _make_room(context: JobContext, directory: Path, needed: int) -> None:
    """Delete caches that no running job uses, those unused longest first, until what is needed fits."""
    budget, busy = context.settings.cache_bytes, _running(context) - {context.job_id}
    others = [path for path in _caches(directory.parent) if path != directory]
    held = {path: max(_n_bytes(path), _promised(path, busy)) for path in others}
    needed = max(needed, _n_bytes(directory), _promised(directory, busy))
    for path in sorted(held, key=_last_use):
        if sum(held.values()) + needed <= budget:
            return
        if not _users(path) & busy:
            gone = path.with_name(f".gone-{path.name}")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            del held[path]
    if sum(held.values()) + needed > budget:
        raise NoRoom(
            f"Caching the activations takes {needed / 1e9:.1f} GB; of the limit of {budget / 1e9:.1f} GB running jobs "
            f"use {sum(held.values()) / 1e9:.1f} GB. Wait for them, choose cache: buffer, or raise "
            "SAE_ATLAS_CACHE_BYTES."
        )


def _caches(parent: Path) -> list[Path]:
    return [path for path in parent.iterdir() if path.is_dir()] if parent.exists() else []


def _users(directory: Path) -> set[int]:
    return {int(mark.name.removeprefix(_USED)) for mark in directory.glob(f"{_USED}*")}


def _promised(directory: Path, busy: set[int]) -> int:
    """Bytes that running jobs will need there."""
    marks = [directory / f"{_USED}{job_id}" for job_id in _users(directory) & busy]
    return max((int(mark.read_text() or 0) for mark in marks), default=0)


def _running(context: JobContext) -> set[int]:
    with context.sessions() as session:
        return set(session.scalars(select(Job.id).where(Job.state == JobState.RUNNING)))


def _n_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _last_use(directory: Path) -> float:
    return max((mark.stat().st_mtime for mark in directory.glob(f"{_USED}*")), default=0.0)
