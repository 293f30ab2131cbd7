"""The training objective of a TopK SAE with AuxK (Gao et al. 2024, arXiv 2406.04093, sections 2.3 and A.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class TopKParameters(NamedTuple):
    """The weights of a TopK SAE while it is trained; rows of W_dec have norm 1."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]


class TopKLoss(NamedTuple):
    """What one batch gives."""

    total: Float[Tensor, ""]
    fvu: Float[Tensor, ""]
    """Squared error over the batch's variance about its mean: 1 - explained variance."""
    aux: Float[Tensor, ""]
    """The same for the dead latents' reconstruction of the residual error; 0 when none is dead."""
    active: Int[Tensor, "batch k"]
    """The chosen latents."""


def initial_parameters(
    d_in: int, d_sae: int, mean: Float[Tensor, " d_in"], generator: torch.Generator
) -> TopKParameters:
    """Random unit decoder rows, the encoder their transpose, b_dec the mean of the data."""
    rows = torch.randn(d_sae, d_in, generator=generator)
    W_dec = rows / rows.norm(dim=-1, keepdim=True)
    return TopKParameters(W_dec.T.contiguous(), torch.zeros(d_sae), W_dec, mean.clone())


def topk_loss(
    x: Float[Tensor, "batch d_in"],
    parameters: TopKParameters,
    k: int,
    dead: Bool[Tensor, " d_sae"],
    aux_k: int,
    aux_coefficient: float,
) -> TopKLoss:
    """Return the reconstruction loss plus the AuxK loss of the dead latents.

    The latter asks the aux_k strongest dead latents to reconstruct what the living ones left over.
    """
    pre_acts = (x - parameters.b_dec) @ parameters.W_enc + parameters.b_enc
    values, active = pre_acts.topk(k, dim=-1, sorted=False)
    acts = torch.zeros_like(pre_acts).scatter(-1, active, values.relu())
    error = x - (acts @ parameters.W_dec).float() - parameters.b_dec
    fvu = error.square().sum() / (x - x.mean(dim=0)).square().sum()
    n_dead = int(dead.sum())
    if n_dead == 0 or aux_k == 0:
        return TopKLoss(fvu, fvu.detach(), fvu.new_zeros(()), active)
    aux = _aux_loss(error.detach(), pre_acts, parameters.W_dec, dead, min(aux_k, n_dead))
    return TopKLoss(fvu + aux_coefficient * aux, fvu.detach(), aux.detach(), active)


def _aux_loss(error: Tensor, pre_acts: Tensor, W_dec: Tensor, dead: Tensor, aux_k: int) -> Tensor:
    # Only the dead columns take part, so the cost is proportional to how many are dead.
    of_dead = dead.nonzero().squeeze(-1)
    candidates = pre_acts[:, of_dead]
    values, chosen = candidates.topk(aux_k, dim=-1, sorted=False)
    acts = torch.zeros_like(candidates).scatter(-1, chosen, values.relu())
    leftover = error - (acts @ W_dec[of_dead]).float()
    return leftover.square().sum() / (error - error.mean(dim=0)).square().sum().clamp_min(1e-12)


@torch.no_grad()
def remove_parallel_gradient(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Take out the part of W_dec's gradient along each row, which the norm constraint would undo anyway."""
    assert W_dec.grad is not None
    W_dec.grad -= (W_dec.grad * W_dec).sum(dim=-1, keepdim=True) * W_dec


@torch.no_grad()
def normalise_rows(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Bring each decoder row back to norm 1, in place."""
    W_dec /= W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8)
