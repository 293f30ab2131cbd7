"""The demo's real evidence in an empty catalog, without its weights and tokens: for what is measured of storage."""

from __future__ import annotations

import base64
import json

import zstandard
from sqlalchemy import insert
from sqlalchemy.orm import Session

from app.bundles import Manifest
from app.demo import prepare
from app.tables import Corpus, Evidence, Feature, Harvest, Model, Source


def store(session: Session) -> Manifest:
    """Write the bundle's features as an import does, and return its manifest. The caller commits."""
    manifest = Manifest.model_validate_json((prepare.BUNDLE / "manifest.json").read_bytes())
    packed = (prepare.BUNDLE / "evidence/features.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().decompressobj().decompress(packed).splitlines()
    card = manifest.model
    session.add(Model(id=card.id, name=card.name, hash=card.hash, card=card.model_dump()))
    corpus = Corpus(**manifest.corpus.model_dump())
    source = Source(
        model_id=card.id,
        name=f"12-{manifest.set_name}",
        layer=12,
        set_name=manifest.set_name,
        sae_hash="x",
        architecture="topk",
        hook_name="blocks.12.hook_resid_post",
        d_in=card.d_model,
        d_sae=manifest.n_features,
    )
    session.add_all([corpus, source])
    session.flush()
    harvest = Harvest(source_id=source.id, corpus_id=corpus.id, **manifest.harvest.model_dump())
    session.add(harvest)
    session.flush()
    source.harvest_id = harvest.id
    evidence: list[dict[str, object]] = []
    features: list[dict[str, object]] = []
    for line in lines:
        row = json.loads(line)
        blob, effects = (base64.b64decode(row[name]) if row[name] else None for name in ("blob", "effects"))
        evidence.append({"harvest_id": harvest.id, "index": row["index"], "blob": blob, "effects": effects})
        shown = {name: row[name] for name in ("index", "label", "top_token", "top_logit")}
        features.append({"source_id": source.id, "density": 0.1, "max_act": 1.0, **shown})
    session.execute(insert(Evidence), evidence)
    session.execute(insert(Feature), features)
    return manifest
