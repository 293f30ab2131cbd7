"""Put SAEs and their evidence into the catalog. Takes a Session, the caller commits; every verb may run twice."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqlalchemy import delete, event, insert, select, update
from sqlalchemy.orm import Session, SessionTransaction

from app import cards, corpora, explanations, lockfile, matches, visibility, wording
from app import evidence as blobs
from app.errors import BadInput, Conflict, NotFound
from app.evidence import Effect, FeatureEvidence
from app.explanations import HEURISTIC
from app.labels import Text, row_of
from app.settings import Settings
from app.tables import (
    Corpus,
    Evidence,
    Explanation,
    Feature,
    FeatureMap,
    Harvest,
    HarvestState,
    Job,
    JobState,
    Model,
    Source,
)
from app.tokens import vocabulary
from app.weights import SaeFacts, store_sae

_CHUNK = 1_000
_SET_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class FeatureRecord:
    """One feature as harvest and bundle import hand it over."""

    index: int
    evidence: FeatureEvidence
    label: str
    """The automatic label; empty for a dead feature."""
    top_token: str
    top_logit: str
    effects: tuple[Effect, ...] | None = None
    """Causal effects of its top examples; None where they were not measured."""
    blob: bytes | None = None
    """The evidence packed already, where whoever hands it over has that."""


def catalogue_sae(
    session: Session,
    settings: Settings,
    facts: SaeFacts,
    *,
    model_id: str,
    set_name: str,
    metrics: dict[str, Any],
    origin: dict[str, Any],
) -> Source:
    """Store a checked SAE (app.weights) and catalogue it as `{layer}-{set_name}`.

    A source of that name is renewed; when its weights change, its evidence and heuristic labels go with the old ones.
    """
    if session.get(Model, model_id) is None:
        raise NotFound(f"There is no model {model_id!r}. Add it with `sae-atlas model add`.")
    _hold_weights(session, settings, facts.hash)
    name = f"{facts.layer}-{set_name}"
    with visibility.unlimited(session):  # a name is taken by what the one who adds may not see, too
        source = session.scalar(select(Source).where(Source.model_id == model_id, Source.name == name))
    if source is None:
        here = select(Source.id).where(Source.model_id == model_id, Source.layer == facts.layer)
        first = session.scalar(here) is None
        source = Source(model_id=model_id, name=name, layer=facts.layer, set_name=set_name, is_default=first)
        visibility.claim(session, source)
        session.add(source)
    elif source.sae_hash != facts.hash:
        visibility.claim(session, source)
        _forget_evidence(session, settings, source)
    store_sae(settings, facts.source, facts)
    source.sae_hash, source.architecture, source.hook_name = facts.hash, facts.architecture, facts.hook_name
    source.d_in, source.d_sae = facts.d_in, facts.d_sae
    source.config, source.metrics, source.origin = facts.config, metrics, origin
    session.flush()
    return source


def held(session: Session, model_id: str, facts: SaeFacts, set_name: str) -> bool:
    """Tell whether the source of that name is this SAE already. Raises Conflict when it holds other weights."""
    name = f"{facts.layer}-{set_name}"
    there = session.scalar(select(Source).where(Source.model_id == model_id, Source.name == name))
    if there is not None and there.sae_hash != facts.hash:
        raise Conflict(
            f"{model_id}/{name} holds another SAE already ({there.sae_hash}; this one is {facts.hash}). "
            "Choose another set name, or remove that one first."
        )
    return there is not None


def check_set_name(text: str) -> str:
    """Return a usable set name. Raises BadInput: it is part of addresses."""
    if not _SET_NAME.fullmatch(text):
        raise BadInput(f"{text[:100]!r} cannot be a set name: use a-z, 0-9, - and _, at most 64.")
    return text


def remove_source(session: Session, settings: Settings, model_id: str, name: str) -> None:
    """Delete a source with its evidence and explanations; its weights too, with the commit, unless others use them.

    Begins a transaction of its own, so that it sees every source that was added before.
    """
    sae_hash = source_named(session, model_id, name).sae_hash
    session.rollback()
    _hold_weights(session, settings, sae_hash)
    source = source_named(session, model_id, name)
    if source.sae_hash != sae_hash:
        raise Conflict(f"{model_id}/{name} was replaced a moment ago; look at it again before you remove it.")
    # What is hidden goes on needing its weights: others' SAEs, and those in the trash.
    with visibility.unlimited(session, trash=True):
        _remove(session, settings, source)


def _remove(session: Session, settings: Settings, source: Source) -> None:
    model_id, sae_hash = source.model_id, source.sae_hash
    _forget_evidence(session, settings, source)
    explanations.forget(session, source.id)
    cards.forget(session, source.id)
    layer, was_default = source.layer, source.is_default
    session.delete(source)
    session.flush()
    if was_default:
        there = select(Source).where(Source.model_id == model_id, Source.layer == layer, Source.trash_id.is_(None))
        heir = session.scalar(there.limit(1))
        if heir is not None:
            heir.is_default = True
    if session.scalar(select(Source.id).where(Source.sae_hash == sae_hash).limit(1)) is None:
        session.info[_HELD][sae_hash].unused = settings.sae_dir(sae_hash)


@dataclass(frozen=True)
class Gathered:
    """A harvest with where it belongs."""

    harvest: Harvest
    source: Source
    corpus: Corpus
    job: Job | None

    @property
    def shown(self) -> bool:
        """Whether the source's pages show it unless asked otherwise."""
        return self.source.harvest_id == self.harvest.id

    @property
    def moving(self) -> bool:
        return self.job is not None and self.job.kind == "harvest" and not JobState(self.job.state).ended


