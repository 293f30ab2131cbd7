"""Models and sets announced over the API, and features sent in batches: by the official client, and by worse ones."""

from __future__ import annotations

import os
from typing import Any

import pytest
from starlette.testclient import TestClient

os.environ.setdefault("NEURONPEDIA_API_KEY", "any value")

from neuronpedia.np_activation import Activation
from neuronpedia.np_explanation import Explanation
from neuronpedia.np_feature import Feature, Logit
from neuronpedia.requests.activation_request import ActivationRequest
from neuronpedia.requests.base_request import NPRequest
from neuronpedia.requests.feature_request import FeatureRequest
from neuronpedia.requests.model_request import ModelRequest
from neuronpedia.requests.source_set_request import SourceSetRequest

from app import exchange
from app.exchange import batches
from app.people import LOCAL, Actor, Role
from tests.app.conftest import Live


def example(*values: float) -> dict[str, Any]:
    return {"tokens": [f" w{i}" for i in range(len(values))], "values": list(values)}


def feature(index: int, *examples: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"index": index, "activations": list(examples) or [example(0.0, 2.5, 0.0)], **more}


def send(client: TestClient, *features: dict[str, Any], source: str = "0-mine") -> Any:
    return client.post("/api/feature/upload-batch", json={"modelId": "far", "source": source, "features": features})


@pytest.fixture
def announced(client: TestClient) -> TestClient:
    assert client.post("/api/model/new", json={"id": "far", "layers": 2}).status_code == 200
    assert client.post("/api/source-set/new", json={"name": "mine", "modelId": "far"}).status_code == 200
    return client


def test_the_official_client_announces_and_sends(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NPRequest, "BASE_URL", f"{live.url}/api")
    model = ModelRequest().new("pup-3", 3, "Pup", "https://example.org")
    assert (model.id, model.layers, model.display_name, model.url) == ("pup-3", 3, "Pup", "https://example.org")
    made = SourceSetRequest().new("scope", "pup-3", "residuals", "https://example.org/scope")
    assert [source.id for source in made.sources] == ["0-scope", "1-scope", "2-scope"]
    assert SourceSetRequest().get("pup-3", "scope") == made

    place = {"modelId": "pup-3", "source": "1-scope", "index": 4}
    sent = Feature(
        **place,
        density=0.01,
        top_logits=[Logit(" cat", 2.0)],
        bottom_logits=[Logit(" dog", -1.0)],
        explanations=[Explanation(**place, text="cats", method="by hand", explainer_model="me")],  # type: ignore[call-arg]
        activations=[
            Activation(**place, tokens=["The", " cat", " sat"], values=[0.0, 3.0, 0.5]),
            Activation(**place, tokens=["A", " lion"], values=[0.0, 1.0], quantileMin=0.5, quantileMax=1.5),
        ],
    )
    answer: Any = FeatureRequest().upload_batch("pup-3", "1-scope", [sent])
    assert answer["message"] == "1 features created."
    found = FeatureRequest().get("pup-3", "1-scope", 4)
    assert found.density == pytest.approx(0.01, rel=1e-3)
    assert [e.text for e in found.explanations or ()] == ["cats"]
    assert [(a.tokens, a.values) for a in found.activations or ()] == [
        (["The", " cat", " sat"], [0.0, 3.0, 0.5]),
        (["A", " lion"], [0.0, 1.0]),
    ]
    more = Activation(**place, tokens=["O", " cat"], values=[0.0, 9.0])
    ActivationRequest().upload_batch("pup-3", "1-scope", "4", [more])
    again = FeatureRequest().get("pup-3", "1-scope", 4)
    assert [max(a.values) for a in again.activations or ()] == [9.0, 3.0, 1.0]
    page = live.http.get("/pup-3/1-scope/4")
    assert page.status_code == 200
    assert "cats" in page.text


