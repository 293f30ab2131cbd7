"""Why the model says what it says, for notebooks: next tokens, attribution, gradient, ablation, faithfulness.

The prompt lab's figures with all their digits. One SAE a request, and one text, a list of texts or a chat. Positions
count the first token.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app import catalog
from app.api.inputs import ModelId, SourceId, check_text, find_token, texts_of
from app.catalog import FeatureRow, SourceCard
from app.errors import BadInput, NotFound
from app.gpu import Worker
from app.protocol import (
    AblateRequest,
    AttributeRequest,
    ChatMessage,
    ChatRequest,
    FaithfulRequest,
    GradientRequest,
    ModelRef,
    Prediction,
    PredictRequest,
    SaeRef,
    Target,
    TokenizeRequest,
)
from app.settings import Settings
from app.tokens import Vocabulary
from app.web.access import VIEWER
from app.web.pages import Config, Db, Gpu, read

router = APIRouter(tags=["attribution"])

MAX_RESULTS = 1000
Answer = dict[str, Any]
Token = int | Annotated[str, Field(max_length=200)]
"""A token's id, or the text of one token: a space before a word counts."""


class Turn(BaseModel):
    role: Literal["user", "assistant", "system"]
    content: Annotated[str, Field(max_length=1_000_000)]


class Texts(BaseModel):
    """What every request is about. A list of texts is answered by `results`, one for each."""

    modelId: ModelId
    text: str | list[str] | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=1000)] | None = None
    """A chat instead, written out by the model's template; after the last word of a user the answer begins."""


class Predict(Texts):
    prependBos: bool = True
    numResults: Annotated[int, Field(ge=1, le=100)] = 5
    position: int | None = None
    """One position; all of them without it. -1 is the last."""


class Read(Texts):
    source: SourceId


class Targeted(Read):
    position: int = -1
    """Where the next token is predicted; -1 is the last."""
    token: Token | None = None
    """The logit that is explained: an id or a text of one token; the likeliest next one without it."""
    against: Token | None = None
    """With it the difference of two logits is explained."""


class Attribute(Targeted):
    numResults: Annotated[int, Field(ge=1, le=MAX_RESULTS)] = 50


class Gradient(Targeted):
    loss: bool = False
    """Of the text's mean loss, not of a logit."""
    ignoreBos: bool = False
    """Leave out what is active on the first token."""
    numResults: Annotated[int, Field(ge=1, le=MAX_RESULTS)] = 50


class Ablate(Targeted):
    index: Annotated[int, Field(ge=0)]
    ablatedPosition: int | None = None
    """Taken out there alone; everywhere without it. -1 is the last."""


@dataclass(frozen=True)
class _Asked:
    """What a request is about, found and checked."""

    source: SourceCard
    sae: SaeRef
    about: dict[str, Any]
    ids: list[int]
    words: Vocabulary

    def place(self, position: int) -> int:
        """Count from the end below 0. What is outside is left to the worker to refuse."""
        return position + len(self.ids) if -len(self.ids) <= position < 0 else position


@router.post("/attribution/predict", dependencies=[VIEWER])
async def predict(body: Predict, session: Db, settings: Config, worker: Gpu) -> dict[str, Any]:
    """The likeliest next tokens after each position, with probabilities, and the loss of the token that does come."""
    await read(session, catalog.model_entry, session, body.modelId)
    model = catalog.model_ref(settings, body.modelId)
    words = await run_in_threadpool(catalog.vocabulary_of, settings, body.modelId)
    await worker.ready(model, [])

    async def answer(text: str) -> dict[str, Any]:
        about: dict[str, Any] = {"model": model, "text": text, "prepend_bos": body.prependBos}
        position = body.position
        if position is not None and position < 0:
            position += len(await _ids(worker, about))
        found = await worker.predict(PredictRequest(**about, top_k=body.numResults, position=position))
        places = enumerate(found.positions, 0 if position is None else position)
        return {
            "tokens": words.strings(found.ids),
            "positions": [_prediction(place, prediction, words) for place, prediction in places],
        }

    return await _each_text(body, model, settings, worker, answer)


