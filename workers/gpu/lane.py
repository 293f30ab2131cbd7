"""The one thread that owns the device: texts waiting to be encoded are batched, generations take turns token by token.

A turn is one batch of encodes, one computation and one token of one generation, so none starves the others and a long
run does not hold up a short one. Knows no HTTP and no files; what it is given is resident already.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from app import log
from app.errors import AtlasError, Busy, Unavailable
from app.protocol import SaeActs, Token
from workers.gpu.encoding import Text, encode
from workers.gpu.generation import Generation, NotFinite
from workers.gpu.residuals import Residuals
from workers.language_model import LanguageModel

T = TypeVar("T")

MAX_RUNS = 8
"""Generations that take turns; more wait for a place, so that KV caches stay bounded."""

logger = log.get(__name__)


@dataclass
class _Encode:
    """One text in the queue. Nobody listens after the deadline, so it is not computed then."""

    language: LanguageModel
    text: Text
    deadline: float
    future: Future[list[SaeActs]] = field(default_factory=lambda: Future[list[SaeActs]]())


@dataclass
class _Task:
    """A computation of one request, such as an attribution, that is not batched with others."""

    work: Callable[[], Any]
    deadline: float
    future: Future[Any] = field(default_factory=lambda: Future[Any]())


@dataclass
class _Run:
    """A generation and where its tokens go. `send(None)` says that it has ended; an exception that it failed."""

    start: Callable[[], Generation]
    send: Callable[[list[Token] | Exception | None], None]
    cancelled: threading.Event
    generation: Generation | None = None


class Lane:
    """Owns a thread. `encode` and `generate` are called from one event loop; `admit` bounds how many do so at once."""

    def __init__(self, max_queue: int, batch_tokens: int, residuals: Residuals | None = None) -> None:
        self.max_queue = max_queue
        self.admitted = 0
        self.residuals = residuals or Residuals(0)
        self._batch_tokens = batch_tokens
        self._encodes: list[_Encode] = []
        self._tasks: deque[_Task] = deque()
        self._waiting_runs: deque[_Run] = deque()
        self._runs: deque[_Run] = deque()
        self._stopping = False
        self._changed = threading.Condition()
        self._ended = threading.Event()

    def start(self) -> None:
        """Run on a thread of its own."""
        threading.Thread(target=self.run, name="lane", daemon=True).start()

    def stop(self) -> None:
        """End after the turn in progress. What still waits is answered Unavailable."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._ended.wait()

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold a place in the queue. Raises Busy when all are taken."""
        if self.admitted >= self.max_queue:
            raise Busy(
                f"{self.admitted} requests are with the gpu worker, which takes {self.max_queue}. Try again in a while."
            )
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    async def encode(self, language: LanguageModel, texts: list[Text], seconds: float) -> list[list[SaeActs]]:
        """Encode texts together with whatever else waits for the same model. Order and shape follow the queries."""
        items = [_Encode(language, text, time.monotonic() + seconds) for text in texts]
        self._put(lambda: self._encodes.extend(items))
        return list(await asyncio.gather(*(asyncio.wrap_future(item.future) for item in items)))

    async def compute(self, work: Callable[[], T], seconds: float) -> T:
        """Call a function on the lane's thread, which alone may use the device."""
        task = _Task(work, time.monotonic() + seconds)
        self._put(lambda: self._tasks.append(task))
        return await asyncio.wrap_future(task.future)

    async def generate(self, start: Callable[[], Generation]) -> AsyncIterator[list[Token]]:
        """Yield tokens as they come. `start` is called on the lane's thread. Closing the iterator ends the run."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[list[Token] | Exception | None] = asyncio.Queue()
        run = _Run(start, lambda item: _post(loop, inbox, item), threading.Event())
        self._put(lambda: self._waiting_runs.append(run))
        try:
            while (item := await inbox.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            run.cancelled.set()

    def _put(self, change: Callable[[], None]) -> None:
        with self._changed:
            if self._stopping:
                raise Unavailable("The gpu worker is stopping; try again in a few seconds.")
            change()
            self._changed.notify()

    def run(self) -> None:
        """Own the device from the calling thread until `stop`.

        The worker's process calls it on its main thread, which has OpenMP threads already: a second set would make more
        of them than cores, and those sleep between operations (80 ms for 128 tokens instead of 57 ms, on two cores).
        """
        try:
            self._work()
        finally:
            self._ended.set()

    def _work(self) -> None:
        while self._wait():
            if batch := self._next_batch():
                _answer(batch, self.residuals)
            if task := self._next_task():
                _compute(task)
            self._admit_runs()
            if self._runs:
                run = self._runs.popleft()
                if _advance(run):
                    self._runs.append(run)
        self._refuse_rest()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when stopping."""
        with self._changed:
            while not (self._encodes or self._tasks or self._waiting_runs or self._runs or self._stopping):
                self._changed.wait()
            return not self._stopping

    def _next_batch(self) -> list[_Encode]:
        """The text that waited longest and those of its model nearest in length, within the bound on padded tokens."""
        now = time.monotonic()
        with self._changed:
            waiting = [item for item in self._encodes if item.deadline > now and not item.future.cancelled()]
            if not waiting:
                self._encodes = []
                return []
            oldest = waiting[0]
            size = len(oldest.text.ids)
            same = [item for item in waiting[1:] if item.language is oldest.language]
            batch, longest = [oldest], size
            for item in sorted(same, key=lambda item: abs(len(item.text.ids) - size)):
                longest = max(longest, len(item.text.ids))
                if longest * (len(batch) + 1) > self._batch_tokens:
                    break
                batch.append(item)
            taken = {id(item) for item in batch}
            self._encodes = [item for item in waiting if id(item) not in taken]
            return batch

    def _next_task(self) -> _Task | None:
        with self._changed:
            while self._tasks:
                task = self._tasks.popleft()
                if task.deadline > time.monotonic() and task.future.set_running_or_notify_cancel():
                    return task
        return None

    def _admit_runs(self) -> None:
        with self._changed:
            while self._waiting_runs and len(self._runs) < MAX_RUNS:
                self._runs.append(self._waiting_runs.popleft())

    def _refuse_rest(self) -> None:
        error = Unavailable("The gpu worker is stopping; try again in a few seconds.")
        for item in self._encodes:
            _settle(item, error)
        for task in self._tasks:
            if task.future.set_running_or_notify_cancel():
                task.future.set_exception(error)
        for run in [*self._runs, *self._waiting_runs]:
            run.send(error)


