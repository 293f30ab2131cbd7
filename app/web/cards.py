"""An SAE's card: the form for its tags, description and newer version, and its star."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Form, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app import cards, catalog, visibility
from app.catalog import SourceCard
from app.errors import AtlasError, NotFound
from app.people import Actor
from app.web.access import EDITOR, VIEWER, Who
from app.web.pages import Db, render
from app.web.problems import Problem, of

router = APIRouter()
Text = Annotated[str, Form(max_length=4 * cards.MAX_DESCRIPTION)]


@dataclass(frozen=True)
class CardForm:
    source: SourceCard
    tags: str
    description: str
    replaced_by: str
    others: tuple[str, ...]
    """SAEs of the same layer first, then the rest of the model's."""
    most: int = cards.MAX_DESCRIPTION
    problem: Problem | None = None


@router.get("/{model}/{source}/card", dependencies=[EDITOR])
def card_form(request: Request, model: str, source: str, who: Who, session: Db) -> Response:
    found = catalog.source_card(session, model, source)
    visibility.check_may_change(who, found.owner, f"{found.model_id}/{found.name}")
    said = cards.card(session, who, found)
    page = _form(session, who, found, ", ".join(said.note.tags), found.description, found.replaced_by)
    return render(request, "card.html", page)


@router.post("/{model}/{source}/card", dependencies=[EDITOR])
def edit(
    request: Request,
    model: str,
    source: str,
    who: Who,
    session: Db,
    tags: Text = "",
    description: Text = "",
    replaced_by: Text = "",
) -> Response:
    found = catalog.source_card(session, model, source)
    try:
        cards.edit(session, who, model, source, tags, description, replaced_by)
    except NotFound:
        raise
    except AtlasError as error:
        session.rollback()
        page = _form(session, who, found, tags, description, replaced_by, of(error))
        return render(request, "card.html", page, status=error.status)
    session.commit()
    return RedirectResponse(found.path, 303)


@router.post("/{model}/{source}/star", dependencies=[VIEWER])
def star(model: str, source: str, who: Who, session: Db, on: Annotated[bool, Form()] = True) -> Response:
    """Mark it for oneself, or no longer."""
    found = catalog.source_card(session, model, source)
    cards.star(session, who, found, on)
    session.commit()
    return RedirectResponse(f"{found.path}#star", 303)


def _form(
    session: Session,
    who: Actor,
    found: SourceCard,
    tags: str,
    description: str,
    replaced_by: str,
    problem: Problem | None = None,
) -> CardForm:
    entry = catalog.model_entry(session, found.model_id)
    others = sorted((s for s in entry.sources if s.id != found.id), key=lambda s: (s.layer != found.layer, s.name))
    return CardForm(found, tags, description, replaced_by, tuple(s.name for s in others), problem=problem)
