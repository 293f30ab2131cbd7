"""The worker's HTTP, spoken by the web side's own client to a real process on its socket."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from app.errors import BadInput, Busy, NotFound
from app.gpu import Worker
from app.protocol import (
    EncodeRequest,
    End,
    GenerateRequest,
    ModelRef,
    SaeQuery,
    SaeRef,
    Start,
    SteerDirection,
    SteerRow,
    Token,
    TokenizeRequest,
)
from app.settings import Settings
from tests.tiny import D_SAE, Tiny, WorkerProcess
from workers.language_model import LanguageModel


@pytest.fixture
def ask(worker_process: WorkerProcess) -> Callable[[Callable[[Worker], Coroutine[Any, Any, Any]]], Any]:
    def run(test: Callable[[Worker], Coroutine[Any, Any, Any]]) -> Any:
        async def within() -> Any:
            worker = Worker(worker_process.settings)
            try:
                return await test(worker)
            finally:
                await worker.close()

        return asyncio.run(asyncio.wait_for(within(), 120))

    return run


Ask = Callable[[Callable[[Worker], Coroutine[Any, Any, Any]]], Any]


def encoding(tiny: Tiny, text: str = "the cat sat", **query: Any) -> EncodeRequest:
    return EncodeRequest(model=tiny.model, texts=[text], queries=[SaeQuery(**({"sae": tiny.topk, "top_k": 3} | query))])


def generating(tiny: Tiny, **asked: Any) -> GenerateRequest:
    usual = {
        "model": tiny.model,
        "prompt": "the cat",
        "rows": [SteerRow(name="default"), SteerRow(name="steered")],
        "temperature": 1.0,
        "max_new_tokens": 4,
    }
    return GenerateRequest(**(usual | asked))


def test_tokens_are_those_of_the_tokenizer(ask: Ask, tiny: Tiny, language: LanguageModel) -> None:
    request = TokenizeRequest(model=tiny.model, texts=["the cat", "<eos> is special"], prepend_bos=False)
    reply = ask(lambda worker: worker.tokenize(request))
    assert reply.ids == [language.to_ids(text, prepend_bos=False) for text in request.texts]


def test_an_encode_has_a_row_for_every_token(ask: Ask, tiny: Tiny, language: LanguageModel) -> None:
    reply = ask(lambda worker: worker.encode(encoding(tiny, latents=[1, 2])))
    [text] = reply.texts
    assert text.ids == language.to_ids("the cat sat")
    assert [len(row) for row in text.saes[0].latents] == [len(text.ids)] * 2
    assert len(text.saes[0].top_indices) == len(text.ids)


def test_a_run_streams_start_tokens_of_both_rows_and_end(ask: Ask, tiny: Tiny) -> None:
    async def collect(worker: Worker) -> list[Any]:
        directions = [SteerDirection(sae=tiny.topk, latent=3, coefficient=9.0)]
        rows = [SteerRow(name="default"), SteerRow(name="steered", directions=directions)]
        return [event async for event in worker.generate(generating(tiny, rows=rows))]

    start, *tokens, end = ask(collect)
    assert isinstance(start, Start)
    assert isinstance(end, End)
    assert end.error == ""
    assert {t.row for t in tokens} == {"default", "steered"}
    assert all(isinstance(t, Token) for t in tokens)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (lambda tiny: encoding(tiny, "x" * 600), BadInput, r"60\d tokens; tiny reads 512|tokens; tiny reads 512"),
        (lambda tiny: encoding(tiny, latents=[D_SAE]), BadInput, f"Feature {D_SAE} .* 0 to {D_SAE - 1}"),
        (lambda tiny: encoding(tiny, latents=[-1]), BadInput, "does not exist"),
        (lambda tiny: encoding(tiny, "\ud800"), BadInput, "surrogate"),
        (lambda tiny: encoding(tiny, sae=SaeRef(id="a/b", path="/nowhere")), NotFound, "gone"),
        (
            lambda tiny: encoding(tiny).model_copy(update={"model": ModelRef(id="m", path="/nowhere")}),
            NotFound,
            "gone",
        ),
    ],
)
def test_what_cannot_be_encoded_is_refused(
    ask: Ask, tiny: Tiny, request_: Callable[[Tiny], EncodeRequest], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ask(lambda worker: worker.encode(request_(tiny)))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"max_new_tokens": 600}, r"600 new ones make 60\d; tiny reads 512"),
        ({"prompt": "", "prepend_bos": False}, "empty"),
        ({"prompt": "x" * 600}, "tiny reads 512"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_starts(
    ask: Ask, tiny: Tiny, asked: dict[str, Any], words: str
) -> None:
    async def start(worker: Worker) -> None:
        await anext(worker.generate(generating(tiny, **asked)))

    with pytest.raises(BadInput, match=words):
        ask(start)


def test_two_hundred_encodes_at_once_are_answered_or_refused_and_the_worker_lives(ask: Ask, tiny: Tiny) -> None:
    async def flood(worker: Worker) -> list[Any]:
        requests = [encoding(tiny, "the cat " * (1 + n % 20)) for n in range(200)]
        return await asyncio.gather(*(worker.encode(r) for r in requests), return_exceptions=True)

    replies = ask(flood)
    refused = [r for r in replies if isinstance(r, Exception)]
    assert all(isinstance(r, Busy) and r.retry_after for r in refused)
    assert len(replies) - len(refused) >= 64
    assert ask(lambda worker: worker.status()).waiting == 0


def test_a_client_that_goes_frees_the_run_within_a_token(ask: Ask, tiny: Tiny) -> None:
    async def go(worker: Worker) -> int:
        events = worker.generate(generating(tiny, max_new_tokens=500, temperature=3.0))
        async for event in events:
            if isinstance(event, Token):
                break
        assert (await worker.status()).waiting == 1
        await events.aclose()
        for _ in range(50):
            if not (waiting := (await worker.status()).waiting):
                return waiting
            await asyncio.sleep(0.01)
        return waiting

    assert ask(go) == 0


def test_a_body_that_is_no_message_is_refused(worker_process: WorkerProcess) -> None:
    async def post() -> tuple[int, Any]:
        connector = aiohttp.UnixConnector(str(worker_process.settings.socket_path))
        async with (
            aiohttp.ClientSession(connector=connector) as client,
            client.post("http://worker/encode", data=b'{"texts": 3}') as response,
        ):
            return response.status, await response.json()

    status, body = asyncio.run(post())
    assert status == 422
    assert "model" in body["error"]


def test_the_socket_is_its_owners_alone(worker_process: WorkerProcess) -> None:
    mode = worker_process.settings.socket_path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_a_second_worker_on_the_same_socket_refuses_to_start(worker_process: WorkerProcess) -> None:
    environment = os.environ | {"SAE_ATLAS_DATA_DIR": str(worker_process.settings.data_dir)}
    second = subprocess.run(
        [sys.executable, "-m", "workers.gpu"], env=environment, capture_output=True, text=True, timeout=90, check=False
    )
    assert second.returncode != 0
    assert "already answering" in second.stderr


def test_a_worker_replaces_a_stale_socket_and_stops_cleanly_in_mid_run(tiny: Tiny, tmp_path: Path) -> None:
    settings = Settings(data_dir=tiny.data_dir, worker_socket=str(tmp_path / "w.sock"), threads=1, device="cpu")
    first = WorkerProcess(settings)
    first.process.kill()
    first.process.wait()
    assert settings.socket_path.exists()
    second = WorkerProcess(settings)

    async def stop_in_mid_run() -> str:
        worker = Worker(settings)
        error = ""
        try:
            async for event in worker.generate(generating(tiny, max_new_tokens=500, temperature=3.0)):
                if isinstance(event, Token) and second.process.poll() is None:
                    second.process.terminate()
                if isinstance(event, End):
                    error = event.error
        except Exception as failure:
            error = str(failure)
        await worker.close()
        return error

    asyncio.run(asyncio.wait_for(stop_in_mid_run(), 60))
    assert second.stop() == 0
    assert not settings.socket_path.exists()
