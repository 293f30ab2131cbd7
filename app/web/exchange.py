"""Evidence in and out by the browser: the page that imports what is uploaded, and downloads of an SAE's evidence."""

from __future__ import annotations

import re
import tempfile
from collections.abc import AsyncGenerator, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from app import archives, catalog, exchange, harvests, jobs, models, uploads
from app.errors import AtlasError, BadFile, BadInput
from app.exchange import Format
from app.settings import Settings
from app.specs import ImportSpec
from app.web.access import EDITOR, VIEWER
from app.web.multipart import Form, closing, full_in_words, wants_json
from app.web.pages import Config, Db, own_session, render
from app.web.problems import Problem, of

router = APIRouter()

PATH = "/import"
_MAX_FILES = 20_000
_KEPT = (".json", ".jsonl", ".gz", ".zst", ".safetensors")
_UNNAMED = re.compile(r"[^A-Za-z0-9._ -]+")


@dataclass(frozen=True)
class ImportPage:
    model: str
    set_name: str
    limit: int
    archives: tuple[str, ...] = archives.SUFFIXES
    problem: Problem | None = None


@router.get(PATH, dependencies=[VIEWER])
def import_page(request: Request, settings: Config) -> Response:
    return render(request, "import.html", ImportPage("", "", settings.max_import_bytes))


@router.post(PATH, dependencies=[EDITOR])
async def take(request: Request, session: Db, settings: Config) -> Response:
    """Unpack what was sent, see what it is, and queue its import; scripts that ask for JSON get the job's address."""
    values: dict[str, str] = {}
    scratch = uploads.fresh(settings, "import")
    try:
        with full_in_words(settings.data_dir):
            files = _Files(scratch)
            form = Form(
                values,
                files.place,
                max_bytes=settings.max_import_bytes,
                setting="SAE_ATLAS_MAX_IMPORT_BYTES",
                what="import",
                max_files=_MAX_FILES,
            )
            await form.read(request)
            path = await run_in_threadpool(_queue, session, settings, scratch, files, values)
    except AtlasError as error:
        uploads.delete(scratch)
        if wants_json(request):
            return JSONResponse({"error": error.message, "message": error.message}, error.status, closing(error))
        page = ImportPage(
            values.get("model", ""), values.get("set_name", ""), settings.max_import_bytes, problem=of(error)
        )
        return render(request, "import.html", page, status=error.status, headers=closing(error))
    except BaseException:  # a browser that went away leaves nothing behind either
        uploads.delete(scratch)
        raise
    return JSONResponse({"url": path}) if wants_json(request) else RedirectResponse(path, 303)


class _Files:
    """Where the files of an import go: a folder keeps its shape, an archive waits to be unpacked."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.directory = root / "files"
        self.archive: Path | None = None
        self.name = ""

    def place(self, folders: list[str], name: str) -> Path | None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if archives.is_archive(name) and not folders:
            if self.archive is not None:
                raise BadInput("More than one archive was sent; send one.")
            self.name = name
            self.archive = self._root / f"sent-{_UNNAMED.sub('_', name)[-100:]}"
            return self.archive
        if folders and (name.startswith(".") or not name.endswith(_KEPT)):
            return None
        if not name.endswith(_KEPT):
            raise BadFile(
                f"{name[:100]!r} is no part of an import; send a folder, an archive ({', '.join(archives.SUFFIXES)}), "
                "or batch-N.json files."
            )
        path = archives.place(self.directory, "/".join([*folders, name]), "The upload")
        if path.exists():
            raise BadInput(f"{name[:100]!r} was sent twice.")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.name = self.name or (folders[0] if folders else name)
        return path


def _queue(session: Session, settings: Settings, scratch: Path, files: _Files, values: dict[str, str]) -> str:
    model, set_name = values.get("model", "").strip(), values.get("set_name", "").strip()
    if model:
        models.check_id(model)
    if set_name:
        harvests.check_set_name(set_name)
    if not files.name:
        raise BadFile("Nothing was sent; choose a folder or an archive.")
    if files.archive is not None:
        archives.unpack(files.archive, files.directory, settings.max_import_bytes)
        files.archive.unlink()
    spec = ImportSpec(
        path=str(exchange.found_in(files.directory)),
        root=str(scratch),
        uploaded_as=files.name[:200],
        model=model,
        set_name=set_name,
    )
    if (Path(spec.path) / exchange.bundles.MANIFEST).is_file() and (model or set_name):
        raise BadInput("A bundle says itself where it belongs; a model id and a set name are for other formats.")
    uploads.sweep(session, settings)
    job = jobs.submit(session, settings, "import", exchange.title_of(spec), spec.model_dump(mode="json"))
    session.commit()
    return f"/jobs/{job.id}"


@router.get("/{model}/{source}/export/{form}", dependencies=[VIEWER])
def export(request: Request, model: str, source: str, form: Format, session: Db, settings: Config) -> Response:
    """A source with its evidence as a zip, sent while it is written. What cannot be exported is refused before."""
    found = catalog.source_card(session, model, source)
    home = settings.data_dir / "cache"
    home.mkdir(parents=True, exist_ok=True)
    # Asked once with the request's session, so that a refusal is an answer and not a download that breaks off.
    with tempfile.TemporaryDirectory(dir=home, prefix="export-") as probe:
        exchange.files(session, settings, found.model_id, found.name, Path(probe), form, _quiet)
    root = f"{found.model_id}-{found.name}-{form}"

    def body() -> Generator[bytes]:
        with tempfile.TemporaryDirectory(dir=home, prefix="export-") as scratch, own_session(request) as own:
            written = exchange.files(own, settings, found.model_id, found.name, Path(scratch), form, _quiet)
            yield from archives.zipped(root, _sent(Path(scratch), written))

    headers = {"content-disposition": f'attachment; filename="{root}.zip"'}
    return StreamingResponse(_closed(body()), media_type="application/zip", headers=headers)


async def _closed(pieces: Generator[bytes]) -> AsyncGenerator[bytes]:
    """Pass pieces on, and close what makes them also when the browser goes away: its scratch files end at once."""
    try:
        async for piece in iterate_in_threadpool(pieces):
            yield piece
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(pieces.close)


def _sent(scratch: Path, written: Iterator[Path]) -> Iterator[tuple[str, Path]]:
    """Each file with its name, deleted once it is sent."""
    for path in written:
        yield path.relative_to(scratch).as_posix(), path
        path.unlink()


def _quiet(_share: float, _status: str) -> Any:
    pass
