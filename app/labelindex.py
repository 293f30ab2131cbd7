"""All explanations in memory, to be searched by their words, with typos, and by their meaning. No HTTP, no torch.

Words come from an inverted index over the distinct words; a word that is in none is replaced by similar ones, found by
their trigrams. Meaning is the cosine with every text's vector (app.meaning), where the job `embed` has made it. One
Index is immutable; LabelIndex renews it in a thread when the catalog's explanations or vectors have changed.
"""

from __future__ import annotations

import bisect
import re
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from app import log, meaning
from app.tables import Embedding, Explanation

WAIT_SECONDS = 1.0
"""How long a search waits for a changed index before it uses the one from before."""
COUNT_SECONDS = 5.0
"""How often rows are counted to notice changes; a new explanation is noticed at once."""
MIN_COSINE = 0.3
"""Texts further than this from the query in meaning, and without its words, are no hits."""
MAX_BY_MEANING = 200
MAX_WORDS = 12
COARSE_DIMENSIONS = 96
"""Of many vectors only these are compared at first, the directions in which they differ most."""
MAX_EXACT = 20_000
"""Up to so many vectors are compared whole at once; of more, only the CANDIDATES that the first look finds nearest."""
CANDIDATES = 4_000
_WORD = re.compile(r"[^\W_]+")
_MAX_ALIKE = 500

Scores = npt.NDArray[np.float32]
_logger = log.get(__name__)


@dataclass(frozen=True)
class Found:
    """The explanation of each feature that fits best, best first, as parallel arrays."""

    ids: npt.NDArray[np.int64]
    words: Scores
    """1 for the query itself, less for what merely holds its words or similar ones, 0 for none of them."""
    cosines: Scores
    """With the query's meaning; 0 where there is no vector."""


