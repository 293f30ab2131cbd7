"""Training: it learns, a seed fixes the weights, a killed run ends with the weights of an uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sae_lens import SAE
from safetensors.torch import load_file
from sqlalchemy import select

from app import corpora, db, documents, jobs, supervisor
from app.corpora import Stream
from app.errors import BadFile, TooLarge
from app.settings import Settings
from app.tables import Corpus, Job, JobMetric, JobState, Model, Source
from app.trainplan import Part, Window
from app.trainspecs import TrainSpec
from tests.tiny import TEXT, Tiny
from workers.activations import Norms, Shard, Text, WindowReader
from workers.language_model import LanguageModel
from workers.trainer import train
from workers.trainer.kinds import JobContext
from workers.trainer.learning import Diverged, Learner, learning_rate

SPEC: dict[str, Any] = {
    "model": "tiny",
    "corpus": "c",
    "hook_name": "blocks.1.hook_resid_post",
    "set_name": "trained",
    "d_sae": 48,
    "k": 4,
    "context_size": 16,
    "n_tokens": 6_000,
    "epochs": 8,
    "batch_size": 256,
    "lr": 3e-3,
    "warmup_steps": 5,
    "aux_k": 8,
    "dead_after_tokens": 2_000,
    "steps_per_checkpoint": 10,
    "n_eval_tokens": 1_000,
    "harvest_tokens": 0,
    "held_out": 0.2,
    "weights_dtype": "float32",
}


@pytest.fixture
def settings(tiny: Tiny, tmp_path: Path) -> Settings:
    """A catalog with the tiny model and a corpus of a few thousand words."""
    made = Settings(data_dir=tmp_path / "data", device="cpu", threads=1, takeover_seconds=2, beat_seconds=0.5)
    (made.data_dir / "models").mkdir(parents=True)
    (made.data_dir / "models" / "tiny").symlink_to(tiny.model.path)
    db.migrate(db.connect(made))
    rng = np.random.default_rng(0)
    (tmp_path / "c.txt").write_text(" ".join(rng.choice(TEXT.split(), 9_000)))
    with db.sessions(db.connect(made)).begin() as session:
        card = LanguageModel.load(Path(tiny.model.path)).card
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        corpora.add_corpus(session, made, documents.read(tmp_path / "c.txt"), "c")
    return made


@pytest.fixture
def job(settings: Settings) -> JobContext:
    return context(settings, SPEC)


def context(settings: Settings, spec: dict[str, Any]) -> JobContext:
    make = db.sessions(db.connect(settings))
    full = TrainSpec.model_validate(spec).model_dump(mode="json")
    with make.begin() as session:
        job = Job(kind="train", title="t", spec=full, workflow_id="w", result={}, state=JobState.RUNNING)
        session.add(job)
        session.flush()
        job_id = job.id
    settings.job_dir(job_id).mkdir(parents=True)
    return JobContext(settings, make, job_id, full, settings.job_dir(job_id))


def run(context: JobContext) -> dict[str, Any]:
    kind = train.Train()
    for step in kind.plan(context):
        kind.run(context, step)
    return kind.finish(context)


def weights(context: JobContext) -> dict[str, torch.Tensor]:
    with context.sessions() as session:
        source = session.scalars(select(Source)).one()
    return load_file(context.settings.sae_dir(source.sae_hash) / "sae_weights.safetensors")


def test_a_trained_sae_explains_the_activations_and_is_catalogued(job: JobContext) -> None:
    result = run(job)
    assert result["explained_variance"] > 0.5
    assert result["l0"] <= 4
    with job.sessions() as session:
        source = session.scalars(select(Source)).one()
        curve = session.scalars(select(JobMetric).order_by(JobMetric.step)).all()
    assert (source.name, source.d_sae, source.origin["job"]) == ("1-trained", 48, job.job_id)
    assert curve[-1].values["explained_variance"] > curve[0].values["explained_variance"]
    torch.testing.assert_close(weights(job)["W_dec"].norm(dim=-1), torch.ones(48))


def test_the_time_left_counts_the_looks_and_the_evaluation_that_follow_the_last_step(job: JobContext) -> None:
    kind = train.Train()
    steps = kind.plan(job)
    for step in steps[:-1]:
        kind.run(job, step)
    assert steps[-1] == "evaluate 1/1"
    with job.sessions() as session:
        left = [values["seconds_left"] for _, values in jobs.points(session, job.job_id)]
    assert left[-1] > 0
    assert left[0] > left[-1]
    kind.run(job, steps[-1])
    with job.sessions() as session:
        assert [values["seconds_left"] for _, values in jobs.points(session, job.job_id)] == [*left[:-1], 0]
        status = jobs.get(session, job.job_id).status
    assert status.startswith("evaluation: ce_loss_score ")
    assert status.endswith(" held-out tokens"), "an ended job has nothing left"


def test_sae_lens_reads_it_and_finds_the_same_explained_variance(job: JobContext, tiny: Tiny) -> None:
    result = run(job)
    with job.sessions() as session:
        source = session.scalars(select(Source)).one()
        corpus = corpora.corpus_named(session, "c")
    theirs = SAE.load_from_disk(str(job.settings.sae_dir(source.sae_hash)))
    model = LanguageModel.load(Path(tiny.model.path))
    tokens = corpora.tokens_dir(job.settings, corpus.hash, model.card.tokenizer_hash)
    stream = Stream.open(tokens)
    spec = TrainSpec.model_validate(job.spec)
    _, held_out = train.split(spec, Text(model, stream, spec.context_size))
    ids = torch.from_numpy(stream.contexts(held_out[:800], spec.context_size, model.card.bos_token_id))
    hook = spec.saes[0].hook_name
    x = model.read(ids, [hook])[hook][:, 1:].flatten(0, 1)
    x = x[x.norm(dim=-1) <= result["max_norm"]]
    with torch.no_grad():
        x_hat = theirs.decode(theirs.encode(x))
    explained = 1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert result["explained_variance"] == pytest.approx(float(explained), abs=1e-4)


def test_the_loss_score_is_what_its_definition_says(job: JobContext, tiny: Tiny) -> None:
    result = run(job)
    score = (result["ce_loss_zero"] - result["ce_loss_sae"]) / (result["ce_loss_zero"] - result["ce_loss_clean"])
    assert result["ce_loss_score"] == pytest.approx(score)
    model = LanguageModel.load(Path(tiny.model.path))
    spec = TrainSpec.model_validate(job.spec)
    with job.sessions() as session:
        corpus = corpora.corpus_named(session, "c")
    stream = Stream.open(corpora.tokens_dir(job.settings, corpus.hash, model.card.tokenizer_hash))
    _, held_out = train.split(spec, Text(model, stream, spec.context_size))
    rows = held_out[: -(-spec.n_eval_tokens // spec.context_size)]
    ids = torch.from_numpy(stream.contexts(rows, spec.context_size, model.card.bos_token_id))
    with torch.no_grad():
        clean = float(model.hf(input_ids=ids, labels=ids).loss)
    assert result["ce_loss_clean"] == pytest.approx(clean, abs=1e-4)


def test_steps_done_twice_and_resumed_give_the_same_weights(settings: Settings) -> None:
    first = context(settings, SPEC)
    run(first)
    expected = weights(first)
    second = context(settings, SPEC)
    kind = train.Train()
    for step in kind.plan(second):
        kind.run(second, step)
        kind.run(second, step)  # as after a crash between the step's end and its record
    kind.finish(second)
    for name, tensor in weights(second).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_dataset_of_the_hub_becomes_a_corpus_once_and_the_next_training_finds_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory of that name stands in for the hub: the same loader reads it."""
    (tmp_path / "some" / "texts").mkdir(parents=True)
    rng = np.random.default_rng(1)
    rows = [{"text": " ".join(rng.choice(TEXT.split(), 300))} for _ in range(60)]
    (tmp_path / "some" / "texts" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    asked = SPEC | {"corpus": "hf:some/texts", "epochs": 1, "harvest_tokens": 1_000}
    made = context(settings, asked)
    run(made)
    with made.sessions() as session:
        corpus = session.scalars(select(Corpus).where(Corpus.name == "some-texts-1M")).one()
        source = session.scalars(select(Source)).one()
        harvest = session.scalars(select(Job).where(Job.kind == "harvest")).one()
    assert (corpus.origin["hf_dataset"], corpus.n_chars) == ("some/texts", 5 * 7_500)
    assert source.origin["corpus"] == {"name": corpus.name, "hash": corpus.hash}
    assert (source.origin["spec"]["corpus"], harvest.spec["corpus"]) == (corpus.name, corpus.name)
    (tmp_path / "some" / "texts" / "train.jsonl").unlink()
    run(context(settings, asked | {"n_tokens": 5_000, "set_name": "again"}))


def test_another_column_and_split_of_a_dataset_are_read_and_told_from_the_usual_ones(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some" / "code").mkdir(parents=True)
    rng = np.random.default_rng(2)
    for split in ("train", "test"):
        rows = [{"content": f"{split} " + " ".join(rng.choice(TEXT.split(), 300))} for _ in range(60)]
        (tmp_path / "some" / "code" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    asked = SPEC | {"corpus": "hf:some/code", "epochs": 1}
    with pytest.raises(BadFile, match='there is no field "text"; there are: content'):
        train.Train().plan(context(settings, asked))
    for split in ("test", "train"):
        run(context(settings, asked | {"text_column": "content", "split": split, "set_name": split}))
    made = context(settings, asked)
    with made.sessions() as session:
        stored = {corpus.origin["split"]: corpus for corpus in session.scalars(select(Corpus)) if corpus.name != "c"}
        sources = {source.name: source.origin for source in session.scalars(select(Source))}
    assert {split: corpus.name for split, corpus in stored.items()} == {
        "test": "some-code-test-content-1M",
        "train": "some-code-content-1M",
    }
    for split, corpus in stored.items():
        assert sources[f"1-{split}"]["corpus"]["hash"] == corpus.hash
        assert TrainSpec.model_validate(sources[f"1-{split}"]["spec"]).corpus == corpus.name


def test_a_column_of_a_stored_corpus_is_refused_in_words() -> None:
    with pytest.raises(ValidationError, match=r"text_column is of datasets of the hub .*; c is stored already"):
        TrainSpec.model_validate(SPEC | {"text_column": "content"})


def test_a_trainer_killed_in_mid_step_ends_with_the_weights_of_an_uninterrupted_run(settings: Settings) -> None:
    spec = SPEC | {"epochs": 60}
    whole = context(settings, spec)
    run(whole)
    expected = weights(whole)
    with whole.sessions.begin() as session:
        job_id = jobs.submit(session, settings, "train", "t", TrainSpec.model_validate(spec).model_dump(mode="json")).id
    trainer = start(settings)
    wait(whole, job_id, lambda job: job.status.startswith("step") and job.done > 0.3)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer = start(settings)
    try:
        wait(whole, job_id, lambda job: JobState(job.state).ended)
    finally:
        trainer.terminate()
        trainer.wait()
    with whole.sessions() as session:
        assert jobs.get(session, job_id).state == JobState.DONE, jobs.get(session, job_id).error
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, expected[name]), name


def start(settings: Settings) -> subprocess.Popen[bytes]:
    variables = {
        "SAE_ATLAS_DATA_DIR": str(settings.data_dir),
        "SAE_ATLAS_TAKEOVER_SECONDS": "2",
        "SAE_ATLAS_BEAT_SECONDS": "0.5",
        "SAE_ATLAS_DEVICE": "cpu",
    }
    # As many threads as this process has: sums in another order would differ in the last bit.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, "-m", "workers.trainer"], env=os.environ | variables | threads)


def wait(context: JobContext, job_id: int, ready: Any, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with context.sessions() as session:
            job = jobs.get(session, job_id)
            if ready(job):
                return
            assert not JobState(job.state).ended, f"the job is {job.state} before it got there: {job.error}"
        time.sleep(0.02)
    raise AssertionError("the job did not get there in time")


def test_a_person_in_a_shell_watches_a_training_and_is_led_to_its_saes(settings: Settings, tmp_path: Path) -> None:
    spec = SPEC | {"k": [2, 4], "epochs": 1, "harvest_tokens": 1_000}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    environment = os.environ | {"SAE_ATLAS_DATA_DIR": str(settings.data_dir), "SAE_ATLAS_DEVICE": "cpu"}
    address = settings.data_dir / "run" / "address"  # as a server on another port leaves it
    address.parent.mkdir(parents=True, exist_ok=True)
    address.write_text("127.0.0.1 4310")
    trainer = start(settings)
    try:
        command = [sys.executable, "-m", "app.cli", "train", str(tmp_path / "spec.yaml"), "--watch"]
        with supervisor.hold(settings):
            said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    finally:
        trainer.terminate()
        trainer.wait(60)
    assert said.returncode == 0, said.stdout + said.stderr
    lines = said.stdout.splitlines()
    assert lines[0].startswith("About ")
    assert "SAEs: 1-trained-k2, 1-trained-k4" in lines
    assert any("Job 1 queued: Train 2 SAEs of tiny" in line for line in lines)
    assert lines[-2:] == [f"Open http://127.0.0.1:4310/tiny/1-trained-k{k}" for k in (2, 4)], said.stdout
    made = context(settings, SPEC)
    with made.sessions() as session:
        assert {source.name for source in session.scalars(select(Source))} == {"1-trained-k2", "1-trained-k4"}


def test_a_loss_that_is_no_number_stops_the_job_with_the_step_and_the_cause() -> None:
    (sae,) = TrainSpec.model_validate(SPEC | {"lr": 1.0, "warmup_steps": 0}).saes
    learner = Learner.fresh(sae, 24, torch.zeros(24))
    bad = torch.full((8, 24), float("nan"))
    with pytest.raises(Diverged, match=r"at step 0: the activations at blocks.1.hook_resid_post are not finite"):
        learner.learn(bad, bad, 10, torch.float32, measure=False)
    good = torch.randn(8, 24)
    learner.learn(good, good, 10, torch.float32, measure=False)
    with torch.no_grad():
        learner.weights["W_dec"][3] = float("inf")
    with pytest.raises(Diverged, match=r"at step 1 .*W_dec not finite. Lower lr to 3.3e-01"):
        learner.learn(good, good, 10, torch.float32, measure=False)


@pytest.mark.parametrize("hook_name", ["garbage", "blocks.1.hook_nonsense", "blocks.x.hook_resid_post"])
def test_a_hook_that_is_none_is_refused_by_the_spec(hook_name: str) -> None:
    with pytest.raises(ValidationError, match="hook_name"):
        TrainSpec.model_validate(SPEC | {"hook_name": hook_name})


def test_a_cache_over_the_budget_is_refused_with_both_numbers(settings: Settings) -> None:
    small = settings.model_copy(update={"cache_bytes": 100_000})
    asked = context(small, SPEC | {"cache": "disk"})
    with pytest.raises(TooLarge, match=r"0\.0 GB.*limit is 0\.0 GB"):
        train.Train().plan(asked)


def test_a_window_serves_every_row_that_is_no_outlier_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    shards: dict[int, dict[str, Shard]] = {}
    for number, size in enumerate((5, 8, 7)):
        for hook, factor in (("a", 1), ("b", 2)):
            shard = shards.setdefault(number, {})[hook] = Shard(tmp_path / hook, number, size)
            shard.directory.mkdir(exist_ok=True)
            (shard.directory / "power.json").write_text("2.0")
            values = factor * np.arange(number * 10, number * 10 + size, dtype=np.float32)
            np.save(shard.file, (2 * values)[:, None].repeat(4, 1).astype(np.float16))
            np.save(shard.norms_file, values)
    norms = {"a": Norms(25.0, 2.0, (0.0,) * 4), "b": Norms(100.0, 2.0, (0.0,) * 4)}
    window = Window(6, 3, tuple(Part(number, 0, 0, 1) for number in range(3)))
    reader = WindowReader(window, shards, norms, seed=1)
    batches = [reader.batch(step) for step in (6, 7, 8)]
    seen = torch.cat([batch["a"][:, 0] for batch in batches]).tolist()
    assert sorted(seen) == [*range(5), *range(10, 18), *range(20, 26)]
    assert [len(batch["a"]) for batch in batches] == [6, 6, 7]
    assert all(torch.equal(batch["b"], 2 * batch["a"]) for batch in batches)
    other = WindowReader(window, shards, norms, seed=2)
    assert set(other.batch(6)["a"][:, 0].tolist()) != set(batches[0]["a"][:, 0].tolist())


def test_the_parts_of_a_shard_are_all_of_it(tmp_path: Path) -> None:
    shard = Shard(tmp_path, 3, 2)
    (tmp_path / "power.json").write_text("1.0")
    np.save(shard.file, np.arange(29, dtype=np.float16)[:, None])
    np.save(shard.norms_file, np.zeros(29, dtype=np.float32))
    norms = {"a": Norms(1.0, 1.0, (0.0,))}
    seen: list[float] = []
    for number in range(8):
        reader = WindowReader(Window(number, 1, (Part(3, 0, number, 8),)), {3: {"a": shard}}, norms, seed=5)
        seen += reader.batch(number)["a"][:, 0].tolist()
    assert sorted(seen) == list(range(29))


def test_the_learning_rate_rises_stays_and_falls() -> None:
    (sae,) = TrainSpec.model_validate(SPEC).saes
    rates = [learning_rate(step, 100, sae) / sae.lr for step in (0, 4, 50, 85, 99)]
    assert rates == pytest.approx([0.2, 1.0, 1.0, 0.5, 1 / 30])
