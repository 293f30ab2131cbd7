"""Texts into SAE activations: one forward pass for a batch of texts, up to the deepest hook any of them needs.

Only what was asked leaves the device (top k, some latents, totals), in one transfer for each SAE. No queue, no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from app.protocol import SaeActs, SaeQuery
from workers.gpu.residuals import Residuals
from workers.language_model import LanguageModel
from workers.sae.coders import Coder

PRE_ACTS_BYTES = 256 * 2**20
"""Most memory the [tokens, d_sae] activations of one SAE may take at a time."""


@dataclass(frozen=True)
class Text:
    """One text of a batch and what to read of it."""

    ids: list[int]
    queries: list[tuple[Coder, SaeQuery]]


@torch.inference_mode()
def encode(language: LanguageModel, texts: list[Text], residuals: Residuals | None = None) -> list[list[SaeActs]]:
    """Return, for every text, the activations of its queries in their order.

    Texts are padded on the right: a causal model never looks at what comes after, so padding needs no mask and a text's
    values do not depend on its neighbours beyond rounding. Texts whose activations are kept are not run again.
    """
    resid = read(language, texts, residuals)
    answers: list[list[SaeActs | None]] = [[None] * len(text.queries) for text in texts]
    for coder, asked in _by_coder(texts):
        rows = _joined([resid[t][coder.hook_name] for t, _ in asked])
        targets = None
        if any(texts[t].queries[q][1].totals for t, q in asked):
            targets = _joined([resid[t][coder.hook_name_out] for t, _ in asked])
        queries = [texts[t].queries[q][1] for t, q in asked]
        lengths = [len(texts[t].ids) for t, _ in asked]
        for (t, q), acts in zip(asked, _read_sae(coder, rows, targets, lengths, queries), strict=True):
            answers[t][q] = acts
    return answers  # pyright: ignore[reportReturnType] - every place was filled


def read(
    language: LanguageModel, texts: list[Text], residuals: Residuals | None = None
) -> list[dict[str, Float[Tensor, "pos d"]]]:
    """Return each text's activations at the hooks it needs, in one forward pass for those that are not kept."""
    wanted = [_hooks(text) for text in texts]
    found = [
        residuals.get(language, text.ids, hooks) if residuals and hooks else {} if not hooks else None
        for text, hooks in zip(texts, wanted, strict=True)
    ]
    missing = [t for t, acts in enumerate(found) if acts is None]
    if missing:
        hooks = sorted({hook for t in missing for hook in wanted[t]})
        ids, _ = language.pad([texts[t].ids for t in missing])
        acts = language.read(ids, hooks)
        for row, t in enumerate(missing):
            found[t] = {hook: acts[hook][row, : len(texts[t].ids)] for hook in wanted[t]}
            for hook in wanted[t] if residuals else ():
                residuals.put(language, texts[t].ids, hook, found[t][hook])  # pyright: ignore
    return found  # pyright: ignore[reportReturnType] - every place was filled


def _hooks(text: Text) -> list[str]:
    read_at = {coder.hook_name for coder, _ in text.queries}
    return sorted(read_at | {coder.hook_name_out for coder, query in text.queries if query.totals})


def _by_coder(texts: list[Text]) -> list[tuple[Coder, list[tuple[int, int]]]]:
    """Which (text, query) pairs read which SAE."""
    asked: dict[int, tuple[Coder, list[tuple[int, int]]]] = {}
    for t, text in enumerate(texts):
        for q, (coder, _) in enumerate(text.queries):
            asked.setdefault(id(coder), (coder, []))[1].append((t, q))
    return list(asked.values())


def _joined(parts: list[Tensor]) -> Tensor:
    """The positions of some texts, one after another: [tokens, d]."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _read_sae(
    coder: Coder, rows: Tensor, targets: Tensor | None, lengths: list[int], queries: list[SaeQuery]
) -> list[SaeActs]:
    k = min(max(query.top_k for query in queries), coder.d_sae)
    latents = sorted({latent for query in queries for latent in query.latents})
    chunk = max(1, PRE_ACTS_BYTES // (4 * coder.d_sae))
    tops = [coder.encode_topk(part, k) for part in rows.split(chunk)] if k else []
    values, columns, totals, indices = _to_host(
        [
            [v.float() for v, _ in tops],
            _columns(coder, rows, chunk, latents),
            _totals(coder, rows, targets, chunk),
            [i.int().view(torch.float32) for _, i in tops],
        ],
        len(rows),
    )
    indices = indices.view(np.int32)
    place = {latent: n for n, latent in enumerate(latents)}
    answers: list[SaeActs] = []
    start = 0
    for length, query in zip(lengths, queries, strict=True):
        end = start + length
        top = min(query.top_k, k)
        top_indices, top_values = _positive(indices[start:end, :top], values[start:end, :top])
        total, l0, error = totals[start:end].T.tolist() if query.totals else ([], [], [])
        answers.append(
            SaeActs.model_construct(
                top_indices=top_indices,
                top_values=top_values,
                latents=[columns[start:end, place[latent]].tolist() for latent in query.latents],
                total=total,
                l0=l0,
                error=error,
            )
        )
        start = end
    return answers


def _totals(coder: Coder, rows: Tensor, targets: Tensor | None, chunk: int) -> list[Tensor]:
    """[tokens, 3] a chunk: the sum of all activations, how many are active, and |target - x_hat|^2 / |target|^2."""
    if targets is None:
        return []
    found: list[Tensor] = []
    for x, target in zip(rows.split(chunk), targets.split(chunk), strict=True):
        acts = coder.encode(x)
        missed = coder.error(x, target).float().square().sum(dim=-1)
        share = missed / coder.aim(target).float().square().sum(dim=-1).clamp_min(1e-12)
        found.append(torch.stack([acts.sum(dim=-1).float(), (acts > 0).sum(dim=-1).float(), share], dim=-1))
    return found


def _columns(coder: Coder, rows: Tensor, chunk: int, latents: list[int]) -> list[Tensor]:
    if not latents:
        return []
    wanted = torch.tensor(latents, device=rows.device)
    return [coder.encode_latents(part, wanted).float() for part in rows.split(chunk)]


def _to_host(blocks: list[list[Tensor]], n_rows: int) -> list[np.ndarray]:
    """Bring blocks of columns, each in pieces of rows, to the host in one transfer: [rows, columns] float32 a block."""
    whole = [torch.cat(pieces) for pieces in blocks if pieces]
    if not whole:
        return [np.zeros((n_rows, 0), dtype=np.float32) for _ in blocks]
    packed = torch.cat(whole, dim=1).cpu().numpy()
    widths = [pieces[0].shape[1] if pieces else 0 for pieces in blocks]
    return [np.ascontiguousarray(part) for part in np.split(packed, np.cumsum(widths)[:-1], axis=1)]


def _positive(indices: np.ndarray, values: np.ndarray) -> tuple[list[list[int]], list[list[float]]]:
    """Cut each row after its last positive value; values are sorted downwards."""
    counts = (values > 0).sum(axis=1).tolist()
    return (
        [row[:n] for row, n in zip(indices.tolist(), counts, strict=True)],
        [row[:n] for row, n in zip(values.tolist(), counts, strict=True)],
    )
