"""Job kind `sweep`: one steered feature over many strengths, or a grid of two, generated and scored in batches.

The same batches as in the gpu worker, so a job's text is the one that the steering page makes with the same seed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from sqlalchemy.orm import Session

from app import catalog, steering, sweeps
from app.errors import BadInput
from app.protocol import GenerateRequest, Scored
from app.steering import Chat, Completion
from app.sweeps import HANDFUL, Axis, Point
from app.tokens import Vocabulary
from workers.gpu import scoring
from workers.gpu.encoding import Text
from workers.gpu.generation import Batch, Interventions, NotFinite, Prefill, Row, Run
from workers.gpu.interventions import intervention
from workers.language_model import LanguageModel
from workers.sae.coders import Coder
from workers.trainer import loaded
from workers.trainer.kinds import JobContext, JobKind


class Sweep(JobKind):
    name = "sweep"

    def title(self, spec: dict[str, Any]) -> str:
        return f"Sweep over {len(_points(spec))} strengths"

    def plan(self, context: JobContext) -> list[str]:
        n = len(_points(context.spec))
        return [f"texts {at}" for at in range(0, n, HANDFUL)]

    def run(self, context: JobContext, step: str) -> None:
        at = int(step.split()[1])
        wanted = _points(context.spec)[at : at + HANDFUL]
        found = _made(context, wanted)
        scratch = context.directory / f"points-{at}.json.new"
        scratch.write_text(json.dumps([point.model_dump() for point in found]))
        os.replace(scratch, context.directory / f"points-{at}.json")
        context.report(1.0, f"{at + len(wanted)} of {len(_points(context.spec))} texts")

    def finish(self, context: JobContext) -> dict[str, Any]:
        result = context.directory / loaded.RESULT
        if result.is_file():
            return json.loads(result.read_text())
        found: list[Point] = []
        for at in range(0, len(_points(context.spec)), HANDFUL):
            part = [Point.model_validate(p) for p in json.loads((context.directory / f"points-{at}.json").read_text())]
            found += part if at == 0 else part[1:]  # every part begins with the model left alone
        answer = {"url": f"/{context.spec['modelId']}/steer/sweep/{context.job_id}", **sweeps.table(found)}
        loaded.leave_only_result(context, answer)
        return answer


def _points(spec: dict[str, Any]) -> list[tuple[float, ...]]:
    return sweeps.points(_axes(spec), len(spec["features"]))


def _axes(spec: dict[str, Any]) -> list[Axis]:
    return [Axis.model_validate(axis) for axis in spec["axes"]]


def _asked(spec: dict[str, Any]) -> Completion | Chat:
    return (Chat if spec.get("prompt") is None else Completion).model_validate(spec)


def _made(context: JobContext, wanted: list[tuple[float, ...]]) -> list[Point]:
    axes = _axes(context.spec)
    language = loaded.model(context, context.spec["modelId"])
    with context.sessions() as session:
        asked, saes, words = _request(context, session, axes, wanted)
    made: dict[str, Interventions] = {}
    interventions = [
        tuple(made.setdefault(d.model_dump_json(), (intervention(d, saes, language),))[0] for d in row.directions)
        for row in asked.rows
    ]
    run = Run(language, asked, [_prompt(language, asked, n) for n in range(len(asked.rows))], interventions, words)
    rows = _generated(context, run)
    return list(_scored(language, asked, axes, rows, [(), *wanted], saes, words))


def _request(
    context: JobContext, session: Session, axes: list[Axis], wanted: list[tuple[float, ...]]
) -> tuple[GenerateRequest, dict[str, Coder], Vocabulary]:
    spec = _asked(context.spec)
    targets = steering.targets(session, context.settings, spec)
    asked = sweeps.request(session, context.settings, spec, targets, axes, wanted)
    saes = {
        catalog.sae_ref(context.settings, t.source).path: loaded.coder(context, t.source.sae_hash)
        for t in targets
        if t.source is not None
    }
    return asked, saes, catalog.vocabulary_of(context.settings, spec.modelId)


def _prompt(language: LanguageModel, asked: GenerateRequest, n: int) -> list[int]:
    row = asked.rows[n]
    if row.messages:
        return language.chat_ids([(message.role, message.content) for message in row.messages])
    ids = language.to_ids(asked.prompt, asked.prepend_bos)
    if len(ids) + asked.max_new_tokens > language.card.n_ctx:
        raise BadInput(f"{len(ids)} tokens and {asked.max_new_tokens} new ones; the model reads {language.card.n_ctx}.")
    return ids


def _generated(context: JobContext, run: Run) -> dict[str, Row]:
    """Grow all rows to their ends; by name, as rows that are alike are one."""
    prefill, batch = Prefill(run), Batch(run.language)
    while not prefill.done:
        prefill.step()
    outcome = batch.join(prefill)
    n = 0
    while len(batch) and not isinstance(outcome, NotFinite):
        [(_, outcome)] = batch.step()
        n += 1
        context.report(0.9 * n / run.asked.max_new_tokens)
    if isinstance(outcome, NotFinite):
        raise BadInput(str(outcome))
    return {name: row for row in run.rows for name in row.names}


def _scored(
    language: LanguageModel,
    asked: GenerateRequest,
    axes: list[Axis],
    rows: dict[str, Row],
    strengths: list[tuple[float, ...]],
    saes: dict[str, Coder],
    words: Vocabulary,
) -> Iterator[Point]:
    queries = [(saes[query.sae.path], query) for query in sweeps.queries(asked, axes)]
    for asked_row, own in zip(asked.rows, strengths, strict=True):
        row = rows[asked_row.name]
        new = row.ids[row.n_prompt :]
        text = words.text(new)
        for stop in asked.stop:
            text = text.split(stop)[0]
        if not new:
            yield sweeps.point(own, text, [], [], None)
            continue
        pieces = scoring.score(language, [Scored(ids=row.ids, start=row.n_prompt)], [()], [Text(row.ids, queries)], 0)
        [found] = _result(pieces)
        yield sweeps.point(own, text, new, found.logprobs[0], found.acts[0][0] if found.acts else None)


def _result(pieces: Any) -> Any:
    """Do all pieces of some work."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return end.value
