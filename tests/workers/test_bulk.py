"""The bulk job: activations as parquet against sae-lens, groups told apart, bounded and durable."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import SAE
from scipy.stats import mannwhitneyu

from app import bulk, db, jobs, uploads
from app.errors import BadFile, BadInput, TooLarge
from app.settings import Settings
from app.specs import BulkSpec
from app.tables import Job, JobState
from tests.tiny import HOOK, Tiny
from tests.workers import slow_trainer
from workers.language_model import LanguageModel
from workers.trainer import bulk as job_of_bulk
from workers.trainer.bulk import Bulk, auc, effect_sizes, separating, split
from workers.trainer.kinds import JobContext

TEXTS = ["the cat sat on the mat", "", "rain fell all night", "the dog ran", "iron and bread", "seven hills", "rivers"]
LABELS = ["a", "a", "b", "a", "b", "b", "a"] * 2


def write(path: Path, texts: list[str], labels: list[str]) -> Path:
    rows = [{"text": text, "group": label} for text, label in zip(texts, labels, strict=False)]
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in rows))
        case ".csv":
            with path.open("w", newline="") as out:
                writer = csv.DictWriter(out, ["text", "group"])
                writer.writeheader()
                writer.writerows(rows)
        case _:
            pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def context(settings: Settings, number: int = 1, **spec: Any) -> JobContext:
    asked = BulkSpec.model_validate({"model": "tiny", "source": "1-topk", **spec}).model_dump()
    sessions = db.sessions(db.connect(settings))
    with sessions.begin() as session:
        session.merge(Job(id=number, kind="bulk", title="", spec=asked, result={}, workflow_id="", state="running"))
    directory = settings.job_dir(number)
    directory.mkdir(parents=True, exist_ok=True)
    return JobContext(settings, sessions, number, asked, directory)


def done(job: JobContext) -> dict[str, Any]:
    for step in Bulk().plan(job):
        Bulk().run(job, step)
    return Bulk().finish(job)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_activations_of_every_text_are_those_of_sae_lens(
    settings: Settings, tiny: Tiny, tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_of_bulk, "TEXTS_PER_STEP", 3)
    monkeypatch.setattr(job_of_bulk, "PADDED_TOKENS", 40)
    job = context(settings, path=str(write(tmp_path / f"texts{suffix}", TEXTS, LABELS)))
    result = done(job)
    table = pq.read_table(job.directory / "activations.parquet").to_pydict()
    model, theirs = LanguageModel.load(Path(tiny.model.path)), SAE.load_from_disk(tiny.topk.path)
    n_found = 0
    for row, text in enumerate(TEXTS):
        ids = model.to_ids(text)
        expected = theirs.encode(model.read(torch.tensor([ids]), [HOOK])[HOOK])[0].detach().numpy()
        expected[0] = 0
        found = np.zeros_like(expected)
        for n in (n for n, own in enumerate(table["row"]) if own == row):
            found[table["position"][n], table["latent"][n]] = table["value"][n]
            assert table["token"][n] == ids[table["position"][n]]
            n_found += 1
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert result["activations"] == n_found == len(table["row"])
    assert result["texts"] == len(TEXTS)
    assert {path.name for path in job.directory.iterdir()} == {"result.json", "activations.parquet"}
    assert Bulk().finish(job) == result, "a second finish, after a crash, changes nothing"


def test_maxima_are_the_largest_of_each_text_and_feature(settings: Settings, tmp_path: Path) -> None:
    path = str(write(tmp_path / "t.jsonl", TEXTS, LABELS))
    whole, top = context(settings, 1, path=path), context(settings, 2, path=path, output="maxima")
    done(whole)
    done(top)
    largest: dict[tuple[int, int], float] = {}
    for found in pq.read_table(whole.directory / "activations.parquet").to_pylist():
        key = (found["row"], found["latent"])
        largest[key] = max(found["value"], largest.get(key, 0.0))
    rows = pq.read_table(top.directory / "maxima.parquet").to_pylist()
    assert {(found["row"], found["latent"]): found["value"] for found in rows} == largest
    assert len(rows) == len(largest)


def test_a_step_that_runs_again_after_a_crash_gives_the_same(settings: Settings, tmp_path: Path) -> None:
    job = context(settings, path=str(write(tmp_path / "t.jsonl", TEXTS * 2, LABELS)), label_column="group")
    steps = Bulk().plan(job)
    (tmp_path / "t.jsonl").unlink()  # the job has its own copy
    for step in steps:
        Bulk().run(job, step)
        (job.directory / "half.new").write_bytes(b"what a kill left")
        Bulk().run(job, step)
    assert Bulk().finish(job)["groups"] == "a (8) and b (6)"
    assert not (job.directory / "half.new").exists()


def test_a_job_whose_trainer_is_killed_goes_on_and_leaves_the_files_of_an_uninterrupted_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_of_bulk, "TEXTS_PER_STEP", slow_trainer.TEXTS_PER_STEP)
    spec = {"label_column": "group", "path": str(write(tmp_path / "t.jsonl", TEXTS * 2, LABELS))}
    whole = context(settings, 1000, **spec)
    done(whole)
    durable = settings.model_copy(update={"beat_seconds": 0.3, "takeover_seconds": 3.0})
    sessions = db.sessions(db.connect(durable))
    with sessions.begin() as session:
        jobs.get(session, 1000).state = JobState.DONE
        job_id = jobs.submit(session, durable, "bulk", "b", whole.spec | spec).id
    log = tmp_path / "trainer.log"

    def job() -> Job:
        with sessions() as session:
            return jobs.get(session, job_id)

    def begun() -> list[str]:
        starts = durable.job_dir(job_id) / "starts"
        return starts.read_text().splitlines() if starts.exists() else []

    with slow_trainer.running(durable, log) as first:
        until(lambda: len(begun()) == 2, log)
        first.kill()
        first.wait()
    left = begun()
    with slow_trainer.running(durable, log):
        until(lambda: len(begun()) > 2, log)
        again = begun()
        until(lambda: JobState(job().state).ended, log)
    assert job().state == JobState.DONE, job().error
    assert [line.split()[0] for line in left] == ["0", "1"]
    assert again[2].split()[0] == "1", "it goes on at the part that was cut off"
    for name in bulk.RESULT_FILES:
        own, other = whole.directory / name, durable.job_dir(job_id) / name
        assert own.exists() == other.exists()
        assert not own.exists() or own.read_bytes() == other.read_bytes(), name
    assert (whole.directory / "activations.parquet").exists()
    assert (whole.directory / "separating.json").exists()


def until(condition: Callable[[], Any], log: Path, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def test_the_features_that_differ_are_found_and_scored_on_texts_held_out() -> None:
    random, n = np.random.default_rng(3), 60
    second = np.arange(n) % 2 == 1
    values = random.random((n, 7)).astype(np.float32) * (random.random((n, 7)) > 0.5)
    values[:, 4] += 3 * second
    values[:, 2] += 5 * ~second
    values[:, 6] = 0
    rows, latents = values.nonzero()
    parts = [
        {"row": rows[own], "latent": latents[own], "value": values[rows[own], latents[own]]}
        for own in (rows < 25, rows >= 25)
    ]
    held_out = split(second, 0.3, 0)
    train = ~held_out
    d = effect_sizes(iter(parts), second, train, 7)
    one, two = values[train & ~second].astype(float), values[train & second].astype(float)
    pooled = np.sqrt(
        ((len(one) - 1) * one.var(0, ddof=1) + (len(two) - 1) * two.var(0, ddof=1)) / (len(one) + len(two) - 2)
    )
    np.testing.assert_allclose(d[:6], ((two.mean(0) - one.mean(0)) / pooled)[:6], rtol=1e-5)
    assert d[6] == 0
    found = separating(lambda: iter(parts), second, held_out, 7, 3)
    assert {f.latent for f in found[:2]} == {2, 4}
    by_latent = {f.latent: f for f in found}
    assert by_latent[4].effect_size > 0 > by_latent[2].effect_size
    assert by_latent[4].auc == 1
    assert by_latent[2].auc == 0
    for f in found:
        groups = values[held_out & ~second, f.latent], values[held_out & second, f.latent]
        expected = mannwhitneyu(groups[1], groups[0]).statistic / (len(groups[0]) * len(groups[1]))
        assert f.auc == pytest.approx(expected) == auc(*(g.astype(float) for g in groups))
        assert f.means[1] == pytest.approx(values[second, f.latent].mean())


def test_a_split_holds_some_of_both_groups_out_and_depends_on_its_seed_alone() -> None:
    second = np.array([True] * 4 + [False] * 20)
    held_out = split(second, 0.3, 5)
    assert held_out[:4].sum() == 1
    assert held_out[4:].sum() == 6
    assert (split(second, 0.3, 5) == held_out).all()
    assert split(second, 0.89, 5)[:4].sum() == 2


@pytest.mark.parametrize(
    ("content", "spec", "words"),
    [
        ('{"text": "a"}', {"text_column": "body"}, "no column 'body'; it has text"),
        ('{"text": 3}', {}, "int, not a text"),
        ("{broken", {}, "Line 1"),
        ("[1]", {}, "no JSON object"),
        ("", {}, "no row"),
        ('{"text": "a", "g": 1}\n' * 5, {"label_column": "g"}, "names 1 groups"),
        ('{"text": "a", "g": 1}\n{"text": "b", "g": 2}\n' * 3, {"label_column": "g"}, "A group has 3 texts; 4"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_words(
    settings: Settings, tmp_path: Path, content: str, spec: dict[str, Any], words: str
) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises((BadFile, BadInput), match=words):
        Bulk().plan(context(settings, path=str(tmp_path / "t.jsonl"), **spec))
    with pytest.raises(BadFile, match="ends in none of"):
        next(bulk.rows_of(tmp_path / "t.pickle", "text", ""))


def test_an_upload_goes_once_its_texts_are_copied_and_a_users_own_file_stays(
    settings: Settings, tmp_path: Path
) -> None:
    uploads.home(settings).mkdir()
    sent, own = (
        write(uploads.home(settings) / "sent.jsonl", TEXTS, LABELS),
        write(tmp_path / "own.jsonl", TEXTS, LABELS),
    )
    job = context(settings, path=str(sent))
    steps = Bulk().plan(job)
    assert sent.exists(), "a kill before the plan is recorded plans again"
    for step in steps:
        Bulk().run(job, step)
        assert not sent.exists()
    assert Bulk().finish(job)["texts"] == len(TEXTS)
    done(context(settings, 2, path=str(own)))
    assert own.exists()
    bad = uploads.home(settings) / "bad.jsonl"
    bad.write_text("{")
    with pytest.raises(BadFile, match="Line 1"):
        Bulk().plan(context(settings, 3, path=str(bad)))
    assert not bad.exists(), "what was refused is not kept"


def test_uploads_that_no_job_will_read_are_swept(settings: Settings) -> None:
    uploads.home(settings).mkdir()
    waits, orphan = (write(uploads.home(settings) / name, TEXTS, LABELS) for name in ("waits.jsonl", "orphan.jsonl"))
    job = context(settings, path=str(waits))
    with job.sessions() as session:
        uploads.sweep(session, settings)
        assert orphan.exists(), "its job may be on its way"
        uploads.sweep(session, settings, older_than=-1)
    assert waits.exists()
    assert not orphan.exists()


def test_a_job_writes_no_more_than_its_disk(settings: Settings, tmp_path: Path) -> None:
    small = settings.model_copy(update={"cache_bytes": 400})
    with pytest.raises(TooLarge, match="allows 400"):
        done(context(small, path=str(write(tmp_path / "t.jsonl", TEXTS * 20, LABELS * 10))))
