"""Causal effects: what the model predicts from a top example's peak on with and without the feature there.

Ablating a feature at one position changes, at that position's layer and above, only that position and later ones. So
the predictions need no second forward pass of the context: its keys and values are computed once, and each example adds
two branches behind it, the tokens from the peak on as they are and with the feature taken out of the first, that see
what stands before the peak and themselves. All examples of a context go together. Where a model does not take such a
pass (a plain one is compared with it first), and for the first positions of a text, an example costs two plain passes.
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
LOGITS_BYTES = 64 * 2**20
"""Most memory of the log-probabilities of one context's branches at once; more examples wait for the next pass."""
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
    reach: int,
) -> Iterator[tuple[Peak, Effect]]:
    """Yield the effect of each peak, in an order that depends on the peaks alone. Definitions: app.evidence.Effect.

    It is followed for up to `reach` tokens behind the peak, as far as its context goes.
    """
    ordered = sorted(peaks, key=lambda p: (p.context, p.position, p.coder, p.latent))

    def ids(rows: list[list[Peak]]) -> Tensor:
        read = stream.contexts(np.array([row[0].context for row in rows]), context_size, bos)
        return torch.from_numpy(read).to(model.device)

    early = _by_context([peak for peak in ordered if peak.position < PLAIN_POSITIONS])
    late = _by_context([peak for peak in ordered if peak.position >= PLAIN_POSITIONS])
    together = bool(late) and _agrees(model, coders, ids(late[-1:]), late[-1:], reach)
    for rows, run in ((early, _one_by_one), (late, _appended if together else _one_by_one)):
        for start in range(0, len(rows), CONTEXTS_PER_PASS):
            part = rows[start : start + CONTEXTS_PER_PASS]
            for peak, clean, ablated in run(model, coders, ids(part), part, reach):
                yield peak, effect_of(peak, clean, ablated, _next_tokens(stream, peak, len(clean), context_size, bos))


def _by_context(peaks: Sequence[Peak]) -> list[list[Peak]]:
    """Peaks of each context. Contexts are read up to their last peak: those with a late one come together."""
    rows = [list(group) for _, group in groupby(peaks, key=lambda p: p.context)]
    return sorted(rows, key=lambda row: (row[-1].position, row[0].context))


def effect_of(peak: Peak, clean: Tensor, ablated: Tensor, following: Sequence[int]) -> Effect:
    """Return the effect from the log-probabilities from the peak on, with and without the feature, [pos, d_vocab] each.

    following: the tokens that follow in the corpus, one less than positions at its very end.
    """
    p, q = clean[0].exp(), ablated[0].exp()
    change = p - q
    up, down = change.topk(min(N_VOTES, len(change))), (-change).topk(min(N_VOTES, len(change)))
    kl = (clean.exp() * (clean - ablated)).sum(dim=-1).clamp_min(0)
    tokens = torch.tensor(following, device=clean.device)[:, None]
    loss = (clean - ablated)[: len(tokens)].gather(1, tokens)[:, 0]
    return Effect(
        context=peak.context,
        position=peak.position,
        loss_change=float(loss[:1].mean()),
        kl=float(kl[0]),
        up=tuple((t, v) for t, v in zip(up.indices.tolist(), up.values.tolist(), strict=True) if v > 0),
        down=tuple((t, -v) for t, v in zip(down.indices.tolist(), down.values.tolist(), strict=True) if v > 0),
        n_later=len(clean) - 1,
        later_loss_change=float(loss[1:].mean()),
        later_kl=float(kl[1:].mean()),
    )


