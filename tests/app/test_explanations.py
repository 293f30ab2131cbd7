"""What people say of features: written, agreed with, taken back; over pages and JSON, on SQLite and Postgres."""

from __future__ import annotations

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import catalog, explanations, harvests, surroundings
from app.errors import BadInput, Conflict, Forbidden, NotFound
from app.people import LOCAL, Actor, Role
from app.settings import Settings
from app.tables import Explanation, ExplanationVote, Feature, Source
from tests.conftest import D_SAE

ADA, BOB, EVE = Actor("ada", Role.EDITOR, 1), Actor("bob", Role.EDITOR, 2), Actor("eve", Role.ADMIN, 3)
AT = ("tiny", "1-demo", 3)


def label(session: Session, index: int = 3) -> str:
    source = session.scalars(select(Source).where(Source.name == "1-demo")).one()
    return session.scalars(select(Feature.label).where(Feature.source_id == source.id, Feature.index == index)).one()


def shown(session: Session, index: int = 3) -> list[str]:
    rows = surroundings.related(session, catalog.source_card(session, "tiny", "1-demo"), index, []).explanations
    return [row.text for row in rows]


def test_what_somebody_writes_is_the_label_before_the_automatic_one(session: Session) -> None:
    explanations.write(session, ADA, *AT, "  quiet \n harbours ")
    assert label(session) == "quiet harbours"
    assert shown(session) == ["quiet harbours", "harbours"]


def test_the_label_is_what_most_agree_with_then_the_newest(session: Session) -> None:
    first = explanations.write(session, ADA, *AT, "first")
    explanations.write(session, BOB, *AT, "second")
    assert label(session) == "second"
    explanations.vote(session, BOB, first.id, True)
    explanations.vote(session, BOB, first.id, True)
    assert (label(session), first.n_votes) == ("first", 1)
    assert shown(session)[0] == "first"
    explanations.vote(session, BOB, first.id, False)
    assert (label(session), first.n_votes) == ("second", 0)


def test_an_explanation_is_taken_back_and_brought_back(session: Session) -> None:
    made = explanations.write(session, ADA, *AT, "wrong")
    explanations.vote(session, EVE, made.id, True)
    with pytest.raises(Forbidden, match="ada's"):
        explanations.retire(session, BOB, made.id)
    kept = explanations.retire(session, EVE, made.id)
    assert label(session) == "harbours"
    now, before = explanations.history(session, ADA, kept.source_id, 3)
    assert [e.text for e in now] == ["harbours"]
    assert [(e.text, e.may_retire) for e in before] == [("wrong", True)]
    with pytest.raises(Forbidden):
        explanations.restore(session, BOB, kept.id)
    explanations.restore(session, ADA, kept.id)
    assert label(session) == "wrong"


def test_an_automatic_label_cannot_be_taken_back(session: Session) -> None:
    automatic = session.scalars(select(Explanation).where(Explanation.text == "harbours")).one()
    with pytest.raises(Forbidden):
        explanations.retire(session, EVE, automatic.id)


def test_a_new_harvest_and_a_removal_leave_no_votes_behind(session: Session, settings: Settings) -> None:
    automatic = session.scalars(select(Explanation).where(Explanation.text == "harbours")).one()
    explanations.vote(session, ADA, automatic.id, True)
    made = explanations.write(session, ADA, *AT, "kept")
    explanations.vote(session, ADA, made.id, True)
    explanations.forget_automatic(session, made.source_id)
    assert session.scalars(select(ExplanationVote.explanation_id)).all() == [made.id]
    session.commit()
    harvests.remove_source(session, settings, "tiny", "1-demo")
    session.commit()
    assert session.scalars(select(ExplanationVote)).all() == []


@pytest.mark.parametrize("text", ["", "  \n ", "\0", "x" * 1001])
def test_a_text_that_says_nothing_or_too_much_is_refused(session: Session, text: str) -> None:
    with pytest.raises(BadInput, match="1 to 1,000 characters"):
        explanations.write(session, ADA, *AT, text)


def test_the_same_words_twice_and_a_feature_that_is_not_there_are_refused(session: Session) -> None:
    with pytest.raises(Conflict, match="agree with it"):
        explanations.write(session, ADA, *AT, "harbours")
    with pytest.raises(NotFound):
        explanations.write(session, ADA, "tiny", "1-demo", D_SAE, "beyond")
    with pytest.raises(NotFound):
        explanations.vote(session, ADA, 2**40, True)


def test_the_pages_write_agree_take_back_and_bring_back(client: TestClient) -> None:
    path = "/tiny/1-demo/7"
    assert "Nobody has said yet" in client.get(f"{path}/explanations").text
    answer = client.post(f"{path}/explanations", data={"text": "<b>dead</b> calm"}, follow_redirects=False)
    assert answer.headers["location"] == path
    page = client.get(path).text
    assert "&lt;b&gt;dead&lt;/b&gt; calm" in page
    assert "<b>dead</b>" not in page
    made = client.post("/api/explanation/search", json={"modelId": "tiny", "query": "dead calm"}).json()
    number = made["results"][0]["id"]
    client.post(f"{path}/explanations/{number}/agree")
    assert "1 agrees" in client.get(path).text
    assert client.post(f"/tiny/1-demo/8/explanations/{number}/agree").status_code == 404
    client.post(f"{path}/explanations/{number}/retire")
    history = client.get(f"{path}/explanations").text
    assert "Taken back" in history
    assert client.post(f"{path}/explanations", data={"text": "x" * 1_000_000}).status_code == 422


def test_the_json_routes_write_vote_and_delete(client: TestClient) -> None:
    asked = {"modelId": "tiny", "layer": "1-demo", "index": "5", "description": "said by a script"}
    made = client.post("/api/explanation/new", json=asked).json()["explanation"]
    assert made["explanationModelName"] == LOCAL.name
    assert client.post(f"/api/explanation/{made['id']}/vote").json()["votes"] == 1
    assert client.post(f"/api/explanation/{made['id']}/unvote").json()["votes"] == 0
    found = client.get("/api/feature/tiny/1-demo/5").json()
    assert found["explanations"][0]["description"] == "said by a script"
    assert client.post(f"/api/explanation/{made['id']}/delete").status_code == 200
    assert client.post(f"/api/explanation/{made['id']}/delete").status_code == 404
    assert client.post("/api/explanation/new", json={**asked, "description": "x" * 10**6}).status_code == 422
