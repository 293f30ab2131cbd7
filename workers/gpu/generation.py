"""One steering run: the default and the steered row in one batch with a KV cache, advanced a token at a time.

No queue, no HTTP: workers.gpu.lane takes turns between runs. What is steered: every position of the prompt and every
generated token, as on Neuronpedia, except a beginning-of-text token. SAEs are not trained on that one, it has no
activations here, and its norm is tens of times the others': additive steering is lost in it (so results agree), but
projecting it would break the attention sink that the whole model leans on.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from app.protocol import GenerateRequest, SteerMethod, Token
from workers.language_model import LanguageModel
from workers.sae.coders import Coder
from workers.sae.steering import METHODS, Edit, unit_rows

PREFILL_TOKENS = 512
"""Prompts are read in pieces, so that a long one neither holds the lane nor survives its client."""

Row = Literal["default", "steered"]


class NotFinite(ArithmeticError):
    """The logits overflowed; the message says which row and what to do."""


class Generation:
    """A run's state between two tokens. `step` until `done`.

    Both rows draw the same random number at the same step and turn it into a token by inverting their own cumulative
    distribution, so equal logits give equal tokens, on every device.
    """

    def __init__(
        self, language: LanguageModel, prompt_ids: Sequence[int], edits: dict[str, Edit], request: GenerateRequest
    ) -> None:
        self._language = language
        self._edits = edits
        self._request = request
        self._rows: list[Row] = ["default", "steered"]
        self._pending = torch.tensor([prompt_ids] * 2, device=language.device)
        self._spared = int(prompt_ids[0] == language.card.bos_token_id)
        self._cache = DynamicCache(config=language.hf.config)
        self._cache_name = _cache_name(language.hf.forward)
        self._random = random.Random(request.seed)  # noqa: S311 - sampling, not secrets
        self._counts = torch.zeros(2, language.card.d_vocab, device=language.device) if request.freq_penalty else None
        self._stops = stop_ids(language)
        self._left = request.max_new_tokens

    @property
    def done(self) -> bool:
        return not self._rows or self._left == 0

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Read a piece of the prompt or generate one token of each unfinished row. Raises NotFinite."""
        piece, self._pending = self._pending[:, :PREFILL_TOKENS], self._pending[:, PREFILL_TOKENS:]
        logits = self._forward(piece)
        if self._pending.shape[1]:
            return []
        if not bool(logits.isfinite().all()):
            raise NotFinite("The model's logits are no longer finite; lower the strength of the steering.")
        chosen = self._choose(logits)
        tokens = self._describe(logits, chosen)
        self._keep(chosen)
        self._left -= 1
        kept = [token for token in tokens if token.id not in self._stops]
        return [*(token.model_copy(update={"more": True}) for token in kept[:-1]), *kept[-1:]]

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits after the last position: [row, d_vocab], float32."""
        edits = {name: self._on_steered(edit) for name, edit in self._edits.items()} if "steered" in self._rows else {}
        with self._language.edited(edits):
            output = self._language.hf(
                input_ids=ids, use_cache=True, logits_to_keep=1, **{self._cache_name: self._cache}
            )
        self._spared = 0  # the beginning of the text has passed
        return output.logits[:, -1].float()

    def _on_steered(self, edit: Edit) -> Edit:
        row, start = self._rows.index("steered"), self._spared

        def apply(h: Tensor) -> Tensor:
            # A copy: what the hook reads may be read elsewhere too (hook_mlp_in is the residual stream itself).
            steered = h.clone()
            steered[row, start:] = edit(h[row, start:])
            return steered

        return apply

    def _choose(self, logits: Tensor) -> list[int]:
        if self._counts is not None:
            logits = logits - self._request.freq_penalty * self._counts
        if self._request.temperature == 0:
            return logits.argmax(-1).tolist()
        cumulative = torch.softmax(logits / self._request.temperature, dim=-1).cumsum(-1)
        places = torch.searchsorted(cumulative, cumulative[:, -1:] * self._random.random(), right=True)
        return places.squeeze(-1).clamp_max(logits.shape[-1] - 1).tolist()

    def _describe(self, logits: Tensor, chosen: list[int]) -> list[Token]:
        logprobs = logits.log_softmax(-1)
        own = logprobs[range(len(chosen)), chosen].tolist()
        tops = self._tops(logprobs)
        return [
            Token.model_construct(row=row, id=id_, logprob=logprob, top=top)
            for row, id_, logprob, top in zip(self._rows, chosen, own, tops, strict=True)
        ]

    def _tops(self, logprobs: Tensor) -> list[list[tuple[int, float]]]:
        if not self._request.n_logprobs:
            return [[] for _ in self._rows]
        values, ids = logprobs.topk(self._request.n_logprobs, dim=-1)
        return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]

    def _keep(self, chosen: list[int]) -> None:
        """Make the chosen tokens the next input and drop rows that have ended, with their part of the cache."""
        if self._counts is not None:
            self._counts[range(len(chosen)), chosen] += 1
        alive = [n for n, id_ in enumerate(chosen) if id_ not in self._stops]
        if alive and len(alive) < len(chosen):
            self._cache.batch_select_indices(torch.tensor(alive, device=self._pending.device))
            self._counts = self._counts[alive] if self._counts is not None else None
        self._rows = [self._rows[n] for n in alive]
        self._pending = torch.tensor([[chosen[n]] for n in alive], device=self._pending.device)


def edits_of(
    directions: Sequence[tuple[Coder, int, float]], method: SteerMethod, device: torch.device
) -> dict[str, Edit]:
    """One edit per hook from (SAE, latent, coefficient) triples."""
    by_hook: dict[str, list[tuple[Coder, int, float]]] = {}
    for direction in directions:
        by_hook.setdefault(direction[0].hook_name_out, []).append(direction)
    make: Callable[[Tensor, Tensor], Edit] = METHODS[method]
    return {
        hook: make(
            unit_rows(torch.stack([coder.W_dec[latent] for coder, latent, _ in group])),
            torch.tensor([coefficient for _, _, coefficient in group], dtype=torch.float32, device=device),
        )
        for hook, group in by_hook.items()
    }


def _cache_name(forward: Callable[..., object]) -> str:
    """What this model class calls its KV cache: transformers 5.24 renames the argument, one architecture at a time."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def stop_ids(language: LanguageModel) -> frozenset[int]:
    """Tokens that end a text: those of the model's generation config and its tokenizer's own."""
    config = language.hf.generation_config
    named = config.eos_token_id if config is not None else None
    ids = named if isinstance(named, list) else [named]
    return frozenset(i for i in [*ids, language.tokenizer.eos_token_id] if i is not None)