def gathered(
    session: Session, model_id: str = "", source_id: int = 0, harvest_id: int = 0, job_id: int = 0
) -> list[Gathered]:
    """Return harvests, newest first: all, or those of a model, a source or a job, or one."""
    query = (
        select(Harvest, Source, Corpus, Job)
        .join(Source, Source.id == Harvest.source_id)
        .join(Corpus, Corpus.id == Harvest.corpus_id)
        .outerjoin(Job, Job.id == Harvest.job_id)
        .order_by(Harvest.id.desc())
    )
    wanted = (
        (Source.model_id, model_id),
        (Source.id, source_id),
        (Harvest.id, harvest_id),
        (Harvest.job_id, job_id),
    )
    for column, value in wanted:
        query = query.where(column == value) if value else query
    return [Gathered(*row) for row in session.execute(query)]


def harvest_of(session: Session, harvest_id: int) -> Gathered:
    found = gathered(session, harvest_id=harvest_id) if 0 < harvest_id < 2**31 else []
    if not found:
        raise NotFound(f"There is no harvest {harvest_id}; `sae-atlas harvest list` names those there are.")
    return found[0]


def remove_harvest(session: Session, settings: Settings, harvest_id: int) -> Source:
    """Delete one harvest's evidence; its kept activations too, with the commit, unless another harvest uses them.

    What else the source has is shown instead. Raises Conflict while its job gathers it.
    """
    found = harvest_of(session, harvest_id)
    if found.moving and found.job is not None:
        raise Conflict(f"Job {found.job.id} is gathering it; cancel that first.")
    source, kept = found.source, found.harvest.activations
    if found.shown:
        others = [other for other in gathered(session, source_id=source.id) if other.harvest.id != harvest_id]
        if others:
            show(session, settings, source, others[0].harvest.id)
        else:
            source.harvest_id = None
            session.flush()
            _clear_rows(session, source)
    session.execute(delete(Evidence).where(Evidence.harvest_id == harvest_id))
    session.execute(delete(Harvest).where(Harvest.id == harvest_id))
    _drop_kept(session, settings, source.model_id, [kept])
    return source


_UNUSED = "unused directories"


def _drop_kept(session: Session, settings: Settings, model_id: str, keys: Iterable[str]) -> None:
    """Delete kept activations with the commit, unless another harvest or one that runs needs them."""
    waiting = (JobState.QUEUED, JobState.RUNNING, JobState.PAUSED)
    with visibility.unlimited(session):
        specs = session.scalars(select(Job.spec).where(Job.kind == "harvest", Job.state.in_(waiting))).all()
    if any(spec.get("model") == model_id and spec.get("keep_activations") for spec in specs):
        return
    used = set(session.scalars(select(Harvest.activations).where(Harvest.activations.in_(list(keys)))))
    for key in set(keys) - used - {""}:
        if _UNUSED not in session.info:
            event.listen(session, "after_commit", _delete_kept)
            event.listen(session, "after_rollback", _keep_all)
        session.info.setdefault(_UNUSED, set()).add(settings.activations_dir(key))


