"""Evidence goes out in other programs' formats and comes back the same; it is looked at without model or weights."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import db, evidence, exchange, explanations, wording
from app.corpora import Stream, tokens_dir
from app.errors import AtlasError, BadFile, BadInput, Conflict, NotFound, TooLarge
from app.evidence import Effect, FeatureEvidence, Silent, pack, pack_effects
from app.exchange import Format
from app.main import create_app
from app.people import LOCAL
from app.settings import Settings
from app.tables import Corpus, Evidence, Explanation, Feature, Harvest, Model, Source
from app.tokens import vocabulary
from tests.conftest import D_SAE

HERE = Path(__file__).parent
FOREIGN = [Format.NEURONPEDIA, Format.SAE_DASHBOARD]


def quiet(_share: float, _status: str) -> None:
    pass


@pytest.fixture
def elsewhere(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "elsewhere", max_d_sae=5000)


@pytest.fixture
def other(elsewhere: Settings) -> Iterator[Session]:
    engine = db.connect(elsewhere)
    db.migrate(engine)
    with db.sessions(engine)() as opened:
        yield opened
    engine.dispose()


@pytest.fixture
def exported(session: Session, settings: Settings, tmp_path: Path) -> Callable[[Format], Path]:
    session.info["data"] = settings.data_dir

    def export(form: Format) -> Path:
        exchange.export(session, settings, "tiny", "1-demo", tmp_path / form, form, quiet)
        return tmp_path / form

    return export


def found(session: Session) -> dict[int, FeatureEvidence]:
    source = session.scalars(select(Source).where(Source.name == "1-demo")).one()
    rows = session.execute(select(Evidence.index, Evidence.blob).where(Evidence.harvest_id == source.harvest_id))
    return {index: evidence.unpack(blob) for index, blob in rows}


def files(directory: Path) -> dict[str, list[Any]]:
    """The rows of an export, without what names the place they came from, and without NUL, which imports strip."""
    rows: dict[str, list[Any]] = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
            kept = [json.loads(line) for line in text.splitlines()]
            rows[path.relative_to(directory).as_posix()] = [_without_place(row) for row in kept]
    return rows


_PLACE = ("id", "createdAt", "dataIndex", "dataSource", "authorName", "explanationModelName")


def _without_place(row: Any) -> Any:
    if isinstance(row, list):
        return [_without_place(item) for item in row]
    if isinstance(row, dict):
        return {k: _without_place(v) for k, v in row.items() if k not in _PLACE}
    return row.replace("\0", "") if isinstance(row, str) else row


@pytest.mark.parametrize("form", FOREIGN)
def test_what_goes_out_comes_back_and_goes_out_again_the_same(
    form: Format, exported: Callable[[Format], Path], other: Session, elsewhere: Settings, tmp_path: Path
) -> None:
    first = exported(form)
    exchange.import_(other, elsewhere, first, quiet)
    exchange.export(other, elsewhere, "tiny", "1-demo", tmp_path / "again", form, quiet)
    again, before = files(tmp_path / "again"), files(first)
    batches = [name for name in before if "batch" in name]
    assert batches
    for name in batches:
        for one, two in zip(before[name], again[name], strict=True):
            assert two == one


@pytest.mark.parametrize("form", FOREIGN)
def test_every_number_of_the_evidence_survives(
    form: Format, exported: Callable[[Format], Path], session: Session, other: Session, elsewhere: Settings
) -> None:
    exchange.import_(other, elsewhere, exported(form), quiet)
    ours, theirs = found(session), found(other)
    assert ours.keys() == theirs.keys()
    for index, one in ours.items():
        two = theirs[index]
        for name in ("n_active", "n_tokens", "max_act", "mean_act", "logits_low", "logits_high"):
            assert getattr(two, name) == getattr(one, name)
        for name in ("histogram", "logits_histogram", "top_logits", "bottom_logits", "neighbours", "cosines",
                     "correlated", "pearson", "neurons", "neuron_weights"):  # fmt: skip
            assert getattr(two, name).tolist() == getattr(one, name).tolist()
        assert [e.values.tolist() for e in two.top] == [e.values.tolist() for e in one.top]
        # Contexts begin with a token that no format keeps.
        assert [e.positions.tolist() for e in two.top] == [(e.positions - 1).tolist() for e in one.top]
        assert [(i.low, i.high, i.count, len(i.examples)) for i in two.intervals] == [
            (i.low, i.high, i.count, len(i.examples)) for i in one.intervals
        ]


def with_silence_and_effects(session: Session) -> FeatureEvidence:
    """Give feature 3 near misses, silent contexts and causal effects."""
    made = replace(
        found(session)[3],
        silent=(Silent(3, 4),),
        hard_negatives=(Silent(1, 2), Silent(2, 6, neighbour=5)),
    )
    effects = (
        Effect(0, 2, 0.25, 0.125, ((2, 0.5), (6, 0.0625)), ((9, -0.25),)),
        Effect(2, 4, math.nan, 0.5, (), ()),
    )
    source = session.scalars(select(Source).where(Source.name == "1-demo")).one()
    row = session.get_one(Evidence, (source.harvest_id, 3))
    row.blob, row.effects = pack(made), pack_effects(effects)
    session.commit()
    return made


@pytest.mark.parametrize("form", FOREIGN)
def test_near_misses_silent_contexts_and_causal_effects_survive(
    form: Format, exported: Callable[[Format], Path], session: Session, other: Session, elsewhere: Settings
) -> None:
    made = with_silence_and_effects(session)
    (source,) = exchange.import_(other, elsewhere, exported(form), quiet)
    row = other.get_one(Evidence, (source.harvest_id, 3))
    back = evidence.unpack(row.blob)
    harvest = other.get_one(Harvest, source.harvest_id)
    corpus = other.get_one(Corpus, harvest.corpus_id)
    there = tokens_dir(elsewhere, corpus.hash, harvest.tokenizer_hash)
    stream, words = Stream.open(there), vocabulary(there / "vocabulary.json")
    for name in ("silent", "hard_negatives"):
        for one, two in zip(getattr(made, name), getattr(back, name), strict=True):
            assert (two.position, two.neighbour) == (one.position - 1, one.neighbour)
            ids = stream.context(two.context, harvest.context_size, None)
            assert words.strings(ids) == [token.replace("\0", "") for token in tokens_of(session, one.context)]
    assert row.effects is not None
    first, last = evidence.unpack_effects(row.effects)
    assert [e.context for e in (first, last)] == [back.top[0].context, back.top[2].context]
    assert (first.position, first.loss_change, first.kl) == (1, 0.25, 0.125)
    assert [(words.string(token), share) for token, share in (*first.up, *first.down)] == [
        (" harbour", 0.5), (" ships", 0.0625), (" sea", -0.25)
    ]  # fmt: skip
    assert math.isnan(last.loss_change)
    assert other.get_one(Evidence, (source.harvest_id, 4)).effects is None


def tokens_of(session: Session, context: int) -> list[str]:
    settings = Settings(data_dir=Path(session.info["data"]))
    stream = Stream.open(tokens_dir(settings, "c0", "tok"))
    return vocabulary(settings.model_dir("tiny") / "vocabulary.json").strings(stream.context(context, 8, 0)[1:])


def test_parquet_holds_them_too(exported: Callable[[Format], Path], session: Session) -> None:
    import pyarrow.parquet as pq

    with_silence_and_effects(session)
    path = exported(Format.PARQUET)
    silent = pq.read_table(path / "silent.parquet").to_pylist()
    assert [(r["index"], r["kind"], r["rank"], r["context"], r["position"], r["neighbour"]) for r in silent] == [
        (3, "random", 0, 3, 3, None), (3, "hard", 0, 1, 1, None), (3, "hard", 1, 2, 5, 5)
    ]  # fmt: skip
    assert silent[0]["tokens"] == tokens_of(session, 3)
    first, last = pq.read_table(path / "effects.parquet").to_pylist()
    assert (first["rank"], first["context"], first["position"], first["loss_change"]) == (0, 0, 1, 0.25)
    assert (first["up_tokens"], first["down_shares"]) == ([" harbour", " ships"], [-0.25])
    assert (last["rank"], last["loss_change"]) == (2, None)


BAD_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "behind the end": ({"silent": [{"tokens": ["a"], "position": 1}]}, "looks at 1 of 1 tokens"),
    "no tokens": ({"hard_negatives": [{"tokens": [], "position": 0}]}, "hard_negatives"),
    "no list": ({"silent": {"tokens": ["a"]}}, "silent"),
}


@pytest.mark.parametrize("case", BAD_FIELDS)
def test_silent_contexts_that_cannot_be_are_refused(
    case: str, other: Session, elsewhere: Settings, tmp_path: Path
) -> None:
    fields, words = BAD_FIELDS[case]
    feature = {"feature_index": 0, "activations": [], **fields}
    (tmp_path / "batch-0.json").write_text(json.dumps({"model_id": "m", "layer": 1, "features": [feature]}))
    with pytest.raises(BadFile, match=words):
        exchange.import_(other, elsewhere, tmp_path / "batch-0.json", quiet)


def test_importing_again_renews_and_doubles_nothing(
    exported: Callable[[Format], Path], other: Session, elsewhere: Settings
) -> None:
    path = exported(Format.NEURONPEDIA)
    for _ in range(2):
        exchange.import_(other, elsewhere, path, quiet)
    counts = [len(other.scalars(select(table)).all()) for table in (Model, Source, Corpus, Feature, Explanation)]
    assert counts == [1, 1, 1, D_SAE, D_SAE - 2]
    assert not list(elsewhere.data_dir.glob("cache/*"))


def test_an_sae_with_weights_is_not_replaced_and_another_name_helps(
    exported: Callable[[Format], Path], session: Session, settings: Settings
) -> None:
    path = exported(Format.SAE_DASHBOARD)
    with pytest.raises(Conflict, match="--set"):
        exchange.import_(session, settings, path, quiet)
    (made,) = exchange.import_(session, settings, path, quiet, set_name="theirs")
    assert (made.model_id, made.name) == ("tiny", "1-theirs")
    assert session.get_one(Model, "tiny").hash == "f" * 64


def test_parquet_tables_hold_the_evidence_and_say_what_their_columns_are(
    exported: Callable[[Format], Path], session: Session
) -> None:
    import pyarrow.parquet as pq

    path = exported(Format.PARQUET)
    tables = {name: pq.read_table(path / f"{name}.parquet") for name in exchange.tables.COLUMNS}
    features = tables["features"].to_pylist()
    assert [row["index"] for row in features] == list(range(D_SAE))
    assert features[3]["max_act"] == found(session)[3].max_act
    tops = [row for row in tables["examples"].to_pylist() if row["index"] == 3 and row["group"] == "top"]
    assert [row["max"] for row in tops] == [e.max for e in found(session)[3].top]
    assert tops[0]["tokens"][tops[0]["peak"]] == " harbour"
    assert tops[0]["values"][tops[0]["peak"]] == tops[0]["max"]
    assert {row["token"] for row in tables["logits"].to_pylist() if row["sign"] == "promotes"} == {
        " sea",
        "<script>alert(1)</script>",
        "\u202eevil",
    }
    assert len(tables["explanations"]) == D_SAE - 2
    for table in tables.values():
        assert all(field.metadata[b"description"] for field in table.schema)


def test_an_export_needs_evidence_and_a_new_directory(session: Session, settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no evidence"):
        exchange.export(session, settings, "tiny", "2-plain", tmp_path / "x", Format.NEURONPEDIA, quiet)
    with pytest.raises(Conflict, match="exists"):
        exchange.export(session, settings, "tiny", "1-demo", tmp_path, Format.SAE_DASHBOARD, quiet)
    assert not (tmp_path / "x").exists()


# Looking at it without any model ---------------------------------------------------------------------------------


@pytest.fixture
def browsing(exported: Callable[[Format], Path], other: Session, elsewhere: Settings) -> Iterator[TestClient]:
    """A catalog that holds nothing but imported evidence."""
    exchange.import_(other, elsewhere, exported(Format.NEURONPEDIA), quiet)
    other.commit()
    app = create_app(elsewhere)
    with TestClient(app, base_url="http://localhost:3000", raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize(
    "path",
    ["/", "/tiny", "/tiny/1-demo", "/tiny/1-demo/3", "/tiny/1-demo/7", "/tiny/1-demo/3/context/0", "/search?q=harbour",
     "/tiny/1-demo/random", "/api/feature/tiny/1-demo/3"],
)  # fmt: skip
def test_every_page_works_without_a_model(browsing: TestClient, path: str) -> None:
    answer = browsing.get(path)
    assert answer.status_code == 200, answer.text[:500]


def test_the_feature_page_shows_the_examples_and_that_there_are_no_weights(browsing: TestClient) -> None:
    page = browsing.get("/tiny/1-demo/3").text
    assert "harbour" in page
    assert "No weights here: browsing only" in page
    assert "<script>alert(1)</script>" not in page
    assert "&lt;script&gt;" in page
    assert browsing.get("/api/feature/tiny/1-demo/3").json()["activations"][0]["tokens"][:2] == ["The", " harbour"]


def test_its_table_is_filtered_by_the_tokens_that_came_with_it(browsing: TestClient) -> None:
    found = {row["index"] for row in browsing.get("/tiny/1-demo/features.json?token=harb&logit=evil").json()}
    assert found == set(range(D_SAE)) - {7}


def test_a_server_starts_on_it(other: Session, elsewhere: Settings, exported: Callable[[Format], Path]) -> None:
    """As `serve` does first: gather what a version before this one did not, with no vocabulary but the import's own."""
    (source,) = exchange.import_(other, elsewhere, exported(Format.NEURONPEDIA), quiet)
    wording.forget(other, source.id)
    assert wording.fill_missing(other, elsewhere) == D_SAE
    wording.forget(other, source.id)
    for path in (elsewhere.data_dir / "corpora").rglob("vocabulary.json"):
        path.unlink()
    vocabulary.cache_clear()
    assert wording.fill_missing(other, elsewhere) == 0


