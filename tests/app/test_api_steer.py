"""Steering over HTTP: both texts, streams, saved runs, limits, and clients that leave."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.app.conftest import Live
from tests.tiny import Tiny

PROMPT = "the old clock struck"


def body(**changes: Any) -> dict[str, Any]:
    feature = {"modelId": "tiny", "layer": "1-topk", "index": "11", "strength": 15}
    usual = {
        "prompt": PROMPT,
        "modelId": "tiny",
        "features": [feature],
        "temperature": 0,
        "n_tokens": 12,
        "freq_penalty": 0,
        "seed": 16,
        "strength_multiplier": 2,
    }
    return usual | changes


def feature(**changes: Any) -> dict[str, Any]:
    return body()["features"][0] | changes


def stream(live: Live, **changes: Any) -> list[dict[str, Any]]:
    with live.http.stream("POST", "/api/steer", json=body(stream=True, **changes)) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]


def waiting(live: Live) -> int:
    transport = httpx.HTTPTransport(uds=str(live.settings.socket_path))
    with httpx.Client(transport=transport, base_url="http://worker") as client:
        return client.get("/status").json()["waiting"]


@pytest.mark.parametrize("slash", ["", "/"])
def test_default_is_transformers_greedy_text_and_steered_differs(live: Live, tiny: Tiny, slash: str) -> None:
    found = live.post("steer" + slash, body()).json()
    tokenizer = AutoTokenizer.from_pretrained(tiny.model.path)
    model = AutoModelForCausalLM.from_pretrained(tiny.model.path, dtype=torch.float32)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(PROMPT, add_special_tokens=False).input_ids]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert found["DEFAULT"] == tokenizer.decode(made[0, ids.shape[1] :], clean_up_tokenization_spaces=False)
    assert found["STEERED"] != found["DEFAULT"]
    assert {"steeredLogProbs", "defaultLogProbs", "id", "shareUrl", "limit"} <= set(found)


def test_strength_zero_is_the_default_text(live: Live) -> None:
    found = live.post("steer", body(features=[feature(strength=0)], temperature=1.0, n_tokens=60)).json()
    assert found["STEERED"] == found["DEFAULT"] != ""


def test_each_event_of_a_stream_is_the_whole_answer_so_far(live: Live) -> None:
    events = stream(live)
    for before, after in pairwise(events):
        assert after["DEFAULT"].startswith(before["DEFAULT"])
        assert after["STEERED"].startswith(before["STEERED"])
    assert len(events) > 12
    assert events[0]["id"] is None
    plain = live.post("steer", body()).json()
    assert [events[-1][k] for k in ("DEFAULT", "STEERED")] == [plain[k] for k in ("DEFAULT", "STEERED")]


def test_events_come_while_the_run_goes_on(live: Live) -> None:
    live.post("steer", body())
    with live.http.stream("POST", "/api/steer", json=body(stream=True, n_tokens=200, temperature=3)) as answer:
        began = time.monotonic()
        times = [time.monotonic() - began for line in answer.iter_lines() if line.startswith("data:")]
    assert times[0] < times[-1] / 3


def test_a_finished_run_is_saved_and_loaded_under_its_address(live: Live) -> None:
    made = live.post("steer", body(n_logprobs=2)).json()
    assert made["shareUrl"] == f"/tiny/steer/{made['id']}"
    loaded = live.post("steer-load", {"steerOutputId": made["id"]}).json()
    assert {k: loaded[k] for k in made} == made
    assert loaded["inputText"] == PROMPT
    assert loaded["features"][0]["saeHash"] == "topk"
    assert (loaded["seed"], loaded["n_tokens"], loaded["steer_method"]) == (16, 12, "SIMPLE_ADDITIVE")


def test_log_probabilities_come_when_asked_for(live: Live) -> None:
    found = live.post("steer", body(n_logprobs=3)).json()
    assert "".join(entry["token"] for entry in found["defaultLogProbs"]) or found["defaultLogProbs"]
    entry = found["steeredLogProbs"][0]
    assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])
    assert len(entry["top_logprobs"]) == 3
    assert live.post("steer", body()).json()["steeredLogProbs"] is None


@pytest.mark.parametrize("method", ["ORTHOGONAL_DECOMP", "PROJECTION_CAP"])
def test_the_other_methods_change_the_text(live: Live, method: str) -> None:
    found = live.post("steer", body(steer_method=method, features=[feature(strength=-5)])).json()
    assert found["STEERED"] != found["DEFAULT"]


def test_a_seed_repeats_itself(live: Live) -> None:
    first, again, other = (live.post("steer", body(temperature=1, seed=s)).json()["STEERED"] for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, ["empty"]),
        ({"prompt": "x" * 4000}, ["4000", "3000"]),
        ({"n_tokens": 10**6}, ["1000000", "200"]),
        ({"n_tokens": 0}, ["n_tokens"]),
        ({"temperature": -1}, ["temperature"]),
        ({"features": [feature(strength=1e9)]}, ["1e+09", "1e+06"]),
        ({"strength_multiplier": 1e9}, ["1e+09", "1e+06"]),
        ({"features": [feature()] * 10_000}, ["10000", "32"]),
        ({"features": [feature(index=-1)]}, ["-1"]),
        ({"features": [feature(index=40)]}, ["0 to 39"]),
        ({"features": [feature(modelId="other")]}, ["other", "tiny"]),
        ({"modelId": "nobody", "features": []}, ["nobody"]),
        ({"steer_method": "MAGIC"}, ["steer_method"]),
        ({"n_logprobs": 99}, ["n_logprobs"]),
        ({"seed": 2**70}, ["seed"]),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_be_used_is_refused_in_words(
    live: Live, changes: dict[str, Any], words: list[str], streamed: bool
) -> None:
    answer = live.post("steer", body(stream=streamed, **changes))
    assert answer.status_code in (404, 422)
    assert answer.json()["error"] == answer.json()["message"]
    assert all(word in answer.json()["error"] for word in words), answer.json()


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["strength", "temperature", "strength_multiplier", "freq_penalty"])
def test_numbers_that_are_none_are_refused(live: Live, literal: str, field: str) -> None:
    asked = body(features=[feature(strength="@")]) if field == "strength" else body(**{field: "@"})
    raw = json.dumps(asked).replace('"@"', literal)
    answer = live.http.post("/api/steer", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert field in answer.json()["error"]


def test_a_run_that_is_not_saved_is_not_found(live: Live) -> None:
    for id_ in ("nothing", "", "x" * 5000, "\x00", "../../etc/passwd"):
        answer = live.post("steer-load", {"steerOutputId": id_})
        assert answer.status_code == 404
        assert answer.json()["error"]


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_the_worker(live: Live, streamed: bool) -> None:
    raw = json.dumps(body(stream=streamed, n_tokens=200, temperature=5)).encode()
    head = f"POST /api/steer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}\r\n"
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as client:
        client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + raw)
        until(lambda: waiting(live) == 1)
    # The run would take the tiny model about a second.
    assert until(lambda: waiting(live) == 0) < 0.3


def until(condition: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 5
        time.sleep(0.005)
    return time.monotonic() - began
