"""One SAE while it is trained: weights, optimiser, counters; the optimiser step; the checkpoint. No data, no database.

A checkpoint is everything the next step depends on, so that training resumed from it ends with the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.errors import AtlasError
from app.trainspecs import RESAMPLING_ENDS, SaeSpec
from workers.sae import across
from workers.sae.training import (
    OBJECTIVES,
    Folded,
    Losses,
    Objective,
    remove_parallel_gradient,
    resampled,
)


class Diverged(AtlasError):
    """The loss is no number any more."""


@dataclass
class Learner:
    """An SAE after `step` optimiser steps."""

    spec: SaeSpec
    objective: Objective
    step: int
    weights: dict[str, torch.nn.Parameter]
    optimiser: torch.optim.Adam
    tokens_since_active: Tensor
    """[d_sae] tokens seen since each latent was last active."""
    threshold: float = 0.0
    """BatchTopK: the running threshold that inference will use."""

    @classmethod
    def fresh(cls, spec: SaeSpec, d_in: int, mean: Tensor) -> Learner:
        """Draw an SAE's weights; mean is that of the normalised target, [d_out]."""
        objective = objective_of(spec, d_in, len(mean))
        # Drawn on the CPU, so that a seed means the same weights on every device.
        drawn = objective.initial(mean.cpu(), torch.Generator().manual_seed(spec.seed))
        tensors = {name: tensor.to(mean.device).contiguous() for name, tensor in drawn.items()}
        return cls._of(spec, objective, 0, tensors, torch.zeros(spec.d_sae, dtype=torch.long, device=mean.device))

    @classmethod
    def load(cls, path: Path, spec: SaeSpec, device: str) -> Learner:
        stored = load_file(path, device=device)
        tensors = {name.removeprefix("w."): t for name, t in stored.items() if name.startswith("w.")}
        objective = objective_of(spec, tensors["W_enc_T"].shape[1], tensors["W_dec"].shape[1])
        learner = cls._of(spec, objective, int(stored["step"]), tensors, stored["tokens_since_active"])
        learner.threshold = float(stored["threshold"])
        for name, parameter in learner.weights.items():
            learner.optimiser.state[parameter] = {
                "step": torch.tensor(float(learner.step), device=device),
                "exp_avg": stored[f"exp_avg.{name}"],
                "exp_avg_sq": stored[f"exp_avg_sq.{name}"],
            }
        return learner

    @classmethod
    def _of(
        cls, spec: SaeSpec, objective: Objective, step: int, tensors: Mapping[str, Tensor], since: Tensor
    ) -> Learner:
        # In one order, also from a file: the gradient's norm is a sum over them, and its last bit depends on the order.
        weights = {name: torch.nn.Parameter(tensors[name]) for name in sorted(tensors)}
        betas = (spec.adam_beta1, spec.adam_beta2)
        optimiser = torch.optim.Adam(weights.values(), lr=spec.lr, betas=betas, fused=True)
        return cls(spec, objective, step, weights, optimiser, since)

    def save(self, path: Path) -> None:
        """Write the checkpoint, whole or not at all."""
        tensors: dict[str, Tensor] = {
            "step": torch.tensor(self.step),
            "tokens_since_active": self.tokens_since_active,
            "threshold": torch.tensor(self.threshold, dtype=torch.float64),
        }
        for name, parameter in self.weights.items():
            moments = self.optimiser.state[parameter]
            tensors |= {f"w.{name}": parameter.detach(), f"exp_avg.{name}": moments["exp_avg"]}
            tensors[f"exp_avg_sq.{name}"] = moments["exp_avg_sq"]
        scratch = path.with_suffix(".new")
        save_file(tensors, scratch)
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(scratch, path)

    def fold(self, scale_in: float, scale_out: float) -> Folded:
        """Return the SAE as it is now, for the model's own activations."""
        weights = {name: parameter.detach() for name, parameter in self.weights.items()}
        return self.objective.fold(weights, scale_in, scale_out, {"threshold": self.threshold})

    def learn(
        self, x: Tensor, target: Tensor, n_steps: int, precision: torch.dtype, *, measure: bool
    ) -> dict[str, float] | None:
        """Take one optimiser step on a batch of normalised activations; return its metrics where they are asked for.

        Where several processes train together, each is given the whole batch and learns from its share of it.
        """
        n_rows, x, target = len(x), across.share(x), across.share(target)
        lr, warmth = learning_rate(self.step, n_steps, self.spec), penalty_warmth(self.step, self.spec)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        dead = self.tokens_since_active >= self.spec.dead_after_tokens
        treated = dead if self.spec.treatment in ("aux_k", "pre_act") else torch.zeros_like(dead)
        with in_precision(x.device.type, precision):
            losses = self.objective.losses(cast(dict[str, Tensor], self.weights), x, target, treated, warmth)
        if not torch.isfinite(losses.total):
            raise Diverged(_cause(self, losses, x, target, lr))
        # Shares differ by a row: weighted by theirs, the processes' mean is that of the whole batch.
        (losses.total * (len(x) * across.size() / n_rows)).backward()
        across.average(parameter.grad for parameter in self.weights.values())
        losses = _of_all(losses, len(x) / n_rows)
        norm = self._update()
        self._count(losses, n_rows)
        self._resample(losses, x, n_rows, n_steps)
        self.step += 1
        return self._metrics(losses, dead, lr, warmth, norm) if measure else None

    def _update(self) -> Tensor:
        remove_parallel_gradient(self.weights["W_dec"])
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), self.spec.max_grad_norm)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.objective.project(cast(dict[str, Tensor], self.weights))
        return norm

    def _count(self, losses: Losses, n_tokens: int) -> None:
        self.tokens_since_active += n_tokens
        self.tokens_since_active[losses.fired] = 0
        if losses.least is not None and self.spec.threshold_lr is not None:
            # Over the last quarter of the steps while these are few: early activations are smaller.
            rate = max(self.spec.threshold_lr, 4 / (self.step + 4))
            self.threshold += rate * (float(losses.least) - self.threshold)

    @torch.no_grad()
    def _resample(self, losses: Losses, x: Tensor, n_rows: int, n_steps: int) -> None:
        every = self.spec.resample_every_steps
        if self.spec.treatment != "resample" or not every or (self.step + 1) % every:
            return
        dead = self.tokens_since_active >= self.spec.dead_after_tokens
        if self.step + 1 > RESAMPLING_ENDS * n_steps or not bool(dead.any()) or losses.error is None:
            return
        generator = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + self.step)
        weights = {name: parameter.detach() for name, parameter in self.weights.items()}
        error, read = across.gathered(losses.error, n_rows), across.gathered(x, n_rows)
        for name, tensor in resampled(weights, dead, error, read, generator).items():
            self.weights[name].copy_(tensor)
            if tensor.shape[:1] == dead.shape:
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimiser.state[self.weights[name]][moment][dead] = 0
        self.tokens_since_active[dead] = 0

    def _metrics(self, losses: Losses, dead: Tensor, lr: float, warmth: float, norm: Tensor) -> dict[str, float]:
        coefficient = self.spec.l1_coefficient if self.spec.l1_coefficient is not None else self.spec.l0_coefficient
        return {
            "loss": float(losses.total.detach()),
            "explained_variance": 1 - float(losses.mse / losses.variance),
            "l0": float(losses.l0),
            "dead_fraction": float(dead.float().mean()),
            "lr": lr,
            "grad_norm": float(norm),
            **{f"{name}_penalty": float(value / losses.variance) for name, value in losses.penalties.items()},
            **({"coefficient": coefficient * warmth} if coefficient is not None else {}),
        }


