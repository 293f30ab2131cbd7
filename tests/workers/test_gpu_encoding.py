"""Activations out of the worker's batches against sae-lens on transformers' own activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sae_lens import SAE

from app.protocol import SaeActs, SaeQuery
from tests.tiny import D_IN, D_SAE, HOOK, K, Tiny
from workers.gpu import encoding
from workers.gpu.encoding import Text, encode
from workers.gpu.residuals import Residuals
from workers.language_model import LanguageModel
from workers.sae.coders import Coder

TEXTS = ["the cat", "rain fell all night long over seven hills", "the dog ran after it because the old clock struck"]


def dense(acts: SaeActs) -> np.ndarray:
    values = np.zeros((len(acts.top_indices), D_SAE))
    for position, (indices, row) in enumerate(zip(acts.top_indices, acts.top_values, strict=True)):
        values[position, indices] = row
    return values


def everything(coder: Coder, tiny: Tiny) -> list[tuple[Coder, SaeQuery]]:
    return [(coder, SaeQuery(sae=tiny.topk, top_k=D_SAE))]


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_values_equal_sae_lens_on_transformers_activations(
    name: str, tiny: Tiny, language: LanguageModel, request: pytest.FixtureRequest
) -> None:
    coder: Coder = request.getfixturevalue(name)
    theirs = SAE.load_from_disk(getattr(tiny, name).path)
    ids = language.to_ids(TEXTS[1])
    [[acts]] = encode(language, [Text(ids, everything(coder, tiny))])
    with torch.no_grad():
        hidden = language.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
        expected = theirs.encode(hidden)[0]
    np.testing.assert_allclose(dense(acts), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_a_text_in_a_padded_batch_has_the_values_it_has_alone(
    name: str, tiny: Tiny, language: LanguageModel, request: pytest.FixtureRequest
) -> None:
    coder: Coder = request.getfixturevalue(name)
    texts = [Text(language.to_ids(text), everything(coder, tiny)) for text in TEXTS]
    together = encode(language, texts)
    for text, [acts] in zip(texts, together, strict=True):
        [[alone]] = encode(language, [text])
        np.testing.assert_allclose(dense(acts), dense(alone), atol=1e-4)


def test_different_questions_in_one_batch_are_answered_apart(
    tiny: Tiny, language: LanguageModel, topk: Coder, standard: Coder
) -> None:
    ids = [language.to_ids(text) for text in TEXTS]
    asked = [
        Text(
            ids[0], [(standard, SaeQuery(sae=tiny.standard, latents=[7, 3])), (topk, SaeQuery(sae=tiny.topk, top_k=2))]
        ),
        Text(ids[1], [(standard, SaeQuery(sae=tiny.standard, latents=[3], top_k=5))]),
        Text(ids[2], []),
    ]
    first, second, third = encode(language, asked)
    [[whole]] = encode(language, [Text(ids[0], [(standard, SaeQuery(sae=tiny.standard, top_k=D_SAE))])])
    np.testing.assert_allclose(np.array(first[0].latents), dense(whole)[:, [7, 3]].T, atol=1e-4)
    assert first[0].top_indices == [[]] * len(ids[0])
    assert all(len(row) <= 2 for row in first[1].top_indices)
    assert max(map(len, second[0].top_indices)) == 5
    assert third == []


def test_only_active_latents_leave(tiny: Tiny, language: LanguageModel, topk: Coder) -> None:
    [[acts]] = encode(language, [Text(language.to_ids(TEXTS[1]), everything(topk, tiny))])
    assert all(len(row) <= K for row in acts.top_values)
    assert all(value > 0 for row in acts.top_values for value in row)


def test_the_forward_pass_stops_at_the_deepest_hook(tiny: Tiny, language: LanguageModel, topk: Coder) -> None:
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda *_, n=n: ran.append(n)) for n, block in enumerate(language.blocks)
    ]
    encode(language, [Text(language.to_ids(TEXTS[0]), everything(topk, tiny))])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


def test_long_texts_are_encoded_in_pieces(
    tiny: Tiny, language: LanguageModel, standard: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Text(language.to_ids(TEXTS[1]), [(standard, SaeQuery(sae=tiny.standard, top_k=3, latents=[5]))])
    [[whole]] = encode(language, [text])
    monkeypatch.setattr(encoding, "PRE_ACTS_BYTES", 3 * 4 * D_SAE)
    [[pieces]] = encode(language, [text])
    assert pieces.top_indices == whole.top_indices
    np.testing.assert_allclose(pieces.latents, whole.latents, atol=1e-4)


def test_a_second_question_about_a_text_skips_the_model(tiny: Tiny, language: LanguageModel, standard: Coder) -> None:
    residuals = Residuals(10**6)
    text = Text(language.to_ids(TEXTS[1]), [(standard, SaeQuery(sae=tiny.standard, latents=[5]))])
    again = Text(text.ids, [(standard, SaeQuery(sae=tiny.standard, latents=[7], top_k=3))])
    [[first]], [[fresh]] = encode(language, [text], residuals), encode(language, [again])
    assert residuals.hits == 0
    with language.edited({HOOK: lambda _: pytest.fail("the model ran")}):
        [[second]] = encode(language, [again], residuals)
    assert residuals.hits == 1
    np.testing.assert_allclose(second.latents, fresh.latents, atol=1e-5)
    assert second.top_indices == fresh.top_indices
    assert len(first.latents[0]) == len(text.ids)


def test_kept_and_new_texts_are_answered_in_one_batch(tiny: Tiny, language: LanguageModel, topk: Coder) -> None:
    residuals = Residuals(10**6)
    texts = [Text(language.to_ids(text), everything(topk, tiny)) for text in TEXTS]
    encode(language, texts[1:2], residuals)
    for text, [acts] in zip(texts, encode(language, texts, residuals), strict=True):
        [[alone]] = encode(language, [text])
        np.testing.assert_allclose(dense(acts), dense(alone), atol=1e-4)


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_a_second_feature_on_a_text_costs_its_column_alone(
    name: str, tiny: Tiny, language: LanguageModel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the prompt lab asks: the top k and the totals of the text are the same for every feature."""
    coder, sae, residuals = request.getfixturevalue(name), getattr(tiny, name), Residuals(10**6)

    def ask(text: str, latents: list[int], kept: Residuals | None = residuals) -> SaeActs:
        query = SaeQuery(sae=sae, top_k=4, latents=latents, totals=True)
        [[found]] = encode(language, [Text(language.to_ids(text), [(coder, query)])], kept)
        return found

    best = [i for row in ask(TEXTS[1], [], None).top_indices for i in row]
    wanted = [best[0], best[-1], D_SAE - 1, best[0]]
    ask(TEXTS[1], [3])
    fresh = ask(TEXTS[1], wanted, None)
    for heavy in ("encode", "encode_topk", "predict"):
        monkeypatch.setattr(type(coder), heavy, lambda *_: pytest.fail("all latents were encoded again"))
    second = ask(TEXTS[1], wanted)
    assert second.top_indices == fresh.top_indices
    assert max(map(max, second.latents)) > 0
    for values in ("latents", "total", "l0", "error"):
        np.testing.assert_allclose(getattr(second, values), getattr(fresh, values), rtol=1e-4, atol=1e-5)


