"""POST /api/test, by which clients check a key, and an answer for API addresses that do not exist.

Included after all other API routes and before the pages, whose addresses would match too.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, Field

from app import people
from app.errors import NotFound, Unauthorized
from app.web.access import ANYONE
from app.web.pages import Config, Db

router = APIRouter()


class KeyToTest(BaseModel):
    apiKey: str = Field(max_length=200)


@router.post("/test", tags=["health"], dependencies=[ANYONE])
def key_is_good(session: Db, settings: Config, asked: Annotated[KeyToTest | None, Body()] = None) -> dict[str, str]:
    """Say that a key is good, or answer 401. A server for one person on loopback has no keys, and takes any."""
    if settings.team and (asked is None or people.of_token(session, asked.apiKey) is None):
        raise Unauthorized("This API key is unknown, expired or revoked. Make one under /account.")
    return {"message": "ok"}


@router.api_route(
    "/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False, dependencies=[ANYONE]
)
def unknown(request: Request, rest: str) -> None:
    raise NotFound(f"No API endpoint {request.method} /api/{rest[:200]}; see /docs.")
