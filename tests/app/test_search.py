"""Text search over labels, on SQLite and on Postgres."""

from __future__ import annotations

import pytest
from sqlalchemy.orm import Session

from app import explanations, search, visibility
from app.people import LOCAL
from app.tables import Source
from app.visibility import Reader, Visibility


def labels(session: Session, query: str, **limits: object) -> list[int]:
    return [hit.feature.index for hit in search.labels(session, query, **limits).hits]  # type: ignore[arg-type]


def test_the_query_itself_comes_first_then_what_begins_with_it(session: Session) -> None:
    assert labels(session, "harbours") == [3, 0, 4]


def test_every_word_must_occur_in_any_order(session: Session) -> None:
    assert labels(session, "winter HARBOURS") == [4]


@pytest.mark.parametrize("query", ["%", "_done", "100%"])
def test_wildcards_are_plain_characters(session: Session, query: str) -> None:
    assert labels(session, query) == [2]


@pytest.mark.parametrize("query", ["' OR 1=1 --", "\\", '"', "nothing such", "a" * 5000])
def test_odd_queries_find_nothing_and_break_nothing(session: Session, query: str) -> None:
    assert labels(session, query) == []


@pytest.mark.parametrize("query", ["", "   ", "\0"])
def test_an_empty_query_finds_nothing(session: Session, query: str) -> None:
    assert search.labels(session, query).total == 0


def test_pages_follow_each_other(session: Session) -> None:
    first = search.labels(session, "label number")
    assert (len(first.hits), first.next_offset) == (20, 20)
    second = search.labels(session, "label number", offset=20)
    assert second.next_offset is None
    assert len({hit.path for hit in first.hits + second.hits}) == first.total


def test_a_feature_with_several_explanations_is_found_once_by_the_one_that_fits_best(session: Session) -> None:
    explanations.write(session, LOCAL, "tiny", "1-demo", 3, "harbours and their ships")
    assert labels(session, "harbours") == [3, 0, 4]
    found = search.labels(session, "harbours", limit=1)
    assert (found.total, found.hits[0].text, found.hits[0].label) == (3, "harbours", "harbours and their ships")
    assert search.labels(session, "their ships").hits[0].label == ""


def test_the_search_can_be_kept_to_a_model_and_to_sources(session: Session) -> None:
    assert labels(session, "harbours", model_id="other") == []
    assert labels(session, "harbours", model_id="tiny", sources=["2-plain"]) == []
    assert labels(session, "harbours", model_id="tiny", sources=["1-demo"]) == [3, 0, 4]


def test_what_others_keep_to_themselves_is_neither_found_nor_counted(session: Session) -> None:
    query = search.labels(session, "a").hits[0].text.split()[0]
    assert search.labels(session, query).total > 0
    for source in session.query(Source):
        source.owner, source.visibility = "somebody", Visibility.PRIVATE
    session.flush()
    visibility.read_as(session, Reader("another"))
    found = search.labels(session, query)
    assert (found.total, found.hits) == (0, ())
