"""POST /api/vector/new, get, list-owned, delete: custom steering vectors; and difference, which computes one."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app import catalog, steering_vectors, vectors
from app.api.inputs import FeatureKey, ModelId, find_feature, texts_of
from app.protocol import DifferenceRequest
from app.steering import MAX_COEFFICIENT
from app.tables import SteeringVector
from app.web.access import EDITOR, VIEWER, Who
from app.web.pages import Config, Db, Gpu, read

router = APIRouter(prefix="/vector", tags=["steering"])

Strength = Annotated[float, Field(ge=-MAX_COEFFICIENT, le=MAX_COEFFICIENT, allow_inf_nan=False)]
Label = Annotated[str, Field(max_length=200)]
Layer = Annotated[int, Field(ge=0, lt=10_000)]


class New(BaseModel):
    modelId: ModelId
    layerNumber: Layer
    hookType: Literal["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"]
    vector: list[Annotated[float, Field(allow_inf_nan=False)]] = Field(min_length=1, max_length=2**17)
    vectorDefaultSteerStrength: Strength | None = 10
    vectorLabel: Label = ""


class Difference(BaseModel):
    """Mean activation over `plus` less that over `minus`."""

    modelId: ModelId
    layerNumber: Layer
    hookType: Literal["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out"] = (
        "hook_resid_post"
    )
    plus: list[str]
    minus: list[str]
    lastTokenOnly: bool = False
    vectorLabel: Label = ""


@router.post("/new", dependencies=[EDITOR])
def new(body: New, session: Db) -> Response:
    """Store a vector. It is scaled to norm 1 when it steers; its numbers are kept as they are."""
    strength = 10.0 if body.vectorDefaultSteerStrength is None else body.vectorDefaultSteerStrength
    hook = f"blocks.{body.layerNumber}.{body.hookType}"
    vector = steering_vectors.add(session, body.modelId, hook, body.vectorLabel, body.vector, strength, "uploaded")
    answer = _made(vector)
    session.commit()
    return _json(answer)


@router.post("/difference", dependencies=[EDITOR])
async def difference(body: Difference, session: Db, settings: Config, worker: Gpu) -> Response:
    """Compute a vector from two sets of texts and store it; its default strength is the difference's own norm."""
    model = await read(session, catalog.model_entry, session, body.modelId)
    hook = f"blocks.{body.layerNumber}.{body.hookType}"
    asked = DifferenceRequest(
        model=catalog.model_ref(settings, model.card.id),
        hook_name=hook,
        plus=texts_of(settings, body.plus),
        minus=texts_of(settings, body.minus),
        last_only=body.lastTokenOnly,
    )
    await worker.ready(asked.model, [])
    reply = await worker.difference(asked)
    numbers = np.frombuffer(base64.b64decode(reply.vector), "<f4")
    where = "their last tokens" if body.lastTokenOnly else "their tokens"
    about = f"mean of {len(asked.plus)} texts less mean of {len(asked.minus)}, over {where}, at {hook}"
    label = body.vectorLabel or f"“{asked.plus[0][:40]}” less “{asked.minus[0][:40]}”"

    def store() -> dict[str, Any]:
        strength = round(reply.norm, 3)
        vector = steering_vectors.add(session, body.modelId, hook, label, numbers.tolist(), strength, about)
        answer = _made(vector)
        session.commit()
        return {**answer, "norm": reply.norm, "usualNorm": reply.usual_norm}

    return _json(await run_in_threadpool(store))


@router.post("/get", dependencies=[VIEWER])
def get(body: FeatureKey, session: Db, settings: Config) -> Response:
    """Return a vector, or a feature's decoder row as one."""
    if steering_vectors.is_address(body.source):
        return _json({"vector": _row(steering_vectors.get(session, body.modelId, body.source, body.index))})
    source, latent = find_feature(session, body)
    row = {
        "modelId": source.model_id,
        "layer": source.name,
        "source": source.name,
        "index": str(latent),
        "vectorLabel": "",
        "hookName": source.hook_name,
        "vector": vectors.decoder_row(settings, source.sae_hash, latent).tolist(),
        "vectorDefaultSteerStrength": 10,
    }
    return _json({"vector": row})


@router.post("/list-owned", dependencies=[VIEWER])
def list_owned(session: Db) -> Response:
    """Return one's own vectors and those that others show."""
    return _json({"vectors": [_row(vector) for vector in steering_vectors.owned(session)]})


@router.post("/delete", dependencies=[EDITOR])
def delete(body: FeatureKey, who: Who, session: Db) -> Response:
    steering_vectors.delete(session, who, body.modelId, body.source, body.index)
    session.commit()
    return _json({"message": "Vector deleted."})


def _made(vector: SteeringVector) -> dict[str, Any]:
    row = _row(vector)
    made = {"label": vector.label, "values": row["vector"], "defaultSteerStrength": vector.default_strength}
    return {"message": "Vector created.", "url": steering_vectors.path(vector), "vector": {**row, **made}}


def _row(vector: SteeringVector) -> dict[str, Any]:
    source = steering_vectors.source_of(vector)
    return {
        "modelId": vector.model_id,
        "layer": source,
        "source": source,
        "index": str(vector.id),
        "vectorLabel": vector.label,
        "hookName": vector.hook_name,
        "vector": steering_vectors.numbers(vector).tolist(),
        "vectorDefaultSteerStrength": vector.default_strength,
        "about": vector.about,
        "createdAt": vector.created_at.isoformat(),
    }


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
