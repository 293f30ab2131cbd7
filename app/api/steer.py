"""POST /api/steer and /api/steer-load: default and steered text of a model, at once or as server-sent events.

Wire format of Neuronpedia; unlike there freq_penalty, log-probabilities and PROJECTION_CAP do what they say. A client
that goes away ends its run within a token, streamed or not. Finished runs are saved; an unfinished one is not.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from app import catalog, steerings
from app.api.inputs import FeatureKey, ModelId, check_text, find_feature
from app.catalog import SourceCard
from app.errors import AtlasError, BadInput, Unavailable
from app.protocol import End, GenerateRequest, Start, SteerDirection, SteerMethod, Token
from app.settings import Settings
from app.tokens import Vocabulary
from app.web.pages import Config, Db, Gpu

router = APIRouter(tags=["steering"])

MAX_COEFFICIENT = 1e6
"""Beyond this a float16 residual stream overflows whatever its model; residual norms of large models reach 1e4."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class SteerFeature(FeatureKey):
    strength: Number


class Steer(BaseModel):
    prompt: str
    modelId: ModelId
    features: list[SteerFeature]
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.5
    n_tokens: Annotated[int, Field(ge=1)] = 48
    freq_penalty: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 16
    strength_multiplier: Number = 1
    stream: bool = False
    steer_method: SteerMethod = SteerMethod.ADDITIVE
    n_logprobs: Annotated[int, Field(ge=0, le=20)] = 0


class SteerLoad(BaseModel):
    steerOutputId: str


@dataclass
class _Texts:
    """Both continuations as they grow."""

    words: Vocabulary
    logprobs: bool
    ids: dict[Literal["default", "steered"], list[int]] = field(default_factory=lambda: {"default": [], "steered": []})
    entries: dict[Literal["default", "steered"], list[dict[str, Any]]] = field(
        default_factory=lambda: {"default": [], "steered": []}
    )

    def add(self, token: Token) -> None:
        self.ids[token.row].append(token.id)
        if self.logprobs:
            self.entries[token.row].append(self._entry(token))

    def so_far(self, *, final: bool = False) -> dict[str, Any]:
        """The whole answer at this point; a character whose last bytes have not come is held back."""
        texts = {row: self.words.text(ids) for row, ids in self.ids.items()}
        if not final:
            texts = {row: text.rstrip("\ufffd") for row, text in texts.items()}
        return {
            "STEERED": texts["steered"],
            "DEFAULT": texts["default"],
            "steeredLogProbs": self.entries["steered"] if self.logprobs else None,
            "defaultLogProbs": self.entries["default"] if self.logprobs else None,
            "id": None,
            "shareUrl": None,
            "limit": None,
        }

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [{"token": self.words.string(id_), "logprob": logprob} for id_, logprob in token.top]
        return {"token": self.words.string(token.id), "logprob": token.logprob, "top_logprobs": top}


@router.post("/steer")
@router.post("/steer/", include_in_schema=False)
async def steer(request: Request, body: Steer, session: Db, settings: Config, worker: Gpu) -> Response:
    """Continue a prompt with and without steering: `STEERED` and `DEFAULT` are the continuations alone.

    coefficient = strength x strength_multiplier, in units of the feature's activation. With stream=true each `data:` of
    the event stream is the whole answer so far, the last one with `id` and `shareUrl`.
    """
    _check(settings, body)
    sources = await run_in_threadpool(_sources, session, body)
    asked = _generate_request(settings, body, sources)
    texts = _Texts(catalog.vocabulary_of(settings, body.modelId), body.n_logprobs > 0)
    saved = _record(body, sources)
    sessions: sessionmaker[Session] = request.app.state.sessions
    await worker.ready(asked.model, [direction.sae for direction in asked.directions])
    events = worker.generate(asked)
    await anext(events)  # the start: whatever can be refused is refused by now, with its own status
    if body.stream:
        # The text so far is sent again and again, so proxies must not wait for more of it.
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(_sse(events, texts, sessions, saved), 200, headers, "text/event-stream")
    async with aclosing(events):
        async for event in events:
            _take(texts, event)
            if await request.is_disconnected():
                return Response(status_code=499)
    return _json(await run_in_threadpool(_save, sessions, saved, texts.so_far(final=True)))


