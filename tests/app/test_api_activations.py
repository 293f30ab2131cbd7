"""The activation routes over HTTP: values against the SAE on transformers' activations, shapes, limits, faults."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.app.conftest import Live
from tests.tiny import D_SAE, Tiny

TEXT = "the old clock struck"


@pytest.fixture(scope="module")
def expected(tiny: Tiny) -> np.ndarray:
    """[pos, d_sae] activations of TEXT after its beginning-of-text token, from transformers and sae-lens alone."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model.path)
    model = AutoModelForCausalLM.from_pretrained(tiny.model.path, dtype=torch.float32)
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
        return SAE.load_from_disk(tiny.topk.path).encode(hidden)[0].numpy()


def key(index: object = 5, source: str = "1-topk") -> dict[str, Any]:
    return {"modelId": "tiny", "layer": source, "index": index}


@pytest.mark.parametrize("name", ["feature", "neuron"])
def test_one_feature_on_one_text(live: Live, expected: np.ndarray, name: str) -> None:
    latent = int(expected[1:].max(0).argmax())
    body = live.post("activation/new", {name: key(str(latent)), "customText": TEXT}).json()
    np.testing.assert_allclose(body["values"], expected[1:, latent], atol=1e-4)
    assert "".join(body["tokens"]) == TEXT
    assert body["maxValue"] == max(body["values"])
    assert body["values"][body["maxValueTokenIndex"]] == body["maxValue"]
    wire = {"tokens", "values", "maxValue", "minValue", "maxValueTokenIndex", "modelId", "layer", "index"}
    assert wire | {"dataIndex", "dataSource", "createdAt"} <= set(body)


def test_an_sae_trained_without_a_first_token_reads_texts_without_it(live: Live, tiny: Tiny) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.model.path)
    model = AutoModelForCausalLM.from_pretrained(tiny.model.path, dtype=torch.float32)
    ids = torch.tensor([tokenizer(TEXT, add_special_tokens=False).input_ids])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[2]
        acts = SAE.load_from_disk(tiny.topk.path).encode(hidden)[0].numpy()
    latent = int(acts.max(0).argmax())
    body = live.post("activation/new", {"feature": key(latent, "1-bare"), "customText": TEXT}).json()
    np.testing.assert_allclose(body["values"], acts[:, latent], atol=1e-4)
    assert "".join(body["tokens"]) == TEXT


def test_one_feature_on_many_texts_is_an_array(live: Live) -> None:
    body = live.post("activation/new", {"feature": key(3), "customText": [TEXT, "rain fell"]}).json()
    assert ["".join(b["tokens"]) for b in body] == [TEXT, "rain fell"]


def test_all_active_features_of_a_text(live: Live, expected: np.ndarray) -> None:
    body = live.post("activation/source", {"modelId": "tiny", "source": "1-topk", "customText": TEXT}).json()
    [result] = body["results"]
    found = np.zeros_like(expected)
    for index, places in result["activeFeatures"].items():
        for position, value in places:
            found[position, int(index)] = value
    np.testing.assert_allclose(found[1:], expected[1:], atol=1e-4)
    assert found[0].sum() == 0
    assert len(result["tokens"]) == len(expected)


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_top_features_of_each_token(live: Live, expected: np.ndarray, slash: str) -> None:
    asked = {"modelId": "tiny", "source": "1-topk", "text": TEXT, "numResults": 2}
    body = live.post("search-topk-by-token" + slash, asked).json()
    assert body["source"] == "1-topk"
    assert [r["position"] for r in body["results"]] == list(range(1, len(expected)))
    assert "".join(r["token"] for r in body["results"]) == TEXT
    for result in body["results"]:
        assert not result["isSpecial"]
        values = [f["activationValue"] for f in result["topFeatures"]]
        np.testing.assert_allclose(values, np.sort(expected[result["position"]])[::-1][:2], atol=1e-4)


def test_the_first_token_is_there_when_asked_for(live: Live) -> None:
    asked = {"modelId": "tiny", "source": "1-topk", "text": [TEXT], "ignoreBos": False}
    [result] = live.post("search-topk-by-token", asked).json()["results"]
    assert result["source"] == "1-topk"
    assert result["results"][0]["position"] == 0
    assert result["results"][0]["isSpecial"]


def test_dense_features_are_left_out_by_the_threshold(live: Live) -> None:
    asked = {"modelId": "tiny", "source": "1-topk", "text": TEXT, "densityThreshold": 0.01}
    results = live.post("search-topk-by-token", asked).json()["results"]
    indices = {f["featureIndex"] for r in results for f in r["topFeatures"]}
    assert indices
    assert all(index % 2 for index in indices)
    assert results[0]["topFeatures"][0]["feature"]["frac_nonzero"] == pytest.approx(0.001)


def test_a_whole_text_ranks_features_by_their_maximum(live: Live, expected: np.ndarray) -> None:
    asked = {"modelId": "tiny", "sourceSet": "topk", "text": TEXT, "selectedLayers": [], "numResults": 4}
    body = live.post("search-all/", asked).json()
    best = np.argsort(-expected[1:].max(0))[:4]
    assert [int(r["index"]) for r in body["result"]] == best.tolist()
    assert len(body["tokens"]) == len(expected)
    first = body["result"][0]
    assert first["values"][0] == 0
    np.testing.assert_allclose(first["values"][1:], expected[1:, best[0]], atol=1e-4)
    assert first["neuron"]["explanations"] == [{"description": f"feature {best[0]}"}]


