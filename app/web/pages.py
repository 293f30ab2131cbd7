"""Rendering: one Jinja environment, versioned static files, and what routes depend on (session, settings, worker)."""

from __future__ import annotations

import hashlib
import html
import mimetypes
import re
from collections.abc import AsyncIterator, Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote, urlencode

import jinja2
import orjson
from fastapi import Depends, Request
from markupsafe import Markup
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from app import present, visibility
from app.comments import MENTION
from app.gpu import Worker
from app.people import Actor
from app.settings import Settings

ROOT = Path(__file__).resolve().parent.parent.parent
TEMPLATES, STATIC = ROOT / "templates", ROOT / "static"
T = TypeVar("T")
_SIGNS = {"\t": "⇥", "\r": "␍"}
_PART = Markup('<i class="part" title="{}">⋯</i>').format(present.PART)
_CUT = '<i class="cut">…</i>'
_TICKED = re.compile(r"`([^`]+)`")


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
        self.env.filters |= {
            "amount": present.amount,
            "duration": present.duration,
            "percent": present.percent,
            "bytes": present.size,
            "shown": shown,
            "chip": chip,
            "token": token,
            "window": window,
            "token_chip": token_chip,
            "label": label,
            "said": said,
            "query": query,
            "segment": lambda text: quote(str(text), safe=""),
            "data": data,
        }

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


class _Marks(dict[int, str]):
    """A translation table that names what would not be seen, filled as characters occur."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character == "\n":
            mark = '<i class="nl">↵</i><i class="br">\n</i>'
        elif character in _SIGNS:
            mark = f'<i class="nl">{_SIGNS[character]}</i>'
        elif present.hidden(character):
            mark = f'<i class="nl">U+{code:04X}</i>'
        else:
            mark = character
        self[code] = mark
        return mark


_MARKS = _Marks()


def shown(text: str) -> Markup:
    """Return model text as markup: escaped, line breaks and tabs marked, characters that would not be seen named.

    A line break is followed by an element that a style sheet may turn into a real one.
    """
    return Markup(_shown(text))  # noqa: S704 - escaped, and the marks are ours


def _shown(text: str) -> str:
    # A page has a thousand such pieces, and text that knows it is markup takes as long to make as all of this.
    escaped = _escape(text)
    return escaped if text.isprintable() else escaped.translate(_MARKS)


def _escape(text: str) -> str:
    return html.escape(text, quote=False).replace('"', "&#34;").replace("'", "&#39;")


def token(text: str) -> Markup:
    """Return one token of a text as markup: as `shown`, and visible where it ends inside a character."""
    return shown(text) if text else _PART


def _token(text: str) -> str:
    return _shown(text) if text else str(_PART)


def window(shown_window: present.Window) -> Markup:
    """Return a window of tokens as markup. Here and not in a template: a page has dozens, with hundreds of pieces."""
    parts = ['<span class="window">', _CUT if shown_window.cut_before else ""]
    for piece in shown_window.pieces:
        if piece.level:
            kind = f"a{piece.level} peak" if piece.peak else f"a{piece.level}"
            parts.append(f'<mark class="{kind}" title="{_escape(piece.tip)}">{_token(piece.text)}</mark>')
        elif piece.special:
            parts.append(f'<i class="special">{_shown(piece.text)}</i>')
        elif piece.peak:
            parts.append(f'<span class="looked" title="{_escape(piece.tip)}">{_token(piece.text)}</span>')
        else:
            parts.append(_shown(piece.text))
    parts += [_CUT if shown_window.cut_after else "", "</span>"]
    return Markup("".join(parts))  # noqa: S704 - every part is escaped or ours


def label(text: str) -> Markup:
    """Return an explanation as markup: what stands in backticks are tokens."""
    parts = [
        f'<code class="chip">{chip(part)}</code>' if i % 2 else _shown(part)
        for i, part in enumerate(_TICKED.split(text))
    ]
    return Markup("".join(parts))  # noqa: S704 - every part is escaped


def said(text: str) -> Markup:
    """Return what a person wrote as markup: as `label`, and people's names stand out."""
    parts: list[Markup] = []
    end = 0
    for match in MENTION.finditer(text):
        parts += [label(text[end : match.start()]), Markup('<b class="mention">{}</b>').format(match[0])]
        end = match.end()
    return Markup().join([*parts, label(text[end:])])


def chip(text: str) -> Markup:
    """Return one token for a list: as `shown`, with spaces at its ends visible and counted when there are many."""
    return _chip(text) if len(text) <= _LONG_TOKEN else _chip.__wrapped__(text)


_LONG_TOKEN = 64


@lru_cache(maxsize=20_000)
def _chip(text: str) -> Markup:
    body = text.strip(" ")
    if not body:
        return Markup('<i class="nl">{}</i>').format(_spaces(len(text), "␣") or "∅")
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    dots = Markup('<i class="ws">{}</i>')
    return Markup().join(
        [
            dots.format(_spaces(before, "·")) if before else "",
            shown(body),
            dots.format(_spaces(after, "·")) if after else "",
        ]
    )


def token_chip(text: str) -> Markup:
    """Return one token of a text for a list: as `chip`, and a mark where it ends inside a character."""
    return chip(text) if text else _PART


def _spaces(n: int, sign: str) -> str:
    return sign * n if n <= 3 else f"{sign}×{n}"


def query(parameters: dict[str, Any]) -> str:
    """Return `?a=b` of the parameters that are set, or nothing."""
    kept = {k: v for k, v in parameters.items() if v not in (None, "", [])}
    return f"?{urlencode(kept, doseq=True)}" if kept else ""


def data(value: Any) -> Markup:
    """Return JSON for a data element: no `<` survives, so no text can end the element."""
    text = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # noqa: S704


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
