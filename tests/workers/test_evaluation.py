"""The evaluation of an SAE on a corpus: right numbers on the right text, kept with the SAE, asked for in three ways."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app import cli, corpora, db, documents, evaluations, harvests, weights
from app.main import create_app
from app.settings import Settings
from app.specs import EvalSpec
from app.tables import Job, JobMetric, Model, Source
from tests.tiny import D_IN, D_SAE, HOOK, TEXT, K, Tiny, save_tiny_sae
from workers.activations import Text, read_contexts
from workers.checkpoints import load_sae
from workers.corpora import tokenised
from workers.language_model import LanguageModel
from workers.trainer import evaluation
from workers.trainer.kinds import JobContext

SIZE = 32


@pytest.fixture
def settings(tiny: Tiny, tmp_path: Path) -> Settings:
    made = Settings(data_dir=tmp_path / "data", device="cpu", threads=1, database_url="", worker_socket="")
    (made.data_dir / "models").mkdir(parents=True)
    (made.data_dir / "models" / "tiny").symlink_to(tiny.model.path)
    engine = db.connect(made)
    db.migrate(engine)
    card = LanguageModel.load(Path(tiny.model.path)).card
    save_tiny_sae(tmp_path / "sae", "topk", seed=1)
    with db.sessions(engine).begin() as session:
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        for name, n in (("small", 500), ("large", 2_000)):
            path = tmp_path / f"{name}.txt"
            path.write_text(" ".join(np.random.default_rng(n).choice(TEXT.split(), n)))
            corpora.add_corpus(session, made, documents.read(path), name)
        facts = weights.check_sae(tmp_path / "sae", D_IN, made)
        harvests.catalogue_sae(session, made, facts, model_id="tiny", set_name="x", metrics={}, origin={})
    engine.dispose()
    return made


def evaluated(settings: Settings, **fields: Any) -> tuple[Source, dict[str, Any], list[JobMetric]]:
    make = db.sessions(db.connect(settings))
    spec = {"model": "tiny", "source": "1-x", "n_tokens": 1_000, "n_loss_tokens": 500, "context_size": SIZE, **fields}
    with make.begin() as session:
        job = evaluations.queue(session, settings, EvalSpec.model_validate(spec))
        job_id, asked = job.id, job.spec
    settings.job_dir(job_id).mkdir(parents=True)
    context = JobContext(settings, make, job_id, asked, settings.job_dir(job_id))
    kind = evaluation.Evaluate()
    for step in kind.plan(context):
        kind.run(context, step)
    result = kind.finish(context)
    with make() as session:
        points = list(session.scalars(select(JobMetric).where(JobMetric.job_id == job_id)))
        return session.scalars(select(Source)).one(), result, points


def test_metrics_are_those_of_the_text_asked_for(settings: Settings, tiny: Tiny) -> None:
    source, result, points = evaluated(settings, corpus="small")
    found = evaluations.found(source.metrics)
    assert [(e.corpus, e.context_size, e.where) for e in found] == [("small", SIZE, "")]
    model = LanguageModel.load(Path(tiny.model.path))
    with db.sessions(db.connect(settings))() as session:
        directory = settings.corpus_dir(corpora.corpus_named(session, "small").hash)
    text = Text(model, tokenised(model, directory, lambda share, said: None), SIZE)
    rows = evaluation.choose(text.stream.n_contexts(SIZE, model.card.bos_token_id), -(-1000 // (SIZE - 1)), 0.0).rows
    coder = load_sae(settings.sae_dir(source.sae_hash), "cpu")
    bos = model.card.bos_token_id
    x = np.concatenate(
        [
            acts[HOOK][:, 1:].flatten(0, 1).numpy()
            for _, acts in read_contexts(model, text.stream, rows, SIZE, [HOOK], bos)
        ]
    )
    x = x[np.linalg.norm(x, axis=1) <= result["max_norm"]]
    import torch

    x_hat, acts = coder.reconstruct(torch.from_numpy(x)).numpy(), coder.encode(torch.from_numpy(x)).numpy()
    variance = ((x - x.mean(axis=0)) ** 2).sum()
    assert found[0].n_tokens == len(x)
    assert found[0].metrics["explained_variance"] == pytest.approx(1 - ((x - x_hat) ** 2).sum() / variance, abs=1e-4)
    assert found[0].metrics["l0"] == pytest.approx((acts > 0).sum() / len(x), abs=1e-4)
    assert found[0].metrics["density"] == pytest.approx((acts > 0).mean(), abs=1e-6)
    assert found[0].metrics["dead"] == pytest.approx(1 - (acts > 0).any(axis=0).mean(), abs=1e-6)
    assert {*evaluations.METRICS} == set(found[0].metrics)
    assert result["l0"] <= K
    assert result["density"] == result["l0"] / D_SAE
    assert any("explained_variance" in point.values for point in points)


def test_an_sae_that_was_never_measured_gets_its_metrics_and_one_that_was_keeps_them(settings: Settings) -> None:
    first, _, _ = evaluated(settings, corpus="small")
    assert first.metrics["n_tokens"] == evaluations.found(first.metrics)[0].n_tokens
    again, _, _ = evaluated(settings, corpus="large")
    assert again.metrics["n_tokens"] == first.metrics["n_tokens"]
    assert [e.corpus for e in evaluations.found(again.metrics)] == ["large", "small"]


def test_the_same_text_again_replaces_its_result(settings: Settings) -> None:
    evaluated(settings, corpus="small")
    evaluated(settings, corpus="large")
    source, _, _ = evaluated(settings, corpus="small")
    assert [(e.corpus, e.job) for e in evaluations.found(source.metrics)] == [("small", 3), ("large", 2)]


def test_of_its_own_corpus_only_what_was_held_out_is_read(settings: Settings) -> None:
    make = db.sessions(db.connect(settings))
    with make.begin() as session:
        own = corpora.corpus_named(session, "small")
        origin = {"kind": "trained", "corpus": {"name": "small", "hash": own.hash}, "spec": {"held_out": 0.25}}
        session.scalars(select(Source)).one().origin = origin
    source, _, _ = evaluated(settings)
    (found,) = evaluations.found(source.metrics)
    assert (found.corpus, found.held_out, found.where) == ("small", True, "held out when it was trained")
    elsewhere, _, _ = evaluated(settings, corpus="large")
    assert evaluations.found(elsewhere.metrics)[0].where == ""


@pytest.mark.parametrize(
    ("n", "wanted", "held_out", "rows", "held"),
    [
        (100, 5, 0.0, [0, 24, 49, 74, 99], False),
        (3, 5, 0.0, [0, 1, 2], False),
        (100, 3, 0.05, [96, 97, 98], True),
        (100, 30, 0.05, [96, 97, 98, 99], True),
        (2, 5, 0.05, [1], True),
        (1, 5, 0.05, [0], False),
        (0, 5, 0.0, [], False),
    ],
)
def test_contexts_are_of_the_held_out_end_or_from_all_over(
    n: int, wanted: int, held_out: float, rows: list[int], held: bool
) -> None:
    chosen = evaluation.choose(n, wanted, held_out)
    assert (chosen.rows.tolist(), chosen.held_out) == (rows, held)


def test_page_command_and_api_ask_for_it_and_the_page_shows_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(settings, corpus="small")
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        page = client.get("/tiny/1-x").text
        table = re.search(r'<h2 id="evaluations">.*?</section>', page, re.S)[0]  # type: ignore[index]
        assert re.search(r'<th scope="row">small <span class="muted">in contexts of 32', table)
        assert "<option>large</option><option>small</option>" in table
        form = {"corpus": "small", "n_tokens": "2000"}
        asked = client.post("/tiny/1-x/evaluate", data=form, follow_redirects=False)
        assert (asked.status_code, asked.headers["location"]) == (303, "/jobs/2")
        assert 'Being evaluated: <a href="/jobs/2">job 2</a>' in client.get("/tiny/1-x").text
        for bad in ({"n_tokens": "5"}, {"n_tokens": "x"}, {"n_tokens": "9" * 20}, {"n_tokens": "-1"}):
            assert client.post("/tiny/1-x/evaluate", data=form | bad).status_code == 422, bad
        assert client.post("/tiny/1-x/evaluate", data=form | {"corpus": "none"}).status_code == 404
        assert client.post("/tiny/9-x/evaluate", data=form).status_code == 404
        made = client.post("/api/eval", json={"model": "tiny", "source": "1-x"})
        assert made.status_code == 201
        assert (made.json()["kind"], made.json()["spec"]["corpus"]) == ("eval", "large")
        for wrong, status in (({}, 422), ({"model": "tiny", "source": "9-x"}, 404), ({"n_tokens": 3}, 422)):
            answer = client.post("/api/eval", json={"model": "tiny", "source": "1-x"} | wrong if wrong else {})
            assert answer.status_code == status
            assert set(answer.json()) >= {"error", "message"}
    monkeypatch.setenv("SAE_ATLAS_DATA_DIR", str(settings.data_dir))
    said = CliRunner().invoke(cli.app, ["eval", "tiny/1-x", "--corpus", "small", "--tokens", "3000"])
    assert said.exit_code == 0, said.output
    with db.sessions(db.connect(settings))() as session:
        job = session.scalars(select(Job).order_by(Job.id.desc())).first()
        assert job is not None
        assert (job.kind, job.spec["corpus"], job.spec["n_tokens"]) == ("eval", "small", 3000)


@pytest.mark.parametrize("metrics", [{}, {"evaluations": "x"}, {"evaluations": [1, {"metrics": 2}, {}]}])
def test_what_is_no_evaluation_is_not_shown(metrics: dict[str, Any]) -> None:
    assert evaluations.found(metrics) == ()


def test_an_evaluation_that_was_interrupted_anywhere_goes_on_and_ends_with_the_same_bits(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies leaves what it last wrote; here it writes after every pass, and dies after each in turn."""
    monkeypatch.setattr("workers.trainer.evaluate.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("workers.activations.TOKENS_PER_FORWARD", 8 * SIZE)
    _, expected, _ = evaluated(settings, corpus="small")
    make = db.sessions(db.connect(settings))
    with make() as session:
        job = session.scalars(select(Job)).one()
        interrupted = Interrupted(settings, make, job.id, job.spec, settings.job_dir(100))
    interrupted.directory.mkdir()
    kind, n_deaths = evaluation.Evaluate(), 0
    while n_deaths < 100:
        try:
            kind.run(interrupted, "measure")
            break
        except Killed:
            n_deaths += 1
    assert n_deaths >= 6
    assert kind.finish(interrupted) == expected


class Killed(BaseException):
    """The process is gone."""


class Interrupted(JobContext):
    """A job whose process dies at every report."""

    def report(self, share_of_step: float, status: str = "") -> None:
        if "held-out" in status and share_of_step < 1:
            raise Killed
