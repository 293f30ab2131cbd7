"""Activations at hooks over a corpus: read from the model, kept on disk in shards, served as shuffled batches.

A shard holds the rows of some contexts at one hook as float16 [row, d], the first position of each context left out,
with the norms of its rows beside it in float32. What is stored is multiplied by a power of two that brings the mean
norm near sqrt(d), so that no hook of any model overflows; outliers (attention sinks: a thousand times the median) are
stored too, cut off at float16's largest, and left out when batches are made. So a shard depends on nothing but the
model, the text and the hook, and serves every later job on them.

    {directory}/{hook_name}/{number:05d}-{n_contexts}.npy and .norms.npy
                           /power.json
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from app.corpora import Stream
from app.errors import AtlasError
from app.trainplan import Part, Window
from workers.language_model import LanguageModel

TOKENS_PER_FORWARD = 2048
POWER_FILE = "power.json"

Rows = npt.NDArray[np.int64]


class NotFinite(AtlasError):
    """The model gave activations that are no numbers."""

    status = 422


@dataclass(frozen=True)
class Text:
    """What the model reads: contexts of a tokenised corpus."""

    model: LanguageModel
    stream: Stream
    context_size: int


@dataclass(frozen=True)
class Norms:
    """What the first shard says of a hook: norms (of the tokens that are no outliers) and the mean of these."""

    limit: float
    """Rows with a larger norm are outliers."""
    mean_norm: float
    mean: tuple[float, ...]
    """[d]"""

    @property
    def scale(self) -> float:
        """The factor that brings the mean norm to sqrt(d), as SAELens' expected_average_only_in."""
        return len(self.mean) ** 0.5 / self.mean_norm


@dataclass(frozen=True)
class Shard:
    """Rows of one hook on disk."""

    directory: Path
    number: int
    n_contexts: int

    @property
    def file(self) -> Path:
        return self.directory / f"{self.number:05d}-{self.n_contexts}.npy"

    @property
    def norms_file(self) -> Path:
        return self.file.with_suffix(".norms.npy")

    def exists(self) -> bool:
        """Whole: the norms are written last."""
        return self.norms_file.exists()

    def rows(self) -> npt.NDArray[np.float16]:
        return np.load(self.file, mmap_mode="r")

    def norms(self) -> npt.NDArray[np.float32]:
        return np.load(self.norms_file)

    def remove(self) -> None:
        self.norms_file.unlink(missing_ok=True)
        self.file.unlink(missing_ok=True)


