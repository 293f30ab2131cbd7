"""The job that trains an SAE: tokenise, cache activations, optimise, evaluate, catalogue.

Everything that survives a crash lies in the job's directory: activation shards, and one checkpoint with weights, the
optimiser's moments and the counters. Data order depends on the seed alone, so a resumed run ends with the same weights.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy.orm import Session
from torch import Tensor

from app import corpora, harvests, jobs, weights
from app.corpora import Stream
from app.errors import AtlasError, TooLarge
from app.specs import HarvestSpec, TrainSpec
from workers import checkpoints
from workers.activations import CachedActivations, norms_of, write_shard
from workers.corpora import tokenised
from workers.device import device_of
from workers.language_model import LanguageModel
from workers.sae.losses import TopKParameters, initial_parameters, normalise_rows, remove_parallel_gradient, topk_loss
from workers.trainer import loaded
from workers.trainer.evaluate import evaluate
from workers.trainer.kinds import JobContext, JobKind

TOKENS_PER_SHARD = 65_536
STEPS_PER_METRIC = 10


class Diverged(AtlasError):
    """The loss is no number any more."""


@dataclass
class TrainingState:
    """Weights, optimiser and counters after `step` optimiser steps."""

    step: int
    parameters: TopKParameters
    optimiser: torch.optim.Adam
    tokens_since_active: Tensor
    """[d_sae] tokens seen since each latent was last chosen."""

    @classmethod
    def fresh(cls, spec: TrainSpec, mean: Tensor) -> TrainingState:
        generator = torch.Generator().manual_seed(spec.seed)
        # Drawn on the CPU, so that a seed means the same weights on every device.
        drawn = initial_parameters(len(mean), spec.d_sae, mean.cpu(), generator)
        tensors = {name: tensor.to(mean.device) for name, tensor in drawn._asdict().items()}
        return cls._of(0, tensors, torch.zeros(spec.d_sae, dtype=torch.long, device=mean.device))

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> TrainingState:
        stored = load_file(path, device=device)
        step = int(stored["step"])
        state = cls._of(step, stored, stored["tokens_since_active"])
        for name, parameter in state.parameters._asdict().items():
            state.optimiser.state[parameter] = {
                "step": torch.tensor(float(step), device=device),
                "exp_avg": stored[f"exp_avg.{name}"],
                "exp_avg_sq": stored[f"exp_avg_sq.{name}"],
            }
        return state

    @classmethod
    def _of(cls, step: int, tensors: dict[str, Tensor], tokens_since_active: Tensor) -> TrainingState:
        parameters = TopKParameters(*(torch.nn.Parameter(tensors[name]) for name in TopKParameters._fields))
        return cls(step, parameters, torch.optim.Adam(parameters, fused=True), tokens_since_active)

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all."""
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step), "tokens_since_active": self.tokens_since_active}
        for name, parameter in self.parameters._asdict().items():
            moments = self.optimiser.state[parameter]
            tensors |= {
                name: parameter.detach(),
                f"exp_avg.{name}": moments["exp_avg"],
                f"exp_avg_sq.{name}": moments["exp_avg_sq"],
            }
        scratch = path.with_suffix(".new")
        save_file(tensors, scratch)
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(scratch, path)


