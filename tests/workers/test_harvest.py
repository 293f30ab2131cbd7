"""Evidence against a naive two-pass reference, whatever the batches and shards; and the job from end to end."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import select

from app import catalog, corpora, db, documents, evidence, harvests, labels, spill, weights
from app.errors import Conflict
from app.settings import Settings
from app.specs import HarvestSpec
from app.spill import Spill, write
from app.tables import Evidence, Feature, HarvestState, Job, Model
from app.tables import Harvest as HarvestRow
from tests.tiny import TEXT, Tiny
from workers import activations
from workers.language_model import LanguageModel
from workers.trainer import assemble, harvest
from workers.trainer.kinds import JobContext

CONTEXT = 9


@pytest.fixture
def job(tiny: Tiny, tmp_path: Path) -> Iterator[JobContext]:
    """A catalog with the tiny model, its TopK SAE and a corpus, and a harvest job in it."""
    settings = Settings(data_dir=tmp_path / "data", device="cpu")
    (settings.data_dir / "models").mkdir(parents=True)
    (settings.data_dir / "models" / "tiny").symlink_to(tiny.model.path)
    engine = db.connect(settings)
    db.migrate(engine)
    words = TEXT.split()
    lines = [" ".join(words[i % 7 :: 1 + i % 5]) + "\n\n" for i in range(60)]
    (tmp_path / "c.txt").write_text("".join(lines))
    spec = HarvestSpec(
        model="tiny", source="1-x", corpus="c", n_tokens=1_500, context_size=CONTEXT, n_top=4, n_per_interval=2
    )  # pyright: ignore[reportCallIssue]
    make = db.sessions(engine)
    with make.begin() as session:
        card = harvest.loaded.LanguageModel.load(Path(tiny.model.path)).card
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        corpora.add_corpus(session, settings, documents.read(tmp_path / "c.txt"), "c")
        facts = weights.check_sae(Path(tiny.topk.path), card.d_model, settings)
        harvests.catalogue_sae(session, settings, facts, model_id="tiny", set_name="x", metrics={}, origin={})
        facts = weights.check_sae(Path(tiny.standard.path), card.d_model, settings)
        harvests.catalogue_sae(session, settings, facts, model_id="tiny", set_name="y", metrics={}, origin={})
        row = Job(kind="harvest", title="t", spec=spec.model_dump(), workflow_id="w", result={})
        session.add(row)
        session.flush()
        job_id = row.id
    directory = settings.job_dir(job_id)
    directory.mkdir(parents=True)
    yield JobContext(settings, make, job_id, spec.model_dump(), directory)
    engine.dispose()


def run(context: JobContext) -> dict[str, object]:
    kind = harvest.Harvest()
    for step in kind.plan(context):
        kind.run(context, step)
    return kind.finish(context)


def asked(context: JobContext, **changes: Any) -> JobContext:
    """The same job with a changed spec, begun anew."""
    for path in context.directory.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return dataclasses.replace(context, spec={**context.spec, **changes})


def stored(context: JobContext, name: str = "1-x", corpus: str = "c") -> dict[int, bytes]:
    return {index: blob for index, (blob, _) in rows_of(context, name, corpus).items()}


def rows_of(context: JobContext, name: str = "1-x", corpus: str = "c") -> dict[int, tuple[bytes, bytes | None]]:
    with context.sessions() as session:
        source = harvests.source_named(session, "tiny", name)
        corpus_id = corpora.corpus_named(session, corpus).id
        wanted = (HarvestRow.source_id == source.id) & (HarvestRow.corpus_id == corpus_id)
        query = select(Evidence).join(HarvestRow, HarvestRow.id == Evidence.harvest_id).where(wanted)
        return {row.index: (row.blob, row.effects) for row in session.scalars(query)}


def row(context: JobContext, name: str = "1-x") -> HarvestRow:
    with context.sessions() as session:
        source = harvests.source_named(session, "tiny", name)
        return session.scalars(select(HarvestRow).where(HarvestRow.source_id == source.id)).one()


def naive_acts(context: JobContext) -> np.ndarray:
    """[contexts, positions, d_sae] of the whole corpus in one forward pass; first positions zero."""
    reading = harvest.reading_of(context)
    ids = torch.from_numpy(reading.stream.contexts(np.arange(reading.n_contexts), CONTEXT, reading.bos))
    x = reading.model.read(ids, [reading.coder.hook_name])[reading.coder.hook_name]
    acts = reading.coder.encode(x.flatten(0, 1)).reshape(*ids.shape, -1).numpy()
    acts[:, 0] = 0
    return acts


def test_an_sae_trained_without_a_first_token_is_harvested_without_it(job: JobContext) -> None:
    reading = harvest.reading_of(job)
    assert reading.bos == 0
    metadata = {**reading.coder.config["metadata"], "prepend_bos": False}
    coder = dataclasses.replace(reading.coder, config={**reading.coder.config, "metadata": metadata})
    bare = dataclasses.replace(reading, coder=coder)
    _, [(latents, tokens, values)] = next(harvest.sparse_activations([bare], np.arange(2)))
    ids = torch.from_numpy(reading.stream.tokens[: 2 * CONTEXT].astype(np.int64)).reshape(2, CONTEXT)
    x = reading.model.read(ids, [coder.hook_name])[coder.hook_name]
    expected = coder.encode(x.flatten(0, 1)).numpy()
    expected[::CONTEXT] = 0  # first positions have no activations, with or without that token
    found = np.zeros_like(expected)
    found[tokens, latents] = values
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_evidence_equals_a_naive_two_pass_reference(job: JobContext) -> None:
    acts = naive_acts(job)
    reading = harvest.reading_of(job)
    result = run(job)
    assert result["n_tokens"] == acts.shape[0] * (CONTEXT - 1)
    assert acts.shape[0] > 150
    for latent, blob in stored(job).items():
        found, mine = evidence.unpack(blob), acts[:, :, latent]
        active = mine[mine > 0]
        assert found.n_active == len(active)
        if not len(active):
            assert found.top == ()
            continue
        assert found.max_act == pytest.approx(active.max(), rel=1e-4)
        assert found.mean_act == pytest.approx(active.mean(), rel=1e-4)
        assert abs(found.histogram - np.histogram(active, bins=50, range=(0, active.max()))[0]).sum() <= 2
        peaks = mine.max(axis=1)
        for example in [*found.top, *(e for band in found.intervals for e in band.examples)]:
            dense = np.zeros(CONTEXT)
            dense[example.positions] = example.values
            np.testing.assert_allclose(dense, mine[example.context], rtol=1e-3, atol=found.max_act * 1e-4)
        texts = {tuple(reading.stream.context(e.context, CONTEXT, reading.bos)) for e in found.top}
        assert len(texts) == len(found.top)
        best = sorted(set(np.round(peaks[peaks > 0], 4)), reverse=True)[0]
        assert found.top[0].max == pytest.approx(best, rel=1e-3)
        assert sum(band.count for band in found.intervals) == found.n_active


def test_each_interval_holds_contexts_that_peak_in_it(job: JobContext) -> None:
    run(job)
    n_examples = 0
    for blob in stored(job).values():
        for band in evidence.unpack(blob).intervals:
            for example in band.examples:
                assert band.low * 0.999 <= example.max <= band.high * 1.001
                n_examples += 1
    assert n_examples > 20


def test_correlations_equal_numpy_over_all_tokens(job: JobContext) -> None:
    acts = naive_acts(job)[:, 1:].reshape(-1, 40).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.nan_to_num(np.corrcoef(acts.T), nan=0.0)
    run(job)
    for latent, blob in stored(job).items():
        found = evidence.unpack(blob)
        if found.n_active:
            np.testing.assert_allclose(found.pearson, expected[latent, found.correlated], atol=2e-3)
            best = np.delete(expected[latent], latent).max()
            assert float(found.pearson[0]) == pytest.approx(best, abs=2e-3)


def test_shards_and_batches_change_nothing(job: JobContext, monkeypatch: pytest.MonkeyPatch) -> None:
    run(job)
    expected = stored(job)
    (job.directory / "result.json").unlink()
    monkeypatch.setattr(harvest, "CONTEXTS_PER_SHARD", 37)
    monkeypatch.setattr(harvest, "LATENTS_PER_STEP", 7)
    monkeypatch.setattr(harvest, "LATENTS_PER_CHUNK", 3)
    # Forward passes of the same contexts, so that activations are equal to the bit and only the cutting differs.
    monkeypatch.setattr(activations, "TOKENS_PER_FORWARD", CONTEXT)
    one_by_one = dataclasses.replace(job)
    run(one_by_one)
    for latent, blob in stored(job).items():
        a, b = evidence.unpack(expected[latent]), evidence.unpack(blob)
        assert (a.n_active, [e.context for e in a.top]) == (b.n_active, [e.context for e in b.top])
        assert a.max_act == pytest.approx(b.max_act, rel=1e-5)
        assert [[e.context for e in i.examples] for i in a.intervals] == [
            [e.context for e in i.examples] for i in b.intervals
        ]


def test_several_saes_are_read_in_one_pass_with_the_evidence_each_has_alone(
    job: JobContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {}
    for name in ("1-x", "1-y"):
        run(asked(job, sources=(name,)))
        alone[name] = stored(job, name)
    passes: list[int] = []
    read = LanguageModel.read

    def counted(self: LanguageModel, ids: torch.Tensor, *args: Any) -> Any:
        passes.append(len(ids))
        return read(self, ids, *args)

    monkeypatch.setattr(LanguageModel, "read", counted)
    together = asked(job, sources=("1-x", "1-y"), n_effects=0)
    result = run(together)
    assert sum(passes) == harvest.reading_of(together).n_contexts
    assert {name: stored(job, name) for name in alone} == alone
    assert result["dead_features"].keys() == alone.keys()  # type: ignore[union-attr]


def test_silent_examples_are_silent_and_hard_ones_are_near_the_positives(job: JobContext) -> None:
    job = asked(job, sources=("1-y",), n_silent=3, n_hard=4)
    acts, reading = naive_acts(job), harvest.reading_of(job)
    run(job)
    kinds = {"silent": 0, "token": 0, "neighbour": 0}
    for latent, blob in stored(job, "1-y").items():
        found, peaks = evidence.unpack(blob), acts[:, :, latent].max(axis=1)
        n_free = int((peaks == 0).sum())
        assert len(found.silent) == min(3, n_free) or n_free < len(peaks) / 10
        assert len({e.context for e in found.silent}) == len(found.silent)
        for example in (*found.silent, *found.hard_negatives):
            assert peaks[example.context] == 0
        kinds["silent"] += len(found.silent)
        tokens = {reading.text.token_at(e.context, e.peak) for e in found.top}
        for example in found.hard_negatives:
            if example.neighbour is None:
                assert reading.text.token_at(example.context, example.position) in tokens
                kinds["token"] += 1
            else:
                assert example.neighbour in found.neighbours
                assert acts[example.context, example.position, example.neighbour] > 0
                kinds["neighbour"] += 1
    assert min(kinds.values()) > 5


def test_distributions_over_the_sae_equal_numpy(job: JobContext) -> None:
    acts, reading = naive_acts(job), harvest.reading_of(job)
    run(job)
    summary = row(job).summary
    l0 = (acts[:, 1:] > 0).sum(axis=2).ravel()
    edges = summary["l0_histogram"]["edges"]
    assert summary["l0_histogram"]["counts"] == np.histogram(l0, bins=edges)[0].tolist()
    # Reconstructions are looked at in the first forward pass of the only shard.
    n = min(activations.TOKENS_PER_FORWARD // CONTEXT, reading.n_contexts)
    ids = torch.from_numpy(reading.stream.contexts(np.arange(n), CONTEXT, reading.bos))
    x = reading.model.read(ids, [reading.coder.hook_name])[reading.coder.hook_name]
    x_hat = reading.coder.reconstruct(x.flatten(0, 1)).view(x.shape)
    explained = summary["explained_variance_by_position"]
    assert explained[0] is None
    for position in range(1, CONTEXT):
        seen, error = x[:, position].double(), (x - x_hat)[:, position].double()
        expected = 1 - error.square().sum() / (seen - seen.mean(dim=0)).square().sum()
        assert explained[position] == pytest.approx(float(expected), abs=1e-5)
    assert sum(summary["decoder_norms"]["counts"]) == 40
    assert summary["n_dead"] + sum(summary["density_histogram"]["counts"]) == 40


def test_effects_are_stored_in_the_order_of_the_top_examples(job: JobContext) -> None:
    run(asked(job, n_effects=2))
    n_effects = 0
    for blob, packed in rows_of(job).values():
        found = evidence.unpack(blob)
        assert packed is not None
        effects = evidence.unpack_effects(packed)
        assert [(e.context, e.position) for e in effects] == [(e.context, e.peak) for e in found.top[:2]]
        n_effects += len(effects)
    assert n_effects > 20


def test_kept_activations_answer_other_thresholds_and_windows_and_a_longer_harvest_reads_only_what_is_new(
    job: JobContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harvest, "CONTEXTS_PER_SHARD", 50)
    short = asked(job, keep_activations=True, n_tokens=1_000)
    run(short)
    kept = spill.KeptActivations(short.settings.activations_dir(row(job).activations))
    acts, stream = naive_acts(short), harvest.reading_of(short).stream
    for latent in range(0, 40, 7):
        threshold = float(acts[:, :, latent].max()) / 2
        found = kept.of(latent, above=threshold)
        contexts, positions = np.nonzero(acts[:, :, latent] > threshold)
        assert found.offsets.tolist() == (contexts * (CONTEXT - 1) + positions - 1).tolist()
        np.testing.assert_allclose(found.values, acts[contexts, positions, latent], rtol=1e-4)
        assert kept.density(latent, threshold) == pytest.approx(len(contexts) / acts[:, 1:, 0].size)
        for (low, high), offset in zip(found.windows(3).tolist(), found.offsets.tolist(), strict=True):
            assert stream.tokens[low:high][offset - low] == stream.tokens[offset]
    read: list[int] = []
    contexts_of = harvest.read_contexts
    monkeypatch.setattr(harvest, "read_contexts", lambda *args: (read.extend(args[2].tolist()), contexts_of(*args))[1])
    longer = asked(job, keep_activations=True, n_tokens=1_500)
    run(longer)
    assert sorted(read) == list(range(100, harvest.reading_of(longer).n_contexts))
    extended = stored(job)
    run(asked(job, n_tokens=1_500))
    assert stored(job) == extended


def test_a_second_corpus_is_kept_apart_and_can_be_shown_instead(job: JobContext, tmp_path: Path) -> None:
    run(job)
    (tmp_path / "d.txt").write_text(" ".join(reversed(TEXT.split())) * 60)
    with job.sessions.begin() as session:
        corpora.add_corpus(session, job.settings, documents.read(tmp_path / "d.txt"), "d")
    first = stored(job)
    run(asked(job, corpus="d"))
    assert stored(job) == first
    assert stored(job, corpus="d") != first
    with job.sessions.begin() as session:
        card = catalog.source_card(session, "tiny", "1-x")
        cards = catalog.harvests_of(session, card)
        assert [c.corpus for c in cards] == ["c", "d"]
        index = next(i for i, blob in first.items() if evidence.unpack(blob).top)
        other = catalog.feature_record(session, "tiny", "1-x", index, evidence=cards[1].id)
        assert other.blob == stored(job, corpus="d")[index]
        assert catalog.feature_record(session, "tiny", "1-x", index).blob == first[index]
        with pytest.raises(catalog.NotInCatalog, match="no evidence 99"):
            catalog.feature_record(session, "tiny", "1-x", index, evidence=99)
        before = catalog.feature_record(session, "tiny", "1-x", index).feature
        source = harvests.source_named(session, "tiny", "1-x")
        harvests.show(session, job.settings, source, cards[1].id)
    with job.sessions() as session:
        after = catalog.feature_record(session, "tiny", "1-x", index)
        assert after.blob == stored(job, corpus="d")[index]
        assert after.feature.density == evidence.unpack(after.blob).density  # type: ignore[arg-type]
        assert after.feature != before


def test_partial_evidence_is_shown_while_it_grows_and_says_how_far_it_is(
    job: JobContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harvest, "CONTEXTS_PER_SHARD", 60)
    kind = harvest.Harvest()
    steps = kind.plan(job)
    assert [step for step in steps if step.startswith("preview")] == ["preview 1/4", "preview 2/4"]
    seen: list[tuple[tuple[int, int] | None, int]] = []
    for step in steps:
        kind.run(job, step)
        if step.startswith("preview"):
            with job.sessions() as session:
                _, _, found = catalog.source_page(session, "tiny", "1-x")
            assert found is not None
            assert found.partial
            seen.append((found.progress, found.n_tokens))
            assert len(stored(job)) == 40
    assert seen == [((1, 4), 60 * (CONTEXT - 1)), ((2, 4), 120 * (CONTEXT - 1))]
    first = row(job).id
    kind.finish(job)
    assert (row(job).id, row(job).state) == (first, HarvestState.COMPLETE)
    again = asked(job)
    for step in kind.plan(again)[:2]:
        kind.run(again, step)
    assert row(job).state == HarvestState.COMPLETE


def test_the_catalog_shows_the_features_and_the_job_tidies_up(job: JobContext) -> None:
    result = run(job)
    with job.sessions() as session:
        source = harvests.source_named(session, "tiny", "1-x")
        features = session.scalars(select(Feature).order_by(Feature.index)).all()
    assert result["url"] == "/tiny/1-x"
    assert source.harvest_id is not None
    assert [f.index for f in features] == list(range(40))
    assert any(f.label.startswith("fires") for f in features)
    assert [path.name for path in job.directory.iterdir()] == ["result.json"]
    assert harvest.Harvest().finish(job) == result


def test_a_second_harvest_of_the_corpus_replaces_the_first(job: JobContext) -> None:
    run(job)
    first = stored(job)
    (job.directory / "result.json").unlink()
    run(job)
    assert stored(job) == first


def test_an_sae_replaced_during_its_harvest_stops_it_and_loses_the_old_evidence(job: JobContext, tiny: Tiny) -> None:
    run(job)
    assert stored(job)
    (job.directory / "result.json").unlink()
    kind = harvest.Harvest()
    steps = kind.plan(job)
    other = weights.check_sae(Path(tiny.standard.path), None, job.settings)
    with job.sessions.begin() as session:
        with pytest.raises(Conflict, match="another SAE"):
            harvests.held(session, "tiny", other, "x")
        harvests.catalogue_sae(session, job.settings, other, model_id="tiny", set_name="x", metrics={}, origin={})
    assert not stored(job)
    with pytest.raises(Conflict, match="replaced"):
        kind.run(job, steps[0])


def test_shards_merge_into_one_order(tmp_path: Path) -> None:
    write(tmp_path / "a", np.array([2, 0, 2]), np.array([5, 1, 3]), np.array([1.0, 2.0, 3.0], dtype=np.float32), 4)
    write(tmp_path / "b", np.array([0, 2]), np.array([9, 7]), np.array([4.0, 5.0], dtype=np.float32), 4)
    records = Spill([tmp_path / "a", tmp_path / "b"], 4).records(0, 4)
    assert records.of(2)[0].tolist() == [3, 5, 7]
    assert records.of(2)[1].tolist() == [3.0, 1.0, 5.0]
    assert records.of(0)[0].tolist() == [1, 9]
    assert len(records.of(1)[0]) == 0
    assert Spill([tmp_path / "a", tmp_path / "b"], 4).records(2, 3).of(0)[0].tolist() == [3, 5, 7]


def test_a_spill_is_read_in_runs_of_few_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "RECORDS_PER_CHUNK", 5)
    counts = [2, 3, 1, 0, 9, 4, 1, 0]
    latents = np.repeat(np.arange(8), counts)
    write(tmp_path / "a", latents, np.arange(20), np.ones(20, dtype=np.float32), 8)
    found = Spill([tmp_path / "a"], 8)
    assert list(found.chunks(0, 8, 100)) == [(0, 2), (2, 4), (4, 5), (5, 8)]
    assert list(found.chunks(1, 7, 2)) == [(1, 3), (3, 4), (4, 5), (5, 7)]


def test_the_largest_of_a_row_are_those_of_a_stable_sort() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 3, 10, 40, 50):
        row = np.round(rng.random(40), 1)  # full of ties
        assert assemble._largest(row, n).tolist() == np.argsort(-row, kind="stable")[:n].tolist()


def test_correlation_of_a_thinned_corpus_stays_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    context, n_contexts = 11, 2_000
    tokens = np.array([t for t in range(context * n_contexts) if t % context])
    a = rng.random(len(tokens)).astype(np.float32)
    b = a + 0.3 * rng.random(len(tokens)).astype(np.float32)
    write(tmp_path / "s", np.repeat([0, 1], len(tokens)), np.tile(tokens, 2), np.concatenate([a, b]), 3)
    spill = Spill([tmp_path / "s"], 3)
    expected = np.corrcoef(a, b)[0, 1]
    for limit, error in ((10**9, 1e-4), (10_000, 0.02)):
        monkeypatch.setattr(assemble, "_MAX_CORRELATED_RECORDS", limit)
        found = assemble.Correlation.of(spill, 3, n_contexts, context).strongest(0, 1)
        assert found[0][0, 0] == 1
        assert found[1][0, 0] == pytest.approx(expected, abs=error)


@pytest.mark.parametrize(
    ("peaks", "before", "promoted", "label"),
    [
        ([" Monday"] * 7 + [" Tuesday"] * 3, ["on"] * 10, [], "fires on `Monday`"),
        (list("abcdefghij"), ["the"] * 10, [" x"], "fires after `the`"),
        (["walking", "walked", "walks", "walker"], ["1", "2", "3", "4"], [], "fires on words in `wal`…"),
        ([], [], ["x"], ""),
    ],
)
def test_labels_say_what_they_were_made_from(
    peaks: list[str], before: list[str], promoted: list[str], label: str
) -> None:
    assert labels.heuristic_label(peaks, before, promoted).startswith(label)
