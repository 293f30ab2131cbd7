"""Jobs of several SAEs: every architecture, one pass of the model for all, killed and resumed, looked at on the way."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from sqlalchemy import select

from app import corpora, curves, jobs, trainplan
from app.corpora import Stream
from app.settings import Settings
from app.tables import Job, JobMetric, JobState, Source
from app.trainspecs import Architecture, TrainSpec
from tests.tiny import Tiny
from tests.workers.test_train import SPEC, context, run, settings, start, wait
from workers.activations import Text
from workers.checkpoints import load_sae
from workers.language_model import LanguageModel
from workers.trainer import train, watching
from workers.trainer.evaluate import evaluate
from workers.trainer.kinds import JobContext
from workers.trainer.train import Train

__all__ = ["settings"]  # the fixture
COMMON: dict[str, Any] = {key: value for key, value in SPEC.items() if key not in ("k", "aux_k")} | {"epochs": 4}
TRANSCODER = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
OWN: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.3, "l1_warmup_steps": 10, "resample_every_steps": 20},
    "gated": {"l1_coefficient": 0.3, "l1_warmup_steps": 10},
    "topk": {"k": 4, "aux_k": 8},
    "jumprelu": {"l0_coefficient": 0.05, "l0_warmup_steps": 10},
    "batchtopk": {"k": 4, "aux_k": 8},
    "matryoshka_batchtopk": {"k": 4, "aux_k": 8, "matryoshka_widths": [6, 20]},
    "transcoder": {"l1_coefficient": 0.3, "l1_warmup_steps": 10, **TRANSCODER},
    "skip_transcoder": {"l1_coefficient": 0.3, "l1_warmup_steps": 10, **TRANSCODER},
}
ALL = [{"architecture": name, "set_name": name.replace("_", "-"), **own} for name, own in OWN.items()]


def stored(made: JobContext) -> dict[str, dict[str, torch.Tensor]]:
    with made.sessions() as session:
        found = {source.name: source.sae_hash for source in session.scalars(select(Source))}
    return {n: load_file(made.settings.sae_dir(h) / "sae_weights.safetensors") for n, h in found.items()}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every forward pass that reads activations."""
    seen: list[int] = []
    read = LanguageModel.read

    def counted(self: LanguageModel, ids: torch.Tensor, *rest: Any, **more: Any) -> dict[str, torch.Tensor]:
        seen.append(ids.numel())
        return read(self, ids, *rest, **more)

    monkeypatch.setattr(LanguageModel, "read", counted)
    return seen


