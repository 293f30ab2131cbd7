"""Custom steering vectors: the overview, and a vector's page with its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from app import catalog, steering_vectors, visibility
from app.tables import SteeringVector
from app.web.access import EDITOR, GUEST, VIEWER, Who, actor_of
from app.web.pages import Db, render
from app.web.sharing import Sharing, sharing_of

router = APIRouter()


@dataclass(frozen=True)
class Vector:
    """A vector as pages show it."""

    id: int
    label: str
    model_id: str
    hook_name: str
    n: int
    norm: float
    strength: float
    about: str
    owner: str
    visibility: str
    made: str
    steer: str

    @property
    def path(self) -> str:
        return f"/vectors/{self.id}"


@dataclass(frozen=True)
class VectorsPage:
    vectors: tuple[Vector, ...]


@dataclass(frozen=True)
class VectorPage:
    vector: Vector
    sharing: Sharing | None
    may_change: bool


@router.get("/vectors", dependencies=[VIEWER])
def vectors_page(request: Request, session: Db) -> Response:
    return render(request, "vectors.html", VectorsPage(tuple(_shown(v) for v in steering_vectors.owned(session))))


@router.get("/vectors/{number}", dependencies=[GUEST])
def vector_page(request: Request, number: str, session: Db) -> Response:
    found = _find(session, number)
    may_change = visibility.may_change(actor_of(request), found.owner)
    page = VectorPage(_shown(found), sharing_of(request, "vector", found), may_change)
    return render(request, "vector.html", page)


@router.get("/vectors/{number}/vector.json", dependencies=[GUEST])
def numbers(number: str, session: Db) -> Response:
    """The vector for notebooks, as the steering page takes it."""
    found = _find(session, number)
    body = {
        "modelId": found.model_id,
        "hookName": found.hook_name,
        "label": found.label,
        "strength": found.default_strength,
        "values": steering_vectors.numbers(found).tolist(),
    }
    return JSONResponse(body, headers={"content-disposition": f'attachment; filename="vector-{found.id}.json"'})


@router.post("/vectors/{number}/delete", dependencies=[EDITOR])
def delete(number: str, who: Who, session: Db) -> Response:
    found = _find(session, number)
    steering_vectors.delete(session, who, found.model_id, steering_vectors.source_of(found), str(found.id))
    session.commit()
    return RedirectResponse("/vectors", 303)


def _find(session: Db, number: str) -> SteeringVector:
    found = visibility.find(session, "vector", str(catalog.parse_index(number)))
    assert isinstance(found, SteeringVector)
    return found


def _shown(found: SteeringVector) -> Vector:
    values = steering_vectors.numbers(found)
    return Vector(
        id=found.id,
        label=found.label,
        model_id=found.model_id,
        hook_name=found.hook_name,
        n=len(values),
        norm=float(np.linalg.norm(values)),
        strength=found.default_strength,
        about=found.about,
        owner=found.owner,
        visibility=found.visibility,
        made=f"{found.created_at:%Y-%m-%d}",
        steer=steering_vectors.path(found),
    )
