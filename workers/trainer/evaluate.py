"""Evaluate an SAE on held-out text: reconstruction metrics, and the model's loss with the reconstruction spliced in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
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

Watch = Callable[[int, dict[str, float]], None]
"""Told the tokens so far and what the metrics are by then."""


def evaluate(
    model: LanguageModel,
    coder: Coder,
    stream: Stream,
    rows: npt.NDArray[np.int64],
    context_size: int,
    n_loss_contexts: int,
    max_norm_ratio: float,
    report: Report,
    watch: Watch = lambda n_tokens, metrics: None,
) -> dict[str, Any]:
    """Return the metrics of design.md and the tokens they were measured on.

    First positions and tokens of outlying norm (above max_norm_ratio times the median) are in no reconstruction
    metric and stay as they are when the reconstruction is spliced in; `outlier_share` says how many they were.
    """
    hook, bos = coder.hook_name, model.bos_for(coder.config)
    parts = read_contexts(model, stream, rows[:16], context_size, [hook], bos)
    sample = torch.cat([acts[hook][:, 1:].flatten(0, 1) for _, acts in parts])
    limit = outlier_limit(sample, max_norm_ratio)
    held_out = _HeldOut(model, coder, stream, context_size, bos, limit, watch)
    metrics = _reconstruction(held_out, rows, lambda share, said: report(share * 0.5, said))
    return metrics | _spliced(held_out, rows[:n_loss_contexts], lambda share, said: report(0.5 + share * 0.5, said))


def ce_loss_score(text: Text, coder: Coder, rows: npt.NDArray[np.int64], limit: float) -> float:
    """Return the score alone, on some contexts; tokens with a norm above the limit stay as they are."""
    bos = text.model.bos_for(coder.config)
    held_out = _HeldOut(text.model, coder, text.stream, text.context_size, bos, limit, lambda n_tokens, metrics: None)
    return _spliced(held_out, rows, lambda share, said: None)["ce_loss_score"]


@dataclass(frozen=True)
class _HeldOut:
    """What is measured, on contexts of which text, and which norms count as outliers."""

    model: LanguageModel
    coder: Coder
    stream: Stream
    context_size: int
    bos: int | None
    limit: float
    watch: Watch


def _reconstruction(held_out: _HeldOut, rows: npt.NDArray[np.int64], report: Report) -> dict[str, Any]:
    model, coder, limit = held_out.model, held_out.coder, held_out.limit
    stats, n_seen = ReconstructionStats(), 0
    hook, out = coder.hook_name, coder.hook_name_out
    for _, acts in read_contexts(model, held_out.stream, rows, held_out.context_size, [hook, out], held_out.bos):
        x, target = (acts[name][:, 1:].flatten(0, 1).float() for name in (hook, out))
        n_seen += len(x)
        kept = x.norm(dim=-1) <= limit
        batch = max(1, ACTS_BYTES // (4 * coder.d_sae))
        for part, aim in zip(x[kept].split(batch), target[kept].split(batch), strict=True):
            stats.add(part, coder, aim)
        found = stats.metrics()
        held_out.watch(stats.n, {name: found[name] for name in ("l0", "explained_variance")})
        numbers = f"l0 {found['l0']:.1f}, explained variance {found['explained_variance']:.3f}"
        report(n_seen / (len(rows) * (held_out.context_size - 1)), f"{numbers} on {n_seen:,} held-out tokens")
    return stats.metrics() | {"n_tokens": stats.n, "outlier_share": 1 - stats.n / n_seen, "max_norm": limit}


def _spliced(held_out: _HeldOut, rows: npt.NDArray[np.int64], report: Report) -> dict[str, Any]:
    """Cross-entropy (nats a token) clean, with the reconstruction and with zeros at the hook, and KL divergences."""
    sums = dict.fromkeys(("ce_loss_clean", "ce_loss_sae", "ce_loss_zero", "kl_sae", "kl_zero"), 0.0)
    model, n_tokens = held_out.model, 0
    for start in range(0, len(rows), CONTEXTS_PER_PASS):
        part = rows[start : start + CONTEXTS_PER_PASS]
        ids = torch.from_numpy(held_out.stream.contexts(part, held_out.context_size, held_out.bos)).to(model.device)
        clean = _log_probs(model, ids, {})
        sums["ce_loss_clean"] += _cross_entropy(clean, ids)
        for name in ("sae", "zero"):
            # One run at a time: the log-probabilities of a batch over the vocabulary take 100 MB.
            log_probs = _log_probs(model, ids, _spliced_in(held_out.coder, held_out.limit, zero=name == "zero"))
            sums[f"ce_loss_{name}"] += _cross_entropy(log_probs, ids)
            sums[f"kl_{name}"] += float(kl_div(log_probs, clean, reduction="sum", log_target=True))
        n_tokens += ids.shape[0] * (ids.shape[1] - 1)
        score = _score(sums["ce_loss_zero"], sums["ce_loss_sae"], sums["ce_loss_clean"])
        held_out.watch(n_tokens, {"ce_loss_score": score})
        report(start / len(rows), f"ce_loss_score {score:.3f} on {n_tokens:,} held-out tokens")
    means = {name: value / n_tokens for name, value in sums.items()}
    return means | {
        "ce_loss_score": _score(means["ce_loss_zero"], means["ce_loss_sae"], means["ce_loss_clean"]),
        "kl_div_score": (means["kl_zero"] - means["kl_sae"]) / means["kl_zero"],
        "n_loss_tokens": n_tokens,
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
