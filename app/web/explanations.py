"""What people say a feature means: its explanations with votes and history, the form to say it better, comments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Form, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app import catalog, comments, embeddings, explanations
from app.catalog import FeatureRow, SourceCard
from app.errors import AtlasError, NotFound
from app.explanations import Entry
from app.people import Actor
from app.web.access import EDITOR, VIEWER, Who
from app.web.comments import Talk, talk
from app.web.pages import Config, Db, render
from app.web.problems import Problem, of

router = APIRouter()
_PATH = "/{model}/{source}/{index}/explanations"


@dataclass(frozen=True)
class ExplanationsPage:
    source: SourceCard
    feature: FeatureRow
    now: tuple[Entry, ...]
    before: tuple[Entry, ...]
    text: str = ""
    most: int = explanations.MAX_TEXT
    talk: Talk | None = None
    problem: Problem | None = None

    @property
    def path(self) -> str:
        return f"{self.source.path}/{self.feature.index}"


@router.get(_PATH, dependencies=[VIEWER])
def explanations_page(request: Request, model: str, source: str, index: str, who: Who, session: Db) -> Response:
    return render(request, "explanations.html", _page(session, who, model, source, index))


@router.post(_PATH, dependencies=[EDITOR])
def write(
    request: Request,
    model: str,
    source: str,
    index: str,
    who: Who,
    session: Db,
    settings: Config,
    text: Annotated[str, Form(max_length=20_000)] = "",
) -> Response:
    number = catalog.parse_index(index)
    try:
        explanations.write(session, who, model, source, number, text)
    except NotFound:
        raise
    except AtlasError as error:
        session.rollback()
        page = _page(session, who, model, source, index, text, of(error))
        return render(request, "explanations.html", page, status=error.status)
    embeddings.queue(session, settings)
    session.commit()
    return RedirectResponse(f"/{model}/{source}/{number}", 303)


@router.post(_PATH + "/{number}/{act}", dependencies=[EDITOR])
def change(
    model: str,
    source: str,
    index: str,
    number: int,
    act: Literal["agree", "disagree", "retire", "restore"],
    who: Who,
    session: Db,
) -> Response:
    """Agree with an explanation or no longer, take it back, or bring it back."""
    card = catalog.source_card(session, model, source)
    latent = catalog.parse_index(index)
    if act == "restore":
        found = explanations.restore(session, who, number)
    elif act == "retire":
        found = explanations.retire(session, who, number)
    else:
        found = explanations.vote(session, who, number, act == "agree")
    if (found.source_id, found.index) != (card.id, latent):
        session.rollback()
        raise NotFound(f"There is no explanation {number} of {card.model_id}/{card.name}/{latent}.")
    session.commit()
    return RedirectResponse(f"{card.path}/{latent}/explanations", 303)


def _page(
    session: Session, who: Actor, model: str, source: str, index: str, text: str = "", problem: Problem | None = None
) -> ExplanationsPage:
    card = catalog.source_card(session, model, source)
    number = catalog.parse_index(index)
    if number >= card.d_sae:
        raise catalog.past_the_end(card, number)
    feature = catalog.rows(session, card, [number]).get(number, FeatureRow(number, "", 0.0, 0.0, "", ""))
    now, before = explanations.history(session, who, card.id, number)
    said = talk(session, who, comments.of_feature(card.model_id, card.name, number))
    return ExplanationsPage(card, feature, tuple(now), tuple(before), text, talk=said, problem=problem)
