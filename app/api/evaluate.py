"""Evaluations for programs: POST /api/eval queues one; its job's result, and the SAE, hold what came of it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body

from app import evaluations
from app.api.queue import JobView, now_of
from app.specs import EvalSpec
from app.web.access import EDITOR
from app.web.pages import Config, Db

router = APIRouter(prefix="/eval", tags=["training"])

_EXAMPLE: dict[str, Any] = {
    "model": "smollm2-135m-instruct",
    "source": "12-demo",
    "corpus": "demo",
    "n_tokens": 50_000,
}


@router.post("", dependencies=[EDITOR], status_code=201)
def evaluate(asked: Annotated[EvalSpec, Body(examples=[_EXAMPLE])], session: Db, settings: Config) -> JobView:
    """Queue the evaluation of an SAE on a corpus; the answer is its job, whose `result` will hold the metrics."""
    job = evaluations.queue(session, settings, asked)
    session.commit()
    return now_of(session, settings, job.id)
