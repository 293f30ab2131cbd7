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
from neuronpedia.np_vector import NPVector
from neuronpedia.requests.base_request import NPRequest
from neuronpedia.requests.steer_request import SteerCompletionRequest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.app.conftest import Live
from tests.tiny import D_IN, Tiny

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


def lines(live: Live, **changes: Any) -> list[dict[str, Any]]:
    with live.http.stream("POST", "/api/steer/stream", json=body(**changes)) as answer:
        assert answer.status_code == 200, answer.read()
        return [json.loads(line) for line in answer.iter_lines()]


def texts(events: list[dict[str, Any]]) -> dict[tuple[str, int], str]:
    found: dict[tuple[str, int], str] = {}
    for event in events:
        if event["event"] == "token":
            key = (event["row"], event["sample"])
            found[key] = found.get(key, "") + event["text"]
    return found


def test_the_json_lines_send_each_token_once_and_say_where_the_run_is_kept(live: Live) -> None:
    events = lines(live, n_logprobs=2)
    assert [events[0]["event"], events[-1]["event"]] == ["start", "end"]
    assert "".join(events[0]["prompts"]["steered"][1:]) == PROMPT
    loaded = live.post("steer-load", {"steerOutputId": events[-1]["id"]}).json()
    found = texts(events)
    for name, row in (("STEERED", "steered"), ("DEFAULT", "default")):
        # A character that is never completed is written out at the end of the run alone.
        assert loaded[name].startswith(found[row, 0].rstrip("\ufffd"))
    assert len(events) == 2 + sum(len(row["tokens"]) for row in loaded["rows"])
    assert loaded["dtype"] == "float32"
    assert loaded["modelHash"]


def test_samples_and_controls_grow_beside_the_steered_text(live: Live) -> None:
    controls = ["random_direction", "random_feature"]
    events = lines(live, temperature=1, n_samples=2, controls=controls, n_tokens=30)
    found = texts(events)
    assert set(found) == {(row, n) for row in ("default", "steered", *controls) for n in (0, 1)}
    assert len({found[row, 0] for row in ("default", "steered", *controls)}) == 4
    assert found["steered", 0] != found["steered", 1]
    again = texts(lines(live, temperature=1, n_samples=2, controls=controls, n_tokens=30))
    assert again == found


def test_controls_without_strength_are_the_default_text(live: Live) -> None:
    found = texts(lines(live, features=[feature(strength=0)], controls=["random_direction", "random_feature"]))
    assert len(set(found.values())) == 1


@pytest.mark.parametrize("operation", ["clamp", "scale", "ablate", "orthogonal", "cap"])
def test_a_feature_has_an_operation_and_positions_of_its_own(live: Live, operation: str) -> None:
    strength = -8 if operation in ("cap", "scale") else 40
    one = feature(strength=strength, operation=operation, layer="1-std")
    found = live.post("steer", body(features=[one], n_tokens=20)).json()
    assert found["STEERED"] != found["DEFAULT"]
    nowhere = live.post("steer", body(features=[{**one, "positions": "chosen", "at": []}])).json()
    assert nowhere["STEERED"] == nowhere["DEFAULT"]


def test_a_text_ends_before_a_stop_string(live: Live) -> None:
    whole = live.post("steer", body(n_tokens=40)).json()["DEFAULT"]
    stop = whole[5:7]
    assert live.post("steer", body(n_tokens=40, stop=[stop])).json()["DEFAULT"] == whole[: whole.index(stop)]


def chat(**changes: Any) -> dict[str, Any]:
    said = [{"role": "user", "content": "why"}]
    usual = {key: value for key, value in body().items() if key != "prompt"}
    return usual | {"defaultChatMessages": said, "steeredChatMessages": said, "steer_special_tokens": True} | changes