def _of_all(losses: Losses, share: float) -> Losses:
    """Return the losses of the whole batch, of which this process has a share."""
    if across.size() == 1:
        return losses
    told = {"total": losses.total.detach(), "mse": losses.mse, "l0": losses.l0.float(), **losses.penalties}
    means = {name: value.clone() * (share * across.size()) for name, value in told.items()}
    across.average(means.values())
    least = torch.tensor(torch.inf) if losses.least is None else losses.least.cpu()
    least = -across.largest(-least.to(losses.mse.device))
    return losses._replace(
        total=means["total"],
        mse=means["mse"],
        l0=means["l0"],
        penalties={name: means[name] for name in losses.penalties},
        fired=across.largest(losses.fired),
        least=least if bool(least.isfinite()) else None,
    )


def objective_of(spec: SaeSpec, d_in: int, d_out: int) -> Objective:
    """Return the objective of a spec, with its hyperparameters."""
    kind = OBJECTIVES[spec.architecture]
    own = {f.name: getattr(spec, f.name) for f in fields(kind) if f.name not in ("d_in", "d_out", "d_sae")}
    if spec.treatment == "none":
        own |= {name: 0.0 for name in ("aux_coefficient", "pre_act_coefficient") if name in own}
    return cast(Any, kind)(d_in=d_in, d_out=d_out, d_sae=spec.d_sae, **own)


def learning_rate(step: int, n_steps: int, spec: SaeSpec) -> float:
    """Linear warm-up, constant, linear decay to zero over the last decay_share of the steps."""
    warm = min(1.0, (step + 1) / spec.warmup_steps) if spec.warmup_steps else 1.0
    n_decay = max(1, round(n_steps * spec.decay_share))
    return spec.lr * warm * min(1.0, (n_steps - step) / n_decay)


def penalty_warmth(step: int, spec: SaeSpec) -> float:
    """How much of the L1 or L0 penalty counts at a step, 0..1."""
    warmup = spec.l1_warmup_steps or spec.l0_warmup_steps
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def in_precision(device: str, precision: torch.dtype) -> AbstractContextManager[Any]:
    return nullcontext() if precision is torch.float32 else torch.autocast(device, precision)


def fast_precision(device: str) -> torch.dtype:
    """The precision of large products that is fastest on a device: bfloat16 where it is computed natively."""
    if device == "cpu":
        told = torch.cpu.get_capabilities()
        native = bool(told.get("avx512_bf16") or told.get("amx_bf16"))
    else:
        native = device == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def _cause(learner: Learner, losses: Losses, x: Tensor, target: Tensor, lr: float) -> str:
    """Say at which step the loss became no number, and what probably did it."""
    spec = learner.spec
    where = f"The loss of {spec.source} became {float(losses.total.detach())} at step {learner.step:,}"
    for hook, acts in ((spec.hooks[0], x), (spec.hooks[-1], target)):
        if not bool(torch.isfinite(acts).all()):
            return f"{where}: the activations at {hook} are not finite. Look at the model and its precision there."
    broken = [name for name, weight in learner.weights.items() if not bool(torch.isfinite(weight).all())]
    if broken:
        last = f" with learning rate {lr:.1e}: the step before made {', '.join(broken)} not finite"
        return f"{where}{last}. Lower lr to {spec.lr / 3:.1e}, or raise warmup_steps (now {spec.warmup_steps:,})."
    terms = {"squared error": losses.mse, **losses.penalties}
    worst = [name for name, value in terms.items() if not bool(torch.isfinite(value))] or ["the sum"]
    return (
        f"{where} with learning rate {lr:.1e}, in {', '.join(worst)}. Lower lr to {spec.lr / 3:.1e}, raise "
        f"warmup_steps (now {spec.warmup_steps:,}), or train with precision float32."
    )
