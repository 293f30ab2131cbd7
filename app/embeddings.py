"""Vectors of explanations for the search by meaning: which are missing, storing them, asking the trainer for them.

Takes a Session; the caller commits. The job kind `embed` computes (workers.trainer.embed).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from app import jobs, meaning
from app.errors import Busy
from app.settings import Settings
from app.tables import Embedding, Explanation, Job, JobState

KIND = "embed"


def missing(session: Session) -> dict[str, str]:
    """Return the distinct texts that have no vector yet, by their hash."""
    have = set(session.scalars(select(Embedding.text_hash).where(Embedding.model == meaning.MODEL)))
    texts = session.scalars(select(Explanation.text).distinct())
    return {name: text for text in texts if (name := meaning.text_hash(text)) not in have}


def store(session: Session, names: Sequence[str], vectors: meaning.Vectors) -> None:
    """Write vectors by their text's hash; those that are there already stay."""
    query = select(Embedding.text_hash).where(Embedding.model == meaning.MODEL, Embedding.text_hash.in_(names))
    have = set(session.scalars(query))
    rows = [
        {"text_hash": name, "model": meaning.MODEL, "vector": vector.astype("<f2").tobytes()}
        for name, vector in zip(names, np.asarray(vectors), strict=True)
        if name not in have
    ]
    if rows:
        session.execute(insert(Embedding), rows)


def pending(session: Session) -> Job | None:
    """Return the job that waits or runs."""
    moving = select(Job).where(Job.kind == KIND, Job.state.in_([JobState.QUEUED, JobState.RUNNING]))
    return session.scalars(moving.order_by(Job.id.desc()).limit(1)).first()


def queue(session: Session, settings: Settings) -> Job | None:
    """Ask for vectors of new explanations, unless one that has not begun does. None where the model is missing."""
    if meaning.directory() is None:
        return None
    waiting = pending(session)
    if waiting is not None and waiting.state == JobState.QUEUED:
        return waiting
    try:
        return jobs.submit(session, settings, KIND, "Learn the meaning of new labels", {})
    except Busy:
        # What brought the labels is worth more than their vectors; the next import or harvest asks again.
        return None
