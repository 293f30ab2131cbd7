"""Whether the process is up (/healthz) and whether it can serve (/readyz)."""

from __future__ import annotations

from fastapi import APIRouter, Request
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from app import db
from app.errors import AtlasError
from app.web.access import ANYONE
from app.web.pages import Gpu

router = APIRouter(tags=["health"])


@router.get("/healthz", dependencies=[ANYONE])
async def healthz() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "ok"}


@router.get("/readyz", dependencies=[ANYONE])
async def readyz(request: Request, worker: Gpu) -> JSONResponse:
    """Say whether database, schema and gpu worker are ready, part by part; 503 unless all are."""
    parts = {
        "database": await run_in_threadpool(_database, request),
        "worker": await _worker(worker),
    }
    ready = all(part == "ok" for part in parts.values())
    return JSONResponse(
        {"ready": ready, "parts": parts}, 200 if ready else 503, None if ready else {"retry-after": "2"}
    )


def _database(request: Request) -> str:
    try:
        db.check_schema(request.app.state.engine)
    except AtlasError as error:
        return error.message
    except SQLAlchemyError as error:
        return f"does not answer: {type(error).__name__}"
    return "ok"


async def _worker(worker: Gpu) -> str:
    try:
        await worker.status()
    except AtlasError as error:
        return error.message
    return "ok"
