"""Two features, or two SAEs, side by side: `/compare?a=model/source/index&b=...` or `?a=model/source&b=...`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Form, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app import catalog, evidence, jobs, matches, present, saecharts, surroundings, vectors
from app.catalog import ExplanationRow, FeatureRecord, FeatureRow, HarvestCard, SourceCard
from app.corpora import Stream, tokens_dir
from app.errors import BadFile, BadInput
from app.matches import Match
from app.present import FeatureView
from app.saecharts import Overlay
from app.settings import Settings
from app.tables import Job
from app.web.access import EDITOR, VIEWER
from app.web.pages import Config, Db, partial, query, render
from app.web.source import Metric, metrics

router = APIRouter()

KIND = "match"
PAGE_SIZE = 50
ALONE = 0.5
"""A feature whose nearest counterpart is further than this has none, unless the address says otherwise."""
Sort = Literal["index", "cosine"]


@dataclass(frozen=True)
class Side:
    """One feature of a comparison."""

    record: FeatureRecord
    explanations: tuple[ExplanationRow, ...]
    view: FeatureView | None


@dataclass(frozen=True)
class FeaturesPage:
    a: Side
    b: Side
    cosine: float | None
    """Of the two decoder directions; None where they have different lengths or no weights are here."""
    shared: int
    """Output tokens that both promote among their first ten."""

    @property
    def why_no_cosine(self) -> str:
        for side in (self.a, self.b):
            source = side.record.source
            if not source.has_weights:
                return f"Their directions cannot be compared: the weights of {source.name} are not here."
        one, other = self.a.record.source, self.b.record.source
        if one.d_in != other.d_in:
            return f"Their directions cannot be compared: they have {one.d_in} and {other.d_in} numbers."
        return "Their directions cannot be compared: the weights cannot be read."

    @property
    def swapped(self) -> str:
        return "/compare" + query({"a": self.b.record.path[1:], "b": self.a.record.path[1:]})


@dataclass(frozen=True)
class Pair:
    """A feature of A and its nearest in B."""

    feature: FeatureRow
    other: FeatureRow
    cosine: float


@dataclass(frozen=True)
class Pairs:
    """One page of the nearest counterparts."""

    a: SourceCard
    b: SourceCard
    rows: tuple[Pair, ...]
    total: int
    n_alone: int
    sort: Sort
    descending: bool
    below: float | None
    """Only features whose nearest counterpart is further than this."""
    page: int

    @property
    def pages(self) -> int:
        return max(1, -(-self.total // PAGE_SIZE))

    def link(self, **changes: Any) -> str:
        state = {
            "sort": self.sort,
            "descending": self.descending,
            "below": self.below,
            "page": 1,
            **changes,
        }
        return "/compare" + query(
            {
                "a": self.a.path[1:],
                "b": self.b.path[1:],
                "sort": state["sort"] if state["sort"] != "index" else None,
                "descending": "true" if state["descending"] else None,
                "below": state["below"],
                "page": state["page"] if state["page"] != 1 else None,
            }
        )

    def sorting(self, column: str) -> str:
        return self.link(sort=column, descending=not self.descending if self.sort == column else False)

    def order(self, column: str) -> str:
        if self.sort != column:
            return "none"
        return "descending" if self.descending else "ascending"


@dataclass(frozen=True)
class SourcesPage:
    a: SourceCard
    b: SourceCard
    harvests: tuple[HarvestCard | None, HarvestCard | None]
    metrics: tuple[tuple[str, str, str, str], ...]
    """(name, value of A, value of B, what it means)"""
    overlay: Overlay | None
    pairs: Pairs | None
    why_not: str
    """Why the two cannot be matched; empty when they can."""
    job: Job | None

    @property
    def swapped(self) -> str:
        return "/compare" + query({"a": self.b.path[1:], "b": self.a.path[1:]})


@dataclass(frozen=True)
class ChoosePage:
    a: str
    b: str
    sources: tuple[SourceCard, ...]


@router.get("/compare", dependencies=[VIEWER])
def compare(
    request: Request,
    session: Db,
    settings: Config,
    a: Annotated[str, Query(max_length=600)] = "",
    b: Annotated[str, Query(max_length=600)] = "",
    sort: Sort = "index",
    descending: bool = False,
    below: Annotated[str, Query(max_length=20)] = "",
    page: Annotated[int, Query(ge=1, le=10**6)] = 1,
) -> Response:
    if not a.strip() or not b.strip():
        sources = tuple(s for entry in catalog.entries(session) for s in entry.sources)
        return render(request, "choose.html", ChoosePage(a, b, sources))
    one, other = _parts(a), _parts(b)
    if len(one) != len(other):
        raise BadInput(f"{a.strip()[:60]!r} and {b.strip()[:60]!r} cannot be compared: name two features or two SAEs.")
    if len(one) == 3:
        return render(request, "compare_features.html", _features(session, settings, one, other))
    here, there = (catalog.source_card(session, *parts) for parts in (one, other))
    found = matches.match_of(session, here.id, there.id)
    pairs = _pairs(session, here, there, found, sort, descending, _number(below), page) if found else None
    if pairs is not None and partial(request):
        return render(request, "_pairs.html", pairs)
    return render(request, "compare.html", _sources(session, here, there, pairs))


@router.post("/compare", dependencies=[EDITOR])
def match(session: Db, settings: Config, a: Annotated[str, Form()], b: Annotated[str, Form()]) -> Response:
    """Ask the trainer for the nearest features of two SAEs, both ways."""
    here, there = (catalog.source_card(session, *_parts(text)[:2]) for text in (a, b))
    why_not = _why_not(here, there)
    if why_not:
        raise BadInput(why_not)
    job = _matching(session, here, there)
    if job is None:
        spec = {"model": here.model_id, "source": here.name, "other": there.name}
        job = jobs.submit(session, settings, KIND, f"Match {here.model_id}/{here.name} with {there.name}", spec)
        session.commit()
    return RedirectResponse("/compare" + query({"a": here.path[1:], "b": there.path[1:]}), 303)


def _parts(text: str) -> tuple[str, ...]:
    """Read `model/source` or `model/source/index`, also as an address pasted whole."""
    text = text.strip().partition("?")[0].partition("#")[0]
    if "://" in text:
        text = text.partition("://")[2].partition("/")[2]
    parts = tuple(text.strip("/").split("/"))
    if len(parts) not in (2, 3):
        raise BadInput(f"{text[:60]!r} is no feature and no SAE: write model/source/index or model/source.")
    return parts


def _number(text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        raise BadInput(f"{text[:20]!r} is no cosine: write a number such as {ALONE}.") from None
    if not -1 <= value <= 1:
        raise BadInput(f"A cosine lies between -1 and 1; {text[:20]} does not.")
    return value


def _features(session: Session, settings: Settings, one: tuple[str, ...], other: tuple[str, ...]) -> FeaturesPage:
    a, b = (_side(session, settings, parts) for parts in (one, other))
    cosine = _cosine(settings, a.record, b.record)
    promoted = [{logit.token for logit in side.view.positive} if side.view else set[str]() for side in (a, b)]
    return FeaturesPage(a, b, cosine, len(promoted[0] & promoted[1]))


def _side(session: Session, settings: Settings, parts: tuple[str, ...]) -> Side:
    record = catalog.feature_record(session, parts[0], parts[1], catalog.parse_index(parts[2]))
    explanations = surroundings.related(session, record.source, record.feature.index, []).explanations
    harvest = record.harvest
    if record.blob is None or harvest is None:
        return Side(record, explanations, None)
    directory = tokens_dir(settings, harvest.corpus_hash, harvest.tokenizer_hash)
    stream = Stream.open(directory) if (directory / "stream.bin").is_file() else None
    size, bos = harvest.context_size, harvest.bos_token_id
    view = present.feature_view(
        evidence.unpack(record.blob),
        catalog.words_of(settings, record.card.id, harvest),
        {},
        (lambda row: stream.context(row, size, bos)) if stream else None,
        (lambda row, position: stream.title(row, position, size, bos)) if stream else None,
        bos=bos,
        special=record.special_token_ids,
    )
    return Side(record, explanations, view)


def _cosine(settings: Settings, a: FeatureRecord, b: FeatureRecord) -> float | None:
    try:
        rows = [vectors.decoder_row(settings, r.source.sae_hash, r.feature.index) for r in (a, b)]
    except BadFile:
        # The weights may be on another machine; the rest of the page needs none.
        return None
    return float(vectors.cosines(rows[0], rows[1][None])[0]) if rows[0].shape == rows[1].shape else None


def _sources(session: Session, a: SourceCard, b: SourceCard, pairs: Pairs | None) -> SourcesPage:
    cards = [catalog.source_page(session, s.model_id, s.name)[2] for s in (a, b)]
    summaries = [card.summary if card else {} for card in cards]
    overlay = saecharts.overlay(summaries[0], summaries[1], (a.name, b.name))
    why_not = _why_not(a, b)
    job = None if pairs or why_not else _matching(session, a, b)
    return SourcesPage(a, b, (cards[0], cards[1]), _rows(a, b), overlay, pairs, why_not, job)


def _rows(a: SourceCard, b: SourceCard) -> tuple[tuple[str, str, str, str], ...]:
    # Counts of tokens and such stand on each SAE's own page.
    both = [{m.name: m for m in metrics(s.metrics) if m.about} for s in (a, b)]
    none = Metric("", "–", "")
    names = list(dict.fromkeys([*both[0], *both[1]]))
    measured = tuple(
        (name, both[0].get(name, none).value, both[1].get(name, none).value, (both[0].get(name) or both[1][name]).about)
        for name in names
    )
    built = (
        ("architecture", a.architecture, b.architecture, ""),
        ("hook", a.hook_name, b.hook_name, ""),
        ("features", f"{a.d_sae:,}", f"{b.d_sae:,}", ""),
        ("d_in", f"{a.d_in:,}", f"{b.d_in:,}", ""),
    )
    return (*built, *measured)


def _why_not(a: SourceCard, b: SourceCard) -> str:
    if a.id == b.id:
        return "These are the same SAE; choose another for one side."
    for source in (a, b):
        if not source.has_weights:
            return f"The evidence of {source.name} was imported without its weights, and it is these that are compared."
    if a.model_id != b.model_id:
        return f"Features are matched within a model; {a.name} reads {a.model_id} and {b.name} {b.model_id}."
    if a.d_in != b.d_in:
        return f"{a.name} has d_in {a.d_in} and {b.name} {b.d_in}: their decoder directions cannot be compared."
    return ""


def _matching(session: Session, a: SourceCard, b: SourceCard) -> Job | None:
    for one, other in ((a, b), (b, a)):
        job = jobs.moving(session, KIND, {"model": a.model_id, "source": one.name, "other": other.name})
        if job is not None:
            return job
    return None


def _pairs(
    session: Session,
    a: SourceCard,
    b: SourceCard,
    found: Match,
    sort: Sort,
    descending: bool,
    below: float | None,
    page: int,
) -> Pairs:
    nearest = found.indices[:, 0].astype(np.int64)
    cosines = found.cosines[:, 0].astype(np.float64)
    wanted = np.flatnonzero(cosines < below) if below is not None else np.arange(len(cosines))
    if sort == "cosine":
        wanted = wanted[np.argsort(-cosines[wanted] if descending else cosines[wanted], kind="stable")]
    elif descending:
        wanted = wanted[::-1]
    shown = wanted[(page - 1) * PAGE_SIZE : page * PAGE_SIZE].tolist()
    here = catalog.rows(session, a, shown)
    there = catalog.rows(session, b, [int(nearest[i]) for i in shown])
    rows = tuple(
        Pair(here.get(i) or _bare(i), there.get(int(nearest[i])) or _bare(int(nearest[i])), float(cosines[i]))
        for i in shown
    )
    limit = ALONE if below is None else below
    alone = int((cosines < limit).sum())
    return Pairs(a, b, rows, len(wanted), alone, sort, descending, below, page)


def _bare(index: int) -> FeatureRow:
    return FeatureRow(index, "", 0.0, 0.0, "", "")
