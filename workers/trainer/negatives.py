"""Contexts in which a feature stays silent: drawn at random, and near its positives. numpy only.

Silent means without an activation in the whole context. Hard negatives hold a token the feature peaks on, or are where
a latent with a similar decoder row peaks. They are sought in the first SEARCHED contexts, so that memory and time do
not grow with the corpus; what is found depends on text, SAE and seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from app.corpora import Stream
from app.evidence import Example, Silent

SEARCHED = 16_384
_TRIES = 20
"""Times more random contexts looked at than wanted, before a feature counts as hardly ever silent."""
_PLACES = 200
"""Occurrences of a token looked at."""


@dataclass(frozen=True)
class TokenPlaces:
    """Where each token of the searched contexts occurs."""

    ids: npt.NDArray[np.int64]
    """Sorted."""
    places: npt.NDArray[np.int64]
    """context * context_size + position of each."""

    @classmethod
    def of(cls, stream: Stream, n_contexts: int, context_size: int, bos: int | None) -> TokenPlaces:
        ids = stream.contexts(np.arange(min(n_contexts, SEARCHED)), context_size, bos)
        places = np.arange(ids.size).reshape(ids.shape)[:, 1:].ravel()  # first positions are never read
        flat = ids[:, 1:].ravel()
        order = np.argsort(flat, kind="stable")
        return cls(flat[order], places[order])

    def of_token(self, token: int) -> npt.NDArray[np.int64]:
        first, last = np.searchsorted(self.ids, [token, token + 1])
        return self.places[first:last]


def random_silent(
    active: npt.NDArray[np.int64], n_contexts: int, context_size: int, n: int, seed: Sequence[int]
) -> tuple[Silent, ...]:
    """Draw up to n distinct contexts out of those not in `active` (ascending contexts with an activation)."""
    if n == 0 or len(active) >= n_contexts:
        return ()
    drawn = np.random.default_rng([*seed, 0]).integers(n_contexts, size=n * _TRIES)
    _, first = np.unique(drawn, return_index=True)
    drawn = drawn[np.sort(first)]
    free = drawn[~np.isin(drawn, active)][:n]
    return tuple(Silent(int(context), context_size // 2) for context in free)


def hard_negatives(
    top: Sequence[Example],
    active: npt.NDArray[np.int64],
    neighbours: Sequence[int],
    places: TokenPlaces,
    peaks_of: Callable[[int], Iterator[tuple[int, int]]],
    token_at: Callable[[int, int], int],
    context_size: int,
    n: int,
    seed: Sequence[int],
) -> tuple[Silent, ...]:
    """Find up to n: first by the tokens of the highest peaks, more than half of them, then where neighbours peak.

    peaks_of gives (context, position) of a latent's highest peaks; token_at the token id at a place.
    """
    if not top or n == 0:
        return ()
    found: dict[int, Silent] = {}
    rng = np.random.default_rng([*seed, 1])
    tokens = list(dict.fromkeys(token_at(example.context, example.peak) for example in top[:10]))
    each = [_without(places.of_token(token), active, context_size, rng) for token in tokens]
    _take_in_turn(each, found, context_size, n - n // 3 if neighbours else n)
    for neighbour in neighbours:
        for context, position in peaks_of(neighbour):
            if len(found) < n and context not in found and not _holds(active, context):
                found[context] = Silent(context, position, neighbour)
                break
    _take_in_turn(each, found, context_size, n)
    return tuple(found.values())


def _take_in_turn(each: list[npt.NDArray[np.int64]], found: dict[int, Silent], context_size: int, limit: int) -> None:
    for turn in range(max((len(part) for part in each), default=0)):
        for part in each:
            if len(found) < limit and turn < len(part):
                context, position = divmod(int(part[turn]), context_size)
                found.setdefault(context, Silent(context, position))


def _without(
    places: npt.NDArray[np.int64], active: npt.NDArray[np.int64], context_size: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Some places, in random order, whose contexts are not active."""
    places = rng.permutation(places) if len(places) <= _PLACES else rng.choice(places, _PLACES, replace=False)
    return places[~np.isin(places // context_size, active)]


def _holds(ascending: npt.NDArray[np.int64], value: int) -> bool:
    at = int(np.searchsorted(ascending, value))
    return at < len(ascending) and int(ascending[at]) == value
