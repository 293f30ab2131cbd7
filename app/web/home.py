"""The catalog's home, a model's page, and random features."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from app import catalog
from app.web.access import VIEWER
from app.web.pages import Db, render

router = APIRouter()


@router.get("/", dependencies=[VIEWER])
def home(request: Request, session: Db) -> Response:
    return render(request, "home.html", catalog.home(session))


@router.get("/random", dependencies=[VIEWER])
def random_anywhere(session: Db) -> Response:
    source = catalog.random_source(session)
    return RedirectResponse(f"{source.path}/{catalog.random_feature(session, source)}", 302)
