"""Remote catalogs: what they offer, and the buttons that import it. Only an admin subscribes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Form, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app import remotes
from app.errors import AtlasError
from app.people import Role
from app.remotes import Offer
from app.settings import Settings
from app.tables import now
from app.web.access import ADMIN, EDITOR, VIEWER, Who
from app.web.pages import Config, Db, render
from app.web.problems import Problem, of

router = APIRouter(prefix="/remotes")
Text = Annotated[str, Form(max_length=2000)]


@dataclass(frozen=True)
class Shown:
    name: str
    place: str
    checked: str
    problem: str
    offers: tuple[Offer, ...]


@dataclass(frozen=True)
class RemotesPage:
    remotes: tuple[Shown, ...]
    may_add: bool
    may_import: bool
    networks: str
    name: str = ""
    place: str = ""
    problem: Problem | None = None


@router.get("", dependencies=[VIEWER])
def remotes_page(request: Request, who: Who, session: Db, settings: Config) -> Response:
    return _show(request, session, settings, who.role)


@router.post("/add", dependencies=[ADMIN])
def add(request: Request, who: Who, session: Db, settings: Config, name: Text = "", place: Text = "") -> Response:
    try:
        remotes.add(session, settings, name, place, who.name)
    except AtlasError as error:
        session.rollback()
        return _show(request, session, settings, who.role, name, place, of(error))
    session.commit()
    return RedirectResponse("/remotes", 303)


@router.post("/{name}/refresh", dependencies=[EDITOR])
def refresh(session: Db, settings: Config, name: str) -> Response:
    remotes.refresh(session, settings, remotes.named(session, name))
    session.commit()
    return RedirectResponse("/remotes", 303)


@router.post("/{name}/remove", dependencies=[ADMIN])
def remove(session: Db, name: str) -> Response:
    """End the subscription; what was imported stays."""
    remotes.remove(session, name)
    session.commit()
    return RedirectResponse("/remotes", 303)


@router.post("/{name}/import", dependencies=[EDITOR])
def import_one(session: Db, settings: Config, name: str, path: Text = "") -> Response:
    job = remotes.queue_import(session, settings, remotes.named(session, name), path)
    session.commit()
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _show(
    request: Request,
    session: Session,
    settings: Settings,
    role: Role,
    name: str = "",
    place: str = "",
    problem: Problem | None = None,
) -> Response:
    shown = tuple(
        Shown(
            remote.name,
            remote.place,
            _checked(remote.checked_at),
            remote.problem,
            tuple(remotes.offers(session, remote)),
        )
        for remote in remotes.everything(session)
    )
    page = RemotesPage(
        shown,
        role.covers(Role.ADMIN),
        role.covers(Role.EDITOR),
        settings.remote_networks,
        name[:64],
        place[:500],
        problem,
    )
    return render(request, "remotes.html", page, status=problem.status if problem else 200)


def _checked(at: datetime | None) -> str:
    """Return when a remote was listed last, and how long ago that is."""
    if at is None:
        return "never yet"
    ago = max(int((now() - at).total_seconds()) // 60, 0)
    words = f"{ago} min" if ago < 120 else f"{ago // 60} h" if ago < 48 * 60 else f"{ago // 1440} days"
    return f"{at:%Y-%m-%d %H:%M} UTC, {words} ago"
