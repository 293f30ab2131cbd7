"""The check of a new SAE: metrics of what fits, and words with evidence for what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import delete, select

from app import corpora, db, documents, harvests, validations, weights
from app.settings import Settings
from app.tables import Corpus, Job, JobMetric, Model, Source
from tests.tiny import D_IN, TEXT, Tiny
from workers.checkpoints import save_sae
from workers.corpora import tokenised
from workers.language_model import LanguageModel
from workers.sae.coders import TranscoderCoder
from workers.trainer import validate
from workers.trainer.evaluate import evaluate
from workers.trainer.kinds import JobContext

HOOK = "blocks.1.hook_mlp_out"
N_DIRECTIONS = 8


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "c.txt"
    path.write_text(" ".join(np.random.default_rng(0).choice(TEXT.split(), 4_000)))
    return path


@pytest.fixture
def settings(tiny: Tiny, tmp_path: Path, words: Path) -> Settings:
    made = Settings(data_dir=tmp_path / "data", device="cpu", threads=1)
    (made.data_dir / "models").mkdir(parents=True)
    (made.data_dir / "models" / "tiny").symlink_to(tiny.model.path)
    engine = db.connect(made)
    db.migrate(engine)
    with db.sessions(engine).begin() as session:
        card = LanguageModel.load(Path(tiny.model.path)).card
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        corpora.add_corpus(session, made, documents.read(words), "c")
    return made


@pytest.fixture(scope="module")
def basis(tiny: Tiny) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean activation at the hook, its main directions [d_in, n], and the mean norm."""
    model = LanguageModel.load(Path(tiny.model.path))
    ids = torch.tensor([model.to_ids(TEXT)])
    x = model.read(ids, [HOOK])[HOOK][0, 1:]
    return x.mean(0), torch.linalg.svd(x - x.mean(0))[2][:N_DIRECTIONS].T, float(x.norm(dim=-1).mean())


@pytest.fixture
def sae(tmp_path: Path, basis: tuple[torch.Tensor, torch.Tensor, float]) -> Callable[..., Path]:
    """Make an SAE that fits HOOK: a pair of latents for each main direction about the mean, the others dead.

    With scale it expects activations that many times as large as the model's.
    """

    def make(hook: str = HOOK, scale: float = 1.0, n_dead: int = 40, **config: Any) -> Path:
        mean, directions, _ = basis
        W = torch.cat([directions, -directions, torch.zeros(D_IN, n_dead)], dim=1)
        tensors = {"W_enc": W, "b_enc": torch.zeros(W.shape[1]), "W_dec": W.T, "b_dec": mean * scale}
        full = {
            "architecture": "standard",
            "d_in": D_IN,
            "d_sae": W.shape[1],
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"hook_name": hook, "model_name": "some-model"},
        } | config
        save_sae(tmp_path / "sae", full, tensors)
        return tmp_path / "sae"

    return make


def checked(settings: Settings, sae: Path) -> tuple[Source, Job, list[JobMetric]]:
    """Put an SAE into the catalog and run its check."""
    make = db.sessions(db.connect(settings))
    with make.begin() as session:
        facts = weights.check_sae(sae, D_IN, settings)
        source = harvests.catalogue_sae(
            session, settings, facts, model_id="tiny", set_name="x", metrics={"kept": 1}, origin={}
        )
        job = validations.queue(session, settings, "tiny", source.name)
        job.spec = {**job.spec, "n_tokens": 1_000, "context_size": 32}
        job_id, spec = job.id, job.spec
    settings.job_dir(job_id).mkdir(parents=True)
    context = JobContext(settings, make, job_id, spec, settings.job_dir(job_id))
    kind = validate.Validate()
    for step in kind.plan(context):
        kind.run(context, step)
    result = kind.finish(context)
    with make.begin() as session:
        session.get_one(Job, job_id).result = result
    with make() as session:
        points = list(session.scalars(select(JobMetric).where(JobMetric.job_id == job_id).order_by(JobMetric.step)))
        return session.scalars(select(Source)).one(), session.get_one(Job, job_id), points


def test_an_sae_that_fits_is_measured_as_it_runs_and_says_so(settings: Settings, sae: Callable[..., Path]) -> None:
    source, job, points = checked(settings, sae())
    assert source.metrics["explained_variance"] > 0.6
    assert source.metrics["l0"] == pytest.approx(N_DIRECTIONS, abs=0.5)
    assert source.metrics["kept"] == 1
    assert (job.result["url"], job.result["verdict"]) == ("/tiny/1-x", "fits")
    assert job.result["ce_loss_score"] == source.metrics["ce_loss_score"]
    assert points[-1].values["ce_loss_score"] == pytest.approx(source.metrics["ce_loss_score"])
    assert any("explained_variance" in p.values for p in points)
    found = validations.found(source.metrics)
    assert found is not None
    assert (found.verdict, found.corpus, found.n_tokens > 900) == ("fits", "c", True)


