"""The job that draws a map: UMAP of decoder directions, clusters by HDBSCAN, names from the features' labels.

Deterministic for a seed. Directions are projected on their first principal components before, which bounds memory and
time: distances between them are then products of 64 numbers, and no d_sae x d_sae matrix is ever made.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import select

from app import harvests, maps
from app.maps import NO_CLUSTER, Cluster
from app.specs import MapSpec
from app.tables import Feature
from workers.sae.coders import Coder
from workers.trainer import loaded
from workers.trainer.kinds import JobContext, JobKind

N_COMPONENTS = 64
_LARGE = 20_000
"""From so many features on, UMAP moves them fewer times."""
_NAMED_BY = 2
_QUOTED = re.compile(r"`([^`]+)`")
_WORD = re.compile(r"[^\W\d_]{4,}")
_TELLING = re.compile(r"[^\W\d_]{3,}")
"""Half a word or a punctuation mark names a cluster only where it is in twice as many of its labels."""
_PLAIN = frozenset({"fires", "after", "promotes", "words", "such", "with", "that", "this", "from", "text", "tokens"})


class DrawMap(JobKind):
    name = "map"

    def title(self, spec: dict[str, Any]) -> str:
        asked = MapSpec(**spec)
        return f"Draw the map of {asked.model}/{asked.source}"

    def plan(self, context: JobContext) -> list[str]:
        return ["draw"]

    def run(self, context: JobContext, step: str) -> None:
        path = context.directory / "map.npy"
        if not path.exists():
            context.report(0.05, "reading the decoder directions")
            coder = _coder(context)
            n = f"{coder.d_sae:,} features"
            context.report(0.1, f"UMAP looks for the neighbours of {n}; at first it compiles for ten seconds")

            def moved(done: int, n_epochs: int) -> None:
                context.report(0.3 + 0.6 * done / n_epochs, f"laying out {n}, epoch {done} of {n_epochs}")

            placed = layout(coder.W_dec.float().cpu().numpy(), MapSpec(**context.spec), moved)
            scratch = context.directory / "map.new.npy"
            np.save(scratch, placed)
            scratch.replace(path)
        context.report(0.9, "finding clusters and their names")

    def finish(self, context: JobContext) -> dict[str, Any]:
        spec = MapSpec(**context.spec)
        # Small enough to be done again after a crash: nothing is tidied up before the end.
        path = context.directory / "map.npy"
        if path.exists():
            placed = np.load(path)
            cluster = clustered(placed)
            with context.sessions.begin() as session:
                source = harvests.source_named(session, spec.model, spec.source)
                rows = session.execute(select(Feature.index, Feature.label).where(Feature.source_id == source.id)).all()
                labels = [""] * len(placed)
                for index, label in rows:
                    labels[index] = label
                about = {"method": "UMAP", "clusters": "HDBSCAN", **spec.model_dump(exclude={"model", "source"})}
                maps.record(session, source, placed, cluster, named(placed, cluster, labels), about)
        result = {"url": f"/{spec.model}/{spec.source}"}
        loaded.leave_only_result(context, result)
        return result


Epochs = Callable[[int, int], None]
"""Told the epochs that are done and all there are."""


def layout(
    directions: npt.NDArray[np.float32], spec: MapSpec, moved: Epochs = lambda done, n_epochs: None
) -> npt.NDArray[np.float32]:
    """Place each decoder row on a plane, [d_sae, 2] within -1..1, rows of high cosine close together.

    What `moved` raises ends it.
    """
    unit = directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-12)
    reduced = _principal(unit, min(N_COMPONENTS, *unit.shape))
    n = len(reduced)
    if n > spec.n_neighbors + 2:
        import umap  # takes ten seconds: numba compiles

        mapper = umap.UMAP(
            n_neighbors=spec.n_neighbors,
            min_dist=spec.min_dist,
            metric="cosine",
            n_epochs=500 if n < _LARGE else 200,
            random_state=spec.seed,
            n_jobs=1,
            low_memory=True,
            tqdm_kwds=_followed(moved),
        )
        placed = np.asarray(mapper.fit_transform(reduced))
    else:
        placed = np.pad(reduced[:, :2], ((0, 0), (0, max(0, 2 - reduced.shape[1]))))
    placed = placed - (placed.max(axis=0) + placed.min(axis=0)) / 2
    return (placed / max(float(np.abs(placed).max()), 1e-12)).astype(np.float32)


def _followed(moved: Epochs) -> dict[str, Any]:
    """Have UMAP's progress bar written to a function: it has no callback."""

    class Written(io.StringIO):
        def write(self, text: str) -> int:
            if numbers := re.search(r"(\d+) of (\d+)", text):
                moved(int(numbers[1]), int(numbers[2]))
            return len(text)

    bar = {"bar_format": "{n_fmt} of {total_fmt}", "ascii": True, "ncols": 40}
    return {"file": Written(), "disable": False, "mininterval": 0.5, "miniters": 1, **bar}


