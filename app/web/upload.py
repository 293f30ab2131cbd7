"""The page that adds an SAE: its files stream to disk as they come, are judged, stored, and checked on real text.

The body is parsed here rather than by the framework, which would keep the files in memory or in /tmp, unbounded.
"""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, cast

from fastapi import APIRouter, Query, Request
from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, RedirectResponse, Response

from app import catalog, formats, harvests, hub, validations, weights
from app.catalog import ModelEntry
from app.errors import AtlasError, BadFile, BadInput, Full, TooLarge
from app.settings import Settings
from app.web.access import EDITOR, VIEWER
from app.web.pages import Config, Db, render
from app.web.problems import Problem, of

router = APIRouter()

PATH = "/upload"
SLACK_BYTES = 2**22
"""What a body may hold beside the weights: cfg.json, names and boundaries."""
_WRITE_BYTES = 2**20
_MAX_FIELD_BYTES = 1000
_MAX_PARTS = 64
_KEPT = (".json", ".safetensors", ".npz", "ae.pt")
_NAMED_ONLY = (".pt", ".pth", ".pkl", ".bin", ".ckpt")
"""Their bytes are dropped as they come; the name is kept, so that the refusal can say what was given."""
_FOLDERS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,99}")
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
        with _full_in_words(home), tempfile.TemporaryDirectory(dir=home, prefix=".upload-") as scratch:
            form = Form(Path(scratch), fields, settings.max_sae_bytes)
            await form.read(request.headers.get("content-type", ""), request.stream())
            where = "/".join(filter(None, (fields.get("folder", "").strip(), form.folder)))
            path = await run_in_threadpool(_add, session, settings, Path(scratch), fields, where)
    except AtlasError as error:
        # The rest of a body that is too large is not read: the connection ends with the answer.
        headers = {"connection": "close"} if isinstance(error, TooLarge | Full) else {}
        if _wants_json(request):
            return JSONResponse({"error": error.message, "message": error.message}, error.status, headers)
        page = await run_in_threadpool(_page, session, settings, fields, of(error))
        return render(request, "upload.html", page, status=error.status, headers=headers)
    return JSONResponse({"url": path}) if _wants_json(request) else RedirectResponse(path, 303)


@contextmanager
def _full_in_words(home: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise Full(
            f"The server's disk has no room for it ({error.strerror}): {shutil.disk_usage(home).free / 2**20:,.0f} MiB "
            "are free. Nothing was kept; send it again once there is room."
        ) from None


class Form:
    """A multipart body taken apart as it comes: short fields, and files written into a directory."""

    def __init__(self, directory: Path, fields: dict[str, str], max_bytes: int) -> None:
        self._directory = directory
        self._fields = fields
        self._max_bytes = max_bytes
        self._n_bytes = 0
        self._n_parts = 0
        self._header, self._value, self._disposition = b"", b"", b""
        self._field = ""
        self._out: IO[bytes] | None = None
        self._names: set[str] = set()
        self.folder = ""
        """Names of the folders that the files lay in, as the browser tells them: some formats say their hook there."""

    async def read(self, content_type: str, body: AsyncIterator[bytes]) -> None:
        """Read a body to its end. Raises TooLarge in its middle, BadInput for what is no form."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise BadInput("Send the files as multipart/form-data, as the form on /upload does.")
        callbacks = {name: getattr(self, f"_{name}") for name in _EVENTS}
        parser = MultipartParser(options[b"boundary"], cast(Any, callbacks))
        waiting = bytearray()
        try:
            async for chunk in body:
                waiting += chunk
                if len(waiting) >= _WRITE_BYTES:
                    await run_in_threadpool(parser.write, bytes(waiting))
                    waiting.clear()
            await run_in_threadpool(parser.write, bytes(waiting))
            parser.finalize()
        except MultipartParseError as error:
            raise BadInput(f"The upload cannot be read: {error}. Send it again.") from None
        finally:
            if self._out is not None:
                self._out.close()

    def _on_part_begin(self) -> None:
        self._n_parts += 1
        self._disposition = b""
        if self._n_parts > _MAX_PARTS:
            raise BadInput(f"More than {_MAX_PARTS} files were sent; choose the folder of one SAE.")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._field = options.get(b"name", b"").decode("utf-8", "replace")[:100]
        if b"filename" not in options:
            self._fields[self._field] = ""
            return
        self._field = ""
        # A folder's files come with their path; only the last part is a name here.
        *folders, name = re.split(r"[/\\]", options[b"filename"].decode("utf-8", "replace"))
        if not _NAME.fullmatch(name) or not name.endswith((*_KEPT, *_NAMED_ONLY)):
            return
        if name in self._names:
            raise BadInput(f"{name} was sent twice; choose the folder of one SAE.")
        self._names.add(name)
        self.folder = self.folder or "/".join(part for part in folders[:8] if _FOLDERS.fullmatch(part))
        self._out = (self._directory / name).open("wb")
        if not name.endswith(_KEPT):
            self._close()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field:
            self._fields[self._field] += data[start:end].decode("utf-8", "replace")
            if len(self._fields[self._field]) > _MAX_FIELD_BYTES:
                raise BadInput(f"{self._field} is longer than {_MAX_FIELD_BYTES} characters.")
            return
        self._n_bytes += end - start
        if self._n_bytes > self._max_bytes + SLACK_BYTES:
            raise too_large(self._max_bytes)
        if self._out is not None:
            self._out.write(data[start:end])

    def _on_part_end(self) -> None:
        self._field = ""
        self._close()

    def _close(self) -> None:
        if self._out is not None:
            self._out.close()
            self._out = None


_EVENTS = (
    "on_part_begin",
    "on_header_field",
    "on_header_value",
    "on_header_end",
    "on_headers_finished",
    "on_part_data",
    "on_part_end",
)


def too_large(max_bytes: int) -> TooLarge:
    return TooLarge(
        f"The SAE takes more than the {max_bytes:,} bytes that SAE_ATLAS_MAX_SAE_BYTES allows; nothing was kept."
    )


def _add(session: Session, settings: Settings, directory: Path, fields: dict[str, str], where: str) -> str:
    """Judge, store and catalogue what was uploaded, ask for its check, and return its address."""
    set_name = harvests.check_set_name(fields.get("set_name", ""))
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
        problem=problem,
    )


def _wants_json(request: Request) -> bool:
    return request.headers.get("accept", "").startswith("application/json")
