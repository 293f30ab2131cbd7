"""Search in memory: typos, meaning, scopes, renewal. The vectors are the real embedding model's."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from sqlalchemy import Engine, delete, select, update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import db, embeddings, labelindex, meaning, search
from app.labelindex import Index, LabelIndex, distance
from app.search import Scope
from app.settings import Settings
from app.tables import Embedding, Explanation, Job, JobState
from tests.conftest import Catalog

TEXTS = [
    "burial: graves, being buried, the dead laid to rest",
    "calm and quiet as qualities of people and manners",
    "hats and crowns: something worn on the head",
    "arriving somewhere: arrival, arrived, came",
    "speech addressed to someone in the King James Bible",
    "millions, billions, trillions: the scale word of a large amount",
    "harbours and ships",
    "harbours",
]


@pytest.fixture(scope="module")
def index() -> Index:
    encoder = meaning.encoder()
    assert encoder is not None
    vectors = {
        meaning.text_hash(text): vector.astype("<f2").tobytes()
        for text, vector in zip(TEXTS, encoder.embed(TEXTS), strict=True)
    }
    ids = np.arange(len(TEXTS), dtype=np.int64) + 100
    sources, features = np.array([1] * 4 + [2] * 4, dtype=np.int32), np.arange(len(TEXTS), dtype=np.int32)
    return Index(ids, sources, features, TEXTS, vectors)


def found(index: Index, query: str, sources: list[int] | None = None, vector: bool = True) -> list[str]:
    encoder = meaning.encoder()
    assert encoder is not None
    hits = index.find(query, encoder.embed([query])[0] if vector else None, sources)
    return [TEXTS[i - 100] for i in hits.ids.tolist()]


@pytest.mark.parametrize("query", ["buriel graves", "burail", "buryal", "graevs", "BURIAL gravse"])
def test_misspelt_words_are_found_without_any_vector(index: Index, query: str) -> None:
    assert found(index, query, vector=False)[:1] == TEXTS[:1]


def test_the_query_itself_comes_first_then_what_begins_with_it(index: Index) -> None:
    assert found(index, "harbours")[:2] == ["harbours", "harbours and ships"]


def test_a_feature_with_several_explanations_is_found_once_by_the_one_that_fits_best() -> None:
    texts = ["harbours and ships", "harbours", "harbours in winter", "harbours", "winter"]
    sources, features = np.array([1, 1, 1, 2, 1], dtype=np.int32), np.array([5, 5, 6, 5, 5], dtype=np.int32)
    hits = Index(np.arange(5, dtype=np.int64), sources, features, texts, {}).find("harbours", None)
    assert hits.ids.tolist() == [1, 3, 2]
    assert hits.words.tolist() == pytest.approx([1, 1, 0.9], abs=0.05)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("cemetery funeral", TEXTS[0]),
        ("peaceful and silent persons", TEXTS[1]),
        ("caps and helmets", TEXTS[2]),
        ("huge sums of money", TEXTS[5]),
        ("boats in a port", TEXTS[6]),
    ],
)
def test_meaning_finds_what_holds_none_of_the_words(index: Index, query: str, text: str) -> None:
    assert found(index, query)[0] == text
    assert text not in found(index, query, vector=False)


def test_only_the_asked_sources_are_searched(index: Index) -> None:
    assert found(index, "harbours", [1], vector=False) == []
    assert found(index, "and", [1], vector=False) == [TEXTS[2], TEXTS[1]]


@pytest.mark.parametrize("query", ["", "  ", "%", "' OR 1=1 --", "\\", "a" * 5000, "\ud800", "日本語"])
def test_odd_queries_break_nothing(index: Index, query: str) -> None:
    found(index, query)


@pytest.mark.parametrize(
    ("a", "b", "n"),
    [("same", "same", 0), ("form", "from", 1), ("cat", "cart", 1), ("cart", "cat", 1), ("kitten", "sitting", 3)],
)
def test_distance_counts_edits_and_swaps(a: str, b: str, n: int) -> None:
    assert distance(a, b, 3) == n
    assert distance(a, b, 0) == (0 if n == 0 else 1)


def test_numpy_and_transformers_agree_on_every_vector() -> None:
    from workers.trainer.embed import Encoder

    where, own = meaning.directory(), meaning.encoder()
    assert where is not None
    assert own is not None
    texts = [*TEXTS, "", "Ünïcode – 日本語", "word " * 300, "`the`, ` of`…"]
    np.testing.assert_allclose(own.embed(texts), Encoder(where, "cpu").embed(texts), atol=2e-6)


def test_vectors_are_made_once_for_each_text(session: Session) -> None:
    waiting = embeddings.missing(session)
    assert len(waiting) == 38
    names = list(waiting)
    embeddings.store(session, names[:30], np.ones((30, meaning.D_MODEL), dtype=np.float32))
    embeddings.store(session, names[:31], np.ones((31, meaning.D_MODEL), dtype=np.float32))
    assert list(embeddings.missing(session)) == names[31:]


def test_embedding_is_asked_for_once_until_it_begins(session: Session, settings: Settings) -> None:
    first, second = embeddings.queue(session, settings), embeddings.queue(session, settings)
    assert first is not None
    assert second is first
    session.execute(update(Job).values(state=JobState.RUNNING))
    session.expire_all()
    third = embeddings.queue(session, settings)
    assert third is not None
    assert third.id != first.id


def test_the_index_notices_new_and_removed_explanations(session: Session, engine: Engine) -> None:
    labels = LabelIndex(db.sessions(engine))

    def hits(query: str) -> list[int]:
        return [hit.feature.index for hit in search.find(session, labels.current(session, 30), query).hits]

    assert hits("harbours") == [3, 0, 4]
    source_id = session.scalars(select(Explanation.source_id)).first()
    session.add(Explanation(source_id=source_id, index=8, text="lighthouses", method="human", author="me"))
    session.commit()
    assert hits("lighthuoses") == [8]
    session.execute(delete(Explanation).where(Explanation.text == "lighthouses"))
    session.commit()
    assert hits("lighthouses") == []


def test_scopes_are_model_set_and_source(session: Session, engine: Engine) -> None:
    index = labelindex.load(session)

    def n(scope: Scope) -> int:
        return search.find(session, index, "harbours", scope).total

    assert n(Scope()) == n(Scope("tiny")) == n(Scope("tiny", "demo")) == n(Scope("tiny", sources=("1-demo",))) == 3
    assert n(Scope("other")) == n(Scope("tiny", "plain")) == n(Scope("tiny", sources=("2-plain",))) == 0


def test_the_page_shows_top_examples_and_says_that_meaning_is_missing(client: TestClient, filled: Catalog) -> None:
    page = client.get("/search?q=harbous").text
    assert 'class="window"' in page
    assert "harbours and ships" in page
    assert "The meaning of 38 of 38 labels is not known yet" in page
    answer = client.post("/search/embed", headers={"Sec-Fetch-Site": "same-origin"}, follow_redirects=False)
    assert answer.headers["location"].startswith("/jobs/")
    assert "job 1 computes it" in client.get("/search?q=harbous").text


def test_a_page_asked_while_labels_are_read_asks_again_until_they_are(
    client: TestClient, filled: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, load = threading.Event(), labelindex.load

    def later(session: Session) -> Index:
        go.wait(60)
        return load(session)

    monkeypatch.setattr(labelindex, "load", later)
    page = client.get("/search?q=harbous&scope=tiny").text
    assert 'hx-get="/search?q=harbous&amp;scope=tiny" hx-trigger="load' in page
    assert "follow once the labels are read" in page
    go.set()
    deadline = time.monotonic() + 60
    while "goes on by itself" in page and time.monotonic() < deadline:
        page = client.get("/search?q=harbous&scope=tiny").text
    assert "harbours and ships" in page


def test_without_the_embedding_model_words_are_still_found_and_the_page_says_so(
    client: TestClient, filled: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meaning, "directory", lambda: None)
    page = client.get("/search?q=harbours").text
    assert "the embedding model is not installed" in page
    assert "harbours and ships" in page


def test_models_and_saes_are_found_by_their_names(client: TestClient, filled: Catalog) -> None:
    page = client.get("/search?q=2-plain").text
    assert 'href="/tiny/2-plain"' in page


def test_the_api_answers_with_the_cosine_of_meaning(client: TestClient, filled: Catalog, settings: Settings) -> None:
    engine = db.connect(settings)
    encoder = meaning.encoder()
    assert encoder is not None
    with db.sessions(engine).begin() as session:
        waiting = embeddings.missing(session)
        embeddings.store(session, list(waiting), encoder.embed(list(waiting.values())))
        assert session.scalars(select(Embedding.model).distinct()).all() == [meaning.MODEL]
    engine.dispose()
    found = client.post("/api/explanation/search-all", json={"query": "boats in a port"}).json()
    assert found["results"][0]["description"] in ("harbours and ships", "harbours", "cold harbours in winter")
    assert 0.3 < found["results"][0]["cosine_similarity"] < 1


def test_of_very_many_vectors_the_nearest_are_found_as_if_each_were_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    # Like labels' vectors these differ more in some directions than in others.
    n, choose = 6_000, np.random.default_rng(3)
    made = choose.normal(size=(n, meaning.D_MODEL)) * (1 + np.arange(meaning.D_MODEL)) ** -0.5
    made = (made / np.linalg.norm(made, axis=1, keepdims=True)).astype("<f2")
    texts = [f"text{i}" for i in range(n)]
    vectors = {meaning.text_hash(text): row.tobytes() for text, row in zip(texts, made, strict=True)}
    ids, sources = np.arange(n, dtype=np.int64), (np.arange(n) % 2).astype(np.int32)
    whole = Index(ids, sources, ids.astype(np.int32), texts, vectors)
    monkeypatch.setattr(labelindex, "MAX_EXACT", 1_000)
    monkeypatch.setattr(labelindex, "CANDIDATES", 500)
    coarse = Index(ids, sources, ids.astype(np.int32), texts, vectors)
    for asked in range(0, 100, 10):
        for scope in (None, [1]):
            vector = made[asked].astype(np.float32)
            best, wanted = (index.find("nowhere", vector, scope) for index in (coarse, whole))
            assert best.ids[:20].tolist() == wanted.ids[:20].tolist()
            np.testing.assert_allclose(best.cosines[:20], wanted.cosines[:20], atol=1e-5)
