"""What the steering lab asks beyond texts: next tokens, scores, sweeps, presets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from app import sweeps
from app.sweeps import Point
from tests.app.conftest import Live
from tests.app.test_api_steer import body, chat, feature, lines
from tests.tiny import Tiny


def test_the_next_token_is_where_the_run_goes(live: Live) -> None:
    found = live.post("steer/next", body(n_top=6)).json()["tokens"]
    run = lines(live, n_logprobs=1)
    for row in ("default", "steered"):
        first = next(e for e in run if e["event"] == "token" and e["row"] == row)
        best = max(found, key=lambda t: t[row])
        assert best["id"] == first["id"]
        assert best[row] == pytest.approx(first["logprob"], abs=1e-3)


def test_the_next_token_of_a_conversation(live: Live) -> None:
    asked = chat(features=[feature(strength=0)])
    assert all(t["default"] == t["steered"] for t in live.post("steer/next", asked).json()["tokens"])


def test_scores_are_each_texts_own_log_probabilities_with_and_without_steering(live: Live, tiny: Tiny) -> None:
    events = lines(live, n_logprobs=5)
    scores = live.post("steer/score", {"id": events[-1]["id"]}).json()
    for row in scores["rows"]:
        own = [e["logprob"] for e in events if e["event"] == "token" and e["row"] == row["name"]]
        assert row[row["name"]] == pytest.approx(own, abs=1e-3)
        assert len(row["activations"][0]) == len(own)
        other = "default" if row["name"] == "steered" else "steered"
        assert row[other] != pytest.approx(own, abs=1e-3)
    model = AutoModelForCausalLM.from_pretrained(tiny.model.path, dtype=torch.float32)
    loaded = live.post("steer-load", {"steerOutputId": events[-1]["id"]}).json()
    prompt = loaded["promptIds"]["steered"]
    steered = next(r for r in loaded["rows"] if r["name"] == "steered")
    ids = [*prompt, *(t["id"] for t in steered["tokens"])]
    with torch.no_grad():
        alone = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(alone[n - 1, ids[n]]) for n in range(len(prompt), len(ids))]
    found = next(r for r in scores["rows"] if r["name"] == "steered")["default"]
    assert found == pytest.approx(expected, abs=1e-3)
    assert loaded["scores"] == scores


def test_a_switched_off_feature_is_kept_with_the_run_and_does_nothing(live: Live) -> None:
    events = lines(live, features=[], off=[feature()])
    texts = {
        row: [e["id"] for e in events if e["event"] == "token" and e["row"] == row] for row in ("default", "steered")
    }
    assert texts["default"] == texts["steered"]
    loaded = live.post("steer-load", {"steerOutputId": events[-1]["id"]}).json()
    assert [f["index"] for f in loaded["off"]] == [str(feature()["index"])]


def test_a_saved_runs_tokens_make_up_its_text_where_a_stop_string_cuts_one(live: Live) -> None:
    whole = live.post("steer", body(n_tokens=40)).json()["DEFAULT"]
    events = lines(live, n_tokens=40, stop=[whole[5:7]])
    loaded = live.post("steer-load", {"steerOutputId": events[-1]["id"]}).json()
    for row in loaded["rows"]:
        assert "".join(t.get("text", t["token"]) for t in row["tokens"]) == row["text"]


def test_a_handful_of_strengths_is_answered_at_once(live: Live) -> None:
    axes = [{"feature": 0, "strengths": [0, 10, 60]}]
    found = live.post("steer/sweep", body(axes=axes, features=[feature(layer="1-std")])).json()
    alone, zero, *rest = found["points"]
    assert alone["strengths"] == []
    assert alone["text"] == zero["text"]
    assert alone["perplexity"] == pytest.approx(zero["perplexity"])
    plain = live.post("steer", body(features=[feature(layer="1-std", strength=10)])).json()
    assert rest[0]["text"] == plain["STEERED"]
    loaded = live.post("steer-load", {"steerOutputId": plain["id"]}).json()
    scored = live.post("steer/score", {"id": loaded["id"]}).json()
    row = next(r for r in scored["rows"] if r["name"] == "steered")
    assert rest[0]["perplexity"] == pytest.approx(math.exp(-sum(row["default"]) / len(row["default"])), rel=1e-3)
    assert rest[0]["activation"] == pytest.approx(sum(row["activations"][0]) / len(row["default"]), abs=1e-3)


def test_a_grid_is_every_pair_and_many_texts_are_a_job(live: Live) -> None:
    two = [feature(), feature(layer="1-std", index="3")]
    grid = [{"feature": 0, "strengths": [0, 20]}, {"feature": 1, "strengths": [-5, 0, 5]}]
    found = live.post("steer/sweep", body(features=two, axes=grid)).json()
    assert [p["strengths"] for p in found["points"][1:]] == [[a, b] for a in (0, 20) for b in (-5, 0, 5)]
    job = live.post("steer/sweep", body(axes=[{"feature": 0, "strengths": list(range(9))}])).json()
    page = live.http.get(job["sweepUrl"])
    assert page.status_code == 200
    assert "Sweep of 1-topk/11" in page.text


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ([{"feature": 3, "strengths": [1]}], ["3", "1"]),
        ([{"feature": 0, "strengths": [1e9]}], ["1e+09"]),
        ([{"feature": 0, "strengths": list(range(40))}] * 2, ["1600", "400"]),
        ([], ["axes"]),
    ],
)
def test_a_sweep_that_cannot_be_made_is_refused(live: Live, axes: list[dict[str, Any]], words: list[str]) -> None:
    answer = live.post("steer/sweep", body(axes=axes))
    assert answer.status_code == 422
    assert all(word in answer.json()["error"] for word in words), answer.json()


def made(strength: float, perplexity: float, activation: float, repetition: float = 0.0) -> Point:
    strengths = [] if strength == 0 else [strength]
    return Point(strengths=strengths, text="", perplexity=perplexity, activation=activation, repetition=repetition)


def test_the_suggested_strength_is_the_strongest_fluent_one() -> None:
    found = [made(0, 10, 1), made(5, 11, 3), made(10, 14, 6), made(20, 40, 30), made(15, 12, 8, repetition=0.9)]
    suggestion = sweeps.suggest(found)
    assert suggestion is not None
    assert suggestion.strengths == [10]
    assert sweeps.suggest([made(0, 10, 1), made(5, 11, 0.5)]) is None


def test_repetition_is_the_share_of_trigrams_seen_before() -> None:
    assert sweeps.repetition([1, 2, 3, 4, 5, 6, 7]) == 0
    assert sweeps.repetition([1, 2, 3] * 4) == pytest.approx(0.7)
    assert sweeps.repetition([1]) == 0


def test_a_preset_keeps_its_address_when_it_is_saved_again(live: Live) -> None:
    settings = body(temperature=0.25)
    first = live.post("steer/presets", {"modelId": "tiny", "name": "mine", "settings": settings}).json()
    again = live.post(
        "steer/presets", {"modelId": "tiny", "name": "mine", "settings": settings | {"prompt": "rain fell"}}
    ).json()
    assert again["id"] == first["id"]
    page = live.http.get(first["url"]).text
    assert "rain fell" in page
    assert 'value="0.25"' in page
    assert 'data-source="1-topk" data-index="11"' in page
    live.post("steer/presets/delete", {"modelId": "tiny", "id": first["id"]})
    assert live.http.get(first["url"]).status_code == 404
