"""The activity feed and one's own things on the home, on the real application; both databases."""

from __future__ import annotations

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
    for odd in ("/activity?before=x", "/activity?before=-1", "/activity?before=99999999999"):
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
