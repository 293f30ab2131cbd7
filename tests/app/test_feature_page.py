"""What the feature page says and costs, from the real application on the small catalog."""

from __future__ import annotations

import dataclasses
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from sqlalchemy import delete, event, select
from starlette.testclient import TestClient

from app import db
from app.evidence import Effect, Silent, pack, pack_effects
from app.main import create_app
from app.settings import Settings
from app.tables import Corpus, Evidence, Harvest, Source
from app.web import preview
from tests.app.conftest import Live
from tests.app.test_team_mode import routes_of
from tests.conftest import live_evidence
from tests.tiny import D_SAE

PATH = "/tiny/1-demo/4"


def text(client: TestClient, path: str, **headers: str) -> str:
    answer = client.get(path, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.text


def change(client: TestClient, **fields: object) -> None:
    """Give feature 4 other evidence."""
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        row = session.execute(select(Evidence).where(Evidence.index == 4)).scalar_one()
        effects = fields.pop("effects", None)
        row.blob = pack(replace(live_evidence(4), **fields))  # type: ignore[arg-type]
        row.effects = pack_effects(effects) if effects else None  # type: ignore[arg-type]


def second_harvest(client: TestClient, state: str = "complete") -> int:
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        corpus = Corpus(name="second", hash="c0", n_documents=2, n_chars=100, about="")
        session.add(corpus)
        session.flush()
        source = session.execute(select(Source).where(Source.name == "1-demo")).scalar_one()
        summary = {"progress": {"done": 3, "total": 12}} if state == "partial" else {}
        harvest = Harvest(
            source_id=source.id, corpus_id=corpus.id, tokenizer_hash="tok", context_size=8, bos_token_id=0,
            n_tokens=5000, summary=summary, state=state,
        )  # fmt: skip
        session.add(harvest)
        session.flush()
        session.add(Evidence(harvest_id=harvest.id, index=4, blob=pack(replace(live_evidence(4), n_tokens=5000))))
        return harvest.id


def test_the_choice_of_evidence_is_offered_kept_and_undone(client: TestClient) -> None:
    assert 'aria-label="Evidence"' not in text(client, PATH)
    other = second_harvest(client)
    assert f'href="{PATH}?evidence={other}"' in text(client, PATH)
    page = text(client, f"{PATH}?evidence={other}")
    assert "104 of 5,000" in page
    assert f'href="{PATH}"' in page
    assert f'href="/tiny/1-demo/5?evidence={other}"' in page
    assert client.get(f"{PATH}?evidence=999").status_code == 404


def test_partial_evidence_says_how_far_it_is(client: TestClient) -> None:
    other = second_harvest(client, "partial")
    assert "Evidence so far: 3 of 12 shards are read, 5,000 tokens" in text(client, f"{PATH}?evidence={other}")


def test_a_page_with_several_harvests_and_near_misses_still_costs_two_queries(client: TestClient) -> None:
    change(client, hard_negatives=(Silent(1, 3, 6),))
    second_harvest(client)
    queries: list[str] = []
    event.listen(client.app.state.engine, "before_cursor_execute", lambda *a: queries.append(a[2]))  # type: ignore[attr-defined]
    text(client, PATH)
    assert len(queries) == 2


def test_contexts_without_an_activation_say_why_they_are_shown(client: TestClient) -> None:
    change(client, silent=(Silent(2, 3),), hard_negatives=(Silent(1, 3, 6),))
    page = text(client, PATH)
    assert "Near misses" in page
    assert 'href="/tiny/1-demo/6">6</a> label number 6' in page
    assert "Drawn at random" in page
    assert 'class="looked" title="0 · position 3 · token' in page
    assert "harbour" in text(client, f"{PATH}/context/1")


def test_causal_effects_stand_below_their_example_and_say_what_they_are(client: TestClient) -> None:
    assert "percentage points" not in text(client, PATH)
    effect = Effect(0, 2, 0.25, 0.125, ((9, 0.5),), ((10, -0.25),))
    change(client, effects=(effect,))
    assert "next" not in text(client, f"{PATH}?width=5").partition('class="effect"')[2].partition("</p>")[0]
    change(client, effects=(dataclasses.replace(effect, n_later=8, later_loss_change=-0.0625, later_kl=0.03125),))
    page = text(client, PATH)
    assert "next 8 tokens: loss −0.062 KL 0.031" in page
    assert "loss +0.250 nats" in page
    assert "votes for <code" in page
    assert "changes of a token's probability in percentage points" in page
    assert "+50.0" in page
    assert "−25.0" in page
    assert "&lt;script&gt;alert(1)" in page


def test_skew_and_kurtosis_are_shown_where_they_are_known(client: TestClient) -> None:
    assert "kurtosis" not in text(client, PATH)
    change(client, logits_skew=-0.5, logits_kurtosis=3.5)
    page = text(client, PATH)
    assert "−0.500" in page
    assert "3.50" in page


def test_the_vector_comes_as_numpy_reads_it(client: TestClient) -> None:
    answer = client.get(f"{PATH}/vector.npy")
    assert 'filename="tiny-1-demo-4.npy"' in answer.headers["content-disposition"]
    row = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert (row.dtype, row.tolist()) == (np.float32, [4.0, 1.0, 0.5])
    assert client.get(f"{PATH}/vector.json").json()["values"] == [4.0, 1.0, 0.5]


def test_the_page_names_the_settings_of_its_sae(client: TestClient) -> None:
    assert "<dt>k</dt><dd>2</dd>" in text(client, PATH)


@pytest.mark.parametrize(
    ("asked", "led"),
    [
        ({"to": "12", "width": "5"}, "/tiny/1-demo/12?width=5"),
        ({"to": "12", "at": "2-plain"}, "/tiny/2-plain/12"),
        ({"to": "12", "at": "2-plain", "evidence": "1"}, "/tiny/2-plain/12"),
        ({"to": "", "at": "2-plain"}, "/tiny/2-plain"),
        ({"to": "4000", "at": "2-plain"}, "/tiny/2-plain"),
        ({"to": "12", "at": "/tiny"}, "/tiny"),
    ],
)
def test_the_selector_leads_to_sources_models_and_indices(client: TestClient, asked: dict[str, str], led: str) -> None:
    answer = client.get("/tiny/1-demo/jump", params=asked, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (302, led)


def test_the_selector_offers_the_models_sources(client: TestClient) -> None:
    page = text(client, PATH)
    assert "<option selected>1-demo</option>" in page
    assert "<option>2-plain</option>" in page


SCRIPTS = {
    "他被埋葬": "CJK",
    "похороны": "Cyrillic",
    "ταφή": "Greek",
    "دفن": "Arabic",
    "お墓": "Hiragana",
    "무덤": "Hangul",
}


@pytest.mark.parametrize("word", SCRIPTS)
def test_no_word_is_a_row_of_empty_boxes_in_the_picture(word: str) -> None:
    """Whatever typefaces this machine has; without any, the script is named in the letters that there are."""
    drawn, font = preview.typeset(f" {word}", preview._fonts(36))
    assert all(preview._has(font, character) for character in drawn)
    own = preview._fonts(36)[:1]
    named, font = preview.typeset(f" {word} s", own)
    assert f"[{SCRIPTS[word]}" in named
    assert word not in named
    assert all(preview._has(font, character) for character in named)
    assert preview.typeset("Zürich, café", own)[0] == "Zurich, cafe"


def test_a_link_to_the_page_is_previewed_with_label_example_and_picture(client: TestClient) -> None:
    page = text(client, PATH)
    assert '<meta property="og:title" content="cold harbours in winter · 1-demo/4">' in page
    assert "Active on 10.4 % of tokens, up to 6.00. “The harbour is cold" in page
    assert f'<meta property="og:image" content="http://localhost:3000{PATH}/preview.png">' in page
    pictures = [client.get(f"/tiny/1-demo/{i}/preview.png") for i in (4, 5, 7)]
    assert {p.headers["content-type"] for p in pictures} == {"image/png"}
    drawn = [Image.open(io.BytesIO(p.content)) for p in pictures]
    assert {d.size for d in drawn} == {(1200, 630)}
    assert len({p.content for p in pictures}) == 3


SWITCHES = {
    "embedplots": 'class="chart',
    "embedexplanation": "cold harbours in winter</h1>",
    "embedtest": 'id="try"',
    "embedactivations": 'id="examples"',
    "embedsteer": 'action="/tiny/steer"',
    "embedlink": 'target="_blank" rel="noopener">tiny/1-demo/4',
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_of_an_embedded_page_removes_its_part_and_no_other(client: TestClient, switch: str) -> None:
    page = text(client, f"{PATH}?embed=true&{switch}=false")
    assert {name: sign in page for name, sign in SWITCHES.items()} == {name: name != switch for name in SWITCHES}


def test_only_embedded_pages_may_be_framed_by_others(client: TestClient) -> None:
    policy = "content-security-policy"
    assert "frame-ancestors *" in client.get(f"{PATH}?embed=true").headers[policy]
    for path in (PATH, f"{PATH}?embed=false", f"{PATH}/embed", "/", "/tiny/1-demo?embed=true"):
        assert "frame-ancestors 'self'" in client.get(path).headers[policy]


def test_the_text_of_an_embedded_page_is_run_when_it_loads(client: TestClient) -> None:
    page = text(client, f"{PATH}?embed=true&defaulttesttext=hello")
    assert ">hello</textarea>" in page
    assert 'hx-trigger="submit, load"' in page


def test_the_builders_code_is_escaped_twice_and_names_this_server(client: TestClient) -> None:
    page = text(client, f"{PATH}/embed?part=embedtest&defaulttesttext=%22%3E%3Cscript%3E&height=300")
    assert "&lt;iframe src=&#34;http://localhost:3000/tiny/1-demo/4?embed=true&amp;amp;embedexplanation=false" in page
    assert "<script>" not in page.replace("<script src", "")
    assert client.get(f"{PATH}/embed?height=9999999").status_code == 422


def options(client: TestClient, q: str, here: str = "") -> list[str]:
    return re.findall(r'data-href="([^"]+)"', client.get("/palette", params={"q": q, "here": here}).text)


def test_the_palette_finds_features_by_index_address_and_label(client: TestClient) -> None:
    assert options(client, "12", "/tiny/1-demo/4")[0] == "/tiny/1-demo/12"
    assert options(client, "12", "/") == []
    assert options(client, "2-plain/3")[0] == "/tiny/2-plain/3"
    assert options(client, "https://www.neuronpedia.org/tiny/1-demo/7")[0] == "/tiny/1-demo/7"
    assert options(client, "1-demo/4000") == []
    assert "/tiny/1-demo/4" in options(client, "winter")
    assert "/tiny/2-plain" in options(client, "plain")
    assert "/jobs" in options(client, "jobs")


def test_labels_in_the_palette_are_text(client: TestClient) -> None:
    page = client.get("/palette", params={"q": "alert"}).text
    assert "&lt;script&gt;" in page
    assert "<script>" not in page


def test_a_page_stays_below_60_kB_however_many_tokens_it_shades(client: TestClient) -> None:
    peak = live_evidence(4)
    many = tuple(replace(peak.top[2], context=c) for c in (0, 1, 2) for _ in range(40))
    change(client, top=many)
    page = text(client, PATH)
    assert len(page.encode()) < 60_000
    assert 'hx-trigger="revealed"' in page
    whole = text(client, f"{PATH}?bands=all")
    assert whole.count('class="example"') > page.count('class="example"')


@pytest.mark.parametrize(
    "asked", ["width=7", "scale=dark", "evidence=-1", "evidence=x", "embed=maybe", "defaulttesttext=" + 2001 * "a"]
)
def test_a_choice_that_there_is_not_is_refused_by_name(client: TestClient, asked: str) -> None:
    answer = client.get(f"{PATH}?width=5&{asked}" if "width" not in asked else f"{PATH}?{asked}")
    assert answer.status_code == 422
    assert (
        f"{asked.partition('=')[0]}: Input should be" in answer.text or "defaulttesttext: String should" in answer.text
    )


def test_the_route_tried_first_takes_no_other_page_s_address() -> None:
    routes = list(routes_of(create_app(Settings())))
    (quick,) = (r for r in routes if r.path == "/{model:model}/{source:source}/{index:index}")
    assert quick.path_regex.match("/gpt2-small/8-res-jb/12")
    for route in routes:
        place = "/api" if route.endpoint.__module__.startswith("app.api.") else ""
        address = place + re.sub(r"{[^}]*}", "1", route.path)
        if route is not quick and route.path != "/{model}/{source}/{index}":
            assert not quick.path_regex.match(address), route.path


def test_a_page_that_may_work_later_says_when_and_offers_to_try_again(client: TestClient) -> None:
    with client.app.state.engine.begin() as connection:  # type: ignore[attr-defined]
        connection.exec_driver_sql("DROP TABLE explanations")
    page = client.get(PATH)
    assert (page.status_code, page.headers["retry-after"]) == (503, "5")
    assert 'href="">Try again</a> <span class="muted">in 5 s or so.' in page.text
    assert "sae-atlas doctor" in page.text


def test_the_shades_of_a_text_are_those_of_the_evidence_that_is_shown(live: Live) -> None:
    """Every feature's highest activation is 100 in its row, below what this text has, and 1e9 in other evidence."""
    engine = db.connect(live.settings)
    with db.sessions(engine).begin() as session:
        source = session.scalars(select(Source).where(Source.name == "1-std")).one()
        corpus = Corpus(name="other", hash="c9", n_documents=1, n_chars=1, about="")
        session.add(corpus)
        session.flush()
        harvest = Harvest(
            source_id=source.id, corpus_id=corpus.id, tokenizer_hash="t", context_size=8, bos_token_id=0,
            n_tokens=9, summary={},
        )  # fmt: skip
        session.add(harvest)
        session.flush()
        for index in range(source.d_sae):
            blob = pack(replace(live_evidence(4), max_act=1e9))
            session.add(Evidence(harvest_id=harvest.id, index=index, blob=blob))
        number = harvest.id

    def shades(query: str, index: int) -> list[int]:
        data = {"text": "the cat sat on the mat"}
        answer = live.http.post(f"/tiny/1-std/{index}/try{query}", data=data, headers={"HX-Request": "true"})
        assert f'action="/tiny/1-std/{index}/try{query}"' in answer.text
        return [int(level) for level in re.findall(r'<mark class="a(\d+)"', answer.text)]

    try:
        active = next(index for index in range(D_SAE) if max(shades("", index), default=0) > 1)
        assert max(shades("", active)) > 1
        assert max(shades(f"?evidence={number}", active)) == 1
        assert live.http.post(f"/tiny/1-std/{active}/try?evidence=99999", data={"text": "cat"}).status_code == 404
    finally:
        with db.sessions(engine).begin() as session:
            session.execute(delete(Evidence).where(Evidence.harvest_id == number))
            session.execute(delete(Harvest).where(Harvest.id == number))
            session.execute(delete(Corpus).where(Corpus.name == "other"))
        engine.dispose()