def test_chosen_positions_rank_features_by_their_sum_there(live: Live, expected: np.ndarray) -> None:
    asked = {"modelId": "tiny", "sourceSet": "topk", "text": TEXT, "selectedLayers": ["1-topk"], "sortIndexes": [2, 4]}
    body = live.post("search-all", asked).json()
    sums = expected[[2, 4]].sum(0)
    assert [int(r["index"]) for r in body["result"]] == [i for i in np.argsort(-sums).tolist() if sums[i] > 0]
    assert body["sortIndexes"] == [2, 4]


def test_the_nearest_decoder_rows_are_by_cosine(live: Live, tiny: Tiny) -> None:
    asked = {"modelId": "tiny", "source": "1-topk", "index": "4", "targetModelId": "tiny", "targetSourceId": "1-std"}
    body = live.post("cossim", asked).json()
    ours, theirs = (SAE.load_from_disk(sae.path).W_dec.detach() for sae in (tiny.topk, tiny.standard))
    cosines = torch.cosine_similarity(ours[4], theirs, dim=-1)
    top = body["topkDecoderCossimFeatures"]
    assert [t["feature"]["index"] for t in top] == cosines.argsort(descending=True)[:10].tolist()
    assert top[0]["cosineSimilarity"] == pytest.approx(float(cosines.max()), abs=1e-5)


def test_tokens_joined_are_the_text(live: Live) -> None:
    body = live.post("tokenize", {"modelId": "tiny", "prompt": "cafés — 😀", "prependBos": True}).json()
    assert "".join(body["token_strings"]) == "<bos>cafés — 😀"
    assert len(body["tokens"]) == len(body["token_strings"])


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ("activation/new", {"customText": ""}, ["empty"]),
        ("activation/new", {"customText": []}, ["no text"]),
        ("activation/new", {"customText": ["a"] * 6}, ["6 texts", "5"]),
        ("activation/new", {"customText": "x" * 4000}, ["4000 bytes", "3000"]),
        ("activation/new", {"customText": "é!" * 700}, ["tokens", "512"]),
        ("activation/new", {"feature": key(-1)}, ["feature"]),
        ("activation/new", {"feature": key(D_SAE)}, [f"0 to {D_SAE - 1}", f"feature {D_SAE}"]),
        ("activation/new", {"feature": key(2**63)}, ["feature"]),
        ("activation/new", {"feature": key("abc")}, ["abc"]),
        ("activation/new", {"feature": key(1, "9-none")}, ["9-none"]),
        ("activation/new", {"feature": None}, ["feature"]),
        ("activation/new", {"customText": 7}, ["customText"]),
        ("search-topk-by-token", {"numResults": 10**6}, ["numResults"]),
        ("search-all", {"sortIndexes": [999]}, ["sortIndexes", "0 to"]),
        ("search-all", {"selectedLayers": ["8-no"]}, ["8-no", "1-topk"]),
        ("tokenize", {"modelId": "nobody"}, ["nobody"]),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(
    live: Live, path: str, changes: dict[str, Any], words: list[str]
) -> None:
    usual = {
        "activation/new": {"feature": key(), "customText": TEXT},
        "search-topk-by-token": {"modelId": "tiny", "source": "1-topk", "text": TEXT},
        "search-all": {"modelId": "tiny", "sourceSet": "topk", "text": TEXT},
        "tokenize": {"modelId": "tiny", "prompt": TEXT},
    }
    answer = live.post(path, usual[path] | changes)
    assert answer.status_code in (404, 422)
    body = answer.json()
    assert body["error"] == body["message"]
    assert all(word in body["error"] for word in words), body["error"]


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "<eos><bos> are special", "‮evil", "{{7*7}}<script>"])
def test_odd_texts_get_right_results(live: Live, text: str) -> None:
    body = live.post("activation/new", {"feature": key(), "customText": text}).json()
    assert "".join(body["tokens"]) == text
    assert len(body["values"]) == len(body["tokens"])


def test_requests_that_wait_for_the_worker_leave_the_pages_their_connections(live: Live) -> None:
    body = {"feature": key(3), "customText": TEXT}
    assert live.post("activation/new", body).status_code == 200
    live.worker.signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(40) as clients, httpx.Client(base_url=live.url, timeout=60) as http:
            waiting = [clients.submit(http.post, "/api/activation/new", json=body) for _ in range(40)]
            time.sleep(1)
            assert http.get("/tiny", timeout=5).status_code == 200
            assert not any(answer.done() for answer in waiting)
            live.worker.signal(signal.SIGCONT)
            assert [answer.result().status_code for answer in waiting] == [200] * 40
    finally:
        live.worker.signal(signal.SIGCONT)


def test_a_lone_surrogate_is_refused(live: Live) -> None:
    raw = b'{"modelId": "tiny", "prompt": "a\\ud800b"}'
    answer = live.http.post("/api/tokenize", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"]