def _keep_all(session: Session) -> None:
    session.info[_UNUSED].clear()


def _delete_kept(session: Session) -> None:
    for directory in session.info[_UNUSED]:
        _delete_directory(directory)
    session.info[_UNUSED].clear()


_HELD = "weights held"
_WAIT_SECONDS = 60


@dataclass
class _HeldWeights:
    """A lock on some weights until a transaction ends, and their directory where that ends their use."""

    lock: IO[str]
    unused: Path | None = None


def _hold_weights(session: Session, settings: Settings, sae_hash: str) -> None:
    """Let nobody else add or delete these weights until the session's transaction ends.

    Without it, somebody who adds the same SAE between a removal's commit and the deletion would find its weights
    there, and lose them a moment later. Taken before the first write: who waits here must not hold up the database.
    """
    if _HELD not in session.info:
        event.listen(session, "after_commit", _delete_unused)
        event.listen(session, "after_transaction_end", _let_go)
    held: dict[str, _HeldWeights] = session.info.setdefault(_HELD, {})
    if sae_hash in held:
        return
    file = settings.data_dir / "run" / f"sae-{sae_hash}.lock"
    taken = f"The SAE {sae_hash} is being added or removed by somebody else; try again in a minute."
    held[sae_hash] = _HeldWeights(lockfile.hold(file, taken, _WAIT_SECONDS))


def _delete_unused(session: Session) -> None:
    for held in session.info[_HELD].values():
        _delete_directory(held.unused)


def _let_go(session: Session, transaction: SessionTransaction) -> None:
    """Commit, rollback and close all end here."""
    if transaction.parent is None:
        for held in session.info[_HELD].values():
            held.lock.close()
        session.info[_HELD].clear()


def _forget_evidence(session: Session, settings: Settings, source: Source) -> None:
    """Delete what was harvested from a source's weights. What people wrote stays."""
    source.harvest_id = None
    session.flush()
    kept = list(session.scalars(select(Harvest.activations).where(Harvest.source_id == source.id)))
    harvests = select(Harvest.id).where(Harvest.source_id == source.id)
    session.execute(delete(Evidence).where(Evidence.harvest_id.in_(harvests)))
    matches.forget(session, source.id)
    wording.forget(session, source.id)
    for table in (Harvest, Feature, FeatureMap):
        session.execute(delete(table).where(table.source_id == source.id))
    explanations.forget_automatic(session, source.id)
    _drop_kept(session, settings, source.model_id, kept)


def _delete_directory(directory: Path | None) -> None:
    """Delete weights or activations; a reader never sees half of them."""
    if directory is not None and directory.is_dir():
        gone = directory.with_name(f".gone-{directory.name}")
        directory.replace(gone)
        shutil.rmtree(gone)


def shared_with(session: Session, model_id: str, name: str) -> list[str]:
    """Return the other sources, as `model/source`, that have the same weights."""
    source = source_named(session, model_id, name)
    others = select(Source).where(Source.sae_hash == source.sae_hash, Source.id != source.id)
    return [f"{other.model_id}/{other.name}" for other in session.scalars(others.order_by(Source.id))]


def source_named(session: Session, model_id: str, name: str) -> Source:
    source = session.scalar(select(Source).where(Source.model_id == model_id, Source.name == name))
    if source is None:
        raise NotFound(f"Model {model_id!r} has no source {name!r}. Add the SAE with `sae-atlas sae add`.")
    return source


def record(
    session: Session, source: Source, harvest: Harvest, features: Iterable[FeatureRecord], *, show: bool = False
) -> Harvest:
    """Write a harvest with all its features; evidence of other corpora stays beside it.

    Evidence of an earlier harvest of the same corpus is replaced and keeps its id, so that addresses go on leading to
    it. The first evidence of a source is shown by default, and what replaces it; `show` makes any so. What is shown
    sets the rows of feature lists and the heuristic labels; explanations by people and models stay.
    """
    old = session.scalar(
        select(Harvest).where(Harvest.source_id == source.id, Harvest.corpus_id == harvest.corpus_id).limit(1)
    )
    shown = show or source.harvest_id is None or (old is not None and old.id == source.harvest_id)
    if old is not None:
        session.execute(delete(Evidence).where(Evidence.harvest_id == old.id))
        harvest.id = old.id
    harvest.source_id = source.id
    harvest = session.merge(harvest)
    session.flush()
    if shown:
        _clear_rows(session, source)
    labels = explanations.written_labels(session, source.id)
    for part in _chunks(features):
        session.execute(insert(Evidence), [_evidence_row(harvest, f) for f in part])
        if shown:
            _write_rows(session, source, part, labels)
    if shown:
        session.execute(update(Source).where(Source.id == source.id).values(harvest_id=harvest.id))
    return harvest


