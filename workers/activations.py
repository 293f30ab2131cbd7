"""Activations of a hook over a corpus: read from the model, cached on disk in shards, served as shuffled batches.

A shard holds the kept rows of some contexts as float16 [rows, d_in]. Never kept: the first position of a context, and
tokens whose norm is an outlier (attention sinks: a thousand times the median), which would drown every other token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from app.corpora import Stream
from workers.language_model import LanguageModel

TOKENS_PER_FORWARD = 2048


@dataclass(frozen=True)
class Norms:
    """What the first shard says of the hook: activation norms (of the tokens that are no outliers) and their mean."""

    limit: float
    """Rows with a larger norm are outliers."""
    mean_norm: float
    mean: tuple[float, ...]
    """[d_in]"""

    @property
    def scale(self) -> float:
        """The factor that brings the mean norm to sqrt(d_in), as SAELens' expected_average_only_in."""
        return len(self.mean) ** 0.5 / self.mean_norm


def read_contexts(
    model: LanguageModel,
    stream: Stream,
    rows: npt.NDArray[np.int64],
    context_size: int,
    hooks: list[str],
    bos: int | None,
) -> Iterator[tuple[npt.NDArray[np.int64], dict[str, Float[Tensor, "batch pos d"]]]]:
    """Yield (context rows, activations at the hooks) for all contexts, a forward pass at a time."""
    per_pass = max(1, TOKENS_PER_FORWARD // context_size)
    for start in range(0, len(rows), per_pass):
        part = rows[start : start + per_pass]
        ids = torch.from_numpy(stream.contexts(part, context_size, bos)).to(model.device)
        yield part, model.read(ids, hooks)


def write_shard(
    path: Path, model: LanguageModel, stream: Stream, rows: npt.NDArray[np.int64], context_size: int, hook: str
) -> None:
    """Cache the activations of some contexts. Matmuls run in bfloat16 around a float32 residual stream.

    On CPUs with AMX that is three times as fast; the error is 1e-4 of the variance, a thousandth of what an SAE leaves.
    The limit for outliers is set by the first shard written in a directory and kept beside it.
    """
    if path.exists():
        return
    with torch.autocast(model.device.type, torch.bfloat16):
        parts = [
            acts[hook][:, 1:].flatten(0, 1).float()
            for _, acts in read_contexts(model, stream, rows, context_size, [hook], model.card.bos_token_id)
        ]
    x = torch.cat(parts).cpu()
    norms = norms_of(path.parent) or _measure_norms(path.parent, x)
    kept = x[x.norm(dim=-1) <= norms.limit].half().numpy()
    scratch = path.with_suffix(".new")
    with scratch.open("wb") as out:
        np.save(out, kept)
    os.replace(scratch, path)


def norms_of(directory: Path) -> Norms | None:
    file = directory / "norms.json"
    return Norms(**json.loads(file.read_text())) if file.exists() else None


def outlier_limit(x: Float[Tensor, "row d_in"], ratio: float) -> float:
    return ratio * float(x.norm(dim=-1).median())


def _measure_norms(directory: Path, x: Float[Tensor, "row d_in"]) -> Norms:
    ratio = json.loads((directory / "limits.json").read_text())["max_norm_ratio"]
    limit = outlier_limit(x, ratio)
    kept = x[x.norm(dim=-1) <= limit]
    norms = Norms(limit, float(kept.norm(dim=-1).mean()), tuple(kept.mean(dim=0).tolist()))
    scratch = directory / "norms.json.new"
    scratch.write_text(json.dumps(norms.__dict__))
    os.replace(scratch, directory / "norms.json")
    return norms


class CachedActivations:
    """All shards of a directory as one array of rows, memory-mapped."""

    def __init__(self, shards: list[Path]) -> None:
        self._shards = [np.load(path, mmap_mode="r") for path in shards]
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, seed: int, epoch: int, number: int, size: int) -> Float[Tensor, "batch d_in"]:
        """Return batch `number` of an epoch's shuffled order, which depends on seed and epoch alone; float32."""
        rows = self._order(seed, epoch)[number * size : (number + 1) * size]
        rows = np.sort(rows)  # order within a batch does not matter, and shards are read front to back
        cuts = np.searchsorted(rows, self._starts)
        parts = [
            shard[rows[a:b] - start]
            for shard, start, a, b in zip(self._shards, self._starts, cuts, cuts[1:], strict=False)
            if b > a
        ]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))

    def _order(self, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        if getattr(self, "_order_key", None) != (seed, epoch):
            self._order_key = (seed, epoch)
            self._order_rows = np.random.default_rng([seed, epoch]).permutation(len(self))
        return self._order_rows
