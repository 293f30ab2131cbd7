"""The official `neuronpedia` client, unmodified but for the port, against a running server."""

from __future__ import annotations

import os
from typing import Any

import pytest

os.environ.setdefault("NEURONPEDIA_API_KEY", "any value")

from neuronpedia.np_feature import SteerFeature
from neuronpedia.np_vector import NPVector
from neuronpedia.requests.activation_request import ActivationRequest
from neuronpedia.requests.base_request import NPRequest
from neuronpedia.requests.source_activation_request import SourceActivationRequest
from neuronpedia.requests.steer_request import SteerCompletionRequest
from neuronpedia.requests.topk_by_token_request import TopKByTokenRequest

from tests.app.conftest import Live

TEXT = "the old clock struck"


@pytest.fixture(autouse=True)
def base(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NPRequest, "BASE_URL", f"{live.url}/api")


def test_activations_of_one_text() -> None:
    activation = ActivationRequest().compute_activation_for_text("tiny", "1-topk", "5", TEXT)
    assert "".join(activation.tokens) == TEXT
    assert len(activation.values) == len(activation.tokens)


def test_activations_of_many_texts() -> None:
    activations = ActivationRequest().compute_activation_for_texts("tiny", "1-topk", "5", [TEXT, "rain fell"])
    assert ["".join(a.tokens) for a in activations] == [TEXT, "rain fell"]


def test_all_activations_of_a_source() -> None:
    [result] = ActivationRequest().compute_all_source_activations_for_text("tiny", "1-topk", TEXT)
    assert result["activeFeatures"]


def test_top_features_by_token() -> None:
    request = TopKByTokenRequest()
    results = request.compute_top_features_by_token_for_text("tiny", "1-topk", TEXT, num_results=3)
    assert "".join(result.token for result in results) == TEXT
    assert all(len(result.topFeatures) == 3 for result in results)
    several = request.compute_top_features_by_token_for_texts("tiny", "1-topk", [TEXT, "rain"], num_results=3)
    assert [r.token for r in several[0]] == [r.token for r in results]
    assert [len(r.topFeatures) for r in several[1]] == [3] * len(several[1])


def test_top_features_of_texts_in_a_source_set() -> None:
    request = SourceActivationRequest()
    found = request.compute_top_features_for_text("tiny", "1-topk", TEXT, num_results=4)
    assert len(found) == 4
    assert "".join(found[0].tokens) == "<bos>" + TEXT
    assert [max(a.values) for a in found] == sorted((max(a.values) for a in found), reverse=True)
    at_two = request.compute_top_features_for_text(
        "tiny", ["1-topk"], TEXT, sort_results_by_activations_at_token_indexes=[2], density_threshold=0.01
    )
    assert all(int(a.index) % 2 and a.values[2] > 0 for a in at_two)
    several = request.compute_top_features_for_texts("tiny", "1-topk", [TEXT, "rain"], num_results=4)
    assert [a.values for a in several[0]] == [a.values for a in found]
    assert {len(a.tokens) for a in several[1]} == {len(several[1][0].values)}


def test_steering_by_features_and_by_vectors() -> None:
    feature = SteerFeature(modelId="tiny", source="1-topk", index=11, strength=15)
    vector = NPVector("label", "tiny", "1-topk", "11", [], "", 15.0)
    asked: dict[str, Any] = {"prompt": TEXT, "temperature": 0, "n_tokens": 8, "freq_penalty": 0}
    by_feature: Any = SteerCompletionRequest().steer_features(model_id="tiny", features=[feature], **asked)
    by_vector: Any = SteerCompletionRequest().steer(model_id="tiny", vectors=[vector], **asked)
    assert by_feature["STEERED"] == by_vector["STEERED"] != by_feature["DEFAULT"]
