"""Ways to push a residual stream along SAE decoder rows. Pure tensor maths; which rows and positions is the caller's.

With v a unit-norm decoder row, P = v v^T and c the coefficient (strength x multiplier, in units of activation):

    SIMPLE_ADDITIVE     h + c v
    ORTHOGONAL_DECOMP   (I - P) h + c P h      c = 0 removes the direction, 1 leaves h as it is
    PROJECTION_CAP      h with its projection on v clipped to at most c

The names are Neuronpedia's. Several directions at one hook add up (additive) or act one after the other (the others).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""[... d_in] -> [... d_in], in the dtype given."""


def unit_rows(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    """Scale each row to norm 1; a zero row stays zero, so that steering a dead latent changes nothing."""
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def additive(directions: Float[Tensor, "n d_in"], coefficients: Float[Tensor, " n"]) -> Edit:
    """h + sum of c v. The sum is made once, so a token costs one addition however many features are steered."""
    delta = coefficients @ directions

    def edit(h: Tensor) -> Tensor:
        return h + delta.to(h.dtype)

    return edit


def orthogonal(directions: Float[Tensor, "n d_in"], coefficients: Float[Tensor, " n"]) -> Edit:
    """(I - P) h + c P h for each direction in turn."""

    def edit(h: Tensor) -> Tensor:
        moved = h.float()
        for v, c in zip(directions, coefficients, strict=True):
            moved = moved + ((c - 1) * (moved @ v)).unsqueeze(-1) * v
        return moved.to(h.dtype)

    return edit


def cap(directions: Float[Tensor, "n d_in"], coefficients: Float[Tensor, " n"]) -> Edit:
    """Clip the projection on each direction to at most its coefficient, in turn."""

    def edit(h: Tensor) -> Tensor:
        moved = h.float()
        for v, c in zip(directions, coefficients, strict=True):
            excess = (moved @ v - c).clamp_min(0)
            moved = moved - excess.unsqueeze(-1) * v
        return moved.to(h.dtype)

    return edit


METHODS: dict[str, Callable[[Tensor, Tensor], Edit]] = {
    "SIMPLE_ADDITIVE": additive,
    "ORTHOGONAL_DECOMP": orthogonal,
    "PROJECTION_CAP": cap,
}
