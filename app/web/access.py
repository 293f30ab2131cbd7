"""Who may do what: every route declares `ANYONE`, `VIEWER`, `EDITOR` or `ADMIN` among its dependencies.

Without team mode there is one person, who may do everything: whoever runs the server, known by the user of the asking
process, or by a link that the server printed. In team mode a cookie or an API key says who asks; whoever may not is
sent to sign in (pages), or answered 401 or 403.
"""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Annotated, Any, cast
from urllib.parse import quote, urlsplit

from fastapi import Depends, Request
from fastapi.params import Depends as DependsParameter
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app import identities, localkey, peers, people
from app.errors import Busy, Forbidden, Unauthorized
from app.people import LOCAL, Actor, Role
from app.settings import Settings
from app.web import proxy

_COOKIE = "atlas_login"


class SignInNeeded(Unauthorized):
    """Nobody is signed in; a browser is led to the login page."""


class LinkNeeded(Unauthorized):
    """Somebody on this machine asks a server that is another user's, or asks from a browser that opened no link yet."""


class Rates:
    """A token bucket for each person or address, in this process: a minute's requests may come at once."""

    def __init__(self, per_minute: int, most: int = 10_000) -> None:
        self._per_minute = per_minute
        self._most = most
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def spend(self, key: str) -> None:
        """Take one request off a bucket. Raises Busy when it is empty."""
        with self._lock:
            at = time.monotonic()
            left, since = self._buckets.pop(key, (float(self._per_minute), at))
            left = min(left + (at - since) * self._per_minute / 60, self._per_minute) - 1
            self._buckets[key] = (max(left, 0.0), at)
            while len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        if left < 0:
            raise Busy(f"More than {self._per_minute:,} requests a minute. Wait a moment.", retry_after=2)


def address_of(request: Request) -> str:
    return request.client.host if request.client else ""


def _needs(role: Role | None, *, links: bool = False) -> Any:
    async def check(request: Request) -> None:
        settings = cast(Settings, request.app.state.settings)
        if not settings.team:
            request.state.actor = LOCAL if _is_owner(request, settings) else None
            if role is not None and request.state.actor is None:
                raise LinkNeeded(
                    "This server is for the user who started it. Open the link that its terminal printed, or one from "
                    "`sae-atlas url`; programs send what `sae-atlas token` prints in the header x-api-key."
                )
            return
        actor = await run_in_threadpool(_actor, request)
        request.state.actor = actor
        cast(Rates, request.app.state.rates).spend(f"person {actor.id}" if actor else f"address {address_of(request)}")
        if role is None:
            return
        if actor is None and links and (held := links_of(request)):
            request.state.links = held
            return
        if actor is None:
            raise SignInNeeded("Sign in, or send an API key of yours in the header x-api-key.")
        if not actor.role.covers(role):
            raise Forbidden(f"You are {_article(actor.role)} here; this takes {_article(role)}. Ask an admin.")

    check.role = role  # type: ignore[attr-defined]  # read by declared()
    return Depends(check)


ANYONE = _needs(None)
VIEWER = _needs(Role.VIEWER)
GUEST = _needs(Role.VIEWER, links=True)
"""A viewer, or a stranger who holds a public link and sees what that shows (app.visibility)."""
EDITOR = _needs(Role.EDITOR)
ADMIN = _needs(Role.ADMIN)


def declared(dependencies: Sequence[DependsParameter]) -> list[Role | None]:
    """Return the roles that a route's dependencies declare; None stands for anyone."""
    return [
        cast(Any, d.dependency).role for d in dependencies if d.dependency is not None and hasattr(d.dependency, "role")
    ]


def role_of(dependencies: Sequence[DependsParameter]) -> Role | None:
    """Return the role that a route declares; None when it is open to anyone."""
    return next(iter(declared(dependencies)), None)


def actor_of(request: Request) -> Actor | None:
    """Return who asks; None before a route declared what it needs, or when nobody is signed in."""
    return getattr(request.state, "actor", None)


def _signed_in(request: Request) -> Actor:
    actor = actor_of(request)
    if actor is None:
        raise SignInNeeded("Sign in first.")
    return actor


def _is_owner(request: Request, settings: Settings) -> bool:
    """Tell whether the one person of a server without accounts asks; other users of the machine reach its port too."""
    if settings.local_access == "anyone":
        return True
    client, server = request.scope.get("client"), request.scope.get("server")
    if settings.local_access == "user" and client and server and peers.of_this_user(client, server):
        return True
    if key := _key(request):
        return localkey.fits(key, localkey.api_token(settings))
    secret = request.cookies.get(_local_cookie(settings), "")
    return bool(secret) and localkey.fits(secret, localkey.cookie(settings))


