"""Nearest features of one source in another of the same model, by cosine of decoder rows, as stored in the catalog.

Takes a Session, the caller commits. Torch-free: the job kind `match` computes (workers.trainer.match).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from app.tables import Source, SourceMatch


@dataclass(frozen=True)
class Match:
    """The features of another source nearest to each feature of a source."""

    indices: npt.NDArray[np.uint32]
    """[d_sae, n] nearest first"""
    cosines: npt.NDArray[np.float16]
    """[d_sae, n]"""


def match_of(session: Session, source_id: int, other_id: int) -> Match | None:
    """Return what is stored; None when nothing is, or one of the SAEs has other weights by now."""
    row = session.get(SourceMatch, (source_id, other_id))
    if row is None or row.hashes != _hashes(session, source_id, other_id):
        return None
    return Match(
        np.frombuffer(row.indices, "<u4").reshape(-1, row.n), np.frombuffer(row.cosines, "<f2").reshape(-1, row.n)
    )


def matched_with(session: Session, source_id: int) -> list[int]:
    """Return the ids of the sources that a source was matched with."""
    return list(session.scalars(select(SourceMatch.other_id).where(SourceMatch.source_id == source_id)))


def record(
    session: Session,
    source_id: int,
    other_id: int,
    indices: npt.NDArray[np.integer],
    cosines: npt.NDArray[np.floating],
) -> None:
    """Store the match in one direction, in place of an earlier one."""
    session.merge(
        SourceMatch(
            source_id=source_id,
            other_id=other_id,
            hashes=_hashes(session, source_id, other_id),
            n=indices.shape[1],
            indices=indices.astype("<u4").tobytes(),
            cosines=cosines.astype("<f2").tobytes(),
        )
    )


def forget(session: Session, source_id: int) -> None:
    """Delete every match of a source, in both directions."""
    here = or_(SourceMatch.source_id == source_id, SourceMatch.other_id == source_id)
    session.execute(delete(SourceMatch).where(here))


def _hashes(session: Session, source_id: int, other_id: int) -> str:
    return ":".join(session.get_one(Source, i).sae_hash for i in (source_id, other_id))
