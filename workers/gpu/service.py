"""The worker's HTTP: the routes of app.protocol over a lane and its residents. No database, no token strings.

An ASGI app, so it also runs behind any server that speaks ASGI; `python -m workers.gpu` puts it on its Unix socket.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orjson
import structlog
import torch
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from app import log
from app.errors import AtlasError, BadInput
from app.protocol import (
    AblateRequest,
    AttributeRequest,
    ChatRequest,
    DifferenceRequest,
    EncodeReply,
    EncodeRequest,
    End,
    FaithfulRequest,
    GenerateRequest,
    GradientRequest,
    LoadReply,
    LoadRequest,
    NextRequest,
    PredictRequest,
    SaeRef,
    ScoreRequest,
    Start,
    SteerDirection,
    SteerRow,
    Target,
    TextRef,
    TokenizeRequest,
    WorkerStatus,
)
from app.settings import Settings
from app.tokens import vocabulary
from workers.device import Device, Machine, choose_dtype, device_of
from workers.gpu import attribution, scoring
from workers.gpu.encoding import Text
from workers.gpu.generation import Interventions, NotFinite, Run, kv_bytes
from workers.gpu.interventions import intervention
from workers.gpu.lane import MAX_ROWS, Lane
from workers.gpu.residents import Held, Residents, device_bytes
from workers.gpu.residuals import Residuals
from workers.language_model import LanguageModel

M = TypeVar("M", bound=BaseModel)
BATCH_TOKENS = {"cpu": 4096, "mps": 8192, "cuda": 16384}
BUDGET_SHARE = 0.6
KV_SHARE = 0.15
"""Of the device's memory, for the KV caches of all runs."""

logger = log.get(__name__)


@dataclass(frozen=True)
class Worker:
    """What the routes work with."""

    settings: Settings
    residents: Residents
    lane: Lane


def create_lane(settings: Settings) -> Lane:
    device = device_of(settings)
    residuals = Residuals(settings.residual_bytes)
    return Lane(settings.max_queue, BATCH_TOKENS[device], residuals, int(device_bytes(device) * KV_SHARE))


