"""The audit log in team mode: every change that a request made, by whom; and the admin's page of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import audit
from app.people import Actor, Role
from app.web.access import ADMIN, role_of
from app.web.guard import without_secrets
from app.web.pages import Db, query, render

router = APIRouter()
_ABOUT = "about"


class Audit:
    """Write down each request of a person that may change something and was answered as done.

    Reads that are sent by POST, such as a text to encode, are declared as a viewer's and are not written down.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        await self.app(scope, receive, noted)
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS") or status >= 400:
            return
        actor: Actor | None = scope.get("state", {}).get("actor")
        route: Any = scope.get("route")
        if actor is not None and route is not None and _changes(route):
            await run_in_threadpool(_write, scope, actor, route.path)


def about(request: Request, path: str) -> None:
    """Say what a request changes, where its own address does not."""
    setattr(request.state, _ABOUT, path)


def _changes(route: Any) -> bool:
    role = role_of(route.dependencies)
    return role in (Role.EDITOR, Role.ADMIN) or route.path.startswith("/account/")


def _write(scope: Scope, actor: Actor, template: str) -> None:
    path = scope["state"].get(_ABOUT) or without_secrets(str(scope["path"]))
    address = str((scope.get("client") or ("",))[0])
    with scope["app"].state.sessions.begin() as session:
        audit.record(session, actor.name, actor.by_key, f"{scope['method']} {template}", path, address)


@dataclass(frozen=True)
class Entry:
    at: str
    who: str
    key: bool
    action: str
    path: str
    address: str


@dataclass(frozen=True)
class AuditPage:
    entries: tuple[Entry, ...]
    who: str
    about: str
    older: str
    """The address of the entries before these; empty at the end."""


@router.get("/audit", dependencies=[ADMIN])
def audit_page(
    request: Request,
    session: Db,
    who: Annotated[str, Query(max_length=64)] = "",
    about: Annotated[str, Query(max_length=200)] = "",
    before: Annotated[int | None, Query(ge=0, lt=2**31)] = None,
) -> Response:
    found = audit.entries(session, who, about, before)
    older = ""
    if len(found) == audit.PAGE:
        older = "/audit" + query({"who": who, "about": about, "before": found[-1].id})
    rows = tuple(Entry(f"{e.at:%Y-%m-%d %H:%M:%S}", e.who, e.key, e.action, e.path, e.address) for e in found)
    page = AuditPage(rows, who, about, older)
    return render(request, "audit.html", page, headers={"cache-control": "no-store"})
