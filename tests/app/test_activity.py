"""The activity feed and one's own things on the home, on the real application; both databases."""

from __future__ import annotations

import re

from sqlalchemy import select

from app import activity, jobs
from app.tables import FeatureList, Trash
from tests.app.test_visibility import Lab, lab

__all__ = ["lab"]


def test_the_feed_says_what_one_may_see_and_nothing_of_what_is_hidden(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    assert ada.post("/tiny/1-zebra/card", data={"tags": "x"}).status_code == 303
    assert ada.post(f"/jobs/{lab.ids['job']}/cancel").status_code == 303
    assert bob.post("/tiny/2-plain/card", data={"tags": "y"}).status_code == 303
    assert bob.post("/tiny/2-plain/0/explanations", data={"text": "a thing"}).status_code == 303
    mine, his = ada.get("/activity").text, bob.get("/activity").text
    assert 'href="/tiny/1-zebra">tiny/1-zebra</a>' in mine
    assert f'href="/jobs/{lab.ids["job"]}"' in mine
    assert "zebra" not in his
    assert 'href="/tiny/2-plain/0">tiny/2-plain/0</a>' in his
    assert 'href="/tiny/2-plain">' not in bob.get("/activity?kind=explanation").text
    assert "Nothing fits" in bob.get("/activity?who=ada").text
    lab.share("team")
    assert 'href="/tiny/1-zebra"' in bob.get("/activity?who=ada").text
    for odd in ("/activity?before=x", "/activity?before=-1", "/activity?before=99999999999999999999"):
        assert bob.get(odd).status_code == 422


def test_the_home_begins_with_ones_own(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    ada.post("/tiny/2-plain/star", data={"on": "true"})
    ada.post("/lists", data={"name": "whales"})
    page = ada.get("/").text
    for words in ("Starred", "Your jobs", "Harvest tiny/1-zebra from made (queued)", "Your lists", "whales"):
        assert words in page, words
    assert "Your jobs" not in bob.get("/").text
    assert "Starred" not in bob.get("/").text


def test_the_feed_has_uploads_trainings_harvests_imports_and_deletions_as_far_as_one_may_see_them(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    with lab.app.state.sessions.begin() as session:
        for kind in ("train", "import"):
            jobs.submit(session, lab.settings.model_copy(update={"owner": "bob"}), kind, f"a {kind} of his", {})
    file = ("whales.txt", b"The whale is a mammal.\n\nIt sings.", "text/plain")
    assert bob.post("/corpora", data={"name": "whales"}, files={"file": file}).status_code == 303
    assert ada.post("/lists", data={"name": "secret whales"}).status_code == 303
    with lab.app.state.sessions.begin() as session:
        session.scalars(select(FeatureList)).one().visibility = "private"
    mine, his = ada.get("/activity").text, bob.get("/activity").text
    for words in ("a train of his", "a import of his", 'href="/corpora/whales"'):
        assert words in mine, words
        assert words in his, words
    for words in ("Harvest tiny/1-zebra", 'added <a href="/tiny/1-zebra"', "quagga", "secret whales"):
        assert words in mine, words
        assert words not in his, words
    assert "a train of his" not in bob.get("/activity?kind=import").text
    assert ada.post("/tiny/1-zebra/remove").status_code == 303
    assert "deleted the SAE tiny/1-zebra" in ada.get("/activity?kind=deletion").text
    assert "zebra" not in bob.get("/activity?kind=deletion").text
    assert bob.post("/corpora/whales/remove").status_code == 303
    assert "deleted the corpus whales" in ada.get("/activity").text


def test_the_feed_goes_on_page_by_page_and_says_everything_once(lab: Lab) -> None:
    with lab.app.state.sessions.begin() as session:
        for number in range(2 * activity.PAGE):
            jobs.submit(session, lab.settings.model_copy(update={"owner": "bob"}), "map", f"map {number} of it", {})
            session.add(Trash(kind="list", key="x", name=f"gone {number}", owner="bob", deleted_by="bob", details={}))
    root, path, found = lab.as_("root"), "/activity?who=bob", list[str]()
    while path:
        page = root.get(path).text
        found += re.findall(r"map \d+ of it", page)
        older = re.search(r'rel="next" data-next href="([^"]+)"', page)
        path = older[1].replace("&amp;", "&") if older else ""
    assert found == [f"map {number} of it" for number in reversed(range(2 * activity.PAGE))]


def test_comments_and_explanations_by_page_and_by_api_are_in_the_feed(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    key = {"modelId": "tiny", "layer": "2-plain", "index": "1"}
    assert bob.post("/comments", data={"subject": "/tiny/2-plain/0", "text": "hm"}).status_code == 303
    assert bob.post("/api/comment/new", json={**key, "text": "hm"}).status_code == 200
    assert bob.post("/api/explanation/new", json={**key, "description": "a thing"}).status_code == 200
    page = ada.get("/activity?who=bob").text
    assert 'commented on <a href="/tiny/2-plain/0"' in page
    assert 'commented on <a href="/tiny/2-plain/1"' in page
    assert 'explained <a href="/tiny/2-plain/1"' in page


def test_a_corpus_is_deleted_by_who_added_it_or_an_admin_alone(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    for name in ("whales", "seals"):
        file = (f"{name}.txt", f"About {name}.".encode(), "text/plain")
        assert ada.post("/corpora", data={"name": name}, files={"file": file}).status_code == 303
    assert "by ada" in bob.get("/corpora/whales").text
    assert "/corpora/whales/remove" not in bob.get("/corpora/whales").text
    assert bob.post("/corpora/whales/remove").status_code == 403
    assert ada.post("/corpora/whales/remove").status_code == 303
    assert lab.as_("root").post("/corpora/seals/remove").status_code == 303
