"""POST /api/steer, steer-chat and steer-load: default and steered text of a model, at once or as a stream.

Wire format of Neuronpedia; unlike there freq_penalty, log-probabilities and PROJECTION_CAP do what they say. A client
that goes away ends its run within a token, streamed or not. Finished runs are saved; an unfinished one is not.
/api/steer/stream sends each token once, a JSON object a line.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse

from app import catalog, steering, steerings
from app.api.inputs import check_text
from app.errors import AtlasError, BadInput, Unavailable
from app.gpu import Worker
from app.protocol import End, GenerateRequest, Queued, Start, Token
from app.settings import Settings
from app.steering import DEFAULT, STEERED, Chat, Completion, Steering
from app.tokens import Reader, Vocabulary
from app.web import visits
from app.web.access import VIEWER, actor_of, address_of
from app.web.pages import Config, Db, Gpu, own_session, read

router = APIRouter(tags=["steering"])

Event = Queued | Start | Token | End


class Steer(Completion):
    stream: bool = False


class SteerChat(Chat):
    stream: bool = False


class Streamed(Steering):
    """A completion (`prompt`) or a conversation (`defaultChatMessages` and `steeredChatMessages`)."""

    prompt: str | None = None
    defaultChatMessages: list[steering.Message] = Field(default_factory=list[steering.Message], max_length=200)
    steeredChatMessages: list[steering.Message] = Field(default_factory=list[steering.Message], max_length=200)

    def meant(self) -> Completion | Chat:
        said = self.model_dump()
        if self.prompt is not None:
            return Completion.model_validate(said)
        if not self.defaultChatMessages or not self.steeredChatMessages:
            raise BadInput("Send a prompt, or defaultChatMessages and steeredChatMessages.")
        return Chat.model_validate(said)


class SteerLoad(BaseModel):
    steerOutputId: str


@dataclass
class Text:
    """One text as it grows."""

    name: str
    sample: int
    reader: Reader
    text: str = ""
    finish: str = ""
    tokens: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def add(self, token: Token, words: Vocabulary) -> dict[str, Any]:
        """Take in a token; return what a stream says of it."""
        piece = self.reader.read(token.id)
        piece = piece if token.keep is None else piece[: token.keep]
        self.text += piece
        top = [{"token": words.string(i), "id": i, "logprob": logprob} for i, logprob in token.top]
        entry = {"token": words.string(token.id), "id": token.id, "logprob": token.logprob, "top_logprobs": top}
        # A part of a character, or of a stop string, shows something else than the token alone.
        self.tokens.append(entry if piece == entry["token"] else {**entry, "text": piece})
        return {"event": "token", "row": self.name, "sample": self.sample, "text": piece, **entry}


class Texts:
    """All texts of a run."""

    def __init__(self, words: Vocabulary, logprobs: bool) -> None:
        self.words = words
        self.logprobs = logprobs
        self.prompt_ids: dict[str, list[int]] = {}
        self.seconds = 0.0
        self._found: dict[tuple[str, int], Text] = {}

    def of(self, name: str, sample: int = 0) -> Text:
        key = (name, sample)
        if key not in self._found:
            self._found[key] = Text(name, sample, self.words.reader())
        return self._found[key]

    def start(self, asked: GenerateRequest, event: Start) -> dict[str, Any]:
        for row, ids in zip(asked.rows, event.rows, strict=True):
            self.prompt_ids[row.name] = ids
            for sample in range(asked.n_samples):
                self.of(row.name, sample)
        prompts = {name: self.words.strings(ids) for name, ids in self.prompt_ids.items()}
        return {"event": "start", "rows": [row.name for row in asked.rows], "prompts": prompts}

    def end(self, event: End) -> None:
        """Raises Unavailable when the run ended badly."""
        if event.error:
            raise Unavailable(event.error)
        for name, sample, why in event.finish:
            self.of(name, sample).finish = why
        for text in self._found.values():
            rest = text.reader.rest() if text.finish != "stop" else ""
            text.text += rest
            if rest and text.tokens:
                last = text.tokens[-1]
                last["text"] = last.get("text", last["token"]) + rest
        self.seconds = event.seconds

    def logprobs_of(self, name: str) -> list[dict[str, Any]] | None:
        if not self.logprobs:
            return None
        return [
            {
                "token": t["token"],
                "logprob": t["logprob"],
                "top_logprobs": [{"token": o["token"], "logprob": o["logprob"]} for o in t["top_logprobs"]],
            }
            for t in self.of(name).tokens
        ]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {"name": t.name, "sample": t.sample, "text": t.text, "finish": t.finish, "tokens": t.tokens}
            for t in self._found.values()
        ]


Answer = Callable[[Texts], dict[str, Any]]


@router.post("/steer", dependencies=[VIEWER])
@router.post("/steer/", include_in_schema=False, dependencies=[VIEWER])
async def steer(request: Request, body: Steer, session: Db, settings: Config, worker: Gpu) -> Response:
    """Continue a prompt with and without steering: `STEERED` and `DEFAULT` are the continuations alone.

    coefficient = strength x strength_multiplier, in units of the feature's activation. With stream=true each `data:` of
    the event stream is the whole answer so far, the last one with `id` and `shareUrl`.
    """
    check_text(settings, body.prompt)
    run = await begin(request, body, session, settings, worker)
    return await _answered(request, run, body.stream, completion)


@router.post("/steer-chat", dependencies=[VIEWER])
@router.post("/steer-chat/", include_in_schema=False, dependencies=[VIEWER])
async def steer_chat(request: Request, body: SteerChat, session: Db, settings: Config, worker: Gpu) -> Response:
    """Go on with a conversation, default and steered each with a history of its own."""
    _check_chat(settings, body)
    run = await begin(request, body, session, settings, worker)

    def chat(texts: Texts) -> dict[str, Any]:
        return {
            **{
                name.upper(): {
                    "raw": "".join(texts.words.strings(texts.prompt_ids.get(name, []))) + texts.of(name).text,
                    "chatTemplate": [
                        *(message.model_dump() for message in said),
                        {"role": "assistant", "content": texts.of(name).text},
                    ],
                    "logprobs": texts.logprobs_of(name),
                }
                for name, said in ((STEERED, body.steeredChatMessages), (DEFAULT, body.defaultChatMessages))
            },
            "id": None,
            "shareUrl": None,
            "limit": None,
            "settings": body.model_dump(
                mode="json", exclude={"features", "stream", "defaultChatMessages", "steeredChatMessages"}
            ),
        }

    return await _answered(request, run, body.stream, chat)


@router.post("/steer/stream", dependencies=[VIEWER])
async def steer_stream(request: Request, body: Streamed, session: Db, settings: Config, worker: Gpu) -> Response:
    """Stream a run as JSON lines: `queued`, `start`, one `token` a line, and `end` with the run's id and address."""
    meant = body.meant()
    if isinstance(meant, Completion):
        check_text(settings, meant.prompt)
    else:
        _check_chat(settings, meant)
    run = await begin(request, meant, session, settings, worker)
    return StreamingResponse(_ndjson(run), 200, _HEADERS, "application/x-ndjson")