class Index:
    """Explanations as they were at one moment."""

    def __init__(
        self,
        ids: npt.NDArray[np.int64],
        sources: npt.NDArray[np.int32],
        features: npt.NDArray[np.int32],
        texts: Sequence[str],
        vectors: dict[str, bytes],
    ) -> None:
        """ids, sources, features and texts are of explanations; vectors are float16 by meaning.text_hash."""
        self._ids, self._sources = ids, sources
        self._feature = (sources.astype(np.int64) << 32) | features
        _, which, counts = np.unique(self._feature, return_inverse=True, return_counts=True)
        self._several = counts[which] > 1
        numbers: dict[str, int] = {}
        self._text = np.array([numbers.setdefault(text, len(numbers)) for text in texts], dtype=np.int32)
        self._texts = [" ".join(text.lower().split()) for text in numbers]
        self._lengths = np.array([len(text) for text in self._texts], dtype=np.float32)
        self._vectors = np.zeros((len(self._texts), meaning.D_MODEL if vectors else 0), dtype=np.float32)
        self.n_vectors = 0
        if vectors:
            for i, text in enumerate(numbers):
                vector = vectors.get(meaning.text_hash(text))
                if vector is not None:
                    self._vectors[i] = np.frombuffer(vector, "<f2")
                    self.n_vectors += 1
        self._basis, self._rotated = None, self._vectors[:, :0]
        if self.n_vectors > MAX_EXACT:
            self._basis = _principal(self._vectors, COARSE_DIMENSIONS)
            self._rotated = self._vectors @ self._basis
        self._dictionary = _Dictionary(self._texts)

    @property
    def n_texts(self) -> int:
        """Distinct texts."""
        return len(self._texts)

    def find(self, query: str, vector: meaning.Vectors | None, sources: Collection[int] | None = None) -> Found:
        """Return what fits by words or by meaning, among the explanations of some sources or of all; a feature once."""
        words = self._by_words(" ".join(query.lower().split()))
        scope = None if sources is None else np.isin(self._sources, np.fromiter(sources, dtype=np.int32))
        cosines = np.zeros(len(self._texts), dtype=np.float32)
        if vector is not None and self.n_vectors:
            cosines = self._cosines(vector, words, None if scope is None else self._text[scope])
        score = 0.6 * words + 0.4 * np.maximum(cosines, 0)
        near = cosines >= MIN_COSINE
        fits = ((words > 0) | near)[self._text]
        chosen = np.flatnonzero(fits if scope is None else fits & scope)
        text = self._text[chosen]
        by_meaning = words[text] == 0
        if by_meaning.sum() > MAX_BY_MEANING:
            # The far ones of a long list help nobody; what holds the words all stays.
            least = np.partition(cosines[text[by_meaning]], -MAX_BY_MEANING)[-MAX_BY_MEANING]
            kept = ~by_meaning | (cosines[text] >= least)
            chosen, text = chosen[kept], text[kept]
        # Of equals the shorter text, then the older explanation.
        order = np.lexsort((self._ids[chosen], self._lengths[text], -np.round(score[text], 4)))
        chosen = self._first_of_features(chosen[order])
        text = self._text[chosen]
        return Found(self._ids[chosen], words[text], cosines[text])

    def _first_of_features(self, chosen: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Return the explanations without those whose feature stands further ahead already."""
        several = np.flatnonzero(self._several[chosen])
        _, first = np.unique(self._feature[chosen[several]], return_index=True)
        kept = np.ones(len(chosen), dtype=bool)
        kept[several] = False
        kept[several[first]] = True
        return chosen[kept]

    def _cosines(self, vector: meaning.Vectors, words: Scores, scope: npt.NDArray[np.int32] | None) -> Scores:
        """Return cosines of the texts in scope; of many, exact for the nearest and those with the words, else 0."""
        cosines = np.zeros(len(self._texts), dtype=np.float32)
        looked_at = np.ones(len(self._texts), dtype=bool)
        if scope is not None:
            looked_at[:] = False
            looked_at[scope] = True
        worded = np.flatnonzero(looked_at & (words > 0))
        if self._basis is not None and np.count_nonzero(looked_at) > MAX_EXACT and len(worded) < MAX_EXACT:
            coarse = self._rotated @ (vector @ self._basis)
            coarse[~looked_at] = -np.inf
            nearest = np.argpartition(coarse, -CANDIDATES)[-CANDIDATES:]
            exact = np.union1d(nearest, worded)
        else:
            exact = np.flatnonzero(looked_at)
        if len(exact) == len(cosines):
            return self._vectors @ vector
        cosines[exact] = self._vectors[exact] @ vector
        return cosines

    def _by_words(self, query: str) -> Scores:
        """Return for every text how well it holds all words of the query; 0 where one is missing."""
        asked = list(dict.fromkeys(_WORD.findall(query)))[:MAX_WORDS]
        if not asked:
            return np.zeros(len(self._texts), dtype=np.float32)
        total = np.ones(len(self._texts), dtype=bool)
        sums = np.zeros(len(self._texts), dtype=np.float32)
        for word in asked:
            best = np.zeros(len(self._texts), dtype=np.float32)
            for number, closeness in sorted(self._dictionary.alike(word), key=lambda pair: pair[1]):
                best[self._dictionary.texts_with(number)] = closeness
            total &= best > 0
            sums += best
        scores = np.where(total, 0.8 * sums / len(asked), 0).astype(np.float32)
        for i in np.flatnonzero(scores > 0.7)[:5000].tolist():
            text = self._texts[i]
            if text == query:
                scores[i] = 1.0
            elif text.startswith(query):
                scores[i] = max(scores[i], 0.95)
            elif query in text:
                scores[i] = max(scores[i], 0.9)
        return scores


def _principal(vectors: meaning.Vectors, n: int) -> meaning.Vectors:
    """Return the n orthonormal directions that hold most of the vectors' squared length, [d, n]."""
    some = vectors[:: max(1, len(vectors) // MAX_EXACT)]
    return np.ascontiguousarray(np.linalg.eigh(some.T @ some)[1][:, ::-1][:, :n])


class _Dictionary:
    """The distinct words of texts, which texts hold each, and which words look alike."""

    def __init__(self, texts: Sequence[str]) -> None:
        held: dict[str, list[int]] = {}
        for i, text in enumerate(texts):
            for word in set(_WORD.findall(text)):
                held.setdefault(word, []).append(i)
        self._words = sorted(held)
        self._texts = [np.array(held[word], dtype=np.int32) for word in self._words]
        self._joined = "\n" + "\n".join(self._words) + "\n"
        ends = np.cumsum([len(word) + 1 for word in self._words])
        self._starts: list[int] = [1, *(ends + 1).tolist()][: len(self._words)]
        grams: dict[str, list[int]] = {}
        self._n_grams = np.zeros(len(self._words), dtype=np.float32)
        for number, word in enumerate(self._words):
            own = _trigrams(word)
            self._n_grams[number] = len(own)
            for gram in own:
                grams.setdefault(gram, []).append(number)
        self._grams = {gram: np.array(numbers, dtype=np.int32) for gram, numbers in grams.items()}

    def texts_with(self, number: int) -> npt.NDArray[np.int32]:
        return self._texts[number]

    def alike(self, word: str) -> list[tuple[int, float]]:
        """Return (number, closeness) of words that are it, begin with it, hold it; else of those spelt similarly."""
        found: list[tuple[int, float]] = []
        at = self._joined.find(word)
        while at >= 0 and len(found) < _MAX_ALIKE:
            number = bisect.bisect_right(self._starts, at) - 1
            begins = self._starts[number] == at
            if begins and len(self._words[number]) == len(word):
                found.append((number, 1.0))
            elif begins and len(word) > 1:
                found.append((number, 0.95))
            elif len(word) > 2:
                found.append((number, 0.9))
            at = self._joined.find(word, self._starts[number] + len(self._words[number]))
        return found or self._misspelt(word)

    def _misspelt(self, word: str) -> list[tuple[int, float]]:
        allowed = 0 if len(word) < 4 else 1 if len(word) < 7 else 2
        own = _trigrams(word)
        postings = [self._grams[gram] for gram in own if gram in self._grams]
        if not allowed or not postings:
            return []
        shared = np.bincount(np.concatenate(postings), minlength=len(self._words))
        dice = 2 * shared / (self._n_grams + len(own))
        candidates = np.flatnonzero(dice >= 0.2)
        candidates = candidates[np.argsort(-dice[candidates])[:_MAX_ALIKE]]
        near = [(number, distance(word, self._words[number], allowed)) for number in candidates.tolist()]
        return [(number, 0.8 - 0.1 * d) for number, d in near if d <= allowed]


def _trigrams(word: str) -> set[str]:
    """Of the word between blanks, so that its beginning counts more than its middle."""
    padded = f"  {word} "
    return {padded[i : i + 3] for i in range(len(padded) - 2)}


def distance(a: str, b: str, most: int) -> int:
    """Return how many letters must be changed, added, left out or swapped with the next; most + 1 when more."""
    if abs(len(a) - len(b)) > most:
        return most + 1
    before, row = list[int](), list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before = before, row
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                row[-1] = min(row[-1], older[j - 2] + 1)
        if min(row) > most:
            return most + 1
    return row[-1]


def load(session: Session) -> Index:
    """Read every explanation and vector of the catalog."""
    columns = Explanation.id, Explanation.source_id, Explanation.index, Explanation.text
    rows = session.execute(select(*columns).order_by(Explanation.id))
    ids, sources, features, texts = list[int](), list[int](), list[int](), list[str]()
    for row in rows.yield_per(10_000):
        ids.append(row[0])
        sources.append(row[1])
        features.append(row[2])
        texts.append(row[3])
    made = select(Embedding.text_hash, Embedding.vector).where(Embedding.model == meaning.MODEL)
    vectors = {row[0]: row[1] for row in session.execute(made).yield_per(10_000)}
    places = np.array(sources, dtype=np.int32), np.array(features, dtype=np.int32)
    return Index(np.array(ids, dtype=np.int64), *places, texts, vectors)


class LabelIndex:
    """The present Index of a catalog. One in a process; safe from any thread."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._index: Index | None = None
        self._state: tuple[int, ...] = ()
        self._counted: tuple[int, int] = (0, 0)
        self._counted_at = -COUNT_SECONDS

    def current(self, session: Session, seconds: float = WAIT_SECONDS) -> Index | None:
        """Return an index no older than its last renewal; None while the first one is being read."""
        state = self._look(session)
        with self._lock:
            if state != self._state and (self._thread is None or not self._thread.is_alive()):
                self._thread = threading.Thread(target=self._renew, args=(state,), name="labels", daemon=True)
                self._thread.start()
            thread = self._thread
        if thread is not None:
            thread.join(seconds)
        return self._index

    def _look(self, session: Session) -> tuple[int, ...]:
        newest = session.execute(select(func.max(Explanation.id))).scalar() or 0
        if time.monotonic() - self._counted_at >= COUNT_SECONDS:
            explanations = session.execute(select(func.count()).select_from(Explanation)).scalar_one()
            vectors = session.execute(select(func.count()).select_from(Embedding)).scalar_one()
            self._counted, self._counted_at = (explanations, vectors), time.monotonic()
        return (newest, *self._counted)

    def _renew(self, state: tuple[int, ...]) -> None:
        try:
            with self._sessions() as session:
                self._index = load(session)
            self._state = state
        except Exception:
            # The next search tries again; until then text search by SQL answers.
            _logger.exception("labels could not be read for the search")