def create_app(settings: Settings, lane: Lane | None = None) -> Starlette:
    """Return the ASGI app. Its lifespan stops the lane, and starts one of its own where none is given."""
    device = device_of(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    budget = settings.memory_bytes or int(device_bytes(device) * BUDGET_SHARE)
    residents = Residents(device, partial(_dtype, settings, device, budget), budget)
    worker = Worker(settings, residents, lane or create_lane(settings))

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        if lane is None:
            worker.lane.start()
        logger.info("gpu worker ready", device=device, dtype=settings.dtype, budget_bytes=budget)
        yield
        await asyncio.to_thread(worker.lane.stop)

    routes = [
        Route("/load", _answering(worker, load), methods=["POST"]),
        Route("/tokenize", _answering(worker, tokenize), methods=["POST"]),
        Route("/encode", _answering(worker, encode), methods=["POST"]),
        Route("/predict", _answering(worker, predict), methods=["POST"]),
        Route("/attribute", _answering(worker, attribute), methods=["POST"]),
        Route("/gradient", _answering(worker, gradient), methods=["POST"]),
        Route("/ablate", _answering(worker, ablate), methods=["POST"]),
        Route("/faithful", _answering(worker, faithful), methods=["POST"]),
        Route("/chat", _answering(worker, chat), methods=["POST"]),
        Route("/generate", _answering(worker, generate), methods=["POST"]),
        Route("/next", _answering(worker, next_tokens), methods=["POST"]),
        Route("/score", _answering(worker, score), methods=["POST"]),
        Route("/difference", _answering(worker, difference), methods=["POST"]),
        Route("/status", _answering(worker, status)),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


def _dtype(settings: Settings, device: Device, budget_bytes: int, n_weights: int) -> torch.dtype:
    return choose_dtype(settings.dtype, device, Machine.here(), n_weights, budget_bytes)


async def load(worker: Worker, request: Request) -> Response:
    """Not counted in the queue: it waits for the loader, never for the device."""
    asked = await _body(request, LoadRequest)
    loading = await worker.residents.load(asked.model, asked.saes, asked.seconds)
    return _json(LoadReply(loading=list(loading)).model_dump())


async def tokenize(worker: Worker, request: Request) -> Response:
    asked = await _body(request, TokenizeRequest)
    with worker.lane.admit():
        async with worker.residents.hold(asked.model, []) as held:
            ids = await asyncio.to_thread(_ids, held.language, asked.texts, asked.prepend_bos)
    return _json({"ids": ids})


async def encode(worker: Worker, request: Request) -> Response:
    asked = await _body(request, EncodeRequest)
    saes = [query.sae for query in asked.queries]
    # Here and not in a request of its own before: that would be a third of the time of a text that is kept.
    loading = await worker.residents.load(asked.model, saes, min(5.0, worker.settings.request_seconds / 2))
    if loading:
        return _json(EncodeReply(texts=[], loading=list(loading)).model_dump())
    with worker.lane.admit():
        async with worker.residents.hold(asked.model, saes) as held:
            rows = await asyncio.to_thread(_ids, held.language, asked.texts, asked.prepend_bos)
            limit = min(worker.settings.max_text_tokens, held.language.card.n_ctx)
            _check_lengths(rows, limit, asked.model.id)
            _check_fits(held, [(q.sae, latent) for q in asked.queries for latent in q.latents])
            for query in asked.queries:
                _check_fits(held, [(query.sae, 0)])
            queries = [(held.saes[query.sae.path], query) for query in asked.queries]
            asked_of = [Text(row, queries) for row in rows]
            answers = await worker.lane.encode(held.language, asked_of, worker.settings.request_seconds)
    texts = [{"ids": row, "saes": [_plain(a) for a in acts]} for row, acts in zip(rows, answers, strict=True)]
    return _json({"texts": texts, "loading": []})


async def predict(worker: Worker, request: Request) -> Response:
    asked = await _body(request, PredictRequest)
    async with _one_text(worker, asked) as (held, ids):
        position = asked.position
        if position is not None:
            _check_position(ids, position)
        work = partial(attribution.predict, held.language, ids, asked.top_k, position)
        found = await worker.lane.compute(work, worker.settings.request_seconds)
    return _json({"ids": ids, "positions": [_plain(p) for p in found]})


async def attribute(worker: Worker, request: Request) -> Response:
    asked = await _body(request, AttributeRequest)
    async with _one_text(worker, asked, asked.sae, asked.target) as (held, ids):
        coder = held.saes[asked.sae.path]
        work = partial(attribution.attribute, held.language, coder, ids, asked.target, asked.top_k)
        return _json((await worker.lane.compute(work, worker.settings.request_seconds)).model_dump())


async def gradient(worker: Worker, request: Request) -> Response:
    asked = await _body(request, GradientRequest)
    async with _one_text(worker, asked, asked.sae, asked.target) as (held, ids):
        if asked.target is None and len(ids) < 2:
            raise BadInput("The text is one token; a loss needs two.")
        coder = held.saes[asked.sae.path]
        work = partial(attribution.gradient, held.language, coder, ids, asked.target, asked.top_k, asked.skip)
        return _json(_plain(await worker.lane.compute(work, worker.settings.request_seconds)))


async def ablate(worker: Worker, request: Request) -> Response:
    asked = await _body(request, AblateRequest)
    async with _one_text(worker, asked, asked.sae, asked.target) as (held, ids):
        _check_fits(held, [(asked.sae, asked.latent)])
        if asked.position is not None:
            _check_position(ids, asked.position)
        coder = held.saes[asked.sae.path]
        work = partial(attribution.ablate, held.language, coder, ids, asked.latent, asked.target, asked.position)
        return _json((await worker.lane.compute(work, worker.settings.request_seconds)).model_dump())


async def faithful(worker: Worker, request: Request) -> Response:
    asked = await _body(request, FaithfulRequest)
    async with _one_text(worker, asked, asked.sae) as (held, ids):
        work = partial(attribution.faithful, held.language, held.saes[asked.sae.path], ids)
        return _json((await worker.lane.compute(work, worker.settings.request_seconds)).model_dump())


@asynccontextmanager
async def _one_text(
    worker: Worker, asked: TextRef, sae: SaeRef | None = None, target: Target | None = None
) -> AsyncIterator[tuple[Held, list[int]]]:
    """Hold what a request about one text needs, with everything checked that can be refused."""
    with worker.lane.admit():
        async with worker.residents.hold(asked.model, [sae] if sae else []) as held:
            [ids] = rows = await asyncio.to_thread(_ids, held.language, [asked.text], asked.prepend_bos)
            _check_lengths(rows, min(worker.settings.max_text_tokens, held.language.card.n_ctx), asked.model.id)
            if sae is not None:
                _check_fits(held, [(sae, 0)])
            if target is not None:
                _check_position(ids, target.position)
                n = held.language.card.d_vocab
                for token in (target.token, target.against):
                    if token is not None and not 0 <= token < n:
                        raise BadInput(f"Token {token} does not exist; {asked.model.id} has 0 to {n - 1}.")
            yield held, ids


def _check_position(ids: list[int], position: int) -> None:
    if not 0 <= position < len(ids):
        raise BadInput(f"Position {position} does not exist; the text has 0 to {len(ids) - 1}.")


async def chat(worker: Worker, request: Request) -> Response:
    asked = await _body(request, ChatRequest)
    with worker.lane.admit():
        async with worker.residents.hold(asked.model, []) as held:
            messages = [(m.role, m.content) for m in asked.messages]
            text = await asyncio.to_thread(held.language.chat, messages, asked.add_generation_prompt)
    return _json({"text": text})


async def generate(worker: Worker, request: Request) -> Response:
    """Check everything that can be refused before the first byte, then stream."""
    asked = await _body(request, GenerateRequest)
    events = _generate(worker, asked)
    first = await anext(events)

    async def lines() -> AsyncIterator[bytes]:
        try:
            yield _lines(first)
            async for step in events:
                yield _lines(step)
        finally:
            # Also when the client went: the response is cancelled and the run with it.
            await events.aclose()

    return StreamingResponse(lines(), media_type="application/x-ndjson")


async def _generate(worker: Worker, asked: GenerateRequest) -> AsyncGenerator[list[Any]]:
    """Yield events in the groups in which they come: the start, places in the queue, each step's tokens, the end."""
    started = time.monotonic()
    with worker.lane.admit():
        async with worker.residents.hold(asked.model, _saes(asked.rows)) as held:
            run, prompts = await asyncio.to_thread(_prepare, worker, held, asked)
            yield [Start.model_construct(prompt_ids=prompts[0], rows=prompts)]
            error = ""
            tokens = worker.lane.generate(run)
            try:
                async for step in tokens:
                    yield step
            except (AtlasError, NotFinite) as failure:
                error = str(failure)
            except Exception:
                error = "The gpu worker failed while generating; its log has the cause."
            finally:
                await tokens.aclose()
            yield [End.model_construct(error=error, seconds=round(time.monotonic() - started, 3), finish=run.finish)]


def _prepare(worker: Worker, held: Held, asked: GenerateRequest) -> tuple[Run, list[list[int]]]:
    language = held.language
    prompts = _prompts(worker, language, asked)
    longest = max(map(len, prompts))
    if longest + asked.max_new_tokens > language.card.n_ctx:
        raise BadInput(
            f"Prompt of {longest} tokens and {asked.max_new_tokens} new ones make "
            f"{longest + asked.max_new_tokens}; {asked.model.id} reads {language.card.n_ctx}."
        )
    if len(asked.rows) * asked.n_samples > MAX_ROWS:
        raise BadInput(
            f"{len(asked.rows)} rows of {asked.n_samples} samples make {len(asked.rows) * asked.n_samples} texts; "
            f"one run makes up to {MAX_ROWS}. Ask for fewer samples."
        )
    words = vocabulary(Path(asked.model.path) / "vocabulary.json") if any(asked.stop) else None
    run = Run(language, asked, prompts, _interventions(held, asked.rows), words)
    need = run.n_tokens * kv_bytes(language)
    if need > worker.lane.kv_budget:
        raise BadInput(
            f"This run may come to {need / 2**20:,.0f} MiB of KV cache, {worker.lane.kv_budget / 2**20:,.0f} MiB are "
            "there for all runs. Ask for fewer tokens or samples."
        )
    return run, prompts


def _prompts(worker: Worker, language: LanguageModel, asked: GenerateRequest | NextRequest) -> list[list[int]]:
    """Token ids of every row's prompt. Raises BadInput for none, and for one that is too long."""
    prompts = [_prompt_ids(language, asked, row) for row in asked.rows]
    if not all(prompts):
        raise BadInput(f"The prompt is empty, and {asked.model.id} has no token that begins a text. Write something.")
    _check_lengths(prompts, min(worker.settings.max_text_tokens, language.card.n_ctx), asked.model.id)
    return prompts


def _prompt_ids(language: LanguageModel, asked: GenerateRequest | NextRequest, row: SteerRow) -> list[int]:
    if row.messages:
        return language.chat_ids([(message.role, message.content) for message in row.messages])
    return language.to_ids(asked.prompt if row.prompt is None else row.prompt, asked.prepend_bos)


def _saes(rows: list[SteerRow]) -> list[SaeRef]:
    return [direction.sae for row in rows for direction in row.directions if direction.sae is not None]


def _interventions(held: Held, rows: list[SteerRow]) -> list[Interventions]:
    """Each row's interventions; a direction that several rows ask for is one and the same."""
    made: dict[str, Interventions] = {}
    return [tuple(one for direction in row.directions for one in _one(held, direction, made)) for row in rows]


def _one(held: Held, direction: SteerDirection, made: dict[str, Interventions]) -> Interventions:
    key = direction.model_dump_json()
    if key not in made:
        if not math.isfinite(direction.coefficient):
            raise BadInput(f"A steering coefficient is {direction.coefficient}; it must be a finite number.")
        if direction.sae is not None:
            _check_fits(held, [(direction.sae, direction.latent)])
        made[key] = (intervention(direction, held.saes, held.language),)
    return made[key]


async def next_tokens(worker: Worker, request: Request) -> Response:
    asked = await _body(request, NextRequest)
    with worker.lane.admit():
        async with worker.residents.hold(asked.model, _saes(asked.rows)) as held:
            prompts = await asyncio.to_thread(_prompts, worker, held.language, asked)
            wanted = GenerateRequest(model=asked.model, rows=asked.rows)
            interventions = _interventions(held, asked.rows)
            pieces = scoring.next_tokens(held.language, asked.rows, prompts, interventions, asked.n_top, wanted)
            reply = await worker.lane.work(pieces, worker.settings.request_seconds)
    return _json(reply.__dict__)


async def score(worker: Worker, request: Request) -> Response:
    asked = await _body(request, ScoreRequest)
    rows = [SteerRow(name="", directions=directions) for directions in asked.conditions]
    with worker.lane.admit():
        saes = [*_saes(rows), *(query.sae for query in asked.queries)]
        async with worker.residents.hold(asked.model, saes) as held:
            _check_lengths([text.ids for text in asked.texts], held.language.card.n_ctx, asked.model.id)
            for text in asked.texts:
                if text.start >= len(text.ids) or not all(0 <= i < held.language.card.d_vocab for i in text.ids):
                    raise BadInput("A text to score needs a continuation, and token ids that the model knows.")
            _check_fits(held, [(q.sae, latent) for q in asked.queries for latent in q.latents])
            queries = [(held.saes[query.sae.path], query) for query in asked.queries]
            pieces = scoring.score(
                held.language,
                asked.texts,
                _interventions(held, rows),
                [Text(text.ids, queries) for text in asked.texts],
                asked.n_top,
            )
            texts = await worker.lane.work(pieces, worker.settings.request_seconds)
    return _json({"texts": [_plain(text) for text in texts]})


async def difference(worker: Worker, request: Request) -> Response:
    asked = await _body(request, DifferenceRequest)
    with worker.lane.admit():
        async with worker.residents.hold(asked.model, []) as held:
            language = held.language
            language.hook_size(asked.hook_name)  # raises for a hook that is not there
            plus, minus = [
                await asyncio.to_thread(_ids, language, texts, asked.prepend_bos) for texts in (asked.plus, asked.minus)
            ]
            limit = min(worker.settings.max_text_tokens, language.card.n_ctx)
            _check_lengths([*plus, *minus], limit, asked.model.id)
            pieces = scoring.difference(language, asked.hook_name, plus, minus, last_only=asked.last_only)
            reply = await worker.lane.work(pieces, worker.settings.request_seconds)
    return _json(reply.__dict__)


async def status(worker: Worker, _request: Request) -> Response:
    residents, loading = worker.residents.list()
    answer = WorkerStatus(
        device=worker.residents.device,
        dtype=str(worker.residents.dtype_of(0)).removeprefix("torch."),
        memory_bytes=worker.residents.budget_bytes,
        used_bytes=worker.residents.used_bytes,
        residents=residents,
        loading=loading,
        waiting=worker.lane.admitted,
        max_queue=worker.lane.max_queue,
    )
    return _json(answer.model_dump())


def _answering(
    worker: Worker, handle: Callable[[Worker, Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """Run a route with its request id bound to the log, and its errors as JSON with their status."""

    async def route(request: Request) -> Response:
        structlog.contextvars.bind_contextvars(request_id=request.headers.get("x-request-id", ""))
        try:
            return await handle(worker, request)
        except AtlasError as error:
            headers = {"retry-after": str(error.retry_after)} if error.retry_after else None
            return _json({"error": error.message}, error.status, headers)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception:
            logger.exception("request failed", path=request.url.path)
            return _json({"error": "The gpu worker failed at this request; its log has the cause."}, 500)

    return route


async def _body(request: Request, message: type[M]) -> M:
    try:
        return message.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _ids(language: LanguageModel, texts: list[str], prepend_bos: bool) -> list[list[int]]:
    return [language.to_ids(text, prepend_bos) for text in texts]


def _check_lengths(rows: list[list[int]], limit: int, model: str) -> None:
    for n, row in enumerate(rows, 1):
        if len(row) > limit:
            which = "The text" if len(rows) == 1 else f"Text {n}"
            raise BadInput(f"{which} is {len(row)} tokens; {model} reads {limit} here. Shorten it.")
        if not row:
            raise BadInput("The text is empty. Write something.")


def _check_fits(held: Held, asked: list[tuple[SaeRef, int]]) -> None:
    """The SAE's width against its hook's in this model, and latents against the SAE's."""
    for sae, latent in asked:
        coder = held.saes[sae.path]
        size = held.language.hook_size(coder.hook_name)
        if coder.d_in != size:
            raise BadInput(f"{sae.id} reads {coder.d_in} numbers, {coder.hook_name} has {size}: not its model.")
        if not 0 <= latent < coder.d_sae:
            raise BadInput(f"Feature {latent} of {sae.id} does not exist; it has 0 to {coder.d_sae - 1}.")


def _plain(message: BaseModel) -> dict[str, Any]:
    return message.__dict__


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


def _lines(events: list[BaseModel]) -> bytes:
    return b"".join(orjson.dumps(event.__dict__) + b"\n" for event in events)
