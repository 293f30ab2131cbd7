"""Prompts kept under an address, and where an activation lies among a feature's own. The caller commits."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping

import numpy as np
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.catalog import SourceCard
from app.errors import NotFound
from app.evidence import FeatureEvidence, unpack
from app.tables import Evidence, PromptRun


def save(session: Session, model_id: str, request: Mapping[str, list[str]], hashes: Mapping[str, str]) -> PromptRun:
    """Keep a prompt under a new id that cannot be guessed."""
    run = PromptRun(id=secrets.token_urlsafe(12), model_id=model_id, request=dict(request), hashes=dict(hashes))
    session.add(run)
    session.flush()
    return run


def get(session: Session, model_id: str, run_id: str) -> PromptRun:
    """Return a kept prompt. Raises NotFound."""
    usable = 0 < len(run_id) <= 32 and run_id.isascii() and "\0" not in run_id
    run = session.get(PromptRun, run_id) if usable else None
    if run is None or run.model_id != model_id:
        raise NotFound(f"No prompt of {model_id[:60]} is kept as {run_id[:40]!r}.")
    return run


def path(run: PromptRun) -> str:
    return f"/{run.model_id}/prompt/{run.id}"


def evidence_of(session: Session, source: SourceCard, indices: Collection[int]) -> dict[int, FeatureEvidence]:
    """Return the evidence of some features of a source; nothing where there is none."""
    if source.harvest_id is None:
        return {}
    wanted = select(Evidence.index, Evidence.blob).where(
        Evidence.harvest_id == source.harvest_id, Evidence.index.in_(sorted(set(indices)))
    )
    return {index: unpack(blob) for index, blob in session.execute(wanted)}


def quantile(evidence: FeatureEvidence, value: float) -> float | None:
    """Return the share of a feature's non-zero activations in the corpus that lie below a value, linear within a bin.

    None where the evidence has no histogram.
    """
    counts = evidence.histogram.astype(np.float64)
    if counts.size == 0 or not counts.any() or not evidence.max_act > 0:
        return None
    below = np.concatenate([[0.0], np.cumsum(counts)]) / counts.sum()
    return float(np.interp(value, np.linspace(0.0, evidence.max_act, counts.size + 1), below))
