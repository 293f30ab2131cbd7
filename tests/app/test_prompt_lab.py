"""The prompt lab over HTTP, with a real worker: what the pages show against sae-lens and transformers."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from app import present, prompts
from app.errors import BadInput
from app.web.prompt.reading import heat_map, plain
from app.web.prompt.state import Lab, lab_of
from tests.app.conftest import Live
from tests.conftest import live_evidence
from tests.tiny import Tiny

TEXT = "the old clock struck"
HTMX = {"HX-Request": "true"}


@pytest.fixture(scope="module")
def acts(tiny: Tiny) -> np.ndarray:
    """[pos, d_sae] of TEXT with its beginning-of-text token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.model.path)
    model = AutoModelForCausalLM.from_pretrained(tiny.model.path, dtype=torch.float32)
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False).input_ids]
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
        return SAE.load_from_disk(tiny.topk.path).encode(hidden)[0].numpy()


@pytest.fixture(autouse=True, scope="module")
def warm(live: Live) -> None:
    """The API waits until an SAE is loaded; a page would say that it loads."""
    for source in ("1-topk", "1-std", "1-bare"):
        key = {"modelId": "tiny", "layer": source, "index": 0}
        assert live.post("activation/new", {"feature": key, "customText": TEXT}).status_code == 200


def page(live: Live, **parameters: Any) -> str:
    answer = live.http.get("/tiny/prompt", params={"sae": "1-topk", "text": TEXT} | parameters)
    assert answer.status_code == 200, answer.text[-2000:]
    return answer.text


def ranked(text: str) -> list[int]:
    table = text[text.index("Features of the text, sorted") :]
    return [int(index) for index in re.findall(r"<code>(\d+)</code>", table)]


def test_features_of_the_text_are_sorted_by_their_maximum(live: Live, acts: np.ndarray) -> None:
    text, best = page(live), acts[1:].max(0)
    expected = [i for i in np.argsort(-best).tolist() if best[i] > 0]
    assert ranked(text) == expected
    assert f">{present.amount(float(best.max()))}</span>" in text


def test_features_are_sorted_by_their_sum_over_chosen_tokens(live: Live, acts: np.ndarray) -> None:
    sums = acts[[2, 4]].sum(0)
    found = ranked(page(live, sort="sum", select="2,4"))
    expected = [i for i in np.argsort(-sums).tolist() if sums[i] > 0]
    assert found[: len(expected)] == expected


def test_dense_features_are_left_out(live: Live, acts: np.ndarray) -> None:
    found = ranked(page(live, below="0.01"))
    assert found
    assert all(index % 2 for index in found), "even ones are dense"


def test_the_first_token_counts_only_when_asked(live: Live, acts: np.ndarray) -> None:
    for bos, values in (("", acts[1:]), ("keep", acts)):
        best = values.max(0)
        assert ranked(page(live, bos=bos)) == [i for i in np.argsort(-best).tolist() if best[i] > 0]
    assert acts.max(0).tolist() != acts[1:].max(0).tolist()


def test_a_token_shows_its_features_with_their_part_in_the_logit(live: Live, acts: np.ndarray) -> None:
    text = page(live, at="3")
    table = text[text.index("Features active on this token") : text.index("Features of the text, sorted")]
    order = [i for i in np.argsort(-acts[3]).tolist() if acts[3, i] > 0]
    assert [int(index) for index in re.findall(r"<code>(\d+)</code>", table)] == order
    assert "adds to the logit of the likeliest next token" in table
    assert len(re.findall(r'<td class="n" data-th="logit">[+-]\d+\.\d{3}</td>', table)) == len(order)


@pytest.mark.parametrize("by", ["total", "l0", "error"])
def test_tokens_are_shaded_by_figures_of_the_whole_sae(live: Live, acts: np.ndarray, by: str) -> None:
    words = {"total": "all activations together", "l0": "features active", "error": "of the squared norm is missed"}
    text = page(live, by=by)
    assert text.count(words[by]) == len(acts) - 1
    if by == "total":
        assert f"all activations together {present.amount(float(acts[2].sum()))} · position 2" in text


def test_the_shown_parts_of_a_logit_add_up_to_it(live: Live) -> None:
    text = page(live, view="next", at="3", token="#7", against="#9")
    logit = float(re.search(r"Logit <strong>(-?[\d.]+)</strong>", text)[1])  # type: ignore[index]
    table = text[text.index("Parts of the logit") : text.index("all parts together")]
    *parts, total = [float(n) for n in re.findall(r'<td class="n">([+-][\d.]+)</td>', table)]
    assert sum(parts) == pytest.approx(total, abs=2e-3)
    assert total == pytest.approx(logit, abs=1e-3)
    for words in ("later layers: what is written after", "error: what the SAE misses", "the SAE&#39;s bias"):
        assert words in table


