"""POST /api/comment/* and /api/bookmark/*: what people say of features and keep, in Neuronpedia's shape."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import AliasChoices, BaseModel, Field
from starlette.responses import Response

from app import bookmarks, catalog, comments
from app.api.features import Json, comment_json
from app.api.inputs import FeatureKey
from app.web import audit
from app.web.access import EDITOR, VIEWER, Who
from app.web.pages import Db

router = APIRouter(tags=["comments and bookmarks"])


class New(FeatureKey):
    text: str = Field(max_length=4 * comments.MAX_TEXT)


class CommentKey(BaseModel):
    commentId: int | str = Field(validation_alias=AliasChoices("commentId", "id"), union_mode="left_to_right")


@router.post("/comment/new", dependencies=[EDITOR])
def new(request: Request, body: New, who: Who, session: Db) -> Response:
    """Say something about a feature; `@name` tells a person of it."""
    subject = comments.of_feature(body.modelId, body.source, catalog.parse_index(body.index))
    made = comments.write(session, who, subject, body.text)
    said = next(each for each in comments.about(session, who, made.subject) if each.id == made.id)
    answer = comment_json(body.modelId, body.source, body.index, said)
    session.commit()
    audit.about(request, made.subject)
    return Json({"message": "Said.", "comment": answer})


@router.post("/comment/delete", dependencies=[EDITOR])
def delete(body: CommentKey, who: Who, session: Db) -> Response:
    """Delete one's own comment, an admin any."""
    comments.remove(session, who, catalog.parse_index(str(body.commentId)[:40]))
    session.commit()
    return Json({"message": "Comment deleted."})


@router.post("/bookmark/add", dependencies=[VIEWER])
def add(body: FeatureKey, who: Who, session: Db) -> Response:
    """Keep a feature among one's bookmarks; twice is once."""
    bookmarks.add(session, who, body.modelId, body.source, catalog.parse_index(body.index))
    session.commit()
    return Json({"message": "Bookmarked."})


@router.post("/bookmark/delete", dependencies=[VIEWER])
def drop(body: FeatureKey, who: Who, session: Db) -> Response:
    """Take a feature out of one's bookmarks."""
    bookmarks.drop(session, who, body.modelId, body.source, catalog.parse_index(body.index))
    session.commit()
    return Json({"message": "No longer bookmarked."})


@router.post("/bookmark/list", dependencies=[VIEWER])
def kept(who: Who, session: Db) -> Response:
    """One's own bookmarks, latest first."""
    return Json([_bookmark(each) for each in bookmarks.of(session, who)])


def _bookmark(listed: Any) -> dict[str, Any]:
    return {
        "modelId": listed.key.model_id,
        "layer": listed.key.source,
        "index": str(listed.key.index),
        "explanation": listed.feature.label if listed.feature else "",
    }
