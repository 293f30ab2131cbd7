"""2-D maps of SAEs: where each feature lies among those with similar decoder directions, and named clusters.

Takes a Session, the caller commits. Torch-free: the trainer draws maps (workers.trainer.map), this stores and reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from app.errors import BadInput
from app.tables import FeatureMap, Source, now

NO_CLUSTER = 65535
FULL = 65535
"""Places are numbered 0..FULL in both directions where they are sent, and where a line is drawn around some."""
MAX_CORNERS = 400
_LINE = re.compile(r"[0-9]{1,12}(-[0-9]{1,5})*", re.ASCII)


@dataclass(frozen=True)
class Cluster:
    """A group of neighbouring features, named by what their labels share."""

    name: str
    x: float
    """Where its name is written: the median of its features."""
    y: float
    n: int
    """Features in it."""


@dataclass(frozen=True)
class Map:
    coordinates: npt.NDArray[np.float32]
    """[d_sae, 2], centred and scaled so that all lie within -1..1."""
    cluster: npt.NDArray[np.uint16]
    """[d_sae] number of the feature's cluster; NO_CLUSTER for none."""
    clusters: tuple[Cluster, ...]
    about: Mapping[str, Any]
    """How it was made: method, seed, parameters."""
    drawn_at: int
    """Seconds since 1970; tells one drawing from the next."""

    @cached_property
    def places(self) -> npt.NDArray[np.uint16]:
        """The coordinates on the grid, [d_sae, 2]."""
        return np.rint((np.clip(self.coordinates, -1, 1) + 1) / 2 * FULL).astype("<u2")


@dataclass(frozen=True)
class Line:
    """A closed line around some of a map's features."""

    drawn_at: int
    """Of the map it was drawn on."""
    corners: npt.NDArray[np.int64]
    """[n, 2] on the grid"""

    @property
    def text(self) -> str:
        """Its corners as addresses hold them, without the map's time."""
        return "-".join(map(str, self.corners.ravel().tolist()))


def parse_line(text: str) -> Line:
    """Read `{drawn_at}-{x}-{y}-{x}-{y}...`. Raises BadInput for what is no such line."""
    numbers = [int(part) for part in text.split("-")] if _LINE.fullmatch(text) else []
    n, rest = divmod(len(numbers) - 1, 2)
    if rest or not 3 <= n <= MAX_CORNERS or max(numbers[1:]) > FULL:
        raise BadInput(
            f"{text[:40]!r} is no line around features of a map: it has the map's time and 3 to {MAX_CORNERS} corners, "
            f"each two numbers from 0 to {FULL}."
        )
    return Line(numbers[0], np.array(numbers[1:], dtype=np.int64).reshape(-1, 2))


def inside(drawn: Map, line: Line) -> list[int]:
    """Return the features inside a line: those from which a ray crosses it an odd number of times.

    static/map.js compares the same whole numbers in the same way, so that both count alike.
    """
    order = np.argsort(drawn.places[:, 1], kind="stable")
    x, y = drawn.places[order].astype(np.float64).T
    odd = np.zeros(len(order), dtype=bool)
    for (xi, yi), (xj, yj) in zip(line.corners.tolist(), np.roll(line.corners, 1, axis=0).tolist(), strict=True):
        first, last = np.searchsorted(y, (min(yi, yj), max(yi, yj)))
        if first < last:
            odd[first:last] ^= x[first:last] < (xj - xi) * (y[first:last] - yi) / (yj - yi) + xi
    return np.sort(order[odd]).tolist()


def map_of(session: Session, source_id: int) -> Map | None:
    """Return the map of a source; None when there is none or the SAE's weights are others by now."""
    row = session.get(FeatureMap, source_id)
    if row is None or row.sae_hash != session.get_one(Source, source_id).sae_hash:
        return None
    return Map(
        np.frombuffer(row.coordinates, "<f4").reshape(-1, 2),
        np.frombuffer(row.cluster, "<u2"),
        tuple(Cluster(**cluster) for cluster in row.clusters),
        row.about,
        int(row.created_at.timestamp()),
    )


def version(session: Session, source_id: int) -> str:
    """Return a name for the state of a map and of the evidence its points are coloured by."""
    row = session.get(FeatureMap, source_id)
    source = session.get_one(Source, source_id)
    return f"{source.sae_hash[:12]}-{source.harvest_id or 0}-{int(row.created_at.timestamp()) if row else 0}"


def members(session: Session, source_id: int, cluster: int) -> list[int]:
    """Return the features of a cluster; none where there is no map or no such cluster."""
    drawn = map_of(session, source_id)
    return [] if drawn is None else np.flatnonzero(drawn.cluster == cluster).tolist()


def around(session: Session, source_id: int, line: str) -> list[int]:
    """Return the features inside a line; none where there is no map. Raises BadInput for what is no line."""
    corners = parse_line(line)
    drawn = map_of(session, source_id)
    return [] if drawn is None else inside(drawn, corners)


def record(
    session: Session,
    source: Source,
    coordinates: npt.NDArray[np.floating],
    cluster: npt.NDArray[np.integer],
    clusters: Sequence[Cluster],
    about: Mapping[str, Any],
) -> None:
    """Store a source's map in place of an earlier one."""
    session.merge(
        FeatureMap(
            source_id=source.id,
            sae_hash=source.sae_hash,
            coordinates=coordinates.astype("<f4").tobytes(),
            cluster=cluster.astype("<u2").tobytes(),
            clusters=[dict(vars(c)) for c in clusters],
            about=dict(about),
            created_at=now(),  # a new drawing of the same SAE has another version
        )
    )
