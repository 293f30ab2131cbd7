"""Metrics of an SAE on activations, defined and named as in SAELens evals."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from workers.sae.coders import Coder


@dataclass
class ReconstructionStats:
    """Sums over batches of activations, from which the metrics follow exactly, whatever the batches were.

    explained_variance is 1 - sum|x - x_hat|^2 / sum|x - mean(x)|^2 with the mean over all rows: predicting the mean
    gives 0, the identity 1.
    """

    n: int = 0
    l0: float = 0.0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    cosine: float = 0.0
    total: Tensor | None = None
    fired: Tensor | None = field(default=None, repr=False)

    def add(
        self, x: Float[Tensor, "batch d_in"], coder: Coder, target: Float[Tensor, "batch d_out"] | None = None
    ) -> None:
        """Count one batch of activations; a transcoder's reconstruction is held against its target."""
        acts = coder.encode(x)
        self.add_reconstruction(coder.aim(x if target is None else target), coder.predict(x))
        self.l0 += float((acts > 0).sum())
        fired = (acts > 0).any(dim=0)
        self.fired = fired if self.fired is None else self.fired | fired

    def add_reconstruction(self, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> None:
        x, x_hat = x.double(), x_hat.double()
        self.n += len(x)
        self.squared_error += float((x - x_hat).square().sum())
        self.squared_norm += float(x.square().sum())
        self.cosine += float(torch.cosine_similarity(x, x_hat, dim=-1).sum())
        total = x.sum(dim=0)
        self.total = total if self.total is None else self.total + total

    def metrics(self) -> dict[str, float]:
        """Return l0, explained_variance, mse, cosine_similarity and, where latents were counted, the dead share."""
        assert self.total is not None
        variance = self.squared_norm - float(self.total.square().sum()) / self.n
        found = {
            "explained_variance": 1 - self.squared_error / variance,
            "mse": self.squared_error / self.n,
            "cosine_similarity": self.cosine / self.n,
        }
        if self.fired is not None:
            found |= {"l0": self.l0 / self.n, "dead": 1 - float(self.fired.float().mean())}
        return found
