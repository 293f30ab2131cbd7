"""Causal effects: what the model predicts after a top example's peak with and without the feature there.

Ablating a feature at one position changes, at that position's layer and above, only that position and later ones. So
the next-token distribution at the peak needs no second forward pass of the context: its keys and values are computed
once, and each example adds two tokens behind it, one as it is and one ablated, that see what stands before the peak
and themselves. All examples of a context go together. Where a model does not take such a pass (a plain one is compared
with it first), and for the first positions of a text, an example costs a forward pass of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app import log
from app.corpora import Stream
from app.evidence import Effect
from workers.language_model import Edit, LanguageModel
from workers.sae.coders import Coder, Sparse

N_VOTES = 4
"""Tokens kept that a feature votes up, and as many down."""
CONTEXTS_PER_PASS = 16
LOGITS_BYTES = 128 * 2**20
PLAIN_POSITIONS = 3
"""Peaks before this position get a plain pass each: it is short, and the huge activations of a text's first tokens
(attention sinks) make another order of summation visible, 2e-3 in SmolLM2's log-probabilities at position 1."""
_TOLERANCE = 1e-3

_logger = log.get("trainer")


@dataclass(frozen=True)
class Peak:
    """Where a latent of one of the coders has the peak of a top example."""

    context: int
    position: int
    coder: int
    latent: int


def effects(
    model: LanguageModel,
    coders: Sequence[Coder],
    stream: Stream,
    peaks: Sequence[Peak],
    context_size: int,
    bos: int | None,
) -> Iterator[tuple[Peak, Effect]]:
    """Yield the effect of each peak, in an order that depends on the peaks alone. Definitions: app.evidence.Effect."""
    ordered = sorted(peaks, key=lambda p: (p.context, p.position, p.coder, p.latent))

    def ids(rows: list[list[Peak]]) -> Tensor:
        read = stream.contexts(np.array([row[0].context for row in rows]), context_size, bos)
        return torch.from_numpy(read).to(model.device)

    early = _by_context([peak for peak in ordered if peak.position < PLAIN_POSITIONS])
    late = _by_context([peak for peak in ordered if peak.position >= PLAIN_POSITIONS])
    together = bool(late) and _agrees(model, coders, ids(late[-1:]), late[-1:])
    for rows, run in ((early, _one_by_one), (late, _appended if together else _one_by_one)):
        for start in range(0, len(rows), CONTEXTS_PER_PASS):
            part = rows[start : start + CONTEXTS_PER_PASS]
            for peak, clean, ablated in run(model, coders, ids(part), part):
                yield peak, effect_of(peak, clean, ablated, _next_token(stream, peak, context_size, bos))


def _by_context(peaks: Sequence[Peak]) -> list[list[Peak]]:
    """Peaks of each context. Contexts are read up to their last peak: those with a late one come together."""
    rows = [list(group) for _, group in groupby(peaks, key=lambda p: p.context)]
    return sorted(rows, key=lambda row: (row[-1].position, row[0].context))


def effect_of(peak: Peak, clean: Tensor, ablated: Tensor, following: int | None) -> Effect:
    """Return the effect from the log-probabilities with and without the feature, [d_vocab] each."""
    p, q = clean.exp(), ablated.exp()
    change = p - q
    up, down = change.topk(min(N_VOTES, len(change))), (-change).topk(min(N_VOTES, len(change)))
    return Effect(
        context=peak.context,
        position=peak.position,
        loss_change=float(clean[following] - ablated[following]) if following is not None else float("nan"),
        kl=max(0.0, float((p * (clean - ablated)).sum())),
        up=tuple((t, v) for t, v in zip(up.indices.tolist(), up.values.tolist(), strict=True) if v > 0),
        down=tuple((t, -v) for t, v in zip(down.indices.tolist(), down.values.tolist(), strict=True) if v > 0),
    )


