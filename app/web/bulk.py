"""Bulk jobs in the browser: the form that queues one, and the page of what it found."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from pydantic import ValidationError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, RedirectResponse, Response

from app import bulk, catalog, uploads
from app.bulk import Separating
from app.catalog import FeatureRow, ModelEntry, parse_index
from app.errors import AtlasError, BadFile, BadInput, NotFound
from app.settings import Settings
from app.specs import BulkSpec
from app.web.access import EDITOR, VIEWER
from app.web.pages import Config, Db, render
from app.web.problems import Problem, of

router = APIRouter()

_NAME = re.compile(r"[^A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class BulkPage:
    entry: ModelEntry
    values: dict[str, str]
    problem: Problem | None = None
    formats: str = ", ".join(bulk.FORMATS)


@dataclass(frozen=True)
class Found:
    """A separating feature with what the catalog knows of it."""

    score: Separating
    feature: FeatureRow


@dataclass(frozen=True)
class OutcomePage:
    entry: ModelEntry
    source: str
    job_id: int
    facts: tuple[tuple[str, str], ...]
    groups: tuple[str, ...]
    found: tuple[Found, ...]
    files: tuple[tuple[str, int], ...]

    @property
    def path(self) -> str:
        return f"{self.entry.path}/bulk/{self.job_id}"


@router.get("/{model}/bulk", dependencies=[VIEWER])
def bulk_page(request: Request, model: str, session: Db) -> Response:
    return render(request, "bulk.html", BulkPage(catalog.model_entry(session, model), {}))


@router.post("/{model}/bulk", dependencies=[EDITOR])
async def queue(request: Request, model: str, session: Db, settings: Config) -> Response:
    """Store the file, queue the job, and lead to its page."""
    entry = await run_in_threadpool(catalog.model_entry, session, model)
    form = await request.form(max_files=1, max_fields=20)
    values = {name: value for name, value in form.items() if isinstance(value, str)}
    file = form.get("file")
    try:
        if not isinstance(file, UploadFile) or not file.filename:
            raise BadFile(f"No file was sent; choose one that ends in {', '.join(bulk.FORMATS)}.")
        job_id = await run_in_threadpool(_queue, session, settings, entry, values, file)
    except AtlasError as error:
        return render(request, "bulk.html", BulkPage(entry, values, of(error)), status=error.status)
    return RedirectResponse(f"/jobs/{job_id}", 303)


@router.get("/{model}/bulk/{job_id}", dependencies=[VIEWER])
def outcome(request: Request, model: str, job_id: str, session: Db, settings: Config) -> Response:
    entry = catalog.model_entry(session, model)
    left = bulk.outcome(session, settings, parse_index(job_id))
    job, spec = left.job, BulkSpec(**left.job.spec)
    if spec.model != entry.card.id:
        raise NotFound(f"Job {job.id} is of {spec.model}, not of {entry.card.id}.")
    source = catalog.source_card(session, spec.model, spec.source)
    rows = catalog.rows(session, source, [s.latent for s in left.separating])
    found = tuple(Found(s, rows.get(s.latent) or FeatureRow(s.latent, "", 0.0, 0.0, "", "")) for s in left.separating)
    page = OutcomePage(
        entry=entry,
        source=source.path,
        job_id=job.id,
        facts=tuple((k.replace("_", " "), _fact(v)) for k, v in job.result.items() if k != "url"),
        groups=tuple(name for name, _ in left.groups),
        found=found,
        files=tuple((name, path.stat().st_size) for name, path in left.files.items()),
    )
    return render(request, "bulk_outcome.html", page)


@router.get("/{model}/bulk/{job_id}/{name}", dependencies=[VIEWER])
def download(model: str, job_id: str, name: str, session: Db, settings: Config) -> Response:
    left = bulk.outcome(session, settings, parse_index(job_id))
    job, files = left.job, left.files
    if name not in files or BulkSpec(**job.spec).model != model:
        raise NotFound(f"Job {job.id} left no file {name[:60]!r}; it has {', '.join(files) or 'none'}.")
    return FileResponse(files[name], filename=f"job-{job.id}-{name}")


def _fact(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _queue(session: Session, settings: Settings, entry: ModelEntry, values: dict[str, str], file: UploadFile) -> int:
    name = _NAME.sub("_", Path(file.filename or "").name)[-80:]
    uploads.sweep(session, settings)
    path = uploads.fresh(settings, name)
    asked = {name: values[name] for name in ("source", "text_column", "label_column", "output") if values.get(name)}
    try:
        with path.open("wb") as out:
            while chunk := file.file.read(2**20):
                out.write(chunk)
        job = bulk.queue(
            session, settings, BulkSpec.model_validate({"model": entry.card.id, "path": str(path), **asked})
        )
        session.commit()
    except ValidationError as error:
        path.unlink(missing_ok=True)
        first = error.errors()[0]
        raise BadInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return job.id
