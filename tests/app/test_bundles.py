"""A bundle brings an SAE to another Atlas exactly, and a changed one is refused whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zstandard
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import bundles, cards, db, explanations, harvests, lists, maps, trash, visibility
from app.errors import BadFile, Conflict
from app.evidence import Effect, pack_effects, unpack_effects
from app.lists import Key
from app.people import LOCAL, Actor, Role
from app.settings import Settings
from app.tables import Evidence, Explanation, Feature, FeatureList, Source
from app.visibility import Reader, Visibility
from tests.conftest import D_IN, D_SAE
from tests.tiny import save_sae

EFFECT = Effect(4, 2, 0.5, 0.25, ((3, 0.125),), ((1, -0.5),), 8, 0.0625, 0.125)


def quiet(_share: float, _status: str) -> None:
    pass


@pytest.fixture
def bundle(session: Session, settings: Settings, tmp_path: Path) -> Path:
    """The filled catalog's first source, with real weights, exported."""
    import torch

    directory = tmp_path / "sae"
    config = {"architecture": "topk", "k": 2, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    config |= {"metadata": {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}}
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    save_sae(directory, config, {name: torch.ones(shape) for name, shape in shapes.items()})
    from app.weights import check_sae

    facts = check_sae(directory, D_IN, settings)
    # The evidence is of these weights from here on; with others it would go.
    harvests.source_named(session, "tiny", "1-demo").sae_hash = facts.hash
    source = harvests.catalogue_sae(
        session, settings, facts, model_id="tiny", set_name="demo", metrics={"l0": 2.0}, origin={"by": "test"}
    )
    session.add(
        Explanation(
            source_id=source.id,
            index=3,
            text="written by hand",
            method="human",
            author="Ada",
        )
    )
    session.get_one(Feature, (source.id, 3)).label = "written by hand"
    one = session.scalars(select(Evidence).where(Evidence.harvest_id == source.harvest_id, Evidence.index == 3)).one()
    one.effects = pack_effects([EFFECT])
    for seen_by in (Visibility.TEAM, Visibility.PRIVATE):
        held = [Key("tiny", "1-demo", 3, "a note"), Key("tiny", "1-demo", 0)]
        lists.new(session, LOCAL, f"for {seen_by}", "about", "a text", seen_by, held)
    cards.fill(session, source, "Finds *harbours*.", ["water", "ships"])
    places = np.arange(2 * D_SAE).reshape(D_SAE, 2) / (2 * D_SAE)
    maps.record(session, source, places, np.arange(D_SAE) % 2, [maps.Cluster("(", 0.5, 0.25, 2)] * 2, {"seed": 7})
    bundles.export_bundle(session, settings, "tiny", "1-demo", tmp_path / "bundle", quiet)
    return tmp_path / "bundle"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "elsewhere")


@pytest.fixture
def other(elsewhere: Settings) -> Session:
    engine = db.connect(elsewhere)
    db.migrate(engine)
    return db.sessions(engine)()


def everything(session: Session) -> list[list[object]]:
    features = select(Feature.index, Feature.density, Feature.max_act, Feature.top_token, Feature.top_logit)
    blobs = select(Evidence.index, Evidence.blob)
    return [[tuple(row) for row in session.execute(q)] for q in (features.order_by("latent"), blobs.order_by("latent"))]


def test_export_and_import_are_an_exact_round_trip(
    bundle: Path, session: Session, other: Session, elsewhere: Settings
) -> None:
    source = bundles.import_bundle(other, elsewhere, bundle, quiet)
    assert everything(other) == everything(session)
    assert (source.name, source.metrics, source.origin) == ("1-demo", {"l0": 2.0}, {"by": "test"})
    assert other.get_one(Feature, (source.id, 3)).label == "written by hand"
    methods = select(Explanation.method, Explanation.text).where(Explanation.index == 3).order_by(Explanation.method)
    assert [tuple(row) for row in other.execute(methods)] == [("heuristic", "harbours"), ("human", "written by hand")]
    assert (source.description, cards.tags_of(other, source.id)) == ("Finds *harbours*.", ["ships", "water"])
    [held] = other.scalars(select(FeatureList)).all()
    assert (held.name, held.description, held.test_text, held.owner) == ("for team", "about", "a text", "you")
    assert lists.keys(lists.items(other, held)) == [Key("tiny", "1-demo", 3, "a note"), Key("tiny", "1-demo", 0)]
    again = bundles.export_bundle(other, elsewhere, "tiny", "1-demo", bundle.parent / "again", quiet)
    first = json.loads((bundle / "manifest.json").read_text())
    assert again.files == first["files"]


def test_importing_twice_changes_nothing(bundle: Path, other: Session, elsewhere: Settings) -> None:
    bundles.import_bundle(other, elsewhere, bundle, quiet)
    before = everything(other)
    bundles.import_bundle(other, elsewhere, bundle, quiet)
    assert everything(other) == before
    assert len(other.scalars(select(Source)).all()) == 1
    assert len(other.scalars(select(FeatureList)).all()) == 1


