"""The one thread that owns the device: texts waiting to be encoded are batched, and so are the texts being generated.

A turn is one batch of encodes, one piece of some other work, one piece of a prompt and one token of every row of one
model's batch, so none of them starves another. Runs that find no room wait; of those the next is one of the user with
the fewest rows in the batches. Knows no HTTP and no files; what it is given is resident already.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from app import log
from app.errors import AtlasError, Busy, Unavailable
from app.protocol import Queued, SaeActs, Token
from workers.gpu.encoding import Text, encode
from workers.gpu.generation import Batch, Prefill, Run, kv_bytes
from workers.gpu.residuals import Residuals
from workers.language_model import LanguageModel

MAX_ROWS = 32
"""Rows that grow side by side, so that a token of each comes soon."""
MAX_GATHER_SECONDS = 0.1
"""Longest wait for others to come, where several asked at once lately. No more than a quarter of the last batch's time,
and half of that after the last that came: 40 ms where a batch takes 160, 1 ms where it takes 4."""

_DOZE_SECONDS = 1.0

T = TypeVar("T")
Pieces = Generator[None, None, T]
"""Work for the device in pieces; between two of them others have their turn."""

logger = log.get(__name__)


@dataclass
class _Encode:
    """One text in the queue. Nobody listens after the deadline, so it is not computed then."""

    language: LanguageModel
    text: Text
    deadline: float
    call: object
    """What the texts of one request have in common."""
    future: Future[list[SaeActs]] = field(default_factory=lambda: Future[list[SaeActs]]())


@dataclass(eq=False)
class _Waiting:
    """A run and where its tokens go. `send(None)` says that it has ended; an exception that it failed."""

    run: Run
    send: Callable[[list[Token | Queued] | Exception | None], None]
    cancelled: threading.Event
    place: int = 0
    """What was last said of its place in the queue."""
    prefill: Prefill | None = None


@dataclass(eq=False)
class _Work:
    """Something else for the device, in pieces."""

    pieces: Pieces[Any]
    deadline: float
    """Nobody listens after that."""
    future: Future[Any] = field(default_factory=lambda: Future[Any]())


class Lane:
    """Owns a thread. `encode` and `generate` are called from one event loop; `admit` bounds how many do so at once."""

    def __init__(
        self, max_queue: int, batch_tokens: int, residuals: Residuals | None = None, kv_budget: int = 2**31
    ) -> None:
        self.max_queue = max_queue
        self.residuals = residuals or Residuals(0)
        self.kv_budget = kv_budget
        """Bytes that the KV caches of all runs may take."""
        self.admitted = 0
        self._batch_tokens = batch_tokens
        self._encodes: list[_Encode] = []
        self._crowds = deque([1], maxlen=4)
        """How many requests for encodes there were at once, in each of the last batches and behind it."""
        self._last_seconds = 0.0
        """What the last batch of encodes took."""
        self._works: deque[_Work] = deque()
        self._waiting: list[_Waiting] = []
        self._reading: deque[_Waiting] = deque()
        """Let in; their prompts are being read."""
        self._growing: list[_Waiting] = []
        self._batches: deque[Batch] = deque()
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
        call = object()
        items = [_Encode(language, text, time.monotonic() + seconds, call) for text in texts]
        self._put(lambda: self._encodes.extend(items))
        return list(await asyncio.gather(*(asyncio.wrap_future(item.future) for item in items)))

    async def generate(self, run: Run) -> AsyncIterator[list[Token | Queued]]:
        """Yield tokens as they come, and the place in the queue before. Closing the iterator ends the run."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[list[Token | Queued] | Exception | None] = asyncio.Queue()
        waiting = _Waiting(run, lambda item: _post(loop, inbox, item), threading.Event())
        self._put(lambda: self._waiting.append(waiting))
        try:
            while (item := await inbox.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            waiting.cancelled.set()

    async def compute(self, work: Callable[[], T], seconds: float) -> T:
        """Call a function on the lane's thread, which alone may use the device."""

        def pieces() -> Pieces[T]:
            return work()
            yield

        return await self.work(pieces(), seconds)

    async def work(self, pieces: Pieces[T], seconds: float) -> T:
        """Do something else on the device, a piece in each turn. Nothing more is done once the caller is gone."""
        item = _Work(pieces, time.monotonic() + seconds)
        self._put(lambda: self._works.append(item))
        return await asyncio.wrap_future(item.future)

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
            self._gather()
            if batch := self._next_batch():
                self._encode(batch)
            self._do_piece()
            self._drop_cancelled()
            self._let_in()
            self._read_piece()
            self._grow()
        self._refuse_rest()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when stopping."""
        with self._changed:
            while not self._encodes and not self._is_busy():
                # Not for ever: a signal that comes just before the main thread sleeps is seen when it wakes.
                self._changed.wait(_DOZE_SECONDS)
            return not self._stopping

    def _gather(self) -> None:
        """Wait for the rest of a crowd: its first text alone would keep the device from all the others.

        Whoever asks alone does not wait, and nothing waits while there is something else to do.
        """
        with self._changed:
            patience = min(MAX_GATHER_SECONDS, self._last_seconds / 4)
            until = time.monotonic() + patience
            while 0 < _n_calls(self._encodes) < max(self._crowds) and not self._is_busy():
                left = min(patience / 2, until - time.monotonic())
                if left <= 0 or not self._changed.wait(left):
                    break

    def _encode(self, batch: list[_Encode]) -> None:
        began = time.monotonic()
        answers = _answers(batch, self.residuals)
        self._last_seconds = time.monotonic() - began
        # Before they are told: who asks again at once is no other.
        with self._changed:
            self._crowds.append(_n_calls(batch) + _n_calls(self._encodes))
        for item, answer in zip(batch, answers, strict=True):
            _set(item.future, answer)

    def _is_busy(self) -> bool:
        return bool(self._works or self._waiting or self._reading or self._batches or self._stopping)

    def _next_batch(self) -> list[_Encode]:
        """The text that waited longest and those of its model nearest in length, within the bound on padded tokens."""
        now = time.monotonic()
        with self._changed:
            for item in self._encodes:
                if item.deadline <= now:
                    _set(item.future, _late())
            waiting = [item for item in self._encodes if not item.future.done()]
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

    def _do_piece(self) -> None:
        if not self._works:
            return
        item = self._works.popleft()
        if item.future.cancelled() or item.deadline < time.monotonic():
            item.pieces.close()
            _set(item.future, _late())
            return
        try:
            next(item.pieces)
            self._works.append(item)
        except StopIteration as end:
            _set(item.future, end.value)
        except Exception as error:
            _set(item.future, error if isinstance(error, AtlasError) else _as_error(error))

    def _drop_cancelled(self) -> None:
        """Free what belongs to clients that have gone."""
        with self._changed:
            self._waiting = [item for item in self._waiting if not item.cancelled.is_set()]
        self._reading = deque(item for item in self._reading if not item.cancelled.is_set())
        for item in [item for item in self._growing if item.cancelled.is_set()]:
            logger.info("run cancelled", rows=item.run.n_rows)
            self._growing.remove(item)
            for batch in self._batches:
                batch.drop(item.run)
        self._batches = deque(batch for batch in self._batches if len(batch))

    def _let_in(self) -> None:
        """Take in the runs that there is room for, and tell the others their places."""
        with self._changed:
            while self._waiting and self._has_room(item := self._next_run()):
                self._waiting.remove(item)
                if item.place:
                    item.send([Queued(place=0)])
                self._reading.append(item)
            waiting = list(self._waiting)
        for place, item in enumerate(waiting, 1):
            if item.place != place:
                item.place = place
                item.send([Queued(place=place)])

    def _next_run(self) -> _Waiting:
        """The oldest of the user with the fewest rows."""
        rows: dict[str, int] = {}
        for item in [*self._reading, *self._growing]:
            rows[item.run.asked.user] = rows.get(item.run.asked.user, 0) + item.run.n_rows
        return min(self._waiting, key=lambda item: rows.get(item.run.asked.user, 0))

    def _has_room(self, item: _Waiting) -> bool:
        active = [other.run for other in [*self._reading, *self._growing]]
        taken = sum(run.n_tokens * kv_bytes(run.language) for run in active)
        fits = taken + item.run.n_tokens * kv_bytes(item.run.language) <= self.kv_budget
        return not active or (fits and sum(run.n_rows for run in active) + item.run.n_rows <= MAX_ROWS)

    def _read_piece(self) -> None:
        """Read a piece of the prompts of one run; with the last piece it joins its model's batch."""
        if not self._reading:
            return
        item = self._reading.popleft()
        try:
            item.prefill = item.prefill or Prefill(item.run)
            item.prefill.step()
            if not item.prefill.done:
                self._reading.append(item)
                return
            batch = self._batch(item.run.language)
            outcome = batch.join(item.prefill)
            item.prefill = None
        except Exception as error:
            item.send(_as_error(error))
            return
        self._growing.append(item)
        self._tell(item, outcome)

    def _batch(self, language: LanguageModel) -> Batch:
        for batch in self._batches:
            if batch.language is language:
                return batch
        self._batches.append(Batch(language))
        return self._batches[-1]

    def _grow(self) -> None:
        """One token of every row of one model's batch; the models take turns."""
        if not self._batches:
            return
        batch = self._batches.popleft()
        if not len(batch):
            return
        try:
            outcomes = batch.step()
        except Exception as error:
            failure = _as_error(error)
            for item in [item for item in self._growing if item.run in batch.runs]:
                self._tell(item, failure)
            return
        items = {id(item.run): item for item in self._growing}
        for run, outcome in outcomes:
            self._tell(items[id(run)], outcome)
        if len(batch):
            self._batches.append(batch)

    def _tell(self, item: _Waiting, outcome: list[Token] | Exception) -> None:
        """Send what a run has got, and its end."""
        if isinstance(outcome, Exception):
            self._growing.remove(item)
            item.send(outcome)
            return
        if outcome:
            item.send([*outcome])
        if item.run.done:
            self._growing.remove(item)
            item.send(None)

    def _refuse_rest(self) -> None:
        error = Unavailable("The gpu worker is stopping; try again in a few seconds.")
        for item in self._encodes:
            _set(item.future, error)
        for work in self._works:
            _set(work.future, error)
        for item in [*self._waiting, *self._reading, *self._growing]:
            item.send(error)


def _n_calls(items: list[_Encode]) -> int:
    return len({id(item.call) for item in items})


def _answers(batch: list[_Encode], residuals: Residuals) -> Sequence[list[SaeActs] | Exception]:
    try:
        return encode(batch[0].language, [item.text for item in batch], residuals)
    except Exception as error:
        return [_as_error(error)] * len(batch)


def _late() -> Unavailable:
    """What is answered in any case: a request that is never answered would keep its place in the queue for ever."""
    return Unavailable("The device was busy with others until this request's deadline. Try again.")


def _set(future: Future[Any], outcome: Any) -> None:
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


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
    inbox: asyncio.Queue[list[Token | Queued] | Exception | None],
    item: list[Token | Queued] | Exception | None,
) -> None:
    # The loop is closed when the process stops under a run; nobody reads the inbox then.
    if not loop.is_closed():
        loop.call_soon_threadsafe(inbox.put_nowait, item)