def test_batches_add_up(announced: TestClient) -> None:
    assert send(announced, feature(0), feature(1)).json()["message"] == "2 features created."
    assert send(announced, feature(7)).status_code == 200
    assert announced.get("/api/feature/far/0-mine/1").json()["maxActApprox"] == 2.5
    assert announced.get("/api/feature/far/0-mine/7").json()["activations"][0]["tokens"] == [" w0", " w1", " w2"]
    assert announced.get("/api/feature/far/0-mine/3").json()["activations"] == []
    sources = announced.get("/api/source-set/far/mine").json()["sources"]
    assert [s["id"] for s in sources] == ["0-mine", "1-mine"]


def test_a_removed_source_begins_anew(announced: TestClient) -> None:
    send(announced, feature(0), feature(5))
    announced.post("/far/0-mine/remove")
    assert send(announced, feature(0)).status_code == 200
    assert announced.get("/api/feature/far/0-mine/5").status_code == 404


def test_what_cannot_be_taken_is_refused_and_nothing_is_kept(announced: TestClient) -> None:
    send(announced, feature(0))
    for answer, status, words in (
        (send(announced, feature(1), feature(0)), 409, "Feature 0 of far/0-mine was sent already"),
        (send(announced, feature(1), feature(1)), 409, "Feature 1"),
        (send(announced, feature(1), source="2-mine"), 404, "far has 2 layers"),
        (send(announced, feature(1), source="00-mine"), 404, "source of none"),
        (send(announced, feature(1), source="0-other"), 404, "source-set/new first"),
        (send(announced, feature(2**30)), 413, "SAE_ATLAS_MAX_D_SAE"),
        (send(announced, feature(1, {"tokens": ["a"], "values": [1.0, 2.0]})), 422, "1 tokens, but 2 values"),
        (send(announced, {"index": 1, "activations": []}), 422, "activations"),
        (send(announced, *(feature(i) for i in range(1, 130))), 422, "128"),
    ):
        assert (answer.status_code, words in answer.json()["error"]) == (status, True), answer.text
    assert send(announced, feature(1)).status_code == 200, "1 was refused each time and is not there yet"
    more = {"modelId": "far", "source": "0-mine", "index": "9", "activations": [example(1.0)]}
    assert announced.post("/api/activation/upload-batch", json=more).status_code == 404


def test_a_batch_the_catalog_refuses_leaves_nothing(announced: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    send(announced, feature(0))

    def refuse(*_: object) -> None:
        raise RuntimeError("full")

    with monkeypatch.context() as broken:
        broken.setattr(exchange.neuronpedia, "import_", refuse)
        assert send(announced, feature(1)).status_code == 500
    assert send(announced, feature(1)).status_code == 200
    assert announced.get("/api/feature/far/0-mine/0").json()["maxActApprox"] == 2.5


def test_many_features_are_read_by_one_job(announced: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "AT_ONCE", 2)
    send(announced, feature(0), feature(1))
    later = send(announced, feature(2)).json()
    assert later["jobId"] == send(announced, feature(3)).json()["jobId"]
    assert announced.get("/api/feature/far/0-mine/2").status_code == 404


def test_names_are_taken_once(announced: TestClient) -> None:
    assert announced.post("/api/model/new", json={"id": "far", "layers": 2}).status_code == 409
    assert announced.post("/api/model/new", json={"id": "api", "layers": 2}).status_code == 422
    for name, model, status in (("mine", "far", 409), ("Mine!", "far", 422), ("x", "none", 404), ("demo", "tiny", 409)):
        answer = announced.post("/api/source-set/new", json={"name": name, "modelId": model})
        assert answer.status_code == status, answer.text
    assert announced.get("/api/source-set/tiny/demo").json()["sources"][0]["id"] == "1-demo"


def test_only_who_announced_a_set_sends_to_it(announced: TestClient) -> None:
    rows: batches.Rows = {"features": [{"index": 0}], "activations": [], "explanations": []}
    app: Any = announced.app
    with app.state.sessions() as session:
        batches.new_set(session, Actor("ada", Role.EDITOR, 1), "far", "hers", "", "")
        with pytest.raises(batches.Forbidden, match="ada's"):
            batches.add(session, app.state.settings, Actor("bob", Role.EDITOR, 2), "far", "0-hers", rows)
        assert batches.add(session, app.state.settings, LOCAL, "far", "0-hers", rows).n_features == 1
