"""Sparse activations on disk: one file a shard, sorted by latent. numpy only: no database, no torch.

A record is (latent, token, activation), token being context * context_size + position. Evidence is assembled from all
shards together, so it depends on the text and the SAE alone, never on how the corpus was cut or batched.

    activations/{key}/{start:08d}-{end:08d}.bin   contexts start..end: i64 [d_sae + 1] where each latent's records
                                                  begin, u32 tokens, f32 activations, little-endian
                     /about.json                  Kept, for whoever reads them without the catalog

A harvest with `keep_activations` leaves them there: thresholds and context widths can be changed without the model, and
a longer harvest of the same text reads only what is new.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

RECORDS_PER_CHUNK = 4_000_000
"""Most activations read at once, 12 bytes each and as much again while they are looked at, whatever the corpus."""


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
    scratch = path.with_suffix(f".new-{os.getpid()}")  # two trainers may write the same shard: one replaces the other
    with scratch.open("wb") as out:
        for column in (starts, tokens[order].astype("<u4"), values[order].astype("<f4")):
            out.write(column.tobytes())
        out.flush()
        os.fsync(out.fileno())
    os.replace(scratch, path)


ABOUT = "about.json"


@dataclass(frozen=True)
class Kept:
    """What kept activations are of."""

    model: str
    sae_hash: str
    corpus_hash: str
    tokenizer_hash: str
    context_size: int
    bos_token_id: int | None
    d_sae: int

    def write(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        scratch = directory / f"{ABOUT}.new-{os.getpid()}"
        scratch.write_text(json.dumps(asdict(self), indent=2))
        os.replace(scratch, directory / ABOUT)


@dataclass(frozen=True)
class Found:
    """The activations of one latent by their place in the corpus' token stream (corpora.Stream.tokens)."""

    offsets: npt.NDArray[np.int64]
    """Ascending."""
    values: npt.NDArray[np.float32]
    contexts: npt.NDArray[np.int64]
    """Which context the model read each in: its text begins there, whatever window is shown."""

    def windows(self, width: int) -> npt.NDArray[np.int64]:
        """Return [n, 2]: the stream's tokens from `width` before to `width` after each, across context borders."""
        return np.stack([np.maximum(self.offsets - width, 0), self.offsets + width + 1], axis=1)


class KeptActivations:
    """Kept activations of an SAE over a corpus: any threshold, any window, no model. Reads one latent at a time."""

    def __init__(self, directory: Path) -> None:
        self.about = Kept(**json.loads((directory / ABOUT).read_text()))
        self._shards = shards(directory)
        self._spill = Spill([path for _, _, path in self._shards], self.about.d_sae)

    @property
    def n_tokens(self) -> int:
        """Tokens whose activations were looked at: every position of a context but its first."""
        return sum(end - start for start, end, _ in self._shards) * (self.about.context_size - 1)

    def of(self, latent: int, above: float = 0.0) -> Found:
        """Return where a latent's activation exceeds a threshold."""
        tokens, values = self._spill.records(latent, latent + 1).of(0)
        keep = values > above
        tokens, size, has_bos = tokens[keep], self.about.context_size, self.about.bos_token_id is not None
        contexts = tokens // size
        return Found(contexts * (size - has_bos) + tokens % size - has_bos, values[keep], contexts)

    def density(self, latent: int, above: float = 0.0) -> float:
        """Return the fraction of tokens on which a latent's activation exceeds a threshold."""
        return len(self.of(latent, above).values) / self.n_tokens


def shard_path(directory: Path, start: int, end: int) -> Path:
    return directory / f"{start:08d}-{end:08d}.bin"


def shards(directory: Path) -> list[tuple[int, int, Path]]:
    """Return (first context, end, file) of the longest row of shards that covers the contexts from 0 without a gap."""
    found = sorted(
        ((int(path.stem[:8]), int(path.stem[9:]), path) for path in directory.glob("????????-????????.bin")),
        key=lambda shard: (shard[0], -shard[1]),
    )
    row: list[tuple[int, int, Path]] = []
    for start, end, path in found:
        if start == (row[-1][1] if row else 0):
            row.append((start, end, path))
    return row


class Spill:
    """All shards of a harvest, in the order of their tokens."""

    def __init__(self, paths: Sequence[Path], d_sae: int) -> None:
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

    def chunks(self, start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
        """Cut latents start..end into runs of up to `most` that have at most RECORDS_PER_CHUNK records together.

        A latent with more than that comes alone.
        """
        totals = np.concatenate([[0], np.cumsum(self.counts[start:end])])
        low = 0
        while low < end - start:
            fitting = int(np.searchsorted(totals, totals[low] + RECORDS_PER_CHUNK, side="right")) - 1
            high = min(max(fitting, low + 1), low + most, end - start)
            yield start + low, start + high
            low = high

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """[d_sae] records of each latent."""
        return np.asarray(sum(np.diff(starts) for starts, _, _ in self._shards))


def _open(path: Path, d_sae: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
    content = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)  # slices of a memmap cost ten times as much
    starts = np.frombuffer(content[: 8 * (d_sae + 1)], dtype="<i8")
    n = int(starts[-1])
    body = content[8 * (d_sae + 1) :]
    return starts, body[: 4 * n].view("<u4"), body[4 * n : 8 * n].view("<f4")
