"""Search over labels and explanations across sources. Takes a Session, knows no HTTP.

With the index in memory (app.labelindex) words may be misspelt and the meaning counts: `find`. Without it SQL answers
by words alone: `labels`. There every word of the query must occur; the closest texts come first: the query itself, then
texts that begin with it, then those that hold it as it stands, then shorter before longer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from sqlalchemy import ColumnElement, Select, case, func, select, tuple_
from sqlalchemy.orm import Session

from app import meaning, visibility
from app.catalog import FeatureRow, like
from app.labelindex import Index
from app.tables import Corpus, Evidence, Explanation, Feature, Harvest, Source

PAGE_SIZE = 20
MAX_WORDS = 12


@dataclass(frozen=True)
class Scope:
    """Where is searched: everything, a model, a set of its SAEs, or SAEs by name."""

    model_id: str = ""
    set_name: str = ""
    sources: tuple[str, ...] = ()

    def conditions(self) -> list[ColumnElement[bool]]:
        where: list[ColumnElement[bool]] = []
        if self.model_id:
            where.append(Source.model_id == self.model_id.replace("\0", ""))
        if self.set_name:
            where.append(Source.set_name == self.set_name.replace("\0", ""))
        if self.sources:
            where.append(Source.name.in_([name.replace("\0", "") for name in self.sources]))
        return where


@dataclass(frozen=True)
class Hit:
    """A feature with the one of its explanations that fits best."""

    explanation_id: int
    model_id: str
    source: str
    feature: FeatureRow
    text: str
    method: str
    author: str
    closeness: float
    """1 for the query itself, less for what merely holds its words, 0 for what only means something similar."""
    cosine: float | None = None
    """Of its meaning with the query's; None where the meaning was not looked at."""
    source_id: int = 0

    @property
    def label(self) -> str:
        """The feature's label, where that is another text than the one that fits."""
        return self.feature.label if self.feature.label != self.text else ""

    @property
    def path(self) -> str:
        return f"/{self.model_id}/{self.source}/{self.feature.index}"


@dataclass(frozen=True)
class Results:
    query: str
    hits: tuple[Hit, ...]
    total: int
    offset: int
    by_meaning: bool = False
    """Whether meaning counted, and not words alone."""

    @property
    def next_offset(self) -> int | None:
        end = self.offset + len(self.hits)
        return end if end < self.total else None


def find(
    session: Session,
    index: Index | None,
    query: str,
    scope: Scope | None = None,
    *,
    by_meaning: bool = True,
    offset: int = 0,
    limit: int = PAGE_SIZE,
) -> Results:
    """Return the features whose explanations fit a query best, each once, with the one that fits it best.

    By words with typos and, unless that is not wanted, by meaning; by SQL without an index.
    """
    query, scope = _clean(query), scope or Scope()
    if index is None or not query:
        return labels(
            session,
            query,
            model_id=scope.model_id,
            set_name=scope.set_name,
            sources=scope.sources,
            offset=offset,
            limit=limit,
        )
    where = scope.conditions()
    limited = bool(where) or visibility.hides_saes(session)
    sources = session.scalars(select(Source.id).where(*where)).all() if limited else None
    vector = _vector(query) if by_meaning and index.n_vectors else None
    found = index.find(query, vector, sources)
    ids = found.ids[offset : offset + limit].tolist()
    hits = _hits_by_id(session, ids)
    shown = tuple(
        _hit(*hits[key], float(found.words[offset + n]), None if vector is None else float(found.cosines[offset + n]))
        for n, key in enumerate(ids)
        if key in hits
    )
    return Results(query, shown, len(found.ids), offset, vector is not None)


def indices(session: Session, index: Index | None, query: str, scope: Scope, limit: int) -> list[int]:
    """Return the features whose explanations fit, best first, each once."""
    query = _clean(query)
    if not query:
        return []
    if index is None:
        found = labels(session, query, model_id=scope.model_id, sources=scope.sources, limit=limit).hits
        return list(dict.fromkeys(hit.feature.index for hit in found))
    sources = session.scalars(select(Source.id).where(*scope.conditions())).all()
    ids = index.find(query, _vector(query) if index.n_vectors else None, sources).ids[:limit].tolist()
    rows = session.execute(select(Explanation.id, Explanation.index).where(Explanation.id.in_(ids)))
    of = {row[0]: row[1] for row in rows}
    return list(dict.fromkeys(of[key] for key in ids if key in of))


