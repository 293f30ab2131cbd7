"""What stands around a feature on its page: explanations, other features, where else to go, what people did with it.

All of it in one query, put together once: a feature's page has ten milliseconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Float,
    Integer,
    String,
    bindparam,
    func,
    literal,
    or_,
    select,
    union_all,
)
from sqlalchemy import cast as cast_sql
from sqlalchemy.orm import Session

from app import visibility
from app.catalog import ExplanationRow, FeatureRow, SourceCard
from app.people import Actor
from app.tables import (
    Bookmark,
    Comment,
    Corpus,
    Explanation,
    Feature,
    FeatureList,
    Harvest,
    HarvestState,
    ListedFeature,
    Model,
    Source,
)
from app.visibility import Reader, Visibility

MAX_LISTS_SHOWN = 8


@dataclass(frozen=True)
class EvidenceChoice:
    """A harvest of a source, for choosing between them."""

    id: int
    corpus: str
    n_tokens: int
    partial: bool


@dataclass(frozen=True)
class People:
    """What people did with a feature: whether who looks kept it, how many comments it has, lists that hold it."""

    path: str
    kept: bool
    n_comments: int
    lists: tuple[tuple[str, str], ...]
    """(id, name) of lists that who looks may see, latest first."""


@dataclass(frozen=True)
class Around:
    """What a feature's page shows besides its record."""

    explanations: tuple[ExplanationRow, ...]
    """Best first."""
    rows: Mapping[int, FeatureRow]
    """Other features of its source, by index."""
    harvests: tuple[EvidenceChoice, ...]
    """All evidence there is of its source."""
    sources: tuple[str, ...]
    """Names of the model's sources, lowest layer first."""
    models: tuple[str, ...]
    people: People | None = None
    """None for a stranger, who is not told what the team does."""


def related(
    session: Session, source: SourceCard, index: int, others: Collection[int], who: Actor | None = None
) -> Around:
    """Return a feature's explanations, the rows of other features of its source, and for somebody who asks, people."""
    return _around(session, source, index, others, who, _related_query(_asks(who)))


def around(
    session: Session, source: SourceCard, index: int, others: Collection[int], who: Actor | None = None
) -> Around:
    """Return what `related` does and where else one may go: other evidence, sources and models."""
    return _around(session, source, index, others, who, _around_query(visibility.reader(session), _asks(who)))


def _around(
    session: Session,
    source: SourceCard,
    index: int,
    others: Collection[int],
    who: Actor | None,
    query: CompoundSelect[*tuple[Any, ...]],
) -> Around:
    path = f"{source.path}/{index}"
    asked = {"source": source.id, "latent": index, "others": sorted(set(others)), "model": source.model_id}
    if who is not None:
        asked |= {"who": who.name, "name": source.name, "path": path}
    found = session.execute(query, asked).all()
    return Around(
        _explanation_rows(found),
        {r.key: FeatureRow(r.key, r.text, r.density, r.max_act, r.method, r.author) for r in found if r.kind == 1},
        tuple(
            EvidenceChoice(r.key, r.text, int(r.density), r.method == HarvestState.PARTIAL)
            for r in sorted(found, key=lambda r: r.key)
            if r.kind == 2
        ),
        tuple(r.text for r in sorted(found, key=lambda r: (r.key, r.text)) if r.kind == 3),
        tuple(sorted(r.text for r in found if r.kind == 4)),
        _people(path, found) if who is not None else None,
    )


def _explanation_rows(found: Sequence[Any]) -> tuple[ExplanationRow, ...]:
    """Return explanations, the one that is the label first: as app.explanations chooses it."""
    ordered = sorted(
        (r for r in found if r.kind == 0), key=lambda r: (r.method == "heuristic", -(r.density or 0), -r.key)
    )
    return tuple(ExplanationRow(r.key, r.text, r.method, r.author, int(r.density or 0)) for r in ordered)


def _people(path: str, found: Sequence[Any]) -> People:
    counts = {r.kind: r.key for r in found if r.kind in (5, 6)}
    return People(path, counts[5] > 0, counts[6], tuple((r.method, r.text) for r in found if r.kind == 7))


