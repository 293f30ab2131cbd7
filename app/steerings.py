"""Saved steering runs: what was asked and what came of it, so that an address shows it again. The caller commits."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy.orm import Session

from app.errors import NotFound
from app.tables import SteeringRun


def save(session: Session, model_id: str, request: Mapping[str, Any], result: Mapping[str, Any]) -> SteeringRun:
    """Store a finished run under a new id that cannot be guessed."""
    run = SteeringRun(id=secrets.token_urlsafe(12), model_id=model_id, request=dict(request), result=dict(result))
    session.add(run)
    session.flush()
    return run


def get(session: Session, run_id: str) -> SteeringRun:
    """Return a saved run. Raises NotFound."""
    run = (
        session.get(SteeringRun, run_id) if 0 < len(run_id) <= 32 and run_id.isascii() and "\0" not in run_id else None
    )
    if run is None:
        raise NotFound(f"No steering run is saved as {run_id[:40]!r}.")
    return run


def path(run: SteeringRun) -> str:
    return f"/{run.model_id}/steer/{run.id}"