def complete_from(session: Session, source: Source, corpus_id: int) -> bool:
    """Tell whether a source has complete evidence from a corpus."""
    complete = (Harvest.corpus_id == corpus_id) & (Harvest.state == HarvestState.COMPLETE)
    return session.scalar(select(Harvest.id).where(Harvest.source_id == source.id, complete).limit(1)) is not None


def show(session: Session, settings: Settings, source: Source, harvest_id: int) -> None:
    """Make one of a source's harvests the evidence shown by default, and write the rows of its features from it.

    Raises NotFound when the source has no such harvest, or the corpus' tokens are not on this machine.
    """
    harvest = session.get(Harvest, harvest_id)
    if harvest is None or harvest.source_id != source.id:
        raise NotFound(f"{source.model_id}/{source.name} has no evidence {harvest_id}.")
    corpus = session.get_one(Corpus, harvest.corpus_id)
    tokens = corpora.tokens_dir(settings, corpus.hash, harvest.tokenizer_hash)
    if not tokens.is_dir():
        raise NotFound(
            f"The tokens of corpus {corpus.name!r} are not on this machine: labels cannot be made from them."
        )
    imported = harvest.tokenizer_hash == corpora.IMPORTED
    words = vocabulary((tokens if imported else settings.model_dir(source.model_id)) / corpora.VOCABULARY)
    text = Text(corpora.Stream.open(tokens), words, harvest.context_size, harvest.bos_token_id)
    _clear_rows(session, source)
    labels = explanations.written_labels(session, source.id)
    blobs_of = select(Evidence.index, Evidence.blob).where(Evidence.harvest_id == harvest_id).order_by(Evidence.index)
    rows = session.execute(blobs_of).all()
    for part in _chunks(_rebuilt(index, blob, text) for index, blob in rows):
        _write_rows(session, source, part, labels)
    source.harvest_id = harvest_id
    session.flush()
    wording.fill(session, settings, source)


def _rebuilt(index: int, blob: bytes, text: Text) -> FeatureRecord:
    found = blobs.unpack(blob)
    return FeatureRecord(index, found, *row_of(found, text))


def _clear_rows(session: Session, source: Source) -> None:
    session.execute(delete(Feature).where(Feature.source_id == source.id))
    wording.forget(session, source.id)
    explanations.forget_automatic(session, source.id)


def _write_rows(session: Session, source: Source, part: list[FeatureRecord], labels: dict[int, str]) -> None:
    session.execute(insert(Feature), [_feature_row(source, f, labels.get(f.index, f.label)) for f in part])
    labelled = [f for f in part if f.label]
    if labelled:
        session.execute(insert(Explanation), [_explanation_row(source, f) for f in labelled])


def _evidence_row(harvest: Harvest, feature: FeatureRecord) -> dict[str, Any]:
    effects = None if feature.effects is None else blobs.pack_effects(feature.effects)
    return {
        "harvest_id": harvest.id,
        "index": feature.index,
        "blob": feature.blob or blobs.pack(feature.evidence),
        "effects": effects,
    }


def _feature_row(source: Source, feature: FeatureRecord, label: str) -> dict[str, Any]:
    return {
        "source_id": source.id,
        "index": feature.index,
        "density": feature.evidence.density,
        "max_act": feature.evidence.max_act,
        "label": label,
        "top_token": feature.top_token[:200],
        "top_logit": feature.top_logit[:200],
    }


def _explanation_row(source: Source, feature: FeatureRecord) -> dict[str, Any]:
    return {
        "source_id": source.id,
        "index": feature.index,
        "text": feature.label,
        "method": HEURISTIC,
        "author": "SAE Atlas",
    }


def _chunks(features: Iterable[FeatureRecord]) -> Iterable[list[FeatureRecord]]:
    part: list[FeatureRecord] = []
    for feature in features:
        part.append(feature)
        if len(part) == _CHUNK:
            yield part
            part = []
    if part:
        yield part
