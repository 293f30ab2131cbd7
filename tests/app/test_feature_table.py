"""The feature table's filters against SQL of their own, its files, and the words it filters by, on both databases."""

from __future__ import annotations

import csv
import io
import itertools
import json

import pytest
from sqlalchemy import text, update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import catalog, wording
from app.catalog import Filter
from app.errors import BadInput
from app.settings import Settings
from app.tablefiles import csv_lines
from app.tables import Feature
from tests.conftest import D_SAE, Catalog


def source(session: Session) -> catalog.SourceCard:
    return catalog.source_card(session, "tiny", "1-demo")


@pytest.fixture
def worded(session: Session, settings: Settings) -> Session:
    wording.fill_missing(session, settings)
    session.commit()
    return session


def test_words_are_the_tokens_of_the_top_examples_strongest_first_and_all_promoted_ones(worded: Session) -> None:
    found = dict(worded.execute(text("SELECT kind, text FROM feature_words WHERE latent = 4")).all())  # type: ignore[arg-type]
    # Positions 2 and 5 of context 0, 3 of context 1 and 2 to 5 of context 2, as live_evidence has them.
    assert found["tokens"].strip("\x1f").split("\x1f")[0] == " harbour"
    assert found["logits"] == "\x1f sea\x1f<script>alert(1)</script>\x1f\u202eevil\x1f"


def test_what_it_promotes_is_found_beyond_the_first_token(worded: Session) -> None:
    found = catalog.table(worded, source(worded), Filter(logit="evil"))
    assert found.total == D_SAE - 1
    assert all(row.top_logit == " sea" for row in found.rows)


def test_a_quoted_token_is_a_whole_token(worded: Session) -> None:
    def n(token: str) -> int:
        return catalog.table(worded, source(worded), Filter(token=token)).total

    assert n("harb") == n('" harbour"') == D_SAE - 1
    assert n('"harbour"') == 0
    assert n("\x1f") == D_SAE
    assert n("%") == 0


def test_a_source_without_words_is_searched_by_its_first_tokens(session: Session) -> None:
    assert catalog.table(session, source(session), Filter(token="HARB")).total == D_SAE


def test_words_are_gathered_once(worded: Session, settings: Settings) -> None:
    assert wording.fill_missing(worded, settings) == 0


CONDITIONS: list[tuple[dict[str, object], str]] = [
    ({"label": "Label"}, "lower(label) LIKE '%label%'"),
    ({"logit": "evil"}, "latent IN (SELECT latent FROM feature_words WHERE kind = 'logits' AND text LIKE '%evil%')"),
    ({"min_density": 0.105, "max_density": 0.13}, "density BETWEEN 0.105 AND 0.13"),
    ({"min_act": 5.5, "max_act": 30}, "max_act >= 5.5 AND max_act <= 30"),
    ({"labelled": "no"}, "label = ''"),
    ({"kind": "dense"}, "density > 0.1"),
    ({"features": "3,8-20"}, "latent IN (3, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)"),
]


def test_filters_combine_and_count_what_sql_of_its_own_counts(worded: Session) -> None:
    here = source(worded)
    for size in (0, 1, 2, 3):
        for chosen in itertools.combinations(CONDITIONS, size):
            wanted = Filter(**{k: v for part, _ in chosen for k, v in part.items()})  # type: ignore[arg-type]
            sql = " AND ".join([f"source_id = {here.id}", *(condition for _, condition in chosen)])
            expected = worded.execute(text(f"SELECT latent FROM features WHERE {sql} ORDER BY latent")).scalars().all()
            table = catalog.table(worded, here, wanted)
            assert [row.index for row in table.rows] == list(expected), sql
            assert table.total == len(expected)
            if expected:
                assert catalog.random_feature(worded, here, wanted) in expected


