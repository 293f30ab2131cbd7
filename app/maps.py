"""2-D maps of SAEs: where each feature lies among those with similar decoder directions, and named clusters.

Takes a Session, the caller commits. Torch-free: the trainer draws maps (workers.trainer.map), this stores and reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from app.tables import FeatureMap, Source

NO_CLUSTER = 65535


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
        )
    )
