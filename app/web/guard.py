"""What every request passes before a route sees it: ids, Host and cross-site checks, security headers. Plain ASGI."""

from __future__ import annotations

import ipaddress
import re
import secrets
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import orjson
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import log

_logger = log.get("web")

CONTENT_POLICY = (
    "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'"
)
CHART_POLICY = CONTENT_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
"""For pages that load plotly, which sets style attributes."""

_SAFE = {"GET", "HEAD", "OPTIONS"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_QUIET = ("/static/", "/healthz", "/readyz", "/metrics")


class Guard:
    """Refuse foreign hosts (400), cross-site writes (403) and large bodies (413); name, log and dress each request."""

    def __init__(self, app: ASGIApp, public_url: str, max_body_bytes: int, larger: Mapping[str, int]) -> None:
        self.app = app
        self.public_host = (urlsplit(public_url).hostname or "").lower()
        """The name a team opens; loopback names are answered too: probes and a proxy on the machine use them."""
        self.https = public_url.startswith("https:")
        self.max_body_bytes = max_body_bytes
        self.larger = larger
        """Paths that take larger bodies, with how large."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        began, status = time.perf_counter(), 0

        async def dressed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers_out = MutableHeaders(scope=message)
                _dress(headers_out, request_id, self.https)
                headers_out["server-timing"] = f"app;dur={(time.perf_counter() - began) * 1000:.1f}"
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            refusal = self._refusal(scope, headers)
            if refusal:
                await _refuse(dressed, *refusal)
            else:
                await self.app(scope, receive, dressed)
            path = str(scope["path"])
            if not path.startswith(_QUIET):
                ms = round((time.perf_counter() - began) * 1000, 1)
                _logger.info("request", method=scope["method"], path=without_secrets(path)[:200], status=status, ms=ms)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        # A scraper reaches each process by a name of its own; no page of another site knows the token it sends.
        scrape = scope["path"] == "/metrics" and "authorization" in headers
        if not scrape and not is_loopback(_name(host)) and (not self.public_host or _name(host) != self.public_host):
            names = self.public_host or "localhost and 127.0.0.1"
            return 400, f"This server answers to {names} only, not to {host[:80]!r}."
        if scope["method"] not in _SAFE and cross_site(headers):
            return 403, "A page of another site may not change anything here."
        length = headers.get("content-length", "")
        most = self.larger.get(scope["path"], self.max_body_bytes)
        if length.isdigit() and int(length) > most:
            return 413, f"The request is {int(length):,} bytes; up to {most:,} are read."
        return None


class LargerBodies:
    """Raises the limit on bodies that the middleware outside of it sets, for some paths."""

    def __init__(self, app: ASGIApp, larger: Mapping[str, int]) -> None:
        self.app = app
        self.limited = {path: RequestBodyLimitMiddleware(app, most) for path, most in larger.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.limited.get(scope.get("path", ""), self.app)(scope, receive, send)


def is_loopback(name: str) -> bool:
    """Tell whether a host name is this machine's own."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def cross_site(headers: Headers) -> bool:
    """Tell whether a browser sent this from another site; programs send neither header.

    Sec-Fetch-Site is absent on plain-http addresses of a local network, so Origin is the fall-back.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return False
    return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()


def _name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rsplit(":", 1)[0].lower() if ":" in host else host.lower()


def without_secrets(path: str) -> str:
    """Return a path as it may be logged: the address of an invitation or a public link is its secret."""
    return next((f"{start}…" for start in ("/invite/", "/shared/") if path.startswith(start)), path)


def _dress(headers: MutableHeaders, request_id: str, https: bool) -> None:
    if https:
        headers.setdefault("strict-transport-security", "max-age=31536000")
    headers["x-request-id"] = request_id
    headers.setdefault("content-security-policy", CONTENT_POLICY)
    headers.setdefault("x-content-type-options", "nosniff")
    headers.setdefault("referrer-policy", "same-origin")
    headers.setdefault("cross-origin-opener-policy", "same-origin")


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = orjson.dumps({"error": sentence, "message": sentence})
    start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
