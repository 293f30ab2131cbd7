"""Corpora in the browser: the list with its forms, and one corpus with its documents, exact to the character."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

from app import catalog, corpora, documents, jobs, origins, trash, uploads, visibility
from app.catalog import ModelEntry, NotInCatalog, parse_index
from app.corpora import Tokens, Use
from app.errors import AtlasError, BadFile, BadInput, Conflict
from app.people import Actor
from app.settings import Settings
from app.specs import CorpusSpec
from app.tables import Corpus
from app.web import forms
from app.web.access import EDITOR, VIEWER, Who
from app.web.forms import Field
from app.web.multipart import Form, closing, full_in_words, wants_json
from app.web.pages import Config, Db, render
from app.web.problems import Problem, of

router = APIRouter()

PATH = "/corpora"
SMALL_BYTES = 2**24
"""Uploads up to this size are stored at once; larger ones, and datasets of the hub, by a job."""
_SMALL_PACKED_BYTES = 2**21
DOCUMENTS_PER_PAGE = 50
CHARS_PER_PAGE = 100_000
_START_CHARS = 120
_MAX_FILES = 1_000
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +=,()-]{0,150}")
_SHARED = ("name", "licence", "about", "text_column", "title_column", "source_column", "max_documents", "max_chars")
_HUB = ("dataset", "config", "split")
_LABELS = {
    "text_column": "text column",
    "title_column": "title column",
    "source_column": "source column",
    "max_documents": "documents at most",
    "max_chars": "characters at most",
    "config": "configuration",
}


@dataclass(frozen=True)
class Read:
    """A corpus as one tokenizer reads it, with the models that have that tokenizer."""

    tokens: Tokens
    models: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    corpus: Corpus
    n_bytes: int
    read: tuple[Read, ...]
    uses: tuple[Use, ...]
    origin: tuple[tuple[str, str], ...]
    has_text: bool
    """Its text is here; else what its tokens say is shown."""

    @property
    def path(self) -> str:
        return f"{PATH}/{quote(self.corpus.name, safe='')}"


@dataclass(frozen=True)
class CorporaPage:
    rows: tuple[Row, ...]
    upload: Mapping[str, Field]
    hub: Mapping[str, Field]
    limit: int
    formats: str = documents.FORMATS
    problem: Problem | None = None
    from_hub: bool = False
    """Whether what went wrong is in the form of the hub."""


@dataclass(frozen=True)
class Start:
    """A document in a list."""

    number: int
    title: str
    source: str
    n_chars: int
    text: str


@dataclass(frozen=True)
class CorpusPage:
    row: Row
    documents: tuple[Start, ...]
    page: int
    pages: int
    models: tuple[ModelEntry, ...]
    """Those that can be harvested with it."""
    may_remove: bool = False
    problem: Problem | None = None


@dataclass(frozen=True)
class DocumentPage:
    row: Row
    number: int
    title: str
    source: str
    n_chars: int
    text: str
    part: int = 1
    parts: int = 1
    before: str = field(default="")
    after: str = field(default="")

    @property
    def path(self) -> str:
        return f"{self.row.path}/{self.number}"


@router.get(PATH, dependencies=[VIEWER])
def corpora_page(request: Request, session: Db, settings: Config) -> Response:
    return render(request, "corpora.html", _page(session, settings, {}))


@router.post(PATH, dependencies=[EDITOR])
async def add(request: Request, session: Db, settings: Config) -> Response:
    """Store what was sent, or queue that, and lead there; scripts that ask for JSON get the address."""
    values: dict[str, str] = {}
    errors: dict[str, str] = {}
    scratch = uploads.fresh(settings, "corpus")
    try:
        with full_in_words(settings.data_dir):
            files = _Files(scratch)
            form = Form(
                values,
                files.place,
                max_bytes=settings.max_corpus_bytes,
                setting="SAE_ATLAS_MAX_CORPUS_BYTES",
                what="corpus",
                max_files=_MAX_FILES,
            )
            await form.read(request)
            path = await run_in_threadpool(_add, session, settings, scratch, files.names, values, errors)
    except AtlasError as error:
        uploads.delete(scratch)
        if wants_json(request):
            return JSONResponse({"error": error.message, "message": error.message}, error.status, closing(error))
        page = await run_in_threadpool(_page, session, settings, values, errors, of(error))
        return render(request, "corpora.html", page, status=error.status, headers=closing(error))
    except BaseException:  # a browser that went away leaves nothing behind either
        uploads.delete(scratch)
        raise
    return JSONResponse({"url": path}) if wants_json(request) else RedirectResponse(path, 303)


class _Files:
    """Where the files of a corpus go: beside each other, whatever folders they came from."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.names: list[str] = []

    def place(self, folders: list[str], name: str) -> Path | None:
        # Of a folder only what can be read is kept; a file that was chosen by itself is refused by its name.
        if folders and (not documents.kind_of(name) or name.startswith(".")):
            return None
        if not _FILE_NAME.fullmatch(name) or not documents.kind_of(name):
            raise BadFile(f"{name[:100]!r}: a corpus is {documents.FORMATS}; names have letters, digits and -_.+=,().")
        kept = "-".join([*(re.sub(r"[^A-Za-z0-9_.]+", "_", folder)[:60] for folder in folders[-3:]), name]).lstrip(".-")
        if kept in self.names:
            raise BadInput(f"{name} was sent twice.")
        self._directory.mkdir(exist_ok=True)
        self.names.append(kept)
        return self._directory / kept