def test_an_explanation_that_was_taken_back_here_stays_so(bundle: Path, other: Session, elsewhere: Settings) -> None:
    source = bundles.import_bundle(other, elsewhere, bundle, quiet)
    written = select(Explanation).where(Explanation.method != "heuristic")
    said = other.scalars(written).all()
    explanations.retire(other, LOCAL, said[0].id)
    bundles.import_bundle(other, elsewhere, bundle, quiet)
    assert [e.text for e in other.scalars(written)] == [e.text for e in said[1:]]
    assert [e.text for e in explanations.history(other, LOCAL, source.id, said[0].index)[1]] == [said[0].text]


def test_a_list_that_was_changed_or_deleted_here_stays_so(bundle: Path, other: Session, elsewhere: Settings) -> None:
    bundles.import_bundle(other, elsewhere, bundle, quiet)
    [held] = other.scalars(select(FeatureList)).all()
    held.name = "renamed"
    bundles.import_bundle(other, elsewhere, bundle, quiet)
    assert [found.name for found in other.scalars(select(FeatureList))] == ["renamed"]
    trash.put(other, LOCAL, held)
    bundles.import_bundle(other, elsewhere, bundle, quiet)
    assert other.scalars(select(FeatureList)).all() == []


@pytest.mark.parametrize(
    "changed", [{"id": "../x"}, {"name": "n" * 201}, {"visibility": "all"}, {"features": [{"index": -1}]}, {"id": None}]
)
def test_a_list_that_makes_no_sense_is_refused(
    bundle: Path, other: Session, elsewhere: Settings, changed: dict[str, object]
) -> None:
    file = bundle / bundles.LISTS_FILE
    line = json.loads(zstandard.ZstdDecompressor().decompress(file.read_bytes(), 2**20)) | changed
    file.write_bytes(zstandard.compress(json.dumps(line).encode()))
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"][bundles.LISTS_FILE] = bundles.sha256_of(file)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadFile, match="List 0 of the bundle cannot be read"):
        bundles.import_bundle(other, elsewhere, bundle, quiet)


@pytest.mark.parametrize("file", bundles.FILES)
def test_a_changed_file_is_named_and_nothing_is_imported(
    bundle: Path, other: Session, elsewhere: Settings, file: str
) -> None:
    (bundle / file).write_bytes((bundle / file).read_bytes() + b" ")
    with pytest.raises(BadFile, match=file):
        bundles.import_bundle(other, elsewhere, bundle, quiet)
    assert not other.scalars(select(Source)).all()
    assert not (elsewhere.data_dir / "saes").exists()


def test_a_manifest_cannot_lead_out_of_the_data_directory(bundle: Path, other: Session, elsewhere: Settings) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["corpus"]["hash"] = "../../etc"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadFile, match="cannot be a directory"):
        bundles.import_bundle(other, elsewhere, bundle, quiet)


def test_another_sae_of_the_same_name_is_a_conflict_with_both_hashes(
    bundle: Path, session: Session, settings: Settings
) -> None:
    source = harvests.source_named(session, "tiny", "1-demo")
    source.sae_hash = "0123456789abcdef"
    with pytest.raises(Conflict, match="0123456789abcdef"):
        bundles.import_bundle(session, settings, bundle, quiet)


def test_a_bundle_of_another_version_says_which_is_read(bundle: Path, other: Session, elsewhere: Settings) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["version"] = 2
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BadFile, match=r"version 2.*version 1"):
        bundles.import_bundle(other, elsewhere, bundle, quiet)


def test_causal_effects_and_the_map_travel_in_a_bundle(bundle: Path, elsewhere: Settings) -> None:
    engine = db.connect(elsewhere)
    db.migrate(engine)
    with db.sessions(engine).begin() as session:
        source = bundles.import_bundle(session, elsewhere, bundle, quiet)
        packed = dict(session.execute(select(Evidence.index, Evidence.effects)).tuples().all())
        found = maps.map_of(session, source.id)
    engine.dispose()
    assert packed[3] is not None
    assert unpack_effects(packed[3]) == (EFFECT,)
    assert packed[1] is None
    assert found is not None
    assert found.coordinates[3].tolist() == pytest.approx([6 / (2 * D_SAE), 7 / (2 * D_SAE)])
    assert (found.cluster[3], found.clusters[1], found.about["seed"]) == (1, maps.Cluster("(", 0.5, 0.25, 2), 7)


def test_a_bundle_takes_no_list_along_whose_address_its_reader_was_not_given(
    bundle: Path, session: Session, settings: Settings, tmp_path: Path
) -> None:
    lists.new(session, Actor("ada", Role.EDITOR, 1), "by link", "", "", Visibility.LINK, [Key("tiny", "1-demo", 3)])
    session.commit()
    taken: dict[str, list[str]] = {}
    readers = {"ada": Reader("ada"), "bob": Reader("bob"), "admin": None}
    for name, reader in readers.items():
        out = tmp_path / name
        bundles.export_bundle(visibility.read_as(session, reader), settings, "tiny", "1-demo", out, quiet)
        with zstandard.open(out / bundles.LISTS_FILE, "rt") as file:
            lines = list(file)
        taken[name] = sorted(json.loads(line)["name"] for line in lines)
    assert taken == {"ada": ["by link", "for team"], "bob": ["for team"], "admin": ["by link", "for team"]}
