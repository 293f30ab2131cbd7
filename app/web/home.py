"""The catalog's home, a model's page, and random features."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app import cards, catalog, jobs, lists, search
from app.cards import Shelf
from app.catalog import FeatureRow, ModelEntry, SourceCard
from app.people import Actor
from app.present import Window
from app.web.access import VIEWER, actor_of
from app.web.pages import Config, Db, render
from app.web.search import top_window
from app.web.shelf import Choice

router = APIRouter()


@dataclass(frozen=True)
class HomePage:
    models: tuple[ModelEntry, ...]
    samples: tuple[tuple[SourceCard, FeatureRow, Window | None], ...]
    """A few features of one SAE, each with its strongest example where that can be read."""
    n_features: int
    shelf: Shelf = field(default_factory=Shelf)
    mine: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()
    """What is the reader's own, in team mode: headings with links."""

    @property
    def shown(self) -> tuple[SourceCard, ...]:
        """The SAEs that are chosen."""
        return tuple(s for entry in self.models for s in entry.sources if self.shelf.shows(s))

    @property
    def samples_of(self) -> str:
        """The SAE's name, where there are several it could be."""
        several = sum(len(entry.sources) for entry in self.models) > 1
        return self.samples[0][0].path[1:] if several and self.samples else ""


@router.get("/", dependencies=[VIEWER])
def home(request: Request, session: Db, settings: Config, chosen: Choice) -> Response:
    found = catalog.home(session)
    every = [source for entry in found.models for source in entry.sources]
    shelf = cards.shelf(session, actor_of(request), every, chosen)
    examples = search.examples_of(session, [(source.id, row.index) for source, row in found.samples])
    special = {entry.card.id: frozenset(entry.card.special_token_ids) for entry in found.models}
    samples: list[tuple[SourceCard, FeatureRow, Window | None]] = []
    for source, row in found.samples:
        example = examples.get((source.id, row.index))
        shown = top_window(settings, example, source.model_id, special[source.model_id]) if example else None
        samples.append((source, row, shown))
    return render(
        request,
        "home.html",
        HomePage(found.models, tuple(samples), found.n_features, shelf, _mine(session, actor_of(request))),
    )


def _mine(session: Session, who: Actor | None) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return what somebody looked at lately and starred, their jobs and lists; nothing without accounts."""
    if who is None or who.id is None:
        return ()
    found = (
        ("Looked at lately", [(s.path, s.path[1:]) for s in cards.recent(session, who, 6)]),
        ("Starred", [(s.path, s.path[1:]) for s in cards.starred(session, who, 6)]),
        (
            "Your jobs",
            [(f"/jobs/{job.id}", f"{job.title} ({job.state})") for job in jobs.recent(session, 6, owner=who.name)],
        ),
        ("Your lists", [(own.path, own.name) for own in lists.seen_by(session, who, owned=True)[:6]]),
    )
    return tuple((heading, tuple(links)) for heading, links in found if links)


@router.get("/random", dependencies=[VIEWER])
def random_anywhere(session: Db) -> Response:
    source = catalog.random_source(session)
    return RedirectResponse(f"{source.path}/{catalog.random_feature(session, source)}", 302)
