"""Evaluate an SAE on held-out text: reconstruction metrics, and the model's loss with the reconstruction spliced in.

What is summed up so far is kept in a file every few seconds: an evaluation that was killed goes on from there, and
ends with the same bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div

from app.corpora import Report, Stream
from workers.activations import Text, outlier_limit, read_contexts
from workers.language_model import Edit, LanguageModel
from workers.sae.coders import Coder
from workers.sae.stats import ReconstructionStats

CONTEXTS_PER_PASS = 4
ACTS_BYTES = 256 * 2**20
"""Most memory the [tokens, d_sae] activations of one batch may take."""
CHECKPOINT_SECONDS = 5.0
_LOSSES: tuple[str, ...] = ("ce_loss_clean", "ce_loss_sae", "ce_loss_zero", "kl_sae", "kl_zero")

Watch = Callable[[int, dict[str, float]], None]
"""Told the tokens so far and what the metrics are by then."""


def _nobody(n_tokens: int, metrics: dict[str, float]) -> None:
    """Watch nothing."""


def evaluate(
    model: LanguageModel,
    coder: Coder,
    stream: Stream,
    rows: npt.NDArray[np.int64],
    context_size: int,
    n_loss_contexts: int,
    max_norm_ratio: float,
    report: Report,
    watch: Watch = _nobody,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Return the metrics of design.md and the tokens they were measured on.

    What `checkpoint` holds of the same evaluation is not measured again.

    First positions and tokens of outlying norm (above max_norm_ratio times the median) are in no reconstruction
    metric and stay as they are when the reconstruction is spliced in; `outlier_share` says how many they were.
    """
    hook, bos = coder.hook_name, model.bos_for(coder.config)
    parts = read_contexts(model, stream, rows[:16], context_size, [hook], bos)
    sample = torch.cat([acts[hook][:, 1:].flatten(0, 1) for _, acts in parts])
    limit = outlier_limit(sample, max_norm_ratio)
    sums = _Sums.load(checkpoint, model.device) if checkpoint and checkpoint.exists() else _Sums()
    held_out = _HeldOut(model, coder, stream, context_size, bos, limit, watch, _Kept(sums, checkpoint))
    metrics = _reconstruction(held_out, rows, lambda share, said: report(share * 0.5, said))
    return metrics | _spliced(held_out, rows[:n_loss_contexts], lambda share, said: report(0.5 + share * 0.5, said))


@dataclass(frozen=True)
class LossBounds:
    """The losses between which every SAE of a hook lies on some contexts: nats summed over the predicted tokens."""

    clean: float
    zero: float


def loss_bounds(text: Text, coder: Coder, rows: npt.NDArray[np.int64], limit: float) -> LossBounds:
    """Return the losses as the model is and with zeros at the SAE's hook, on some contexts.

    They are those of its hooks and of the limit on norms: other SAEs there, and later states of this one, share them.
    """
    zeros, bos = _spliced_in(coder, limit, zero=True), text.model.bos_for(coder.config)
    clean = zero = 0.0
    for ids in _passes(text.model, text.stream, rows, text.context_size, bos):
        clean += _cross_entropy(_log_probs(text.model, ids, {}), ids)
        zero += _cross_entropy(_log_probs(text.model, ids, zeros), ids)
    return LossBounds(clean, zero)


def ce_loss_score(text: Text, coder: Coder, rows: npt.NDArray[np.int64], limit: float, bounds: LossBounds) -> float:
    """Return the score alone, on the contexts of `bounds`; tokens with a norm above the limit stay as they are."""
    edits, bos = _spliced_in(coder, limit, zero=False), text.model.bos_for(coder.config)
    passes = _passes(text.model, text.stream, rows, text.context_size, bos)
    loss = sum(_cross_entropy(_log_probs(text.model, ids, edits), ids) for ids in passes)
    return _score(bounds.zero, loss, bounds.clean)


def _passes(
    model: LanguageModel, stream: Stream, rows: npt.NDArray[np.int64], context_size: int, bos: int | None
) -> Iterator[Tensor]:
    """Token ids [context, position] of as many contexts as the model runs on at a time."""
    for start in range(0, len(rows), CONTEXTS_PER_PASS):
        part = rows[start : start + CONTEXTS_PER_PASS]
        yield torch.from_numpy(stream.contexts(part, context_size, bos)).to(model.device)


@dataclass
class _Sums:
    """All that the metrics follow from, and of how many contexts."""

    n_read: int = 0
    """Contexts in `stats`."""
    n_seen: int = 0
    """Tokens of these, outliers among them."""
    n_spliced: int = 0
    """Contexts in `losses`."""
    n_loss_tokens: int = 0
    losses: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_LOSSES, 0.0))
    stats: ReconstructionStats = field(default_factory=ReconstructionStats)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> _Sums:
        stored = load_file(path, str(device))
        n_read, n_seen, n_spliced, n_loss_tokens, n = (int(count) for count in stored["counts"])
        losses: dict[str, float] = dict(zip(_LOSSES, stored["losses"].tolist(), strict=True))
        l0, squared_error, squared_norm, cosine = stored["sums"].tolist()
        stats = ReconstructionStats(n, l0, squared_error, squared_norm, cosine, stored["total"], stored["fired"])
        return cls(n_read, n_seen, n_spliced, n_loss_tokens, losses, stats)

    def save(self, path: Path) -> None:
        """Write the sums, whole or not at all. There must be some."""
        stats = self.stats
        assert stats.total is not None
        assert stats.fired is not None
        counts = [self.n_read, self.n_seen, self.n_spliced, self.n_loss_tokens, stats.n]
        sums = [stats.l0, stats.squared_error, stats.squared_norm, stats.cosine]
        tensors = {
            "counts": torch.tensor(counts),
            "losses": torch.tensor([self.losses[name] for name in _LOSSES], dtype=torch.float64),
            "sums": torch.tensor(sums, dtype=torch.float64),
            "total": stats.total.cpu(),
            "fired": stats.fired.cpu(),
        }
        scratch = path.with_suffix(".new")
        save_file(tensors, scratch)
        os.replace(scratch, path)