def _add(
    session: Session,
    settings: Settings,
    scratch: Path,
    names: list[str],
    values: dict[str, str],
    errors: dict[str, str],
) -> str:
    """Store or queue a corpus and return where to go. What is wrong with single fields is left in `errors`."""
    wanted = {name: value.strip() for name, value in values.items() if name in (*_SHARED, *_HUB)}
    if names:
        usual = documents.plain_name(Path(names[0])) if len(names) == 1 else ""
        wanted = {name: value for name, value in wanted.items() if name not in _HUB}
        wanted |= {"path": str(scratch), "uploaded_as": ", ".join(names)[:1000]}
    else:
        usual = wanted.get("dataset", "").rpartition("/")[2]
    wanted["name"] = wanted.get("name") or usual
    spec, faults = forms.read(CorpusSpec, {name: value for name, value in wanted.items() if value or name == "name"})
    if spec is None:
        errors |= faults
        raise BadInput(
            "Some fields cannot be used: " + " ".join(f"{_LABELS.get(k, k)}: {v}" for k, v in faults.items())
        )
    if not names and not spec.dataset:
        raise BadFile(f"No file was sent; choose {documents.FORMATS}.")
    _check_name(session, spec, errors)
    corpora.check(spec)
    session.rollback()  # storing may take a while; no transaction waits for that
    if names and _is_small(scratch):
        corpus = corpora.add(session, settings, spec)
        session.commit()
        uploads.delete(scratch)
        return f"{PATH}/{quote(corpus.name, safe='')}"
    uploads.sweep(session, settings)
    job = jobs.submit(session, settings, "corpus", corpora.title_of(spec), spec.model_dump(mode="json"))
    session.commit()
    return f"/jobs/{job.id}"


def _check_name(session: Session, spec: CorpusSpec, errors: dict[str, str]) -> None:
    try:
        corpora.check_name(spec.name)
        if any(corpus.name == spec.name for corpus in corpora.corpora(session)):
            raise Conflict(f"There is a corpus {spec.name!r} already; choose another name.")
    except AtlasError as error:
        errors["name"] = error.message
        raise


def _is_small(directory: Path) -> bool:
    packed = [f for f in directory.iterdir() if f.suffix not in (".txt", ".md", ".text", ".jsonl", ".ndjson")]
    total = sum(f.stat().st_size for f in directory.iterdir())
    return total <= SMALL_BYTES and sum(f.stat().st_size for f in packed) <= _SMALL_PACKED_BYTES


@router.get(PATH + "/{name}", dependencies=[VIEWER])
def corpus_page(
    request: Request,
    name: str,
    who: Who,
    session: Db,
    settings: Config,
    page: Annotated[int, Query(ge=1, le=10**9)] = 1,
) -> Response:
    return render(request, "corpus.html", _corpus(session, settings, who, _named(session, name), page))


@router.post(PATH + "/{name}/remove", dependencies=[EDITOR])
def remove(request: Request, name: str, who: Who, session: Db, settings: Config) -> Response:
    """Move to the trash a corpus that no evidence shows; one that some does stays, and its page says whose."""
    corpus = _named(session, name)
    visibility.check_may_change(who, corpus.owner, "This corpus")
    try:
        trash.put_corpus(session, who, corpus.name)
    except Conflict as error:
        return render(
            request, "corpus.html", _corpus(session, settings, who, corpus, 1, of(error)), status=error.status
        )
    session.commit()
    return RedirectResponse(PATH, 303)


