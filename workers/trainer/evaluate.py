"""Evaluate an SAE on held-out text: reconstruction metrics, and the model's loss with the reconstruction spliced in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from app.corpora import Report, Stream
from workers.activations import outlier_limit, read_contexts
from workers.language_model import LanguageModel
from workers.sae.coders import Coder
from workers.sae.stats import ReconstructionStats

CONTEXTS_PER_PASS = 4


def evaluate(
    model: LanguageModel,
    coder: Coder,
    stream: Stream,
    rows: npt.NDArray[np.int64],
    context_size: int,
    n_loss_contexts: int,
    max_norm_ratio: float,
    report: Report,
) -> dict[str, Any]:
    """Return the metrics of design.md and the tokens they were measured on.

    First positions and tokens of outlying norm (above max_norm_ratio times the median) are in no reconstruction
    metric and stay as they are when the reconstruction is spliced in; `outlier_share` says how many they were.
    """
    hook, bos = coder.hook_name, model.bos_for(coder.config)
    parts = read_contexts(model, stream, rows[:16], context_size, [hook], bos)
    sample = torch.cat([acts[hook][:, 1:].flatten(0, 1) for _, acts in parts])
    limit = outlier_limit(sample, max_norm_ratio)
    metrics = _reconstruction(model, coder, stream, rows, context_size, limit, lambda s, t: report(s * 0.5, t))
    loss_rows = rows[:n_loss_contexts]
    metrics |= _spliced(model, coder, stream, loss_rows, context_size, limit, lambda s, t: report(0.5 + s * 0.5, t))
    return metrics


def _reconstruction(
    model: LanguageModel,
    coder: Coder,
    stream: Stream,
    rows: npt.NDArray[np.int64],
    context_size: int,
    limit: float,
    report: Report,
) -> dict[str, Any]:
    stats, n_seen = ReconstructionStats(), 0
    bos = model.bos_for(coder.config)
    for _, acts in read_contexts(model, stream, rows, context_size, [coder.hook_name], bos):
        x = acts[coder.hook_name][:, 1:].flatten(0, 1).float()
        n_seen += len(x)
        stats.add(x[x.norm(dim=-1) <= limit], coder)
        report(n_seen / (len(rows) * (context_size - 1)), f"reconstructed {n_seen:,} held-out tokens")
    return stats.metrics() | {"n_tokens": stats.n, "outlier_share": 1 - stats.n / n_seen, "max_norm": limit}


def _spliced(
    model: LanguageModel,
    coder: Coder,
    stream: Stream,
    rows: npt.NDArray[np.int64],
    context_size: int,
    limit: float,
    report: Report,
) -> dict[str, Any]:
    """Cross-entropy (nats a token) clean, with the reconstruction and with zeros at the hook, and KL divergences."""
    sums = dict.fromkeys(("ce_loss_clean", "ce_loss_sae", "ce_loss_zero", "kl_sae", "kl_zero"), 0.0)
    n_tokens = 0
    for start in range(0, len(rows), CONTEXTS_PER_PASS):
        ids = torch.from_numpy(
            stream.contexts(rows[start : start + CONTEXTS_PER_PASS], context_size, model.bos_for(coder.config))
        ).to(model.device)
        clean = _log_probs(model, coder.hook_name, ids, None)
        sums["ce_loss_clean"] += _cross_entropy(clean, ids)
        for name, splice in {"sae": coder.reconstruct, "zero": torch.zeros_like}.items():
            # One run at a time: the log-probabilities of a batch over the vocabulary take 100 MB.
            log_probs = _log_probs(model, coder.hook_name, ids, _replacing(splice, limit))
            sums[f"ce_loss_{name}"] += _cross_entropy(log_probs, ids)
            sums[f"kl_{name}"] += float(kl_div(log_probs, clean, reduction="sum", log_target=True))
        n_tokens += ids.shape[0] * (ids.shape[1] - 1)
        report(start / len(rows), f"spliced into {n_tokens:,} held-out tokens")
    means = {name: value / n_tokens for name, value in sums.items()}
    return means | {
        "ce_loss_score": (means["ce_loss_zero"] - means["ce_loss_sae"])
        / (means["ce_loss_zero"] - means["ce_loss_clean"]),
        "kl_div_score": (means["kl_zero"] - means["kl_sae"]) / means["kl_zero"],
        "n_loss_tokens": n_tokens,
    }


def _replacing(fn: Callable[[Tensor], Tensor], limit: float) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        kept = rows.norm(dim=-1) > limit
        kept.view(x.shape[:2])[:, 0] = True
        return torch.where(kept[:, None], rows, fn(rows).to(rows.dtype)).view_as(x)

    return edit


@torch.inference_mode()
def _log_probs(model: LanguageModel, hook: str, ids: Tensor, edit: Callable[[Tensor], Tensor] | None) -> Tensor:
    with model.edited({hook: edit} if edit else {}):
        return model.hf(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(dim=-1)


def _cross_entropy(log_probs: Tensor, ids: Tensor) -> float:
    return -float(log_probs.gather(-1, ids[:, 1:, None]).sum())
