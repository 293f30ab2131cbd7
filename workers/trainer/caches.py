"""Where the activations of training jobs lie, and which caches make room for others.

    {data_dir}/training/{key}/{hook_name}/...     workers.activations' shards, for every job with the same key
                             /used-by-{job_id}    touched by a job when it begins to use them

A cache is deleted when its room is needed and no running job uses it; whoever misses a shard makes it again.
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


def cache_dir(settings: Settings, *parts: object) -> Path:
    """Return the directory of a cache; `parts` are all that its rows depend on but the hook and their number."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
    return settings.data_dir / "training" / digest


def use(context: JobContext, directory: Path, needed: int) -> None:
    """Say that a job uses a cache that will grow to `needed` bytes, and make room for it.

    Raises TooLarge with both numbers.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{_USED}{context.job_id}").touch()
    budget = context.settings.cache_bytes
    if needed > budget:
        raise TooLarge(
            f"Caching the activations takes {needed / 1e9:.1f} GB, the limit is {budget / 1e9:.1f} GB. Lower n_tokens, "
            "choose cache: buffer, or raise SAE_ATLAS_CACHE_BYTES."
        )
    held = {path: _n_bytes(path) for path in directory.parent.iterdir() if path.is_dir() and path != directory}
    busy = _running(context)
    for path in sorted(held, key=_last_use):
        if sum(held.values()) + max(needed, _n_bytes(directory)) <= budget:
            return
        if not busy & {int(mark.name.removeprefix(_USED)) for mark in path.glob(f"{_USED}*")}:
            gone = path.with_name(f".gone-{path.name}")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
            del held[path]


def _running(context: JobContext) -> set[int]:
    with context.sessions() as session:
        return set(session.scalars(select(Job.id).where(Job.state == JobState.RUNNING)))


def _n_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _last_use(directory: Path) -> float:
    return max((mark.stat().st_mtime for mark in directory.glob(f"{_USED}*")), default=0.0)