@router.post("/steer-load", dependencies=[VIEWER])
@router.post("/steer-load/", include_in_schema=False, dependencies=[VIEWER])
def steer_load(body: SteerLoad, session: Db) -> Response:
    """Return a saved run: its result, features, prompt and settings."""
    run = steerings.get(session, body.steerOutputId)
    prompt = run.request.get("prompt")
    if prompt is None:
        prompt = run.request["steeredChatMessages"][-1]["content"]
    return _json({**run.request, **run.result, "inputText": prompt})


@dataclass
class Begun:
    """A run that the worker has accepted."""

    asked: GenerateRequest
    start: Start
    events: AsyncGenerator[Event]
    texts: Texts
    session: Callable[[], Session]
    """Opens a session of whoever asked."""
    record: Mapping[str, Any]


async def begin(
    request: Request, body: Completion | Chat, session: Session, settings: Settings, worker: Worker
) -> Begun:
    """Find what is steered and start; whatever can be refused is refused here, with its own status."""

    used: list[int] = []

    def found() -> tuple[GenerateRequest, dict[str, Any], Vocabulary]:
        targets = steering.targets(session, settings, body)
        used.extend(target.source.id for target in targets if target.source is not None)
        asked = steering.request(session, settings, body, targets, user_of(request))
        entry = catalog.model_entry(session, body.modelId)
        record = {**steering.record(body, targets), "modelHash": entry.card.hash}
        return asked, record, catalog.vocabulary_of(settings, body.modelId)

    asked, record, words = await read(session, found)
    visits.note(request, used, "use")
    saes = [d.sae for row in asked.rows for d in row.directions if d.sae is not None]
    await worker.ready(asked.model, saes)
    status = await worker.status()
    events = worker.generate(asked)
    start = await anext(events)
    assert isinstance(start, Start)
    record |= {"dtype": status.dtype, "device": status.device}
    return Begun(asked, start, events, Texts(words, body.n_logprobs > 0), partial(own_session, request), record)


