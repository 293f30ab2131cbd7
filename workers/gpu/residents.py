"""Models and SAEs in the device's memory, within a byte budget, the least recently used ones leaving first.

Used from one event loop; loading runs in a thread of its own, so other requests go on meanwhile. What a request holds
is never evicted under it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from app import log
from app.errors import NotFound, TooLarge, Unavailable
from app.protocol import Loading, ModelRef, Resident, SaeRef
from workers.checkpoints import Loaded, load_sae
from workers.language_model import LanguageModel
from workers.sae.coders import Coder

SAE_DTYPE = torch.float32
"""SAEs are computed in full precision whatever the model's: which latents are the top k hangs on small differences."""

logger = log.get(__name__)


@dataclass
class _Entry:
    kind: Literal["model", "sae"]
    id: str
    nbytes: int
    """An estimate from the file until it is loaded."""
    ready: asyncio.Future[Any] = field(init=False)
    share: float = 0.0
    """How much of it is in memory; written by the thread that loads."""
    users: int = 0
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Held:
    """What one request works with."""

    language: LanguageModel
    saes: dict[str, Coder] = field(default_factory=dict[str, Coder])
    """By SaeRef.path."""


class Residents:
    def __init__(self, device: str, dtype: Callable[[int], torch.dtype], budget_bytes: int) -> None:
        """dtype tells the precision of a model of so many weights."""
        self.device = device
        self.dtype_of = dtype
        self.budget_bytes = budget_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """By path, least recently used first."""
        self._failed: dict[str, BaseException] = {}
        """Why something could not be loaded while nobody waited for it; the next who asks is told."""
        self._loading = asyncio.Semaphore(1)
        """One thing is loaded at a time."""

    @property
    def used_bytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def list(self) -> tuple[list[Resident], list[str]]:
        """What is resident, and the ids of what is being loaded."""
        ready = [e for e in self._entries.values() if e.ready.done()]
        loading = [e.id for e in self._entries.values() if not e.ready.done()]
        return [Resident(kind=e.kind, id=e.id, bytes=e.nbytes) for e in ready], loading

    @asynccontextmanager
    async def hold(self, model: ModelRef, saes: list[SaeRef]) -> AsyncIterator[Held]:
        """Keep a model and SAEs resident within the context, loading what is not.

        Raises NotFound for a directory that is not there, TooLarge or Unavailable with both numbers when memory lacks.
        """
        with ExitStack() as stack:
            language = stack.enter_context(self._use(model.path, "model", model.id))
            coders = {sae.path: stack.enter_context(self._use(sae.path, "sae", sae.id)) for sae in saes}
            yield Held(await language, {path: await coder for path, coder in coders.items()})

    async def load(self, model: ModelRef, saes: list[SaeRef], seconds: float) -> Sequence[Loading]:
        """Begin to load what is not resident and return what is still being loaded after some seconds.

        Raises as `hold` does, and what a loading begun here before has failed with.
        """
        for path in (model.path, *(sae.path for sae in saes)):
            if path in self._failed:
                raise self._failed.pop(path)
        with ExitStack() as stack:
            stack.enter_context(self._use(model.path, "model", model.id))
            for sae in saes:
                stack.enter_context(self._use(sae.path, "sae", sae.id))
            entries = [self._entries[ref.path] for ref in (model, *saes)]
            done, _ = await asyncio.wait({entry.ready for entry in entries}, timeout=seconds)
        for ready in done:
            ready.result()
        now = time.monotonic()
        waiting = [entry for entry in entries if not entry.ready.done()]
        return [
            Loading(id=e.id, bytes=e.nbytes, loaded=int(e.nbytes * e.share), seconds=round(now - e.began, 1))
            for e in waiting
        ]

    @contextmanager
    def _use(self, path: str, kind: Literal["model", "sae"], name: str) -> Iterator[Awaitable[Any]]:
        entry = self._entries.get(path) or self._admit(path, kind, name)
        self._entries.move_to_end(path)
        entry.users += 1
        try:
            # Shielded: one caller's cancellation must not cancel the loading that others wait for.
            yield asyncio.shield(entry.ready)
        finally:
            entry.users -= 1

    def _admit(self, path: str, kind: Literal["model", "sae"], name: str) -> _Entry:
        directory = Path(path)
        if not directory.is_dir():
            raise NotFound(f"The files of {name} are gone from {directory}; add it again.")
        if kind == "model" and not (directory / "card.json").is_file():
            raise NotFound(
                f"Only a description of {name} is here, from a bundle; its weights are not. Install it with "
                f"`sae-atlas model add DIRECTORY_OR_HUB_ID --id {name}`."
            )
        nbytes = n_weights(directory)
        nbytes *= (self.dtype_of(nbytes) if kind == "model" else SAE_DTYPE).itemsize
        self._make_room(name, nbytes)
        load = self._load_model if kind == "model" else self._load_sae
        entry = _Entry(kind, name, nbytes)
        entry.ready = asyncio.ensure_future(self._load(path, load, partial(setattr, entry, "share")))
        entry.ready.add_done_callback(lambda _: None if self._entries.get(path) is not entry else self._loaded(path))
        self._entries[path] = entry
        return entry

    def _make_room(self, name: str, nbytes: int) -> None:
        if nbytes > self.budget_bytes:
            raise TooLarge(
                f"{name} needs {_size(nbytes)}, the worker's whole budget is {_size(self.budget_bytes)}. "
                "Raise SAE_ATLAS_MEMORY_BYTES or use a smaller one."
            )
        idle = [path for path, entry in self._entries.items() if not entry.users and entry.ready.done()]
        free = self.budget_bytes - self.used_bytes
        reachable = free + sum(self._entries[path].nbytes for path in idle)
        if nbytes > reachable:
            raise Unavailable(
                f"{name} needs {_size(nbytes)}, {_size(reachable)} free: the rest is in use. Try again soon."
            )
        for path in idle:
            if nbytes <= self.budget_bytes - self.used_bytes:
                break
            logger.info("evicted", id=self._entries.pop(path).id)
            if self.device == "cuda":
                torch.cuda.empty_cache()

    async def _load(
        self, path: str, load: Callable[[Path, Loaded], LanguageModel | Coder], loaded: Loaded
    ) -> LanguageModel | Coder:
        # A thread that ends with the loading takes its OpenMP threads with it. Were they kept, there would be more of
        # them than cores, and OpenMP then lets waiting threads sleep at once: a prompt would take 85 ms, not 60.
        async with self._loading:
            loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
            try:
                return await asyncio.get_running_loop().run_in_executor(loader, load, Path(path), loaded)
            finally:
                loader.shutdown(wait=False)

    def _loaded(self, path: str) -> None:
        """Put the true size in place of the estimate, or forget what could not be loaded."""
        entry = self._entries[path]
        if entry.ready.cancelled() or entry.ready.exception() is not None:
            del self._entries[path]
            if not entry.users and not entry.ready.cancelled():
                self._failed[path] = entry.ready.exception() or RuntimeError("loading failed")
            return
        entry.nbytes = entry.ready.result().nbytes
        logger.info("loaded", id=entry.id, bytes=entry.nbytes)

    def _load_model(self, path: Path, loaded: Loaded) -> LanguageModel:
        return LanguageModel.load(path, device=self.device, dtype=self.dtype_of(n_weights(path)), loaded=loaded)

    def _load_sae(self, path: Path, loaded: Loaded) -> Coder:
        return load_sae(path, device=self.device, dtype=SAE_DTYPE, loaded=loaded)


def n_weights(directory: Path) -> int:
    """How many numbers the safetensors of a directory hold, from their headers alone."""
    total = 0
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            total += sum(_numel(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return total


def device_bytes(device: str) -> int:
    """The memory there is: the card's, or the machine's within the limit of its container."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    if device == "mps":
        return torch.mps.recommended_max_memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return total if allowed == "max" else min(total, int(allowed))


def _numel(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def _size(nbytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= scale / 2:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes / 2**10:.1f} KiB"