def test_a_feature_is_taken_out_and_the_true_change_stands_beside_the_estimates(live: Live, acts: np.ndarray) -> None:
    latent = int(acts[3].argmax())
    text = page(live, view="next", at="3", ablate=str(latent))
    for words in ("true change", "by gradient", "by direct part", "mean loss"):
        assert words in text
    assert "It is not active on this text" in page(live, view="next", at="3", ablate=str(int(acts.max(0).argmin())))
    sloped = page(live, view="next", at="3", how="gradient")
    assert "do not add up to the logit" in sloped
    first = '<span class="muted">0</span>'
    assert first not in sloped, "the first token does not count"
    assert first in page(live, view="next", at="3", how="gradient", bos="keep")


def test_a_target_is_named_by_text_that_is_one_token(live: Live) -> None:
    assert "Why" in page(live, view="next", at="3", token="t")
    answer = live.http.get(
        "/tiny/prompt", params={"sae": "1-topk", "text": TEXT, "view": "next", "at": "3", "token": "the qzx"}
    )
    assert answer.status_code == 422
    assert "tokens (" in answer.text


def test_how_much_of_the_text_survives(live: Live) -> None:
    text = page(live, view="faithful")
    for words in ("explained variance", "cosine", "loss, clean", "loss, spliced", "loss, ablated"):
        assert words in text


@pytest.mark.parametrize("sort", ["density", "loss", "quantile"])
def test_other_orders_hold_the_same_features(live: Live, sort: str) -> None:
    assert sorted(ranked(page(live, sort=sort))) == sorted(ranked(page(live)))


def test_several_saes_are_read_together_and_drawn_by_layer(live: Live) -> None:
    params = {"sae": ["1-topk", "1-std"], "text": TEXT, "view": "layers", "by": "l0", "on": "1-std", "pin": "1-topk:3"}
    text = live.http.get("/tiny/prompt", params=params).text
    assert '"ticktext":["1-topk","1-std"]' in text
    assert "<code>1-topk:3</code>" in text
    refused = live.http.get("/tiny/prompt", params={"sae": ["1-topk", "1-bare"], "text": TEXT})
    assert refused.status_code == 422
    assert "choose SAEs of one kind" in refused.text
    assert live.http.get("/tiny/prompt", params={"sae": "9-none", "text": TEXT}).status_code == 404


def test_all_layers_of_a_set_are_chosen_by_one_name(live: Live) -> None:
    text = live.http.get("/tiny/prompt", params={"sae": "*-topk", "text": TEXT}).text
    assert "Features of the text, sorted" in text


def test_many_texts_are_strips_and_one_of_them_is_looked_at(live: Live) -> None:
    text = page(live, kind="lines", text="the cat\n\nrain fell\nthe dog ran", nr="3", at="1")
    assert text.count('data-tokens="') == 3
    assert text.count('class="numbered now"') == 1
    too_many = live.http.get("/tiny/prompt", params={"kind": "lines", "text": "a\n" * 6, "sae": "1-topk"})
    assert too_many.status_code == 422
    assert "6 texts are too many; up to 5" in too_many.text


def test_a_file_of_lines_takes_the_place_of_the_text(live: Live) -> None:
    sent = live.http.post(
        "/tiny/prompt",
        data={"sae": "1-topk", "text": "old", "kind": "lines"},
        files={"file": ("a.txt", "the cat\nrain fell\n".encode("utf-8-sig"))},
        follow_redirects=True,
    )
    assert sent.status_code == 200
    assert sent.text.count('data-tokens="') == 2
    assert "the cat\nrain fell" in sent.text
    broken = live.http.post("/tiny/prompt", data={"sae": "1-topk"}, files={"file": ("a.txt", b"\xff\xfe\x00")})
    assert broken.status_code == 422


def test_without_scripts_a_form_leads_to_the_address_that_holds_its_state(live: Live) -> None:
    sent = live.http.post("/tiny/prompt", data={"sae": "1-topk", "text": TEXT, "go": "at=2.5&view=grid"})
    assert sent.status_code == 303
    assert sent.headers["location"] == "/tiny/prompt?" + "&".join(
        f"{name}={value}"
        for name, value in (("text", TEXT.replace(" ", "+")), ("sae", "1-topk"), ("at", "2.5"), ("view", "grid"))
    )
    assert "Shaded by" in live.http.get(sent.headers["location"]).text
    part = live.http.post("/tiny/prompt", data={"sae": "1-topk", "text": TEXT, "go": "at=2"}, headers=HTMX)
    assert part.headers["hx-push-url"].endswith("&at=2")
    assert part.text.lstrip().startswith('<div id="reading"')


def test_a_kept_prompt_shows_the_same_at_an_address_of_its_own(live: Live) -> None:
    state = {"sae": "1-topk", "text": TEXT, "at": "2", "sort": "sum"}
    kept = live.http.post("/tiny/prompt/save", data=state)
    assert kept.status_code == 303
    again = live.http.get(kept.headers["location"])
    assert again.status_code == 200
    assert ranked(again.text) == ranked(page(live, at="2", sort="sum"))
    assert "may differ" not in again.text
    assert live.http.post("/tiny/prompt/save", data={"text": "  "}).status_code == 422
    assert live.http.get("/tiny/prompt/nobody").status_code == 404


def test_old_addresses_lead_to_the_new_one(live: Live) -> None:
    answer = live.http.get("/tiny/1-topk/prompt?text=a+b&at=1.3")
    assert answer.status_code == 307
    assert answer.headers["location"] == "/tiny/prompt?text=a+b&sae=1-topk&at=1.3"


