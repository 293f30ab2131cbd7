"""Signing in and out, accepting an invitation, and one's own account: password, logins, API tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Form, Request
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response

from app import identities, localkey, people
from app.errors import AtlasError, Forbidden, NotFound, Unauthorized
from app.people import Actor, Role
from app.settings import Settings
from app.tables import now
from app.web.access import ANYONE, VIEWER, Who, actor_of, address_of, forget, local_path, open_here, remember
from app.web.pages import Config, Db, render
from app.web.problems import ClosedPage, Problem, of

router = APIRouter()
_MAX_FIELD = 2000
Text = Annotated[str, Form(max_length=_MAX_FIELD)]
_ALONE = "This server is for one person on this machine; it has no accounts. Team mode has: see the README."


@dataclass(frozen=True)
class LoginPage:
    next: str
    provider: str = ""
    """What the provider is called at which people may sign in; empty without one."""
    name: str = ""
    problem: Problem | None = None


@dataclass(frozen=True)
class InvitePage:
    secret: str
    role: str
    provider: str = ""
    name: str = ""
    problem: Problem | None = None


@dataclass(frozen=True)
class LoginRow:
    id: int
    browser: str
    address: str
    since: str
    seen: str
    this: bool


@dataclass(frozen=True)
class TokenRow:
    id: int
    name: str
    start: str
    role: str
    made: str
    used: str
    expires: str


@dataclass(frozen=True)
class AccountPage:
    name: str
    role: str
    roles: tuple[str, ...]
    logins: tuple[LoginRow, ...]
    tokens: tuple[TokenRow, ...]
    provider: str = ""
    connected: tuple[str, ...] = ()
    """Who the person is there, and to proxies."""
    made: str = ""
    """A token just made: shown this once."""
    said: str = ""
    problem: Problem | None = None


@router.get("/open", dependencies=[ANYONE])
def open_link(request: Request, settings: Config, link: str = "") -> Response:
    """Let a browser in that opens the link which the terminal printed. Takes the secret, or the whole link pasted."""
    if settings.team:
        raise NotFound("This server has accounts: sign in.")
    if actor_of(request) is not None:
        return RedirectResponse("/", 303)
    if not localkey.use_link(settings, link.rpartition("link=")[2].strip()):
        words = (
            f"This link is unknown, used, or older than {localkey.LINK_HOURS} hours. The command below prints another."
        )
        page = ClosedPage(Problem(401, "That link does not open it", words))
        return render(request, "closed.html", page, status=401, headers={"cache-control": "no-store"})
    response = RedirectResponse("/", 303, {"cache-control": "no-store", "referrer-policy": "no-referrer"})
    open_here(response, settings)
    return response


@router.get("/login", dependencies=[ANYONE])
def login_page(request: Request, settings: Config, next: str = "/") -> Response:
    if actor_of(request) is not None or not settings.team:
        return RedirectResponse(local_path(next), 303)
    return render(request, "login.html", LoginPage(local_path(next), _provider(settings)))


@router.post("/login", dependencies=[ANYONE])
def login(
    request: Request, session: Db, settings: Config, name: Text = "", password: Text = "", next: Text = "/"
) -> Response:
    _only_in_a_team(settings.team)
    try:
        person = people.check_password(session, name, password, address_of(request))
        secret = people.sign_in(session, person, request.headers.get("user-agent", ""), address_of(request))
    except AtlasError as error:
        session.commit()
        page = LoginPage(local_path(next), _provider(settings), name[:64], of(error))
        headers = {"retry-after": str(error.retry_after)} if error.retry_after else None
        return render(request, "login.html", page, status=error.status, headers=headers)
    session.commit()
    response = RedirectResponse(local_path(next), 303)
    remember(response, settings, secret)
    return response


@router.post("/logout", dependencies=[VIEWER])
def logout(who: Who, session: Db, settings: Config) -> Response:
    if who.id is not None and who.login_id is not None:
        people.sign_out(session, who.id, who.login_id)
        session.commit()
    response = RedirectResponse("/login" if settings.team else "/", 303)
    forget(response, settings)
    return response


@router.get("/invite/{secret}", dependencies=[ANYONE])
def invite_page(request: Request, secret: str, session: Db, settings: Config) -> Response:
    found = people.invitation(session, secret)
    page = InvitePage(secret, found.role, _provider(settings))
    return render(request, "invite.html", page, headers={"referrer-policy": "no-referrer"})


@router.post("/invite/{secret}", dependencies=[ANYONE])
def accept(
    request: Request, secret: str, session: Db, settings: Config, name: Text = "", password: Text = ""
) -> Response:
    """Make the account and sign it in."""
    _only_in_a_team(settings.team)
    found = people.invitation(session, secret)
    try:
        person = people.accept(session, secret, name, password)
        login_secret = people.sign_in(session, person, request.headers.get("user-agent", ""), address_of(request))
    except AtlasError as error:
        session.rollback()
        page = InvitePage(secret, found.role, _provider(settings), name[:64], of(error))
        return render(request, "invite.html", page, status=error.status, headers={"referrer-policy": "no-referrer"})
    session.commit()
    response = RedirectResponse("/", 303)
    remember(response, settings, login_secret)
    return response


@router.get("/account", dependencies=[VIEWER])
def account_page(request: Request, who: Who, session: Db) -> Response:
    return _account(request, session, who)


@router.post("/account/password", dependencies=[VIEWER])
def change_password(request: Request, who: Who, session: Db, password: Text = "", new_password: Text = "") -> Response:
    """Change one's password, which ends all other logins. Asks for the old one: a browser may be left open."""
    person = people.numbered(session, _browser_of(who))
    try:
        people.check_password(session, person.name, password, address_of(request))
        people.change_password(session, person, new_password, who.login_id)
    except AtlasError as error:
        session.commit()
        return _account(request, session, who, problem=_said(error, "The present password is wrong."))
    session.commit()
    return _account(request, session, who, said="The password is changed; other browsers are signed out.")