class Train(JobKind):
    name = "train"

    def title(self, spec: dict[str, Any]) -> str:
        asked = TrainSpec(**spec)
        return f"Train {asked.model}/{asked.source}: TopK k={asked.k}, d_sae={asked.d_sae:,}"

    def plan(self, context: JobContext) -> list[str]:
        spec = TrainSpec(**context.spec)
        model = loaded.model(context, spec.model)
        stream = _stream(context, spec, model)
        d_in = model.hook_size(spec.hook_name)
        needed = spec.n_tokens * d_in * 2
        if needed > context.settings.cache_bytes:
            raise TooLarge(
                f"Caching {spec.n_tokens:,} tokens of {d_in} values takes {needed / 1e9:.1f} GB, the limit is "
                f"{context.settings.cache_bytes / 1e9:.1f} GB. Lower n_tokens or raise SAE_ATLAS_CACHE_BYTES."
            )
        rows, _ = split(spec, stream, model.card.bos_token_id)
        n_shards = -(-len(rows) * spec.context_size // TOKENS_PER_SHARD)
        n_steps = (len(rows) * (spec.context_size - 1) // spec.batch_size) * spec.epochs
        if n_steps == 0:
            raise TooLarge(
                f"A batch is {spec.batch_size:,} tokens, the corpus gives {len(rows) * (spec.context_size - 1):,}."
            )
        n_chunks = -(-n_steps // spec.steps_per_checkpoint)
        return [
            *(f"activations {i + 1}/{n_shards}" for i in range(n_shards)),
            *(f"optimise {i + 1}/{n_chunks}" for i in range(n_chunks)),
            "evaluate",
        ]

    def run(self, context: JobContext, step: str) -> None:
        spec = TrainSpec(**context.spec)
        match step.split():
            case ["activations", place]:
                _cache_activations(context, spec, *_place(place))
            case ["optimise", place]:
                _optimise(context, spec, *_place(place))
            case _:
                _evaluate(context, spec)

    def finish(self, context: JobContext) -> dict[str, Any]:
        if (done := context.directory / loaded.RESULT).exists():
            return json.loads(done.read_text())
        spec = TrainSpec(**context.spec)
        metrics = json.loads((context.directory / "metrics.json").read_text())
        with context.sessions.begin() as session:
            source = harvests.catalogue_sae(
                session,
                context.settings,
                weights.check_sae(context.directory / "sae", None, context.settings),
                model_id=spec.model,
                set_name=spec.set_name,
                metrics=metrics,
                origin={
                    "kind": "trained",
                    "job": context.job_id,
                    "spec": spec.model_dump(mode="json", exclude={"harvest_tokens"}),
                },
            )
            if spec.harvest_tokens:
                harvest = HarvestSpec(
                    model=spec.model,
                    sources=(source.name,),
                    corpus=spec.corpus,
                    n_tokens=spec.harvest_tokens,
                    context_size=spec.context_size,
                )
                _queue_once(session, context, f"Harvest {spec.model}/{source.name}", harvest.model_dump(mode="json"))
            url = f"/{spec.model}/{source.name}"
        result = {"url": url, **metrics}
        loaded.leave_only_result(context, result)
        return result


def _queue_once(session: Session, context: JobContext, title: str, spec: dict[str, Any]) -> None:
    """Queue the harvest of a trained SAE, unless an interrupted `finish` has done so already."""
    later = (job for job in jobs.recent(session) if job.id > context.job_id and job.kind == "harvest")
    if not any(job.spec == spec for job in later):
        jobs.submit(session, context.settings, "harvest", title, spec)


def split(spec: TrainSpec, stream: Stream, bos: int | None) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the context rows to train on, in random order, and the held-out rows at the corpus' end."""
    n = stream.n_contexts(spec.context_size, bos)
    n_train = int(n * (1 - spec.held_out))
    wanted = min(n_train, -(-spec.n_tokens // (spec.context_size - 1)))
    rows = np.random.default_rng([spec.seed, 0]).permutation(n_train)[:wanted]
    return rows, np.arange(n_train, n)


def _place(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    return int(number) - 1, int(total)


def _stream(context: JobContext, spec: TrainSpec, model: LanguageModel) -> Stream:
    with context.sessions() as session:
        corpus = corpora.corpus_named(session, spec.corpus)
    return tokenised(model, context.settings.corpus_dir(corpus.hash), context.report)


def _cache_activations(context: JobContext, spec: TrainSpec, number: int, total: int) -> None:
    model = loaded.model(context, spec.model)
    stream = _stream(context, spec, model)
    directory = context.directory / "activations"
    directory.mkdir(exist_ok=True)
    (directory / "limits.json").write_text(json.dumps({"max_norm_ratio": spec.max_norm_ratio}))
    rows, _ = split(spec, stream, model.card.bos_token_id)
    part = np.array_split(rows, total)[number]
    started = time.monotonic()
    write_shard(directory / f"{number:05d}.npy", model, stream, part, spec.context_size, spec.hook_name)
    speed = len(part) * spec.context_size / (time.monotonic() - started)
    context.report(1.0, f"activations: part {number + 1} of {total}, {speed:,.0f} tokens/s")


def _shards(context: JobContext) -> list[Path]:
    return sorted((context.directory / "activations").glob("*.npy"))


def _optimise(context: JobContext, spec: TrainSpec, number: int, total: int) -> None:
    data = CachedActivations(_shards(context))
    per_epoch = len(data) // spec.batch_size
    n_steps = per_epoch * spec.epochs
    end = min((number + 1) * spec.steps_per_checkpoint, n_steps)
    norms = norms_of(context.directory / "activations")
    assert norms is not None
    checkpoint = context.directory / "checkpoint.safetensors"
    device = device_of(context.settings)
    mean = torch.tensor(norms.mean, device=device) * norms.scale
    state = TrainingState.load(checkpoint, device) if checkpoint.exists() else TrainingState.fresh(spec, mean)
    started, first = time.monotonic(), state.step
    while state.step < end:
        x = data.batch(spec.seed, *divmod(state.step, per_epoch), spec.batch_size).to(device) * norms.scale
        metrics = _train_step(state, spec, x, n_steps)
        if state.step % STEPS_PER_METRIC == 0 or state.step == n_steps:
            context.metric(state.step, metrics)
        speed = (state.step - first) * spec.batch_size / (time.monotonic() - started)
        left = (n_steps - state.step) * spec.batch_size / speed
        context.report(
            1 - (end - state.step) / spec.steps_per_checkpoint,
            f"step {state.step:,} of {n_steps:,}, explained variance {metrics['explained_variance']:.3f}, "
            f"dead {metrics['dead']:.1%}, {speed:,.0f} tokens/s, {left / 60:.0f} min left",
        )
    if state.step > first:
        state.save(checkpoint)


def _train_step(state: TrainingState, spec: TrainSpec, x: Tensor, n_steps: int) -> dict[str, float]:
    """Take one optimiser step on one batch of normalised activations, [batch, d_in], and return its metrics."""
    lr = learning_rate(state.step, n_steps, spec)
    for group in state.optimiser.param_groups:
        group["lr"] = lr
    dead = state.tokens_since_active >= spec.dead_after_tokens
    with torch.autocast(x.device.type, torch.bfloat16):
        loss = topk_loss(x, state.parameters, spec.k, dead, spec.aux_k, spec.aux_coefficient)
    if not torch.isfinite(loss.total):
        raise Diverged(
            f"The loss became {loss.total.item()} at step {state.step:,} with learning rate {lr:.1e}. "
            "Lower lr or raise warmup_steps; if it happens at once, look for non-finite activations."
        )
    loss.total.backward()
    remove_parallel_gradient(state.parameters.W_dec)
    norm = torch.nn.utils.clip_grad_norm_(state.parameters, 1.0)
    state.optimiser.step()
    state.optimiser.zero_grad()
    normalise_rows(state.parameters.W_dec)
    state.tokens_since_active += len(x)
    state.tokens_since_active[loss.active.flatten()] = 0
    state.step += 1
    return {
        "explained_variance": 1 - float(loss.fvu),
        "aux_loss": float(loss.aux),
        "dead": float(dead.float().mean()),
        "lr": lr,
        "grad_norm": float(norm),
        "tokens": float(state.step * spec.batch_size),
    }


def learning_rate(step: int, n_steps: int, spec: TrainSpec) -> float:
    """Linear warm-up, constant, linear decay to zero over the last decay_share of the steps."""
    warm = min(1.0, (step + 1) / spec.warmup_steps) if spec.warmup_steps else 1.0
    n_decay = max(1, round(n_steps * spec.decay_share))
    return spec.lr * warm * min(1.0, (n_steps - step) / n_decay)


def _evaluate(context: JobContext, spec: TrainSpec) -> None:
    model = loaded.model(context, spec.model)
    stream = _stream(context, spec, model)
    directory = context.directory / "sae"
    _write_sae(context, spec, model, directory)
    coder = checkpoints.load_sae(directory, str(model.device))
    _, held_out = split(spec, stream, model.card.bos_token_id)
    n_loss_contexts = -(-spec.n_eval_tokens // spec.context_size)
    rows = held_out[: max(n_loss_contexts, 800)]
    metrics = evaluate(
        model, coder, stream, rows, spec.context_size, n_loss_contexts, spec.max_norm_ratio, context.report
    )
    state = TrainingState.load(context.directory / "checkpoint.safetensors")
    metrics["n_trained_tokens"] = state.step * spec.batch_size
    scratch = context.directory / "metrics.json.new"
    scratch.write_text(json.dumps(metrics))
    os.replace(scratch, context.directory / "metrics.json")


def _write_sae(context: JobContext, spec: TrainSpec, model: LanguageModel, directory: Path) -> None:
    """Write the SAE with the normalisation folded in, so that it reads the model's own activations.

    acts / scale = (x - b_dec / scale) W_enc + b_enc / scale: only the biases change, decoder rows keep norm 1, and
    activations come out in the units of the residual stream.
    """
    norms = norms_of(context.directory / "activations")
    assert norms is not None
    trained = TrainingState.load(context.directory / "checkpoint.safetensors").parameters
    tensors = {
        "W_enc": trained.W_enc,
        "b_enc": trained.b_enc / norms.scale,
        "W_dec": trained.W_dec,
        "b_dec": trained.b_dec / norms.scale,
    }
    config = {
        "architecture": spec.architecture,
        "d_in": trained.W_enc.shape[0],
        "d_sae": spec.d_sae,
        "k": spec.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "model_name": model.card.id,
            "hook_name": spec.hook_name,
            "context_size": spec.context_size,
            "prepend_bos": model.card.bos_token_id is not None,
            "dataset_path": spec.corpus,
            "trained_by": "sae-atlas",
            "sae_lens_version": "6.0.0",  # the shape of this config; without it sae-lens ignores the metadata
        },
    }
    checkpoints.save_sae(directory, config, tensors, getattr(torch, spec.weights_dtype))
