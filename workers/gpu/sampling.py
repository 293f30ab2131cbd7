"""From logits to tokens: each row with its own temperature, bounds, penalties and random numbers.

A row's draws depend on its seed and on nothing else in the batch. A number in [0, 1) is turned into a token by
inverting the cumulative distribution over the vocabulary, so rows with equal logits and equal seeds take equal tokens,
on every device.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.protocol import GenerateRequest


@dataclass(frozen=True)
class Settings:
    """How tokens are chosen; app.protocol.GenerateRequest says what each means."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    freq_penalty: float = 0.0

    @classmethod
    def of(cls, asked: GenerateRequest) -> Settings:
        return cls(**{name: getattr(asked, name) for name in cls.__dataclass_fields__})


class Sampler:
    """The state of one row: its random numbers and the tokens it has seen."""

    def __init__(self, settings: Settings, seed: int, sample: int, prompt_ids: Sequence[int]) -> None:
        self.settings = settings
        # The first text of a seed is the same whether one is asked for or many.
        self._random = random.Random(seed if sample == 0 else f"{seed}/{sample}")  # noqa: S311 - no secrets
        self._seen = set(prompt_ids)
        self._counts: dict[int, int] = {}

    def took(self, token: int) -> None:
        self._seen.add(token)
        self._counts[token] = self._counts.get(token, 0) + 1

    def penalised(self, logits: Tensor) -> Tensor:
        """[d_vocab] -> [d_vocab]."""
        s = self.settings
        if s.repetition_penalty != 1:
            index = torch.tensor(sorted(self._seen), device=logits.device)
            seen = logits[index]
            seen = torch.where(seen > 0, seen / s.repetition_penalty, seen * s.repetition_penalty)
            logits = logits.index_copy(0, index, seen)
        if s.freq_penalty and self._counts:
            index = torch.tensor(list(self._counts), device=logits.device)
            counts = torch.tensor(list(self._counts.values()), device=logits.device, dtype=logits.dtype)
            logits = logits.index_add(0, index, counts, alpha=-s.freq_penalty)
        return logits

    def draw(self) -> float:
        return self._random.random()


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Return a token of each row of logits [row, d_vocab], float32. Every sampling row draws one number."""
    if any(s.settings.repetition_penalty != 1 or s.settings.freq_penalty for s in samplers):
        logits = torch.stack([s.penalised(row) for s, row in zip(samplers, logits, strict=True)])
    chosen: list[int] = logits.argmax(-1).tolist()
    warm = [n for n, s in enumerate(samplers) if s.settings.temperature > 0]
    if warm:
        temperatures = torch.tensor([samplers[n].settings.temperature for n in warm], device=logits.device)
        probabilities = torch.softmax(logits[warm] / temperatures.unsqueeze(-1), dim=-1)
        for n, row in zip(warm, probabilities, strict=True):
            chosen[n] = _drawn(bounded(row, samplers[n].settings), samplers[n].draw())
    return chosen


def bounded(probabilities: Tensor, settings: Settings) -> Tensor:
    """Zero what top-k, top-p and min-p leave out, in this order, as transformers does; not scaled to sum 1 again."""
    p = probabilities
    if settings.top_k or settings.top_p < 1:
        values, indices = p.sort(descending=True)
        if settings.top_k:
            values[settings.top_k :] = 0
        if settings.top_p < 1:
            before = values.cumsum(-1) - values
            beyond = before >= settings.top_p * values.sum()
            beyond[0] = False  # a top_p that rounds to 0 leaves the likeliest
            values[beyond] = 0
        p = torch.zeros_like(p).scatter_(0, indices, values)
    if settings.min_p > 0:
        p = p.masked_fill(p < settings.min_p * p.max(), 0)
    return p


def _drawn(probabilities: Tensor, number: float) -> int:
    cumulative = probabilities.double().cumsum(-1)
    place = int(torch.searchsorted(cumulative, cumulative[-1:] * number, right=True))
    return min(place, int(probabilities.nonzero()[-1]))
