"""Search over explanations, by words and meaning, in Neuronpedia's shape: in sources, in a model, in everything."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import search
from app.api.features import Json
from app.labelindex import LabelIndex
from app.search import Hit, Results, Scope
from app.web.access import VIEWER
from app.web.pages import Db

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
