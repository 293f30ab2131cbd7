"""Sparse activations of a harvest on disk: one file a shard, sorted by latent. numpy only.

A record is (latent, token, activation), token being context * context_size + position. Evidence is assembled from all
shards together, so it depends on the text and the SAE alone, never on how the corpus was cut or batched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Records:
    """Activations sorted by latent, and by token within a latent."""

    starts: npt.NDArray[np.int64]
    """[n_latents + 1] where each latent's records begin."""
    tokens: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]

    def of(self, latent: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        part = slice(self.starts[latent], self.starts[latent + 1])
        return self.tokens[part], self.values[part]


def write(
    path: Path,
    latents: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    d_sae: int,
) -> None:
    """Write one shard, whole or not at all. Records may come in any order."""
    order = np.lexsort((tokens, latents))
    starts = np.concatenate([[0], np.cumsum(np.bincount(latents, minlength=d_sae))]).astype("<i8")
    scratch = path.with_suffix(".new")
    with scratch.open("wb") as out:
        for column in (starts, tokens[order].astype("<u4"), values[order].astype("<f4")):
            out.write(column.tobytes())
        out.flush()
        os.fsync(out.fileno())
    os.replace(scratch, path)


class Spill:
    """All shards of a harvest, in the order of their tokens."""

    def __init__(self, paths: list[Path], d_sae: int) -> None:
        self.key = tuple((str(path), path.stat().st_mtime_ns) for path in paths)
        """Tells this spill from every other."""
        self._shards = [_open(path, d_sae) for path in paths]

    def records(self, start: int, end: int) -> Records:
        """Return the records of latents start..end; latent numbers in the result count from start."""
        counts = sum(np.diff(starts[start : end + 1]) for starts, _, _ in self._shards)
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        tokens = np.empty(bounds[-1], dtype=np.int64)
        values = np.empty(bounds[-1], dtype=np.float32)
        fill = bounds[:-1].copy()
        for starts, shard_tokens, shard_values in self._shards:
            base, sizes = starts[start], np.diff(starts[start : end + 1])
            place = np.repeat(fill - (starts[start:end] - base), sizes) + np.arange(sizes.sum())
            tokens[place] = shard_tokens[base : starts[end]]
            values[place] = shard_values[base : starts[end]]
            fill += sizes
        return Records(bounds, tokens, values)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """[d_sae] records of each latent."""
        return np.asarray(sum(np.diff(starts) for starts, _, _ in self._shards))


def _open(path: Path, d_sae: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
    content = np.memmap(path, dtype=np.uint8, mode="r")
    starts = np.frombuffer(content[: 8 * (d_sae + 1)], dtype="<i8")
    n = int(starts[-1])
    body = content[8 * (d_sae + 1) :]
    return starts, body[: 4 * n].view("<u4"), body[4 * n : 8 * n].view("<f4")