def test_what_needs_weights_is_answered_with_a_sentence(browsing: TestClient) -> None:
    asked = {"feature": {"modelId": "tiny", "source": "1-demo", "index": "3"}, "customText": "the harbour"}
    answer = browsing.post("/api/activation/new", json=asked)
    assert answer.status_code == 422
    assert "No weights here: browsing only" in answer.json()["error"]
    tried = browsing.post("/tiny/1-demo/3/try", data={"text": "the harbour"})
    assert "No weights here: browsing only" in tried.text


@pytest.mark.parametrize(
    ("path", "words", "not_there"),
    [
        ("/tiny", "browsing only", ["Paste a prompt", "Steer it", ">steer</a>"]),
        ("/tiny/1-demo", "no counterpart found", ["Paste a prompt", ">Steer</a>"]),
        ("/tiny/1-demo/3", "browsing only", ["Steer with it", "Paste a prompt", "vector.npy", "-try-", ">steer</a>"]),
        ("/tiny/1-demo/3?embed=true&defaulttesttext=sea", "browsing only", ["embed-steer", "<textarea"]),
        ("/tiny/1-demo/map", "imported without them", ["<button>Draw the map"]),
        ("/tiny/prompt", "no text can be read", []),
        ("/tiny/steer?source=1-demo&index=3", "nothing steered", []),
        ("/tiny/1-demo/memory", "imported as evidence, without weights", []),
        ("/compare?a=tiny/1-demo/3&b=tiny/1-demo/4", "the weights of 1-demo are not here", ["Cosine of"]),
        ("/compare?a=tiny/1-demo&b=tiny/1-twin", "imported without its weights", ["Find counterparts"]),
    ],
)  # fmt: skip
def test_pages_say_what_is_not_possible_without_weights_and_do_not_offer_it(
    browsing: TestClient, other: Session, path: str, words: str, not_there: list[str]
) -> None:
    copied = other.scalars(select(Source)).one()
    columns = {c.key: getattr(copied, c.key) for c in Source.__mapper__.column_attrs}
    other.add(Source(**columns | {"id": 99, "name": "1-twin", "set_name": "twin", "harvest_id": None}))
    other.commit()
    answer = browsing.get(path)
    assert answer.status_code == 200
    assert words in answer.text
    assert [offer for offer in not_there if offer in answer.text] == []