@router.get(PATH + "/{name}/{number}", dependencies=[VIEWER])
def document_page(
    request: Request,
    name: str,
    number: str,
    session: Db,
    settings: Config,
    part: Annotated[int, Query(ge=1, le=10**6)] = 1,
) -> Response:
    corpus, n, document = _document(session, settings, name, number)
    row = _row(session, settings, corpus)
    parts = max(-(-len(document.text) // CHARS_PER_PAGE), 1)
    part = min(part, parts)
    shown = DocumentPage(
        row=row,
        number=n,
        title=document.title,
        source=document.source,
        n_chars=len(document.text),
        text=document.text[(part - 1) * CHARS_PER_PAGE : part * CHARS_PER_PAGE],
        part=part,
        parts=parts,
        before=f"{row.path}/{n - 1}" if n else "",
        after=f"{row.path}/{n + 1}" if n + 1 < corpus.n_documents else "",
    )
    return render(request, "document.html", shown)


@router.get(PATH + "/{name}/{number}/text", dependencies=[VIEWER])
def document_text(name: str, number: str, session: Db, settings: Config) -> Response:
    """A document as it is stored, as a download."""
    _, n, document = _document(session, settings, name, number)
    headers = {"content-disposition": f'attachment; filename="document-{n}.txt"'}
    return PlainTextResponse(document.text.encode("utf-8", "replace"), headers=headers)


def _document(session: Session, settings: Settings, name: str, number: str) -> tuple[Corpus, int, documents.Document]:
    corpus, n = _named(session, name), parse_index(number)
    found = next(_documents(session, settings, corpus, n), None) if n < corpus.n_documents else None
    if found is None:
        path = f"{PATH}/{quote(corpus.name, safe='')}"
        raise NotInCatalog(
            f"{corpus.name} has {corpus.n_documents:,} documents, 0 to {corpus.n_documents - 1:,}; there is no {n:,}.",
            [(path, corpus.name)],
        )
    return corpus, n, found


def _documents(session: Session, settings: Settings, corpus: Corpus, first: int) -> Iterator[documents.Document]:
    """The documents from one on: the text where it is here, else what the tokens say."""
    if corpora.has_text(settings, corpus):
        return corpora.documents(settings.corpus_dir(corpus.hash), first)
    found = corpora.readable_tokens(settings, corpus, _tokenizers(session))
    return corpora.decoded(*found, first) if found else iter(())


def _named(session: Session, name: str) -> Corpus:
    try:
        return corpora.corpus_named(session, name)
    except AtlasError as error:
        known = [(f"{PATH}/{quote(c.name, safe='')}", c.name) for c in corpora.corpora(session)[:6]]
        raise NotInCatalog(error.message, [*known, (PATH, "All corpora")]) from None


def _corpus(
    session: Session, settings: Settings, who: Actor, corpus: Corpus, page: int, problem: Problem | None = None
) -> CorpusPage:
    row = _row(session, settings, corpus)
    pages = max(-(-corpus.n_documents // DOCUMENTS_PER_PAGE), 1)
    page = min(page, pages)
    first = (page - 1) * DOCUMENTS_PER_PAGE
    read = itertools.islice(_documents(session, settings, corpus, first), DOCUMENTS_PER_PAGE)
    starts = tuple(
        Start(first + n, d.title, d.source, len(d.text), " ".join(d.text[: 2 * _START_CHARS].split())[:_START_CHARS])
        for n, d in enumerate(read)
    )
    usable = tuple(
        entry
        for entry in catalog.entries(session)
        if any(source.has_weights for source in entry.sources)
        and catalog.has_model_weights(settings, entry.card.id)
        and corpora.can_be_read(settings, corpus, entry.card.tokenizer_hash)
    )
    return CorpusPage(row, starts, page, pages, usable, visibility.may_change(who, corpus.owner), problem)


def _page(
    session: Session,
    settings: Settings,
    values: Mapping[str, str],
    errors: Mapping[str, str] | None = None,
    problem: Problem | None = None,
) -> CorporaPage:
    session.rollback()
    found = corpora.corpora(session)
    by_corpus = corpora.uses(session, *(corpus.id for corpus in found))
    by_tokenizer = _tokenizers(session)
    from_hub = "dataset" in values
    made = [
        forms.fields(
            CorpusSpec, names, values if from_hub == hub else {}, errors if from_hub == hub else {}, labels=_LABELS
        )
        for names, hub in ((_SHARED, False), ((*_HUB, *_SHARED), True))
    ]
    return CorporaPage(
        rows=tuple(_made_row(settings, c, by_tokenizer, by_corpus[c.id]) for c in found),
        upload=made[0],
        hub=made[1],
        limit=settings.max_corpus_bytes,
        problem=problem,
        from_hub=from_hub,
    )


def _row(session: Session, settings: Settings, corpus: Corpus) -> Row:
    return _made_row(settings, corpus, _tokenizers(session), corpora.uses(session, corpus.id)[corpus.id])


def _made_row(settings: Settings, corpus: Corpus, by_tokenizer: Mapping[str, list[str]], uses: list[Use]) -> Row:
    read = corpora.tokens_of(settings, corpus)
    return Row(
        corpus=corpus,
        n_bytes=corpora.n_bytes(settings, corpus),
        read=tuple(Read(tokens, tuple(by_tokenizer.get(tokens.tokenizer_hash, ()))) for tokens in read),
        uses=tuple(uses),
        origin=origins.words(corpus.origin),
        has_text=corpora.has_text(settings, corpus),
    )


def _tokenizers(session: Session) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in catalog.entries(session):
        found.setdefault(entry.card.tokenizer_hash, []).append(entry.card.id)
    return found
