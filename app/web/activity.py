"""What the team did lately."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app import activity
from app.activity import Done
from app.web.access import VIEWER, Who
from app.web.pages import Db, query, render

router = APIRouter()


@dataclass(frozen=True)
class ActivityPage:
    done: tuple[Done, ...]
    who: str
    kind: str
    older: str
    kinds: tuple[str, ...] = activity.KINDS


@router.get("/activity", dependencies=[VIEWER])
def activity_page(
    request: Request,
    reader: Who,
    session: Db,
    who: Annotated[str, Query(max_length=64)] = "",
    kind: Annotated[str, Query(max_length=20)] = "",
    before: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
) -> Response:
    kind = kind if kind in activity.KINDS else ""
    found, last = activity.done(session, reader, who, kind, before)
    older = "/activity" + query({"who": who, "kind": kind, "before": last}) if last else ""
    page = ActivityPage(tuple(found), who, kind, older)
    return render(request, "activity.html", page, headers={"cache-control": "no-store"})
