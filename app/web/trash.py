"""What was deleted in the last 30 days, and the way back."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from app import explanations, steerings, trash, visibility
from app.catalog import parse_index
from app.explanations import Retired
from app.trash import Entry
from app.web.access import EDITOR, VIEWER, Who
from app.web.pages import Db, render

router = APIRouter()


@dataclass(frozen=True)
class TrashPage:
    entries: tuple[Entry, ...]
    explanations: tuple[Retired, ...]
    days: int = trash.DAYS


@router.get("/trash", dependencies=[VIEWER])
def trash_page(request: Request, who: Who, session: Db) -> Response:
    page = TrashPage(tuple(trash.entries(session, who)), tuple(explanations.retired(session, who, trash.DAYS)))
    return render(request, "trash.html", page)


@router.post("/trash/{number}/restore", dependencies=[EDITOR])
def restore(number: str, who: Who, session: Db) -> Response:
    """Give it back as it was, and go there."""
    path = trash.path(trash.restore(session, who, parse_index(number)))
    session.commit()
    return RedirectResponse(path, 303)


@router.post("/trash/explanations/{number}/restore", dependencies=[EDITOR])
def restore_explanation(number: str, who: Who, session: Db) -> Response:
    explanations.restore(session, who, parse_index(number))
    session.commit()
    return RedirectResponse("/trash", 303)


@router.post("/{model}/steer/{run_id}/delete", dependencies=[EDITOR])
def delete_run(model: str, run_id: str, who: Who, session: Db) -> Response:
    run = steerings.get(session, run_id)
    visibility.check_may_change(who, run.owner, "This run")
    trash.put(session, who, run)
    session.commit()
    return RedirectResponse(f"/{run.model_id}/steer", 303)