def _prediction(place: int, found: Prediction, words: Vocabulary) -> dict[str, Any]:
    likeliest = zip(found.ids, found.probabilities, found.logits, strict=True)
    return {
        "position": place,
        "loss": found.loss,
        "predictions": [
            {"id": token, "token": words.string(token), "probability": probability, "logit": logit}
            for token, probability, logit in likeliest
        ],
    }


@router.post("/attribution/direct", dependencies=[VIEWER])
async def direct(body: Attribute, session: Db, settings: Config, worker: Gpu) -> dict[str, Any]:
    """A logit taken apart: features + rest + bias + error + elsewhere + constant = logit."""

    async def answer(asked: _Asked) -> dict[str, Any]:
        target = await _target(body, asked, settings, worker)
        request = AttributeRequest(**asked.about, sae=asked.sae, target=target, top_k=body.numResults)
        found = await worker.attribute(request)
        rows = await read(session, catalog.rows, session, asked.source, {f.latent for f in found.features})
        return _named(asked, target.position, found.token, body) | {
            "logit": found.logit,
            "cappedLogit": found.capped,
            "features": [
                _feature(f.latent, rows) | {"activation": f.activation, "value": f.value} for f in found.features
            ],
            "rest": found.rest,
            "numRest": found.n_rest,
            "bias": found.bias,
            "error": found.error,
            "elsewhere": found.elsewhere,
            "constant": found.constant,
        }

    return await _each(body, session, settings, worker, answer)


@router.post("/attribution/gradient", dependencies=[VIEWER])
async def gradient(body: Gradient, session: Db, settings: Config, worker: Gpu) -> dict[str, Any]:
    """Gradient x activation at every position: to first order, what each activation does to a logit or to the loss."""
    if body.loss and (body.token is not None or body.against is not None):
        raise BadInput("`loss` asks for the loss of the whole text, `token` and `against` for a logit; send one kind.")

    async def answer(asked: _Asked) -> dict[str, Any]:
        target = None if body.loss else await _likeliest(await _target(body, asked, settings, worker), asked, worker)
        request = GradientRequest(
            **asked.about, sae=asked.sae, target=target, top_k=body.numResults, skip=body.ignoreBos
        )
        found = await worker.gradient(request)
        latents = {latent for _, latent, _, _ in found.positions} | {latent for latent, _ in found.latents}
        rows = await read(session, catalog.rows, session, asked.source, latents)
        named = {"tokens": asked.words.strings(asked.ids)}
        if target is not None:
            named = _named(asked, target.position, target.token, body)
        return named | {
            "value": found.value,
            "activations": [
                _feature(latent, rows) | {"position": position, "activation": activation, "effect": effect}
                for position, latent, activation, effect in found.positions
            ],
            "features": [_feature(latent, rows) | {"effect": effect} for latent, effect in found.latents],
        }

    return await _each(body, session, settings, worker, answer)


@router.post("/attribution/ablate", dependencies=[VIEWER])
async def ablate(body: Ablate, session: Db, settings: Config, worker: Gpu) -> dict[str, Any]:
    """Take one feature out and run the model again: the true change beside its estimates."""

    async def answer(asked: _Asked) -> dict[str, Any]:
        if body.index >= asked.source.d_sae:
            raise NotFound(
                f"{asked.source.model_id}/{asked.source.name} has features 0 to {asked.source.d_sae - 1}; there is no "
                f"feature {body.index}."
            )
        target = await _likeliest(await _target(body, asked, settings, worker), asked, worker)
        position = None if body.ablatedPosition is None else asked.place(body.ablatedPosition)
        request = AblateRequest(**asked.about, sae=asked.sae, latent=body.index, target=target, position=position)
        found = await worker.ablate(request)
        return _named(asked, target.position, target.token, body) | {
            "before": found.before,
            "after": found.after,
            "change": found.before - found.after,
            "directEstimate": found.direct,
            "gradientEstimate": found.gradient,
            "lossBefore": found.loss_before,
            "lossAfter": found.loss_after,
            "numActive": found.n_active,
        }

    return await _each(body, session, settings, worker, answer)