@dataclass
class _Kept:
    """Sums with the file that they are kept in now and then."""

    sums: _Sums
    path: Path | None
    saved: float = field(default_factory=time.monotonic)

    def now_and_then(self) -> None:
        if self.path and self.sums.stats.n and time.monotonic() - self.saved >= CHECKPOINT_SECONDS:
            self.sums.save(self.path)
            self.saved = time.monotonic()


@dataclass(frozen=True)
class _HeldOut:
    """What is measured, on contexts of which text, which norms count as outliers, and what was found so far."""

    model: LanguageModel
    coder: Coder
    stream: Stream
    context_size: int
    bos: int | None
    limit: float
    watch: Watch
    kept: _Kept


def _reconstruction(held_out: _HeldOut, rows: npt.NDArray[np.int64], report: Report) -> dict[str, Any]:
    model, coder, limit, sums = held_out.model, held_out.coder, held_out.limit, held_out.kept.sums
    stats, hook, out = sums.stats, coder.hook_name, coder.hook_name_out
    left = rows[sums.n_read :]
    for part_rows, acts in read_contexts(
        model, held_out.stream, left, held_out.context_size, [hook, out], held_out.bos
    ):
        x, target = (acts[name][:, 1:].flatten(0, 1).float() for name in (hook, out))
        kept = x.norm(dim=-1) <= limit
        batch = max(1, ACTS_BYTES // (4 * coder.d_sae))
        for part, aim in zip(x[kept].split(batch), target[kept].split(batch), strict=True):
            stats.add(part, coder, aim)
        sums.n_read += len(part_rows)
        sums.n_seen += len(x)
        held_out.kept.now_and_then()
        found = stats.metrics()
        held_out.watch(stats.n, {name: found[name] for name in ("l0", "explained_variance")})
        numbers = f"l0 {found['l0']:.1f}, explained variance {found['explained_variance']:.3f}"
        report(sums.n_read / len(rows), f"{numbers} on {sums.n_seen:,} held-out tokens")
    return stats.metrics() | {"n_tokens": stats.n, "outlier_share": 1 - stats.n / sums.n_seen, "max_norm": limit}


def _spliced(held_out: _HeldOut, rows: npt.NDArray[np.int64], report: Report) -> dict[str, Any]:
    """Cross-entropy (nats a token) clean, with the reconstruction and with zeros at the hook, and KL divergences."""
    model, sums = held_out.model, held_out.kept.sums
    losses = sums.losses
    for ids in _passes(model, held_out.stream, rows[sums.n_spliced :], held_out.context_size, held_out.bos):
        clean = _log_probs(model, ids, {})
        losses["ce_loss_clean"] += _cross_entropy(clean, ids)
        for name in ("sae", "zero"):
            # One run at a time: the log-probabilities of a batch over the vocabulary take 100 MB.
            log_probs = _log_probs(model, ids, _spliced_in(held_out.coder, held_out.limit, zero=name == "zero"))
            losses[f"ce_loss_{name}"] += _cross_entropy(log_probs, ids)
            losses[f"kl_{name}"] += float(kl_div(log_probs, clean, reduction="sum", log_target=True))
        sums.n_spliced += len(ids)
        sums.n_loss_tokens += ids.shape[0] * (ids.shape[1] - 1)
        held_out.kept.now_and_then()
        score = _score(losses["ce_loss_zero"], losses["ce_loss_sae"], losses["ce_loss_clean"])
        held_out.watch(sums.n_loss_tokens, {"ce_loss_score": score})
        report(sums.n_spliced / len(rows), f"ce_loss_score {score:.3f} on {sums.n_loss_tokens:,} held-out tokens")
    means = {name: value / sums.n_loss_tokens for name, value in losses.items()}
    return means | {
        "ce_loss_score": _score(means["ce_loss_zero"], means["ce_loss_sae"], means["ce_loss_clean"]),
        "kl_div_score": (means["kl_zero"] - means["kl_sae"]) / means["kl_zero"],
        "n_loss_tokens": sums.n_loss_tokens,
    }


def _score(zero: float, sae: float, clean: float) -> float:
    """(CE_zero - CE_sae) / (CE_zero - CE_clean)."""
    return (zero - sae) / (zero - clean)


def _spliced_in(coder: Coder, limit: float, *, zero: bool) -> dict[str, Edit]:
    """Edits that put the reconstruction, or zeros, where it belongs; first positions and outliers stay."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen[:] = [x]
        return x

    def replace(y: Tensor) -> Tensor:
        x, rows = (seen[0] if seen else y).flatten(0, 1), y.flatten(0, 1)
        kept = x.norm(dim=-1) > limit
        kept.view(y.shape[:2])[:, 0] = True
        fresh = torch.zeros_like(rows) if zero else coder.reconstruct(x).to(rows.dtype)
        return torch.where(kept[:, None], rows, fresh).view_as(y)

    if coder.hook_name_out == coder.hook_name:
        return {coder.hook_name: replace}
    return {coder.hook_name: keep, coder.hook_name_out: replace}


@torch.inference_mode()
def _log_probs(model: LanguageModel, ids: Tensor, edits: dict[str, Edit]) -> Tensor:
    with model.edited(edits):
        return model.hf(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)


def _cross_entropy(log_probs: Tensor, ids: Tensor) -> float:
    return -float(log_probs.gather(-1, ids[:, 1:, None]).sum())
