"""Evaluations of an SAE on text of one's choice: asking for one, and those that were made. The trainer makes them.

They stand in Source.metrics under "evaluations", newest first, each with the corpus and tokens it was taken on; so they
go where the SAE's other metrics go: into bundles, with the SAE when it is removed. The same text again replaces its
earlier result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import catalog, corpora, jobs
from app.catalog import NoWeights, SourceCard
from app.errors import NotFound
from app.settings import Settings
from app.specs import EvalSpec
from app.tables import Corpus, Job, JobState, Source

KIND = "eval"
KEPT = 20
_SAME = ("corpus_hash", "n_tokens_asked", "context_size", "held_out")
METRICS = (
    "explained_variance",
    "l0",
    "ce_loss_score",
    "kl_div_score",
    "cosine_similarity",
    "mse",
    "dead",
    "density",
)
"""Shown of each, in this order."""


@dataclass(frozen=True)
class Evaluation:
    """What an SAE scored, and on what."""

    corpus: str
    n_tokens: int
    """In the reconstruction metrics."""
    n_loss_tokens: int
    """In ce_loss_score and kl_div_score."""
    context_size: int
    held_out: bool
    """Taken on the part of its training's corpus that was not trained on."""
    trained_on: bool
    """Taken on text that it may have been trained on."""
    job: int
    at: str
    metrics: Mapping[str, float]

    @property
    def where(self) -> str:
        if self.held_out:
            return "held out when it was trained"
        return "trained on" if self.trained_on else ""


def queue(session: Session, settings: Settings, spec: EvalSpec) -> Job:
    """Ask for an evaluation. Raises NotFound and NoWeights for what cannot be evaluated; the caller commits."""
    source = catalog.source_card(session, spec.model, spec.source)
    if not source.has_weights or not catalog.has_model_weights(settings, spec.model):
        raise NoWeights(f"No weights here: browsing only. {source.path[1:]} cannot be evaluated without them.")
    corpus = corpus_for(session, source, spec.corpus)
    asked = spec.model_copy(update={"corpus": corpus.name})
    title = f"Evaluate {spec.model}/{spec.source} on {spec.n_tokens:,} tokens of {corpus.name}"
    return jobs.submit(session, settings, KIND, title, asked.model_dump(mode="json"))


def corpus_for(session: Session, source: SourceCard, name: str) -> Corpus:
    """Return the corpus named; without a name the one that the SAE was trained on, or else the largest."""
    if name:
        return corpora.corpus_named(session, name)
    own = select(Corpus).where(Corpus.hash == trained_on(source.origin)[0])
    largest = select(Corpus).order_by(Corpus.n_chars.desc(), Corpus.id).limit(1)
    found = session.scalar(own.limit(1)) or session.scalar(largest)
    if found is None:
        raise NotFound("There is no corpus to evaluate on. Add one with `sae-atlas corpus add`, or at /corpora.")
    return found


def trained_on(origin: Mapping[str, Any]) -> tuple[str, float]:
    """Return the hash of the corpus that a training here read, and the last share of it that was held out."""
    corpus, spec = origin.get("corpus"), origin.get("spec")
    if origin.get("kind") != "trained" or not isinstance(corpus, dict) or not isinstance(spec, dict):
        return "", 0.0
    share = cast(dict[str, Any], spec).get("held_out")
    return str(cast(dict[str, Any], corpus).get("hash", "")), float(share) if isinstance(share, int | float) else 0.0


def pending(session: Session, model_id: str, source: str) -> Job | None:
    """Return the evaluation of an SAE that waits or runs."""
    moving = select(Job).where(Job.kind == KIND, Job.state.in_([JobState.QUEUED, JobState.RUNNING]))
    for job in session.scalars(moving.order_by(Job.id.desc())):
        if (job.spec.get("model"), job.spec.get("source")) == (model_id, source):
            return job
    return None


def save(session: Session, source_id: int, entry: Mapping[str, Any]) -> None:
    """Keep an evaluation with its SAE, before the others. The caller commits.

    An SAE that was never measured gets its metrics from it too.
    """
    # A write that changes nothing, so that of two jobs that end at once the later one sees the earlier's.
    session.execute(update(Source).where(Source.id == source_id).values(d_sae=Source.d_sae))
    source = session.scalars(
        select(Source).where(Source.id == source_id).execution_options(populate_existing=True)
    ).one()
    same = {name: entry.get(name) for name in _SAME}
    earlier = [e for e in _entries(source.metrics) if {name: e.get(name) for name in _SAME} != same]
    metrics = dict(source.metrics)
    if "explained_variance" not in metrics:
        metrics |= cast(Mapping[str, Any], entry["metrics"])
    source.metrics = {**metrics, "evaluations": [dict(entry), *earlier][:KEPT]}


def found(metrics: Mapping[str, Any]) -> tuple[Evaluation, ...]:
    """Read the evaluations in a source's metrics, newest first; what is not one is left out."""
    return tuple(evaluation for entry in _entries(metrics) if (evaluation := _read(entry)) is not None)


def _entries(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = metrics.get("evaluations")
    given = cast(list[Any], listed) if isinstance(listed, list) else []
    return [cast(dict[str, Any], entry) for entry in given if isinstance(entry, dict)]


def _read(entry: Mapping[str, Any]) -> Evaluation | None:
    measured = entry.get("metrics")
    if not isinstance(measured, dict):
        return None
    values = cast(dict[str, Any], measured)
    return Evaluation(
        corpus=str(entry.get("corpus", "")),
        n_tokens=_whole(values.get("n_tokens")),
        n_loss_tokens=_whole(values.get("n_loss_tokens")),
        context_size=_whole(entry.get("context_size")),
        held_out=entry.get("held_out") is True,
        trained_on=entry.get("trained_on") is True,
        job=_whole(entry.get("job")),
        at=str(entry.get("at", ""))[:10],
        metrics={name: float(values[name]) for name in METRICS if isinstance(values.get(name), int | float)},
    )


def _whole(value: Any) -> int:
    return int(value) if isinstance(value, int | float) else 0
