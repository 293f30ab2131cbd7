"""Client of the gpu worker: app.protocol over its Unix socket. Only this module knows how it is reached.

Every method raises Unavailable when the worker is gone or silent beyond its deadline, and otherwise the error that the
worker raised.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import orjson
import structlog
from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError

from app.errors import BY_STATUS, AtlasError, BadInput, Busy, Unavailable
from app.protocol import (
    AblateReply,
    AblateRequest,
    AttributeReply,
    AttributeRequest,
    ChatReply,
    ChatRequest,
    DifferenceReply,
    DifferenceRequest,
    EncodeReply,
    EncodeRequest,
    End,
    FaithfulReply,
    FaithfulRequest,
    GenerateRequest,
    GradientReply,
    GradientRequest,
    Loading,
    LoadReply,
    LoadRequest,
    Message,
    ModelRef,
    NextReply,
    NextRequest,
    PredictReply,
    PredictRequest,
    Queued,
    SaeActs,
    SaeRef,
    ScoredText,
    ScoreReply,
    ScoreRequest,
    Start,
    TextActs,
    Token,
    TokenizeReply,
    TokenizeRequest,
    WorkerStatus,
)
from app.settings import Settings

MAX_LOADS = 200
"""Five seconds each: about a quarter of an hour."""
START_SECONDS = 60.0
"""How long a worker that nobody finds may be starting, before pages say that there is none."""
_BASE = "http://worker"
_EVENTS = {"queued": Queued, "start": Start, "token": Token, "end": End}
_STATUS = TypeAdapter(WorkerStatus)
_GONE = (aiohttp.ClientError, ConnectionError, OSError, asyncio.TimeoutError)


class _Absent(Unavailable):
    """Nobody listens on the worker's socket: it is being started, or there is none."""


