"""Generation with a KV cache against transformers and against naive loops in plain PyTorch without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from app.protocol import GenerateRequest, SteerMethod, Token
from tests.tiny import HOOK, Tiny
from workers.gpu import generation
from workers.gpu.generation import Generation, NotFinite, edits_of
from workers.language_model import LanguageModel
from workers.sae.coders import Coder

PROMPT = "the old clock struck"
LATENT = 11
Ids = dict[str, list[int]]


def run(
    language: LanguageModel,
    tiny: Tiny,
    coder: Coder | None = None,
    strength: float = 0.0,
    prompt: str = PROMPT,
    **asked: Any,
) -> tuple[Ids, list[Token]]:
    wanted = {"temperature": 0.0, "max_new_tokens": 12} | asked
    request = GenerateRequest(model=tiny.model, prompt=prompt, directions=[], **wanted)
    directions = [(coder, LATENT, strength)] if coder is not None else []
    made = Generation(language, language.to_ids(prompt), edits_of(directions, request.method, language.device), request)
    tokens: list[Token] = []
    while not made.done:
        tokens += made.step()
    ids: Ids = {row: [t.id for t in tokens if t.row == row] for row in ("default", "steered")}
    return ids, tokens


@torch.no_grad()
def naive(language: LanguageModel, edit: Callable[[Tensor], Tensor], n: int, start: int = 1) -> list[int]:
    """Greedy tokens, the whole text through the model anew for each, one row, edited from position `start` on."""
    ids = language.to_ids(PROMPT)

    def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :start], edit(output[:, start:])], dim=1)

    handle = language.blocks[1].register_forward_hook(hook)
    for _ in range(n):
        ids.append(int(language.hf(torch.tensor([ids])).logits[0, -1].argmax()))
    handle.remove()
    return ids[-n:]


def test_greedy_default_text_is_that_of_transformers(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    ids = torch.tensor([language.to_ids(PROMPT)])
    made = language.hf.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
    expected = made[0, ids.shape[1] :].tolist()
    found, _ = run(language, tiny, topk, 300.0, max_new_tokens=40)
    stops = generation.stop_ids(language)
    assert found["default"] == [i for i in expected if i not in stops]


def test_additive_steering_is_that_of_a_loop_without_cache(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    v = topk.W_dec[LATENT] / topk.W_dec[LATENT].norm()
    found, _ = run(language, tiny, topk, 30.0)
    assert found["steered"] == naive(language, lambda h: h + 30 * v, 12)
    assert found["steered"] != found["default"]


def test_orthogonal_decomposition_replaces_the_projection_share(
    language: LanguageModel, tiny: Tiny, topk: Coder
) -> None:
    v = topk.W_dec[LATENT] / topk.W_dec[LATENT].norm()
    P = torch.outer(v, v)
    found, _ = run(language, tiny, topk, -2.5, method=SteerMethod.ORTHOGONAL)
    assert found["steered"] == naive(language, lambda h: h @ (torch.eye(len(v)) - P) - 2.5 * h @ P, 12)
    assert found["steered"] != found["default"]


def test_projection_cap_clips_the_projection(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    v = topk.W_dec[LATENT] / topk.W_dec[LATENT].norm()

    def clip(h: Tensor) -> Tensor:
        p = h @ v
        return h + (p.clamp(max=-4.0) - p).unsqueeze(-1) * v

    found, _ = run(language, tiny, topk, -4.0, method=SteerMethod.CAP)
    assert found["steered"] == naive(language, clip, 12)
    assert found["steered"] != found["default"]


def test_several_directions_add_up(language: LanguageModel, tiny: Tiny, topk: Coder, standard: Coder) -> None:
    edits = edits_of([(topk, 3, 2.0), (standard, 5, -4.0)], SteerMethod.ADDITIVE, language.device)
    h = torch.randn(2, 3, topk.d_in)
    expected = h + 2 * topk.W_dec[3] / topk.W_dec[3].norm() - 4 * standard.W_dec[5] / standard.W_dec[5].norm()
    assert list(edits) == [HOOK]
    torch.testing.assert_close(edits[HOOK](h), expected)


def test_a_dead_decoder_row_steers_nothing(language: LanguageModel, topk: Coder) -> None:
    dead = type(topk)(tensors={**topk.tensors, "W_dec": torch.zeros_like(topk.W_dec)}, config=topk.config)
    edit = edits_of([(dead, 0, 100.0)], SteerMethod.ADDITIVE, language.device)[HOOK]
    h = torch.randn(3, topk.d_in)
    torch.testing.assert_close(edit(h), h)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_strength_zero_is_the_default_token_for_token(
    temperature: float, language: LanguageModel, tiny: Tiny, topk: Coder
) -> None:
    found, tokens = run(language, tiny, topk, 0.0, temperature=temperature, max_new_tokens=60)
    assert found["steered"] == found["default"]
    assert len(tokens) == 2 * len(found["default"])


def test_a_seed_gives_the_same_text_again_and_another_seed_another(language: LanguageModel, tiny: Tiny) -> None:
    first, again, other = (run(language, tiny, temperature=1.0, seed=seed)[0] for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_sampling_follows_the_softmax(language: LanguageModel, tiny: Tiny) -> None:
    with torch.no_grad():
        expected = (language.hf(torch.tensor([language.to_ids(PROMPT)])).logits[0, -1] / 2.0).softmax(-1)
    drawn = [
        run(language, tiny, temperature=2.0, seed=seed, max_new_tokens=1)[0]["default"] or [1] for seed in range(1500)
    ]
    counts = torch.bincount(torch.tensor([d[0] for d in drawn]), minlength=len(expected)) / len(drawn)
    assert float((counts - expected).abs().max()) < 0.04


def test_the_frequency_penalty_is_subtracted_once_for_each_time_generated(language: LanguageModel, tiny: Tiny) -> None:
    found, _ = run(language, tiny, freq_penalty=3.0, max_new_tokens=20)
    ids, counts, expected = language.to_ids(PROMPT), torch.zeros(language.card.d_vocab), []
    for _ in range(20):
        with torch.no_grad():
            chosen = int((language.hf(torch.tensor([ids])).logits[0, -1] - 3 * counts).argmax())
        counts[chosen] += 1
        ids.append(chosen)
        expected.append(chosen)
    assert found["default"] == expected


def test_log_probabilities_are_the_models_own(language: LanguageModel, tiny: Tiny) -> None:
    _, tokens = run(language, tiny, temperature=0.7, freq_penalty=2.0, n_logprobs=3, max_new_tokens=1)
    with torch.no_grad():
        expected = language.hf(torch.tensor([language.to_ids(PROMPT)])).logits[0, -1].log_softmax(-1)
    token = tokens[0]
    assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
    values, ids = expected.topk(3)
    assert [i for i, _ in token.top] == ids.tolist()
    assert [p for _, p in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_row_that_ends_sends_nothing_more_and_the_other_goes_on(
    language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(language, tiny, topk, 30.0)
    default, steered = whole["default"], whole["steered"]
    only_default = next(i for i in default if i not in steered)
    monkeypatch.setattr(generation, "stop_ids", lambda _: frozenset([only_default]))
    cut, _ = run(language, tiny, topk, 30.0)
    assert cut["default"] == default[: default.index(only_default)]
    assert cut["steered"] == steered


def test_the_steered_row_may_end_first(
    language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(language, tiny, topk, 30.0)
    default, steered = whole["default"], whole["steered"]
    only_steered = next(i for i in steered if i not in default)
    monkeypatch.setattr(generation, "stop_ids", lambda _: frozenset([only_steered]))
    cut, _ = run(language, tiny, topk, 30.0, freq_penalty=0.0)
    assert cut["steered"] == steered[: steered.index(only_steered)]
    assert cut["default"] == default


def test_a_long_prompt_is_read_in_pieces_with_the_same_outcome(
    language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "rain fell all night long over seven hills while sailors sang of rivers"
    whole, _ = run(language, tiny, topk, 20.0, prompt=prompt)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 3)
    pieces, _ = run(language, tiny, topk, 20.0, prompt=prompt)
    assert pieces == whole


def test_logits_that_overflow_end_the_run_with_a_reason(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    with pytest.raises(NotFinite, match="lower the strength"):
        run(language, tiny, topk, float("inf"))
