"""Ways to push activations along SAE directions. Pure tensor maths; which rows and positions is the caller's.

With h what is at the hook that an SAE writes to, v its unit-norm decoder row, P = v v^T, a its activation there, w what
one unit of activation adds to the reconstruction, and c the coefficient (strength x multiplier):

    add          h + c v                  c in units of activation along the unit row
    clamp        h + (c - a) w            the activation becomes c; the SAE's error stays
    scale        h + (c - 1) a w          the activation becomes c a
    ablate       h - a w                  the activation becomes 0
    orthogonal   (I - P) h + c P h        c = 0 removes the direction, 1 leaves h as it is
    cap          h with its projection on v clipped to at most c

For a vector that belongs to no SAE, a is the projection v^T h and w is v. The activations a are those of h as it comes
to the hook (for a transcoder: of its input), so the first four act at once and add up; the last two follow, one after
the other. SIMPLE_ADDITIVE, ORTHOGONAL_DECOMP and PROJECTION_CAP are Neuronpedia's names of add, orthogonal and cap.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from workers.sae.coders import Coder


def unit_rows(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    """Scale each row to norm 1; a zero row stays zero, so that steering a dead latent changes nothing."""
    rows = rows.float()
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def activation_shift(
    x: Float[Tensor, "n d_in"], coder: Coder, latent: int, *, scale: float, value: float
) -> Float[Tensor, "n d_out"]:
    """What makes a latent's activation a into scale x a + value, added to what the SAE writes to."""
    a = coder.encode_latents(x, torch.tensor([latent], device=x.device))  # [n, 1]
    return ((scale - 1) * a + value) * coder.unit_of(x, latent)


def projection_shift(
    h: Float[Tensor, "n d_in"], v: Float[Tensor, " d_in"], *, scale: float, value: float
) -> Float[Tensor, "n d_in"]:
    """The same for the projection on a unit vector."""
    return ((scale - 1) * (h @ v) + value).unsqueeze(-1) * v


def orthogonal(h: Float[Tensor, "n d_in"], v: Float[Tensor, " d_in"], c: float) -> Float[Tensor, "n d_in"]:
    """(I - P) h + c P h."""
    return h + ((c - 1) * (h @ v)).unsqueeze(-1) * v


def cap(h: Float[Tensor, "n d_in"], v: Float[Tensor, " d_in"], c: float) -> Float[Tensor, "n d_in"]:
    """Clip the projection on v to at most c."""
    return h - (h @ v - c).clamp_min(0).unsqueeze(-1) * v
