"""The steering lab beyond generating: /api/steer/next, score, sweep and presets. Our own extensions of the API."""

from __future__ import annotations

import time
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app import catalog, jobs, steering, steerings, sweeps
from app.api.inputs import ModelId
from app.api.steer import Streamed, Texts
from app.errors import BadInput, Unavailable
from app.gpu import Worker
from app.protocol import End, GenerateRequest, NextRequest, SaeQuery, Scored, ScoreRequest, Start, Token
from app.steering import STEERED, Chat, Completion
from app.sweeps import Axis, Point
from app.tokens import Vocabulary
from app.web.access import EDITOR, VIEWER
from app.web.pages import Config, Db, Gpu, read

router = APIRouter(prefix="/steer", tags=["steering"])

_RUN = {"stream", "rows", "modelHash", "dtype", "device"}
"""What is saved with a run beside the request itself."""


class Next(Streamed):
    n_top: Annotated[int, Field(ge=1, le=50)] = 10


class Score(BaseModel):
    id: str = Field(max_length=40)


class Sweep(Streamed):
    axes: list[Axis] = Field(min_length=1, max_length=2)
    job: bool = False
    """Make it a job however short it is."""


class Preset(BaseModel):
    modelId: ModelId
    name: str = Field(max_length=200)
    settings: dict[str, Any]


class PresetKey(BaseModel):
    modelId: ModelId
    id: str = Field(max_length=40)


@router.post("/next", dependencies=[VIEWER])
async def next_tokens(body: Next, session: Db, settings: Config, worker: Gpu) -> Response:
    """Say how steering moves the next token, without generating: one forward pass."""
    began = time.perf_counter()
    meant = body.meant()

    def found() -> tuple[GenerateRequest, Vocabulary]:
        targets = steering.targets(session, settings, meant)
        asked = steering.request(session, settings, meant, targets)
        return asked, catalog.vocabulary_of(settings, meant.modelId)

    asked, words = await read(session, found)
    await worker.ready(asked.model, [d.sae for row in asked.rows for d in row.directions if d.sae is not None])
    reply = await worker.next_tokens(
        NextRequest(model=asked.model, prompt=asked.prompt, rows=asked.rows, n_top=body.n_top)
    )
    tokens = [
        {"token": words.string(i), "id": i, **{row.name: reply.logprobs[n][t] for n, row in enumerate(asked.rows)}}
        for t, i in enumerate(reply.ids)
    ]
    return _json({"tokens": tokens, "ms": round(1000 * (time.perf_counter() - began), 1)})


@router.post("/score", dependencies=[VIEWER])
async def score(body: Score, session: Db, settings: Config, worker: Gpu) -> Response:
    """Read a saved run's texts once more: each token's log-probability with and without steering, the likeliest
    alternatives in both, and the features' activations in the model left alone. Kept with the run."""

    def found() -> tuple[steerings.SteeringRun, GenerateRequest]:
        run = steerings.get(session, body.id)
        meant = _again(run.request)
        targets = steering.targets(session, settings, meant)
        return run, steering.request(session, settings, meant, targets)

    run, asked = await read(session, found)
    if "scores" in run.result:
        return _json(run.result["scores"])
    words = await run_in_threadpool(catalog.vocabulary_of, settings, run.model_id)
    steered = next(row for row in asked.rows if row.name == STEERED).directions
    queries = [SaeQuery(sae=d.sae, latents=[d.latent]) for d in steered if d.sae is not None]
    rows = [row for row in run.result.get("rows", []) if row["tokens"]]
    answer: dict[str, Any] = {"features": [d.sae is not None for d in steered], "rows": []}
    if rows:
        texts = [
            Scored(
                ids=[*run.result["promptIds"][row["name"]], *(t["id"] for t in row["tokens"])],
                start=len(run.result["promptIds"][row["name"]]),
            )
            for row in rows
        ]
        await worker.ready(asked.model, [query.sae for query in queries])
        reply = await worker.score(
            ScoreRequest(model=asked.model, texts=texts, conditions=[[], steered], queries=queries, n_top=5)
        )
        for row, text in zip(rows, reply.texts, strict=True):
            answer["rows"].append(
                {
                    "name": row["name"],
                    "sample": row["sample"],
                    "default": text.logprobs[0],
                    "steered": text.logprobs[1],
                    "topDefault": _named(words, text.tops[0]),
                    "topSteered": _named(words, text.tops[1]),
                    "activations": [query[0] for query in text.acts],
                }
            )

    def keep() -> None:
        run.result = {**run.result, "scores": answer}
        session.commit()

    await run_in_threadpool(keep)
    return _json(answer)


