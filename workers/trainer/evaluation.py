"""The job that measures an SAE of the catalog on a corpus (workers.trainer.evaluate) and keeps the result with it.

Of the corpus that an SAE was trained on, only the end that was held out is read; of others, contexts from all over.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from app import corpora, evaluations, harvests
from app.errors import BadInput
from app.specs import EvalSpec
from app.tables import now
from workers.activations import Rows
from workers.corpora import tokenised
from workers.trainer import loaded
from workers.trainer.evaluate import evaluate
from workers.trainer.kinds import JobContext, JobKind

STEPS_BETWEEN_POINTS = 5


class Evaluate(JobKind):
    name = "eval"

    def title(self, spec: dict[str, Any]) -> str:
        asked = EvalSpec(**spec)
        return f"Evaluate {asked.model}/{asked.source} on {asked.n_tokens:,} tokens of {asked.corpus or 'its corpus'}"

    def plan(self, context: JobContext) -> list[str]:
        return ["measure"]

    def run(self, context: JobContext, step: str) -> None:
        spec = EvalSpec(**context.spec)
        model = loaded.model(context, spec.model)
        with context.sessions() as session:
            source = harvests.source_named(session, spec.model, spec.source)
            corpus = corpora.corpus_named(session, spec.corpus)
        coder = loaded.coder(context, source.sae_hash)
        for hook, size in ((coder.hook_name, coder.d_in), (coder.hook_name_out, coder.d_out)):
            if model.hook_size(hook) != size:
                raise BadInput(f"The SAE works on {size} numbers a token; {hook} has {model.hook_size(hook)}.")
        stream = tokenised(model, context.settings.corpus_dir(corpus.hash), context.report)
        size = min(spec.context_size, model.card.n_ctx)
        own_hash, held_out = evaluations.trained_on(source.origin)
        chosen = choose(
            stream.n_contexts(size, model.bos_for(coder.config)),
            -(-spec.n_tokens // (size - 1)),
            held_out if own_hash == corpus.hash else 0.0,
        )
        if not len(chosen.rows):
            raise BadInput(f"The text is {len(stream.tokens):,} tokens; one context takes {size}.")
        n_loss = max(1, -(-min(spec.n_loss_tokens, spec.n_tokens) // (size - 1)))
        measured = evaluate(
            model,
            coder,
            stream,
            chosen.rows,
            size,
            n_loss,
            spec.max_norm_ratio,
            context.report,
            _points(context),
            context.directory / f"evaluation-{source.sae_hash}.safetensors",
        )
        measured["density"] = measured["l0"] / coder.d_sae
        entry = {
            "corpus": corpus.name,
            "corpus_hash": corpus.hash,
            "context_size": size,
            "n_tokens_asked": spec.n_tokens,
            "held_out": chosen.held_out,
            "trained_on": own_hash == corpus.hash and not chosen.held_out,
            "job": context.job_id,
            "metrics": measured,
        }
        _write(context.directory / "evaluation.json", entry)

    def finish(self, context: JobContext) -> dict[str, Any]:
        spec = EvalSpec(**context.spec)
        entry = json.loads((context.directory / "evaluation.json").read_text())
        with context.sessions.begin() as session:
            source = harvests.source_named(session, spec.model, spec.source)
            evaluations.save(session, source.id, entry | {"at": now().isoformat()})
        told = {"url": f"/{spec.model}/{spec.source}", "corpus": entry["corpus"], "held_out": entry["held_out"]}
        return told | entry["metrics"]


@dataclass(frozen=True)
class Chosen:
    rows: Rows
    held_out: bool


def choose(n_contexts: int, wanted: int, held_out: float) -> Chosen:
    """Return contexts of the held-out end where there is one, else evenly from all of the text."""
    if held_out > 0:
        # One context later than trainings begin it: another size of contexts cuts the text elsewhere.
        first = min(int(n_contexts * (1 - held_out)) + 1, n_contexts - 1)
        if first > 0:
            return Chosen(np.arange(first, n_contexts)[:wanted], held_out=True)
    if wanted >= n_contexts:
        return Chosen(np.arange(n_contexts), held_out=False)
    return Chosen(np.linspace(0, n_contexts - 1, wanted).astype(np.int64), held_out=False)


def _points(context: JobContext) -> Any:
    """Write the metrics as they settle, a point every few batches, so that the job's page draws them."""
    seen = [0]

    def watch(n_tokens: int, metrics: dict[str, float]) -> None:
        seen[0] += 1
        if seen[0] % STEPS_BETWEEN_POINTS == 1 and "explained_variance" in metrics:
            context.metric(n_tokens, metrics)

    return watch


def _write(path: Path, value: dict[str, Any]) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(value))
    os.replace(scratch, path)
