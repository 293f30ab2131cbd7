"""The admin's page of people: who has an account, in which role, who is invited."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Form, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app import people
from app.errors import AtlasError, NotFound
from app.people import PersonRow, Role
from app.settings import Settings
from app.web.access import ADMIN, Who
from app.web.pages import Config, Db, base_of, render
from app.web.problems import Problem, of

router = APIRouter(prefix="/people")
Text = Annotated[str, Form(max_length=200)]


@dataclass(frozen=True)
class Invited:
    id: int
    role: str
    by: str
    expires: str


@dataclass(frozen=True)
class PeoplePage:
    people: tuple[PersonRow, ...]
    invited: tuple[Invited, ...]
    me: str
    roles: tuple[str, ...] = tuple(Role)
    link: str = ""
    """An invitation just made: shown this once."""
    link_role: str = ""
    problem: Problem | None = None


@router.get("", dependencies=[ADMIN])
def people_page(request: Request, who: Who, session: Db, settings: Config) -> Response:
    return _show(request, session, settings, who.name)


@router.post("/invite", dependencies=[ADMIN])
def invite(request: Request, who: Who, session: Db, settings: Config, role: Text = Role.VIEWER) -> Response:
    wanted = people.check_role(role)
    secret = people.invite(session, wanted, who.name)
    session.commit()
    link = f"{settings.public_url.rstrip('/') or base_of(request)}/invite/{secret}"
    return _show(request, session, settings, who.name, link=link, link_role=wanted)


@router.post("/invitations/{invitation_id}/withdraw", dependencies=[ADMIN])
def withdraw(session: Db, invitation_id: int) -> Response:
    people.withdraw(session, invitation_id)
    session.commit()
    return RedirectResponse("/people", 303)


@router.post("/{person_id}/role", dependencies=[ADMIN])
def set_role(request: Request, who: Who, session: Db, settings: Config, person_id: int, role: Text = "") -> Response:
    return _change(
        request,
        who.name,
        session,
        settings,
        lambda: people.set_role(session, people.numbered(session, person_id), people.check_role(role)),
    )


@router.post("/{person_id}/disable", dependencies=[ADMIN])
def disable(request: Request, who: Who, session: Db, settings: Config, person_id: int) -> Response:
    return _change(
        request, who.name, session, settings, lambda: people.disable(session, people.numbered(session, person_id))
    )


@router.post("/{person_id}/enable", dependencies=[ADMIN])
def enable(request: Request, who: Who, session: Db, settings: Config, person_id: int) -> Response:
    return _change(
        request, who.name, session, settings, lambda: people.enable(session, people.numbered(session, person_id))
    )


def _change(request: Request, me: str, session: Session, settings: Settings, change: object) -> Response:
    assert callable(change)
    try:
        change()
    except AtlasError as error:
        session.rollback()
        return _show(request, session, settings, me, problem=of(error))
    session.commit()
    return RedirectResponse("/people", 303)


def _show(
    request: Request,
    session: Session,
    settings: Settings,
    me: str,
    link: str = "",
    link_role: str = "",
    problem: Problem | None = None,
) -> Response:
    if not settings.team:
        raise NotFound(
            "This server is for one person on this machine; it has no accounts. Team mode has: see the README."
        )
    page = PeoplePage(
        people=tuple(people.everybody(session)),
        invited=tuple(
            Invited(i.id, i.role, i.invited_by, f"{i.expires_at:%Y-%m-%d}") for i in people.open_invitations(session)
        ),
        me=me,
        link=link,
        link_role=link_role,
        problem=problem,
    )
    headers = {"cache-control": "no-store"}
    return render(request, "people.html", page, status=problem.status if problem else 200, headers=headers)
