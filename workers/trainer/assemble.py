"""Evidence of features from their sparse activations: examples, intervals, histogram, co-activation. numpy only."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse

from app.corpora import Stream
from app.evidence import N_INTERVALS, Example, Interval
from app.spill import Spill

N_BINS = 50
_DUPLICATE_REACH = 8
"""Two examples are duplicates when this many tokens on both sides of their peaks are the same."""
_MAX_CORRELATED_RECORDS = 50_000_000
_LATENTS_PER_READ = 512


@dataclass(frozen=True)
class Sampling:
    """How many examples, of which contexts."""

    context_size: int
    bos: int | None
    n_top: int
    n_per_interval: int
    seed: int


@dataclass(frozen=True)
class Activity:
    """What the records of one latent say."""

    n_active: int
    max_act: float
    mean_act: float
    histogram: npt.NDArray[np.int64]
    top: tuple[Example, ...]
    intervals: tuple[Interval, ...]


def activity(
    latent: int, tokens: npt.NDArray[np.int64], values: npt.NDArray[np.float32], stream: Stream, how: Sampling
) -> Activity:
    """Assemble one latent's examples and histogram from all its records, sorted by token."""
    if not len(tokens):
        return Activity(0, 0.0, 0.0, np.zeros(0, dtype=np.int64), (), ())
    highest = float(values.max())
    contexts, bounds = _context_bounds(tokens, how.context_size)
    peaks = np.maximum.reduceat(values, bounds[:-1])
    ranked = np.lexsort((contexts, -peaks))

    def example(place: int) -> Example:
        part = slice(bounds[place], bounds[place + 1])
        return Example(int(contexts[place]), tokens[part] % how.context_size, values[part])

    chosen = _without_duplicates(ranked, example, stream, how)
    return Activity(
        n_active=len(tokens),
        max_act=highest,
        mean_act=float(values.mean(dtype=np.float64)),
        histogram=np.histogram(values, bins=N_BINS, range=(0, highest))[0],
        top=tuple(example(place) for place in chosen),
        intervals=_intervals(latent, values, peaks, set(chosen), example, how),
    )


def _context_bounds(
    tokens: npt.NDArray[np.int64], context_size: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The distinct contexts, ascending, and where the records of each begin (with the end appended)."""
    of_context = tokens // context_size
    starts = np.flatnonzero(np.diff(of_context, prepend=-1))
    return of_context[starts], np.append(starts, len(tokens))


def _without_duplicates(
    ranked: npt.NDArray[np.int64], example: Callable[[int], Example], stream: Stream, how: Sampling
) -> list[int]:
    """The first n_top places whose text around the peak has not been seen at a higher one."""
    seen: set[tuple[int, ...]] = set()
    chosen: list[int] = []
    for place in ranked[: how.n_top * 5].tolist():
        found = example(place)
        ids = stream.context(found.context, how.context_size, how.bos)
        key = tuple(ids[max(0, found.peak - _DUPLICATE_REACH) : found.peak + _DUPLICATE_REACH + 1])
        if key in seen:
            continue
        seen.add(key)
        chosen.append(place)
        if len(chosen) == how.n_top:
            break
    return chosen


def _intervals(
    latent: int,
    values: npt.NDArray[np.float32],
    peaks: npt.NDArray[np.float32],
    used: set[int],
    example: Callable[[int], Example],
    how: Sampling,
) -> tuple[Interval, ...]:
    """Equal bands of (0, max], highest first: how many active tokens lie in each, and contexts that peak in it."""
    bounds = np.linspace(float(values.max()), 0.0, N_INTERVALS + 1)
    intervals: list[Interval] = []
    for band, (high, low) in enumerate(itertools.pairwise(bounds.tolist())):
        count = int(((values > low) & (values <= high)).sum())
        places = [p for p in np.flatnonzero((peaks > low) & (peaks <= high)).tolist() if p not in used]
        rng = np.random.default_rng([how.seed, latent, band])
        size = min(how.n_per_interval, len(places))
        sample = sorted(
            rng.choice(len(places), size=size, replace=False).tolist(), key=lambda i: -float(peaks[places[i]])
        )
        intervals.append(Interval(low, high, count, tuple(example(places[i]) for i in sample)))
    return tuple(intervals)


@dataclass(frozen=True)
class Correlation:
    """Pearson correlations of activations over tokens, from exact sums over (a share of) the corpus."""

    by_token: scipy.sparse.csr_array
    """[tokens, d_sae]"""
    by_latent: scipy.sparse.csc_array
    n_tokens: int
    means: npt.NDArray[np.float64]
    deviations: npt.NDArray[np.float64]

    @classmethod
    def of(cls, spill: Spill, d_sae: int, n_contexts: int, context_size: int) -> Correlation:
        """Build from all contexts, or from a random share of them when there are more records than memory holds.

        Every position of a context but the first was read. Records are thinned while they are read, so that memory is
        bounded by _MAX_CORRELATED_RECORDS whatever the corpus.
        """
        every = max(1, -(-int(spill.counts.sum()) // _MAX_CORRELATED_RECORDS))
        kept = np.random.default_rng(0).random(n_contexts) < 1 / every
        n_used = int(kept.sum()) * (context_size - 1)
        by_latent = _thinned(spill, d_sae, kept, context_size)
        sums = np.asarray(by_latent.sum(axis=0)).ravel().astype(np.float64)
        squares = np.asarray(by_latent.multiply(by_latent).sum(axis=0)).ravel().astype(np.float64)
        means = sums / n_used
        deviations = np.sqrt(np.maximum(squares / n_used - means**2, 0.0))
        return cls(by_latent.tocsr(), by_latent, n_used, means, deviations)

    def strongest(self, start: int, end: int, n: int = 10) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """The n latents that correlate most with each of latents start..end, [end - start, n] twice."""
        products = (self.by_latent[:, start:end].T @ self.by_token).toarray() / self.n_tokens
        covariance = products - np.outer(self.means[start:end], self.means)
        scale = np.outer(self.deviations[start:end], self.deviations)
        pearson = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
        pearson[np.arange(end - start), np.arange(start, end)] = -2.0
        indices = np.stack([_largest(row, n) for row in pearson])
        return indices, np.take_along_axis(pearson, indices, axis=1)


def _largest(row: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.int64]:
    """Where the n largest are, the first of equal ones first: a stable sort's answer without sorting all of a row."""
    n = min(n, len(row))
    least = np.partition(row, len(row) - n)[len(row) - n]
    places = np.flatnonzero(row >= least)
    return places[np.argsort(-row[places], kind="stable")[:n]]


def _thinned(spill: Spill, d_sae: int, kept: npt.NDArray[np.bool_], context_size: int) -> scipy.sparse.csc_array:
    """The records of the kept contexts, [tokens of those, d_sae]."""
    rank = np.cumsum(kept) - 1
    tokens: list[npt.NDArray[np.int64]] = []
    values: list[npt.NDArray[np.float32]] = []
    counts: list[npt.NDArray[np.int64]] = []
    for start, end in spill.chunks(0, d_sae, _LATENTS_PER_READ):
        part = spill.records(start, end)
        contexts, positions = np.divmod(part.tokens, context_size)
        mask = kept[contexts]
        tokens.append(rank[contexts[mask]] * context_size + positions[mask])
        values.append(part.values[mask])
        counts.append(np.diff(np.concatenate([[0], np.cumsum(mask)])[part.starts]))
    starts = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    shape = (int(kept.sum()) * context_size, d_sae)
    return scipy.sparse.csc_array((np.concatenate(values), np.concatenate(tokens), starts), shape=shape)
