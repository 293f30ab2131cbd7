"""Training for programs: /api/train queues a spec, JSON or YAML, estimates it, and tells what its fields mean."""

from __future__ import annotations

import json
from typing import Annotated, Any, cast

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app import catalog, harvestplan, trainforms, trainings, yamlspec
from app.api.queue import JobView, now_of
from app.errors import BadInput, TooLarge
from app.settings import Settings
from app.trainings import BadSpec, Outlook
from app.trainspecs import SaeSpec, TrainSpec
from app.web.access import EDITOR, VIEWER
from app.web.pages import Config, Db

router = APIRouter(prefix="/train", tags=["training"])

_EXAMPLE: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "corpus": "demo",
    "hook_name": "blocks.12.hook_resid_post",
    "set_name": "mine",
    "architecture": "topk",
    "d_sae": 4096,
    "k": [16, 32, 64],
    "n_tokens": 2_000_000,
    "harvest_tokens": 1_000_000,
}
_FLAT: dict[str, Any] = {
    "type": "object",
    "description": "A training. Fields of an SAE stand outside for all of them, or in `saes` for each; lists of values "
    "make one SAE of each combination. YAML text is read too, as such or under `yaml`.",
    "required": ["model", "corpus"],
    "properties": {
        **TrainSpec.model_json_schema()["properties"],
        **SaeSpec.model_json_schema()["properties"],
        "saes": {"type": "array", "items": {"type": "object"}, "description": "SAEs that differ in other fields."},
    },
    "example": _EXAMPLE,
}
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _FLAT}, "application/yaml": {"schema": {"type": "string"}}},
    },
    "responses": {"422": {"description": "What is wrong, as a sentence and by field.", "content": {}}},
}


class HarvestView(BaseModel):
    """What the harvest that follows a training will take. Bytes and seconds."""

    tokens: int
    seconds: float
    measured: bool = Field(description="By earlier harvests here; else for two CPU cores.")
    memoryBytes: int
    workingDiskBytes: int
    keptDiskBytes: int


class EstimateView(BaseModel):
    """What a training will take. Bytes and seconds."""

    title: str
    sources: list[str]
    seconds: float
    measured: bool = Field(description="By earlier trainings here; else for two CPU cores.")
    tokens: int = Field(description="Distinct tokens learned from.")
    tokensSeen: int = Field(description="By each SAE, over all epochs.")
    steps: int
    cached: bool = Field(description="All activations are kept on disk, else shuffled in a buffer.")
    availableTokens: int
    counted: bool = Field(description="The corpus was counted for this tokenizer; else guessed from its characters.")
    memoryBytes: int
    diskBytes: int
    freeDiskBytes: int
    saeBytes: int
    evaluationSeconds: float = Field(
        description="Looks at held-out text while it trains, and the evaluation at the end."
    )
    harvest: HarvestView | None = Field(description="The job that makes the dashboards afterwards; null without one.")
    wholeSeconds: float = Field(description="Of training, evaluation and harvest together.")
    notes: list[str]
    yaml: str


class PresetView(BaseModel):
    """A starting point for a model: a spec without its corpus."""

    key: str
    name: str
    about: str
    spec: dict[str, Any]


@router.post("", dependencies=[EDITOR], status_code=201, response_model=JobView, openapi_extra=_BODY)
async def train(request: Request, session: Db, settings: Config) -> Response:
    """Queue a training; the answer is its job. What is wrong with a spec is told field by field in `faults`."""
    fields = await _fields(request)

    def act() -> Response:
        try:
            job = trainings.queue(session, settings, trainings.read(fields))
        except BadSpec as error:
            session.rollback()
            return _refused(error)
        session.commit()
        return JSONResponse(now_of(session, settings, job.id).model_dump(mode="json"), 201)

    return await run_in_threadpool(act)


@router.post("/estimate", dependencies=[VIEWER], response_model=EstimateView, openapi_extra=_BODY)
async def estimate(request: Request, session: Db, settings: Config) -> Response:
    """Say what a training will take, and queue nothing."""
    fields = await _fields(request)

    def act() -> Response:
        try:
            return JSONResponse(_view(session, settings, fields).model_dump(mode="json"))
        except BadSpec as error:
            return _refused(error)

    return await run_in_threadpool(act)


@router.get("/presets", dependencies=[VIEWER])
def presets(model: Annotated[str, Query(max_length=200)], session: Db) -> list[PresetView]:
    """Return starting points for a model: quick try, standard quality, wide, and sweeps."""
    card = catalog.model_entry(session, model).card
    return [
        PresetView(key=p.key, name=p.name, about=p.about, spec={"model": card.id, **trainforms.from_form(p.values)})
        for p in trainforms.presets(card)
    ]


@router.get("/schema", dependencies=[VIEWER])
def schema() -> dict[str, Any]:
    """Return every field with its meaning, bounds and default, as JSON Schema."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "TrainSpec", **_FLAT}


async def _fields(request: Request) -> dict[str, Any]:
    """The fields of a spec that a body holds: a JSON object, `{"yaml": text}`, or YAML text."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > yamlspec.MAX_BYTES:
            raise TooLarge(f"A spec may be {yamlspec.MAX_BYTES:,} bytes; this is more.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"The spec is no UTF-8 text: byte {error.start:,} is not.") from None
    if "json" not in request.headers.get("content-type", "json"):
        return yamlspec.load(text)
    try:
        found: Any = json.loads(text)
    except RecursionError:
        raise BadInput("The JSON is nested too deeply.") from None
    except ValueError as error:
        raise BadInput(f"The body is no JSON: {error}. For YAML say content-type: application/yaml.") from None
    if not isinstance(found, dict):
        raise BadInput("A spec is a JSON object, such as that of GET /api/train/presets.")
    given = cast(dict[str, Any], found)
    return yamlspec.load(given["yaml"]) if set(given) == {"yaml"} and isinstance(given["yaml"], str) else given


def _refused(error: BadSpec) -> Response:
    faults = [{"field": fault.field, "text": fault.text} for fault in error.faults]
    content = {"error": error.message, "message": error.message, "faults": faults}
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
    return Response(body, error.status, media_type="application/json")


def _view(session: Session, settings: Settings, fields: dict[str, Any]) -> EstimateView:
    found: Outlook = trainings.outlook(session, settings, trainings.read(fields))
    takes, spec = found.estimate, found.spec
    return EstimateView(
        title=spec.title,
        sources=[sae.source for sae in spec.saes],
        seconds=takes.seconds,
        measured=found.speed.measured,
        tokens=takes.tokens,
        tokensSeen=takes.tokens_seen,
        steps=takes.steps,
        cached=takes.cached,
        availableTokens=found.available,
        counted=found.counted,
        memoryBytes=takes.memory_bytes,
        diskBytes=takes.disk_bytes,
        freeDiskBytes=found.free_bytes,
        saeBytes=takes.sae_bytes,
        evaluationSeconds=takes.evaluation_seconds,
        harvest=_harvest_view(found.harvest),
        wholeSeconds=found.whole_seconds,
        notes=list(found.notes),
        yaml=yamlspec.dump(trainforms.short(spec)),
    )


def _harvest_view(takes: harvestplan.Estimate | None) -> HarvestView | None:
    if takes is None:
        return None
    return HarvestView(
        tokens=takes.n_tokens,
        seconds=takes.seconds,
        measured=takes.measured > 0,
        memoryBytes=takes.memory_bytes,
        workingDiskBytes=takes.working_disk_bytes,
        keptDiskBytes=takes.kept_disk_bytes,
    )
