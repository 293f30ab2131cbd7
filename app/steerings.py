"""Saved steering runs and presets: what was asked and what came of it, so that an address shows it again.

The caller commits.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from app import visibility
from app.errors import BadInput, NotFound
from app.tables import Source, SteeringPreset, SteeringRun, SteeringVector
from app.visibility import Visibility


def save(session: Session, model_id: str, request: Mapping[str, Any], result: Mapping[str, Any]) -> SteeringRun:
    """Store a finished run under a new id that cannot be guessed, for whom the session works."""
    owner, seen_by = visibility.maker(session)
    run = SteeringRun(
        id=secrets.token_urlsafe(12),
        model_id=model_id,
        request=dict(request),
        result=dict(result),
        owner=owner,
        visibility=Visibility.PRIVATE if _of_private(session, model_id, request) else seen_by,
    )
    session.add(run)
    session.flush()
    return run


def hide_with(session: Session, source: Source) -> None:
    """Make private the runs that an SAE steered which was made private."""
    with visibility.unlimited(session):
        seen = select(SteeringRun.id, SteeringRun.request).where(
            SteeringRun.model_id == source.model_id, SteeringRun.visibility != Visibility.PRIVATE
        )
        ids = [
            run
            for run, request in session.execute(seen)
            if any((f.get("layer") or f.get("source")) == source.name for f in request.get("features") or ())
        ]
        hidden = update(SteeringRun).where(SteeringRun.id.in_(ids))
        session.execute(hidden.values(visibility=Visibility.PRIVATE, link=""))


def _of_private(session: Session, model_id: str, request: Mapping[str, Any]) -> bool:
    """Tell whether an SAE or vector that steered is seen by its owner alone."""
    features = request.get("features") or []
    names = {str(f.get("layer") or f.get("source")) for f in features}
    saes = select(Source.id).where(Source.model_id == model_id, Source.name.in_(names))
    if session.scalar(saes.where(Source.visibility == Visibility.PRIVATE).limit(1)) is not None:
        return True
    of_vectors = {int(f["index"]) for f in features if str(f.get("layer") or f.get("source")).endswith("-vectors")}
    vectors = select(SteeringVector.id).where(SteeringVector.id.in_(of_vectors))
    return session.scalar(vectors.where(SteeringVector.visibility == Visibility.PRIVATE).limit(1)) is not None


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


MAX_PRESETS = 500


def save_preset(session: Session, model_id: str, name: str, settings: Mapping[str, Any]) -> SteeringPreset:
    """Store a preset under a name; the same name again replaces it, and keeps its address."""
    name = name.strip()[:200]
    if not name:
        raise BadInput("A preset needs a name.")
    wanted = select(SteeringPreset).where(SteeringPreset.model_id == model_id, SteeringPreset.name == name)
    preset = session.scalars(wanted).first()
    if preset is None:
        n = session.scalar(select(func.count()).where(SteeringPreset.model_id == model_id)) or 0
        if n >= MAX_PRESETS:
            raise BadInput(f"{model_id} has {n} presets already. Delete some.")
        preset = SteeringPreset(id=secrets.token_urlsafe(8), model_id=model_id, name=name, settings={})
        session.add(preset)
    preset.settings = dict(settings)
    session.flush()
    return preset


def presets(session: Session, model_id: str) -> list[SteeringPreset]:
    wanted = select(SteeringPreset).where(SteeringPreset.model_id == model_id).order_by(SteeringPreset.name)
    return list(session.scalars(wanted))


def preset(session: Session, model_id: str, preset_id: str) -> SteeringPreset:
    """Return a preset. Raises NotFound."""
    found = session.get(SteeringPreset, preset_id) if preset_id.isascii() and len(preset_id) <= 32 else None
    if found is None or found.model_id != model_id:
        raise NotFound(f"There is no preset {preset_id[:40]!r} of {model_id[:60]}.")
    return found
