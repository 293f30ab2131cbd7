"""Rendering: one Jinja environment, versioned static files, and what routes depend on (session, settings, worker)."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

import jinja2
import orjson
from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from markupsafe import Markup
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from app import present, visibility
from app.gpu import Worker
from app.people import Actor
from app.settings import Settings
from app.web import markup

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATES, STATIC = ROOT / "templates", ROOT / "static"
T = TypeVar("T")


async def _session(request: Request) -> AsyncIterator[Session]:
    # None of these dependencies is a plain function: FastAPI would run each in a thread, for every request.
    with own_session(request) as session:
        yield session


def own_session(request: Request) -> Session:
    """Return a new session that reads as whoever asks, for what goes on after the request's own is closed."""
    session: Session = request.app.state.sessions()
    if not request.app.state.settings.team:
        return session
    actor: Actor | None = getattr(request.state, "actor", None)
    visibility.make_for(session, actor.name if actor is not None else "")
    links: frozenset[str] = getattr(request.state, "links", frozenset())
    return visibility.read_as(session, visibility.reader_of(actor, links))


async def _settings(request: Request) -> Settings:
    """Return the settings; in team mode with the person who asks as the owner of what is made."""
    settings: Settings = request.app.state.settings
    actor: Actor | None = getattr(request.state, "actor", None)
    return settings if actor is None or actor.id is None else settings.model_copy(update={"owner": actor.name})


async def _worker(request: Request) -> Worker:
    return request.app.state.worker


Db = Annotated[Session, Depends(_session)]
Config = Annotated[Settings, Depends(_settings)]
Gpu = Annotated[Worker, Depends(_worker)]


def of_query(kind: type[T]) -> Any:
    """Return a dependency that reads a frozen dataclass, whose fields all have defaults, from the query.

    In one step: FastAPI looks at each parameter of a function by itself, which for a dozen takes as long as a query
    of the database.
    """
    adapter, names, usual = TypeAdapter(kind), frozenset(kind.__annotations__), kind()

    async def asked(request: Request) -> T:
        given = {name: value for name, value in request.query_params.items() if name in names}
        if not given:
            return usual
        try:
            return adapter.validate_python(given)
        except ValidationError as error:
            faults = [{**fault, "loc": ("query", *fault["loc"])} for fault in error.errors()]
            raise RequestValidationError(faults) from None

    return Depends(asked)


class Pages:
    """Turns a template and one frozen object into a response."""

    def __init__(self, version: str) -> None:
        self.env = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        self.static = f"/static/{version}"
        self.env.globals["static"] = lambda name: f"/static/{version}/{name}"  # pyright: ignore[reportArgumentType]
        self.env.filters.update(_FILTERS)

    def text(self, name: str, page: Any, actor: Actor | None = None, stranger: bool = False) -> str:
        return self.env.get_template(name).render(page=page, actor=actor, stranger=stranger)

    def html(
        self,
        name: str,
        page: Any,
        actor: Actor | None = None,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        stranger: bool = False,
    ) -> HTMLResponse:
        text = self.text(name, page, actor, stranger)
        # Words that people or models wrote may hold lone surrogates, which UTF-8 cannot.
        return HTMLResponse(text.encode("utf-8", "replace"), status, headers)


def render(
    request: Request, name: str, page: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    actor = getattr(request.state, "actor", None)
    # What leads to the login page anyway is not offered to whoever has no account here.
    stranger = request.app.state.settings.team and actor is None and hasattr(request.state, "actor")
    return request.app.state.pages.html(name, page, actor, status=status, headers=headers, stranger=stranger)


async def read(session: Session, look: Callable[..., T], *asked: Any) -> T:
    """Look something up in a thread, and end the transaction with it.

    A request that waits for the device must hold no connection: a few of them would leave none for the pages.
    """

    def looking() -> T:
        found = look(*asked)
        session.commit()
        return found

    return await run_in_threadpool(looking)


def partial(request: Request) -> bool:
    """Tell whether htmx asks for a fragment rather than for a page."""
    return request.headers.get("hx-request") == "true" and request.headers.get("hx-history-restore-request") != "true"


def base_of(request: Request) -> str:
    """Return scheme and host a page was asked under, for addresses that are followed from elsewhere."""
    settings: Settings = request.app.state.settings
    if settings.public_url:
        return settings.public_url.rstrip("/")
    return f"{request.url.scheme}://{request.url.netloc}"


def ahead(request: Request) -> dict[str, str]:
    """Return the header that makes a browser fetch the next feature or page before it is asked for.

    A header, since the content policy lets no rules stand in the page; `<link rel=prefetch>` is fetched and then not
    used by Chromium, as pages may not be kept.
    """
    return {"speculation-rules": f'"{request.app.state.pages.static}/ahead.specrules"'}


def query(parameters: dict[str, Any]) -> str:
    """Return `?a=b` of the parameters that are set, or nothing."""
    kept = {k: v for k, v in parameters.items() if v not in (None, "", [])}
    return f"?{urlencode(kept, doseq=True)}" if kept else ""


def segment(text: object) -> str:
    """Return a text as one segment of an address."""
    return quote(str(text), safe="")


def data(value: Any) -> Markup:
    """Return JSON for a data element: no `<` survives, so no text can end the element."""
    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # noqa: S704


_FILTERS: dict[str, Callable[..., Any]] = {
    "amount": present.amount,
    "signed": present.signed,
    "duration": present.duration,
    "percent": present.percent,
    "bytes": present.size,
    "shown": markup.shown,
    "chip": markup.chip,
    "token": markup.token,
    "window": markup.window,
    "token_chip": markup.token_chip,
    "label": markup.label,
    "said": markup.said,
    "named": markup.named,
    "example": markup.example,
    "quiet": markup.quiet,
    "query": query,
    "segment": segment,
    "data": data,
}


def static_version() -> str:
    """Return a name for the state of all static files, so that browsers may keep them for ever."""
    digest = hashlib.sha256()
    for path in sorted(STATIC.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(STATIC).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# Speculation rules are read under this type alone.
mimetypes.add_type("application/speculationrules+json", ".specrules")


class VersionedStatic(StaticFiles):
    """Serve /static/{version}/app.css as app.css: for ever under the present version, briefly under any other name."""

    def __init__(self, version: str) -> None:
        super().__init__(directory=STATIC)
        self.version = version

    async def get_response(self, path: str, scope: Scope) -> Response:
        first, _, rest = path.replace("\\", "/").partition("/")
        versioned = first == self.version
        response = await super().get_response(rest if versioned else path, scope)
        kept = "public, max-age=31536000, immutable" if versioned else "no-cache"
        response.headers["cache-control"] = kept
        return response