@torch.inference_mode()
def _appended(
    model: LanguageModel, coders: Sequence[Coder], ids: Tensor, rows: Sequence[Sequence[Peak]], reach: int
) -> Iterator[tuple[Peak, Tensor, Tensor]]:
    """Keys and values of the contexts once, then two branches for each peak behind them."""
    longest = max(peak.position for row in rows for peak in row)
    # A padding token keeps its place free: a model reads at least one token.
    seen = model.body(input_ids=ids[:, : max(longest, 1)], use_cache=True)
    n = 1 + min(reach, ids.shape[1] - 1)
    per_row = max(1, LOGITS_BYTES // (8 * model.card.d_vocab * n))
    for first in range(0, max(len(row) for row in rows), per_row):
        part = [row[first : first + per_row] for row in rows]
        starts = torch.zeros(len(rows), max(len(row) for row in part), dtype=torch.long, device=ids.device)
        for number, row in enumerate(part):
            starts[number, : len(row)] = torch.tensor([peak.position for peak in row])
        hidden = _branches(model, coders, ids, part, starts, n, getattr(seen, model.cache_argument))
        for number, row in enumerate(part):
            # [peak, branch, pos, d_vocab]
            found = model.unembed(hidden[number, : len(row)]).float().log_softmax(dim=-1)
            for place, peak in enumerate(row):
                inside = min(n, ids.shape[1] - peak.position)
                yield peak, found[place, 0, :inside], found[place, 1, :inside]


def _branches(
    model: LanguageModel,
    coders: Sequence[Coder],
    ids: Tensor,
    rows: Sequence[Sequence[Peak]],
    starts: Tensor,
    n: int,
    cache: Any,
) -> Tensor:
    """Return what the final norm gives for two branches of n tokens from each start, [row, start, branch, pos, d].

    The second of a start's two has its peak's feature ablated at its first token. Tokens behind the context's end are
    padding, which nothing before them sees.
    """
    n_rows, width = starts.shape
    own = (starts[:, :, None, None] + torch.arange(n, device=ids.device)).expand(-1, -1, 2, -1)
    positions = own.clamp(max=ids.shape[1] - 1).reshape(n_rows, -1)
    ablated = _ablations(coders, rows, n)
    mask = _mask(starts, n, cache.get_seq_length(), model.dtype)
    with model.edited(ablated):
        hidden = model.body(
            input_ids=ids.gather(1, positions),
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            **{model.cache_argument: cache},
        ).last_hidden_state
    cache.crop(-positions.shape[1])
    return hidden.view(n_rows, width, 2, n, -1)


def _mask(starts: Tensor, n: int, length: int, dtype: torch.dtype) -> Tensor:
    """What each appended token may attend to: what stands before its branch, and that up to itself. Additive."""
    first = starts[:, :, None].expand(-1, -1, 2 * n).flatten(1)  # [row, token]
    before = torch.arange(length, device=starts.device) < first[..., None]
    branch = torch.arange(first.shape[1], device=starts.device)
    within = (branch[:, None] // n == branch // n) & (branch <= branch[:, None])
    allowed = torch.cat([before, within.expand(len(starts), -1, -1)], dim=-1)[:, None]
    return torch.zeros(allowed.shape, dtype=dtype, device=starts.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def _ablations(coders: Sequence[Coder], rows: Sequence[Sequence[Peak]], n: int) -> dict[str, Edit]:
    """Edits that take each peak's feature out of the first token of the second of its two branches of n tokens."""
    places: dict[int, list[tuple[int, int, int]]] = {}
    for number, row in enumerate(rows):
        for place, peak in enumerate(row):
            places.setdefault(peak.coder, []).append((number, (2 * place + 1) * n, peak.latent))
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
    model: LanguageModel, coders: Sequence[Coder], ids: Tensor, rows: Sequence[Sequence[Peak]], reach: int
) -> Iterator[tuple[Peak, Tensor, Tensor]]:
    """A plain forward pass without and one with the ablation, as far as the effect is followed."""
    for number, row in enumerate(rows):
        for peak in row:
            text = ids[number : number + 1, : peak.position + 1 + reach]
            n = text.shape[1] - peak.position
            clean = _last_log_probs(model, text, n)
            place = tuple(torch.tensor([n]) for n in (0, peak.position, peak.latent))
            with model.edited(_edits(coders, {peak.coder: place})):
                yield peak, clean, _last_log_probs(model, text, n)


def _last_log_probs(model: LanguageModel, ids: Tensor, n: int) -> Tensor:
    return model.hf(input_ids=ids, use_cache=False, logits_to_keep=n).logits[0].float().log_softmax(dim=-1)


def _agrees(
    model: LanguageModel, coders: Sequence[Coder], ids: Tensor, rows: Sequence[Sequence[Peak]], reach: int
) -> bool:
    """Tell whether the model takes appended tokens: this context's must predict as a plain pass does."""
    window = _window(model.hf.config)
    if window is not None and ids.shape[1] > window:
        return False
    slow = list(_one_by_one(model, coders, ids[:1], [rows[0][:1]], reach))
    found: Any = []
    with suppress(RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        found = list(_appended(model, coders, ids[:1], [rows[0][:1]], reach))
    same = len(found) == 1 and all(
        a.shape == b.shape and torch.allclose(a, b, atol=_TOLERANCE)
        for a, b in zip(found[0][1:], slow[0][1:], strict=True)
    )
    if not same:
        _logger.warning("causal effects are measured with a forward pass each: this model takes no appended tokens")
    return same


def _window(config: Any) -> int | None:
    """Tokens that a layer with a sliding window sees; the mask above knows none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "sliding_window", None)


def _next_tokens(stream: Stream, peak: Peak, n: int, context_size: int, bos: int | None) -> list[int]:
    """The tokens that follow n positions from a peak on, also where one begins the next context."""
    has_bos = bos is not None
    offset = peak.context * (context_size - has_bos) + peak.position - has_bos + 1
    return stream.tokens[offset : offset + n].tolist()