def test_a_conversation_goes_on_in_two_ways(live: Live) -> None:
    other = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    found = live.post("steer-chat", chat(steeredChatMessages=other)).json()
    assert found["DEFAULT"]["raw"].startswith("<bos>user: why\nassistant:")
    assert found["STEERED"]["raw"].startswith("<bos>user: the cat\nassistant: sat\nassistant:")
    assert [m["role"] for m in found["STEERED"]["chatTemplate"]] == ["user", "assistant", "assistant"]
    plain = live.post("steer", body(prompt="user: why\nassistant:", n_tokens=12)).json()
    assert found["DEFAULT"]["chatTemplate"][-1]["content"] == plain["DEFAULT"]
    assert found["settings"]["temperature"] == 0
    assert live.post("steer-load", {"steerOutputId": found["id"]}).json()["inputText"] == "sat"


def test_a_streamed_conversation_ends_like_a_plain_one(live: Live) -> None:
    with live.http.stream("POST", "/api/steer-chat/", json=chat(stream=True)) as answer:
        events = [json.loads(line[5:]) for line in answer.iter_lines() if line.startswith("data:")]
    plain = live.post("steer-chat", chat()).json()
    assert [events[-1][k] for k in ("DEFAULT", "STEERED")] == [plain[k] for k in ("DEFAULT", "STEERED")]
    assert len(events) > 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defaultChatMessages": []}, "defaultChatMessages"),
        ({"steeredChatMessages": [{"role": "oracle", "content": "x"}]}, "no oracles"),
    ],
)
def test_a_conversation_that_cannot_be_written_is_refused(live: Live, changes: dict[str, Any], words: str) -> None:
    answer = live.post("steer-chat", chat(**changes))
    assert answer.status_code == 422
    assert words in answer.json()["error"]


def test_the_official_client_makes_steers_with_lists_and_deletes_vectors(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NPRequest, "BASE_URL", f"{live.url}/api")
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "any value")
    row = live.post("vector/get", {"modelId": "tiny", "source": "1-topk", "index": "11"}).json()["vector"]["vector"]
    made = NPVector.new("cats", "tiny", 1, "hook_resid_post", row, 15.0)
    assert NPVector.get("tiny", made.source, made.index) == made
    assert made in NPVector.get_owned()
    asked: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "n_tokens": 12, "freq_penalty": 0}
    steered: Any = SteerCompletionRequest().steer("tiny", [made], strength_multiplier=2, **asked)
    assert steered["STEERED"] == live.post("steer", body()).json()["STEERED"]
    talked: Any = made.steer_chat([{"role": "user", "content": "why"}])
    assert talked["STEERED"]["chatTemplate"][-1]["role"] == "assistant"
    made.delete()
    assert made not in NPVector.get_owned()


def test_a_difference_of_texts_becomes_a_vector(live: Live) -> None:
    asked = {"modelId": "tiny", "layerNumber": 1, "plus": ["the cat sat"], "minus": ["rain fell", "bread and iron"]}
    made = live.post("vector/difference", asked).json()
    assert len(made["vector"]["values"]) == D_IN
    assert made["vector"]["defaultSteerStrength"] == pytest.approx(made["norm"], abs=1e-3)
    same = live.post("vector/difference", {**asked, "minus": asked["plus"]})
    assert same.status_code == 422
    one = feature(layer=made["vector"]["source"], index=made["vector"]["index"])
    found = live.post("steer", body(features=[one])).json()
    assert found["STEERED"] != found["DEFAULT"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vector": [1.0] * 23}, ["23", "24"]),
        ({"vector": [0.0] * 24}, ["zeros"]),
        ({"layerNumber": 7}, ["blocks.7"]),
        ({"hookType": "hook_magic"}, ["hookType"]),
        ({"modelId": "nobody"}, ["nobody"]),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(live: Live, changes: dict[str, Any], words: list[str]) -> None:
    usual = {"modelId": "tiny", "layerNumber": 1, "hookType": "hook_resid_post", "vector": [1.0] * 24}
    answer = live.post("vector/new", usual | {"vectorLabel": "x"} | changes)
    assert answer.status_code in (404, 422)
    assert all(word in answer.json()["error"] for word in words), answer.json()
