"""Who sees an SAE, a job, a steering run or a vector: the control on their pages, and where a public link leads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Form, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app import jobs, steerings, visibility
from app.people import Actor
from app.tables import Source
from app.visibility import Owned, Visibility
from app.web.access import ANYONE, EDITOR, Who, actor_of, remember_link
from app.web.pages import Config, Db, base_of

router = APIRouter()

WORDS = {
    Visibility.PRIVATE: "only you",
    Visibility.TEAM: "everybody here",
    Visibility.LINK: "everybody here, and whoever has the link",
}


@dataclass(frozen=True)
class Sharing:
    """What the control shows of something, and to whom it shows itself."""

    kind: str
    key: str
    owner: str
    visibility: str
    link: str
    """The whole address of its public link, for those who may hand it on."""
    may_change: bool

    @property
    def choices(self) -> tuple[tuple[str, str], ...]:
        return tuple((value, words) for value, words in WORDS.items())

    @property
    def seen_by(self) -> str:
        if self.visibility == Visibility.PRIVATE and not self.may_change:
            return f"only {self.owner}"
        return WORDS[Visibility(self.visibility)]


def sharing(request: Request, kind: str, key: object, owner: str, seen_by: str, link: str) -> Sharing | None:
    """Return the control for something; None on a server without accounts, and for strangers."""
    who: Actor | None = actor_of(request)
    if who is None or who.id is None:
        return None
    may_change = visibility.may_change(who, owner)
    address = f"{base_of(request)}/shared/{link}" if link and may_change else ""
    return Sharing(kind, str(key), owner, seen_by, address, may_change)


def sharing_of(request: Request, kind: str, found: Owned) -> Sharing | None:
    return sharing(request, kind, found.id, found.owner, found.visibility, found.link)


def change(session: Session, who: Actor, found: Owned, seen_by: Visibility) -> None:
    """Say who sees something; what was made of an SAE becomes private with it. Raises Forbidden."""
    visibility.share(who, found, seen_by)
    if isinstance(found, Source) and seen_by == Visibility.PRIVATE:
        jobs.hide_about(session, found)
        steerings.hide_with(session, found)


@router.post("/share/{kind}/{key}", dependencies=[EDITOR])
def share(
    kind: str, key: str, who: Who, session: Db, seen_by: Annotated[str, Form(alias="visibility", max_length=40)] = ""
) -> Response:
    """Say who sees something of one's own, and go back to it."""
    found = visibility.find(session, kind, key)
    change(session, who, found, visibility.check(seen_by))
    path = visibility.path(found)
    session.commit()
    return RedirectResponse(f"{path}#sharing", 303)


@router.get("/shared/{secret}", dependencies=[ANYONE])
def shared(request: Request, secret: str, session: Db, settings: Config) -> Response:
    """Go where a public link leads; a browser without an account may look at that from now on."""
    found = visibility.of_link(session, secret)
    answer = RedirectResponse(visibility.path(found), 303, headers={"cache-control": "no-store"})
    if settings.team and actor_of(request) is None:
        remember_link(request, answer, settings, secret)
    return answer
