"""The attribution routes over HTTP: figures against transformers and sae-lens, and refusals in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.app.conftest import Live
from tests.tiny import D_SAE, Tiny

TEXT = "the old clock struck"
ABOUT = {"modelId": "tiny", "source": "1-topk", "text": TEXT}
P = 3


class Truth:
    """The model and the SAE by transformers and sae-lens alone."""

    def __init__(self, tiny: Tiny) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny.model.path)
        self.model: Any = AutoModelForCausalLM.from_pretrained(tiny.model.path, dtype=torch.float32)
        self.sae: Any = SAE.load_from_disk(tiny.topk.path)
        self.ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]])

    @torch.no_grad()
    def logits(self, edit: Any = None) -> torch.Tensor:
        """[pos, d_vocab], with the output of block 1 edited."""

        def change(_module: Any, _args: Any, output: Any) -> Any:
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        handle = self.model.model.layers[1].register_forward_hook(change) if edit else None
        try:
            return self.model(self.ids).logits[0]
        finally:
            if handle:
                handle.remove()

    def loss(self, edit: Any = None) -> float:
        return float(torch.nn.functional.cross_entropy(self.logits(edit)[:-1], self.ids[0, 1:]))


@pytest.fixture(scope="module")
def truth(tiny: Tiny) -> Truth:
    return Truth(tiny)


def post(live: Live, path: str, **changes: Any) -> dict[str, Any]:
    answer = live.post(f"attribution/{path}", ABOUT | changes)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_predictions_are_the_models(live: Live, truth: Truth) -> None:
    body = post(live, "predict", numResults=4)
    values, best = truth.logits().softmax(-1).topk(4)
    assert [[p["id"] for p in at["predictions"]] for at in body["positions"]] == best.tolist()
    for at, wanted in zip(body["positions"], values.tolist(), strict=True):
        assert [p["probability"] for p in at["predictions"]] == pytest.approx(wanted, abs=1e-4)
    losses = [at["loss"] for at in body["positions"]]
    assert losses.pop() is None
    assert sum(losses) / len(losses) == pytest.approx(truth.loss(), abs=1e-4)
    [last] = post(live, "predict", position=-1)["positions"]
    assert last == body["positions"][-1] | {"predictions": last["predictions"]}
    assert len(last["predictions"]) == 5


def test_the_parts_of_a_logit_add_up_to_the_models(live: Live, truth: Truth) -> None:
    logits = truth.logits()
    for named, wanted in (({"token": 7}, logits[P, 7]), ({"token": 7, "against": 9}, logits[P, 7] - logits[P, 9])):
        body = post(live, "direct", position=P, numResults=2, **named)
        parts = [f["value"] for f in body["features"]]
        total = sum(parts) + sum(body[name] for name in ("rest", "bias", "error", "elsewhere", "constant"))
        assert total == pytest.approx(body["logit"], abs=1e-3)
        assert body["cappedLogit"] == pytest.approx(float(wanted), abs=1e-3)
        assert len(parts) == 2
        assert body["token"]["id"] == 7
    likeliest = post(live, "direct")
    assert likeliest["position"] == len(truth.ids[0]) - 1
    assert likeliest["token"]["id"] == int(logits[-1].argmax())


def test_a_token_is_named_by_its_text_too(live: Live) -> None:
    by_text = post(live, "direct", token="t")
    assert by_text["token"]["token"] == "t"
    assert by_text == post(live, "direct", token=by_text["token"]["id"])


def test_taking_a_feature_out_changes_the_logit_by_what_is_said(live: Live, truth: Truth) -> None:
    index = post(live, "gradient", position=P, token=7, numResults=1)["activations"][0]["index"]
    body = post(live, "ablate", position=P, token=7, index=index)

    def without(x: torch.Tensor) -> torch.Tensor:
        return x - truth.sae.encode(x)[..., index, None] * truth.sae.W_dec[index]

    assert body["before"] == pytest.approx(float(truth.logits()[P, 7]), abs=1e-4)
    assert body["after"] == pytest.approx(float(truth.logits(without)[P, 7]), abs=1e-4)
    assert body["change"] == pytest.approx(body["before"] - body["after"])
    assert body["lossAfter"] == pytest.approx(truth.loss(without), abs=1e-4)
    assert body["numActive"] >= 1
    nowhere = post(live, "ablate", position=0, token=7, index=index, ablatedPosition=-1)
    assert nowhere["change"] == pytest.approx(0, abs=1e-6), "a later position is not seen"


def test_the_gradient_of_the_loss_is_that_of_the_model(live: Live, truth: Truth) -> None:
    body = post(live, "gradient", loss=True, numResults=D_SAE)
    assert body["value"] == pytest.approx(truth.loss(), abs=1e-4)
    kept: dict[str, torch.Tensor] = {}

    def keep(_module: Any, _args: Any, output: Any) -> None:
        kept["x"] = output[0] if isinstance(output, tuple) else output
        kept["x"].retain_grad()

    handle = truth.model.model.layers[1].register_forward_hook(keep)
    torch.nn.functional.cross_entropy(truth.model(truth.ids).logits[0, :-1], truth.ids[0, 1:]).backward()
    handle.remove()
    x = kept["x"]
    with torch.no_grad():
        effects = truth.sae.encode(x)[0] * (x.grad[0] @ truth.sae.W_dec.T)  # type: ignore[index]
    for found in body["activations"]:
        assert found["effect"] == pytest.approx(float(effects[found["position"], found["index"]]), rel=1e-2, abs=1e-6)
    for found in body["features"]:
        assert found["effect"] == pytest.approx(float(effects[:, found["index"]].sum()), rel=1e-2, abs=1e-6)


def test_faithfulness_is_what_splicing_by_hand_gives(live: Live, truth: Truth) -> None:
    body = post(live, "faithfulness")

    def put(fresh: Any) -> Any:
        return lambda x: torch.cat([x[:, :1], fresh(x)[:, 1:]], dim=1)

    assert body["numTokens"] == len(truth.ids[0]) - 1
    assert body["lossClean"] == pytest.approx(truth.loss(), abs=1e-4)
    assert body["lossSpliced"] == pytest.approx(truth.loss(put(truth.sae)), abs=1e-3)
    assert body["lossAblated"] == pytest.approx(truth.loss(put(torch.zeros_like)), abs=1e-3)


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ("predict", {"text": ""}, ["empty"]),
        ("predict", {"text": "x" * 4000}, ["4000 bytes", "3000"]),
        ("predict", {"numResults": 101}, ["numResults", "100"]),
        ("predict", {"modelId": "nobody"}, ["nobody"]),
        ("direct", {"source": "9-none"}, ["9-none"]),
        ("direct", {"text": "é!" * 700}, ["tokens", "512"]),
        ("direct", {"position": 999}, ["999", "0 to"]),
        ("direct", {"position": -999}, ["-999", "0 to"]),
        ("direct", {"token": 10**6}, ["1000000", "0 to"]),
        ("direct", {"token": "the qzx"}, ["tokens (", "one is needed"]),
        ("direct", {"numResults": 10**6}, ["numResults", "1000"]),
        ("gradient", {"loss": True, "token": 7}, ["loss", "token"]),
        ("ablate", {"index": D_SAE}, [f"0 to {D_SAE - 1}", f"feature {D_SAE}"]),
        ("ablate", {"index": -1}, ["index"]),
        ("ablate", {"index": 1, "ablatedPosition": 999}, ["999", "0 to"]),
        ("faithfulness", {"text": 7}, ["text"]),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(
    live: Live, path: str, changes: dict[str, Any], words: list[str]
) -> None:
    answer = live.post(f"attribution/{path}", ABOUT | changes)
    assert answer.status_code in (404, 422)
    assert all(word in answer.json()["error"] for word in words), answer.json()["error"]


def test_the_documentation_names_every_route_and_field(live: Live) -> None:
    text = live.http.get("/docs").text
    for name in ("predict", "direct", "gradient", "ablate", "faithfulness"):
        assert f"/api/attribution/{name}" in text
    for field in ("against", "ablatedPosition", "numResults", "prependBos"):
        assert field in text


@pytest.mark.parametrize(
    ("path", "more"),
    [("predict", {}), ("direct", {}), ("gradient", {}), ("ablate", {"index": 3}), ("faithfulness", {})],
)
def test_many_texts_are_answered_one_by_one_and_a_chat_as_its_template_writes_it(
    live: Live, path: str, more: dict[str, Any]
) -> None:
    texts = [TEXT, "rain fell all night"]
    many = post(live, path, text=texts, **more)["results"]
    assert many == [post(live, path, text=text, **more) for text in texts]
    assert many[0] != many[1]
    chat = post(live, path, text=None, messages=[{"role": "user", "content": "the cat"}], **more)
    assert chat == post(live, path, text="user: the cat\nassistant:", **more)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": None}, "Send `text` or `messages`"),
        ({"messages": [{"role": "user", "content": "x"}]}, "Send `text` or `messages`"),
        ({"text": []}, "empty"),
        ({"text": ["x"] * 6}, "6 texts are too many; up to 5"),
        ({"text": ["x", ""]}, "empty"),
        ({"text": None, "messages": []}, "messages"),
        ({"text": None, "messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"text": None, "messages": [{"role": "user", "content": "x" * 3001}]}, "3001 bytes; up to 3000"),
    ],
)
def test_texts_and_chats_that_cannot_be_used_are_refused(live: Live, changes: dict[str, Any], words: str) -> None:
    for path in ("predict", "direct"):
        answer = live.post(f"attribution/{path}", ABOUT | changes)
        assert answer.status_code == 422, answer.text
        assert words in answer.json()["error"]