def test_one_pass_trains_every_architecture_and_sae_lens_reads_them_all(settings: Settings, passes: list[int]) -> None:
    made = context(settings, COMMON | {"saes": ALL, "harvest_tokens": 2_000})
    kind_steps = _run_until_evaluation(made)
    n_contexts = -(-COMMON["n_tokens"] // (COMMON["context_size"] - 1))
    probe = 32 * COMMON["context_size"]
    assert sum(passes) - n_contexts * COMMON["context_size"] <= 2 * probe  # a look at step 96, held out
    result = _finish(made, kind_steps)
    assert set(result["saes"]) == {f"1-{sae['set_name']}" for sae in ALL}
    with made.sessions() as session:
        sources = {source.name: source for source in session.scalars(select(Source))}
        (harvest,) = session.scalars(select(Job).where(Job.kind == "harvest"))
    assert set(harvest.spec["sources"]) == set(sources)
    for name, metrics in result["saes"].items():
        source = sources[name]
        theirs = cast(Any, SAE.load_from_disk(str(settings.sae_dir(source.sae_hash))))
        assert theirs.cfg.architecture() == ("jumprelu" if "batchtopk" in name else name[2:].replace("-", "_"))
        assert metrics["explained_variance"] > 0.3, name
        assert 0.3 < metrics["l0"] < 40, name
        assert source.origin["spec"]["saes"][0]["set_name"] == name[2:]
        assert source.origin["corpus"]["name"] == "c"
        assert len(source.origin["together_with"]) == len(ALL) - 1
    for name in ("1-batchtopk", "1-matryoshka-batchtopk"):
        assert result["saes"][name]["l0"] == pytest.approx(4, abs=1.5)


def _run_until_evaluation(made: JobContext) -> list[str]:
    steps = Train().plan(made)
    for step in steps:
        if not step.startswith("evaluate"):
            Train().run(made, step)
    return [step for step in steps if step.startswith("evaluate")]


def _finish(made: JobContext, steps: list[str]) -> dict[str, Any]:
    for step in steps:
        Train().run(made, step)
    return Train().finish(made)


def test_layers_are_read_in_the_same_pass_and_a_later_job_reads_nothing(settings: Settings, passes: list[int]) -> None:
    layers = [f"blocks.{layer}.hook_resid_post" for layer in (0, 1)]
    spec = COMMON | {"saes": [{"hook_name": layers, "k": 4, "set_name": "a"}], "epochs": 1}
    first = context(settings, spec)
    _run_until_evaluation(first)
    n_contexts = -(-COMMON["n_tokens"] // (COMMON["context_size"] - 1))
    read = sum(passes) - 32 * COMMON["context_size"]
    assert read == n_contexts * COMMON["context_size"]
    passes.clear()
    shorter = context(settings, spec | {"saes": [{"architecture": "gated", "set_name": "b"}], "n_tokens": 6_000})
    _run_until_evaluation(shorter)
    assert sum(passes) <= 32 * COMMON["context_size"]


def test_the_sae_of_a_grid_is_the_one_trained_alone(settings: Settings) -> None:
    run(context(settings, COMMON | {"set_name": "g", "k": 4, "seed": [0, 3]}))
    run(context(settings, COMMON | {"set_name": "alone", "k": 4, "seed": 3}))
    found = stored(context(settings, COMMON | {"k": 4}))
    for name, tensor in found["1-alone"].items():
        assert torch.equal(tensor, found["1-g-s3"][name]), name
        assert not torch.equal(tensor, found["1-g-s0"][name]), name


def test_a_grid_of_transcoders_beside_an_sae_is_one_pass_and_each_is_the_one_trained_alone(
    settings: Settings, passes: list[int]
) -> None:
    """Two transcoders of each of two layers, by penalty, and an SAE of a hook that none of them reads."""
    pairs = [{"hook_name": f"blocks.{n}.mlp.hook_in", "hook_name_out": f"blocks.{n}.hook_mlp_out"} for n in (0, 1)]
    crossing = {"hook_name": "blocks.0.hook_resid_post", "hook_name_out": "blocks.1.hook_resid_post"}
    own = {"architecture": "transcoder", "l1_warmup_steps": 10}
    saes = [
        *({**own, **pair, "set_name": "t", "l1_coefficient": [0.3, 1.0]} for pair in pairs),
        {**own, **crossing, "architecture": "skip_transcoder", "set_name": "crossing", "l1_coefficient": 0.3},
        {"architecture": "topk", "set_name": "sae", **OWN["topk"]},
    ]
    made = context(settings, COMMON | {"saes": saes, "context_size": 17})
    steps = _run_until_evaluation(made)
    n_contexts = -(-COMMON["n_tokens"] // 16)
    assert sum(passes) - n_contexts * 17 <= 2 * 32 * 17  # the model read the text once for all six
    result = _finish(made, steps)
    assert list(result["saes"]) == ["0-t-l1-0p3", "0-t-l1-1", "1-t-l1-0p3", "1-t-l1-1", "0-crossing", "1-sae"]
    assert result["saes"]["1-t-l1-1"]["l0"] < result["saes"]["1-t-l1-0p3"]["l0"]
    assert all(metrics["explained_variance"] > 0.3 for metrics in result["saes"].values())
    run(context(settings, COMMON | {**own, **pairs[1], "set_name": "alone", "l1_coefficient": 1.0, "context_size": 17}))
    found = stored(made)
    for name, tensor in found["1-alone"].items():
        torch.testing.assert_close(tensor, found["1-t-l1-1"][name], rtol=1e-4, atol=1e-5)
    with made.sessions() as session:
        sources = {source.name: source.sae_hash for source in session.scalars(select(Source))}
    for name, hook, out in (
        ("0-t-l1-1", *pairs[0].values()),
        ("1-t-l1-1", *pairs[1].values()),
        ("0-crossing", *crossing.values()),
    ):
        coder = load_sae(settings.sae_dir(sources[name]))
        assert (coder.hook_name, coder.hook_name_out) == (hook, out)


def _ended(job: Job) -> bool:
    return JobState(job.state).ended


def _past(share: float, job: Job) -> bool:
    return job.status.startswith("step") and job.done > share


@pytest.mark.parametrize("cache", ["buffer", "disk"])
def test_a_trainer_killed_twice_ends_with_the_weights_of_an_uninterrupted_run(settings: Settings, cache: str) -> None:
    both = [
        {"architecture": "standard", "set_name": "s", **OWN["standard"], "dead_after_tokens": 500},
        {"architecture": "batchtopk", "set_name": "b", **OWN["batchtopk"]},
    ]
    more = {"saes": both, "epochs": 24, "cache": cache, "buffer_tokens": 2_048, "evaluate_every_steps": 100}
    spec = COMMON | more
    whole = context(settings, spec)
    run(whole)
    expected = stored(whole)
    with whole.sessions.begin() as session:
        full = TrainSpec.model_validate(spec).model_dump(mode="json")
        job_id = jobs.submit(session, settings, "train", "t", full).id
    for share in (0.25, 0.6, None):
        trainer = start(settings)
        try:
            if share is None:
                wait(whole, job_id, _ended)
            else:
                wait(whole, job_id, partial(_past, share))
        finally:
            trainer.send_signal(signal.SIGKILL)
            trainer.wait()
    with whole.sessions() as session:
        assert jobs.get(session, job_id).state == JobState.DONE, jobs.get(session, job_id).error
    found = stored(whole)
    assert set(found) == {"1-s", "1-b"}
    for source, tensors in found.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[source][name]), (source, name)


def test_a_buffer_holds_no_more_than_its_shards_and_leaves_none(settings: Settings, passes: list[int]) -> None:
    spec = COMMON | {
        "set_name": "b",
        "k": 4,
        "epochs": 2,
        "cache": "buffer",
        "buffer_tokens": 2_048,
        "n_tokens": 12_000,
    }
    made = context(settings, spec)
    most = 0
    for step in Train().plan(made):
        Train().run(made, step)
        shards = list((made.directory / "buffer").rglob("*.norms.npy"))
        most = max(most, len(shards))
    assert 0 < most <= 9
    assert not list((made.directory / "buffer").rglob("*.npy"))
    n_contexts = -(-12_000 // (COMMON["context_size"] - 1))
    evaluation = 800 * COMMON["context_size"]
    assert sum(passes) <= 2 * n_contexts * COMMON["context_size"] + evaluation + 3 * 32 * COMMON["context_size"]
    assert Train().finish(made)["explained_variance"] > 0.3


def test_curves_and_snapshots_tell_how_it_went(settings: Settings) -> None:
    made = context(settings, COMMON | {"set_name": "a", "k": [3, 6], "evaluate_every_steps": 40})
    run(made)
    with made.sessions() as session:
        points = session.scalars(select(JobMetric).order_by(JobMetric.step)).all()
    found = curves.series(list(points), ["1-a-k3", "1-a-k6"])
    for curve in found.values():
        assert curve["loss"][-1][1] < curve["loss"][0][1]
        assert [step for step, _ in curve["ce_loss_score"]] == [40, 80, 92]
        assert {"l0", "dead_fraction", "lr", "grad_norm", "tokens", "tokens_per_second"} <= set(curve)
    assert found["1-a-k3"]["l0"][-1][1] < found["1-a-k6"]["l0"][-1][1]
    assert curves.snapshot_steps(made.directory, "1-a-k6") == (40, 80, 92)
    first, last = (curves.read_snapshot(made.directory, "1-a-k6", step) for step in (40, 92))
    assert [f.index for f in first.features] == [f.index for f in last.features]
    assert sum(last.activations.counts) == pytest.approx(found["1-a-k6"]["held_out_l0"][-1][1] * last.n_probe, rel=0.01)
    assert sum(last.densities.counts) + last.n_silent == 48
    shown = next(f for f in last.features if f.examples)
    example = shown.examples[0]
    assert len(example.tokens) == len(example.values)
    assert max(example.values) == shown.max_act


@pytest.mark.parametrize("more", [{"k": 4}, {"architecture": "transcoder", **OWN["transcoder"], "k": None}])
def test_a_look_tells_the_score_of_the_evaluation_and_runs_the_model_as_it_is_once(
    settings: Settings, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    asked: list[int] = []
    bounds = watching.loss_bounds
    monkeypatch.setattr(watching, "loss_bounds", lambda *all: (asked.append(1), bounds(*all))[1])
    made = context(settings, COMMON | {"set_name": "a", "evaluate_every_steps": 30} | more)
    run(made)
    assert len(asked) == 1
    spec = TrainSpec.model_validate(made.spec)
    with made.sessions() as session:
        (source,) = session.scalars(select(Source))
        points = session.scalars(select(JobMetric).order_by(JobMetric.step)).all()
        corpus = corpora.corpus_named(session, "c")
    told = [point.values["ce_loss_score"] for point in points if "ce_loss_score" in point.values]
    assert len(told) > 2
    model = LanguageModel.load(Path(tiny.model.path))
    stream = Stream.open(corpora.tokens_dir(settings, corpus.hash, model.card.tokenizer_hash))
    text = Text(model, stream, spec.context_size)
    _, held_out = train.split(spec, text)
    coder = load_sae(settings.sae_dir(source.sae_hash), "cpu")
    rows, sizes = held_out[: trainplan.LOOK_LOSS_CONTEXTS], (spec.context_size, trainplan.LOOK_LOSS_CONTEXTS)
    measured = evaluate(text.model, coder, text.stream, rows, *sizes, spec.max_norm_ratio, lambda share, said: None)
    assert told[-1] == pytest.approx(measured["ce_loss_score"], abs=1e-3)


def test_every_architecture_of_the_spec_is_trained_here() -> None:
    assert set(OWN) == set(Architecture)


def test_an_unknown_hook_is_refused_before_anything_is_computed(settings: Settings) -> None:
    made = context(settings, COMMON | {"set_name": "a", "k": 4, "hook_name": "blocks.9.hook_resid_post"})
    with pytest.raises(Exception, match=r"layer 9; tiny has 3 layers"):
        Train().plan(made)
    assert not Path(made.directory / "plan.json").exists()
