"""Errors into what the asker understands: JSON under /api, a fragment for htmx, a page for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import DBAPIError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, RedirectResponse, Response

from app import log
from app.catalog import NotInCatalog
from app.errors import AtlasError
from app.web import pages
from app.web.access import LinkNeeded, SignInNeeded, login_path

_logger = log.get("web")
_HEADINGS = {
    400: "That address cannot be used",
    401: "Sign in",
    403: "Not allowed",
    404: "Nothing here",
    405: "Not that way",
    409: "That exists already",
    413: "Too large",
    422: "That cannot be used",
    429: "Busy",
    503: "Not available just now",
    507: "No room",
}


@dataclass(frozen=True)
class Problem:
    """What went wrong, for the error page and fragment."""

    status: int
    heading: str
    message: str
    suggestions: tuple[tuple[str, str], ...] = ()
    retry_after: int | None = None
    request_id: str = ""


@dataclass(frozen=True)
class ClosedPage:
    """What others on the machine see of a server without accounts, and its person before they opened a link."""

    problem: Problem | None = None


def register(app: FastAPI) -> None:
    app.add_exception_handler(AtlasError, _atlas)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(DBAPIError, _database)
    app.add_exception_handler(Exception, _unexpected)


def answer(request: Request, problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """Return the problem as JSON, fragment or page, with Retry-After where waiting helps."""
    headers = dict(headers or {})
    if problem.retry_after is not None:
        headers["retry-after"] = str(problem.retry_after)
    if _of_api(request):
        message = problem.message.encode("utf-8", "replace").decode()
        return JSONResponse({"error": message, "message": message}, problem.status, headers)
    name = "_problem.html" if pages.partial(request) else "problem.html"
    return pages.render(request, name, problem, status=problem.status, headers=headers)


def _of_api(request: Request) -> bool:
    return request.url.path == "/api" or request.url.path.startswith("/api/")


def _to_sign_in(request: Request) -> Response:
    path = login_path(request)
    # htmx would follow a redirect and put the login page into a corner of the page.
    return (
        Response(status_code=401, headers={"hx-redirect": path})
        if pages.partial(request)
        else RedirectResponse(path, 303)
    )


def of(error: AtlasError) -> Problem:
    """Return an error as what a page shows; for pages that go on without the part that failed."""
    suggestions = error.suggestions if isinstance(error, NotInCatalog) else ()
    heading = _HEADINGS.get(error.status, "That did not work")
    return Problem(error.status, heading, error.message, suggestions, error.retry_after)


def sentence(errors: list[dict[str, Any]]) -> str:
    """Return the first few faults of a request as one sentence that names the fields."""
    parts = [f"{'.'.join(str(step) for step in e['loc'][1:]) or 'body'}: {e['msg']}" for e in errors[:3]]
    rest = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
    return "; ".join(parts)[:600] + rest + "."


async def _atlas(request: Request, error: Exception) -> Response:
    if isinstance(error, SignInNeeded) and not _of_api(request):
        return _to_sign_in(request)
    if isinstance(error, LinkNeeded) and not _of_api(request) and not pages.partial(request):
        return pages.render(request, "closed.html", ClosedPage(), status=401, headers={"cache-control": "no-store"})
    return answer(request, of(cast(AtlasError, error)))


async def _validation(request: Request, error: Exception) -> Response:
    errors = list(cast(RequestValidationError, error).errors())
    message = _not_json(errors) or sentence(errors)
    return answer(request, Problem(422, _HEADINGS[422], message))


def _not_json(errors: list[dict[str, Any]]) -> str:
    """Return a sentence for a body that is no JSON, or nothing."""
    found = next((e for e in errors if e["type"] == "json_invalid"), None)
    if found is None:
        return ""
    reason = str(found.get("ctx", {}).get("error", "it cannot be read"))
    return f"The body is not valid JSON: {reason[:1].lower() + reason[1:]} at character {found['loc'][-1]}."


async def _http(request: Request, error: Exception) -> Response:
    fault = cast(HTTPException, error)
    message = "There is no page at this address." if fault.status_code == 404 else str(fault.detail)
    problem = Problem(
        fault.status_code, _HEADINGS.get(fault.status_code, "That did not work"), message, (("/", "Catalog"),)
    )
    return answer(request, problem, dict(fault.headers or {}))


async def _database(request: Request, error: Exception) -> Response:
    _logger.error("database", exc_info=error)
    message = "The database does not answer. Try again in a few seconds; `sae-atlas doctor` says what is wrong."
    return answer(request, Problem(503, _HEADINGS[503], message, retry_after=5))


async def _unexpected(request: Request, error: Exception) -> Response:
    request_id = str(getattr(request.state, "request_id", ""))
    _logger.error("failed", path=request.url.path[:200], exc_info=error)
    message = f"SAE Atlas made a mistake. Its log says more under request {request_id}."
    return answer(request, Problem(500, "Something broke", message, request_id=request_id))