def user_of(request: Request) -> str:
    """Whose turn it is: a person's, or without accounts an API key's or an address's."""
    actor = actor_of(request)
    if actor is not None and actor.id is not None:
        return f"person {actor.id}"
    return request.headers.get("x-api-key") or address_of(request)


def _check_chat(settings: Settings, body: Chat) -> None:
    for messages in (body.defaultChatMessages, body.steeredChatMessages):
        check_text(settings, "\n".join(message.content for message in messages))


_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
"""The text so far is sent again and again, so proxies must not wait for more of it."""


async def _answered(request: Request, run: Begun, stream: bool, answer: Answer) -> Response:
    run.texts.start(run.asked, run.start)
    if stream:
        return StreamingResponse(_sse(run, answer), 200, _HEADERS, "text/event-stream")
    async with aclosing(run.events):
        async for event in run.events:
            take(run.texts, event)
            if await request.is_disconnected():
                return Response(status_code=499)
    return _json(await run_in_threadpool(save, run, answer(run.texts)))


async def _sse(run: Begun, answer: Answer) -> AsyncIterator[bytes]:
    async with aclosing(run.events):
        try:
            async for event in run.events:
                if take(run.texts, event):
                    yield _data(answer(run.texts))
            yield _data(await run_in_threadpool(save, run, answer(run.texts)))
        except AtlasError as error:
            yield _data({**answer(run.texts), "error": error.message, "message": error.message})


async def _ndjson(run: Begun) -> AsyncIterator[bytes]:
    yield _line(run.texts.start(run.asked, run.start))
    async with aclosing(run.events):
        try:
            waiting: list[bytes] = []
            async for event in run.events:
                if isinstance(event, Queued):
                    yield _line({"event": "queued", "place": event.place})
                elif isinstance(event, Token):
                    waiting.append(_line(run.texts.of(event.row, event.sample).add(event, run.texts.words)))
                    if not event.more:
                        yield b"".join(waiting)
                        waiting = []
                elif isinstance(event, End):
                    run.texts.end(event)
            saved = await run_in_threadpool(save, run, completion(run.texts))
            finish = [[text["name"], text["sample"], text["finish"]] for text in run.texts.rows()]
            yield _line(
                {
                    "event": "end",
                    "finish": finish,
                    "seconds": run.texts.seconds,
                    "id": saved["id"],
                    "shareUrl": saved["shareUrl"],
                }
            )
        except AtlasError as error:
            yield _line({"event": "error", "error": error.message, "message": error.message})


def completion(texts: Texts) -> dict[str, Any]:
    return {
        "STEERED": texts.of(STEERED).text,
        "DEFAULT": texts.of(DEFAULT).text,
        "steeredLogProbs": texts.logprobs_of(STEERED),
        "defaultLogProbs": texts.logprobs_of(DEFAULT),
        "id": None,
        "shareUrl": None,
        "limit": None,
    }


def take(texts: Texts, event: Event) -> bool:
    """Add a token; tell whether a step is complete. Raises Unavailable when the run ended badly."""
    if isinstance(event, Token):
        texts.of(event.row, event.sample).add(event, texts.words)
        return not event.more
    if isinstance(event, End):
        texts.end(event)
    return False


def save(run: Begun, result: dict[str, Any]) -> dict[str, Any]:
    with run.session() as session, session.begin():
        saved = steerings.save(session, run.asked.model.id, run.record, {})
        result = {**result, "id": saved.id, "shareUrl": steerings.path(saved)}
        more = {"rows": run.texts.rows(), "promptIds": run.texts.prompt_ids, "seconds": run.texts.seconds}
        saved.result = {**result, **more}
    return result


def _data(value: Any) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def _line(value: Any) -> bytes:
    return orjson.dumps(value) + b"\n"


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
