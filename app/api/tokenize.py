"""POST /api/tokenize: a text as a model's tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from app import catalog
from app.api.inputs import ModelId, check_text
from app.protocol import TokenizeRequest
from app.web.access import VIEWER
from app.web.pages import Config, Db, Gpu, read

router = APIRouter(tags=["tokens"])


class Tokenize(BaseModel):
    modelId: ModelId
    prompt: str
    prependBos: bool = True


@router.post("/tokenize", dependencies=[VIEWER])
async def tokenize(body: Tokenize, session: Db, settings: Config, worker: Gpu) -> dict[str, Any]:
    """Return the token ids and their strings, which joined are the text (after the beginning-of-text token)."""
    check_text(settings, body.prompt)
    await read(session, catalog.model_entry, session, body.modelId)
    model = catalog.model_ref(settings, body.modelId)
    reply = await worker.tokenize(TokenizeRequest(model=model, texts=[body.prompt], prepend_bos=body.prependBos))
    [ids] = reply.ids
    strings = catalog.vocabulary_of(settings, body.modelId).strings(ids)
    return {"tokens": ids, "token_strings": strings, "prepend_bos": body.prependBos}
