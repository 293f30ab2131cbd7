"""Features over JSON, to the letter of wire.md, and with Neuronpedia's own client against a real server."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from neuronpedia.np_feature import Feature
from neuronpedia.requests.base_request import NPRequest
from neuronpedia.requests.feature_request import FeatureRequest
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.conftest import D_SAE, Catalog

FIELDS = [
    "modelId",
    "layer",
    "index",
    "sourceSetName",
    "maxActApprox",
    "hasVector",
    "vector",
    "hookName",
    "topkCosSimIndices",
    "topkCosSimValues",
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_pearson",
    "correlated_neurons_l1",
    "correlated_features_indices",
    "correlated_features_pearson",
    "correlated_features_l1",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "frac_nonzero",
    "freq_hist_data_bar_heights",
    "freq_hist_data_bar_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "model",
    "source",
    "sourceSet",
    "creator",
    "lists",
    "comments",
    "explanations",
    "activations",
]
ACTIVATION = [
    "id",
    "tokens",
    "values",
    "index",
    "layer",
    "source",
    "modelId",
    "dataSource",
    "maxValue",
    "maxValueTokenIndex",
    "minValue",
    "binMin",
    "binMax",
    "binContains",
    "qualifyingTokenIndex",
    "createdAt",
]
EXPLANATION = [
    "id",
    "description",
    "explanationModelName",
    "typeName",
    "scores",
    "triggeredByUser",
    "modelId",
    "source",
    "layer",
    "index",
]


def feature(client: TestClient, path: str = "tiny/1-demo/4") -> dict[str, object]:
    return client.get(f"/api/feature/{path}").json()


def test_a_feature_has_every_field(client: TestClient) -> None:
    found = client.get("/api/feature/tiny/1-demo/4").json()
    assert [name for name in FIELDS if name not in found] == []
    assert [name for name in ACTIVATION if name not in found["activations"][0]] == []
    assert [name for name in EXPLANATION if name not in found["explanations"][0]] == []
    assert found["index"] == "4"
    assert found["creator"]["name"]


@pytest.mark.parametrize("path", ["tiny/1-demo/7", "tiny/2-plain/3"])
def test_a_feature_without_evidence_has_every_field_too(client: TestClient, path: str) -> None:
    found = client.get(f"/api/feature/{path}").json()
    assert [name for name in FIELDS if name not in found] == []
    assert found["activations"] == []


def test_the_vector_is_the_decoder_row(client: TestClient) -> None:
    assert client.get("/api/feature/tiny/1-demo/4").json()["vector"] == [4.0, 1.0, 0.5]
    without = client.get("/api/feature/tiny/2-plain/4").json()
    assert (without["hasVector"], without["vector"]) == (False, [])


def test_lists_that_belong_together_have_one_length(client: TestClient) -> None:
    found = client.get("/api/feature/tiny/1-demo/4").json()
    for start in (
        "neuron_alignment_",
        "correlated_neurons_",
        "correlated_features_",
        "pos_",
        "neg_",
        "freq_hist_data_bar_",
    ):
        assert len({len(found[name]) for name in found if name.startswith(start)}) == 1


def test_activations_come_strongest_first_without_the_first_token(client: TestClient) -> None:
    found = client.get("/api/feature/tiny/1-demo/4").json()["activations"]
    values = [a["maxValue"] for a in found]
    assert values == sorted(values, reverse=True)
    for a in found:
        assert len(a["tokens"]) == len(a["values"]) == 7
        assert max(a["values"]) == pytest.approx(a["maxValue"], abs=1e-4)
        assert a["values"][a["maxValueTokenIndex"]] == max(a["values"])
        assert a["binContains"] is None or 0 <= a["binContains"] <= 1


def test_several_features_come_in_the_order_asked_for(client: TestClient) -> None:
    asked = [{"modelId": "tiny", "layer": "1-demo", "index": i, "maxActsToReturn": 1} for i in (5, "3")]
    found = client.post("/api/features", json=asked).json()
    assert [f["index"] for f in found] == ["5", "3"]
    assert all(len(f["activations"]) == 1 for f in found)


def test_features_from_an_offset_end_with_the_source(client: TestClient) -> None:
    found = client.post("/api/features-offset", json={"modelId": "tiny", "layer": "1-demo", "offset": D_SAE - 2}).json()
    assert [f["index"] for f in found] == [str(D_SAE - 2), str(D_SAE - 1)]


def test_examples_alone_are_an_array(client: TestClient) -> None:
    found = client.post("/api/activation/get", json={"modelId": "tiny", "source": "1-demo", "index": "4"}).json()
    assert found == client.get("/api/feature/tiny/1-demo/4").json()["activations"]


def test_models_are_listed_with_their_sources(client: TestClient) -> None:
    assert client.get("/api/models").json()[0]["sources"] == ["1-demo", "1-other", "2-plain"]
    assert client.get("/api/model/tiny").json()["layers"] == 3


def test_explanations_are_searched_in_pages(client: TestClient) -> None:
    asked = {"modelId": "tiny", "layers": ["1-demo"], "query": "label number"}
    first = client.post("/api/explanation/search", json=asked).json()
    assert (first["resultsCount"], first["hasMore"], first["nextOffset"]) == (20, True, 20)
    second = client.post("/api/explanation/search", json=asked | {"offset": 20}).json()
    assert not second["hasMore"]
    assert "nextOffset" not in second
    hit = first["results"][0]
    assert {
        "modelId",
        "layer",
        "index",
        "description",
        "explanationModelName",
        "typeName",
        "cosine_similarity",
        "neuron",
    } <= set(hit)
    for path, body in (("search-model", {"modelId": "tiny"}), ("search-all", {}), ("search-release", {})):
        assert client.post(f"/api/explanation/{path}", json={"query": "winter"} | body).json()["resultsCount"] == 1


def test_any_key_in_any_case_is_accepted_on_this_machine(client: TestClient) -> None:
    for name in ("x-api-key", "X-API-KEY"):
        assert client.get("/api/feature/tiny/1-demo/4", headers={name: "anything"}).status_code == 200


@pytest.fixture
def server(filled: Catalog, settings: Settings) -> Iterator[str]:
    """A real uvicorn on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(create_app(settings), log_config=None))
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    deadline = time.monotonic() + 20
    while not running.started and time.monotonic() < deadline:
        time.sleep(0.05)
    yield f"http://localhost:{listener.getsockname()[1]}"
    running.should_exit = True
    thread.join(10)


def test_neuronpedias_client_reads_a_feature(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NPRequest, "BASE_URL", f"{server}/api")
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "any")
    found: Feature = FeatureRequest().get("tiny", "1-demo", 4)
    assert found.density == pytest.approx(0.104)
    assert found.explanations is not None
    assert found.explanations[0].text == "cold harbours in winter"
    assert found.activations is not None
    assert found.activations[0].tokens[1] == " harbour"


def test_pages_are_compressed_and_logged_by_a_real_server(server: str) -> None:
    answer = httpx.get(f"{server}/tiny/1-demo/4", headers={"accept-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"


def test_the_web_never_imports_torch() -> None:
    code = "import app.main, sys; sys.exit('torch' in sys.modules or 'workers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
