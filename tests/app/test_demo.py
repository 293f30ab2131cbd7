"""What the README promises of the demo, checked on the files that ship."""

from __future__ import annotations

import base64
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zstandard
from sae_lens import SAE
from sqlalchemy import Engine, event, func, select

from app import catalog, db, evidence
from app.bundles import Manifest
from app.demo import prepare
from app.evidence import FeatureEvidence
from app.tables import Evidence
from app.trainspecs import TrainSpec
from tests import demo_evidence
from workers.checkpoints import load_sae

DEMO = prepare.BUNDLE.parent
README = DEMO.parent.parent / "README.md"


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.model_validate_json((prepare.BUNDLE / "manifest.json").read_bytes())


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return list(lines("features"))


def lines(name: str) -> Iterator[dict[str, Any]]:
    packed = (prepare.BUNDLE / f"evidence/{name}.jsonl.zst").read_bytes()
    text = zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    return (json.loads(line) for line in text.splitlines())


def unpacked(row: dict[str, Any]) -> FeatureEvidence:
    return evidence.unpack(base64.b64decode(row["blob"]))


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def test_the_bundle_is_small_enough_to_ship() -> None:
    assert size(prepare.BUNDLE) + (DEMO / "corpus.jsonl.xz").stat().st_size <= 40e6
    assert (prepare.BUNDLE / "sae/sae_weights.safetensors").stat().st_size <= 12e6


def test_the_corpus_is_real_text_of_many_kinds() -> None:
    packed = DEMO / "corpus.jsonl.xz"
    assert packed.stat().st_size <= 6e6
    documents = [json.loads(line) for line in lzma.decompress(packed.read_bytes()).splitlines()]
    assert sum(len(d["text"].encode()) for d in documents) >= 12e6
    assert len({d["kind"] for d in documents}) >= 7
    listed = (DEMO / "SOURCES.md").read_text()
    assert all(d["source"] in listed for d in documents)


def test_the_sae_is_as_good_as_the_readme_says(manifest: Manifest) -> None:
    metrics, text = manifest.metrics, README.read_text()
    assert metrics["explained_variance"] >= 0.80
    assert metrics["ce_loss_score"] >= 0.97
    assert metrics["dead"] < 0.01
    assert metrics["n_trained_tokens"] >= 4_000_000
    for name in ("explained_variance", "ce_loss_score"):
        assert f"{metrics[name]:.3f}" in text


def test_it_was_trained_from_the_spec_in_the_repository(manifest: Manifest) -> None:
    spec = TrainSpec(**yaml.safe_load((DEMO / "train.yaml").read_text()))
    # The harvest was queued by hand; it has no part in the weights.
    trained = TrainSpec.model_validate(manifest.origin["spec"] | {"harvest_tokens": spec.harvest_tokens})
    assert trained == spec


def test_every_feature_has_evidence_of_a_million_tokens_in_1500_bytes(
    manifest: Manifest, rows: list[dict[str, Any]]
) -> None:
    assert [row["index"] for row in rows] == list(range(4096))
    assert manifest.harvest.n_tokens >= 1_000_000
    blobs = [len(base64.b64decode(row["blob"])) for row in rows]
    assert sum(blobs) / len(blobs) <= 1_500
    silent = sum(not unpacked(row).top for row in rows)
    assert silent / len(rows) < 0.01


def test_a_features_evidence_takes_at_most_1500_bytes_and_is_read_in_one_query(engine: Engine) -> None:
    """45 examples in whole contexts of 128 tokens, near misses, silent contexts and causal effects."""
    with db.sessions(engine)() as session:
        manifest = demo_evidence.store(session)
        session.commit()
        n_bytes = func.avg(func.length(Evidence.blob) + func.coalesce(func.length(Evidence.effects), 0))
        assert session.scalar(select(n_bytes)) <= 1_500
        queries: list[str] = []
        event.listen(engine, "before_cursor_execute", lambda *a: queries.append(a[2]))
        examples = 0
        for index in range(0, manifest.n_features, 256):
            record = catalog.feature_record(session, manifest.model.id, "12-demo", index)
            assert record.blob is not None
            found = evidence.unpack(record.blob)
            examples += len(found.top) + sum(len(band.examples) for band in found.intervals)
        assert len(queries) == 16
        assert examples / 16 > 40


def test_sae_lens_reads_the_weights_and_agrees(manifest: Manifest) -> None:
    theirs = SAE.load_from_disk(str(prepare.BUNDLE / "sae"))
    ours = load_sae(prepare.BUNDLE / "sae")
    x = 100 * torch.randn(7, manifest.model.d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.encode(x).float()
        torch.testing.assert_close(ours.encode(x), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(ours.reconstruct(x), theirs.decode(expected).float(), rtol=1e-5, atol=1e-3)


def test_the_ten_features_of_the_readme_are_in_the_bundle() -> None:
    named = re.findall(r"/12-demo/(\d+)\) \| (.+?) \|", README.read_text())
    explained = {(row["index"], row["text"]) for row in lines("explanations")}
    assert len(named) >= 10
    assert {(int(index), text) for index, text in named} <= explained