def open_here(response: Response, settings: Settings) -> None:
    """Let the browser in that opened a link."""
    response.set_cookie(
        _local_cookie(settings),
        localkey.cookie(settings),
        max_age=people.LOGIN_DAYS * 86_400,
        httponly=True,
        samesite="lax",
    )


def _local_cookie(settings: Settings) -> str:
    """Browsers send a cookie to all ports of a host: servers side by side need names of their own."""
    return f"atlas_local_{settings.port}"


Who = Annotated[Actor, Depends(_signed_in)]
"""Who asks, for routes that declare VIEWER or more."""


def _actor(request: Request) -> Actor | None:
    sessions = cast("sessionmaker[Session]", request.app.state.sessions)
    if key := _key(request):
        with sessions.begin() as session:
            actor = people.of_token(session, key)
        if actor is None:
            raise Unauthorized("This API key is unknown, expired or revoked. Make one under /account.")
        return actor
    if said := _proxy_says(request):
        with sessions.begin() as session:
            return identities.by_proxy(session, said)
    secret = request.cookies.get(cookie_name(request.app.state.settings), "")
    if not secret:
        return None
    with sessions.begin() as session:
        return people.of_login(session, secret)


def _proxy_says(request: Request) -> str:
    """Return who has signed in at a trusted proxy. What anybody else sends in that header counts for nothing."""
    settings = cast(Settings, request.app.state.settings)
    if not settings.proxy_user_header:
        return ""
    said = request.headers.getlist(settings.proxy_user_header)
    if not said or not proxy.trusted(getattr(request.state, proxy.PEER, ""), settings.trusted_proxies):
        return ""
    if len(said) > 1:
        # A proxy that adds its header behind one of the browser's would let anybody choose.
        raise Unauthorized(f"The header {settings.proxy_user_header} came twice; the proxy must replace it.")
    return said[0].strip()


def _key(request: Request) -> str:
    if key := request.headers.get("x-api-key", ""):
        return key
    if request.url.path == "/metrics":
        return ""  # what a scraper sends is no person's key
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def cookie_name(settings: Settings) -> str:
    """The prefix makes browsers refuse the cookie from other hosts and over plain HTTP."""
    return f"__Host-{_COOKIE}" if settings.public_url.startswith("https:") else _COOKIE


def remember(response: Response, settings: Settings, secret: str) -> None:
    """Give the browser its login."""
    response.set_cookie(
        cookie_name(settings),
        secret,
        max_age=people.LOGIN_DAYS * 86_400,
        secure=settings.public_url.startswith("https:"),
        httponly=True,
        samesite="lax",
    )


def forget(response: Response, settings: Settings) -> None:
    response.delete_cookie(
        cookie_name(settings), secure=settings.public_url.startswith("https:"), httponly=True, samesite="lax"
    )


_LINKS, _LINK = "atlas_links", re.compile(r"[A-Za-z0-9_-]{20,32}")
MAX_LINKS = 20


def links_of(request: Request) -> frozenset[str]:
    """Return the secrets of public links that somebody holds: from links they opened, or `?link=` of programs."""
    said = request.query_params.getlist("link") + request.cookies.get(_LINKS, "").split(".")
    return frozenset(secret for secret in said[: 2 * MAX_LINKS] if _LINK.fullmatch(secret))


def remember_link(request: Request, response: Response, settings: Settings, secret: str) -> None:
    """Let a browser without an account see what a link shows, until it is closed."""
    before = [held for held in request.cookies.get(_LINKS, "").split(".") if _LINK.fullmatch(held) and held != secret]
    kept = ".".join([secret, *before][:MAX_LINKS])
    response.set_cookie(_LINKS, kept, secure=settings.public_url.startswith("https:"), httponly=True, samesite="lax")


def local_path(address: str) -> str:
    """Return an address of this site as it is, and `/` for any other: nobody is sent elsewhere after signing in."""
    if not address.startswith("/") or address.startswith(("//", "/\\")) or any(ord(c) < 33 for c in address):
        return "/"
    parts = urlsplit(address)
    return address if not parts.scheme and not parts.netloc and "\\" not in address else "/"


def login_path(request: Request) -> str:
    """Return where to sign in, and come back here afterwards where going back makes sense."""
    if request.method not in ("GET", "HEAD"):
        return "/login"
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return "/login" if here == "/" else f"/login?next={quote(local_path(here), safe='')}"


def _article(role: Role) -> str:
    return f"an {role}" if role[0] in "ae" else f"a {role}"
