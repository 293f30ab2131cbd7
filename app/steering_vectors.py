"""Verbs on custom steering vectors: directions that belong to no SAE. The caller commits.

A vector is addressed like a feature: model, source `{layer}-vectors`, index.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import catalog, trash, visibility
from app.errors import BadInput, NotFound
from app.people import Actor
from app.tables import SteeringVector

SET = "vectors"
MAX_VECTORS = 2000
_HOOK = re.compile(r"blocks\.(\d{1,4})\.[a-z_.]{1,40}")
_SOURCE = re.compile(rf"(\d{{1,4}})-{SET}")


def add(
    session: Session, model_id: str, hook_name: str, label: str, values: Sequence[float], strength: float, about: str
) -> SteeringVector:
    """Store a vector. Raises BadInput for one that does not fit the model's residual stream, or is no direction."""
    card = catalog.model_entry(session, model_id).card
    found = _HOOK.fullmatch(hook_name)
    if not found or int(found[1]) >= card.n_layers:
        raise BadInput(f"{hook_name[:60]!r} is no hook of {model_id}; it has blocks.0 to blocks.{card.n_layers - 1}.")
    wide = card.n_heads * card.d_head if hook_name.endswith("attn.hook_z") else card.d_model
    if len(values) != wide:
        raise BadInput(f"The vector has {len(values)} numbers; {hook_name} of {model_id} has {wide}.")
    with np.errstate(over="ignore"):
        numbers = np.asarray(values, dtype="<f4")
    if not np.isfinite(numbers).all() or not np.any(numbers):
        raise BadInput("The vector must hold finite numbers, and not only zeros.")
    with visibility.unlimited(session):
        n = session.scalar(select(func.count()).where(SteeringVector.model_id == model_id)) or 0
    if n >= MAX_VECTORS:
        raise BadInput(f"{model_id} has {MAX_VECTORS} vectors already. Delete some.")
    vector = SteeringVector(
        model_id=model_id,
        layer=int(found[1]),
        hook_name=hook_name,
        label=label.strip()[:200] or "unnamed vector",
        default_strength=strength,
        values=numbers.tobytes(),
        about=about,
        owner=visibility.maker(session)[0],
    )
    session.add(vector)
    session.flush()
    return vector


def is_address(source: str) -> bool:
    return _SOURCE.fullmatch(source) is not None


def get(session: Session, model_id: str, source: str, index: str) -> SteeringVector:
    """Return a vector by its address. Raises NotFound."""
    number = catalog.parse_index(index)
    vector = session.get(SteeringVector, number) if number < 2**31 else None
    if vector is None or vector.model_id != model_id or source_of(vector) != source:
        raise NotFound(f"There is no vector {model_id[:60]}/{source[:60]}/{index[:20]}.")
    return vector


def owned(session: Session, model_id: str | None = None) -> list[SteeringVector]:
    """Return all vectors that the reader sees, newest first."""
    wanted = select(SteeringVector).order_by(SteeringVector.id.desc()).limit(MAX_VECTORS)
    return list(session.scalars(wanted if model_id is None else wanted.where(SteeringVector.model_id == model_id)))


def delete(session: Session, who: Actor, model_id: str, source: str, index: str) -> None:
    vector = get(session, model_id, source, index)
    visibility.check_may_change(who, vector.owner, f"{vector.label!r}")
    trash.put(session, who, vector)


def source_of(vector: SteeringVector) -> str:
    return f"{vector.layer}-{SET}"


def numbers(vector: SteeringVector) -> npt.NDArray[np.float32]:
    return np.frombuffer(vector.values, "<f4")


def path(vector: SteeringVector) -> str:
    """Where it can be tried."""
    return f"/{vector.model_id}/steer?feature={source_of(vector)}:{vector.id}:{vector.default_strength:g}"