def test_a_map_or_a_match_without_weights_is_refused(browsing: TestClient) -> None:
    assert browsing.post("/tiny/1-demo/map").status_code == 422
    assert browsing.post("/compare", data={"a": "tiny/1-demo", "b": "tiny/1-demo"}).status_code == 422
    assert browsing.get("/tiny/1-demo/3/vector.json").status_code == 422


# What others write ------------------------------------------------------------------------------------------------


def test_batches_that_sae_dashboard_wrote_are_read(other: Session, elsewhere: Settings) -> None:
    """tests/app/sae_dashboard holds what sae_dashboard 0.8.0 made of a tiny model; make_batches.py there says how."""
    path = HERE / "sae_dashboard" / "batches"
    (source,) = exchange.import_(other, elsewhere, path, quiet)
    rows = [f for p in sorted(path.glob("batch-*")) for f in json.loads(gzip.decompress(p.read_bytes()))["features"]]
    assert rows
    blobs = {
        index: evidence.unpack(blob)
        for index, blob in other.execute(
            select(Evidence.index, Evidence.blob).where(Evidence.harvest_id == source.harvest_id)
        )
    }
    for row in rows:
        made = blobs[row["feature_index"]]
        top = [max(a["values"]) for a in row["activations"] if a["bin_min"] == -1 and max(a["values"]) > 0]
        assert [e.max for e in made.top] == pytest.approx(sorted(top, reverse=True), abs=made.max_act / 60_000)
        assert int(made.histogram.sum()) == round(sum(row["freq_hist_data_bar_heights"]))
        assert made.density == pytest.approx(row["frac_nonzero"], abs=1e-4)
        width = (made.logits_high - made.logits_low) / 60_000
        assert made.top_logits.tolist() == pytest.approx(row["pos_values"], abs=width)


