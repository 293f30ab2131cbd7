"""The search page: labels and explanations by words and meaning, in everything, a model, a set of SAEs or one SAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app import cards, catalog, embeddings, evidence, meaning, present, search
from app.catalog import ModelEntry, SourceCard
from app.corpora import IMPORTED, VOCABULARY, Stream, tokens_dir
from app.labelindex import Index, LabelIndex
from app.present import Window
from app.search import Hit, Results, Scope
from app.settings import Settings
from app.tokens import vocabulary
from app.web.access import EDITOR, VIEWER
from app.web.pages import Config, Db, partial, query, render

router = APIRouter()

EXAMPLE_WIDTH = 8
"""Tokens shown on both sides of the strongest one."""


@dataclass(frozen=True)
class Line:
    """One result: a feature's explanation and its top example, where its text is here."""

    hit: Hit
    example: Window | None


@dataclass(frozen=True)
class SearchPage:
    q: str
    scope: str
    """`model`, `model:set`, `model/source`, or nothing for everything."""
    scopes: tuple[tuple[str, str], ...]
    """What can be chosen, with words."""
    models: tuple[ModelEntry, ...]
    """Models and SAEs whose name holds the query."""
    results: Results
    saes: tuple[SourceCard, ...]
    """SAEs whose tags or description hold the query."""
    lines: tuple[Line, ...]
    note: str
    """Why meaning does not count, or not for all; empty when it does."""
    can_embed: bool
    """Whether asking for the missing vectors helps."""
    reading: bool
    """Labels are being read into the index: what was found is not all yet, and the page asks again."""

    @property
    def here(self) -> str:
        return self._link(self.results.offset or None)

    @property
    def next(self) -> str | None:
        offset = self.results.next_offset
        return None if offset is None else self._link(offset)

    @property
    def previous(self) -> str | None:
        return None if self.results.offset == 0 else self._link(max(self.results.offset - search.PAGE_SIZE, 0) or None)

    def _link(self, offset: int | None) -> str:
        return "/search" + query({"q": self.q, "scope": self.scope, "offset": offset})


@router.get("/search", dependencies=[VIEWER])
def search_page(
    request: Request,
    session: Db,
    settings: Config,
    q: Annotated[str, Query(max_length=500)] = "",
    scope: Annotated[str, Query(max_length=400)] = "",
    model: Annotated[str, Query(max_length=200)] = "",
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
) -> Response:
    scope = scope or model
    labels: LabelIndex = request.app.state.labels
    index = labels.current(session) if q.strip() else None
    results = search.find(session, index, q, scope_of(scope), offset=offset)
    entries = catalog.entries(session)
    note, can_embed = _note(session, index) if q.strip() else ("", False)
    page = SearchPage(
        q=q,
        scope=scope,
        scopes=_scopes(entries),
        models=_named(entries, q) if offset == 0 and not scope else (),
        results=results,
        saes=_described(session, q) if offset == 0 and not scope else (),
        lines=_lines(session, settings, entries, results.hits),
        note=note,
        can_embed=can_embed,
        reading=bool(q.strip()) and index is None,
    )
    return render(request, "_hits.html" if partial(request) else "search.html", page)


@router.post("/search/embed", dependencies=[EDITOR])
def embed(session: Db, settings: Config) -> Response:
    """Ask the trainer for the vectors that are missing."""
    job = embeddings.queue(session, settings)
    session.commit()
    return RedirectResponse(f"/jobs/{job.id}" if job else "/search", 303)


def scope_of(text: str) -> Scope:
    """Read `model`, `model:set`, `model/source` or nothing."""
    model, _, source = text.partition("/")
    if source:
        return Scope(model, sources=(source,))
    model, _, set_name = text.partition(":")
    return Scope(model, set_name)


def _scopes(entries: tuple[ModelEntry, ...]) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, str]] = [("", "everything")]
    for entry in entries:
        found.append((entry.card.id, entry.card.id))
        sets = dict.fromkeys(source.set_name for source in entry.sources)
        found += [(f"{entry.card.id}:{name}", f"{entry.card.id}, set {name}") for name in sets]
        found += [(f"{entry.card.id}/{source.name}", f"{entry.card.id}/{source.name}") for source in entry.sources]
    return tuple(found)


def _named(entries: tuple[ModelEntry, ...], q: str) -> tuple[ModelEntry, ...]:
    """Models with those of their SAEs whose name holds the query; all of them where the model's own does."""
    wanted = q.strip().lower()
    if not wanted:
        return ()
    found: list[ModelEntry] = []
    for entry in entries:
        own = wanted in entry.card.id.lower() or wanted in entry.card.name.lower()
        sources = tuple(s for s in entry.sources if own or wanted in f"{s.name} {s.hook_name} {s.architecture}".lower())
        if own or sources:
            found.append(ModelEntry(entry.card, sources))
    return tuple(found)


def _described(session: Session, q: str) -> tuple[SourceCard, ...]:
    """SAEs of which people say it; those that are called so stand with the models already."""
    wanted = q.strip().lower()
    return tuple(s for s in cards.find(session, q) if wanted not in s.name.lower())


def _note(session: Session, index: Index | None) -> tuple[str, bool]:
    if meaning.directory() is None:
        return f"Found by words only: the embedding model is not installed ({meaning.INSTALL}).", False
    if index is None:
        return (
            "Found by words as they are spelt: labels are being read into the index. This page goes on by itself.",
            False,
        )
    if index.n_vectors == index.n_texts:
        return "", False
    missing = f"{index.n_texts - index.n_vectors:,} of {index.n_texts:,} labels"
    job = embeddings.pending(session)
    if job is not None:
        return f"The meaning of {missing} is not known yet: job {job.id} computes it.", False
    return f"The meaning of {missing} is not known yet.", True


def _lines(
    session: Session, settings: Settings, entries: tuple[ModelEntry, ...], hits: tuple[Hit, ...]
) -> tuple[Line, ...]:
    examples = search.top_examples(session, hits)
    specials = {entry.card.id: frozenset(entry.card.special_token_ids) for entry in entries}
    lines: list[Line] = []
    for hit in hits:
        found = examples.get((hit.source_id, hit.feature.index))
        shown = None
        if found is not None:
            shown = top_window(settings, found, hit.model_id, specials.get(hit.model_id, frozenset()))
        lines.append(Line(hit, shown))
    return tuple(lines)


def top_window(settings: Settings, found: search.Example, model_id: str, special: frozenset[int]) -> Window | None:
    """Return the text around a feature's strongest activation; None for a dead one, or where the corpus is not here."""
    directory = tokens_dir(settings, found.corpus_hash, found.tokenizer_hash)
    unpacked = evidence.unpack(found.blob)
    if not unpacked.top or not (directory / "stream.bin").is_file():
        return None
    example = unpacked.top[0]
    ids = Stream.open(directory).context(example.context, found.context_size, found.bos)
    if found.tokenizer_hash == IMPORTED:
        words, special = vocabulary(directory / VOCABULARY), frozenset()
    else:
        words = catalog.vocabulary_of(settings, model_id)
    return present.window_of(example, ids, words, EXAMPLE_WIDTH, unpacked.max_act, found.bos, special)