@router.post("/attribution/faithfulness", dependencies=[VIEWER])
async def faithfulness(body: Read, session: Db, settings: Config, worker: Gpu) -> dict[str, Any]:
    """How much of the text survives the SAE: explained variance, cosine, l0; losses clean, spliced and ablated."""

    async def answer(asked: _Asked) -> dict[str, Any]:
        found = await worker.faithful(FaithfulRequest(**asked.about, sae=asked.sae))
        return {
            "numTokens": found.n_tokens,
            "explainedVariance": found.explained_variance,
            "cosine": found.cosine,
            "l0": found.l0,
            "lossClean": found.loss_clean,
            "lossSpliced": found.loss_spliced,
            "lossAblated": found.loss_ablated,
        }

    return await _each(body, session, settings, worker, answer)


async def _each(
    body: Read, session: Session, settings: Settings, worker: Worker, answer: Callable[[_Asked], Awaitable[Answer]]
) -> Answer:
    """Answer about each text with the SAE that was asked for."""
    source = await read(session, catalog.source_card, session, body.modelId, body.source)
    sae, model = catalog.sae_ref(settings, source), catalog.model_ref(settings, source.model_id)
    words = await run_in_threadpool(catalog.vocabulary_of, settings, source.model_id)
    await worker.ready(model, [sae])

    async def answer_text(text: str) -> Answer:
        about: dict[str, Any] = {"model": model, "text": text, "prepend_bos": source.prepend_bos}
        return await answer(_Asked(source, sae, about, await _ids(worker, about), words))

    return await _each_text(body, model, settings, worker, answer_text)


async def _each_text(
    body: Texts, model: ModelRef, settings: Settings, worker: Worker, answer: Callable[[str], Awaitable[Answer]]
) -> Answer:
    texts = await _texts(body, model, settings, worker)
    found = [await answer(text) for text in texts]
    return {"results": found} if isinstance(body.text, list) else found[0]


async def _texts(body: Texts, model: ModelRef, settings: Settings, worker: Worker) -> list[str]:
    if (body.text is None) == (body.messages is None):
        raise BadInput("Send `text` or `messages`, one of the two.")
    if body.messages is None:
        return texts_of(settings, body.text or "")
    for message in body.messages:
        check_text(settings, message.content)
    messages = [ChatMessage(role=message.role, content=message.content) for message in body.messages]
    last = messages[-1].role != "assistant"
    reply = await worker.chat(ChatRequest(model=model, messages=messages, add_generation_prompt=last))
    return texts_of(settings, [reply.text])


async def _ids(worker: Worker, about: dict[str, Any]) -> list[int]:
    request = TokenizeRequest(model=about["model"], texts=[about["text"]], prepend_bos=about["prepend_bos"])
    [ids] = (await worker.tokenize(request)).ids
    return ids


async def _target(body: Targeted, asked: _Asked, settings: Settings, worker: Worker) -> Target:
    model = asked.about["model"]
    token, against = [
        await find_token(worker, model, asked.words, said) if isinstance(said, str) else said
        for said in (body.token, body.against)
    ]
    return Target(position=asked.place(body.position), token=token, against=against)


async def _likeliest(target: Target, asked: _Asked, worker: Worker) -> Target:
    """Name the token where none was, so that the answer says what it is about."""
    if target.token is not None:
        return target
    found = await worker.predict(PredictRequest(**asked.about, top_k=1, position=target.position))
    return target.model_copy(update={"token": found.positions[0].ids[0]})


def _named(asked: _Asked, position: int, token: int | None, body: Targeted) -> dict[str, Any]:
    assert token is not None
    return {
        "tokens": asked.words.strings(asked.ids),
        "position": position,
        "token": {"id": token, "token": asked.words.string(token)},
        "against": body.against,
    }


def _feature(latent: int, rows: dict[int, FeatureRow]) -> dict[str, Any]:
    row = rows.get(latent)
    return {"index": latent, "label": row.label if row else ""}
