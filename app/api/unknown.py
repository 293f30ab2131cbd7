"""POST /api/test, by which clients check a key, and an answer for API addresses that do not exist.

Included after all other API routes and before the pages, whose addresses would match too.
"""

from __future__ import annotations

from fastapi import APIRouter, Request

from app.errors import NotFound

router = APIRouter()


@router.post("/test", tags=["health"])
def key_is_good() -> dict[str, str]:
    """Say that the key is good: a server for one person on loopback has no keys, and takes any."""
    return {"message": "ok"}


@router.api_route("/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
def unknown(request: Request, rest: str) -> None:
    raise NotFound(f"No API endpoint {request.method} /api/{rest[:200]}; see /docs.")
