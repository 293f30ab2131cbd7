"""POST /api/list/*: lists of features, in Neuronpedia's shape."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, StringConstraints
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import catalog, lists, trash
from app.api.features import Json
from app.api.inputs import FeatureKey
from app.lists import Key, Listed, Visibility
from app.tables import FeatureList
from app.web import audit
from app.web.access import EDITOR, VIEWER, Who
from app.web.pages import Db, base_of

router = APIRouter(prefix="/list", tags=["lists"])

Words = Annotated[str | None, Field(max_length=lists.MAX_TEXT)]
ListId = Annotated[str, Field(max_length=64)]


class NewFeature(FeatureKey):
    description: Words = None


class New(BaseModel):
    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=lists.MAX_NAME)]
    description: Words = None
    testText: Words = None
    visibility: Visibility = Visibility.TEAM


class NewWithFeatures(New):
    features: list[NewFeature] = Field(max_length=lists.MAX_FEATURES)


class ListKey(BaseModel):
    listId: ListId


class AddFeatures(ListKey):
    featuresToAdd: list[NewFeature] = Field(max_length=lists.MAX_FEATURES)


class OneFeature(FeatureKey):
    listId: ListId


class EditFeature(OneFeature):
    description: Words = None


@router.post("/new", dependencies=[EDITOR])
def new(body: New, who: Who, session: Db) -> Response:
    """Make an empty list."""
    made = lists.new(session, who, body.name, body.description or "", body.testText or "", body.visibility)
    answer = _row(made)
    session.commit()
    return Json(answer)


@router.post("/new-with-features", dependencies=[EDITOR])
def new_with_features(request: Request, body: NewWithFeatures, who: Who, session: Db) -> Response:
    """Make a list of some features; `url` is where it is shown."""
    features = [_key(feature) for feature in body.features]
    text, tried = body.description or "", body.testText or ""
    made = lists.new(session, who, body.name, text, tried, body.visibility, features)
    answer = {**_row(made), "url": f"{base_of(request)}/lists/{made.id}"}
    session.commit()
    return Json(answer)


@router.post("/list", dependencies=[VIEWER])
def owned(who: Who, session: Db) -> Response:
    """One's own lists, newest change first."""
    found = [lists.get(session, who, summary.id) for summary in lists.seen_by(session, who, owned=True)]
    return Json([_row(each) for each in found])


@router.post("/get", dependencies=[VIEWER])
def get(body: ListKey, who: Who, session: Db) -> Response:
    """A list with its features as `neurons`, in its order."""
    found = lists.get(session, who, body.listId)
    listed = lists.described(session, lists.keys(lists.items(session, found)))
    return Json({**_row(found), "neurons": [_neuron(each) for each in listed]})


@router.post("/add-features", dependencies=[EDITOR])
def add_features(request: Request, body: AddFeatures, who: Who, session: Db) -> Response:
    """Put features at the end of a list; those that are new to it are answered."""
    found = lists.to_change(session, who, body.listId)
    added = lists.add(session, found, [_key(feature) for feature in body.featuresToAdd])
    answer = [_neuron(each) for each in lists.described(session, added)]
    session.commit()
    audit.about(request, f"/lists/{found.id}")
    return Json(answer)


@router.post("/edit-feature", dependencies=[EDITOR])
def edit_feature(body: EditFeature, who: Who, session: Db) -> Response:
    """Change what is said of a feature in a list."""
    found = lists.to_change(session, who, body.listId)
    lists.annotate(found, _held(session, found, body), body.description or "")
    session.commit()
    return Json({"message": "Changed."})


@router.post("/remove", dependencies=[EDITOR])
def remove(body: OneFeature, who: Who, session: Db) -> Response:
    """Take a feature out of a list."""
    found = lists.to_change(session, who, body.listId)
    lists.drop(session, found, _held(session, found, body))
    session.commit()
    return Json({"message": "Removed."})


@router.post("/delete", dependencies=[EDITOR])
def delete(body: ListKey, who: Who, session: Db) -> Response:
    """Delete a list; its features stay."""
    trash.put(session, who, lists.to_change(session, who, body.listId))
    session.commit()
    return Json({"message": "List deleted."})


def _key(feature: NewFeature) -> Key:
    return Key(feature.modelId, feature.source, catalog.parse_index(feature.index), feature.description or "")


def _held(session: Session, found: FeatureList, body: OneFeature) -> Any:
    return lists.item(session, found, body.modelId, body.source, catalog.parse_index(body.index))


def _row(found: FeatureList) -> dict[str, Any]:
    return {
        "id": found.id,
        "name": found.name,
        "description": found.description,
        "defaultTestText": found.test_text,
        "visibility": found.visibility,
        "userId": found.owner,
        "createdAt": found.created_at,
        "updatedAt": found.updated_at,
    }


def _neuron(listed: Listed) -> dict[str, Any]:
    key, feature = listed.key, listed.feature
    return {
        "modelId": key.model_id,
        "layer": key.source,
        "index": str(key.index),
        "description": key.note,
        "maxActApprox": feature.max_act if feature else None,
        "frac_nonzero": feature.density if feature else None,
        "explanation": feature.label if feature else "",
    }