def np_directory(path: Path, **kinds: list[Any]) -> Path:
    home = path / "gpt2-small" / "8-res-jb"
    for kind, rows in kinds.items():
        (home / kind).mkdir(parents=True)
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        (home / kind / "batch-0.jsonl.gz").write_bytes(gzip.compress(lines))
    return path


ROW = {"modelId": "gpt2-small", "layer": "8-res-jb", "index": "2"}
ACTIVATION = {**ROW, "tokens": [" a", "<b>\0", " c"], "values": [0, 2.5, 0], "binMin": -1, "binContains": -1}


def test_what_was_taken_back_does_not_return_with_the_same_download(
    tmp_path: Path, other: Session, elsewhere: Settings
) -> None:
    said = [{**ROW, "description": text, "typeName": "oai_token-act-pair"} for text in ("wrong", "right")]
    path = np_directory(tmp_path / "np", activations=[ACTIVATION], explanations=said)
    (source,) = exchange.import_(other, elsewhere, path, quiet)
    wrong = other.scalars(select(Explanation).where(Explanation.text == "wrong")).one()
    kept = explanations.retire(other, LOCAL, wrong.id)
    exchange.import_(other, elsewhere, path, quiet)
    now, before = explanations.history(other, LOCAL, source.id, 2)
    assert [e.text for e in now if e.method != "heuristic"] == ["right"]
    assert [e.text for e in before] == ["wrong"]
    explanations.restore(other, LOCAL, kept.id)
    exchange.import_(other, elsewhere, path, quiet)
    texts = other.scalars(select(Explanation.text).where(Explanation.index == 2, Explanation.method != "heuristic"))
    assert sorted(texts) == ["right", "wrong"]


