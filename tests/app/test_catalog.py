"""The catalog's verbs on SQLite and on Postgres."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from app import catalog, surroundings
from app.catalog import Filter, NotInCatalog
from app.settings import Settings
from app.tables import Harvest, HarvestState
from tests.conftest import D_SAE


def source(session: Session) -> catalog.SourceCard:
    return catalog.source_card(session, "tiny", "1-demo")


def test_home_lists_sources_by_layer_with_the_default_first(session: Session) -> None:
    entry = catalog.home(session).models[0]
    assert [s.name for s in entry.sources] == ["1-demo", "1-other", "2-plain"]


def test_an_empty_catalog_has_a_home(engine: Engine) -> None:
    with Session(engine) as session:
        assert catalog.home(session) == catalog.Home(())


def test_a_bare_layer_leads_to_its_default_source(session: Session) -> None:
    assert catalog.default_source(session, "tiny", 1).name == "1-demo"


def test_a_layer_without_a_default_leads_to_its_first_source(session: Session) -> None:
    assert catalog.default_source(session, "tiny", 2).name == "2-plain"


def test_a_layer_without_sources_is_not_found(session: Session) -> None:
    with pytest.raises(NotInCatalog, match="no SAE called '9'"):
        catalog.default_source(session, "tiny", 9)


@pytest.mark.parametrize(
    ("sort", "descending", "first"),
    [("index", False, 0), ("index", True, D_SAE - 1), ("max", True, D_SAE - 1), ("density", True, 9)],
)
def test_the_table_sorts(session: Session, sort: catalog.Sort, descending: bool, first: int) -> None:
    table = catalog.table(session, source(session), Filter(sort=sort, descending=descending))
    assert table.rows[0].index == first


def test_the_table_is_paged_and_counts_all(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "PAGE_SIZE", 7)
    table = catalog.table(session, source(session), Filter(page=2))
    assert [row.index for row in table.rows] == [7, 8, 9, 10, 11, 12, 13]
    assert (table.total, table.pages, table.first, table.last) == (D_SAE, 6, 8, 14)


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        (Filter(label="HARBOURS"), [0, 3, 4]),
        (Filter(label="100%_d"), [2]),
        (Filter(label="%"), [2]),
        (Filter(label="_"), [2]),
        (Filter(label="' OR 1=1 --"), []),
        (Filter(label="\0harbours\0"), [0, 3, 4]),
        (Filter(kind="dead"), [7]),
        (Filter(min_density=0.35), [9]),
        (Filter(max_density=0.0), [7]),
        (Filter(label="harbours", min_density=0.104), [4]),
    ],
)
def test_filters_match_texts_as_they_stand_and_combine(session: Session, wanted: Filter, indices: list[int]) -> None:
    table = catalog.table(session, source(session), wanted)
    assert [row.index for row in table.rows] == indices
    assert table.total == len(indices)


def test_a_random_feature_is_live(session: Session) -> None:
    found = {catalog.random_feature(session, source(session)) for _ in range(200)}
    assert 7 not in found
    assert len(found) > D_SAE / 2


def test_a_random_feature_respects_the_filter(session: Session) -> None:
    wanted = Filter(label="harbours")
    assert {catalog.random_feature(session, source(session), wanted) for _ in range(30)} <= {0, 3, 4}


def test_a_random_feature_of_a_source_without_evidence_is_not_found(session: Session) -> None:
    with pytest.raises(NotInCatalog):
        catalog.random_feature(session, catalog.source_card(session, "tiny", "2-plain"))


def test_a_feature_with_its_neighbours_costs_two_queries(session: Session, engine: Engine) -> None:
    queries: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *a: queries.append(a[2]))
    record = catalog.feature_record(session, "tiny", "1-demo", 3)
    found = surroundings.related(session, record.source, 3, [4, 7, 4])
    assert len(queries) == 2
    assert record.feature.label == "harbours"
    assert [e.text for e in found.explanations] == ["harbours"]
    assert found.rows[4].label == "cold harbours in winter"
    assert found.rows[7].dead


def test_a_record_tells_how_far_its_harvest_is_and_leaves_the_distributions(session: Session) -> None:
    source = catalog.source_card(session, "tiny", "1-demo")
    harvest = session.get_one(Harvest, source.harvest_id)
    harvest.state = HarvestState.PARTIAL
    harvest.summary = {"density_histogram": {"counts": [1, 2]}, "progress": {"done": 3, "total": 8}}
    session.flush()
    for evidence in (None, harvest.id):
        card = catalog.feature_record(session, "tiny", "1-demo", 3, evidence).harvest
        assert card is not None
        assert (card.progress, card.derived_counts, list(card.summary)) == ((3, 8), False, ["progress"])


def test_a_feature_without_evidence_is_there(session: Session) -> None:
    record = catalog.feature_record(session, "tiny", "2-plain", 5)
    assert record.blob is None
    assert record.harvest is None


@pytest.mark.parametrize(
    ("model", "name", "index", "suggested"),
    [
        ("tinny", "1-demo", 0, "/tiny"),
        ("tiny", "1-dmo", 3, "/tiny/1-demo/3"),
        ("tiny", "1-demo", D_SAE, f"/tiny/1-demo/{D_SAE - 1}"),
        ("tiny", "1-demo", 2**63, "/tiny/1-demo/2147483648"),
        ("\0", "x", 0, "/tiny"),
        ("é" * 5000, "1-demo", 0, "/tiny"),
    ],
)
def test_what_is_not_there_says_what_was_meant(
    session: Session, model: str, name: str, index: int, suggested: str
) -> None:
    with pytest.raises(NotInCatalog) as caught:
        catalog.feature_record(session, model, name, index)
    if index < 2**31:
        assert suggested in [address for address, _ in caught.value.suggestions]


@pytest.mark.parametrize("text", ["-1", "abc", "", "1.0", "9" * 10, "١٢", " 1", "0x1", "1\0"])
def test_only_plain_numbers_are_indices(text: str) -> None:
    with pytest.raises(NotInCatalog):
        catalog.parse_index(text)


def test_references_point_into_the_data_directory(session: Session, settings: Settings) -> None:
    ref = catalog.sae_ref(settings, source(session))
    assert (ref.id, ref.path) == ("tiny/1-demo", str(settings.data_dir / "saes" / "aa"))
