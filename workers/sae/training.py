"""SAE architectures while they are trained: one class each, with its equation and loss. No files, no optimiser.

All read activations normalised to a mean norm of sqrt(d_in). The loss of every one is

    total = (mse + penalties) / variance,   mse = mean_batch |target - x_hat|^2,

with the batch's variance about its mean, so that mse / variance is 1 - explained variance, and clipping the gradient's
norm means the same at every hook. Rows of W_dec keep norm 1, so penalties need no decoder norms: what those would add
to the gradient of W_dec is parallel to its rows and removed. Penalties and mse are defined as in sae-lens' training
classes; AuxK is divided by the variance of what it reconstructs, as Gao et al. do, which sae-lens leaves out.

The encoder is stored by rows, W_enc_T [d_sae, d_in], since its sparse gradients come by rows. W_enc_T, b_enc, W_dec and
b_dec are in all; each class adds its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from workers.sae import across, sparse

Weights = Mapping[str, Tensor]


class Losses(NamedTuple):
    """What one batch gives."""

    total: Float[Tensor, ""]
    """What is minimised."""
    mse: Float[Tensor, ""]
    """Squared error of a token, summed over d_out."""
    variance: Float[Tensor, ""]
    """The same of the batch's mean in place of the reconstruction."""
    penalties: dict[str, Float[Tensor, ""]]
    """What is added to mse, weighted, in its units."""
    l0: Float[Tensor, ""]
    """Mean number of active latents on a token."""
    fired: Bool[Tensor, " d_sae"]
    """Which latents were active on any token."""
    least: Float[Tensor, ""] | None = None
    """BatchTopK: the least activation that was kept."""
    error: Float[Tensor, "batch d_out"] | None = None
    """What the reconstruction misses, for resampling."""


class Folded(NamedTuple):
    """A trained SAE for use on the model's own activations, as SAELens stores it."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


@dataclass(frozen=True)
class Objective:
    """x_hat = acts W_dec + b_dec; subclasses say what acts and penalties are. Hyperparameters are the fields."""

    architecture: ClassVar[str]
    d_in: int
    d_out: int
    d_sae: int

    def initial(self, mean: Float[Tensor, " d_out"], generator: torch.Generator) -> dict[str, Tensor]:
        """Draw weights: random unit decoder rows, the encoder their transpose, b_dec the mean of the target."""
        rows = torch.randn(self.d_sae, self.d_out, generator=generator)
        W_dec = rows / rows.norm(dim=-1, keepdim=True)
        W_enc_T = self._initial_encoder(W_dec, generator)
        return {"W_enc_T": W_enc_T, "b_enc": torch.zeros(self.d_sae), "W_dec": W_dec, "b_dec": mean.clone()}

    def _initial_encoder(self, W_dec: Tensor, generator: torch.Generator) -> Tensor:
        # Half of all latents are active at first, and sum to d_sae / 2 d_in times x.
        return W_dec * min(1.0, self.d_in / self.d_sae)

    def losses(
        self,
        weights: Weights,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: Bool[Tensor, " d_sae"],
        warmth: float,
    ) -> Losses:
        """Return the losses of a batch; `warmth` in 0..1 is how far the penalty's warm-up is."""
        raise NotImplementedError

    def project(self, weights: Weights) -> None:
        """Bring weights back to where they must be after an optimiser step, in place: decoder rows to norm 1."""
        normalise_rows(weights["W_dec"])

    def fold(self, weights: Weights, scale_in: float, scale_out: float, extra: Mapping[str, float]) -> Folded:
        """Return the SAE that reads the model's own activations, which were multiplied by the scales for training.

        Decoder rows keep norm 1, so activations come out in units of the model's activations at the output's hook.
        """
        tensors = {
            "W_enc": weights["W_enc_T"].T * (scale_in / scale_out),
            "b_enc": weights["b_enc"] / scale_out,
            "W_dec": weights["W_dec"],
            "b_dec": weights["b_dec"] / scale_out,
        }
        return Folded(tensors, {"architecture": self.architecture, "apply_b_dec_to_input": True})

    def _loss(self, target: Tensor, x_hat: Tensor, penalties: dict[str, Tensor], l0: Tensor, fired: Tensor) -> Losses:
        error = target - x_hat
        mse = error.square().sum(dim=-1).mean()
        variance = _variance(target)
        total = torch.stack([mse, *penalties.values()]).sum() / variance
        told = {name: value.detach() for name, value in penalties.items()}
        return Losses(total, mse.detach(), variance, told, l0.detach(), fired, error=error.detach())


