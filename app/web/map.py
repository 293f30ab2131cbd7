"""The map of an SAE: all its features as points that lie close where their directions do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from app import catalog, jobs, maps, saecharts, search
from app.catalog import SourceCard
from app.labelindex import LabelIndex
from app.maps import Cluster, Line, Map
from app.present import Window
from app.saecharts import Thumbnail
from app.tables import Job
from app.web.access import EDITOR, GUEST
from app.web.pages import Config, Db, query, render
from app.web.search import top_window

router = APIRouter()

KIND = "map"
MAX_FOUND = 2_000


@dataclass(frozen=True)
class Group:
    """A cluster with where its features are listed."""

    number: int
    cluster: Cluster
    href: str


@dataclass(frozen=True)
class MapPage:
    source: SourceCard
    drawn: Map | None
    data: str
    """Address of the points."""
    groups: tuple[Group, ...]
    """Largest first."""
    alone: int
    """Features in no cluster."""
    thumbnail: Thumbnail | None
    color: Literal["cluster", "density"]
    q: str
    job: Job | None
    """What is drawing it."""
    around: Line | None = None
    """Drawn around some of the features."""

    @property
    def places(self) -> list[tuple[float, float, int]]:
        """Where clusters' names are written, and how large each is."""
        return [(round(c.x, 4), round(c.y, 4), c.n) for c in self.drawn.clusters] if self.drawn else []

    @property
    def inside(self) -> str:
        """The list of the features inside the line."""
        assert self.around is not None
        return self.source.path + query({"around": f"{self.around.drawn_at}-{self.around.text}"}) + "#all"

    def link(self, color: str) -> str:
        return f"{self.source.path}/map" + query({"color": color if color != "cluster" else "", "q": self.q})


@dataclass(frozen=True)
class Point:
    """What a feature's point says when it is looked at."""

    source: SourceCard
    feature: catalog.FeatureRow
    cluster: str
    example: Window | None


@router.get("/{model}/{source}/map", dependencies=[GUEST])
def map_page(
    request: Request,
    model: str,
    source: str,
    session: Db,
    color: Literal["cluster", "density"] = "cluster",
    q: Annotated[str, Query(max_length=200)] = "",
    around: Annotated[str, Query(max_length=6_000)] = "",
) -> Response:
    found = catalog.source_card(session, model, source)
    drawn = maps.map_of(session, found.id)
    groups: list[Group] = []
    if drawn:
        groups = [Group(i, c, f"{found.path}?cluster={i}") for i, c in enumerate(drawn.clusters)]
        groups.sort(key=lambda group: -group.cluster.n)
    page = MapPage(
        source=found,
        drawn=drawn,
        data=f"{found.path}/map/points?v={maps.version(session, found.id)}",
        groups=tuple(groups),
        alone=int((drawn.cluster == maps.NO_CLUSTER).sum()) if drawn else 0,
        thumbnail=saecharts.thumbnail(drawn) if drawn else None,
        color=color,
        q=q,
        job=None if drawn else _drawing(session, found),
        around=maps.parse_line(around) if around else None,
    )
    return render(request, "map.html", page)


@router.post("/{model}/{source}/map", dependencies=[EDITOR])
def draw(model: str, source: str, session: Db, settings: Config) -> Response:
    """Ask the trainer for the map."""
    found = catalog.source_card(session, model, source)
    if not found.has_weights:
        raise catalog.NoWeights(f"No weights here: browsing only. A map of {found.path[1:]} is drawn from its weights.")
    job = _drawing(session, found)
    if job is None:
        spec = {"model": found.model_id, "source": found.name}
        job = jobs.submit(session, settings, KIND, f"Draw the map of {found.model_id}/{found.name}", spec)
        session.commit()
    return RedirectResponse(f"/jobs/{job.id}", 303)


@router.get("/{model}/{source}/map/points", dependencies=[GUEST])
def points(model: str, source: str, session: Db, v: str = "") -> Response:
    """All points, little-endian: u32 n, then u16 x [n], y [n] over -1..1, cluster [n], then u8 density [n].

    A density byte is 0 for a dead feature and 1..255 over log10 of 1e-6..1. Kept for ever under its version.
    """
    found = catalog.source_card(session, model, source)
    drawn = maps.map_of(session, found.id)
    if drawn is None:
        raise catalog.NotInCatalog(f"{found.path} has no map yet.", [(f"{found.path}/map", "How to make one")])
    place = drawn.places
    densities = catalog.densities(session, found)
    with np.errstate(divide="ignore"):
        level = np.where(densities > 0, np.clip((np.log10(densities) + 6) / 6, 0, 1) * 254 + 1, 0).astype("u1")
    parts = [
        np.array([len(place)], dtype="<u4"),
        np.ascontiguousarray(place[:, 0]),
        np.ascontiguousarray(place[:, 1]),
        drawn.cluster.astype("<u2"),
        level,
    ]
    current = v == maps.version(session, found.id)
    kept = "public, max-age=31536000, immutable" if current else "no-cache"
    body = b"".join(part.tobytes() for part in parts)
    return Response(body, media_type="application/octet-stream", headers={"cache-control": kept})


@router.get("/{model}/{source}/map/found", dependencies=[GUEST])
def found_points(
    request: Request, model: str, source: str, session: Db, q: Annotated[str, Query(max_length=200)] = ""
) -> Response:
    """The features whose explanation fits, best first, for highlighting."""
    here = catalog.source_card(session, model, source)
    labels: LabelIndex = request.app.state.labels
    scope = search.Scope(here.model_id, sources=(here.name,))
    return JSONResponse(search.indices(session, labels.current(session), q, scope, limit=MAX_FOUND))


@router.get("/{model}/{source}/map/{index}", dependencies=[GUEST])
def point(request: Request, model: str, source: str, index: str, session: Db, settings: Config) -> Response:
    """What a point says: label, cluster, top example."""
    record = catalog.feature_record(session, model, source, catalog.parse_index(index))
    drawn = maps.map_of(session, record.source.id)
    number = int(drawn.cluster[record.feature.index]) if drawn else maps.NO_CLUSTER
    shown = None
    if record.blob is not None and record.harvest is not None:
        h = record.harvest
        example = search.Example(record.blob, h.corpus_hash, h.tokenizer_hash, h.context_size, h.bos_token_id)
        shown = top_window(settings, example, record.card.id, frozenset(record.card.special_token_ids))
    cluster = drawn.clusters[number].name if drawn and number != maps.NO_CLUSTER else ""
    return render(request, "_point.html", Point(record.source, record.feature, cluster, shown))


def _drawing(session: Db, source: SourceCard) -> Job | None:
    return jobs.moving(session, KIND, {"model": source.model_id, "source": source.name})