@router.post("/sweep", dependencies=[EDITOR])
async def sweep(request: Request, body: Sweep, session: Db, settings: Config, worker: Gpu) -> Response:
    """Generate at several strengths: a handful at once, more as a job whose address is answered."""
    meant = body.meant()

    def planned() -> tuple[list[tuple[float, ...]], list[steering.Target]]:
        targets = steering.targets(session, settings, meant)
        return sweeps.points(body.axes, len(targets)), targets

    wanted, targets = await read(session, planned)
    if body.job or len(wanted) > sweeps.HANDFUL:
        return _json(await run_in_threadpool(_submit, session, settings, body, meant, wanted, targets))
    asked = await read(session, sweeps.request, session, settings, meant, targets, body.axes, wanted)
    words = await run_in_threadpool(catalog.vocabulary_of, settings, meant.modelId)
    found = await _points(request, worker, asked, body.axes, wanted, words)
    return _json(sweeps.table(found))


@router.post("/presets", dependencies=[EDITOR])
def save_preset(body: Preset, session: Db) -> Response:
    """Store a preset; the same name again replaces it."""
    catalog.model_entry(session, body.modelId)
    if len(orjson.dumps(body.settings)) > 100_000:
        raise BadInput("The preset is over 100 kB. Leave something out.")
    preset = steerings.save_preset(session, body.modelId, body.name, body.settings)
    answer = {"id": preset.id, "name": preset.name, "url": f"/{body.modelId}/steer?preset={preset.id}"}
    session.commit()
    return _json(answer)


@router.post("/presets/delete", dependencies=[EDITOR])
def delete_preset(body: PresetKey, session: Db) -> Response:
    session.delete(steerings.preset(session, body.modelId, body.id))
    session.commit()
    return _json({"message": "Preset deleted."})


def _again(record: dict[str, Any]) -> Completion | Chat:
    """The request of a saved run; runs of before 0006 lack what is new, which has defaults."""
    return Streamed.model_validate(record).meant()


def _submit(
    session: Db, settings: Config, body: Sweep, meant: Completion | Chat, wanted: list[Any], targets: list[Any]
) -> dict[str, Any]:
    sweeps.request(session, settings, meant, targets, body.axes, wanted)  # raises what the job would raise
    names = ", ".join(f"{targets[axis.feature].asked.source}/{targets[axis.feature].asked.index}" for axis in body.axes)
    spec = body.model_dump(mode="json", exclude={"job"})
    job = jobs.submit(session, settings, "sweep", f"Sweep of {names} over {len(wanted)} strengths", spec)
    answer = {"jobId": job.id, "url": f"/jobs/{job.id}", "sweepUrl": f"/{meant.modelId}/steer/sweep/{job.id}"}
    session.commit()
    return answer


async def _points(
    request: Request,
    worker: Worker,
    asked: GenerateRequest,
    axes: list[Axis],
    wanted: list[tuple[float, ...]],
    words: Vocabulary,
) -> list[Point]:
    """Generate and score the texts of a sweep in the gpu worker."""
    await worker.ready(asked.model, [d.sae for row in asked.rows for d in row.directions if d.sae is not None])
    texts = Texts(words, logprobs=False)
    async for event in worker.generate(asked):
        if isinstance(event, Start):
            texts.start(asked, event)
        elif isinstance(event, Token):
            texts.of(event.row, event.sample).add(event, words)
        elif isinstance(event, End):
            texts.end(event)
        if await request.is_disconnected():
            raise Unavailable("The client went away.")
    rows = [row for row in texts.rows() if row["tokens"]]
    scored = [
        Scored(
            ids=[*texts.prompt_ids[row["name"]], *(t["id"] for t in row["tokens"])],
            start=len(texts.prompt_ids[row["name"]]),
        )
        for row in rows
    ]
    queries = sweeps.queries(asked, axes)
    reply = await worker.score(ScoreRequest(model=asked.model, texts=scored, conditions=[[]], queries=queries))
    by_name = {row["name"]: text for row, text in zip(rows, reply.texts, strict=True)}
    found: list[Point] = []
    for row, strengths in zip(texts.rows(), [(), *wanted], strict=True):
        text = by_name.get(row["name"])
        acts = text.acts[0][0] if text is not None and text.acts else None
        ids = [t["id"] for t in row["tokens"]]
        found.append(sweeps.point(strengths, row["text"], ids, text.logprobs[0] if text is not None else [], acts))
    return found


def _named(words: Vocabulary, tops: list[list[tuple[int, float]]]) -> list[list[list[Any]]]:
    return [[[words.string(i), round(logprob, 4)] for i, logprob in top] for top in tops]


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