def test_a_chat_is_read_as_the_models_template_writes_it(live: Live, tiny: Tiny) -> None:
    said = {"role": ["user", "assistant"], "say": ["the cat", "rain fell"]}
    answer = live.http.get("/tiny/prompt", params={"kind": "chat", "sae": "1-topk"} | said)
    assert answer.status_code == 200
    tokenizer = AutoTokenizer.from_pretrained(tiny.model.path)
    messages = [{"role": role, "content": say} for role, say in zip(*said.values(), strict=True)]
    written = str(tokenizer.apply_chat_template(messages, tokenize=False)).removeprefix(str(tokenizer.bos_token))
    strip = answer.text[answer.text.index('data-tokens="1"') :].partition("</div>")[0]
    shown = re.sub(r"<i class=.(?:special|br).>[^<]*</i>", "", strip).partition(">")[2]
    assert unescape(re.sub(r"<[^>]+>", "", shown)).replace("↵", "\n") == written


def test_buttons_change_one_thing_of_the_state() -> None:
    lab = lab_of({"text": ["a"], "pin": ["1-x:3"], "view": ["grid"], "go": ["toggle=1-x:4"]})
    assert lab.pin == ("1-x:3", "1-x:4")
    assert lab_of(lab.parameters() | {"go": ["toggle=1-x:3"]}).pin == ("1-x:4",)
    assert lab_of(lab.parameters()) == lab, "an address says all"
    assert lab_of({"go": ["token=%2312&at=4.7"]}).token == "#12"
    assert lab_of({"view": ["<x>"], "nr": ["-4"], "below": ["nan"], "at": ["zz"]}).limit == 1.0
    with pytest.raises(BadInput, match="21 features are pinned; up to 20"):
        lab_of({"pin": [f"1-x:{n}" for n in range(21)]})


@pytest.mark.parametrize(
    ("select", "words"), [("a", "no range"), ("3-1", "3-1"), ("2-9", "0 to 4"), ("99999999", "no range")]
)
def test_tokens_that_cannot_be_chosen_are_named(select: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Lab(select=select).selected(5)
    assert Lab(select="1-2, 4").selected(5) == [1, 2, 4]


def test_words_in_heat_maps_are_no_markup() -> None:
    figure = heat_map([[1.0]], ["<img onerror=x>\u202e\n"], ["`<b>` & $x$"], "activation")
    assert figure["layout"]["xaxis"]["ticktext"] == ["&lt;img onerro…"]
    assert plain("\u202e\n$", 30) == "U+202E↵&#36;"
    hover = "&lt;b&gt; &amp; &#36;x&#36;<br>&lt;img onerro… · position 0<br>activation 1.00"
    assert figure["data"][0]["text"] == [[hover]]


def test_tokens_of_spaces_are_seen_in_heat_maps_and_rows_have_a_brief_name() -> None:
    figure = heat_map([[1.0]], ["  "], ["12 fires on ` ` and ` the`"], "activation")
    assert figure["layout"]["xaxis"]["ticktext"] == ["␣␣"]
    assert figure["layout"]["yaxis"]["ticktext"] == ["12 fires on ␣ and  the"]
    assert figure["brief"] == ["12 ␣ and  the"]


def test_a_quantile_is_read_off_the_features_own_histogram() -> None:
    evidence = live_evidence(8)  # counts 0..49 in equal bins over (0, 10]
    counts = np.arange(50)
    assert prompts.quantile(evidence, 10.0) == 1
    assert prompts.quantile(evidence, 2.0) == pytest.approx(counts[:10].sum() / counts.sum())
    assert prompts.quantile(evidence, 2.1) == pytest.approx((counts[:10].sum() + 5) / counts.sum())
    assert prompts.quantile(evidence, 99.0) == 1


def test_a_file_of_texts_is_queued_and_what_cannot_be_read_is_refused(live: Live) -> None:
    def send(content: bytes, **fields: str) -> httpx.Response:
        data = {"source": "1-topk"} | fields
        return live.http.post("/tiny/bulk", data=data, files={"file": ("../texts.jsonl", content)})

    assert live.http.get("/tiny/bulk").status_code == 200
    sent = send(b'{"text": "the cat"}\n{"text": "rain"}')
    assert sent.status_code == 303
    job = sent.headers["location"]
    assert "Encode " in live.http.get(job).text
    assert live.http.get(f"/tiny/bulk/{job.rpartition('/')[2]}").status_code == 404, "it is not done yet"
    kept = len(list((live.settings.data_dir / "uploads").iterdir()))
    for answer, words in (
        (send(b'{"body": 1}'), "has no column &#39;text&#39;; it has body"),
        (send(b""), "holds no row"),
        (send(b"{}", output="pickle"), "output"),
        (live.http.post("/tiny/bulk", data={"source": "1-topk"}), "No file was sent"),
    ):
        assert answer.status_code == 422
        assert words in answer.text
    assert len(list((live.settings.data_dir / "uploads").iterdir())) == kept, "a refused file is not kept"
