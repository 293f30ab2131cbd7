"""POST /api/share: who sees an SAE, a job, a steering run, a vector or a list, and the address of its public link."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import catalog, lists, visibility
from app.api.features import Json
from app.errors import BadInput
from app.people import Actor
from app.visibility import Visibility
from app.web import sharing
from app.web.access import EDITOR, Who
from app.web.pages import Db, base_of

router = APIRouter(tags=["sharing"])


class Share(BaseModel):
    """What is meant: an SAE by `modelId` and `source`, anything else by `id`."""

    kind: Literal["sae", "job", "run", "vector", "list"]
    id: str | int = Field("", union_mode="left_to_right")
    modelId: str = Field("", max_length=200)
    source: str = Field("", max_length=200)
    visibility: Visibility | None = None
    """Who sees it from now on; without it nothing changes."""


@router.post("/share", dependencies=[EDITOR])
def share(request: Request, body: Share, who: Who, session: Db) -> Response:
    """Say who sees something of one's own: its owner (`private`), the team, or also whoever has its `link`."""
    if body.visibility == Visibility.LINK and who.id is None:
        raise BadInput("A public link needs accounts: without them everything here is seen by whoever may come in.")
    owner, seen_by, link = _list(session, who, body) if body.kind == "list" else _owned(session, who, body)
    session.commit()
    address = f"{base_of(request)}{link}" if seen_by == Visibility.LINK else ""
    return Json({"kind": body.kind, "owner": owner, "visibility": seen_by, "url": address})


def _list(session: Session, who: Actor, body: Share) -> tuple[str, str, str]:
    found = lists.to_change(session, who, str(body.id))
    if body.visibility is not None:
        lists.share(found, body.visibility)
    return found.owner, found.visibility, f"/lists/{found.id}"


def _owned(session: Session, who: Actor, body: Share) -> tuple[str, str, str]:
    key = str(body.id)
    if body.kind == "sae" and not key:
        key = str(catalog.source_card(session, body.modelId, body.source).id)
    found = visibility.find(session, body.kind, key)
    visibility.check_may_change(who, found.owner, "It")
    if body.visibility is not None:
        sharing.change(session, who, found, body.visibility)
    return found.owner, found.visibility, f"/shared/{found.link}"