def test_kept_activations_stay_within_their_bytes_and_the_oldest_go_first(language: LanguageModel) -> None:
    size = 4 * D_IN * 4  # four positions
    residuals = Residuals(2 * size)
    batch = torch.randn(3, 5, D_IN)
    for row in range(3):
        residuals.put(language, [row] * 4, HOOK, batch[row, :4])
    assert residuals.used_bytes == 2 * size
    assert residuals.get(language, [0] * 4, [HOOK]) is None
    kept = residuals.get(language, [2] * 4, [HOOK])
    assert kept is not None
    torch.testing.assert_close(kept[HOOK], batch[2, :4])
    assert kept[HOOK].untyped_storage().nbytes() == size, "a view would keep the whole batch"
    residuals.put(language, [9] * 40, HOOK, torch.randn(40, D_IN))
    assert residuals.used_bytes == 2 * size, "what is too large is not kept"


@pytest.mark.parametrize("name", ["topk", "standard"])
def test_totals_are_those_of_sae_lens(
    name: str, tiny: Tiny, language: LanguageModel, request: pytest.FixtureRequest
) -> None:
    coder: Coder = request.getfixturevalue(name)
    theirs = SAE.load_from_disk(getattr(tiny, name).path)
    texts = [
        Text(language.to_ids(text), [(coder, SaeQuery(sae=tiny.topk, totals=total))])
        for text, total in zip(TEXTS, (True, False, True), strict=True)
    ]
    answers = encode(language, texts)
    assert answers[1][0].total == answers[1][0].l0 == answers[1][0].error == []
    for text, [acts] in (pair for n, pair in enumerate(zip(texts, answers, strict=True)) if n != 1):
        with torch.no_grad():
            x = language.hf(torch.tensor([text.ids]), output_hidden_states=True).hidden_states[2][0]
            expected = theirs.encode(x)
            missed = (x - theirs.decode(expected)).square().sum(-1) / x.square().sum(-1)
        np.testing.assert_allclose(acts.total, expected.sum(-1).numpy(), rtol=1e-4)
        assert acts.l0 == (expected > 0).sum(-1).tolist()
        np.testing.assert_allclose(acts.error, missed.numpy(), rtol=1e-3)