def _asks(who: Actor | None) -> bool | None:
    """Tell whether somebody with an account asks, and not the one person without accounts. None is nobody."""
    return None if who is None else who.id is not None


@lru_cache(maxsize=3)
def _related_query(of_team: bool | None) -> CompoundSelect[*tuple[Any, ...]]:
    return _whole([*_explanations_and_rows(), *_by_people(of_team)])


@lru_cache(maxsize=256)
def _around_query(reader: Reader | None, of_team: bool | None) -> CompoundSelect[*tuple[Any, ...]]:
    harvests = (
        select(
            Harvest.id, Corpus.name, Harvest.state, _NOTHING, cast_sql(Harvest.n_tokens, Float), _NO_NUMBER, _kind(2)
        )
        .join(Corpus, Corpus.id == Harvest.corpus_id)
        .where(Harvest.source_id == bindparam("source"))
    )
    sources = select(Source.layer, Source.name, _NOTHING, _NOTHING, _NO_NUMBER, _NO_NUMBER, _kind(3)).where(
        Source.model_id == bindparam("model"), Source.trash_id.is_(None)
    )
    models = select(literal(0, Integer()), Model.id, _NOTHING, _NOTHING, _NO_NUMBER, _NO_NUMBER, _kind(4))
    if reader is not None:
        sources, models = sources.where(visibility.seen(reader, Source)), models.where(visibility.seen(reader, Model))
    return _whole([*_explanations_and_rows(), harvests, sources, models, *_by_people(of_team)])


def _whole(selects: list[Any]) -> CompoundSelect[*tuple[Any, ...]]:
    return union_all(*selects).execution_options(**{visibility.NARROWED: True})


_NOTHING = literal("", String())
_NO_NUMBER = literal(None, Float())


def _kind(number: int) -> ColumnElement[int]:
    return literal(number, Integer())


def _explanations_and_rows() -> list[Any]:
    explanations = select(
        Explanation.id.label("key"),
        Explanation.text.label("text"),
        Explanation.method.label("method"),
        Explanation.author.label("author"),
        cast_sql(Explanation.n_votes, Float()).label("density"),
        _NO_NUMBER.label("max_act"),
        _kind(0).label("kind"),
    ).where(Explanation.source_id == bindparam("source"), Explanation.index == bindparam("latent"))
    features = select(
        Feature.index,
        Feature.label,
        Feature.top_token,
        Feature.top_logit,
        Feature.density,
        Feature.max_act,
        _kind(1),
    ).where(Feature.source_id == bindparam("source"), Feature.index.in_(bindparam("others", expanding=True)))
    return [explanations, features]


def _by_people(of_team: bool | None) -> list[Any]:
    """Return the selects of what people did: by a feature's address, which outlives its SAE."""
    if of_team is None:
        return []
    who, path = bindparam("who"), bindparam("path")
    place = {"model_id": bindparam("model"), "source": bindparam("name"), "index": bindparam("latent")}
    here = [[getattr(table, name) == value for name, value in place.items()] for table in (Bookmark, ListedFeature)]
    kept = select(func.count(), *_blank(5)).select_from(Bookmark).where(Bookmark.who == who, *here[0])
    said = select(func.count(), *_blank(6)).select_from(Comment).where(Comment.subject == path)
    holding = (
        select(FeatureList.name, FeatureList.id)
        .join(ListedFeature, ListedFeature.list_id == FeatureList.id)
        .where(*here[1], FeatureList.trash_id.is_(None))
        .order_by(FeatureList.updated_at.desc())
        .limit(MAX_LISTS_SHOWN)
    )
    if of_team:
        holding = holding.where(or_(FeatureList.owner == who, FeatureList.visibility == Visibility.TEAM))
    held = holding.subquery()
    names = select(literal(0, Integer()), held.c.name, held.c.id, _NOTHING, _NO_NUMBER, _NO_NUMBER, _kind(7))
    return [kept, said, names]


def _blank(kind: int) -> list[Any]:
    return [_NOTHING, _NOTHING, _NOTHING, _NO_NUMBER, _NO_NUMBER, _kind(kind)]