@torch.inference_mode()
def _appended(
    model: LanguageModel, coders: Sequence[Coder], ids: Tensor, rows: Sequence[Sequence[Peak]]
) -> Iterator[tuple[Peak, Tensor, Tensor]]:
    """Keys and values of the contexts once, then two tokens for each peak behind them."""
    longest = max(peak.position for row in rows for peak in row)
    # A padding token keeps its place free: a model reads at least one token.
    seen = model.body(input_ids=ids[:, : max(longest, 1)], use_cache=True)
    per_row = max(1, LOGITS_BYTES // (8 * model.card.d_vocab * len(rows)))
    for first in range(0, max(len(row) for row in rows), per_row):
        part = [row[first : first + per_row] for row in rows]
        width = max(len(row) for row in part)
        positions = torch.zeros(len(rows), 2 * width, dtype=torch.long, device=ids.device)
        for number, row in enumerate(part):
            for place, peak in enumerate(row):
                positions[number, [place, place + width]] = peak.position
        queries = ids.gather(1, positions)
        cache = getattr(seen, model.cache_argument)
        length = cache.get_seq_length()
        mask = _mask(positions, length, model.dtype)
        ablate = _ablations(coders, part, width)
        with model.edited(ablate):
            logits = model.hf(
                input_ids=queries,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{model.cache_argument: cache},
            ).logits
        cache.crop(-queries.shape[1])
        for number, row in enumerate(part):
            for place, peak in enumerate(row):
                pair = logits[number, [place, place + width]].float().log_softmax(dim=-1)
                yield peak, pair[0], pair[1]


def _mask(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """What each appended token may attend to: what stands before its position, and itself. Additive."""
    before = torch.arange(length, device=positions.device) < positions[..., None]
    itself = torch.eye(positions.shape[1], dtype=torch.bool, device=positions.device).expand(len(positions), -1, -1)
    allowed = torch.cat([before, itself], dim=-1)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=positions.device).masked_fill_(
        ~allowed, torch.finfo(dtype).min
    )


def _ablations(coders: Sequence[Coder], rows: Sequence[Sequence[Peak]], width: int) -> dict[str, Edit]:
    """Edits that take each peak's feature out of the second of its two tokens, the one `width` further on."""
    places: dict[int, list[tuple[int, int, int]]] = {}
    for number, row in enumerate(rows):
        for place, peak in enumerate(row):
            places.setdefault(peak.coder, []).append((number, place + width, peak.latent))
    return _edits(coders, {k: tuple(torch.tensor(c) for c in zip(*v, strict=True)) for k, v in places.items()})


def _edits(coders: Sequence[Coder], places: dict[int, tuple[Tensor, ...]]) -> dict[str, Edit]:
    """One edit for each hook: coders that share one take turns on it."""
    inputs: dict[str, Tensor] = {}
    hooks: dict[str, list[int]] = {}
    for number in places:
        hooks.setdefault(coders[number].hook_name_out, []).append(number)

    def ablate(y: Tensor, numbers: list[int]) -> Tensor:
        changed = y.clone()
        for number in numbers:
            coder, (rows, columns, latents) = coders[number], (t.to(y.device) for t in places[number])
            x = (y if coder.hook_name == coder.hook_name_out else inputs[coder.hook_name])[rows, columns].float()
            values = coder.encode(x).gather(1, latents[:, None])[:, 0]
            active = Sparse(torch.arange(len(x), device=x.device), latents, values)
            changed[rows, columns] -= coder.writes(x, active).to(y.dtype)
        return changed

    def keep(name: str) -> Edit:
        def store(x: Tensor) -> Tensor:
            inputs[name] = x
            return x

        return store

    read = {coders[n].hook_name for n in places} - set(hooks)
    found: dict[str, Edit] = {name: keep(name) for name in read}
    for name, numbers in hooks.items():
        found[name] = lambda y, numbers=numbers, name=name: ablate(inputs.setdefault(name, y), numbers)
    return found


@torch.inference_mode()
def _one_by_one(
    model: LanguageModel, coders: Sequence[Coder], ids: Tensor, rows: Sequence[Sequence[Peak]]
) -> Iterator[tuple[Peak, Tensor, Tensor]]:
    """A plain forward pass without and one with the ablation, to the peak."""
    for number, row in enumerate(rows):
        for peak in row:
            text = ids[number : number + 1, : peak.position + 1]
            clean = _last_log_probs(model, text)
            place = tuple(torch.tensor([n]) for n in (0, peak.position, peak.latent))
            with model.edited(_edits(coders, {peak.coder: place})):
                yield peak, clean, _last_log_probs(model, text)


def _last_log_probs(model: LanguageModel, ids: Tensor) -> Tensor:
    return model.hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().log_softmax(dim=-1)


def _agrees(model: LanguageModel, coders: Sequence[Coder], ids: Tensor, rows: Sequence[Sequence[Peak]]) -> bool:
    """Tell whether the model takes appended tokens: this context's must predict as a plain pass does."""
    window = _window(model.hf.config)
    if window is not None and ids.shape[1] > window:
        return False
    slow = list(_one_by_one(model, coders, ids[:1], [rows[0][:1]]))
    found: Any = []
    with suppress(RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        found = list(_appended(model, coders, ids[:1], [rows[0][:1]]))
    same = len(found) == 1 and all(
        torch.allclose(a, b, atol=_TOLERANCE) for a, b in zip(found[0][1:], slow[0][1:], strict=True)
    )
    if not same:
        _logger.warning("causal effects are measured with a forward pass each: this model takes no appended tokens")
    return same


def _window(config: Any) -> int | None:
    """Tokens that a layer with a sliding window sees; the mask above knows none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "sliding_window", None)


def _next_token(stream: Stream, peak: Peak, context_size: int, bos: int | None) -> int | None:
    """The token that follows a position in the corpus, also where it begins the next context."""
    has_bos = bos is not None
    offset = peak.context * (context_size - has_bos) + peak.position - has_bos + 1
    return int(stream.tokens[offset]) if offset < len(stream.tokens) else None
