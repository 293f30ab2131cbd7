"""Models and sets announced over the API, and their features in batches, as the official client sends them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import catalog
from app.api.features import Json
from app.api.inputs import FeatureKey, ModelId, SourceId
from app.exchange import batches
from app.exchange.batches import Rows, SetCard
from app.people import Actor
from app.settings import Settings
from app.web.access import EDITOR, GUEST, VIEWER, Who
from app.web.pages import Config, Db

router = APIRouter(tags=["uploads"])

MAX_BATCH = 128
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e30, le=1e30)]
Token = Annotated[str, Field(max_length=1_000)]
Words = Annotated[str | None, Field(max_length=2_000)]


class NewModel(BaseModel):
    id: Annotated[str, Field(min_length=1, max_length=100)]
    layers: int = Field(ge=1, le=batches.MAX_LAYERS)
    displayName: Annotated[str | None, Field(max_length=200)] = None
    url: Annotated[str | None, Field(max_length=500)] = None


class ModelKey(BaseModel):
    modelId: ModelId


class NewSet(BaseModel):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    modelId: ModelId
    description: Words = None
    url: Annotated[str | None, Field(max_length=500)] = None


class Logit(BaseModel):
    token: Token
    value: Number


class Said(BaseModel):
    text: Annotated[str, Field(min_length=1, max_length=20_000)]
    methodName: Annotated[str | None, Field(max_length=200)] = None
    modelName: Annotated[str | None, Field(max_length=200)] = None


class Example(BaseModel):
    tokens: Annotated[list[Token], Field(min_length=1, max_length=1_024)]
    values: Annotated[list[Number], Field(max_length=1_024)]
    quantileMin: Number | None = None
    quantileMax: Number | None = None
    quantileFraction: Annotated[float | None, Field(ge=0, le=1)] = None

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        if len(self.tokens) != len(self.values):
            raise ValueError(f"{len(self.tokens)} tokens, but {len(self.values)} values")
        return self


class NewFeature(BaseModel):
    index: int = Field(ge=0, lt=2**31)
    density: Annotated[float | None, Field(ge=0, le=1)] = None
    topLogits: Annotated[list[Logit] | None, Field(max_length=100)] = None
    bottomLogits: Annotated[list[Logit] | None, Field(max_length=100)] = None
    explanations: Annotated[list[Said] | None, Field(max_length=20)] = None
    activations: Annotated[list[Example], Field(min_length=1, max_length=200)]


class Batch(BaseModel):
    modelId: ModelId
    source: SourceId
    features: Annotated[list[NewFeature], Field(min_length=1, max_length=MAX_BATCH)]


class MoreExamples(FeatureKey):
    activations: Annotated[list[Example], Field(min_length=1, max_length=200)]


@router.post("/model/new", dependencies=[EDITOR])
def new_model(body: NewModel, session: Db) -> Response:
    """Add a model that is known by name alone, to send evidence of its sources."""
    made = batches.new_model(session, body.id, body.displayName or "", body.layers)
    answer = {"id": made.id, "layers": body.layers, "displayName": made.name, "website": body.url}
    session.commit()
    return Json(answer)


@router.post("/model/get", dependencies=[VIEWER])
def get_model(body: ModelKey, session: Db) -> Response:
    """One model."""
    card = catalog.model_entry(session, body.modelId).card
    return Json({"id": card.id, "layers": card.n_layers, "displayName": card.name, "website": None})


@router.post("/source-set/new", dependencies=[EDITOR])
def new_set(body: NewSet, who: Who, session: Db) -> Response:
    """Announce a set: a source for each layer of the model, which batches of features fill."""
    made = batches.new_set(session, who, body.modelId, body.name, body.description or "", body.url or "")
    session.commit()
    return Json(_set(made))


@router.get("/source-set/{model}/{name}", dependencies=[GUEST])
def get_set(model: str, name: str, session: Db) -> Response:
    """A set with its sources."""
    return Json(_set(batches.set_card(session, model, name)))


@router.post("/feature/upload-batch", dependencies=[EDITOR])
def upload_features(body: Batch, who: Who, session: Db, settings: Config) -> Response:
    """Send up to 128 features with their examples; `jobId` is the job that shows them when there are very many."""
    rows: Rows = {
        "features": [_feature(each) for each in body.features],
        "activations": [_example(f.index, e) for f in body.features for e in f.activations],
        "explanations": [_said(who, f.index, e) for f in body.features for e in f.explanations or ()],
    }
    return _taken(session, settings, who, body.modelId, body.source, rows, "features")


@router.post("/activation/upload-batch", dependencies=[EDITOR])
def upload_examples(body: MoreExamples, who: Who, session: Db, settings: Config) -> Response:
    """Send more examples of a feature that was sent before."""
    index = catalog.parse_index(body.index)
    rows: Rows = {"features": [], "activations": [_example(index, e) for e in body.activations], "explanations": []}
    return _taken(session, settings, who, body.modelId, body.source, rows, "activations")


def _taken(
    session: Session, settings: Settings, who: Actor, model: str, source: str, rows: Rows, kind: str
) -> Response:
    taken = batches.add(session, settings, who, model, source, rows)
    session.commit()
    later = {"jobId": taken.job_id} if taken.job_id is not None else {}
    return Json({"message": f"{len(rows[kind])} {kind} created.", **later})


def _feature(given: NewFeature) -> dict[str, Any]:
    up, down = given.topLogits or [], given.bottomLogits or []
    return {
        "index": given.index,
        "frac_nonzero": given.density or 0.0,
        "pos_str": [logit.token for logit in up],
        "pos_values": [logit.value for logit in up],
        "neg_str": [logit.token for logit in down],
        "neg_values": [logit.value for logit in down],
    }


def _example(index: int, given: Example) -> dict[str, Any]:
    return {
        "index": index,
        "tokens": given.tokens,
        "values": given.values,
        "binMin": given.quantileMin,
        "binMax": given.quantileMax,
        "binContains": given.quantileFraction,
    }


def _said(who: Actor, index: int, given: Said) -> dict[str, Any]:
    return {
        "index": index,
        "description": given.text,
        "typeName": given.methodName,
        "explanationModelName": given.modelName,
        "authorName": who.name,
    }


def _set(card: SetCard) -> dict[str, Any]:
    return {
        "name": card.name,
        "modelId": card.model_id,
        "description": card.description,
        "urls": [card.url] if card.url else [],
        "creatorName": card.owner,
        "sources": [{"id": name, "modelId": card.model_id, "setName": card.name} for name in card.sources],
    }