class Worker:
    """One connection pool to one worker. Made anywhere, used in one event loop, closed there."""

    def __init__(self, settings: Settings) -> None:
        self._path = str(settings.socket_path)
        self._seconds = settings.request_seconds
        self._loading_seconds = settings.loading_seconds
        self._client: aiohttp.ClientSession | None = None
        self._absent_since: float | None = None
        """When a page first met no worker, since it last met one."""

    async def load(self, request: LoadRequest) -> LoadReply:
        return LoadReply.model_validate(await self._call("/load", request))

    async def loading(self, model: ModelRef, saes: list[SaeRef]) -> list[Loading]:
        """Begin to load what is not resident and return what a page should say is still being loaded.

        A worker that is being started is said to be loaded too, for as long as a start takes.
        """
        request = LoadRequest(model=model, saes=saes, seconds=self._loading_seconds)
        try:
            loading = (await self.load(request)).loading
        except _Absent:
            now = time.monotonic()
            self._absent_since = self._absent_since or now
            if now - self._absent_since > START_SECONDS:
                raise
            return [Loading(id="the gpu worker", bytes=0, loaded=0, seconds=round(now - self._absent_since, 1))]
        return loading

    async def ready(self, model: ModelRef, saes: list[SaeRef]) -> None:
        """Wait until a model and SAEs are resident: a large one may take longer than a request's deadline."""
        request = LoadRequest(model=model, saes=saes, seconds=min(5.0, self._seconds / 2))
        for _ in range(MAX_LOADS):
            if not (await self.load(request)).loading:
                return
        raise _still_loading(model)

    async def tokenize(self, request: TokenizeRequest) -> TokenizeReply:
        return TokenizeReply.model_construct(**await self._call("/tokenize", request))

    async def encode(self, request: EncodeRequest) -> EncodeReply:
        """Activations of texts, waiting for a model to load. The reply is built unvalidated: it is ours, and large."""
        for _ in range(MAX_LOADS):
            answer = await self._call("/encode", request)
            if not answer["loading"]:
                break
        else:
            raise _still_loading(request.model)
        texts = [
            TextActs.model_construct(
                ids=text["ids"], saes=[SaeActs.model_construct(None, **acts) for acts in text["saes"]]
            )
            for text in answer["texts"]
        ]
        return EncodeReply.model_construct(texts=texts)

    async def predict(self, request: PredictRequest) -> PredictReply:
        return PredictReply.model_validate(await self._call("/predict", request))

    async def attribute(self, request: AttributeRequest) -> AttributeReply:
        return AttributeReply.model_validate(await self._call("/attribute", request))

    async def gradient(self, request: GradientRequest) -> GradientReply:
        return GradientReply.model_validate(await self._call("/gradient", request))

    async def ablate(self, request: AblateRequest) -> AblateReply:
        return AblateReply.model_validate(await self._call("/ablate", request))

    async def faithful(self, request: FaithfulRequest) -> FaithfulReply:
        return FaithfulReply.model_validate(await self._call("/faithful", request))

    async def chat(self, request: ChatRequest) -> ChatReply:
        return ChatReply.model_validate(await self._call("/chat", request))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Queued | Start | Token | End]:
        """Yield a run's events as they come. Closing the iterator closes the connection, which ends the run."""
        # The deadline is on silence: a run as a whole may take as long as it has tokens.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._seconds, sock_read=self._seconds)
        async with self._exchange("POST", "/generate", request, timeout) as response:
            ended = False
            async for line in response.content:
                event = _event(line)
                ended = isinstance(event, End)
                yield event
            if not ended:
                raise _unavailable("stopped in the middle of a run")

    async def next_tokens(self, request: NextRequest) -> NextReply:
        return NextReply.model_construct(None, **await self._call("/next", request))

    async def score(self, request: ScoreRequest) -> ScoreReply:
        answer = await self._call("/score", request)
        return ScoreReply.model_construct(texts=[ScoredText.model_construct(None, **text) for text in answer["texts"]])

    async def difference(self, request: DifferenceRequest) -> DifferenceReply:
        return DifferenceReply.model_construct(None, **await self._call("/difference", request))

    async def status(self) -> WorkerStatus:
        timeout = aiohttp.ClientTimeout(total=min(self._seconds, 5))
        async with self._exchange("GET", "/status", None, timeout) as response:
            return _STATUS.validate_json(await response.read())

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    async def _call(self, path: str, request: Message) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=self._seconds)
        async with self._exchange("POST", path, request, timeout) as response:
            return orjson.loads(await response.read())

    @asynccontextmanager
    async def _exchange(
        self, method: str, path: str, request: Message | None, timeout: aiohttp.ClientTimeout
    ) -> AsyncGenerator[aiohttp.ClientResponse]:
        """One request; failures of the connection at any point of it become Unavailable."""
        body = _body(request) if request is not None else None
        try:
            async with self._session().request(
                method, _BASE + path, data=body, headers=_headers(), timeout=timeout
            ) as response:
                self._absent_since = None
                if response.status >= 400:
                    raise _raised(response, await response.read())
                yield response
        except aiohttp.ClientConnectorError as error:
            raise _Absent(_unavailable("is not answering").message) from error
        except TimeoutError as error:
            raise _unavailable(f"is not answering within {self._seconds:g} s") from error
        except _GONE as error:
            raise _unavailable("is not answering") from error

    def _session(self) -> aiohttp.ClientSession:
        """Made lazily, because aiohttp binds it to the running loop."""
        if self._client is None:
            # The worker bounds its own queue; a bound here would only hide it.
            self._client = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(self._path, limit=0), read_bufsize=2**20
            )
        return self._client


def _body(request: Message) -> bytes:
    try:
        return request.model_dump_json().encode()
    except PydanticSerializationError:
        raise BadInput("The text holds a lone surrogate; it is not valid Unicode and has no bytes.") from None


def _unavailable(what: str) -> Unavailable:
    return Unavailable(f"The gpu worker {what}; it is restarted by the supervisor. Try again in a few seconds.")


def _still_loading(model: ModelRef) -> Unavailable:
    return Unavailable(f"{model.id} is still being loaded; try again later.", retry_after=30)


def _headers() -> dict[str, str]:
    request_id = structlog.contextvars.get_contextvars().get("request_id", "")
    return {"content-type": "application/json", "x-request-id": str(request_id)}


def _event(line: bytes) -> Queued | Start | Token | End:
    fields = orjson.loads(line)
    return _EVENTS[fields["event"]].model_construct(None, **fields)


def _raised(response: aiohttp.ClientResponse, body: bytes) -> AtlasError:
    """The error of app.errors that the worker raised, from its status and sentence."""
    try:
        message = str(orjson.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return _unavailable(f"answered with status {response.status}")
    error = BY_STATUS.get(response.status, AtlasError)
    if error in (Busy, Unavailable):
        return error(message, int(response.headers.get("retry-after", "2")))  # pyright: ignore[reportCallIssue]
    return error(message)