def _compute(task: _Task) -> None:
    try:
        task.future.set_result(task.work())
    except Exception as error:
        task.future.set_exception(error if isinstance(error, AtlasError) else _as_error(error))


def _answer(batch: list[_Encode], residuals: Residuals) -> None:
    try:
        answers = encode(batch[0].language, [item.text for item in batch], residuals)
    except Exception as error:
        failure = _as_error(error)
        for item in batch:
            _settle(item, failure)
        return
    for item, answer in zip(batch, answers, strict=True):
        _settle(item, answer)


def _settle(item: _Encode, outcome: list[SaeActs] | Exception) -> None:
    if not item.future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        item.future.set_exception(outcome)
    else:
        item.future.set_result(outcome)


def _advance(run: _Run) -> bool:
    """Give a run its turn; False when it has ended."""
    if run.cancelled.is_set():
        logger.info("run cancelled")
        return False
    try:
        if run.generation is None:
            run.generation = run.start()
        if tokens := run.generation.step():
            run.send(tokens)
    except NotFinite as error:
        run.send(error)
        return False
    except Exception as error:
        run.send(_as_error(error))
        return False
    if run.generation.done:
        run.send(None)
        return False
    return True


def _as_error(error: Exception) -> Exception:
    """Turn the device's out of memory into a refusal; anything else is a bug and keeps its traceback in the log."""
    if isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        first_line = str(error).splitlines()[0]
        return Unavailable(f"The device ran out of memory: {first_line} Send a shorter text, or fewer at once.")
    logger.error("lane failed", exc_info=error)
    return error


def _post(
    loop: asyncio.AbstractEventLoop,
    inbox: asyncio.Queue[list[Token] | Exception | None],
    item: list[Token] | Exception | None,
) -> None:
    # The loop is closed when the process stops under a run; nobody reads the inbox then.
    if not loop.is_closed():
        loop.call_soon_threadsafe(inbox.put_nowait, item)
