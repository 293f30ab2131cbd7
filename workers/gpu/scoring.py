"""Forward passes that generate nothing: the next token under several interventions, finished texts read again, and
the mean difference of two sets of texts. Each is a generator that yields between its passes, for workers.gpu.lane.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from app.protocol import (
    DifferenceReply,
    GenerateRequest,
    NextReply,
    Scored,
    ScoredText,
    SteerRow,
)
from workers.gpu.encoding import Text, encode
from workers.gpu.generation import Interventions, Prefill, Run
from workers.gpu.interventions import applied, edits
from workers.gpu.lane import Pieces
from workers.language_model import LanguageModel

LOGITS_BYTES = 2**28
"""Most memory the logits of one pass may take; texts and conditions are spread over passes accordingly."""


def next_tokens(
    language: LanguageModel,
    rows: list[SteerRow],
    prompts: Sequence[Sequence[int]],
    interventions: Sequence[Interventions],
    n_top: int,
    asked: GenerateRequest,
) -> Pieces[NextReply]:
    """Return the likeliest next tokens of any row, with their log-probabilities in every row."""
    prefill = Prefill(Run(language, asked, prompts, interventions))
    while not prefill.done:
        prefill.step()
        yield
    logits = prefill.logits().log_softmax(-1)
    place = {name: n for n, row in enumerate(prefill.rows()) for name in row.names}
    logprobs = logits[[place[row.name] for row in rows]]
    ids = torch.unique(logprobs.topk(min(n_top, logprobs.shape[-1]), dim=-1).indices)
    ids = ids[logprobs[:, ids].amax(0).argsort(descending=True)]
    return NextReply(ids=ids.tolist(), logprobs=logprobs[:, ids].tolist())


def score(
    language: LanguageModel,
    texts: Sequence[Scored],
    conditions: Sequence[Interventions],
    queries: list[Text],
    n_top: int,
) -> Pieces[list[ScoredText]]:
    """Return each text's log-probabilities under each condition, and the activations of `queries` (a text's each)."""
    found: list[ScoredText] = []
    for text, query in zip(texts, queries, strict=True):
        size = 4 * (len(text.ids) - text.start + 1) * language.card.d_vocab
        n_rows = max(1, LOGITS_BYTES // size)
        logprobs: list[list[float]] = []
        tops: list[list[list[tuple[int, float]]]] = []
        for at in range(0, len(conditions), n_rows):
            for row in _passed(language, text, conditions[at : at + n_rows]):
                logprobs.append(row.gather(-1, _continuation(text, row)).squeeze(-1).tolist())
                tops.append(_tops(row, n_top))
            yield
        acts = encode(language, [query])[0] if query.queries else []
        values = [[latent[text.start :] for latent in sae.latents] for sae in acts]
        found.append(ScoredText(logprobs=logprobs, tops=tops, acts=values))
        yield
    return found


@torch.inference_mode()
def _passed(language: LanguageModel, text: Scored, conditions: Sequence[Interventions]) -> list[Tensor]:
    """Log-probabilities in the place of every token of the continuation: [token, d_vocab], one for each condition."""
    device = language.device
    wanted = [
        found
        for row, acting in enumerate(conditions)
        for what in acting
        if not what.neutral
        and (found := applied(language.card, row, what, text.ids, 0, text.start, device)) is not None
    ]
    ids = torch.tensor([text.ids] * len(conditions), device=device)
    with language.edited(edits(wanted, len(conditions))):
        logits = language.hf(input_ids=ids, use_cache=False, logits_to_keep=len(text.ids) - text.start + 1).logits
    return list(logits[:, :-1].float().log_softmax(-1))


def _continuation(text: Scored, row: Tensor) -> Tensor:
    return torch.tensor(text.ids[text.start :], device=row.device).unsqueeze(-1)


def _tops(row: Tensor, n: int) -> list[list[tuple[int, float]]]:
    if not n:
        return []
    values, ids = row.topk(n, dim=-1)
    return [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]


@dataclass
class _Mean:
    """A running mean, each text counting the same."""

    total: Tensor
    norms: float = 0.0
    n: int = 0


def difference(
    language: LanguageModel, hook_name: str, plus: list[list[int]], minus: list[list[int]], *, last_only: bool
) -> Pieces[DifferenceReply]:
    """Return the mean activation at a hook over texts of one kind less that over texts of another.

    A text counts as the mean over its tokens (without the beginning-of-text token) or as its last token alone, and
    every text counts the same however long it is.
    """
    means: list[_Mean] = []
    for rows in (plus, minus):
        mean = _Mean(torch.zeros(language.hook_size(hook_name), dtype=torch.float64))
        for ids in rows:
            acts = language.read(torch.tensor([ids], device=language.device), [hook_name])[hook_name][0].double().cpu()
            acts = acts[1:] if ids[0] == language.card.bos_token_id and len(ids) > 1 else acts
            mean.total += acts[-1] if last_only else acts.mean(0)
            mean.norms += float(acts.norm(dim=-1).mean())
            mean.n += 1
            yield
        means.append(mean)
    one, other = means
    vector = one.total / one.n - other.total / other.n
    return DifferenceReply(
        vector=base64.b64encode(vector.float().numpy().astype("<f4").tobytes()).decode(),
        norm=float(vector.norm()),
        usual_norm=(one.norms + other.norms) / (one.n + other.n),
    )
