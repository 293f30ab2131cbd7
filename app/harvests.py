"""Put SAEs and their evidence into the catalog. Takes a Session, the caller commits; every verb may run twice."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session

from app import evidence as blobs
from app.errors import BadFile, NotFound
from app.evidence import FeatureEvidence
from app.settings import Settings
from app.tables import Evidence, Explanation, Feature, Harvest, Model, Source

HEURISTIC = "heuristic"
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_CHUNK = 1_000


@dataclass(frozen=True)
class FeatureRecord:
    """One feature as harvest and bundle import hand it over."""

    index: int
    evidence: FeatureEvidence
    label: str
    """The automatic label; empty for a dead feature."""
    top_token: str
    top_logit: str


def store_sae(settings: Settings, directory: Path) -> str:
    """Copy an SAE directory into content-addressed storage and return its hash. The same content is stored once."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((directory / name).read_bytes())
    sae_hash = digest.hexdigest()[:16]
    target = settings.sae_dir(sae_hash)
    if target.exists():
        return sae_hash
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
    try:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(directory / name, scratch / name)
        os.rename(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return sae_hash


def catalogue_sae(
    session: Session,
    settings: Settings,
    directory: Path,
    *,
    model_id: str,
    set_name: str,
    metrics: dict[str, Any],
    origin: dict[str, Any],
) -> Source:
    """Store a checked SAE directory and catalogue it as `{layer}-{set_name}`; a source of that name is renewed."""
    if session.get(Model, model_id) is None:
        raise NotFound(f"There is no model {model_id!r}. Add it with `sae-atlas model add`.")
    config = json.loads((directory / CONFIG).read_text())
    hook_name = str(config["metadata"]["hook_name"])
    layer = _layer(hook_name)
    name = f"{layer}-{set_name}"
    source = session.scalar(select(Source).where(Source.model_id == model_id, Source.name == name))
    if source is None:
        first = session.scalar(select(Source.id).where(Source.model_id == model_id, Source.layer == layer)) is None
        source = Source(model_id=model_id, name=name, layer=layer, set_name=set_name, is_default=first)
        session.add(source)
    source.sae_hash = store_sae(settings, directory)
    source.architecture = config["architecture"]
    source.hook_name, source.d_in, source.d_sae = hook_name, config["d_in"], config["d_sae"]
    source.config, source.metrics, source.origin = config, metrics, origin
    session.flush()
    return source


def source_named(session: Session, model_id: str, name: str) -> Source:
    source = session.scalar(select(Source).where(Source.model_id == model_id, Source.name == name))
    if source is None:
        raise NotFound(f"Model {model_id!r} has no source {name!r}. Add the SAE with `sae-atlas sae add`.")
    return source


def record(session: Session, source: Source, harvest: Harvest, features: Iterable[FeatureRecord]) -> Harvest:
    """Write a harvest with all its features and make it the evidence shown for the source.

    Evidence of an earlier harvest of the same corpus is replaced; heuristic labels are too, other explanations stay.
    """
    old = session.scalars(
        select(Harvest.id).where(Harvest.source_id == source.id, Harvest.corpus_id == harvest.corpus_id)
    ).all()
    harvest.source_id = source.id
    session.add(harvest)
    session.flush()
    labels = _human_labels(session, source)
    session.execute(delete(Feature).where(Feature.source_id == source.id))
    session.execute(delete(Explanation).where(Explanation.source_id == source.id, Explanation.method == HEURISTIC))
    for part in _chunks(features):
        session.execute(insert(Feature), [_feature_row(source, f, labels.get(f.index, f.label)) for f in part])
        session.execute(
            insert(Evidence),
            [{"harvest_id": harvest.id, "index": f.index, "blob": blobs.pack(f.evidence)} for f in part],
        )
        labelled = [f for f in part if f.label]
        if labelled:
            session.execute(insert(Explanation), [_explanation_row(source, f) for f in labelled])
    session.execute(update(Source).where(Source.id == source.id).values(harvest_id=harvest.id))
    if old:
        session.execute(delete(Evidence).where(Evidence.harvest_id.in_(old)))
        session.execute(delete(Harvest).where(Harvest.id.in_(old)))
    return harvest


def _layer(hook_name: str) -> int:
    parts = hook_name.split(".")
    if len(parts) < 3 or parts[0] != "blocks" or not parts[1].isdigit():
        raise BadFile(f"hook_name {hook_name!r} names no layer; expected something like blocks.12.hook_resid_post.")
    return int(parts[1])


def _human_labels(session: Session, source: Source) -> dict[int, str]:
    rows = session.execute(
        select(Explanation.index, Explanation.text)
        .where(Explanation.source_id == source.id, Explanation.method != HEURISTIC)
        .order_by(Explanation.id)
    )
    return dict(rows.tuples().all())


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