def _variance(x: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """About the mean, of the whole batch where several processes share it."""
    return across.mean_of_rows((x - across.mean_of_rows(x)).square().sum(dim=-1)).clamp_min(1e-12)


def _centred(weights: Weights, x: Tensor, bias: str = "b_enc") -> tuple[Tensor, Tensor]:
    """Return x - b_dec without a gradient, and a bias that carries the gradient of b_dec through the encoder.

    (x - b_dec) W_enc + b_enc has the gradient -W_enc g for b_dec; summed over the batch first it costs a product with
    a vector where a gradient of x would cost one with a matrix.
    """
    b_dec = weights["b_dec"]
    carrier = weights["W_enc_T"].detach() @ (b_dec - b_dec.detach())
    return x - b_dec.detach(), weights[bias] - carrier


@dataclass(frozen=True)
class Standard(Objective):
    """acts = ReLU((x - b_dec) W_enc + b_enc); penalty l1 sum acts. Bricken et al. 2023; L1 as in sae-lens."""

    architecture = "standard"
    l1_coefficient: float

    def losses(self, weights: Weights, x: Tensor, target: Tensor, dead: Tensor, warmth: float) -> Losses:
        acts = linear(*self._encoder_input(weights, x)).relu()
        x_hat = (acts @ weights["W_dec"]).float() + weights["b_dec"] + self._skipped(weights, x)
        l1 = self.l1_coefficient * warmth * acts.sum(dim=-1, dtype=torch.float32).mean()
        return self._loss(target, x_hat, {"l1": l1}, *_counted(acts))

    def _encoder_input(self, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centred, bias = _centred(weights, x)
        return centred, weights["W_enc_T"], bias

    def _skipped(self, weights: Weights, x: Tensor) -> Tensor | float:
        return 0.0


def _counted(acts: Tensor) -> tuple[Tensor, Tensor]:
    """l0, and which latents fired."""
    counts = acts.detach().count_nonzero(dim=0)
    return counts.sum() / len(acts), counts > 0


@dataclass(frozen=True)
class Transcoder(Standard):
    """acts = ReLU(x W_enc + b_enc), y_hat = acts W_dec + b_dec; penalty l1 sum acts. Dunefsky et al. 2024."""

    architecture = "transcoder"

    def _initial_encoder(self, W_dec: Tensor, generator: torch.Generator) -> Tensor:
        rows = torch.randn(self.d_sae, self.d_in, generator=generator)
        return rows / rows.norm(dim=-1, keepdim=True) * min(1.0, self.d_in / self.d_sae)

    def _encoder_input(self, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, weights["W_enc_T"], weights["b_enc"]

    def fold(self, weights: Weights, scale_in: float, scale_out: float, extra: Mapping[str, float]) -> Folded:
        folded = super().fold(weights, scale_in, scale_out, extra)
        return Folded(folded.tensors, folded.config | {"apply_b_dec_to_input": False, "d_out": self.d_out})


@dataclass(frozen=True)
class SkipTranscoder(Transcoder):
    """acts = ReLU(x W_enc + b_enc), y_hat = acts W_dec + x W_skip^T + b_dec. Paulo et al. 2025."""

    architecture = "skip_transcoder"

    def initial(self, mean: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return {**super().initial(mean, generator), "W_skip": torch.zeros(self.d_out, self.d_in)}

    def _skipped(self, weights: Weights, x: Tensor) -> Tensor | float:
        return linear(x, weights["W_skip"]).float()

    def fold(self, weights: Weights, scale_in: float, scale_out: float, extra: Mapping[str, float]) -> Folded:
        folded = super().fold(weights, scale_in, scale_out, extra)
        return Folded({**folded.tensors, "W_skip": weights["W_skip"] * (scale_in / scale_out)}, folded.config)


@dataclass(frozen=True)
class Gated(Objective):
    """pi = (x - b_dec) W_enc + b_gate; acts = [pi > 0] ReLU(exp(r_mag) (x - b_dec) W_enc + b_mag).

    Penalties: l1 sum ReLU(pi), and |x - ReLU(pi) W_dec - b_dec|^2, which teaches the gate. Rajamanoharan et al. 2024;
    the latter's gradient reaches the decoder, as in sae-lens and unlike in the paper.
    """

    architecture = "gated"
    l1_coefficient: float

    def initial(self, mean: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = super().initial(mean, generator)
        del drawn["b_enc"]
        return {**drawn, **{name: torch.zeros(self.d_sae) for name in ("b_gate", "r_mag", "b_mag")}}

    def losses(self, weights: Weights, x: Tensor, target: Tensor, dead: Tensor, warmth: float) -> Losses:
        centred, b_gate = _centred(weights, x, "b_gate")
        pi = linear(centred, weights["W_enc_T"], b_gate)
        # One product serves both paths; b_gate's part, with what it carries for b_dec, is taken off again.
        projected = pi - weights["b_gate"].to(pi.dtype)
        gate = pi.relu()
        magnitude = (projected * weights["r_mag"].exp().to(pi.dtype) + weights["b_mag"].to(pi.dtype)).relu()
        acts = magnitude * (pi.detach() > 0)
        b_dec = weights["b_dec"]
        x_hat = (acts @ weights["W_dec"]).float() + b_dec
        via_gate = (gate @ weights["W_dec"]).float() + b_dec
        penalties = {
            "l1": self.l1_coefficient * warmth * gate.sum(dim=-1, dtype=torch.float32).mean(),
            "gate": (target - via_gate).square().sum(dim=-1).mean(),
        }
        return self._loss(target, x_hat, penalties, *_counted(acts))

    def fold(self, weights: Weights, scale_in: float, scale_out: float, extra: Mapping[str, float]) -> Folded:
        # Of b_gate only the sign of the sum with x W_enc counts; it is divided as the others so that this stays.
        tensors, config = super().fold({**weights, "b_enc": weights["b_gate"]}, scale_in, scale_out, extra)
        tensors["b_gate"] = tensors.pop("b_enc")
        return Folded({**tensors, "b_mag": weights["b_mag"] / scale_out, "r_mag": weights["r_mag"]}, config)


@dataclass(frozen=True)
class JumpReLU(Objective):
    """acts = pre_acts [pre_acts > threshold]; penalty l0 sum_i of a step or of tanh(scale acts).

    step: l0 sum [pre_acts > threshold], whose gradient reaches the threshold alone, through a rectangle of `bandwidth`
    (Rajamanoharan et al. 2024, arXiv 2407.14435). tanh: l0 sum tanh(scale acts), with the rectangle's gradient to
    pre_acts too (Anthropic, January 2025). Dead latents are pulled to their threshold by sum ReLU(threshold -
    pre_acts). The threshold itself is trained, not its logarithm, as in sae-lens.
    """

    architecture = "jumprelu"
    l0_coefficient: float
    penalty: str
    bandwidth: float
    initial_threshold: float
    tanh_scale: float
    pre_act_coefficient: float

    def initial(self, mean: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = super().initial(mean, generator)
        return {**drawn, "threshold": torch.full((self.d_sae,), float(self.initial_threshold))}

    def losses(self, weights: Weights, x: Tensor, target: Tensor, dead: Tensor, warmth: float) -> Losses:
        centred, bias = _centred(weights, x)
        pre_acts = linear(centred, weights["W_enc_T"], bias).float()
        threshold, to_input = weights["threshold"], self.penalty == "tanh"
        acts: Tensor = _Jump.apply(pre_acts, threshold, self.bandwidth, to_input)  # pyright: ignore
        x_hat = (acts @ weights["W_dec"]).float() + weights["b_dec"]
        penalties = {"l0": self.l0_coefficient * warmth * self._sparsity(pre_acts, acts, threshold).mean()}
        if self.pre_act_coefficient and bool(dead.any()):
            lacking = (threshold[dead] - pre_acts[:, dead]).relu().sum(dim=-1).mean()
            penalties["pre_act"] = self.pre_act_coefficient * lacking
        return self._loss(target, x_hat, penalties, *_counted(acts))

    def _sparsity(self, pre_acts: Tensor, acts: Tensor, threshold: Tensor) -> Tensor:
        if self.penalty == "tanh":
            return torch.tanh(self.tanh_scale * acts).sum(dim=-1)
        steps: Tensor = _Step.apply(pre_acts, threshold, self.bandwidth, False)  # pyright: ignore
        return steps.sum(dim=-1)

    def project(self, weights: Weights) -> None:
        super().project(weights)
        with torch.no_grad():
            weights["threshold"].clamp_(min=0)  # below zero negative pre_acts would pass

    def fold(self, weights: Weights, scale_in: float, scale_out: float, extra: Mapping[str, float]) -> Folded:
        tensors, config = super().fold(weights, scale_in, scale_out, extra)
        return Folded({**tensors, "threshold": weights["threshold"] / scale_out}, config)


def _rectangle(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre_acts - threshold).abs() < bandwidth / 2).to(pre_acts.dtype)


class _Jump(torch.autograd.Function):
    """pre_acts [pre_acts > threshold], with a straight-through gradient of the jump."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return pre_acts * (pre_acts > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (pre_acts, threshold), (grad,) = ctx.saved_tensors, grads
        jump = threshold / ctx.bandwidth * _rectangle(pre_acts, threshold, ctx.bandwidth) * grad
        through = (pre_acts > threshold) * grad
        return through + jump if ctx.to_input else through, -jump.sum(dim=0), None, None


class _Step(torch.autograd.Function):
    """[pre_acts > threshold], with a straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (pre_acts, threshold), (grad,) = ctx.saved_tensors, grads
        step = _rectangle(pre_acts, threshold, ctx.bandwidth) * grad / ctx.bandwidth
        return step if ctx.to_input else None, -step.sum(dim=0), None, None


_SPARSE_SHARE = 1 / 16
"""On a CPU sparse products win where fewer latents than this share of d_sae are active."""


@dataclass(frozen=True)
class TopK(Objective):
    """acts = ReLU(pre_acts) of the k largest pre_acts of a row; AuxK loss for dead latents. Gao et al. 2024.

    AuxK: |e - e_hat|^2 over the variance of e, with e the (fixed) error and e_hat = z W_dec of the aux_k largest
    pre_acts z among the dead. Without a ReLU, as in sae-lens: it would keep the most silent ones silent.
    """

    architecture = "topk"
    k: int
    aux_k: int
    aux_coefficient: float

    def _initial_encoder(self, W_dec: Tensor, generator: torch.Generator) -> Tensor:
        # The k largest of many random rows overlap: decoded with the plain transpose they overshoot x, and the first
        # hundred steps go into undoing that, the more so since decoder rows cannot shrink.
        return W_dec / 2

    def losses(self, weights: Weights, x: Tensor, target: Tensor, dead: Tensor, warmth: float) -> Losses:
        centred, bias = _centred(weights, x)
        few = x.device.type == "cpu" and self.k < self.d_sae * _SPARSE_SHARE
        pattern, chosen = sparse.encode(centred, weights["W_enc_T"], bias, self._choice(), sparse=few)
        values = chosen.relu()
        x_hat, nested = self._decode(weights, values, pattern, target, few=few)
        found = self._loss(target, x_hat, nested, *_fired(values, pattern))
        assert found.error is not None
        aux = self._aux(weights, centred, bias, found.error, dead)
        least = values.detach()[values.detach() > 0]
        found = found._replace(least=least.min() if len(least) else None)
        if aux is None:
            return found
        weighted = self.aux_coefficient * found.variance * aux
        told = {**found.penalties, "aux": weighted.detach()}
        return found._replace(total=found.total + self.aux_coefficient * aux, penalties=told)

    def _choice(self) -> sparse.Choice:
        return partial(sparse.choose_k, k=self.k)

    def _decode(
        self, weights: Weights, values: Tensor, pattern: sparse.Pattern, target: Tensor, *, few: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction, and losses of nested ones."""
        return sparse.decode(values, weights["W_dec"], pattern, sparse=few) + weights["b_dec"], {}

    def _aux(self, weights: Weights, centred: Tensor, bias: Tensor, error: Tensor, dead: Tensor) -> Tensor | None:
        """The AuxK loss before its weight. Only the dead columns take part: it costs what is dead."""
        of_dead = dead.nonzero().squeeze(-1)
        if not len(of_dead) or not self.aux_k or not self.aux_coefficient:
            return None
        candidates = linear(centred, weights["W_enc_T"][of_dead], bias[of_dead])
        values, chosen = candidates.topk(min(self.aux_k, len(of_dead)), dim=-1, sorted=False)
        acts = torch.zeros_like(candidates).scatter(-1, chosen, values)
        leftover = error - (acts @ weights["W_dec"][of_dead]).float()
        return leftover.square().sum(dim=-1).mean() / _variance(error)

    def fold(self, weights: Weights, scale_in: float, scale_out: float, extra: Mapping[str, float]) -> Folded:
        tensors, config = super().fold(weights, scale_in, scale_out, extra)
        return Folded(tensors, config | {"k": self.k, "rescale_acts_by_decoder_norm": False})


def _fired(values: Tensor, pattern: sparse.Pattern) -> tuple[Tensor, Tensor]:
    active = values.detach() > 0
    fired = torch.zeros(pattern.d_sae, dtype=torch.bool, device=values.device)
    fired[pattern.latents[active]] = True
    return active.sum() / (len(pattern.starts) - 1), fired


@dataclass(frozen=True)
class BatchTopK(TopK):
    """acts = ReLU(pre_acts) of the k * batch largest of a whole batch; AuxK. Bussmann et al. 2024.

    In use each text stands alone, so the SAE becomes a JumpReLU whose threshold is a running mean of the least
    activation kept. It starts at the first batch's and follows faster in the first steps; sae-lens' starts at 0.
    """

    architecture = "batchtopk"
    threshold_lr: float

    def _choice(self) -> sparse.Choice:
        return partial(sparse.choose_batch, k=self.k)

    def fold(self, weights: Weights, scale_in: float, scale_out: float, extra: Mapping[str, float]) -> Folded:
        tensors, config = Objective.fold(self, weights, scale_in, scale_out, extra)
        threshold = torch.full_like(tensors["b_enc"], extra["threshold"] / scale_out)
        return Folded({**tensors, "threshold": threshold}, config | {"architecture": "jumprelu"})


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK whose first `width` latents must also reconstruct alone, for each of some widths. Bussmann et al. 2025.

    Penalty: the sum over the inner widths of |x - acts[:width] W_dec[:width] - b_dec|^2.
    """

    architecture = "matryoshka_batchtopk"
    widths: tuple[int, ...]

    def _decode(
        self, weights: Weights, values: Tensor, pattern: sparse.Pattern, target: Tensor, *, few: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        x_hat, first, inner = weights["b_dec"], 0, {}
        for width in self.widths:
            level, kept = pattern.within(first, width)
            x_hat = x_hat + sparse.decode(values[kept], weights["W_dec"], level, sparse=few)
            if width < self.d_sae:
                inner[f"inner_{width}"] = (target - x_hat).square().sum(dim=-1).mean()
            first = width
        return x_hat, inner


OBJECTIVES: dict[str, type[Objective]] = {
    objective.architecture: objective
    for objective in (Standard, Gated, TopK, JumpReLU, BatchTopK, Matryoshka, Transcoder, SkipTranscoder)
}


@torch.no_grad()
def remove_parallel_gradient(W_dec: Float[Tensor, "d_sae d_out"]) -> None:
    """Take out the part of W_dec's gradient along each row, which the norm constraint would undo anyway."""
    assert W_dec.grad is not None
    W_dec.grad -= (W_dec.grad * W_dec).sum(dim=-1, keepdim=True) * W_dec


@torch.no_grad()
def normalise_rows(W_dec: Float[Tensor, "d_sae d_out"]) -> None:
    """Bring each decoder row back to norm 1, in place."""
    W_dec /= W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8)


@torch.no_grad()
def resampled(
    weights: Weights,
    dead: Bool[Tensor, " d_sae"],
    error: Float[Tensor, "batch d_out"],
    x: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return weights in which dead latents point to what is reconstructed worst. Bricken et al. 2023, appendix.

    Each dead latent takes a token, with a chance proportional to its squared error squared, and decodes to its error's
    direction; its encoder row reads the same direction of the input with a fifth of the others' norm, its biases are 0.
    """
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    numbers = dead.nonzero().squeeze(-1)
    chances = error.square().sum(dim=-1).square().cpu().double()
    rows = torch.multinomial(chances + 1e-30, len(numbers), replacement=True, generator=generator).to(error.device)
    directions = error[rows] / error[rows].norm(dim=-1, keepdim=True).clamp_min(1e-8)
    alive = changed["W_enc_T"][~dead]
    norm = 0.2 * (alive.norm(dim=-1).mean() if len(alive) else torch.ones((), device=error.device))
    read = directions if x.shape == error.shape else (x - x.mean(dim=0))[rows]
    changed["W_dec"][numbers] = directions
    changed["W_enc_T"][numbers] = norm * read / read.norm(dim=-1, keepdim=True).clamp_min(1e-8)
    for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
        if name in changed:
            changed[name][numbers] = 0
    return changed
