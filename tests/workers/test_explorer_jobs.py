"""What people see of the jobs `match` and `embed`: the pages before, while nothing is there, and after the real job."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from app import db, harvests, weights
from app.main import create_app
from app.settings import Settings
from app.tables import Explanation, Feature, Job, Model
from tests.tiny import Tiny
from workers.checkpoints import load_sae
from workers.language_model import LanguageModel
from workers.trainer.kinds import JobContext, kind

LABELS = ("a cat sleeps on a sofa", "boats in a harbour", "integrals and derivatives", "the king of a country")
PAGES = "/compare?a=tiny/1-x&b=tiny/1-y"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", database_url="", worker_socket="", device="cpu", log_level="ERROR")


@pytest.fixture
def client(settings: Settings, tiny: Tiny) -> Iterator[TestClient]:
    """The application on two SAEs of the tiny model, with real weights and a few labels."""
    engine = db.connect(settings)
    db.migrate(engine)
    with db.sessions(engine).begin() as session:
        card = LanguageModel.load(Path(tiny.model.path)).card
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        for sae, name in ((tiny.topk, "x"), (tiny.standard, "y")):
            facts = weights.check_sae(Path(sae.path), card.d_model, settings)
            source = harvests.catalogue_sae(
                session, settings, facts, model_id="tiny", set_name=name, metrics={}, origin={}
            )
            for i, label in enumerate(LABELS):
                row = Feature(
                    source_id=source.id, index=i, density=0.1, max_act=1.0, label=label, top_token="", top_logit=""
                )
                said = Explanation(source_id=source.id, index=i, text=label, method="manual", author="somebody")
                session.add_all([row, said])
    engine.dispose()
    with TestClient(create_app(settings), base_url="http://localhost:3000") as opened:
        yield opened


def run_waiting(client: TestClient, settings: Settings, name: str) -> Job:
    """Do the one job of a kind that waits, as the trainer does."""
    sessions = client.app.state.sessions  # type: ignore[attr-defined]
    with sessions() as session:
        job = session.query(Job).filter_by(kind=name).one()
    directory = settings.job_dir(job.id)
    directory.mkdir(parents=True, exist_ok=True)
    context = JobContext(settings, sessions, job.id, job.spec, directory)
    for step in kind(name).plan(context):
        kind(name).run(context, step)
    result = kind(name).finish(context)
    with sessions.begin() as session:
        done = session.get(Job, job.id)
        done.state, done.result = "done", result
    return job


def test_two_saes_are_matched_by_the_job_and_those_without_a_counterpart_are_listed(
    client: TestClient, settings: Settings, tiny: Tiny
) -> None:
    assert "Find counterparts" in client.get(PAGES).text
    client.post("/compare", data={"a": "tiny/1-x", "b": "tiny/1-y"})
    assert re.search(r'They are being matched: <a href="/jobs/\d+">', client.get(PAGES).text)
    run_waiting(client, settings, "match")

    unit = [w / np.linalg.norm(w, axis=1, keepdims=True) for w in _decoders(tiny)]
    nearest = (unit[0] @ unit[1].T).max(axis=1)
    page = client.get(PAGES).text
    assert page.count('<td class="n"><a href="/tiny/1-x/') == min(50, len(nearest))
    limit = round(float(np.median(nearest)), 2)
    alone = np.flatnonzero(nearest.astype("f2") < limit)
    assert 0 < len(alone) < len(nearest)
    listed = client.get(f"{PAGES}&below={limit}&sort=cosine").text
    found = [int(i) for i in re.findall(r'<td class="n"><a href="/tiny/1-x/(\d+)"', listed)]
    assert sorted(found) == alone.tolist()
    assert np.all(np.diff(nearest[found]) >= -1e-3)
    # The other way round is there too, from the same job.
    assert "Find counterparts" not in client.get("/compare?a=tiny/1-y&b=tiny/1-x").text


def _decoders(tiny: Tiny) -> list[np.ndarray]:
    return [load_sae(Path(sae.path)).W_dec.numpy() for sae in (tiny.topk, tiny.standard)]


def test_the_job_of_new_labels_lets_the_search_find_them_by_meaning(client: TestClient, settings: Settings) -> None:
    ask = "/search?q=kittens"
    before = client.get(ask).text
    assert "The meaning of 4 of 4 labels is not known yet." in before
    assert "a cat sleeps" not in before
    answer = client.post("/search/embed", follow_redirects=False)
    assert re.fullmatch(r"/jobs/\d+", answer.headers["location"])
    job = run_waiting(client, settings, "embed")
    assert "4 of 4 texts" in client.get("/jobs").text
    client.app.state.labels._counted_at = -1e9  # type: ignore[attr-defined]  # as if five seconds had passed
    after = client.get(ask).text
    first = re.search(r'<p class="label"><a href="([^"]+)">([^<]+)</a>', after)
    assert first is not None
    assert (first[1], first[2]) == ("/tiny/1-x/0", LABELS[0])
    assert "by words and meaning" in after
    assert "is not known yet" not in after
    # Elsewhere too: in one SAE, by the API, and there is nothing left to compute.
    assert "/tiny/1-y/1" in client.get("/search?q=ships+at+anchor&scope=tiny/1-y").text
    body = {"modelId": "tiny", "query": "monarchs", "offset": 0}
    best = client.post("/api/explanation/search-model", json=body).json()["results"][0]
    assert best["description"] == LABELS[3]
    assert best["cosine_similarity"] > 0.3
    assert client.post("/search/embed", follow_redirects=False).headers["location"] != f"/jobs/{job.id}"