def test_an_import_leaves_the_label_that_people_agree_with(tmp_path: Path, other: Session, elsewhere: Settings) -> None:
    path = np_directory(tmp_path / "np", activations=[ACTIVATION])
    exchange.import_(other, elsewhere, path, quiet)
    ours = explanations.write(other, LOCAL, "gpt2-small", "8-res-jb", 2, "ours")
    explanations.vote(other, LOCAL, ours.id, True)
    said = {**ROW, "description": "theirs", "typeName": "oai_token-act-pair"}
    path = np_directory(tmp_path / "later", activations=[ACTIVATION], explanations=[said])
    exchange.import_(other, elsewhere, path, quiet)
    assert other.scalars(select(Feature.label).where(Feature.index == 2)).one() == "ours"
    explanations.vote(other, LOCAL, ours.id, False)
    assert other.scalars(select(Feature.label).where(Feature.index == 2)).one() == "theirs"


def test_a_download_of_activations_alone_can_be_looked_at(tmp_path: Path, other: Session, elsewhere: Settings) -> None:
    explanation = {**ROW, "description": "letters \0in brackets", "typeName": "oai_token-act-pair"}
    path = np_directory(tmp_path / "np", activations=[ACTIVATION, ACTIVATION], explanations=[explanation])
    (source,) = exchange.import_(other, elsewhere, path, quiet)
    assert (source.model_id, source.name, source.d_sae) == ("gpt2-small", "8-res-jb", 3)
    feature = other.get_one(Feature, (source.id, 2))
    assert (feature.label, feature.top_token, feature.max_act) == ("letters in brackets", "<b>", 2.5)


