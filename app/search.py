"""Text search over labels and explanations across sources. Takes a Session, knows no HTTP.

Every word of the query must occur; the closest texts come first: the query itself, then texts that begin with it,
then those that hold it as it stands, then shorter before longer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, case, func, select
from sqlalchemy.orm import Session

from app.catalog import FeatureRow, like
from app.tables import Explanation, Feature, Source

PAGE_SIZE = 20
MAX_WORDS = 12


@dataclass(frozen=True)
class Hit:
    """An explanation that fits, with the feature it is of."""

    explanation_id: int
    model_id: str
    source: str
    feature: FeatureRow
    text: str
    method: str
    author: str
    closeness: float
    """1 for the query itself, less for what merely holds its words."""

    @property
    def path(self) -> str:
        return f"/{self.model_id}/{self.source}/{self.feature.index}"


@dataclass(frozen=True)
class Results:
    query: str
    hits: tuple[Hit, ...]
    total: int
    offset: int

    @property
    def next_offset(self) -> int | None:
        end = self.offset + len(self.hits)
        return end if end < self.total else None


def labels(
    session: Session,
    query: str,
    *,
    model_id: str = "",
    sources: Collection[str] = (),
    offset: int = 0,
    limit: int = PAGE_SIZE,
) -> Results:
    """Return explanations that hold every word of the query, `limit` from `offset`, out of one model or all."""
    query = " ".join(query.replace("\0", " ").split())[:500]
    if not query:
        return Results("", (), 0, 0)
    where = [like(Explanation.text, word) for word in query.split()[:MAX_WORDS]]
    if model_id:
        where.append(Source.model_id == model_id)
    if sources:
        where.append(Source.name.in_(sources))
    total = session.execute(
        select(func.count()).select_from(Explanation).join(Source, Source.id == Explanation.source_id).where(*where)
    ).scalar_one()
    closeness = _closeness(query)
    rows = session.execute(
        select(Explanation, Source.model_id, Source.name, Feature, closeness.label("closeness"))
        .join(Source, Source.id == Explanation.source_id)
        .join(Feature, (Feature.source_id == Explanation.source_id) & (Feature.index == Explanation.index))
        .where(*where)
        .order_by(closeness.desc(), func.length(Explanation.text), Source.model_id, Source.layer, Explanation.index)
        .limit(limit)
        .offset(offset)
    ).all()
    hits = tuple(_hit(explanation, model, name, feature, close) for explanation, model, name, feature, close in rows)
    return Results(query, hits, total, offset)


def _closeness(query: str) -> ColumnElement[float]:
    text, wanted = func.lower(Explanation.text), query.lower()
    return case(
        (text == wanted, 1.0),
        (func.substr(text, 1, len(wanted)) == wanted, 0.9),
        (like(Explanation.text, query), 0.8),
        else_=0.5,
    )


def _hit(explanation: Explanation, model_id: str, source: str, feature: Feature, closeness: float) -> Hit:
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
    )
