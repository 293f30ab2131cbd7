"""A harvest before it starts: whether it can be, and what it will take. Takes a Session; the caller commits."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import catalog, corpora, jobs
from app.catalog import SourceCard
from app.errors import AtlasError, BadInput
from app.protocol import ModelCard
from app.settings import Settings
from app.specs import HarvestSpec
from app.tables import Corpus, Job, JobState

FLOPS = 3.0e11
"""Multiply-adds counted as two that two CPU cores do a second in `make bench`: assumed until a harvest has run here."""
LATENT_SECONDS = 0.0075
"""To choose and pack the examples of one feature, on the same machine."""
_BYTES_PER_ACTIVATION = 8
_BYTES_PER_FEATURE = 1_500
_WORKING_BYTES = 900 * 2**20
"""Torch, one batch's activations and the sample for correlations."""
_CHARS_PER_TOKEN = 4
_USUAL_L0 = 64


class BadField(BadInput):
    """A harvest that cannot be, with the field of HarvestSpec that says so."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class Shape:
    """What of an SAE the cost of its harvest depends on; it need not be there yet."""

    layer: int
    d_in: int
    d_sae: int
    l0: float
    """Latents active on a token."""


@dataclass(frozen=True)
class Estimate:
    """What a harvest will take. Bytes and seconds."""

    n_tokens: int
    """Tokens read: what was asked for, or all there are."""
    available: int
    """Tokens that the corpus has."""
    counted: bool
    """They were counted; else guessed from the characters, the corpus not being tokenised yet."""
    seconds: float
    reading_seconds: float
    effects_seconds: float
    measured: int
    """Earlier harvests here that the seconds are scaled by; 0 assumes two CPU cores."""
    memory_bytes: int
    working_disk_bytes: int
    kept_disk_bytes: int
    free_disk_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / max(self.reading_seconds, 1e-9)

    @property
    def too_large(self) -> bool:
        return self.working_disk_bytes + self.kept_disk_bytes > self.free_disk_bytes


def queue(session: Session, settings: Settings, spec: HarvestSpec) -> Job:
    """Queue a harvest. Raises BadField for one that cannot be."""
    check(session, settings, spec)
    title = f"Harvest {', '.join(f'{spec.model}/{source}' for source in spec.sources)} from {spec.corpus}"
    return jobs.submit(session, settings, "harvest", title, spec.model_dump(mode="json"))


def check(session: Session, settings: Settings, spec: HarvestSpec) -> tuple[ModelCard, list[SourceCard], Corpus]:
    """Return what a harvest reads. Raises BadField naming the field, with both numbers."""
    card = catalog.model_entry(session, spec.model).card
    _field("model", lambda: catalog.model_ref(settings, spec.model))
    sources = [
        _field("sources", lambda name=name: _usable(session, settings, spec.model, name)) for name in spec.sources
    ]
    if len({source.prepend_bos for source in sources}) > 1 and card.bos_token_id is not None:
        raise BadField("sources", "These SAEs do not all read texts with the model's first token; harvest them apart.")
    corpus = _field("corpus", lambda: corpora.corpus_named(session, spec.corpus))
    if not corpora.can_be_read(settings, corpus, card.tokenizer_hash):
        raise BadField(
            "corpus", f"{corpus.name} came as tokens of another tokenizer; {card.id} cannot read it. Add its text."
        )
    if spec.context_size > card.n_ctx:
        raise BadField(
            "context_size", f"The context size is {spec.context_size:,} tokens; {card.id} reads {card.n_ctx:,}."
        )
    return card, sources, corpus


def usual_context_size(sources: Sequence[SourceCard], most: int) -> int:
    """The context size that the SAEs' configs name, where they agree; 128 where none does.

    Raises BadField when they differ.
    """
    sizes = {size for s in sources if isinstance(size := s.config.get("metadata", {}).get("context_size"), int)}
    if len(sizes) > 1:
        raise BadField(
            "context_size",
            f"The SAEs were trained on contexts of {' and '.join(map(str, sorted(sizes)))} tokens; choose one with "
            "--context-size.",
        )
    return min(max(next(iter(sizes), 128), 8), 4096, most)


def estimate(session: Session, settings: Settings, spec: HarvestSpec) -> Estimate:
    """Return what a harvest takes. Raises BadField for one that cannot be."""
    card, sources, corpus = check(session, settings, spec)
    known = {t.tokenizer_hash: t.n_tokens for t in corpora.tokens_of(settings, corpus)}.get(card.tokenizer_hash)
    available = corpus.n_chars // _CHARS_PER_TOKEN if known is None else known
    return foreseen(session, settings, spec, card, [_shape(source) for source in sources], available, known is not None)


def foreseen(
    session: Session,
    settings: Settings,
    spec: HarvestSpec,
    card: ModelCard,
    shapes: Sequence[Shape],
    available: int,
    counted: bool,
) -> Estimate:
    """Return what a harvest of SAEs of these shapes takes, of a corpus of so many tokens; as Estimate names them."""
    n_tokens = min(spec.n_tokens, available)
    reading, rest, effects = _nominal_seconds(card, shapes, spec, n_tokens)
    scales = _scales(session)
    scale = statistics.median(scales) if scales else 1.0
    spilled = sum(int(n_tokens * shape.l0) * _BYTES_PER_ACTIVATION for shape in shapes)
    stored = sum(shape.d_sae for shape in shapes) * _BYTES_PER_FEATURE
    tokenised = 0 if counted else available * (2 if card.d_vocab <= 65536 else 4)
    weights = 4 * card.n_params + sum(8 * shape.d_in * shape.d_sae for shape in shapes)
    return Estimate(
        n_tokens=n_tokens,
        available=available,
        counted=counted,
        seconds=scale * (reading + rest + effects),
        reading_seconds=scale * reading,
        effects_seconds=scale * effects,
        measured=len(scales),
        memory_bytes=weights + _WORKING_BYTES,
        working_disk_bytes=0 if spec.keep_activations else spilled,
        kept_disk_bytes=stored + tokenised + (spilled if spec.keep_activations else 0),
        free_disk_bytes=shutil.disk_usage(settings.data_dir).free,
    )


def _field(name: str, act: Any) -> Any:
    try:
        return act()
    except AtlasError as error:
        raise BadField(name, error.message) from error


def _usable(session: Session, settings: Settings, model_id: str, name: str) -> SourceCard:
    source = catalog.source_card(session, model_id, name)
    catalog.sae_ref(settings, source)
    return source


def _shape(source: SourceCard) -> Shape:
    return Shape(source.layer, source.d_in, source.d_sae, _l0(source))


def usual_l0(d_sae: int) -> float:
    """What an SAE has whose l0 nobody knows yet."""
    return min(_USUAL_L0, d_sae)


def _l0(source: SourceCard) -> float:
    for found in (source.metrics.get("l0"), source.config.get("k")):
        if isinstance(found, int | float) and 0 < found <= source.d_sae:
            return float(found)
    return usual_l0(source.d_sae)


def _nominal_seconds(
    card: ModelCard, sources: Sequence[Shape], spec: HarvestSpec, n_tokens: int
) -> tuple[float, float, float]:
    """Seconds of reading, assembling and effects on the assumed machine."""
    blocks = max(card.n_params - card.d_vocab * card.d_model, 0) / max(card.n_layers, 1)
    per_layer = 2 * blocks + 4 * spec.context_size * card.n_heads * card.d_head
    deepest = min(1 + max(source.layer for source in sources), card.n_layers)
    encode = sum(2 * source.d_in * source.d_sae for source in sources)
    reading = n_tokens * (per_layer * deepest + encode)
    n_latents = sum(source.d_sae for source in sources)
    rows = sum(2 * s.d_sae * (s.d_sae * s.d_in + card.d_model * card.d_vocab) for s in sources)
    # Each effect is two branches of tokens behind its context, with the feature and without.
    branches = 2 * (1 + min(spec.effect_reach, spec.context_size - 1))
    ablated = (
        branches
        * spec.n_effects
        * sum(
            s.d_sae * (per_layer * (card.n_layers - min(s.layer, card.n_layers - 1)) + 2 * card.d_model * card.d_vocab)
            for s in sources
        )
    )
    clean = n_tokens * per_layer * card.n_layers if spec.n_effects else 0
    return reading / FLOPS, rows / FLOPS + n_latents * LATENT_SECONDS, (ablated + clean) / FLOPS


def _scales(session: Session) -> list[float]:
    """How much longer than on the assumed machine the latest harvests took here."""
    query = select(Job).where(Job.kind == "harvest", Job.state == JobState.DONE).order_by(Job.id.desc()).limit(5)
    found: list[float] = []
    for job in session.scalars(query):
        try:
            spec = HarvestSpec(**job.spec)
            card = catalog.model_entry(session, spec.model).card
            sources = [_shape(catalog.source_card(session, spec.model, name)) for name in spec.sources]
        except (AtlasError, ValueError):
            continue  # of a model or an SAE that is gone, or asked for by another version
        nominal = sum(_nominal_seconds(card, sources, spec, int(job.result.get("n_tokens") or spec.n_tokens)))
        if job.started_at and job.ended_at and nominal > 0:
            found.append((job.ended_at - job.started_at).total_seconds() / nominal)
    return found
