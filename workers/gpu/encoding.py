"""Texts into SAE activations: one forward pass for a batch of texts, up to the deepest hook any of them needs.

Only the asked latents and the top k leave the device, in one transfer for each SAE. No queue, no HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.protocol import SaeActs, SaeQuery
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
def encode(language: LanguageModel, texts: list[Text]) -> list[list[SaeActs]]:
    """Return, for every text, the activations of its queries in their order.

    Texts are padded on the right: a causal model never looks at what comes after, so padding needs no mask and a text's
    values do not depend on its neighbours beyond rounding.
    """
    hooks = sorted({coder.hook_name for text in texts for coder, _ in text.queries})
    if not hooks:
        return [[] for _ in texts]
    ids, _ = language.pad([text.ids for text in texts])
    resid = language.read(ids, hooks)
    answers: list[list[SaeActs | None]] = [[None] * len(text.queries) for text in texts]
    for coder, asked in _by_coder(texts):
        rows = _rows(resid[coder.hook_name], [len(texts[t].ids) for t, _ in asked], [t for t, _ in asked])
        queries = [texts[t].queries[q][1] for t, q in asked]
        lengths = [len(texts[t].ids) for t, _ in asked]
        for (t, q), acts in zip(asked, _read_sae(coder, rows, lengths, queries), strict=True):
            answers[t][q] = acts
    return answers  # pyright: ignore[reportReturnType] - every place was filled


def _by_coder(texts: list[Text]) -> list[tuple[Coder, list[tuple[int, int]]]]:
    """Which (text, query) pairs read which SAE."""
    asked: dict[int, tuple[Coder, list[tuple[int, int]]]] = {}
    for t, text in enumerate(texts):
        for q, (coder, _) in enumerate(text.queries):
            asked.setdefault(id(coder), (coder, []))[1].append((t, q))
    return list(asked.values())


def _rows(resid: Tensor, lengths: list[int], members: list[int]) -> Tensor:
    """The real positions of some texts, one after another: [tokens, d_in]."""
    if len(members) == 1:
        return resid[members[0], : lengths[0]]
    return torch.cat([resid[t, :length] for t, length in zip(members, lengths, strict=True)])


def _read_sae(coder: Coder, rows: Tensor, lengths: list[int], queries: list[SaeQuery]) -> list[SaeActs]:
    k = min(max(query.top_k for query in queries), coder.d_sae)
    latents = sorted({latent for query in queries for latent in query.latents})
    chunk = max(1, PRE_ACTS_BYTES // (4 * coder.d_sae))
    tops = [coder.encode_topk(part, k) for part in rows.split(chunk)] if k else []
    values = _to_numpy([v for v, _ in tops])
    indices = _to_numpy([i for _, i in tops])
    columns = _to_numpy(_columns(coder, rows, chunk, latents))
    place = {latent: n for n, latent in enumerate(latents)}
    answers: list[SaeActs] = []
    start = 0
    for length, query in zip(lengths, queries, strict=True):
        end = start + length
        top = min(query.top_k, k)
        top_indices, top_values = _positive(indices[start:end, :top], values[start:end, :top])
        answers.append(
            SaeActs.model_construct(
                top_indices=top_indices,
                top_values=top_values,
                latents=[columns[start:end, place[latent]].tolist() for latent in query.latents],
            )
        )
        start = end
    return answers


def _columns(coder: Coder, rows: Tensor, chunk: int, latents: list[int]) -> list[Tensor]:
    if not latents:
        return []
    wanted = torch.tensor(latents, device=rows.device)
    return [coder.encode_latents(part, wanted) for part in rows.split(chunk)]


def _to_numpy(parts: list[Tensor]) -> np.ndarray:
    if not parts:
        return np.zeros((0, 0), dtype=np.float32)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (whole.float() if whole.is_floating_point() else whole).cpu().numpy()


def _positive(indices: np.ndarray, values: np.ndarray) -> tuple[list[list[int]], list[list[float]]]:
    """Cut each row after its last positive value; values are sorted downwards."""
    counts = (values > 0).sum(axis=1).tolist()
    return (
        [row[:n] for row, n in zip(indices.tolist(), counts, strict=True)],
        [row[:n] for row, n in zip(values.tolist(), counts, strict=True)],
    )
