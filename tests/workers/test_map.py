"""Maps and matches as jobs, on planted directions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from app import db, harvests, maps, matches, weights
from app.settings import Settings
from app.specs import MapSpec, MatchSpec
from app.tables import Feature, Job, Model
from tests.tiny import Tiny
from workers.checkpoints import load_sae
from workers.language_model import LanguageModel
from workers.trainer.kinds import Cancelled, JobContext, kind
from workers.trainer.map import clustered, layout, named, terms_of

SPEC = MapSpec(model="m", source="s")  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def planted() -> np.ndarray:
    """240 directions in three bundles of 80, in 16 dimensions."""
    rng = np.random.default_rng(0)
    middles = np.eye(16)[[1, 5, 9]]
    return (np.repeat(middles, 80, axis=0) + 0.05 * rng.standard_normal((240, 16))).astype(np.float32)


@pytest.fixture(scope="module")
def placed(planted: np.ndarray) -> np.ndarray:
    return layout(planted, SPEC)


def test_a_map_is_the_same_every_time_and_keeps_bundles_of_directions_together(
    planted: np.ndarray, placed: np.ndarray
) -> None:
    assert placed.dtype == np.float32
    assert np.abs(placed).max() == pytest.approx(1.0)
    np.testing.assert_array_equal(layout(planted, SPEC), placed)
    middles = placed.reshape(3, 80, 2).mean(axis=1)
    within = np.linalg.norm(placed.reshape(3, 80, 2) - middles[:, None], axis=-1).max()
    between = min(np.linalg.norm(middles[i] - middles[j]) for i in range(3) for j in range(i))
    assert within < between


def test_the_epochs_are_told_and_a_cancelled_layout_ends_at_once(planted: np.ndarray) -> None:
    told: list[tuple[int, int]] = []
    layout(planted, SPEC, lambda done, n_epochs: told.append((done, n_epochs)))
    assert told[-1] == (500, 500)
    assert told == sorted(told)

    def cancel(done: int, n_epochs: int) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        layout(planted, SPEC, cancel)


def test_clusters_are_named_by_what_their_labels_share(placed: np.ndarray) -> None:
    labels = ["fires on `Monday`, `Tuesday`"] * 80 + ["fires on `the`"] * 40 + ["fires on `(`"] * 40
    labels += ["animals that live in rivers"] * 80
    cluster = clustered(placed)
    found = named(placed, cluster, labels)
    by_bundle = [np.bincount(cluster[i : i + 80][cluster[i : i + 80] < 65535]).argmax() for i in (0, 80, 160)]
    assert len(set(by_bundle)) == 3
    assert {term.strip() for term in found[by_bundle[0]].name.split(",")} == {"monday", "tuesday"}
    assert set(found[by_bundle[2]].name.split(", ")) <= {"animals", "live", "rivers"}
    assert sum(c.n for c in found) == int((cluster < 65535).sum())
    assert terms_of("promotes `(`; fires on `walk`, …") == {"(", "walk"}


def test_an_sae_of_a_few_features_gets_a_map_too() -> None:
    few = layout(np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32), SPEC)
    assert few.shape == (7, 2)
    assert np.isfinite(few).all()
    assert set(clustered(few).tolist()) == {65535}


@pytest.fixture
def jobs_on(tiny: Tiny, tmp_path: Path) -> Iterator[JobContext]:
    settings = Settings(data_dir=tmp_path / "data", device="cpu")
    engine = db.connect(settings)
    db.migrate(engine)
    make = db.sessions(engine)
    with make.begin() as session:
        card = LanguageModel.load(Path(tiny.model.path)).card
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        for sae, name in ((tiny.topk, "x"), (tiny.standard, "y")):
            facts = weights.check_sae(Path(sae.path), card.d_model, settings)
            source = harvests.catalogue_sae(
                session, settings, facts, model_id="tiny", set_name=name, metrics={}, origin={}
            )
            session.add(
                Feature(source_id=source.id, index=3, density=0.1, max_act=1.0, label="a", top_token="", top_logit="")
            )
        job = Job(kind="k", title="t", spec={}, workflow_id="w", result={})
        session.add(job)
        session.flush()
        number = job.id
    directory = settings.job_dir(number)
    directory.mkdir(parents=True)
    yield JobContext(settings, make, number, {}, directory)
    engine.dispose()


def run(context: JobContext, name: str, spec: MapSpec | MatchSpec) -> None:
    given = JobContext(
        context.settings, context.sessions, context.job_id, spec.model_dump(mode="json"), context.directory
    )
    for step in kind(name).plan(given):
        kind(name).run(given, step)
    kind(name).finish(given)


def test_the_map_of_a_source_is_stored_and_forgotten_with_its_weights(jobs_on: JobContext, tiny: Tiny) -> None:
    run(jobs_on, "map", MapSpec(model="tiny", source="1-x"))  # pyright: ignore[reportCallIssue]
    with jobs_on.sessions.begin() as session:
        source = harvests.source_named(session, "tiny", "1-x")
        found = maps.map_of(session, source.id)
        assert found is not None
        assert (found.coordinates.shape, found.cluster.shape) == ((40, 2), (40,))
        assert found.about["seed"] == 0
        other = weights.check_sae(Path(tiny.standard.path), None, jobs_on.settings)
        harvests.catalogue_sae(session, jobs_on.settings, other, model_id="tiny", set_name="x", metrics={}, origin={})
        assert maps.map_of(session, source.id) is None


def test_a_match_names_the_nearest_features_both_ways(jobs_on: JobContext, tiny: Tiny) -> None:
    run(jobs_on, "match", MatchSpec(model="tiny", source="1-x", other="1-y", n=4))
    here, there = (load_sae(Path(sae.path)).W_dec.numpy() for sae in (tiny.topk, tiny.standard))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (here, there)]
    cosines = unit[0] @ unit[1].T
    with jobs_on.sessions() as session:
        ids = [harvests.source_named(session, "tiny", name).id for name in ("1-x", "1-y")]
        for (a, b), expected in ((ids, cosines), (ids[::-1], cosines.T)):
            found = matches.match_of(session, a, b)
            assert found is not None
            assert found.indices.tolist() == np.argsort(-expected, axis=1)[:, :4].tolist()
            np.testing.assert_allclose(found.cosines, -np.sort(-expected, axis=1)[:, :4], atol=1e-3)
            assert matches.matched_with(session, a) == [b]
