"""Texts into SAE activations: one forward pass for a batch of texts, up to the deepest hook any of them needs.

Only what was asked leaves the device (top k, some latents, totals), in one transfer for each SAE. No queue, no HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from app.protocol import SaeActs, SaeQuery
from workers.gpu.residuals import Residuals
from workers.language_model import LanguageModel
from workers.sae.coders import Coder, TopKCoder

PRE_ACTS_BYTES = 256 * 2**20
"""Most memory the [tokens, d_sae] activations of one SAE may take at a time."""
MAX_KEPT_WIDTH = 1024
"""Numbers a position that are kept of one SAE, at most: all active features of a wide one would push the rest out."""


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
        queries = [texts[t].queries[q][1] for t, q in asked]
        rows = [
            _Rows(texts[t].ids, resid[t][coder.hook_name], resid[t][coder.hook_name_out] if query.totals else None)
            for (t, _), query in zip(asked, queries, strict=True)
        ]
        memory = _Memory(language, queries[0].sae.path, residuals)
        for (t, q), acts in zip(asked, _read_sae(coder, rows, queries, memory), strict=True):
            answers[t][q] = acts
    return answers  # pyright: ignore[reportReturnType] - every place was filled


@dataclass(frozen=True)
class _Rows:
    """A text's activations at an SAE's hooks."""

    ids: list[int]
    x: Float[Tensor, "pos d_in"]
    target: Float[Tensor, "pos d_out"] | None
    """There where its totals are asked."""


@dataclass(frozen=True)
class _Memory:
    """What is kept of one SAE on texts read lately."""

    language: LanguageModel
    sae_path: str
    residuals: Residuals | None

    def recall(
        self, name: str, rows: list[_Rows], width: int, compute: Callable[[list[_Rows]], Tensor]
    ) -> Float[Tensor, "tokens width"]:
        """Return what `compute` gives for all texts, one after another, computed together where it is not kept."""
        if self.residuals is None or width > MAX_KEPT_WIDTH:
            return compute(rows)
        key = f"{name} {width} of {self.sae_path}"
        found = [self.residuals.find(self.language, own.ids, key) for own in rows]
        missing = [n for n, acts in enumerate(found) if acts is None]
        if missing:
            fresh = compute([rows[n] for n in missing]).split([len(rows[n].ids) for n in missing])
            for n, acts in zip(missing, fresh, strict=True):
                found[n] = acts
                self.residuals.put(self.language, rows[n].ids, key, acts)
        return _joined([acts for acts in found if acts is not None])


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


def _read_sae(coder: Coder, rows: list[_Rows], queries: list[SaeQuery], memory: _Memory) -> list[SaeActs]:
    latents = sorted({latent for query in queries for latent in query.latents})
    chunk = max(1, PRE_ACTS_BYTES // (4 * coder.d_sae))
    k = min(max(query.top_k for query in queries), coder.d_sae)
    # Whether a TopK SAE has a latent depends on all the others: its choice is read, and kept for the next question.
    by_choice = isinstance(coder, TopKCoder) and bool(latents)
    width = min(coder.switches.k, coder.d_sae) if isinstance(coder, TopKCoder) and (k or by_choice) else k
    x = _joined([own.x for own in rows])
    top = memory.recall("top", rows, 2 * width, lambda own: _top(coder, own, chunk, width)) if width else x[:, :0]
    counted = [own for own in rows if own.target is not None]
    values, indices, columns, totals = _to_host(
        [
            top[:, :width].float(),
            top[:, width:].float(),
            _chosen(top, latents) if by_choice else _columns(coder, x, chunk, latents),
        ],
        memory.recall("totals", counted, 3, lambda own: _totals(coder, own, chunk)) if counted else x[:0, :3].float(),
    )
    indices = indices.view(np.int32)
    place = {latent: n for n, latent in enumerate(latents)}
    answers: list[SaeActs] = []
    start = counted_to = 0
    for own, query in zip(rows, queries, strict=True):
        end = start + len(own.ids)
        top = min(query.top_k, k)
        top_indices, top_values = _positive(indices[start:end, :top], values[start:end, :top])
        total, l0, error = [], [], []
        if query.totals:
            total, l0, error = totals[counted_to : counted_to + len(own.ids)].T.tolist()
            counted_to += len(own.ids)
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


def _top(coder: Coder, rows: list[_Rows], chunk: int, k: int) -> Float[Tensor, "tokens 2k"]:
    """The k largest activations of each position, and behind them the bits of their latents' numbers."""
    found = [coder.encode_topk(part, k) for part in _joined([own.x for own in rows]).split(chunk)]
    return torch.cat([torch.cat([v.float(), i.int().view(torch.float32)], dim=1) for v, i in found])


def _chosen(top: Float[Tensor, "tokens 2k"], latents: list[int]) -> Float[Tensor, "tokens latent"]:
    """The activations of some latents (sorted) among those that were chosen; 0 where they were not."""
    values, bits = top.chunk(2, dim=1)
    indices = bits.contiguous().view(torch.int32).long()
    wanted = torch.tensor(latents, device=top.device)
    places = torch.searchsorted(wanted, indices).clamp_max(len(latents) - 1)
    hits = torch.where(wanted[places] == indices, values, 0.0)
    return top.new_zeros(len(top), len(latents)).scatter_add_(1, places, hits)


def _totals(coder: Coder, rows: list[_Rows], chunk: int) -> Float[Tensor, "tokens 3"]:
    """The sum of all activations, how many are active, and |target - x_hat|^2 / |target|^2."""
    xs, targets = _joined([own.x for own in rows]), _joined([own.target for own in rows if own.target is not None])
    found: list[Tensor] = []
    for x, target in zip(xs.split(chunk), targets.split(chunk), strict=True):
        acts = coder.encode(x)
        missed = coder.error(x, target).float().square().sum(dim=-1)
        share = missed / coder.aim(target).float().square().sum(dim=-1).clamp_min(1e-12)
        found.append(torch.stack([acts.sum(dim=-1).float(), (acts > 0).sum(dim=-1).float(), share], dim=-1))
    return torch.cat(found)


def _columns(coder: Coder, x: Tensor, chunk: int, latents: list[int]) -> Float[Tensor, "tokens latent"]:
    if not latents:
        return x[:, :0].float()
    wanted = torch.tensor(latents, device=x.device)
    return torch.cat([coder.encode_latents(part, wanted).float() for part in x.split(chunk)])


def _to_host(blocks: list[Tensor], totals: Tensor) -> list[np.ndarray]:
    """Bring blocks of columns, and totals of fewer rows behind them, to the host in one transfer."""
    shapes = [block.shape for block in (*blocks, totals)]
    flat = torch.cat([block.reshape(-1) for block in (*blocks, totals)]).cpu().numpy()
    ends = np.cumsum([rows * columns for rows, columns in shapes])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes, strict=True)]


def _positive(indices: np.ndarray, values: np.ndarray) -> tuple[list[list[int]], list[list[float]]]:
    """Cut each row after its last positive value; values are sorted downwards."""
    counts = (values > 0).sum(axis=1).tolist()
    return (
        [row[:n] for row, n in zip(indices.tolist(), counts, strict=True)],
        [row[:n] for row, n in zip(values.tolist(), counts, strict=True)],
    )
