"""Distributions over a whole SAE: l0 of tokens, explained variance by position, densities, decoder norms. numpy only
but for the one look at reconstructions.

Counts and sums are kept for each shard and merged in the order of the shards, so that they do not depend on who read
which.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from workers.sae.coders import Coder

DENSE = 0.1
"""Features active on more than this fraction of tokens are dense, as in app.catalog."""
N_BINS = 40


def path(shard: Path) -> Path:
    """Where the figures of a shard of activations lie."""
    return shard.with_suffix(".npz")


@dataclass
class Figures:
    """Sums over some contexts. Reconstructions are looked at in one forward pass of each shard only: they cost a
    matmul as large as the encoder's."""

    l0: npt.NDArray[np.int64]
    """[n] tokens with that many active latents."""
    n: npt.NDArray[np.int64]
    """[position] tokens whose reconstruction was looked at."""
    error: npt.NDArray[np.float64]
    """[position] sum of |x - x_hat|^2"""
    square: npt.NDArray[np.float64]
    """[position] sum of |x|^2"""
    total: npt.NDArray[np.float64]
    """[position, d] sum of x"""

    @classmethod
    def empty(cls, context_size: int, d: int) -> Figures:
        zeros = np.zeros(context_size)
        return cls(
            np.zeros(1, np.int64), zeros.astype(np.int64), zeros.copy(), zeros.copy(), np.zeros((context_size, d))
        )

    def count(self, tokens: npt.NDArray[Any], context_size: int, n_contexts: int) -> None:
        """Count the active latents of each token from the tokens of all records."""
        _, active = np.unique(tokens, return_counts=True)
        silent = n_contexts * (context_size - 1) - len(active)
        self.l0 = np.bincount(active, minlength=1).astype(np.int64)
        self.l0[0] += silent

    @torch.inference_mode()
    def add(self, coder: Coder, x: torch.Tensor, target: torch.Tensor) -> None:
        """Look at the reconstructions of some contexts, [batch, pos, d] without first positions."""
        x_hat = coder.reconstruct(x.flatten(0, 1)).view(target.shape).double()
        wanted = target.double()
        self.n[1:] += len(x)
        self.error[1:] += (wanted - x_hat).square().sum(dim=(0, 2)).cpu().numpy()
        self.square[1:] += wanted.square().sum(dim=(0, 2)).cpu().numpy()
        self.total[1:] += wanted.sum(dim=0).cpu().numpy()

    def write(self, file: Path) -> None:
        scratch = file.with_suffix(f".new-{os.getpid()}")
        with scratch.open("wb") as out:
            np.savez(out, **vars(self))
        os.replace(scratch, file)

    @classmethod
    def merged(cls, files: Sequence[Path]) -> Figures:
        """Read the figures of all shards and add them up, in order."""
        whole: Figures | None = None
        for file in files:
            with np.load(file) as stored:
                part = cls(**{name: stored[name] for name in cls.__dataclass_fields__})
            if whole is None:
                whole = part
                continue
            longest = max(len(whole.l0), len(part.l0))
            whole.l0 = np.pad(whole.l0, (0, longest - len(whole.l0))) + np.pad(part.l0, (0, longest - len(part.l0)))
            for name in ("n", "error", "square", "total"):
                setattr(whole, name, getattr(whole, name) + getattr(part, name))
        assert whole is not None
        return whole

    def summary(self) -> dict[str, Any]:
        """Return l0_histogram over tokens, and explained_variance_by_position.

        Variance is about the mean of the position: predicting each position's mean gives 0. A position with fewer than
        two tokens or no variance is null, as the first is.
        """
        variance = self.square - np.square(self.total).sum(axis=1) / np.maximum(self.n, 1)
        known = (self.n > 1) & (variance > 0)
        explained = [float(1 - e / v) if ok else None for e, v, ok in zip(self.error, variance, known, strict=True)]
        counts, edges = _l0_bins(self.l0)
        return {
            "l0_histogram": {"counts": counts, "edges": edges},
            "explained_variance_by_position": explained,
            "n_reconstructed": int(self.n.sum()),
        }


def _l0_bins(l0: npt.NDArray[np.int64]) -> tuple[list[int], list[float]]:
    """Counts of tokens by l0 in at most N_BINS bins of whole numbers; edges lie between them."""
    width = -(-len(l0) // N_BINS)
    counts = np.pad(l0, (0, -len(l0) % width)).reshape(-1, width).sum(axis=1)
    return counts.tolist(), (np.arange(len(counts) + 1) * width - 0.5).tolist()


def of_densities(densities: npt.NDArray[np.float64]) -> dict[str, Any]:
    """Return the histogram of log10 densities of live features, and the counts at both ends."""
    live = densities[densities > 0]
    counts, edges = np.histogram(np.log10(live), bins=N_BINS) if len(live) else (np.zeros(0), np.zeros(0))
    return {
        "density_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "n_dead": int((densities == 0).sum()),
        "n_dense": int((densities > DENSE).sum()),
        "l0": float(densities.sum()),
    }


def of_norms(norms: npt.NDArray[np.floating]) -> dict[str, Any]:
    """Return the histogram of the decoder rows' norms. Rows of equal norm fill one bin."""
    counts, edges = np.histogram(norms.astype(np.float64), bins=N_BINS)
    return {"counts": counts.tolist(), "edges": edges.tolist(), "mean": float(norms.mean())}
