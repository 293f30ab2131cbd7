"""Map, compare, model and set pages from the real application, on a catalog with a made map and a made match."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import numpy as np
import pytest
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import catalog, db, maps, matches, saecharts
from app.catalog import Filter
from app.main import create_app
from app.maps import Cluster
from app.settings import Settings
from app.tables import Harvest, Source
from tests.conftest import D_SAE, Catalog

CLUSTER = np.array([i % 3 if i % 3 < 2 else maps.NO_CLUSTER for i in range(D_SAE)])
SUMMARY = {
    "density_histogram": {"counts": [1, 5, 2], "edges": [-4.0, -3.0, -2.0, -1.0]},
    "l0_histogram": {"counts": [3, 7], "edges": [-0.5, 0.5, 1.5]},
    "explained_variance_by_position": [None, 0.5, 0.75],
    "decoder_norms": {"counts": [40], "edges": [0.5, 1.5], "mean": 1.0},
}


def draw(session: Session) -> None:
    source = session.query(Source).filter_by(name="1-demo").one()
    angles = np.linspace(0, 6, D_SAE)
    places = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    clusters = [Cluster("<ships>", 0.5, 0.5, int((CLUSTER == 0).sum())), Cluster("seas", -0.5, 0, 13)]
    maps.record(session, source, places, CLUSTER, clusters, {})


def match(session: Session) -> None:
    ids = {s.name: s.id for s in session.query(Source)}
    indices = np.stack([np.arange(D_SAE)[::-1], np.arange(D_SAE)], axis=1)
    cosines = np.stack([np.arange(D_SAE) / D_SAE, np.zeros(D_SAE)], axis=1)
    matches.record(session, ids["1-demo"], ids["1-other"], indices, cosines)


@pytest.fixture
def charted(filled: Catalog, settings: Settings) -> Iterator[TestClient]:
    engine = db.connect(settings)
    with db.sessions(engine).begin() as session:
        draw(session)
        match(session)
        session.query(Harvest).one().summary = SUMMARY
    engine.dispose()
    with TestClient(create_app(settings), base_url="http://localhost:3000") as opened:
        yield opened


def page(client: TestClient, path: str) -> str:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.text


def test_a_map_lists_its_clusters_as_links_to_the_table(charted: TestClient) -> None:
    text = page(charted, "/tiny/1-demo/map")
    assert '<a href="/tiny/1-demo?cluster=0">&lt;ships&gt;</a>' in text
    table = page(charted, "/tiny/1-demo?cluster=0")
    assert f"<strong>{(CLUSTER == 0).sum()}</strong> features" in table
    assert '/tiny/1-demo/3"' in table


@pytest.mark.parametrize("number", [0, 1, maps.NO_CLUSTER, 17])
def test_a_cluster_filters_the_table(session: Session, number: int) -> None:
    draw(session)
    here = catalog.source_card(session, "tiny", "1-demo")
    rows = catalog.table(session, here, Filter(cluster=number)).rows
    assert [row.index for row in rows] == np.flatnonzero(number == CLUSTER).tolist()


def line_of(session: Session, corners: list[tuple[float, float]]) -> str:
    drawn = maps.map_of(session, session.query(Source).filter_by(name="1-demo").one().id)
    assert drawn is not None
    numbers = [round((c + 1) / 2 * maps.FULL) for corner in corners for c in corner]
    return "-".join(map(str, [drawn.drawn_at, *numbers]))


SQUARE = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]


def test_a_line_around_features_filters_the_table(session: Session) -> None:
    draw(session)
    here = catalog.source_card(session, "tiny", "1-demo")
    angles = np.linspace(0, 6, D_SAE)
    expected = np.flatnonzero((np.cos(angles) > 0) & (np.sin(angles) > 0)).tolist()
    found = catalog.table(session, here, Filter(around=line_of(session, SQUARE)))
    assert [row.index for row in found.rows] == expected
    assert found.total == len(expected)
    # A line that crosses itself: what it goes around twice is not inside.
    twice = line_of(session, SQUARE + SQUARE)
    assert catalog.count(session, here, Filter(around=twice)) == 0
    assert catalog.count(session, catalog.source_card(session, "tiny", "2-plain"), Filter(around=twice)) == 0


@pytest.mark.parametrize("line", ["1", "1-2-3-4-5", "1-2-3-4-5-6-7-8", "a", "1-0-0-70000-0-0-9", "-".join(["1"] * 999)])
def test_what_is_no_line_is_refused(charted: TestClient, line: str) -> None:
    for path in ("", "/map", "/features.csv", "/random"):
        answer = charted.get(f"/tiny/1-demo{path}?around={line}")
        assert answer.status_code == 422, path
        assert "is no line around features of a map" in answer.text


def test_a_list_says_that_its_map_was_drawn_anew(charted: TestClient, settings: Settings) -> None:
    engine = db.connect(settings)
    with db.sessions(engine)() as session:
        line = line_of(session, SQUARE)
    engine.dispose()
    text = page(charted, f"/tiny/1-demo?around={line}")
    assert f'<a href="/tiny/1-demo/map?around={line}">drawn around on the map</a>' in text
    assert "drawn anew" not in text
    assert f'data-around="{line.partition("-")[2]}"' in page(charted, f"/tiny/1-demo/map?around={line}")
    older = "5-" + line.partition("-")[2]
    assert "has been drawn anew since" in page(charted, f"/tiny/1-demo?around={older}")


def test_points_say_place_cluster_and_density_and_are_kept_under_their_version(charted: TestClient) -> None:
    text = page(charted, "/tiny/1-demo/map")
    address = text.partition('data-points="')[2].partition('"')[0]
    answer = charted.get(address)
    assert "immutable" in answer.headers["cache-control"]
    assert "no-cache" in charted.get("/tiny/1-demo/map/points?v=old").headers["cache-control"]
    (n,) = struct.unpack_from("<I", answer.content)
    assert (n, len(answer.content)) == (D_SAE, 4 + 7 * D_SAE)
    x = np.frombuffer(answer.content, "<u2", n, 4) / 65535 * 2 - 1
    np.testing.assert_allclose(x, np.cos(np.linspace(0, 6, D_SAE)), atol=1e-4)
    assert np.frombuffer(answer.content, "<u2", n, 4 + 4 * n).tolist() == CLUSTER.tolist()
    density = np.frombuffer(answer.content, "u1", n, 4 + 6 * n)
    assert density[7] == 0
    assert density[9] == max(density)


def test_a_point_shows_label_cluster_and_top_example(charted: TestClient) -> None:
    text = page(charted, "/tiny/1-demo/map/4")
    assert "cold harbours in winter" in text
    assert 'class="window"' in text
    assert "seas" in text


def test_highlighting_answers_with_indices(charted: TestClient) -> None:
    assert json.loads(page(charted, "/tiny/1-demo/map/found?q=harbours")) == [3, 0, 4]
    assert json.loads(page(charted, "/tiny/1-demo/map/found?q=")) == []


def test_a_source_without_a_map_offers_to_draw_it(charted: TestClient) -> None:
    text = page(charted, "/tiny/2-plain/map")
    assert "sae-atlas map tiny/2-plain" in text
    assert charted.get("/tiny/2-plain/map/points").status_code == 404
    posted = charted.post("/tiny/2-plain/map", headers={"Sec-Fetch-Site": "same-origin"}, follow_redirects=False)
    assert posted.headers["location"] == "/jobs/1"
    assert "It is being drawn" in page(charted, "/tiny/2-plain/map")
    again = charted.post("/tiny/2-plain/map", headers={"Sec-Fetch-Site": "same-origin"}, follow_redirects=False)
    assert again.headers["location"] == "/jobs/1"


def test_an_sae_shows_its_figures_and_the_map_in_small(charted: TestClient) -> None:
    text = page(charted, "/tiny/1-demo")
    for heading in ("Densities", "l0", "Explained variance by position", "Decoder norms"):
        assert f"<figcaption>{heading}</figcaption>" in text
    assert 'class="thumbnail"' in text


def test_figures_survive_what_a_summary_may_lack_or_hold() -> None:
    for odd in ({}, {"l0_histogram": None}, {"l0_histogram": {"counts": [], "edges": []}}, {"decoder_norms": [1]}):
        assert saecharts.figures(odd) == ()
    nulls = {"explained_variance_by_position": [None, None]}
    assert saecharts.figures(nulls) == ()


def test_explained_variance_is_drawn_to_the_scale_of_one() -> None:
    chart = saecharts.variance_chart({"explained_variance_by_position": [None, 0.5, 1.0, -3.0]})
    assert chart is not None
    assert chart.path == "M0 72V72.0H60.0V36.0H120.0V0.0H180.0V72.0H240.0V72Z"


def test_two_features_stand_side_by_side(charted: TestClient) -> None:
    text = page(charted, "/compare?a=tiny/1-demo/3&b=http://localhost:3000/tiny/1-demo/4?x=1")
    assert "cold harbours in winter" in text
    # Rows (3, 1, 0.5) and (4, 1, 0.5) of the weights.
    assert "<strong>0.996</strong>" in text
    assert "They share 3 of the ten tokens" in text
    assert 'href="/compare?a=tiny%2F1-demo%2F4&amp;b=tiny%2F1-demo%2F3"' in text


def test_a_feature_without_evidence_can_be_compared(charted: TestClient) -> None:
    assert "sae-atlas harvest tiny/2-plain" in page(charted, "/compare?a=tiny/1-demo/3&b=tiny/2-plain/4")


def test_two_saes_stand_side_by_side_with_nearest_counterparts(charted: TestClient) -> None:
    text = page(charted, "/compare?a=tiny/1-demo&b=tiny/1-other")
    assert "explained variance" in text
    assert "have none</a> at cosine 0.5" in text
    assert ">20 have none" in text
    assert 'href="/compare?a=tiny/1-demo/3&amp;b=tiny/1-other/36"' in text


def test_counterparts_are_sorted_and_those_without_any_are_found(charted: TestClient) -> None:
    def cosines(state: str) -> list[str]:
        text = charted.get(f"/compare?a=tiny/1-demo&b=tiny/1-other{state}", headers={"HX-Request": "true"}).text
        assert text.lstrip().startswith('<section id="pairs"')
        return [cell.partition("<")[0] for cell in text.split('<td class="n">')[1:] if cell[1:2] == "."]

    assert cosines("&sort=cosine&descending=true")[:2] == ["0.975", "0.950"]
    assert cosines("&sort=cosine")[:2] == ["0.000", "0.025"]
    assert len(cosines("&below=0.09")) == 4
    assert cosines("&page=2") == []


def test_matching_is_asked_for_once_in_either_order(charted: TestClient) -> None:
    assert "Find counterparts" in page(charted, "/compare?a=tiny/1-demo&b=tiny/2-plain")
    headers = {"Sec-Fetch-Site": "same-origin"}
    for a, b in (("tiny/1-demo", "tiny/2-plain"), ("tiny/2-plain", "tiny/1-demo")):
        posted = charted.post("/compare", data={"a": a, "b": b}, headers=headers, follow_redirects=False)
        assert posted.status_code == 303
        assert "being matched" in page(charted, posted.headers["location"])
    assert charted.get("/jobs/2").status_code == 404


@pytest.mark.parametrize(
    ("a", "b", "status", "words"),
    [
        ("tiny/1-demo", "tiny/1-demo", 200, "the same SAE"),
        ("tiny/1-demo", "tiny/1-demo/3", 422, "two features or two SAEs"),
        ("tiny", "x", 422, "model/source/index"),
        ("tiny/1-demo/3", "tiny/1-demo/99", 404, "0 to 39"),
        ("tiny/nothing", "tiny/1-demo", 404, "no SAE called"),
        ("", "", 200, "Two features"),
    ],
)
def test_what_cannot_be_compared_says_why(charted: TestClient, a: str, b: str, status: int, words: str) -> None:
    answer = charted.get("/compare", params={"a": a, "b": b})
    assert answer.status_code == status
    assert words in answer.text


@pytest.mark.parametrize("below", ["x", "2", "nan"])
def test_a_threshold_is_a_cosine(charted: TestClient, below: str) -> None:
    assert charted.get(f"/compare?a=tiny/1-demo&b=tiny/1-other&below={below}").status_code == 422


def test_a_model_shows_layers_by_sets_and_a_set_its_own_saes(charted: TestClient) -> None:
    text = page(charted, "/tiny")
    grid = text[text.index('id="grid"') : text.index("<h2>SAEs")]
    assert [grid.count(f'href="/tiny?set={name}"') for name in ("demo", "other", "plain")] == [1, 1, 1]
    assert grid.count('class="cell"') == 3
    only = page(charted, "/tiny?set=plain")
    assert 'href="/tiny/2-plain"' in only
    assert 'href="/tiny/1-demo"' not in only
    assert charted.get("/tiny?set=nothing").status_code == 404
