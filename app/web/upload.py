"""The page that adds an SAE: its files stream to disk as they come, are judged, stored, and checked on real text."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, RedirectResponse, Response

from app import catalog, formats, harvests, hub, validations, visibility, weights
from app.catalog import ModelEntry
from app.errors import AtlasError, BadFile, BadInput
from app.settings import Settings
from app.visibility import Visibility
from app.web.access import EDITOR, VIEWER
from app.web.multipart import Form, closing, full_in_words, wants_json
from app.web.pages import Config, Db, render
from app.web.problems import Problem, of
from app.web.sharing import WORDS

router = APIRouter()

PATH = "/upload"
_MAX_FILES = 64
_KEPT = (".json", ".safetensors", ".npz", "ae.pt")
_NAMED_ONLY = (".pt", ".pth", ".pkl", ".bin", ".ckpt")
"""Their bytes are dropped as they come; the name is kept, so that the refusal can say what was given."""
_FOLDERS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,99}")
_SEEN_BY = (Visibility.TEAM, Visibility.PRIVATE)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class UploadPage:
    models: tuple[ModelEntry, ...]
    model: str
    set_name: str
    hook: str
    folder: str
    formats: tuple[tuple[str, str], ...]
    """Name and files of each."""
    limit: int
    choices: tuple[tuple[str, str], ...]
    """Who may see it, in words; none on a server without accounts."""
    seen_by: str
    problem: Problem | None = None


@router.get(PATH, dependencies=[VIEWER])
def upload_page(
    request: Request, session: Db, settings: Config, model: Annotated[str, Query(max_length=200)] = ""
) -> Response:
    return render(request, "upload.html", _page(session, settings, {"model": model}))


@router.post(PATH, dependencies=[EDITOR])
async def upload(request: Request, session: Db, settings: Config) -> Response:
    """Store the SAE and lead to its page; scripts that ask for JSON get its address."""
    home = settings.data_dir / "saes"
    home.mkdir(parents=True, exist_ok=True)
    fields: dict[str, str] = {}
    try:
        with full_in_words(home), tempfile.TemporaryDirectory(dir=home, prefix=".upload-") as scratch:
            files = _Files(Path(scratch))
            form = Form(
                fields,
                files.place,
                max_bytes=settings.max_sae_bytes,
                setting="SAE_ATLAS_MAX_SAE_BYTES",
                what="SAE",
                max_files=_MAX_FILES,
            )
            await form.read(request)
            where = "/".join(filter(None, (fields.get("folder", "").strip(), files.folder)))
            path = await run_in_threadpool(_add, session, settings, Path(scratch), fields, where)
    except AtlasError as error:
        headers = closing(error)
        if wants_json(request):
            return JSONResponse({"error": error.message, "message": error.message}, error.status, headers)
        page = await run_in_threadpool(_page, session, settings, fields, of(error))
        return render(request, "upload.html", page, status=error.status, headers=headers)
    return JSONResponse({"url": path}) if wants_json(request) else RedirectResponse(path, 303)


class _Files:
    """Where the files of an SAE go, and the folders they came from."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._names: set[str] = set()
        self.folder = ""
        """Names of the folders that the files lay in, as the browser tells them: some formats say their hook there."""

    def place(self, folders: list[str], name: str) -> Path | None:
        if not _NAME.fullmatch(name) or not name.endswith((*_KEPT, *_NAMED_ONLY)):
            return None
        if name in self._names:
            raise BadInput(f"{name} was sent twice; choose the folder of one SAE.")
        self._names.add(name)
        self.folder = self.folder or "/".join(part for part in folders[:8] if _FOLDERS.fullmatch(part))
        path = self._directory / name
        if name.endswith(_KEPT):
            return path
        path.touch()
        return None


def _add(session: Session, settings: Settings, directory: Path, fields: dict[str, str], where: str) -> str:
    """Judge, store and catalogue what was uploaded, ask for its check, and return its address."""
    set_name = harvests.check_set_name(fields.get("set_name", ""))
    _seen_by(session, fields.get("visibility", "").strip())
    card = catalog.model_entry(session, fields.get("model", "")).card
    hook = fields.get("hook", "").strip()
    if not any(directory.iterdir()):
        raise BadFile(f"No SAE was sent; choose its {weights.CONFIG} and {weights.WEIGHTS}, or the folder of both.")
    session.rollback()  # reading the files may take minutes; no transaction waits for that
    try:
        with formats.in_saelens_format(directory, settings, formats.Hints(where, hook)) as found:
            facts = weights.check_sae(found.directory, card.d_model, settings)
            weights.check_fits(facts, card, hook)
            name = f"{facts.layer}-{set_name}"
            if not harvests.held(session, card.id, facts, set_name):
                origin = {"uploaded_as": ", ".join(sorted(path.name for path in directory.iterdir()))[:200]}
                origin |= {"folder": where} if where else {}
                origin |= {"format": found.format, **hub.neuronpedia_id(facts.config)}
                harvests.catalogue_sae(
                    session, settings, facts, model_id=card.id, set_name=set_name, metrics={}, origin=origin
                )
                validations.queue(session, settings, card.id, name)
    except BadFile as error:  # the scratch directory means nothing to anybody
        raise BadFile(error.message.replace(f"{directory}/", "").replace(str(directory), "The upload")) from error
    session.commit()
    return f"/{card.id}/{name}"


def _seen_by(session: Session, asked: str) -> None:
    """Say who sees what the session stores. Raises BadInput for what an upload does not offer."""
    if asked and asked not in _SEEN_BY:
        raise BadInput(f"An SAE that is uploaded is seen by {' or '.join(_SEEN_BY)}; not {asked[:40]!r}.")
    owner, usual = visibility.maker(session)
    visibility.make_for(session, owner, asked or usual)


def _page(session: Session, settings: Settings, fields: dict[str, str], problem: Problem | None = None) -> UploadPage:
    session.rollback()
    return UploadPage(
        models=catalog.entries(session),
        model=fields.get("model", ""),
        set_name=fields.get("set_name") or "sae",
        hook=fields.get("hook", ""),
        folder=fields.get("folder", ""),
        formats=formats.known(),
        limit=settings.max_sae_bytes,
        choices=tuple((value, WORDS[value]) for value in _SEEN_BY) if settings.team else (),
        seen_by=fields.get("visibility", ""),
        problem=problem,
    )
