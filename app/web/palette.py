"""The command palette: where the words or numbers that were typed may lead. Its keys are in static/palette.js."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import catalog, search
from app.catalog import ModelEntry
from app.labelindex import Index, LabelIndex
from app.web.access import VIEWER
from app.web.pages import Db, query, render

router = APIRouter()

MAX_PLACES, MAX_LABELS = 6, 8
_PLACE = re.compile(r"(?:(?:https?://[^/\s]+)?/?([\w.-]+)/)?([\w.-]+)/([0-9]{1,9})(?:[?#].*)?", re.ASCII)
_PAGES = (
    ("/", "Catalog"),
    ("/search", "Search"),
    ("/random", "Random feature"),
    ("/jobs", "Jobs"),
    ("/corpora", "Corpora"),
    ("/harvests", "Harvests"),
    ("/import", "Import evidence"),
    ("/upload", "Add an SAE"),
    ("/train", "Train an SAE"),
    ("/docs", "JSON API"),
    ("/vectors", "Steering vectors"),
    ("/trash", "Trash"),
)


@dataclass(frozen=True)
class Option:
    """One line of the palette."""

    href: str
    kind: str
    text: str
    about: str = ""


@dataclass(frozen=True)
class Palette:
    q: str
    options: tuple[Option, ...]


@router.get("/palette", dependencies=[VIEWER])
def palette(
    request: Request,
    session: Db,
    q: Annotated[str, Query(max_length=300)] = "",
    here: Annotated[str, Query(max_length=500)] = "",
) -> Response:
    """List places that fit. `here` is the path of the page that asks: a bare number is a feature of its source."""
    q = q.strip()
    entries = catalog.entries(session)
    options = [*_features(entries, q, here), *_places(entries, q, here)]
    if q and not q.isdigit():
        labels: LabelIndex = request.app.state.labels
        options += _labels(session, labels.current(session), q)
    return render(request, "_palette.html", Palette(q, tuple(dict.fromkeys(options))))


def _features(entries: tuple[ModelEntry, ...], q: str, here: str) -> Iterator[Option]:
    """Features by their index in this page's source, or by `source/index` or an address of any."""
    current = here.strip("/").split("/")
    place = _PLACE.fullmatch(q)
    for entry in entries:
        for source in entry.sources:
            if q.isascii() and q.isdigit() and len(q) < 10:
                fits, index = current[:2] == [entry.card.id, source.name], int(q)
            elif place:
                fits, index = place[2] == source.name and place[1] in (None, entry.card.id), int(place[3])
            else:
                return
            if fits and index < source.d_sae:
                yield Option(f"{source.path}/{index}", "feature", f"{source.name}/{index}", entry.card.id)


def _places(entries: tuple[ModelEntry, ...], q: str, here: str) -> list[Option]:
    """Pages, models and sources whose name holds every word."""
    found = [Option(href, "page", text) for href, text in _PAGES]
    for entry in entries:
        found.append(Option(entry.path, "model", entry.card.id, entry.card.name))
        found.append(Option(f"{entry.path}/steer", "page", f"Steer {entry.card.id}"))
        for source in entry.sources:
            found.append(Option(source.path, "SAE", source.name, f"{entry.card.id}, {source.hook_name}"))
            found.append(Option(f"{source.path}/prompt", "page", f"Prompt on {source.name}", entry.card.id))
            found.append(Option(f"{source.path}/random", "page", f"Random feature of {source.name}", entry.card.id))
    words = q.casefold().split()
    fitting = [o for o in found if all(w in f"{o.kind} {o.text} {o.about}".casefold() for w in words)]
    # What belongs to the place one is at comes first.
    return sorted(fitting, key=lambda o: not (here and o.href != "/" and here.startswith(o.href)))[:MAX_PLACES]


def _labels(session: Session, index: Index | None, q: str) -> list[Option]:
    """Labels by their words, as one types. While they are first read, a search waits for them."""
    whole = f"/search{query({'q': q})}"
    if index is None:
        return [Option(whole, "search", f"Search labels for “{q}”", "labels are being read")]
    found = search.find(session, index, q, by_meaning=False, limit=MAX_LABELS)
    options = [Option(h.path, "label", h.text, f"{h.source}/{h.feature.index}") for h in found.hits]
    if found.total > len(options):
        options.append(Option(whole, "search", f"All {found.total:,} labels with “{q}”"))
    return options