def clustered(placed: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the number of each feature's cluster, largest cluster first; NO_CLUSTER for those between them."""
    from sklearn.cluster import HDBSCAN

    smallest = max(8, len(placed) // 250)
    if len(placed) < 3 * smallest:
        return np.full(len(placed), NO_CLUSTER, dtype=np.uint16)
    found = HDBSCAN(min_cluster_size=smallest, copy=True).fit_predict(placed.astype(np.float64))
    sizes = Counter(found[found >= 0].tolist())
    numbers = {old: new for new, (old, _) in enumerate(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))}
    return np.array([numbers.get(old, NO_CLUSTER) for old in found.tolist()], dtype=np.uint16)


def named(placed: npt.NDArray[np.float32], cluster: npt.NDArray[np.uint16], labels: Sequence[str]) -> list[Cluster]:
    """Name each cluster by terms of its features' labels: those in more of them, rarer elsewhere, nearer its middle."""
    terms = [terms_of(label) for label in labels]
    everywhere = Counter(term for found in terms for term in found)
    n_clusters = int(cluster[cluster != NO_CLUSTER].max()) + 1 if (cluster != NO_CLUSTER).any() else 0
    clusters: list[Cluster] = []
    for number in range(n_clusters):
        members = np.flatnonzero(cluster == number)
        middle = np.median(placed[members], axis=0)
        outwards = members[np.linalg.norm(placed[members] - middle, axis=1).argsort(kind="stable")]
        here = Counter(term for member in outwards.tolist() for term in sorted(terms[member]))
        name = ", ".join(_distinctive(here, everywhere, len(labels)))
        clusters.append(Cluster(name, float(middle[0]), float(middle[1]), len(members)))
    return clusters


def terms_of(label: str) -> set[str]:
    """The tokens a heuristic label quotes, or the words of one that somebody wrote."""
    quoted = {term.strip().lower() for term in _QUOTED.findall(label)}
    words = {word.lower() for word in _WORD.findall(label)} - _PLAIN
    return {term for term in quoted or words if term}


def _distinctive(here: Counter[str], everywhere: Counter[str], n: int) -> list[str]:
    """The terms in the most labels here, weighed by how rare they are among all; of equal ones the first counted."""

    def score(term: str) -> float:
        rare = math.log((1 + n) / everywhere[term])
        return here[term] * (rare if _TELLING.fullmatch(term) else rare / 2)

    best: list[str] = []
    for term in sorted(here, key=score, reverse=True):
        if not any(term.startswith(other) or other.startswith(term) for other in best):
            best.append(term)
    return best[:_NAMED_BY]


def _principal(rows: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.float32]:
    """Rows on their first n principal components, from the d x d covariance; signs fixed."""
    centred = rows - rows.mean(axis=0)
    _, vectors = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
    chosen = vectors[:, ::-1][:, :n]
    signs = np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(n)])
    return (centred @ (chosen * signs)).astype(np.float32)


def _coder(context: JobContext) -> Coder:
    spec = MapSpec(**context.spec)
    with context.sessions() as session:
        sae_hash = harvests.source_named(session, spec.model, spec.source).sae_hash
    return loaded.coder(context, sae_hash)
