"""Whether the process is up (/healthz), whether it can serve (/readyz), and how it is doing (/metrics)."""

from __future__ import annotations

from fastapi import APIRouter, Request
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from app import db, jobs, operations, present
from app.errors import AtlasError, Forbidden
from app.protocol import WorkerStatus
from app.settings import Settings
from app.web import measures
from app.web.access import ANYONE
from app.web.pages import Config, Gpu

router = APIRouter(tags=["health"])


@router.get("/healthz", dependencies=[ANYONE])
async def healthz() -> dict[str, str]:
    """Say that the process answers."""
    return {"status": "ok"}


@router.get("/readyz", dependencies=[ANYONE])
async def readyz(request: Request, worker: Gpu, settings: Config) -> JSONResponse:
    """Say part by part what is ready; 503 unless database, schema and gpu worker are.

    Pages are served without a trainer, so a missing one is said and not counted; so is a disk that fills up.
    """
    needed = await run_in_threadpool(_database, request)
    needed["worker"] = await _worker(worker)
    others = await run_in_threadpool(_others, request, settings)
    ready = all(part == "ok" for part in needed.values())
    return JSONResponse(
        {"ready": ready, "parts": needed | others}, 200 if ready else 503, None if ready else {"retry-after": "2"}
    )


@router.get("/metrics", include_in_schema=False, dependencies=[ANYONE])
async def metrics(request: Request, worker: Gpu, settings: Config) -> Response:
    """This process's requests and the installation's state, for Prometheus."""
    client = request.client.host if request.client else ""
    if not measures.allowed(request.headers, client, settings.metrics_token):
        raise Forbidden("Metrics are for programs on this machine, or for whoever sends SAE_ATLAS_METRICS_TOKEN.")
    status = await _status(worker)
    text = await run_in_threadpool(_metrics, request, settings, status)
    return Response(text, media_type=measures.CONTENT_TYPE)


def _metrics(request: Request, settings: Settings, status: WorkerStatus | None) -> bytes:
    with request.app.state.sessions() as session:
        queue, trainers = operations.queue(session), operations.trainers(session, settings)
    parts = request.app.state.sizes.parts()
    now = measures.state(queue, trainers, parts, operations.free_bytes(settings), status)
    return measures.text(request.app.state.measures, now)


def _database(request: Request) -> dict[str, str]:
    try:
        db.check_schema(request.app.state.engine)
    except AtlasError as error:
        return {"database": "ok", "schema": error.message}
    except SQLAlchemyError as error:
        reason = f"does not answer: {type(error).__name__}"
        return {"database": reason, "schema": "not known"}
    return {"database": "ok", "schema": "ok"}


def _others(request: Request, settings: Settings) -> dict[str, str]:
    free = operations.free_bytes(settings)
    disk = "ok" if free >= operations.LEAST_FREE_BYTES else f"{present.size(free)} free"
    try:
        with request.app.state.sessions() as session:
            alive = jobs.trainers(session, settings)
    except SQLAlchemyError:
        return {"trainer": "not known", "disk": disk}
    return {"trainer": "ok" if alive else "none runs: jobs wait", "disk": disk}


async def _status(worker: Gpu) -> WorkerStatus | None:
    try:
        return await worker.status()
    except AtlasError:
        return None


async def _worker(worker: Gpu) -> str:
    try:
        await worker.status()
    except AtlasError as error:
        return error.message
    return "ok"
