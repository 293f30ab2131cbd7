"""Checks of an installation: each says what it found and, where something is wrong, what to do. Changes nothing."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy.exc import SQLAlchemyError

from app import db, jobs, supervisor
from app.errors import AtlasError
from app.gpu import Worker
from app.protocol import WorkerStatus
from app.settings import Settings

WANTED_BYTES = 2 * 2**30
"""Free disk below which a training run is likely to fail."""
_WORKER_PACKAGES = ("torch", "transformers", "transformer_lens", "safetensors", "tokenizers", "einops", "jaxtyping")


class Verdict(StrEnum):
    OK = "ok"
    NOTE = "note"
    """Works without it; worth knowing."""
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    name: str
    verdict: Verdict
    text: str
    """What was found and, unless it is ok, what to do."""


def findings(settings: Settings) -> Iterator[Finding]:
    """Yield one finding a check, in the order in which they build on each other."""
    for check in (_python, _packages, _data_dir, _disk, _database, _queue):
        yield _guarded(check, settings)
    settings = supervisor.served_address(settings)
    serving = supervisor.answers(settings)
    yield _web(settings, serving)
    yield _guarded(lambda s: _worker(s, serving), settings, "gpu worker")
    yield _guarded(lambda s: _trainer(s, serving), settings, "trainer")
    yield _chromium(settings)


def _guarded(check: Callable[[Settings], Finding], settings: Settings, name: str = "") -> Finding:
    """A check that fails in a way it did not expect is a finding too."""
    try:
        return check(settings)
    except (AtlasError, SQLAlchemyError, OSError) as error:
        title = name or check.__name__.strip("_").replace("_", " ")
        return Finding(title, Verdict.BROKEN, str(error).splitlines()[0])


def _python(_settings: Settings) -> Finding:
    return Finding("python", Verdict.OK, f"{'.'.join(map(str, sys.version_info[:3]))} at {sys.executable}")


def _packages(_settings: Settings) -> Finding:
    missing = [name for name in _WORKER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        text = (
            f"{', '.join(missing)} missing: pages are served, prompts and jobs are not. pip install 'sae-atlas[worker]'"
        )
        return Finding("packages", Verdict.BROKEN, text)
    return Finding("packages", Verdict.OK, "web and worker packages are installed")


def _data_dir(settings: Settings) -> Finding:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=settings.data_dir) as probe:
        probe.write(b"x")
    return Finding("data directory", Verdict.OK, str(settings.data_dir))


def _disk(settings: Settings) -> Finding:
    free = shutil.disk_usage(settings.data_dir).free
    text = f"{free / 2**30:.1f} GiB free under {settings.data_dir}"
    if free < WANTED_BYTES:
        return Finding(
            "disk", Verdict.BROKEN, f"{text}; training needs about {WANTED_BYTES / 2**30:.0f} GiB. Make room."
        )
    return Finding("disk", Verdict.OK, text)


def _database(settings: Settings) -> Finding:
    engine = db.connect(settings)
    try:
        if db.is_empty(engine):
            return Finding("database", Verdict.NOTE, "empty; `sae-atlas demo` or `sae-atlas serve` sets it up")
        db.check_schema(engine)
    finally:
        engine.dispose()
    return Finding("database", Verdict.OK, f"{engine.url.render_as_string()} has this version's schema")


def _queue(settings: Settings) -> Finding:
    file = settings.data_dir / "jobs.sqlite"
    if not settings.queue_url.startswith("sqlite") or not file.exists():
        return Finding("job queue", Verdict.OK, "the trainer makes it on its first start")
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        text = f"{file} is readable by others (mode {mode:o}). Run: chmod 600 {file}"
        return Finding("job queue", Verdict.BROKEN, text)
    return Finding("job queue", Verdict.OK, f"{file}, private")


def _web(settings: Settings, serving: bool) -> Finding:
    if serving:
        return Finding("web", Verdict.OK, f"answers at {supervisor.url(settings)}")
    return Finding("web", Verdict.NOTE, f"nothing answers at {supervisor.url(settings)}; `sae-atlas serve` starts it")


def _worker(settings: Settings, serving: bool) -> Finding:
    try:
        status = asyncio.run(_worker_status(settings))
    except AtlasError as error:
        if serving:
            log = settings.data_dir / "logs" / "gpu.log"
            return Finding("gpu worker", Verdict.BROKEN, f"{error.message} If it stays so, see {log}.")
        return Finding("gpu worker", Verdict.NOTE, f"not running. {_device(settings)}")
    used, budget = status.used_bytes / 2**30, status.memory_bytes / 2**30
    return Finding("gpu worker", Verdict.OK, f"{status.device}, {status.dtype}, {used:.1f} of {budget:.1f} GiB in use")


async def _worker_status(settings: Settings) -> WorkerStatus:
    worker = Worker(settings)
    try:
        return await worker.status()
    finally:
        await worker.close()


def _device(settings: Settings) -> str:
    """Ask torch in a process of its own, since this one must not import it."""
    command = [sys.executable, "-m", "workers.device"]
    environment = supervisor.environment(settings)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    said = (result.stdout if result.returncode == 0 else result.stderr).strip()
    return said.splitlines()[-1] if said else "Its device is not known: torch cannot be imported."


def _trainer(settings: Settings, serving: bool) -> Finding:
    engine = db.connect(settings)
    try:
        with db.sessions(engine)() as session:
            beats = [] if db.is_empty(engine) else jobs.trainers(session, settings)
    finally:
        engine.dispose()
    if beats:
        ages = [f"{b.executor}, {(datetime.now(UTC) - b.at).total_seconds():.0f} s ago" for b in beats]
        return Finding("trainer", Verdict.OK, f"last sign of life: {'; '.join(ages)}")
    if serving:
        log = settings.data_dir / "logs" / "trainer.log"
        text = f"no sign of life for {settings.takeover_seconds:g} s: jobs wait. See {log}, then restart."
        return Finding("trainer", Verdict.BROKEN, text)
    return Finding("trainer", Verdict.NOTE, "not running; `sae-atlas serve` starts it")


def _chromium(_settings: Settings) -> Finding:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found:
        return Finding("chromium", Verdict.OK, f"{found} (browser tests only)")
    sudo = "" if os.geteuid() == 0 else "sudo "
    text = f"absent; only the browser tests need it: {sudo}apt-get install --no-install-recommends chromium"
    return Finding("chromium", Verdict.NOTE, text)