def labels(
    session: Session,
    query: str,
    *,
    model_id: str = "",
    set_name: str = "",
    sources: Collection[str] = (),
    offset: int = 0,
    limit: int = PAGE_SIZE,
) -> Results:
    """Return the closest explanation of each feature that holds every word of the query, `limit` from `offset`."""
    query = _clean(query)
    if not query:
        return Results("", (), 0, 0)
    where = [like(Explanation.text, word) for word in query.split()[:MAX_WORDS]]
    where += Scope(model_id, set_name, tuple(sources)).conditions()
    closeness = _closeness(query)
    order = closeness.desc(), func.length(Explanation.text)
    place = func.row_number().over(
        partition_by=(Explanation.source_id, Explanation.index), order_by=(*order, Explanation.id)
    )
    fitting = select(Explanation.id, place.label("place")).join(Source, Source.id == Explanation.source_id)
    ranked = fitting.where(*where).subquery()
    best = (Explanation.id == ranked.c.id) & (ranked.c.place == 1)
    features = select(Explanation.source_id, Explanation.index).join(Source, Source.id == Explanation.source_id)
    total = session.execute(select(func.count()).select_from(features.where(*where).distinct().subquery())).scalar_one()
    rows = session.execute(
        _statement(closeness.label("closeness"))
        .join(ranked, best)
        .order_by(*order, Source.model_id, Source.layer, Explanation.index)
        .limit(limit)
        .offset(offset)
    ).all()
    hits = tuple(_hit(explanation, model, name, feature, close) for explanation, model, name, feature, close in rows)
    return Results(query, hits, total, offset)


@dataclass(frozen=True)
class Example:
    """Where the strongest example of a hit lies: its packed evidence and the corpus it is from."""

    blob: bytes
    corpus_hash: str
    tokenizer_hash: str
    context_size: int
    bos: int | None


def top_examples(session: Session, hits: Sequence[Hit]) -> dict[tuple[int, int], Example]:
    """Return the evidence of hits by (source id, index), in one query."""
    return examples_of(session, [(hit.source_id, hit.feature.index) for hit in hits])


def examples_of(session: Session, features: Collection[tuple[int, int]]) -> dict[tuple[int, int], Example]:
    """Return the evidence of features named by (source id, index), in one query."""
    wanted = sorted(set(features))
    if not wanted:
        return {}
    rows = session.execute(
        select(Source.id, Evidence.index, Evidence.blob, Corpus.hash, Harvest)
        .join(Harvest, Harvest.id == Source.harvest_id)
        .join(Corpus, Corpus.id == Harvest.corpus_id)
        .join(Evidence, Evidence.harvest_id == Harvest.id)
        .where(tuple_(Source.id, Evidence.index).in_(wanted))
    )
    return {
        (row[0], row[1]): Example(row[2], row[3], row[4].tokenizer_hash, row[4].context_size, row[4].bos_token_id)
        for row in rows
    }


def _clean(query: str) -> str:
    return " ".join(query.replace("\0", " ").split())[:500]


@lru_cache(maxsize=256)
def _vector(query: str) -> meaning.Vectors | None:
    """The query's meaning; kept, since pages and typing ask for the same again."""
    encoder = meaning.encoder()
    return None if encoder is None else np.asarray(encoder.embed([query])[0])


def _statement(*more: ColumnElement[Any]) -> Select[*tuple[Any, ...]]:
    return (
        select(Explanation, Source.model_id, Source.name, Feature, *more)
        .join(Source, Source.id == Explanation.source_id)
        .join(Feature, (Feature.source_id == Explanation.source_id) & (Feature.index == Explanation.index))
    )


def _hits_by_id(session: Session, ids: Collection[int]) -> dict[int, tuple[Explanation, str, str, Feature]]:
    rows = session.execute(_statement().where(Explanation.id.in_(ids))).all()
    return {row[0].id: (row[0], row[1], row[2], row[3]) for row in rows}


def _closeness(query: str) -> ColumnElement[float]:
    text, wanted = func.lower(Explanation.text), query.lower()
    return case(
        (text == wanted, 1.0),
        (func.substr(text, 1, len(wanted)) == wanted, 0.9),
        (like(Explanation.text, query), 0.8),
        else_=0.5,
    )


def _hit(
    explanation: Explanation,
    model_id: str,
    source: str,
    feature: Feature,
    closeness: float,
    cosine: float | None = None,
) -> Hit:
    return Hit(
        explanation_id=explanation.id,
        model_id=model_id,
        source=source,
        feature=FeatureRow(
            feature.index, feature.label, feature.density, feature.max_act, feature.top_token, feature.top_logit
        ),
        text=explanation.text,
        method=explanation.method,
        author=explanation.author,
        closeness=closeness,
        cosine=cosine,
        source_id=explanation.source_id,
    )
