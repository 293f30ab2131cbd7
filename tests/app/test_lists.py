"""Lists of features over pages and JSON, on SQLite and Postgres; the official client's and SAELens' ways in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import lists, people
from app.errors import BadInput, NotFound
from app.lists import Key, Visibility
from app.main import create_app
from app.people import LOCAL, Actor, Role
from app.settings import Settings
from tests.app.conftest import Live
from tests.conftest import D_SAE

PUBLIC = "http://localhost:3000"


def keys(*indices: int) -> list[Key]:
    return [Key("tiny", "1-demo", index) for index in indices]


def held(session: Session, found: lists.FeatureList) -> list[int]:
    return [item.index for item in lists.items(session, found)]


def test_a_list_keeps_its_order_and_moves_features(session: Session) -> None:
    made = lists.new(session, LOCAL, "order", features=keys(5, 2, 9))
    assert held(session, made) == [5, 2, 9]
    lists.move(session, made, lists.item(session, made, "tiny", "1-demo", 9), 0)
    assert held(session, made) == [9, 5, 2]
    lists.drop(session, made, lists.item(session, made, "tiny", "1-demo", 5))
    lists.add(session, made, keys(5))
    assert held(session, made) == [9, 2, 5]


def test_a_feature_is_in_a_list_once_and_takes_the_new_note(session: Session) -> None:
    made = lists.new(session, LOCAL, "once", features=[Key("tiny", "1-demo", 3, "first")])
    assert lists.add(session, made, [Key("tiny", "1-demo", 3, "second")]) == []
    assert [item.note for item in lists.items(session, made)] == ["second"]


def test_a_feature_that_does_not_exist_is_refused_and_nothing_is_kept(session: Session) -> None:
    made = lists.new(session, LOCAL, "strict")
    with pytest.raises(NotFound, match=str(D_SAE - 1)):
        lists.add(session, made, keys(1, D_SAE))
    with pytest.raises(NotFound):
        lists.add(session, made, [Key("tiny", "9-none", 0)])
    with pytest.raises(BadInput, match=r"5,001 characters; it may have 5,000"):
        lists.add(session, made, [Key("tiny", "1-demo", 0, "x" * 5001)])


def test_who_sees_and_changes_a_list(session: Session) -> None:
    owner, other = Actor("ada", Role.EDITOR, 1), Actor("bob", Role.EDITOR, 2)
    admin = Actor("eve", Role.ADMIN, 3)
    private = lists.new(session, owner, "mine", visibility=Visibility.PRIVATE)
    team = lists.new(session, owner, "ours")
    link = lists.new(session, owner, "all", visibility=Visibility.LINK)
    assert [lists.may_see(None, x) for x in (private, team, link)] == [False, False, True]
    assert [lists.may_see(other, x) for x in (private, team, link)] == [False, True, True]
    assert [lists.may_change(x, team) for x in (None, other, owner, admin)] == [False, False, True, True]
    assert {s.name for s in lists.seen_by(session, other)} == {"ours"}
    assert {s.name for s in lists.seen_by(session, owner)} == {"mine", "ours", "all"}


def test_a_list_outlives_an_sae_that_is_removed(client: TestClient) -> None:
    made = client.post("/api/list/new-with-features", json={"name": "kept", "features": [FEATURE]}).json()
    assert client.post("/tiny/1-demo/remove", follow_redirects=False).status_code == 303
    page = client.get(f"/lists/{made['id']}")
    assert page.status_code == 200
    assert "tiny/1-demo/3 is not here, or not shown to you" in page.text


FEATURE = {"modelId": "tiny", "layer": "1-demo", "index": "3", "description": "a <b>note</b>"}


def test_the_json_routes_make_fill_annotate_and_delete(client: TestClient) -> None:
    made = client.post("/api/list/new", json={"name": " weekdays ", "description": "d", "testText": "Monday"}).json()
    assert made["name"] == "weekdays"
    key = {"listId": made["id"]}
    added = client.post("/api/list/add-features", json={**key, "featuresToAdd": [FEATURE, {**FEATURE, "index": 1}]})
    assert [row["index"] for row in added.json()] == ["3", "1"]
    client.post("/api/list/edit-feature", json={**key, **FEATURE, "description": "other"})
    client.post("/api/list/remove", json={**key, **FEATURE, "index": 1})
    found = client.post("/api/list/get", json=key).json()
    assert [(n["index"], n["description"]) for n in found["neurons"]] == [("3", "other")]
    assert found["defaultTestText"] == "Monday"
    assert [row["id"] for row in client.post("/api/list/list").json()] == [made["id"]]
    assert client.post("/api/list/delete", json=key).status_code == 200
    gone = client.post("/api/list/get", json=key)
    assert (gone.status_code, gone.json()["error"] == gone.json()["message"]) == (404, True)


@pytest.mark.parametrize(
    "features", ["", "{", "{}", "[1]", '[{"modelId": "tiny"}]', "[" * 5000, json.dumps([{}] * 501)]
)
def test_a_quick_list_that_makes_no_sense_is_refused(client: TestClient, features: str) -> None:
    answer = client.get("/quick-list/", params={"name": "x", "features": features})
    assert answer.status_code == 422


def test_an_address_as_saelens_makes_it_shows_the_list_and_keeps_it(client: TestClient) -> None:
    features = json.dumps([FEATURE, {"modelId": "tiny", "layer": "1-demo", "index": "0"}])
    page = client.get(f"/quick-list/?name={quote('<b>two')}&features={quote(features)}")
    assert page.status_code == 200
    assert "&lt;b&gt;two" in page.text
    assert "harbours and ships" in page.text
    kept = client.post("/quick-list/", data={"name": "two", "features": features}, follow_redirects=False)
    assert "harbours and ships" in client.get(kept.headers["location"]).text


def test_a_list_is_edited_in_its_page(client: TestClient) -> None:
    path = client.post("/lists", data={"name": "n", "feature": "tiny/1-demo/0"}, follow_redirects=False).headers[
        "location"
    ]
    client.post(f"{path}/features", data={"feature": "http://localhost:3000/tiny/1-demo/4?width=16"})
    client.post(f"{path}/change", data={"feature": "tiny/1-demo/4", "act": "up"})
    client.post(f"{path}/change", data={"feature": "tiny/1-demo/4", "act": "note", "note": "<script>"})
    client.post(f"{path}/edit", data={"name": "renamed", "test_text": "", "visibility": "private"})
    page = client.get(path).text
    assert page.index("cold harbours in winter") < page.index("harbours and ships")
    assert "&lt;script&gt;" in page
    assert "renamed" in page
    assert client.post(f"{path}/edit", data={"visibility": "nobody"}).status_code == 422
    assert client.post(f"{path}/features", data={"feature": "nonsense"}).status_code == 422
    client.post(f"{path}/delete")
    assert client.get(path).status_code == 404


def test_a_list_without_weights_says_so_when_a_text_is_tried(client: TestClient) -> None:
    path = client.post("/lists", data={"name": "n", "feature": "tiny/1-demo/0"}, follow_redirects=False).headers[
        "location"
    ]
    page = client.get(path, params={"text": "a harbour"})
    assert page.status_code == 200


@pytest.fixture
def team(engine: Engine, settings: Settings) -> Iterator[TestClient]:
    url = engine.url.render_as_string(hide_password=False)
    chosen = settings.model_copy(update={"team": True, "public_url": PUBLIC, "database_url": url})
    with TestClient(create_app(chosen), base_url=PUBLIC, follow_redirects=False) as opened:
        yield opened


def test_a_stranger_sees_a_list_shared_by_link_and_no_other(team: TestClient) -> None:
    sessions = team.app.state.sessions  # type: ignore[attr-defined]
    with sessions.begin() as session:
        ada = people.add(session, "ada", "four random words", Role.EDITOR)
        who = Actor(ada.name, Role.EDITOR, ada.id)
        shared = lists.new(session, who, "for all", visibility=Visibility.LINK).id
        private = lists.new(session, who, "for me", visibility=Visibility.PRIVATE).id
    assert "for all" in team.get(f"/lists/{shared}").text
    assert team.get(f"/lists/{private}").headers["location"].startswith("/login")
    assert team.post(f"/lists/{shared}/delete").headers["location"] == "/login"
    team.post("/login", data={"name": "ada", "password": "four random words"})
    assert "for me" in team.get("/lists").text


def test_a_text_is_tried_on_every_feature_of_a_list(live: Live) -> None:
    features = [{"modelId": "tiny", "layer": "1-topk", "index": str(i)} for i in (1, 5)]
    features.append({"modelId": "tiny", "layer": "1-bare", "index": "5"})
    made = live.post("list/new-with-features", {"name": "tried", "features": features}).json()
    alone = live.post("activation/new", {"feature": features[1], "customText": "the old clock struck"}).json()
    live.post("activation/new", {"feature": features[2], "customText": "loaded"})
    page = live.http.get(f"/lists/{made['id']}", params={"text": "the old clock struck"})
    assert page.status_code == 200
    shown = f"{alone['maxValue']:.3g}" if alone["maxValue"] > 0 else "never active"
    assert page.text.count("on the text") == 3
    assert shown in page.text


def test_the_official_client_makes_and_reads_lists(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "any value")
    from neuronpedia.np_list import NPListItem
    from neuronpedia.requests.base_request import NPRequest
    from neuronpedia.requests.list_request import ListRequest

    monkeypatch.setattr(NPRequest, "BASE_URL", f"{live.url}/api")
    made = ListRequest().new("by the client", "with words")
    filled = ListRequest().add_items(made, [NPListItem("tiny", "1-topk", "5", "note")])
    assert [(i.source, i.index) for i in filled.items] == [("1-topk", "5")]
    found = ListRequest().get(made.id)
    assert (found.name, found.description, [i.index for i in found.items]) == ("by the client", "with words", ["5"])
    assert made.id in [each.id for each in ListRequest().get_owned()]


def test_saelens_makes_a_list_here(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.analysis import neuronpedia_integration as integration

    monkeypatch.setattr(integration, "NEURONPEDIA_DOMAIN", live.url)
    opened: list[str] = []
    monkeypatch.setattr(integration.webbrowser, "open", opened.append)
    feature = integration.NeuronpediaFeature("tiny", 1, "topk", 7, "of SAELens")
    url = integration.make_neuronpedia_list_with_features("any", "from SAELens", [feature])
    assert opened == [url]
    assert "of SAELens" in live.http.get(url).text