@router.post("/steer-load")
@router.post("/steer-load/", include_in_schema=False)
def steer_load(body: SteerLoad, session: Db) -> Response:
    """Return a saved run: its result, features, prompt and settings."""
    run = steerings.get(session, body.steerOutputId)
    return _json({**run.request, **run.result, "inputText": run.request["prompt"]})


def _check(settings: Settings, body: Steer) -> None:
    check_text(settings, body.prompt)
    if body.n_tokens > settings.max_new_tokens:
        raise BadInput(f"{body.n_tokens} new tokens are too many; one run makes up to {settings.max_new_tokens}.")
    if len(body.features) > settings.max_steer_features:
        raise BadInput(
            f"{len(body.features)} features are too many; one run steers up to {settings.max_steer_features}."
        )
    for feature in body.features:
        if feature.modelId != body.modelId:
            raise BadInput(f"A feature of {feature.modelId[:60]} cannot steer {body.modelId[:60]}.")
        coefficient = feature.strength * body.strength_multiplier
        if not abs(coefficient) <= MAX_COEFFICIENT:
            raise BadInput(
                f"Strength {feature.strength:g} times {body.strength_multiplier:g} is {coefficient:g}; "
                f"it may be from -{MAX_COEFFICIENT:g} to {MAX_COEFFICIENT:g}."
            )


def _sources(session: Session, body: Steer) -> list[tuple[SourceCard, int]]:
    catalog.model_entry(session, body.modelId)
    return [find_feature(session, feature) for feature in body.features]


def _generate_request(settings: Settings, body: Steer, sources: list[tuple[SourceCard, int]]) -> GenerateRequest:
    return GenerateRequest(
        model=catalog.model_ref(settings, body.modelId),
        prompt=body.prompt,
        directions=[
            SteerDirection(
                sae=catalog.sae_ref(settings, source),
                latent=latent,
                coefficient=feature.strength * body.strength_multiplier,
            )
            for feature, (source, latent) in zip(body.features, sources, strict=True)
        ],
        method=body.steer_method,
        max_new_tokens=body.n_tokens,
        temperature=body.temperature,
        freq_penalty=body.freq_penalty,
        seed=body.seed,
        n_logprobs=body.n_logprobs,
    )


def _record(body: Steer, sources: list[tuple[SourceCard, int]]) -> dict[str, Any]:
    """What is saved of the request: enough to run it again on the same weights."""
    features = [
        {
            "modelId": source.model_id,
            "layer": source.name,
            "index": str(latent),
            "strength": feature.strength,
            "saeHash": source.sae_hash,
        }
        for feature, (source, latent) in zip(body.features, sources, strict=True)
    ]
    return body.model_dump(mode="json", exclude={"stream", "features"}) | {"features": features}


async def _sse(
    events: AsyncGenerator[Start | Token | End],
    texts: _Texts,
    sessions: sessionmaker[Session],
    saved: Mapping[str, Any],
) -> AsyncIterator[bytes]:
    async with aclosing(events):
        try:
            async for event in events:
                if _take(texts, event):
                    yield _data(texts.so_far())
            yield _data(await run_in_threadpool(_save, sessions, saved, texts.so_far(final=True)))
        except AtlasError as error:
            yield _data({**texts.so_far(final=True), "error": error.message, "message": error.message})


def _take(texts: _Texts, event: Start | Token | End) -> bool:
    """Add a token; tell whether a step is complete. Raises Unavailable when the run ended badly."""
    if isinstance(event, Token):
        texts.add(event)
        return not event.more
    if isinstance(event, End) and event.error:
        raise Unavailable(event.error)
    return False


def _save(sessions: sessionmaker[Session], request: Mapping[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    with sessions.begin() as session:
        run = steerings.save(session, request["modelId"], request, {})
        result = {**result, "id": run.id, "shareUrl": steerings.path(run)}
        run.result = result
    return result


def _data(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