@pytest.mark.parametrize("sort", ["index", "density", "max", "label", "token", "logit"])
def test_every_column_sorts_and_a_stream_has_the_order_of_the_pages(session: Session, sort: catalog.Sort) -> None:
    here = source(session)
    for descending in (False, True):
        wanted = Filter(sort=sort, descending=descending)
        shown = [row.index for row in catalog.table(session, here, wanted).rows]
        assert shown == [row.index for row in catalog.every_row(session, here, wanted)]


def test_ranges_are_written_as_they_are_read() -> None:
    assert catalog.ranges([9, 3, 8, 7, 7]) == "3,7-9"
    assert catalog.parse_ranges("3,7-9") == [(3, 3), (7, 9)]


@pytest.mark.parametrize("given", ["-1", "1-", "1,,2", "1;2", "a", "1-2-3", ",".join("0-99" for _ in range(500))])
def test_what_is_no_list_of_features_is_refused(given: str) -> None:
    with pytest.raises(BadInput):
        catalog.parse_ranges(given)


def test_a_long_list_of_ranges_fits_into_one_query(session: Session) -> None:
    wanted = Filter(features=",".join(f"{3 * i}-{3 * i + 1}" for i in range(3000)))
    assert catalog.count(session, source(session), wanted) == 27


def test_texts_that_a_spreadsheet_would_compute_begin_with_an_apostrophe(session: Session) -> None:
    bad = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "  =1", 'a "quoted", text\nof two lines']
    for index, label in enumerate(bad):
        session.execute(update(Feature).where(Feature.index == index).values(label=label))
    here = source(session)
    rows = catalog.every_row(session, here, Filter())
    read = list(csv.DictReader(io.StringIO(b"".join(csv_lines(here, rows, ["label", "max"])).decode(), newline="")))
    assert [row["label"] for row in read[:8]] == [f"'{label}" for label in bad[:7]] + [bad[7]]
    assert [float(row["max_act"]) for row in read[:3]] == [2.0, 3.0, 4.0]


def test_files_hold_the_filtered_table_with_its_columns(client: TestClient, filled: Catalog) -> None:
    path = f"{filled.path}/features"
    found = client.get(f"{path}.json?label=harbours&sort=max&descending=true&columns=label&columns=density").json()
    assert [entry["index"] for entry in found] == [4, 3, 0]
    assert set(found[0]) == {"model", "source", "index", "label", "density"}
    answer = client.get(f"{path}.csv?kind=live")
    assert "attachment" in answer.headers["content-disposition"]
    assert len(list(csv.reader(io.StringIO(answer.text)))) == D_SAE
    assert json.loads(client.get(f"{path}.json?label=nothing+such").text) == []
    assert client.get(f"{path}.json?features=x").status_code == 422
    assert client.get(f"{path}.xls").status_code in (404, 422)


def test_chosen_columns_stay_in_every_link_of_the_table(client: TestClient, filled: Catalog) -> None:
    page = client.get(f"{filled.path}?columns=label&columns=max&min_act=3").text
    part = page[page.index('id="features"') :]
    assert "top logit</a>" not in part
    assert "features.csv?min_act=3.0&amp;columns=label&amp;columns=max" in part
    assert "sort=max&amp;descending=true&amp;min_act=3.0&amp;columns=label&amp;columns=max" in part


def test_rows_alone_follow_for_scrolling_on_and_the_last_page_has_no_more(
    client: TestClient, filled: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "PAGE_SIZE", 30)
    first = client.get(filled.path).text
    assert f'hx-get="{filled.path}?page=2&amp;rows=true"' in first
    assert f'<a href="{filled.path}?page=2">next page</a>' in first
    rest = client.get(f"{filled.path}?page=2&rows=true", headers={"HX-Request": "true"}).text
    assert rest.lstrip().startswith("<tbody>")
    assert rest.count("<tr") == D_SAE - 30
    assert "more" not in rest


def test_a_source_without_evidence_says_how_to_get_it(client: TestClient) -> None:
    assert "sae-atlas harvest tiny/2-plain" in client.get("/tiny/2-plain").text