def test_counts_that_are_not_said_follow_from_density_and_histogram(
    tmp_path: Path, other: Session, elsewhere: Settings
) -> None:
    histogram = {"freq_hist_data_bar_heights": [30, 20], "freq_hist_data_bar_values": [0.5, 1.5]}
    row = {**ROW, "frac_nonzero": 0.005, "maxActApprox": 2.0, "pos_str": [" x"], "pos_values": [1.5], **histogram}
    exchange.import_(other, elsewhere, np_directory(tmp_path / "np", features=[row]), quiet)
    blob = other.scalars(select(Evidence.blob).where(Evidence.index == 2)).one()
    made = evidence.unpack(blob)
    assert (made.n_active, made.n_tokens, made.histogram.tolist()) == (50, 10_000, [30, 20])
    assert made.top_logits.tolist() == pytest.approx([1.5])


@pytest.mark.parametrize(
    ("kind", "row", "says"),
    [
        ("activations", ACTIVATION | {"values": [1.0]}, "3 tokens, but 1 values"),
        ("activations", ACTIVATION | {"tokens": "text"}, "tokens"),
        ("activations", ACTIVATION | {"tokens": [" a"] * 5000, "values": [1] * 5000}, "4096"),
        ("activations", ACTIVATION | {"values": ["x", 1, 2]}, "values"),
        ("activations", ACTIVATION | {"values": [1e300, 1, 2]}, "values"),
        ("activations", ACTIVATION | {"index": -1}, "no feature"),
        ("activations", ACTIVATION | {"index": "5000"}, "no feature"),
        ("features", {**ROW, "pos_str": [1]}, "pos_str"),
        ("features", {**ROW, "pos_values": [0.0] * 2000}, "pos_values"),
        ("features", {**ROW, "index": None}, "no feature"),
        ("features", [], "JSON object"),
        ("explanations", {**ROW, "description": ""}, "description"),
        ("explanations", {**ROW, "description": "x" * 200_000}, "description"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_imported(
    kind: str, row: Any, says: str, tmp_path: Path, other: Session, elsewhere: Settings
) -> None:
    path = np_directory(tmp_path / "np", **{kind: [row]})
    (path / "gpt2-small" / "8-res-jb" / "source.jsonl").write_text(json.dumps({"id": "8-res-jb"}))
    with pytest.raises(BadFile, match=says):
        exchange.import_(other, elsewhere, path, quiet)
    assert not other.scalars(select(Source)).all()
    assert not list(elsewhere.data_dir.glob("cache/*"))


@pytest.mark.parametrize("name", ["../..", "a/b/c", "", "jobs", "x" * 300])
def test_names_that_are_no_address_are_refused(name: str, tmp_path: Path, other: Session, elsewhere: Settings) -> None:
    path = np_directory(tmp_path / "np", activations=[ACTIVATION])
    about = {"id": "8-res-jb", "modelId": name or "."}
    (path / "gpt2-small" / "8-res-jb" / "source.jsonl").write_text(json.dumps(about))
    with pytest.raises(BadInput):
        exchange.import_(other, elsewhere, path, quiet)
    assert not other.scalars(select(Source)).all()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "features"),
        ('{"features": [', "no JSON"),
        ('{"features": [{"feature_index": 1, "activations": []}', "no JSON"),
        ('{"features": [' + "[" * 100_000, "nested|no JSON"),
        ('{"features": [7]}', "no object"),
        ('{"features": [{"feature_index": 1e9}]}', "no feature"),
        ('{"features": [{"feature_index": 1, "activations": []}]', "cut off"),
        ('{"features": [{"feature_index": 1, "activations": [{"tokens": ["a"], "values": []}]}]}', "1 tokens"),
    ],
)
def test_a_bad_batch_is_refused_in_words(
    text: str, says: str, tmp_path: Path, other: Session, elsewhere: Settings
) -> None:
    (tmp_path / "batch-0.json").write_text(text)
    with pytest.raises(BadFile, match=says):
        exchange.import_(other, elsewhere, tmp_path / "batch-0.json", quiet, "m", "s")
    assert not other.scalars(select(Source)).all()