def read_contexts(
    model: LanguageModel,
    stream: Stream,
    rows: Rows,
    context_size: int,
    hooks: list[str],
    bos: int | None,
) -> Iterator[tuple[Rows, dict[str, Float[Tensor, "batch pos d"]]]]:
    """Yield (context rows, activations at the hooks) for all contexts, a forward pass at a time."""
    per_pass = max(1, TOKENS_PER_FORWARD // context_size)
    for start in range(0, len(rows), per_pass):
        part = rows[start : start + per_pass]
        ids = torch.from_numpy(stream.contexts(part, context_size, bos)).to(model.device)
        yield part, model.read(ids, hooks)


def outlier_limit(x: Float[Tensor, "row d_in"], ratio: float) -> float:
    return ratio * float(x.norm(dim=-1).median())


def write_shards(
    directory: Path, number: int, text: Text, rows: Rows, hooks: Sequence[str], progress: Callable[[float], None]
) -> bool:
    """Write the shards of some contexts at those hooks that lack them, in one pass of the model; say if it ran.

    Matmuls run in bfloat16 around a float32 residual stream. On CPUs with bfloat16 that is twice to three times as
    fast; the error is 1e-4 of the variance, a thousandth of what an SAE leaves.
    """
    shards = {hook: Shard(directory / hook, number, len(rows)) for hook in hooks}
    missing = [hook for hook, shard in shards.items() if not shard.exists()]
    if not missing:
        return False
    parts: dict[str, list[Tensor]] = {hook: [] for hook in missing}
    bos, n_done = text.model.card.bos_token_id, 0
    for part, acts in read_contexts(*_in_bfloat16(text), rows, text.context_size, missing, bos):
        for hook in missing:
            parts[hook].append(acts[hook][:, 1:].flatten(0, 1).float().cpu())
        n_done += len(part)
        progress(n_done / len(rows))
    for hook in missing:
        _write(shards[hook], torch.cat(parts.pop(hook)))
    return True


class _Autocast:
    """A model whose reads run in bfloat16's autocast."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.device = model.device

    def read(self, ids: Tensor, hooks: Sequence[str]) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16):
            return self._model.read(ids, hooks)


def _in_bfloat16(text: Text) -> tuple[LanguageModel, Stream]:
    return _Autocast(text.model), text.stream  # pyright: ignore[reportReturnType]


def _write(shard: Shard, x: Float[Tensor, "row d"]) -> None:
    shard.directory.mkdir(parents=True, exist_ok=True)
    norms = x.norm(dim=-1)
    if n_broken := int((~norms.isfinite()).sum()):
        raise NotFinite(
            f"The activations at {shard.directory.name} are not finite on {n_broken:,} of {len(x):,} tokens. Look at "
            "the model and its precision there, or train at another hook."
        )
    scaled = (x * power_of(shard.directory, norms, x.shape[1])).clamp(-65504, 65504).half().numpy()
    _save(shard.file, scaled)
    _save(shard.norms_file, norms.numpy())


def _save(file: Path, array: npt.NDArray[np.generic]) -> None:
    scratch = file.with_suffix(f".new{os.getpid()}")
    with scratch.open("wb") as out:
        np.save(out, array)
    os.replace(scratch, file)


def power_of(directory: Path, norms: Tensor | None = None, d: int = 0) -> float:
    """Return the power of two that a hook's stored rows are multiplied by; the first shard written sets it."""
    file = directory / POWER_FILE
    if not file.exists():
        assert norms is not None
        power = 2.0 ** round(math.log2(d**0.5 / max(float(norms.median()), 1e-30)))
        scratch = file.with_suffix(f".new{os.getpid()}")
        scratch.write_text(json.dumps(power))
        os.replace(scratch, file)
    return float(json.loads(file.read_text()))


def norms_of(shard: Shard, ratio: float) -> Norms:
    """Measure the norms at a hook on one shard."""
    norms = torch.from_numpy(shard.norms())
    limit = ratio * float(norms.median())
    kept = norms <= limit
    x = torch.from_numpy(shard.rows()[kept.numpy()].astype(np.float32)) / power_of(shard.directory)
    return Norms(limit, float(norms[kept].mean()), tuple(x.mean(dim=0).tolist()))


class WindowReader:
    """The batches of one window: rows of some parts of shards in an order that the seed sets, outliers left out.

    Every hook serves the same tokens: what is an outlier at one is left out at all.
    """

    def __init__(
        self,
        window: Window,
        shards: Mapping[int, Mapping[str, Shard]],
        norms: Mapping[str, Norms],
        seed: int,
    ) -> None:
        self._window = window
        self._norms = norms
        self._numbers = sorted({part.shard for part in window.parts})
        self._shards = {number: shards[number] for number in self._numbers}
        self._arrays = {hook: [self._shards[n][hook].rows() for n in self._numbers] for hook in norms}
        self._powers = {hook: power_of(next(iter(self._shards.values()))[hook].directory) for hook in norms}
        self._starts = np.cumsum([0, *(len(rows) for rows in next(iter(self._arrays.values())))])
        chosen = np.concatenate([self._rows(part, seed) for part in window.parts])
        self._order = chosen[np.random.default_rng([seed, window.first_step]).permutation(len(chosen))]

    def __len__(self) -> int:
        """Rows in the window."""
        return len(self._order)

    def _rows(self, part: Part, seed: int) -> Rows:
        """The part's rows, counted through all shards of the window."""
        place = self._numbers.index(part.shard)
        shards = self._shards[part.shard]
        kept = np.logical_and.reduce([shards[hook].norms() <= norms.limit for hook, norms in self._norms.items()])
        rows = np.flatnonzero(kept)
        if part.of > 1:
            rows = rows[np.random.default_rng([seed, part.epoch, part.shard]).permutation(len(rows))]
            rows = np.array_split(rows, part.of)[part.number]
        return self._starts[place] + rows

    def batch(self, step: int) -> dict[str, Float[Tensor, "batch d"]]:
        """Return the batch of an optimiser step of the window, at each hook normalised to a mean norm of sqrt(d)."""
        number, n = step - self._window.first_step, self._window.n_batches
        first, end = len(self._order) * number // n, len(self._order) * (number + 1) // n
        # The order within a batch does not matter, and shards are read front to back.
        rows = np.sort(self._order[first:end])
        cuts = np.searchsorted(rows, self._starts)
        places = [(i, rows[a:b] - self._starts[i]) for i, (a, b) in enumerate(itertools.pairwise(cuts)) if b > a]
        found: dict[str, Tensor] = {}
        for hook, norms in self._norms.items():
            half = np.concatenate([self._arrays[hook][i][at] for i, at in places])
            found[hook] = torch.from_numpy(half).float().mul_(norms.scale / self._powers[hook])
        return found
