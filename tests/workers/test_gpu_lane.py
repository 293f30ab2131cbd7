"""Turns, batches, bounds and cancellation of the thread that owns the device."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.errors import BadInput, Busy, Unavailable
from app.protocol import GenerateRequest, Queued, SaeQuery, SteerRow, Token
from tests.tiny import Tiny
from workers.gpu import lane as lane_module
from workers.gpu.encoding import Text, encode
from workers.gpu.generation import Batch, Run, kv_bytes
from workers.gpu.lane import Lane
from workers.language_model import LanguageModel
from workers.sae.coders import Coder


@asynccontextmanager
async def running(max_queue: int = 64, batch_tokens: int = 4096) -> AsyncIterator[Lane]:
    lane = Lane(max_queue, batch_tokens)
    lane.start()
    try:
        yield lane
    finally:
        await asyncio.to_thread(lane.stop)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


def made(language: LanguageModel, tiny: Tiny, n: int, rows: int = 1, **asked: Any) -> Run:
    names = [SteerRow(name=str(row)) for row in range(rows)]
    request = GenerateRequest(model=tiny.model, rows=names, max_new_tokens=n, temperature=1.0, **asked)
    # Prompts differ, so that no two rows are one and the same.
    prompts = [language.to_ids("the cat" + " sat" * row) for row in range(rows)]
    return Run(language, request, prompts, [()] * rows)


async def tokens_of(lane: Lane, run: Run) -> list[Token]:
    return [event async for step in lane.generate(run) for event in step if isinstance(event, Token)]


def text(language: LanguageModel, tiny: Tiny, topk: Coder, words: str) -> Text:
    return Text(language.to_ids(words), [(topk, SaeQuery(sae=tiny.topk, top_k=2))])


def test_texts_that_wait_are_answered_in_one_pass_each_with_its_own(
    language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counting(model: LanguageModel, texts: list[Text], *_: object) -> Any:
        sizes.append(len(texts))
        time.sleep(0.05)
        return encode(model, texts)

    monkeypatch.setattr(lane_module, "encode", counting)
    texts = [text(language, tiny, topk, "the cat " * n) for n in range(1, 11)]
    alone = [encode(language, [t])[0][0].top_indices for t in texts]

    async def test() -> None:
        async with running() as lane:
            answers = await asyncio.gather(*(lane.encode(language, [t], 10) for t in texts))
        assert [answer[0][0].top_indices for answer in answers] == alone

    run(test)
    assert len(sizes) <= 3


def timed(sizes: list[int], starts: list[float], seconds: float) -> Callable[..., Any]:
    """An encode that takes a while, and notes when it began and with how many texts."""

    def encoding(model: LanguageModel, texts: list[Text], *_: object) -> Any:
        sizes.append(len(texts))
        starts.append(time.monotonic())
        time.sleep(seconds)
        return encode(model, texts)

    return encoding


def test_a_crowd_that_comes_one_after_another_is_read_together(
    language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(lane_module, "encode", timed(sizes, [], 0.5))
    texts = [text(language, tiny, topk, "the cat " * n) for n in range(1, 9)]

    async def after(lane: Lane, seconds: float, one: Text) -> Any:
        await asyncio.sleep(seconds)
        return await lane.encode(language, [one], 10)

    async def test() -> None:
        async with running() as lane:
            for _ in range(3):  # the first are not expected yet
                await asyncio.gather(*(after(lane, 0.005 * n, one) for n, one in enumerate(texts)))

    run(test)
    assert sizes[0] < len(texts)
    assert sizes[-1] == len(texts), sizes


def test_who_asks_alone_does_not_wait_for_others(
    language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[float] = []
    monkeypatch.setattr(lane_module, "encode", timed([], starts, 0.4))
    one = text(language, tiny, topk, "rain fell")

    async def test() -> None:
        async with running() as lane:
            await asyncio.gather(*(lane.encode(language, [one], 10) for _ in range(5)))
            asked: list[float] = []
            for n_texts in (1, 1, 1, 1, 5, 5, 1, 5, 1):  # many texts of one request are no crowd
                asked.append(time.monotonic())
                await lane.encode(language, [one] * n_texts, 10)
        # After some the crowd is forgotten; the quickest counts, since the machine has other things to do.
        assert min(start - ask for start, ask in zip(starts[-5:], asked[-5:], strict=True)) < 0.04

    run(test)


def test_a_batch_is_bounded_in_padded_tokens(
    language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded: list[int] = []

    def measuring(model: LanguageModel, texts: list[Text], *_: object) -> Any:
        padded.append(len(texts) * max(len(t.ids) for t in texts))
        return encode(model, texts)

    monkeypatch.setattr(lane_module, "encode", measuring)
    texts = [text(language, tiny, topk, "the cat " * n) for n in (1, 9, 2, 8, 3, 7)]

    async def test() -> None:
        async with running(batch_tokens=50) as lane:
            await lane.encode(language, texts, 10)

    run(test)
    assert max(padded) <= 50
    assert len(padded) > 1


def test_encodes_and_runs_go_on_beside_a_long_run(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    async def test() -> None:
        async with running() as lane:
            long = lane.generate(made(language, tiny, 100_000))
            await anext(long)
            await lane.encode(language, [text(language, tiny, topk, "rain fell")], 10)
            assert await tokens_of(lane, made(language, tiny, 5))
            assert await anext(long)
            await long.aclose()

    run(test)


def test_a_closed_run_stops_within_a_token(
    language: LanguageModel, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0
    step = Batch.step

    def slow(self: Batch) -> Any:
        nonlocal steps
        steps += 1
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Batch, "step", slow)

    async def test() -> None:
        async with running() as lane:
            tokens = lane.generate(made(language, tiny, 100_000))
            await anext(tokens)
            await tokens.aclose()
            at_close = steps
            await asyncio.sleep(0.2)
            assert steps <= at_close + 1

    run(test)


def test_runs_of_many_users_grow_in_one_batch(
    language: LanguageModel, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda self: (sizes.append(len(self)), step(self))[1])

    async def test() -> None:
        async with running() as lane:
            runs = [made(language, tiny, 40, rows=2, seed=n, user=f"user {n}") for n in range(8)]
            together = await asyncio.gather(*(tokens_of(lane, run) for run in runs))
            alone = await tokens_of(lane, made(language, tiny, 40, rows=2, seed=5))
        assert [(t.row, t.id) for t in together[5]] == [(t.row, t.id) for t in alone]

    run(test)
    assert max(sizes) > 8


def test_runs_without_room_wait_and_are_told_their_place(
    language: LanguageModel, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "MAX_ROWS", 2)

    async def test() -> None:
        async with running() as lane:
            long = lane.generate(made(language, tiny, 100_000, rows=2))
            await anext(long)
            waiting = [lane.generate(made(language, tiny, 5)) for _ in range(2)]
            firsts = [asyncio.ensure_future(anext(one)) for one in waiting]
            places = [event for first in firsts for event in await first]
            assert places == [Queued(place=1), Queued(place=2)]
            await long.aclose()
            heard = [[event async for step in one for event in step] for one in waiting]
            assert [event for event in heard[0] if isinstance(event, Queued)] == [Queued(place=0)]
            assert isinstance(heard[1][-1], Token)

    run(test)


def test_a_user_with_many_runs_does_not_keep_another_waiting_behind_them(
    language: LanguageModel, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "MAX_ROWS", 2)
    ended: list[str] = []

    async def one(lane: Lane, user: str, n: int) -> None:
        await tokens_of(lane, made(language, tiny, n, user=user))
        ended.append(user)

    async def test() -> None:
        async with running() as lane:
            many = [asyncio.ensure_future(one(lane, "many", 30)) for _ in range(8)]
            await asyncio.sleep(0)
            await asyncio.gather(one(lane, "few", 3), *many)

    run(test)
    assert ended.index("few") <= 3


def test_caches_stay_within_their_bytes(language: LanguageModel, tiny: Tiny) -> None:
    async def test() -> None:
        first = made(language, tiny, 60)
        lane = Lane(9, 4096, kv_budget=int(1.5 * first.n_tokens * kv_bytes(language)))
        lane.start()
        growing = lane.generate(first)
        await anext(growing)
        heard = [event async for step in lane.generate(made(language, tiny, 60)) for event in step]
        assert heard[0] == Queued(place=1)
        assert isinstance(heard[-1], Token)
        await growing.aclose()
        await asyncio.to_thread(lane.stop)

    run(test)


def test_other_work_is_done_in_pieces_between_tokens(language: LanguageModel, tiny: Tiny) -> None:
    async def test() -> None:
        async with running() as lane:
            growing = lane.generate(made(language, tiny, 100_000))
            await anext(growing)
            heard: list[int] = []

            def pieces() -> Any:
                for n in range(3):
                    heard.append(n)
                    yield
                return "done"

            assert await lane.work(pieces(), 10) == "done"
            assert heard == [0, 1, 2]
            assert await anext(growing)
            await growing.aclose()

    run(test)


def test_more_than_the_queue_holds_is_refused_with_both_numbers() -> None:
    lane = Lane(2, 100)
    with lane.admit(), lane.admit():
        with pytest.raises(Busy, match=r"2 requests .* takes 2") as refusal, lane.admit():
            pass
        assert refusal.value.retry_after
    with lane.admit():
        assert lane.admitted == 1


def test_a_text_whose_deadline_has_passed_is_refused_and_not_computed(
    language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    monkeypatch.setattr(lane_module, "encode", lambda _model, texts, *_: computed.append(len(texts)))

    async def test() -> None:
        async with running() as lane:
            with pytest.raises(Unavailable, match="deadline"):
                await lane.encode(language, [text(language, tiny, topk, "the cat")], -1.0)
            with pytest.raises(Unavailable, match="deadline"):
                await lane.compute(lambda: computed.append(1), -1.0)

    run(test)
    assert computed == []


def test_a_stopping_lane_answers_what_waits(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    async def test() -> None:
        async with running() as lane:
            tokens = lane.generate(made(language, tiny, 100_000))
            await anext(tokens)
        with pytest.raises(Unavailable, match="stopping"):
            async for _ in tokens:
                pass
        with pytest.raises(Unavailable, match="stopping"):
            await lane.encode(language, [text(language, tiny, topk, "the cat")], 1)

    run(test)


def test_running_out_of_memory_refuses_the_request_and_the_lane_goes_on(
    language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = text(language, tiny, topk, "the cat")

    def failing(*_: object) -> Any:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes")

    async def test() -> None:
        async with running() as lane:
            with monkeypatch.context() as patch:
                patch.setattr(lane_module, "encode", failing)
                with pytest.raises(Unavailable, match="99 bytes"):
                    await lane.encode(language, [asked], 10)
            assert await lane.encode(language, [asked], 10)

    run(test)


def test_a_computation_has_the_device_between_batches_and_tells_of_its_failure(
    language: LanguageModel, tiny: Tiny, topk: Coder
) -> None:
    asked = text(language, tiny, topk, "the cat")

    def refuses() -> None:
        raise BadInput("no such token")

    async def test() -> None:
        async with running() as lane:
            names, _ = await asyncio.gather(
                lane.compute(lambda: threading.current_thread().name, 10), lane.encode(language, [asked], 10)
            )
            assert names == "lane"
            with pytest.raises(BadInput, match="no such token"):
                await lane.compute(refuses, 10)
            assert await lane.compute(lambda: 3, 10) == 3

    run(test)