def test_nan_in_a_batch_is_zero_and_a_bomb_is_refused(tmp_path: Path, other: Session, elsewhere: Settings) -> None:
    row = '{"feature_index": 1, "correlated_features_indices": [0], "correlated_features_pearson": [NaN], '
    batch = '{"model_id": "m", "layer": 4, "features": [' + row + '"activations": []}]}'
    (tmp_path / "batch-0.json").write_text(batch)
    (source,) = exchange.import_(other, elsewhere, tmp_path / "batch-0.json", quiet)
    assert source.name == "4-dashboard"
    (tmp_path / "batch-1.json.gz").write_bytes(gzip.compress(b'{"features": [' + b" " * 2**27))
    with pytest.raises(AtlasError):
        exchange.import_(other, elsewhere, tmp_path / "batch-1.json.gz", quiet)


def test_too_many_features_are_refused_with_both_numbers(tmp_path: Path, other: Session, elsewhere: Settings) -> None:
    path = np_directory(tmp_path / "np", activations=[ACTIVATION])
    about = {"id": "8-res-jb", "modelId": "m", "d_sae": 10**9}
    (path / "gpt2-small" / "8-res-jb" / "source.jsonl").write_text(json.dumps(about))
    with pytest.raises(TooLarge, match=r"1,000,000,000.*5,000"):
        exchange.import_(other, elsewhere, path, quiet)


def test_what_is_none_of_the_formats_is_told_what_they_are(tmp_path: Path, other: Session, elsewhere: Settings) -> None:
    with pytest.raises(BadFile, match="no Neuronpedia export"):
        exchange.import_(other, elsewhere, tmp_path, quiet)