@pytest.mark.parametrize("claimed", ["blocks.1.hook_attn_out", "blocks.0.hook_mlp_out", "blocks.2.hook_resid_post"])
def test_an_sae_of_another_hook_is_told_which_fits_better(
    settings: Settings, sae: Callable[..., Path], claimed: str
) -> None:
    source, _, _ = checked(settings, sae(claimed))
    found = validations.found(source.metrics)
    assert found is not None
    assert found.verdict == "mismatch"
    assert found.findings[-1].startswith(f"At {HOOK} explained variance would be 0.")
    assert f"{source.metrics['explained_variance']:.3f}" in found.findings[0]


def test_weights_that_expect_normalised_activations_are_told_the_scale(
    settings: Settings, sae: Callable[..., Path], basis: tuple[torch.Tensor, torch.Tensor, float]
) -> None:
    source, _, _ = checked(settings, sae(scale=50 * D_IN**0.5 / basis[2]))
    far = validations.found(source.metrics)
    source, _, _ = checked(settings, sae(scale=30))
    near = validations.found(source.metrics)
    assert far is not None
    assert near is not None
    assert "With activations scaled by" in far.findings[-1]
    assert "With activations scaled by 30 explained variance would be 0." in near.findings[-1]
    assert "mean norm of" in near.findings[0]
    assert "b_dec has" in near.findings[0]


def test_an_sae_that_fits_nowhere_was_trained_on_another_model(settings: Settings, tiny: Tiny) -> None:
    source, _, _ = checked(settings, Path(tiny.standard.path))
    found = validations.found(source.metrics)
    assert found is not None
    assert found.verdict == "mismatch"
    assert "probably trained on another model than tiny; its config names tiny" in found.findings[-1]


def test_an_sae_that_activates_half_of_its_features_is_called_out(settings: Settings, sae: Callable[..., Path]) -> None:
    source, _, _ = checked(settings, sae(n_dead=0))
    found = validations.found(source.metrics)
    assert found is not None
    assert found.verdict == "mismatch"
    assert f"{N_DIRECTIONS} of {2 * N_DIRECTIONS} features are active on a token (50%)" in found.findings[0]


def test_a_hook_the_model_does_not_have_is_a_mismatch_not_a_crash(settings: Settings, sae: Callable[..., Path]) -> None:
    source, job, _ = checked(settings, sae("blocks.7.hook_resid_post"))
    assert "is in layer 7; tiny has 3 layers" in job.result["findings"]
    assert source.metrics["validation"]["verdict"] == "mismatch"


def test_without_a_corpus_the_demos_text_is_read(settings: Settings, sae: Callable[..., Path]) -> None:
    with db.sessions(db.connect(settings)).begin() as session:
        session.execute(delete(Corpus))
    source, _, _ = checked(settings, sae())
    found = validations.found(source.metrics)
    assert found is not None
    assert (found.corpus, found.n_tokens >= 900) == ("the demo's text", True)


def test_a_transcoder_is_held_against_what_it_predicts(settings: Settings, tiny: Tiny) -> None:
    model = LanguageModel.load(Path(tiny.model.path))
    with db.sessions(db.connect(settings))() as session:
        corpus = corpora.corpus_named(session, "c")
    stream = tokenised(model, settings.corpus_dir(corpus.hash), lambda share, status: None)
    names = {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": HOOK}
    rows = np.arange(8)
    ids = torch.from_numpy(stream.contexts(rows, 16, 0))
    mean = model.read(ids, [HOOK])[HOOK][:, 1:].flatten(0, 1).mean(0)
    tensors = {"W_enc": torch.zeros(D_IN, 7), "b_enc": torch.zeros(7), "W_dec": torch.zeros(7, D_IN), "b_dec": mean}
    coder = TranscoderCoder(tensors=tensors, config={"metadata": names})
    found = evaluate(model, coder, stream, rows, 16, 8, 1e6, lambda share, status: None)
    assert found["explained_variance"] == pytest.approx(0, abs=1e-5)  # it predicts the mean of its target
    with model.edited({HOOK: lambda y: torch.cat([y[:, :1], mean.expand_as(y[:, 1:])], dim=1)}):
        logits = model.hf(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert found["ce_loss_sae"] == pytest.approx(float(expected), rel=1e-5)