@router.post("/account/logins/{login_id}/end", dependencies=[VIEWER])
def end_login(who: Who, session: Db, login_id: int) -> Response:
    people.sign_out(session, _browser_of(who), login_id)
    session.commit()
    return RedirectResponse("/account", 303)


@router.post("/account/tokens", dependencies=[VIEWER])
def add_token(
    request: Request, who: Who, session: Db, name: Text = "", role: Text = Role.VIEWER, days: Text = "90"
) -> Response:
    person = people.numbered(session, _browser_of(who))
    try:
        made = people.add_token(session, person, name, people.check_role(role), int(days) if days.isdecimal() else None)
    except AtlasError as error:
        session.rollback()
        return _account(request, session, who, problem=of(error))
    session.commit()
    return _account(request, session, who, made=made)


@router.post("/account/tokens/{token_id}/revoke", dependencies=[VIEWER])
def revoke_token(who: Who, session: Db, token_id: int) -> Response:
    people.revoke(session, _browser_of(who), token_id)
    session.commit()
    return RedirectResponse("/account", 303)


def _browser_of(who: Actor) -> int:
    """Return who is signed in by a browser: a token must not make tokens or change passwords."""
    if who.id is None:
        raise NotFound(_ALONE)
    if who.by_key:
        raise Forbidden("An API key cannot change the account; sign in with a browser.")
    return who.id


def _provider(settings: Settings) -> str:
    return settings.oidc_name if settings.oidc_issuer else ""


def _only_in_a_team(team: bool) -> None:
    if not team:
        raise NotFound(_ALONE)


def _said(error: AtlasError, wrong: str) -> Problem:
    return Problem(error.status, "Not changed", wrong if isinstance(error, Unauthorized) else error.message)


def _account(
    request: Request, session: Session, who: Actor, made: str = "", said: str = "", problem: Problem | None = None
) -> Response:
    person_id = _browser_of(who)
    page = AccountPage(
        name=who.name,
        role=who.role,
        roles=tuple(role for role in Role if who.role.covers(role)),
        logins=tuple(
            LoginRow(
                x.id, browser_name(x.browser), x.address, _day(x.created_at), _day(x.seen_at), x.id == who.login_id
            )
            for x in people.logins(session, person_id)
        ),
        tokens=tuple(
            TokenRow(
                t.id,
                t.name,
                t.start,
                t.role,
                _day(t.created_at),
                _day(t.used_at) if t.used_at else "never",
                "never" if t.expires_at is None else "expired" if t.expires_at < now() else _day(t.expires_at),
            )
            for t in people.tokens(session, person_id)
        ),
        provider=_provider(request.app.state.settings),
        connected=tuple(i.email or i.subject for i in identities.of_person(session, person_id)),
        made=made,
        said=said,
        problem=problem,
    )
    headers = {"cache-control": "no-store"}
    return render(request, "account.html", page, status=problem.status if problem else 200, headers=headers)


def _day(moment: object) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


_BROWSERS = (
    *(("Edg", "Edge"), ("OPR", "Opera"), ("Firefox", "Firefox"), ("HeadlessChrome", "Chrome"), ("Chrome", "Chrome")),
    *(("Safari", "Safari"), ("curl", "curl"), ("python", "Python")),
)
_SYSTEMS = (
    *(("Android", "Android"), ("iPhone", "iPhone"), ("iPad", "iPad"), ("Windows", "Windows"), ("Mac OS X", "macOS")),
    ("Linux", "Linux"),
)


def browser_name(said: str) -> str:
    """Return what a browser calls itself in short, `Firefox on Linux`, or else its own words as far as they fit."""
    browser = next((name for word, name in _BROWSERS if f"{word}/" in said or f"{word}-" in said), "")
    system = next((name for word, name in _SYSTEMS if word in said), "")
    return f"{browser} on {system}" if browser and system else browser or said[:60]
