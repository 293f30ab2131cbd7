"""Direct logit effects of latents: decoder rows through the final norm's weight and the unembedding, in chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

N_BINS = 50
EFFECT_BYTES = 64 * 2**20
"""Most memory that effects on the whole vocabulary take at once; about four times that with what is made of them."""


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
    mean: Float[Tensor, " latent"]
    deviation: Float[Tensor, " latent"]
    """Over N."""
    skew: Float[Tensor, " latent"]
    """Third standardised moment, as the skewness in SAELens' table of feature statistics."""
    kurtosis: Float[Tensor, " latent"]
    """Fourth standardised moment: 3 for a normal distribution."""


def logit_effects(
    rows: Float[Tensor, "latent d_model"], unembedding: Float[Tensor, "d_vocab d_model"], n: int = 10
) -> LogitEffects:
    """Return the n tokens each row promotes and suppresses most, and how the vocabulary is spread.

    The final norm is folded into rows or unembedding beforehand. Rows are taken some at a time, so that no more than
    EFFECT_BYTES of [row, d_vocab] are in memory, whatever the vocabulary.
    """
    per_chunk = max(1, EFFECT_BYTES // (unembedding.shape[0] * 4))
    found = _room(len(rows), n, rows.device)
    for start in range(0, len(rows), per_chunk):
        chunk = rows[start : start + per_chunk]
        for whole, part in zip(found, _effects_of_chunk(chunk, unembedding, n), strict=True):
            whole[start : start + len(chunk)] = part
    return found


def _room(n_rows: int, n: int, device: torch.device) -> LogitEffects:
    """Results to be filled in. Made before the chunks: kept one by one between them, they would lie in the gaps that
    freed chunks leave, no chunk would fit its gap again, and memory would grow by a chunk each time."""

    def floats(*shape: int) -> Tensor:
        return torch.empty(n_rows, *shape, device=device)

    def ints(*shape: int) -> Tensor:
        return torch.empty(n_rows, *shape, dtype=torch.long, device=device)

    ends, one = (floats(n), ints(n), floats(n), ints(n)), [floats() for _ in range(6)]
    return LogitEffects(*ends, one[0], one[1], ints(N_BINS), *one[2:])


def _effects_of_chunk(rows: Tensor, unembedding: Tensor, n: int) -> LogitEffects:
    effects = (rows.to(unembedding.dtype) @ unembedding.T).float()
    top, bottom = effects.topk(n, dim=-1), effects.topk(n, dim=-1, largest=False)
    low, high = effects.aminmax(dim=-1)
    histogram = _histogram(effects, low, high)
    mean = effects.mean(dim=-1)
    effects -= mean[:, None]
    squares = effects.square()
    deviation = squares.mean(dim=-1).sqrt()
    # A dot product by row reads each tensor once; effects ** 3 and ** 4 would be two more of the whole chunk.
    third, fourth = (torch.einsum("lv,lv->l", squares, by) / effects.shape[1] for by in (effects, squares))
    scale = deviation.clamp_min(1e-12)
    return LogitEffects(
        top.values,
        top.indices,
        bottom.values,
        bottom.indices,
        low,
        high,
        histogram,
        mean,
        deviation,
        third / scale**3,
        fourth / scale**4,
    )


def _histogram(effects: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Counts in N_BINS equal bins over [low, high] of each row. One scatter: a bincount a row is 50 times slower."""
    scale = N_BINS / (high - low).clamp_min(1e-12)
    bins = (effects - low[:, None]).mul_(scale[:, None]).clamp_(0, N_BINS - 1).long()
    counts = torch.zeros(len(effects), N_BINS, dtype=torch.int32, device=effects.device)
    one = torch.ones((), dtype=torch.int32, device=effects.device)
    return counts.scatter_add_(1, bins, one.expand_as(bins)).long()


def fold_final_norm(
    rows: Float[Tensor, "row d_model"], norm_weight: Float[Tensor, " d_model"], centred: bool
) -> Float[Tensor, "row d_model"]:
    """Fold the final norm into directions that are then multiplied with the unembedding.

    The norm's weight scales them; a LayerNorm also subtracts their mean first (`centred`), an RMSNorm does not. The
    same as folding it into the unembedding, without a copy of that.
    """
    return (rows - rows.mean(dim=-1, keepdim=True) if centred else rows) * norm_weight


class Nearest(NamedTuple):
    indices: Int[Tensor, "latent n"]
    cosines: Float[Tensor, "latent n"]


def nearest_rows(unit: Float[Tensor, "d_sae d_in"], start: int, end: int, n: int = 10) -> Nearest:
    """Return the n other rows with the largest cosine to rows start..end; all have norm 1."""
    cosines = unit[start:end] @ unit.T
    own = torch.arange(end - start, device=unit.device)
    cosines[own, own + start] = -2.0
    found = cosines.topk(min(n, len(unit) - 1), dim=-1)
    return Nearest(found.indices, found.values)


def nearest_between(
    rows: Float[Tensor, "d_sae d_in"], others: Float[Tensor, "d_other d_in"], n: int, block: int = 1024
) -> Nearest:
    """Return the n rows of another SAE with the largest cosine to each row: exact, a block of rows at a time."""
    unit = torch.nn.functional.normalize(others.float(), dim=-1)
    n = min(n, len(others))
    indices = torch.empty(len(rows), n, dtype=torch.long)
    cosines = torch.empty(len(rows), n)
    for start in range(0, len(rows), block):
        part = torch.nn.functional.normalize(rows[start : start + block].float(), dim=-1)
        found = (part @ unit.T).topk(n, dim=-1)
        indices[start : start + block], cosines[start : start + block] = found.indices.cpu(), found.values.cpu()
    return Nearest(indices, cosines)
