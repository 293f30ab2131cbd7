"""The search page: labels and explanations of all SAEs, by text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app import search
from app.search import Results
from app.web.pages import Db, partial, query, render

router = APIRouter()


@dataclass(frozen=True)
class SearchPage:
    q: str
    model: str
    results: Results

    @property
    def next(self) -> str | None:
        offset = self.results.next_offset
        return None if offset is None else "/search" + query({"q": self.q, "model": self.model, "offset": offset})

    @property
    def previous(self) -> str | None:
        offset = self.results.offset - search.PAGE_SIZE
        if self.results.offset == 0:
            return None
        return "/search" + query({"q": self.q, "model": self.model, "offset": max(offset, 0) or None})


@router.get("/search")
def search_page(
    request: Request,
    session: Db,
    q: Annotated[str, Query(max_length=500)] = "",
    model: Annotated[str, Query(max_length=200)] = "",
    offset: Annotated[int, Query(ge=0, lt=2**31)] = 0,
) -> Response:
    page = SearchPage(q, model, search.labels(session, q, model_id=model.replace("\0", ""), offset=offset))
    return render(request, "_hits.html" if partial(request) else "search.html", page)
