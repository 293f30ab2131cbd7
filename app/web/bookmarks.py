"""A person's bookmarks: features to find again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Form, Request
from starlette.responses import RedirectResponse, Response

from app import bookmarks
from app.lists import Listed
from app.web.access import VIEWER, Who
from app.web.lists import address_of, key_of
from app.web.pages import Db, partial, render

router = APIRouter()


@dataclass(frozen=True)
class BookmarksPage:
    listed: tuple[Listed, ...]

    @property
    def quick(self) -> str:
        """All of them, as the form that makes a list of them sends them."""
        return address_of([each.key for each in self.listed])


@dataclass(frozen=True)
class Keeping:
    """The button on a feature's page."""

    path: str
    kept: bool


@router.get("/bookmarks", dependencies=[VIEWER])
def bookmarks_page(request: Request, who: Who, session: Db) -> Response:
    return render(request, "bookmarks.html", BookmarksPage(tuple(bookmarks.of(session, who))))


@router.post("/bookmarks", dependencies=[VIEWER])
def change(
    request: Request,
    who: Who,
    session: Db,
    feature: Annotated[str, Form(max_length=500)] = "",
    act: Annotated[str, Form(max_length=10)] = "add",
    back: Annotated[str, Form(max_length=10)] = "",
) -> Response:
    """Keep a feature or no longer, from its page or from the overview."""
    key = key_of(feature)
    change = bookmarks.drop if act == "drop" else bookmarks.add
    change(session, who, key.model_id, key.source, key.index)
    session.commit()
    if partial(request):
        return render(request, "_bookmark.html", Keeping(key.path, act != "drop"))
    return RedirectResponse("/bookmarks" if back else key.path, 303)
