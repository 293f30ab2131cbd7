"""Comments, mentions and bookmarks over pages and JSON, on SQLite and Postgres."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import bookmarks, catalog, comments, lists, people, surroundings, trash
from app.errors import BadInput, Forbidden, NotFound
from app.lists import Key
from app.main import create_app
from app.people import LOCAL, Actor, Role
from app.settings import Settings
from app.surroundings import People
from app.visibility import Visibility
from tests import conftest
from tests.conftest import D_SAE

ADA, BOB, EVE = Actor("ada", Role.EDITOR, 1), Actor("bob", Role.EDITOR, 2), Actor("eve", Role.ADMIN, 3)
SUBJECT = "/tiny/1-demo/3"
FEATURE = {"modelId": "tiny", "layer": "1-demo", "index": "3"}
PASSWORD = "four random words"
PUBLIC = "http://localhost:3000"


def enrol(session: Session, *names: str) -> None:
    for name in names:
        people.add(session, name, PASSWORD, Role.EDITOR)


def test_comments_stand_in_order_and_their_author_or_an_admin_deletes_them(session: Session) -> None:
    first = comments.write(session, ADA, SUBJECT, " one\r\ntwo\0 ")
    second = comments.write(session, BOB, "/tiny/1-demo/03", "three")
    assert [(c.author, c.text) for c in comments.about(session, ADA, SUBJECT)] == [
        ("ada", "one\ntwo"),
        ("bob", "three"),
    ]
    assert [c.may_delete for c in comments.about(session, ADA, SUBJECT)] == [True, False]
    with pytest.raises(Forbidden, match="bob's"):
        comments.remove(session, ADA, second.id)
    assert comments.remove(session, EVE, second.id) == SUBJECT
    comments.remove(session, ADA, first.id)
    assert comments.about(session, ADA, SUBJECT) == []


@pytest.mark.parametrize(
    "subject",
    ["", "/", "tiny/1-demo/3", "/tiny/1-demo", f"/tiny/1-demo/{D_SAE}", "/tiny/no/3", "/lists/none", "/a/b/c/d"],
)
def test_what_is_not_there_is_not_talked_about(session: Session, subject: str) -> None:
    with pytest.raises(NotFound):
        comments.write(session, ADA, subject, "hello")


@pytest.mark.parametrize("text", ["", "  \n ", "x" * 5001])
def test_a_comment_has_words_and_not_too_many(session: Session, text: str) -> None:
    with pytest.raises(BadInput, match=r"1 to 5,000 characters; this one has (0|5,001)"):
        comments.write(session, ADA, SUBJECT, text)


def test_who_is_named_finds_it_until_it_is_read(session: Session) -> None:
    enrol(session, "ada", "bob", "dot.ted")
    comments.write(session, ADA, SUBJECT, "@bob, @Dot.Ted. look; @ada @nobody mail@bob.org, http://x/@bob")
    assert [comments.unread(session, who) for who in (ADA, BOB)] == [0, 1]
    [found], older = comments.mentions(session, BOB)
    assert (found.author, found.unread, older) == ("ada", True, None)
    assert found.anchor.startswith("/tiny/1-demo/3/explanations#comment-")
    assert len(comments.mentions(session, Actor("dot.ted", Role.VIEWER, 9))[0]) == 1
    comments.mark_read(session, BOB)
    assert comments.unread(session, BOB) == 0
    assert [each.unread for each in comments.mentions(session, BOB)[0]] == [False]


def test_a_mention_on_a_list_is_not_shown_once_the_list_is_private(session: Session) -> None:
    enrol(session, "bob")
    made = lists.new(session, ADA, "ours")
    comments.write(session, ADA, f"/lists/{made.id}", "@bob look")
    assert len(comments.mentions(session, BOB)[0]) == 1
    made.visibility = Visibility.PRIVATE
    assert comments.mentions(session, BOB)[0] == []
    with pytest.raises(NotFound):
        comments.write(session, BOB, f"/lists/{made.id}", "what?")


def test_mentions_come_in_pages(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comments, "PAGE", 2)
    enrol(session, "bob")
    for n in range(3):
        comments.write(session, ADA, SUBJECT, f"{n} @bob")
    first, older = comments.mentions(session, BOB)
    assert older is not None
    rest, end = comments.mentions(session, BOB, older)
    assert ([c.text[0] for c in (*first, *rest)], end) == (["2", "1", "0"], None)


def test_a_bookmark_is_ones_own_and_kept_once(session: Session) -> None:
    for _ in range(2):
        bookmarks.add(session, ADA, "tiny", "1-demo", 3)
    bookmarks.add(session, BOB, "tiny", "1-demo", 4)
    assert [each.key for each in bookmarks.of(session, ADA)] == [Key("tiny", "1-demo", 3)]
    bookmarks.drop(session, ADA, "tiny", "1-demo", 3)
    bookmarks.drop(session, ADA, "tiny", "1-demo", 3)
    assert bookmarks.of(session, ADA) == []
    with pytest.raises(NotFound, match=str(D_SAE - 1)):
        bookmarks.add(session, ADA, "tiny", "1-demo", D_SAE)


def people_of(session: Session, index: int, who: Actor) -> People:
    source = catalog.source_card(session, "tiny", "1-demo")
    people, same = (
        look(session, source, index, [], who).people for look in (surroundings.related, surroundings.around)
    )
    assert people == same
    assert people is not None
    return people


def test_what_people_did_with_a_feature_leaves_private_lists_out(session: Session) -> None:
    for who, name, visibility in ((ADA, "mine", Visibility.PRIVATE), (ADA, "ours", Visibility.TEAM)):
        lists.new(session, who, name, visibility=visibility, features=[Key("tiny", "1-demo", 3)])
    comments.write(session, ADA, SUBJECT, "said")
    bookmarks.add(session, ADA, "tiny", "1-demo", 3)
    thrown = lists.new(session, ADA, "thrown away", visibility=Visibility.TEAM, features=[Key("tiny", "1-demo", 3)])
    trash.put(session, ADA, thrown)
    seen = {who.name: people_of(session, 3, who) for who in (ADA, BOB, LOCAL)}
    assert [(seen[n].kept, seen[n].n_comments) for n in ("ada", "bob")] == [(True, 1), (False, 1)]
    assert {n: sorted(name for _, name in each.lists) for n, each in seen.items()} == {
        "ada": ["mine", "ours"],
        "bob": ["ours"],
        "you": ["mine", "ours"],
    }
    other = people_of(session, 4, ADA)
    assert (other.kept, other.n_comments, other.lists) == (False, 0, ())


def test_the_json_routes_say_keep_and_take_back(client: TestClient) -> None:
    made = client.post("/api/comment/new", json={**FEATURE, "text": "<b>seen</b>"}).json()["comment"]
    listed = client.post("/api/list/new-with-features", json={"name": "held", "features": [FEATURE]}).json()
    found = client.get("/api/feature/tiny/1-demo/3").json()
    assert found["comments"] == [made]
    assert found["lists"] == [{"id": listed["id"], "name": "held"}]
    assert made["text"] == "<b>seen</b>"
    assert client.post("/api/comment/delete", json={"commentId": made["id"]}).status_code == 200
    assert client.post("/api/comment/delete", json={"commentId": made["id"]}).status_code == 404
    assert client.get("/api/feature/tiny/1-demo/3").json()["comments"] == []
    assert client.post("/api/bookmark/add", json=FEATURE).status_code == 200
    assert [b["index"] for b in client.post("/api/bookmark/list").json()] == ["3"]
    assert client.post("/api/bookmark/delete", json=FEATURE).status_code == 200
    assert client.post("/api/bookmark/list").json() == []


def test_the_pages_show_what_was_said_and_kept(client: TestClient) -> None:
    assert "No bookmarks yet" in client.get("/bookmarks").text
    assert "comment" not in client.get(SUBJECT).text.split('class="explain"')[1].split("</p>")[0]
    said = client.post("/comments", data={"subject": SUBJECT, "text": "`cold` <i>\nwater"}, follow_redirects=False)
    assert said.headers["location"].startswith(f"{SUBJECT}/explanations#comment-")
    page = client.get(f"{SUBJECT}/explanations").text
    assert '<code class="chip">cold</code> &lt;i&gt;' in page
    assert f'{SUBJECT}/explanations#comments">1 comment<' in client.get(SUBJECT).text
    kept = client.post("/bookmarks", data={"feature": SUBJECT}, headers={"hx-request": "true"}).text
    assert "★ bookmarked" in kept
    assert "★ bookmarked" in client.get(SUBJECT).text
    assert 'href="/tiny/1-demo/3"' in client.get("/bookmarks").text
    client.post("/bookmarks", data={"feature": SUBJECT, "act": "drop"})
    assert "☆ bookmark" in client.get(SUBJECT).text


def test_a_comment_that_is_too_long_keeps_its_words(client: TestClient) -> None:
    answer = client.post("/comments", data={"subject": SUBJECT, "text": "long " * 1200})
    assert answer.status_code == 422
    assert "this one has 5,999" in answer.text
    assert "long long" in answer.text


@pytest.fixture
def team(engine: Engine, settings: Settings) -> Iterator[TestClient]:
    url = engine.url.render_as_string(hide_password=False)
    chosen = settings.changed(team=True, public_url=PUBLIC, database_url=url)
    with TestClient(create_app(chosen), base_url=PUBLIC, follow_redirects=False) as opened:
        with opened.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
            conftest.fill(session, chosen)
            enrol(session, "ada", "bob")
            people.add(session, "vic", PASSWORD, Role.VIEWER)
        yield opened


def test_a_team_talks_under_a_list_and_a_viewer_reads_and_keeps(team: TestClient) -> None:
    team.post("/login", data={"name": "ada", "password": PASSWORD})
    path = team.post("/lists", data={"name": "n", "feature": SUBJECT[1:]}).headers["location"]
    team.post("/comments", data={"subject": path, "text": "see this, @bob"})
    page = team.get(path).text
    assert '<b class="mention">@bob</b>' in page
    assert team.get("/mentions/unread").text == ""
    team.post("/logout")
    team.post("/login", data={"name": "bob", "password": PASSWORD})
    assert ">1</span>" in team.get("/mentions/unread").text
    assert f'href="{path}#comment-' in team.get("/mentions").text
    team.post("/mentions/read")
    assert team.get("/mentions/unread").text == ""
    team.post("/logout")
    team.post("/login", data={"name": "vic", "password": PASSWORD})
    assert 'name="text" rows="2"' not in team.get(path).text.split('id="comments"')[1]
    assert team.post("/comments", data={"subject": path, "text": "no"}).status_code == 403
    assert team.post("/bookmarks", data={"feature": SUBJECT}).status_code == 303
    assert "★ bookmarked" in team.get(SUBJECT).text
