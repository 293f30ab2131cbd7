"""The worker's client when the worker is gone, silent, or dies in the middle of a request."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.errors import Unavailable
from app.gpu import Worker
from app.protocol import EncodeRequest, GenerateRequest, SaeQuery, SteerRow, Token
from app.settings import Settings
from tests.tiny import Tiny, WorkerProcess

DEADLINE = 3.0


@pytest.fixture
def process(tiny: Tiny, tmp_path: Path) -> Iterator[WorkerProcess]:
    settings = Settings(
        data_dir=tiny.data_dir,
        worker_socket=str(tmp_path / "w.sock"),
        threads=1,
        device="cpu",
        request_seconds=DEADLINE,
    )
    made = WorkerProcess(settings)
    # On a busy machine the first loading takes longer than the deadline that is tested.
    asyncio.run(load(settings.model_copy(update={"request_seconds": 60.0}), tiny))
    yield made
    made.stop()


async def load(settings: Settings, tiny: Tiny) -> None:
    worker = Worker(settings)
    await worker.ready(tiny.model, [tiny.topk])
    await worker.close()


def encoding(tiny: Tiny) -> EncodeRequest:
    return EncodeRequest(model=tiny.model, texts=["the cat"], queries=[SaeQuery(sae=tiny.topk, top_k=3)])


def generating(tiny: Tiny) -> GenerateRequest:
    return GenerateRequest(
        model=tiny.model, prompt="the cat", rows=[SteerRow(name="default")], max_new_tokens=490, temperature=5.0
    )


async def first_token(events: AsyncGenerator[Any]) -> None:
    async for event in events:
        if isinstance(event, Token):
            return


async def rest(events: AsyncGenerator[Any]) -> None:
    async for _ in events:
        pass


def test_a_worker_that_is_not_there_is_unavailable_at_once(tiny: Tiny, tmp_path: Path) -> None:
    async def ask() -> None:
        worker = Worker(Settings(data_dir=tmp_path))
        try:
            await worker.encode(encoding(tiny))
        finally:
            await worker.close()

    began = time.monotonic()
    with pytest.raises(Unavailable, match="not answering; it is restarted by the supervisor") as refusal:
        asyncio.run(ask())
    assert time.monotonic() - began < 1
    assert refusal.value.retry_after


def test_a_worker_stopped_in_a_request_is_unavailable_within_the_deadline(process: WorkerProcess, tiny: Tiny) -> None:
    async def ask() -> float:
        worker = Worker(process.settings)
        await worker.encode(encoding(tiny))
        process.signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="within 3 s"):
            await worker.encode(encoding(tiny))
        seconds = time.monotonic() - began
        process.signal(signal.SIGCONT)
        assert await worker.encode(encoding(tiny))
        await worker.close()
        return seconds

    assert asyncio.run(ask()) < DEADLINE + 0.5


def test_a_run_whose_worker_stops_ends_within_the_deadline(process: WorkerProcess, tiny: Tiny) -> None:
    async def ask() -> float:
        worker = Worker(process.settings)
        events = worker.generate(generating(tiny))
        await first_token(events)
        process.signal(signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await rest(events)
        await worker.close()
        return time.monotonic() - began

    assert asyncio.run(ask()) < DEADLINE + 0.5


def test_a_worker_killed_in_a_run_is_unavailable_and_its_successor_answers(process: WorkerProcess, tiny: Tiny) -> None:
    async def ask() -> None:
        worker = Worker(process.settings)
        events = worker.generate(generating(tiny))
        await first_token(events)
        process.signal(signal.SIGKILL)
        with pytest.raises(Unavailable):
            await rest(events)
        process.process.wait()
        with pytest.raises(Unavailable):
            await worker.encode(encoding(tiny))
        successor = await asyncio.to_thread(WorkerProcess, process.settings)
        try:
            await load(process.settings.model_copy(update={"request_seconds": 60.0}), tiny)
            assert await worker.encode(encoding(tiny))
        finally:
            await worker.close()
            successor.stop()

    asyncio.run(ask())


def test_a_worker_killed_in_an_encode_is_unavailable(process: WorkerProcess, tiny: Tiny) -> None:
    async def ask() -> None:
        worker = Worker(process.settings)
        await worker.encode(encoding(tiny))
        process.signal(signal.SIGSTOP)
        pending = asyncio.create_task(worker.encode(encoding(tiny)))
        await asyncio.sleep(0.2)
        process.signal(signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="not answering"):
            await pending
        assert time.monotonic() - began < 1
        await worker.close()

    asyncio.run(ask())
