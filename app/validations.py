"""The check of a newly added SAE on real text: asking for it, and what it found. The trainer does it.

What was found stands in Source.metrics: numbers by their names, and under "validation" a verdict with its sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import jobs
from app.settings import Settings
from app.specs import ValidateSpec
from app.tables import Job, JobState

KIND = "validate"
Verdict = Literal["fits", "doubtful", "mismatch"]


@dataclass(frozen=True)
class Validation:
    """How an SAE fits, in words."""

    verdict: Verdict
    findings: tuple[str, ...]
    corpus: str
    n_tokens: int

    @property
    def heading(self) -> str:
        return {
            "fits": "Fits its model",
            "doubtful": "Fits its model badly",
            "mismatch": "Does not fit its model",
        }[self.verdict]


def queue(session: Session, settings: Settings, model_id: str, source: str) -> Job:
    """Ask for the check of an SAE that is in the catalog."""
    spec = ValidateSpec.model_validate({"model": model_id, "source": source})
    return jobs.submit(session, settings, KIND, f"Check {model_id}/{source} on real text", spec.model_dump())


def pending(session: Session, model_id: str, source: str) -> Job | None:
    """Return the check of an SAE that waits or runs."""
    moving = select(Job).where(Job.kind == KIND, Job.state.in_([JobState.QUEUED, JobState.RUNNING]))
    for job in session.scalars(moving.order_by(Job.id.desc())):
        if (job.spec.get("model"), job.spec.get("source")) == (model_id, source):
            return job
    return None


def found(metrics: Mapping[str, Any]) -> Validation | None:
    """Read what a check left in a source's metrics; None when it was never checked."""
    raw = metrics.get("validation")
    if not isinstance(raw, dict):
        return None
    entry = cast(dict[str, Any], raw)
    verdict = entry.get("verdict")
    if verdict not in ("fits", "doubtful", "mismatch"):
        return None
    sentences = cast(list[Any], entry.get("findings") or [])
    return Validation(verdict, tuple(map(str, sentences)), str(entry.get("corpus", "")), int(entry.get("n_tokens", 0)))
