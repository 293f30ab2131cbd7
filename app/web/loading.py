"""What is still being loaded into the worker's memory, for pages whose own answer cannot say so (a stream of text)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from app import catalog
from app.protocol import Loading
from app.web.access import VIEWER
from app.web.pages import Config, Db, Gpu, read, render

router = APIRouter()


@dataclass(frozen=True)
class LoadingPart:
    loading: tuple[Loading, ...]


@router.post("/{model}/loading", dependencies=[VIEWER])
async def loading(
    request: Request,
    model: str,
    session: Db,
    settings: Config,
    worker: Gpu,
    source: Annotated[list[str], Query(max_length=64)] = [],  # noqa: B006 - FastAPI copies it
) -> Response:
    """Begin to load a model and SAEs; answer with what to show meanwhile, or with 204 once all is there.

    static/loading.js asks again until then.
    """
    card = (await read(session, catalog.model_entry, session, model)).card
    saes = [await read(session, catalog.source_card, session, card.id, name) for name in dict.fromkeys(source)]
    waiting = await worker.loading(
        catalog.model_ref(settings, card.id), [catalog.sae_ref(settings, sae) for sae in saes]
    )
    return render(request, "loading.html", LoadingPart(tuple(waiting))) if waiting else Response(status_code=204)
