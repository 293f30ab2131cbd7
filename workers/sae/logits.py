"""Direct logit effects of latents: decoder rows through the final norm's weight and the unembedding, in chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_BINS = 50


class LogitEffects(NamedTuple):
    """Of a chunk of latents; effects are of one unit of activation, as SAEDashboard reports them."""

    top: Float[Tensor, "latent n"]
    top_ids: Int[Tensor, "latent n"]
    bottom: Float[Tensor, "latent n"]
    """Most negative first."""
    bottom_ids: Int[Tensor, "latent n"]
    low: Float[Tensor, " latent"]
    high: Float[Tensor, " latent"]
    histogram: Int[Tensor, "latent bins"]
    """Counts of vocabulary tokens in equal bins over [low, high]."""


def logit_effects(
    rows: Float[Tensor, "latent d_model"], folded_unembedding: Float[Tensor, "d_vocab d_model"], n: int = 10
) -> LogitEffects:
    """Return the n tokens each row promotes and suppresses most, and the histogram over the vocabulary.

    Holds [latent, d_vocab] once: the caller chooses how many rows come together.
    """
    effects = rows @ folded_unembedding.T
    top, bottom = effects.topk(n, dim=-1), effects.topk(n, dim=-1, largest=False)
    low, high = effects.amin(dim=-1), effects.amax(dim=-1)
    width = (high - low).clamp_min(1e-12)
    bins = ((effects - low[:, None]) * (N_BINS / width)[:, None]).long().clamp_(0, N_BINS - 1)
    histogram = torch.zeros(len(rows), N_BINS, dtype=torch.long, device=rows.device)
    histogram.scatter_add_(1, bins, torch.ones_like(bins))
    return LogitEffects(top.values, top.indices, bottom.values, bottom.indices, low, high, histogram)


def fold_final_norm(
    unembedding: Float[Tensor, "d_vocab d_model"], norm_weight: Float[Tensor, " d_model"], centred: bool
) -> Float[Tensor, "d_vocab d_model"]:
    """Fold the final norm's weight into the unembedding.

    A LayerNorm also subtracts the mean of the residual stream, which `centred` folds in as well; an RMSNorm does not.
    """
    folded = unembedding * norm_weight
    return folded - folded.mean(dim=-1, keepdim=True) if centred else folded


class Nearest(NamedTuple):
    indices: Int[Tensor, "latent n"]
    cosines: Float[Tensor, "latent n"]


def nearest_rows(W_dec: Float[Tensor, "d_sae d_in"], start: int, end: int, n: int = 10) -> Nearest:
    """Return the n other decoder rows with the largest cosine to rows start..end."""
    unit = torch.nn.functional.normalize(W_dec, dim=-1)
    cosines = unit[start:end] @ unit.T
    own = torch.arange(end - start, device=W_dec.device)
    cosines[own, own + start] = -2.0
    found = cosines.topk(min(n, len(W_dec) - 1), dim=-1)
    return Nearest(found.indices, found.values)
