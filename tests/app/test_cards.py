"""What people say of an SAE, on the real application: tags, description, versions, stars, visits; both databases."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import cards, catalog
from app.errors import BadInput
from app.people import LOCAL, Actor, Role
from app.tables import Source, SourceVisit
from app.web.markdown import rendered
from tests.app.test_visibility import Lab, lab

__all__ = ["lab"]
ADA, BOB = Actor("ada", Role.EDITOR, 1), Actor("bob", Role.EDITOR, 2)


def edit(session: Session, name: str = "1-demo", tags: str = "", description: str = "", newer: str = "") -> None:
    cards.edit(session, LOCAL, "tiny", name, tags, description, newer)


def said(session: Session, name: str = "1-demo", who: Actor = ADA) -> cards.Card:
    return cards.card(session, who, catalog.source_card(session, "tiny", name))


def test_tags_are_folded_kept_once_and_found_by_search(session: Session) -> None:
    edit(session, tags="Paper Figure, topk,topk,\n baseline", description="Trained on *whale* songs.")
    assert said(session).note.tags == ("baseline", "paper-figure", "topk")
    for query in ("paper-fig", "WHALE", "whale topk", "1-demo base"):
        assert [s.name for s in cards.find(session, query)] == ["1-demo"], query
    assert cards.find(session, "whale nothing") == []
    assert cards.find(session, "%") == []
    edit(session, tags="")
    assert said(session).note.tags == ()


@pytest.mark.parametrize("tags", ["a/b", "x" * 41, "<b>", "é", ",".join(f"t{i}" for i in range(21))])
def test_what_is_no_tag_is_refused(session: Session, tags: str) -> None:
    with pytest.raises(BadInput):
        edit(session, tags=tags)


def test_a_newer_version_is_named_on_the_old_one_and_never_leads_back(session: Session) -> None:
    edit(session, newer="1-other")
    assert (newer := said(session).replaced_by) is not None
    assert newer.name == "1-other"
    assert [s.name for s in said(session, "1-other").replaces] == ["1-demo"]
    edit(session, "1-other", newer="2-plain")
    for name in ("1-demo", "2-plain"):
        with pytest.raises(BadInput, match="cannot replace"):
            edit(session, "2-plain", newer=name)
    with pytest.raises(catalog.NotInCatalog):
        edit(session, newer="9-none")


def test_stars_are_each_persons_and_counted_once(session: Session) -> None:
    source = catalog.source_card(session, "tiny", "1-demo")
    for who in (ADA, ADA, BOB):
        cards.star(session, who, source, True)
        session.flush()
    assert said(session).note == cards.Note((), 2, True)
    assert [s.name for s in cards.starred(session, BOB)] == ["1-demo"]
    cards.star(session, BOB, source, False)
    session.flush()
    assert said(session, who=BOB).note == cards.Note((), 1, False)


def test_visits_are_counted_once_for_a_person_and_day(session: Session) -> None:
    source = catalog.source_card(session, "tiny", "1-demo")
    other = catalog.source_card(session, "tiny", "2-plain")
    for day in ("2026-11-24", "2026-11-25", "2026-11-25"):
        cards.visit(session, source.id, "ada", "view", day)
        session.flush()
    cards.visit(session, source.id, "bob", "use", "2026-11-25")
    cards.visit(session, other.id, "ada", "view", "2026-11-26")
    session.flush()
    assert session.scalar(select(func.count()).select_from(SourceVisit)) == 4
    assert (said(session).n_viewers, said(session).n_users) == (1, 1)
    assert [s.name for s in cards.recent(session, ADA)] == ["2-plain", "1-demo"]


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "![x](http://evil.example/pixel.png)",
    "<a href='https://x' onclick='alert(1)'>x</a>",
    '[x](https://a.example "t\\" onmouseover=\\"alert(1)")',
    "<style>body{display:none}</style><svg/onload=alert(1)>",
    "```html\n<script>alert(1)</script>\n```",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe><form action=//evil>",
    "\u202e{{7*7}}<b>",
]


class Elements(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_markdown_does_nothing(text: str) -> None:
    for tag, attributes in Elements(str(rendered(text))).found:
        assert tag in {"p", "a", "pre", "code"}, text
        assert set(attributes) <= {"href", "title", "rel"}, text
        assert (attributes.get("href") or "https:").startswith(("https:", "http:", "mailto:")), text


def test_markdown_keeps_what_is_harmless_below_the_pages_headings() -> None:
    html = str(rendered("# Big\n\n*a* [b](https://c.example)\n\n| x | y |\n|---|---|\n| 1 | 2 |\n"))
    assert "<h3>Big</h3>" in html
    assert '<a href="https://c.example" rel="noopener noreferrer nofollow">b</a>' in html
    assert "<td>1</td>" in html


def test_the_card_is_written_in_a_form_and_shown(client: TestClient) -> None:
    form = {"tags": "whales", "description": "# Of **whales**", "replaced_by": "1-other"}
    assert client.post("/tiny/1-demo/card", data=form).status_code == 200
    page = client.get("/tiny/1-demo").text
    assert "<h3>Of <strong>whales</strong></h3>" in page
    assert 'href="/tiny/1-other">1-other</a> replaces this one' in page
    assert 'It replaces <a href="/tiny/1-demo">' in client.get("/tiny/1-other").text
    assert "1-demo" in client.get("/?tag=whales").text
    assert "2-plain" not in re.findall(r"<tbody>.*?</tbody>", client.get("/tiny?tag=whales").text, re.S)[-1]
    assert "No SAE fits" in client.get("/tiny?tag=sharks").text
    assert "tiny/1-demo" in client.get("/search?q=whales").text
    wrong = client.post("/tiny/1-demo/card", data=form | {"tags": "a/b"})
    assert wrong.status_code == 422
    assert "is no tag" in wrong.text
    assert "Of **whales**" in wrong.text, "what was written is not lost"


def test_stars_and_visits_of_a_team(lab: Lab) -> None:
    bob = lab.as_("bob")
    assert bob.post("/tiny/2-plain/star", data={"on": "true"}).status_code == 303
    assert "2-plain" in bob.get("/?starred=1").text
    assert "No SAE fits" in lab.as_("ada").get("/?starred=1").text
    assert bob.post("/tiny/1-zebra/star", data={"on": "true"}).status_code == 404
    for _ in range(3):
        assert bob.get("/tiny/2-plain").status_code == 200
    with lab.app.state.sessions() as session:
        found = select(SourceVisit.who, SourceVisit.kind).join(Source, Source.id == SourceVisit.source_id)
        deadline = time.monotonic() + 60
        while not (rows := session.execute(found.where(Source.name == "2-plain")).all()):
            assert time.monotonic() < deadline
            session.rollback()
            time.sleep(0.05)
    assert [tuple(row) for row in rows] == [("bob", "view")]
    assert "1 person has looked at it, 0 used it" in bob.get("/tiny/2-plain").text


def test_only_the_owner_writes_a_card(lab: Lab) -> None:
    lab.share("team")
    bob, form = lab.as_("bob"), {"tags": "mine"}
    assert bob.get("/tiny/1-zebra/card").status_code == 403
    assert bob.post("/tiny/1-zebra/card", data=form).status_code == 403
    assert lab.as_("ada").post("/tiny/1-zebra/card", data=form).status_code == 303
    assert bob.get("/?owner=ada").text.count("1-zebra") > 0
