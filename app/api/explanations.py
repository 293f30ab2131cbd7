"""Explanations in Neuronpedia's shape: searched by words and meaning; written, voted on, taken back."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import catalog, embeddings, explanations, search
from app.api.features import Json
from app.api.inputs import FeatureKey
from app.labelindex import LabelIndex
from app.people import Actor
from app.search import Hit, Results, Scope
from app.web import audit
from app.web.access import EDITOR, VIEWER, Who
from app.web.pages import Config, Db

router = APIRouter(prefix="/explanation", tags=["explanations"])


class Everywhere(BaseModel):
    query: str = Field(max_length=1000)
    offset: int = Field(0, ge=0, lt=2**31)


class InModel(Everywhere):
    modelId: str = Field(max_length=200)


class InSources(InModel):
    layers: list[str] = Field(default_factory=list[str], max_length=1000)
    """Source ids; none means all of the model."""


@router.post("/search", dependencies=[VIEWER])
def search_sources(request: Request, wanted: InSources, session: Db) -> Response:
    """Explanations of some sources of a model that fit the query by words or meaning, closest first."""
    return Json(_results(wanted, _found(request, session, wanted, Scope(wanted.modelId, sources=tuple(wanted.layers)))))


@router.post("/search-model", dependencies=[VIEWER])
def search_model(request: Request, wanted: InModel, session: Db) -> Response:
    """Explanations of one model that fit the query by words or meaning, closest first."""
    return Json(_results(wanted, _found(request, session, wanted, Scope(wanted.modelId))))


@router.post("/search-release", dependencies=[VIEWER])
@router.post("/search-all", dependencies=[VIEWER])
def search_everything(request: Request, wanted: Everywhere, session: Db) -> Response:
    """Explanations anywhere in the catalog that fit the query by words or meaning, closest first."""
    return Json(_results(wanted, _found(request, session, wanted, Scope())))


class New(FeatureKey):
    description: str = Field(max_length=20_000)


@router.post("/new", dependencies=[EDITOR])
def new(request: Request, body: New, who: Who, session: Db, settings: Config) -> Response:
    """Say what a feature means; the explanation that most people agree with is its label."""
    index = catalog.parse_index(body.index)
    made = explanations.write(session, who, body.modelId, body.source, index, body.description)
    embeddings.queue(session, settings)
    answer = {
        "id": str(made.id),
        "modelId": body.modelId,
        "layer": body.source,
        "index": str(index),
        "description": made.text,
        "typeName": made.method,
        "explanationModelName": made.author,
    }
    session.commit()
    audit.about(request, f"/{body.modelId}/{body.source}/{index}")
    return Json({"explanation": answer})


@router.post("/{explanation_id}/vote", dependencies=[EDITOR])
def vote(explanation_id: int, who: Who, session: Db) -> Response:
    """Agree with an explanation; twice is once."""
    return _voted(session, who, explanation_id, True)


@router.post("/{explanation_id}/unvote", dependencies=[EDITOR])
def unvote(explanation_id: int, who: Who, session: Db) -> Response:
    """No longer agree with an explanation."""
    return _voted(session, who, explanation_id, False)


@router.post("/{explanation_id}/delete", dependencies=[EDITOR])
def delete(explanation_id: int, who: Who, session: Db) -> Response:
    """Take an explanation back: one's own, an admin any. It stays in the feature's history."""
    explanations.retire(session, who, explanation_id)
    session.commit()
    return Json({"message": "Explanation deleted."})


def _voted(session: Session, who: Actor, explanation_id: int, agree: bool) -> Response:
    found = explanations.vote(session, who, explanation_id, agree)
    n_votes = found.n_votes
    session.commit()
    return Json({"message": "Voted." if agree else "Vote taken back.", "votes": n_votes})


def _found(request: Request, session: Session, wanted: Everywhere, scope: Scope) -> Results:
    labels: LabelIndex = request.app.state.labels
    return search.find(session, labels.current(session), wanted.query, scope, offset=wanted.offset)


def _results(wanted: BaseModel, found: Results) -> dict[str, Any]:
    more = {"nextOffset": found.next_offset} if found.next_offset is not None else {}
    return {
        "request": wanted.model_dump(),
        "results": [_hit(hit) for hit in found.hits],
        "resultsCount": len(found.hits),
        "hasMore": found.next_offset is not None,
        **more,
    }


def _hit(hit: Hit) -> dict[str, Any]:
    index = str(hit.feature.index)
    return {
        "id": str(hit.explanation_id),
        "modelId": hit.model_id,
        "layer": hit.source,
        "index": index,
        "description": hit.text,
        "explanationModelName": hit.author,
        "typeName": hit.method,
        "cosine_similarity": hit.closeness if hit.cosine is None else round(hit.cosine, 4),
        "neuron": {
            "modelId": hit.model_id,
            "layer": hit.source,
            "index": index,
            "maxActApprox": hit.feature.max_act,
            "frac_nonzero": hit.feature.density,
        },
    }
