"""Batched generation with a KV cache against transformers and against naive loops in plain PyTorch without one."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from app.protocol import GenerateRequest, Operation, Positions, SteerDirection, SteerRow, Token
from app.tokens import Vocabulary, vocabulary
from tests.tiny import D_IN, D_SAE, HOOK, Tiny
from workers.gpu import cache, generation, sampling
from workers.gpu.generation import Batch, NotFinite, Prefill, Run
from workers.gpu.interventions import Intervention, applied, edits, intervention
from workers.language_model import LanguageModel
from workers.sae.coders import CODERS, Coder

PROMPT = "the old clock struck"
LATENT = 11
Ids = dict[str, list[int]]


def steer(
    language: LanguageModel, tiny: Tiny, coder: Coder, strength: float, latent: int = LATENT, **how: Any
) -> Intervention:
    direction = SteerDirection(sae=tiny.topk, latent=latent, coefficient=strength, **how)
    return intervention(direction, {tiny.topk.path: coder}, language)


def made(
    language: LanguageModel,
    tiny: Tiny,
    steered: Sequence[Intervention] = (),
    prompts: Sequence[str] = (PROMPT, PROMPT),
    words: Vocabulary | None = None,
    **asked: Any,
) -> Run:
    wanted = {"temperature": 0.0, "max_new_tokens": 12} | asked
    rows = [SteerRow(name="default"), SteerRow(name="steered")]
    request = GenerateRequest(model=tiny.model, rows=rows, **wanted)
    return Run(language, request, [language.to_ids(p) for p in prompts], [(), tuple(steered)], words)


def grown(*runs: Run, at: Sequence[int] = ()) -> list[list[Token]]:
    """Generate runs in one batch to their ends; `at` says after how many steps each joins."""
    batch = Batch(runs[0].language)
    found: dict[int, list[Token]] = {id(run): [] for run in runs}
    waiting = [*zip(at or [0] * len(runs), runs, strict=True)]
    n = 0
    while waiting or len(batch):
        for when, run in [item for item in waiting if item[0] <= n]:
            waiting.remove((when, run))
            prefill = Prefill(run)
            while not prefill.done:
                prefill.step()
            outcome = batch.join(prefill)
            if isinstance(outcome, NotFinite):
                raise outcome
            found[id(run)] += outcome
        for run, outcome in batch.step() if len(batch) else []:
            if isinstance(outcome, NotFinite):
                raise outcome
            found[id(run)] += outcome
        n += 1
    return [found[id(run)] for run in runs]


def ids(tokens: list[Token], sample: int = 0) -> Ids:
    return {row: [t.id for t in tokens if t.row == row and t.sample == sample] for row in ("default", "steered")}


def run(
    language: LanguageModel, tiny: Tiny, steered: Sequence[Intervention] = (), **asked: Any
) -> tuple[Ids, list[Token]]:
    [tokens] = grown(made(language, tiny, steered, **asked))
    return ids(tokens), tokens


@torch.no_grad()
def naive(language: LanguageModel, edit: Callable[[Tensor], Tensor], n: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities, the whole text through the model anew for each, one row.

    `edit` gets what comes out of the second block without the first position, [pos, d].
    """
    text, logprobs = language.to_ids(PROMPT), []

    def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1], edit(output[0, 1:]).unsqueeze(0)], dim=1)

    handle = language.blocks[1].register_forward_hook(hook)
    for _ in range(n):
        rows = language.hf(torch.tensor([text]), use_cache=False).logits[0, -1].log_softmax(-1)
        text.append(int(rows.argmax()))
        logprobs.append(float(rows.max()))
    handle.remove()
    return text[-n:], logprobs


def unit(coder: Coder) -> Tensor:
    return coder.W_dec[LATENT] / coder.W_dec[LATENT].norm()


def set_to(coder: Coder, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Replace a latent's activation in the reconstruction and keep the error, written out in full."""

    def edit(h: Tensor) -> Tensor:
        acts = coder.encode(h)
        error = h - coder.decode(acts)
        acts[:, LATENT] = change(acts[:, LATENT])
        return coder.decode(acts) + error

    return edit


def projected(coder: Coder, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    v = unit(coder)
    return lambda h: h + (change(h @ v) - h @ v).unsqueeze(-1) * v


NAIVE: dict[Operation, tuple[float, Callable[[Coder], Callable[[Tensor], Tensor]]]] = {
    Operation.ADD: (30.0, lambda coder: lambda h: h + 30 * unit(coder)),
    Operation.CLAMP: (25.0, lambda coder: set_to(coder, lambda a: torch.full_like(a, 25.0))),
    Operation.SCALE: (-6.0, lambda coder: set_to(coder, lambda a: -6 * a)),
    Operation.ABLATE: (0.0, lambda coder: set_to(coder, torch.zeros_like)),
    Operation.ORTHOGONAL: (-2.5, lambda coder: projected(coder, lambda p: -2.5 * p)),
    Operation.CAP: (-4.0, lambda coder: projected(coder, lambda p: p.clamp(max=-4.0))),
}


@pytest.mark.parametrize("operation", list(Operation))
def test_each_operation_is_that_of_a_loop_without_cache(
    operation: Operation, language: LanguageModel, tiny: Tiny, standard: Coder
) -> None:
    strength, edit = NAIVE[operation]
    found, tokens = run(language, tiny, [steer(language, tiny, standard, strength, operation=operation)])
    expected, logprobs = naive(language, edit(standard), 12)
    assert found["steered"] == expected
    assert [t.logprob for t in tokens if t.row == "steered"] == pytest.approx(logprobs, abs=1e-3)
    plain, default_logprobs = naive(language, lambda h: h, 12)
    assert found["default"] == plain
    assert logprobs != pytest.approx(default_logprobs, abs=1e-4)


def test_the_activation_of_a_topk_latent_is_replaced_whether_or_not_it_was_among_the_k(
    language: LanguageModel, tiny: Tiny, topk: Coder
) -> None:
    found, _ = run(language, tiny, [steer(language, tiny, topk, 20.0, operation=Operation.CLAMP)])
    assert found["steered"] == naive(language, set_to(topk, lambda a: torch.full_like(a, 20.0)), 12)[0]
    assert found["steered"] != found["default"]


@pytest.mark.parametrize(
    ("positions", "first", "last"),
    [
        (Positions.GENERATED, None, 10**6),
        (Positions.PROMPT, 0, None),
        (Positions.CHOSEN, 2, 4),
    ],
)
def test_only_the_asked_positions_are_steered(
    positions: Positions, first: int | None, last: int | None, language: LanguageModel, tiny: Tiny, topk: Coder
) -> None:
    n_prompt = len(language.to_ids(PROMPT)) - 1  # the loop's edit does not see the first position
    begin, end = (n_prompt if first is None else first), (n_prompt if last is None else last)

    def edit(h: Tensor) -> Tensor:
        h = h.clone()
        h[begin:end] += 40 * unit(topk)
        return h

    one = steer(language, tiny, topk, 40.0, positions=positions, at=[3, 4])
    found, _ = run(language, tiny, [one])
    assert found["steered"] == naive(language, edit, 12)[0]
    assert found["steered"] != found["default"]


def test_special_tokens_may_be_spared(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    eos = language.tokenizer.eos_token_id
    assert eos in language.card.special_token_ids
    place = 4
    prompt = language.to_ids(PROMPT)
    prompt[place] = eos
    whole, spared = (steer(language, tiny, topk, 60.0, spare_special=s) for s in (False, True))
    h = torch.randn(1, len(prompt), topk.d_in)

    def after(one: Intervention) -> Tensor:
        where = applied(language.card, 0, one, prompt, 0, len(prompt), language.device)
        assert where is not None
        return edits([where], 1)[HOOK](h)

    changed = [i for i in range(len(prompt)) if not torch.equal(after(spared)[0, i], h[0, i])]
    assert changed == [i for i in range(1, len(prompt)) if i != place]
    assert not torch.equal(after(whole)[0, place], h[0, place])


def test_features_of_several_layers_and_operations_act_in_one_pass(
    language: LanguageModel, tiny: Tiny, topk: Coder, standard: Coder
) -> None:
    lower = type(topk)(topk.tensors, {**topk.config, "metadata": {"hook_name": "blocks.0.hook_mlp_out"}})
    acting = [
        steer(language, tiny, lower, 8.0, latent=3),
        steer(language, tiny, standard, 0.0, operation=Operation.ABLATE),
        steer(language, tiny, topk, 12.0),
    ]

    def at_mlp(_module: Any, _args: Any, output: Tensor) -> Tensor:
        return torch.cat([output[:, :1], output[:, 1:] + 8 * lower.W_dec[3] / lower.W_dec[3].norm()], dim=1)

    handle = language.blocks[0].get_submodule("mlp").register_forward_hook(at_mlp)
    expected, _ = naive(language, lambda h: set_to(standard, torch.zeros_like)(h) + 12 * unit(topk), 12)
    handle.remove()
    found, _ = run(language, tiny, acting)
    assert found["steered"] == expected


def test_a_transcoder_is_clamped_where_it_writes_by_what_it_reads(language: LanguageModel, tiny: Tiny) -> None:
    torch.manual_seed(3)
    config = {
        "architecture": "transcoder",
        "metadata": {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"},
    }
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    coder = CODERS["transcoder"]({name: torch.randn(shape) for name, shape in shapes.items()}, config)
    mlp = language.blocks[1].get_submodule("mlp")

    def at_mlp(_module: Any, args: Any, output: Tensor) -> Tensor:
        a = coder.encode(args[0][0])[:, LATENT]
        shift = (9.0 - a).unsqueeze(-1) * coder.W_dec[LATENT]
        shift[0] = 0
        return output + shift

    handle = mlp.register_forward_hook(at_mlp)
    expected, _ = naive(language, lambda h: h, 12)
    handle.remove()
    found, _ = run(language, tiny, [steer(language, tiny, coder, 9.0, operation=Operation.CLAMP)])
    assert found["steered"] == expected
    assert found["steered"] != found["default"]


@pytest.mark.parametrize("operation", [Operation.ADD, Operation.CLAMP, Operation.ABLATE])
def test_a_vector_is_steered_along_like_a_feature(
    operation: Operation, language: LanguageModel, tiny: Tiny, topk: Coder
) -> None:
    numbers = (3 * topk.W_dec[LATENT]).numpy().astype("<f4").tobytes()
    asked = SteerDirection(
        hook_name=HOOK, vector=base64.b64encode(numbers).decode(), coefficient=22.0, operation=operation
    )
    changes: dict[Operation, Callable[[Tensor], Tensor]] = {
        Operation.ADD: lambda p: p + 22,
        Operation.CLAMP: lambda p: torch.full_like(p, 22.0),
        Operation.ABLATE: torch.zeros_like,
    }
    found, _ = run(language, tiny, [intervention(asked, {}, language)])
    assert found["steered"] == naive(language, projected(topk, changes[operation]), 12)[0]


def test_greedy_default_text_is_that_of_transformers(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    prompt = torch.tensor([language.to_ids(PROMPT)])
    text = language.hf.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40)
    expected = text[0, prompt.shape[1] :].tolist()
    found, _ = run(language, tiny, [steer(language, tiny, topk, 300.0)], max_new_tokens=40)
    stops = generation.stop_ids(language)
    assert found["default"] == [i for i in expected if i not in stops]


def test_a_dead_decoder_row_steers_nothing(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    dead = type(topk)(tensors={**topk.tensors, "W_dec": torch.zeros_like(topk.W_dec)}, config=topk.config)
    found, _ = run(language, tiny, [steer(language, tiny, dead, 100.0)])
    assert found["steered"] == found["default"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strength", [0.0, 1e-30])
def test_strength_zero_is_the_default_token_for_token(
    temperature: float, strength: float, language: LanguageModel, tiny: Tiny, topk: Coder
) -> None:
    found, tokens = run(
        language, tiny, [steer(language, tiny, topk, strength)], temperature=temperature, max_new_tokens=60
    )
    assert found["steered"] == found["default"]
    assert len(tokens) == 2 * len(found["default"])


def test_a_run_in_a_batch_of_eight_is_the_run_alone(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    """They join and leave at different times, with prompts, strengths and operations of their own."""
    prompts = [PROMPT, "rain fell", "seven hills and sailors sang of rivers, bread and iron", "the cat sat"] * 2
    operations = [Operation.ADD, Operation.CLAMP, Operation.ORTHOGONAL, Operation.CAP] * 2

    def one(n: int) -> Run:
        return made(
            language, tiny, [steer(language, tiny, topk, 3.0 * n - 9, operation=operations[n])], [prompts[n]] * 2,
            temperature=0.8 * (n % 3), seed=n, max_new_tokens=6 + 3 * (7 - n), n_logprobs=2, freq_penalty=0.5 * (n % 2),
        )  # fmt: skip

    together = grown(*(one(n) for n in range(8)), at=[0, 0, 1, 3, 3, 5, 9, 11])
    for n, tokens in enumerate(together):
        [alone] = grown(one(n))
        assert [(t.row, t.id) for t in tokens] == [(t.row, t.id) for t in alone]
        assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in alone], abs=1e-4)


def test_the_cache_drops_the_padding_that_a_longer_text_leaves_behind(
    language: LanguageModel, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest: list[int] = []
    select = cache.RowCache.select

    def watched(self: cache.RowCache, rows: Sequence[int], drop: int = 0) -> None:
        select(self, rows, drop)
        longest.append(self.get_seq_length())

    monkeypatch.setattr(cache.RowCache, "select", watched)
    long = made(language, tiny, prompts=["the cat sat on the mat " * 9] * 2, max_new_tokens=3)
    short = made(language, tiny, prompts=["the"] * 2, max_new_tokens=30)
    alone = grown(made(language, tiny, prompts=["the"] * 2, max_new_tokens=30))
    together = grown(long, short)
    assert [t.id for t in together[1]] == [t.id for t in alone[0]]
    assert longest[0] < 10


def test_a_seed_gives_the_same_text_again_and_another_seed_another(language: LanguageModel, tiny: Tiny) -> None:
    first, again, other = (run(language, tiny, temperature=1.0, seed=seed)[0] for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_samples_differ_and_the_first_is_the_one_made_alone(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    steered = [steer(language, tiny, topk, 10.0)]
    _, tokens = run(language, tiny, steered, temperature=1.0, n_samples=3)
    texts = [ids(tokens, sample) for sample in range(3)]
    assert texts[0] == run(language, tiny, steered, temperature=1.0)[0]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_default_and_steered_may_have_histories_of_their_own(language: LanguageModel, tiny: Tiny) -> None:
    [tokens] = grown(made(language, tiny, prompts=["the cat sat on the mat", "rain fell"]))
    for row, prompt in (("default", "the cat sat on the mat"), ("steered", "rain fell")):
        [alone] = grown(made(language, tiny, prompts=[prompt, prompt]))
        assert ids(tokens)[row] == ids(alone)["default"]


def test_sampling_follows_the_softmax(language: LanguageModel, tiny: Tiny) -> None:
    with torch.no_grad():
        expected = (language.hf(torch.tensor([language.to_ids(PROMPT)])).logits[0, -1] / 2.0).softmax(-1)
    drawn: list[int] = []
    for seed in range(94):
        _, tokens = run(language, tiny, temperature=2.0, seed=seed, max_new_tokens=1, n_samples=16)
        drawn += [token.id for token in tokens if token.row == "default"]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / len(drawn)
    assert float((counts - expected).abs().max()) < 0.04


@pytest.mark.parametrize(
    "bounds",
    [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.8, "min_p": 0.05}],
)
def test_bounds_leave_in_what_transformers_leaves_in(bounds: dict[str, Any]) -> None:
    torch.manual_seed(1)
    logits = 3 * torch.randn(1, 53)
    warpers: list[Any] = [TemperatureLogitsWarper(0.7)]
    warpers += [TopKLogitsWarper(bounds["top_k"])] if "top_k" in bounds else []
    warpers += [TopPLogitsWarper(bounds["top_p"])] if "top_p" in bounds else []
    warpers += [MinPLogitsWarper(bounds["min_p"])] if "min_p" in bounds else []
    expected = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.long), logits)[0].softmax(-1)
    found = sampling.bounded((logits[0] / 0.7).softmax(-1), sampling.Settings(temperature=0.7, **bounds))
    torch.testing.assert_close(found / found.sum(), expected)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    torch.manual_seed(1)
    logits, seen = torch.randn(1, 19), [3, 5, 5, 11]
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits.clone())[0]
    sampler = sampling.Sampler(sampling.Settings(repetition_penalty=1.7), 0, 0, seen)
    torch.testing.assert_close(sampler.penalised(logits[0]), expected)


def test_the_frequency_penalty_is_subtracted_once_for_each_time_generated(language: LanguageModel, tiny: Tiny) -> None:
    found, _ = run(language, tiny, freq_penalty=3.0, max_new_tokens=20)
    text, counts, expected = language.to_ids(PROMPT), torch.zeros(language.card.d_vocab), []
    for _ in range(20):
        with torch.no_grad():
            chosen = int((language.hf(torch.tensor([text])).logits[0, -1] - 3 * counts).argmax())
        counts[chosen] += 1
        text.append(chosen)
        expected.append(chosen)
    assert found["default"] == expected


def test_log_probabilities_are_the_models_own(language: LanguageModel, tiny: Tiny) -> None:
    _, tokens = run(language, tiny, temperature=0.7, freq_penalty=2.0, n_logprobs=3, max_new_tokens=1)
    with torch.no_grad():
        expected = language.hf(torch.tensor([language.to_ids(PROMPT)])).logits[0, -1].log_softmax(-1)
    token = tokens[0]
    assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-4)
    values, likeliest = expected.topk(3)
    assert [i for i, _ in token.top] == likeliest.tolist()
    assert [p for _, p in token.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("first", ["default", "steered"])
def test_a_row_that_ends_sends_nothing_more_and_the_other_goes_on(
    first: str, language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    steered = [steer(language, tiny, topk, 30.0)]
    whole, _ = run(language, tiny, steered)
    other = "steered" if first == "default" else "default"
    only = next(i for i in whole[first] if i not in whole[other])
    monkeypatch.setattr(generation, "stop_ids", lambda _: frozenset([only]))
    asked = made(language, tiny, steered)
    [tokens] = grown(asked)
    assert ids(tokens)[first] == whole[first][: whole[first].index(only)]
    assert ids(tokens)[other] == whole[other]
    assert sorted(asked.finish) == sorted([(first, 0, "eos"), (other, 0, "length")])


def test_a_text_ends_where_a_stop_string_begins_and_not_a_character_later(language: LanguageModel, tiny: Tiny) -> None:
    words = vocabulary(Path(tiny.model.path) / "vocabulary.json")
    whole, _ = run(language, tiny, max_new_tokens=30)
    text = words.text(whole["default"])
    stop = text[9:14]
    asked = made(language, tiny, words=words, max_new_tokens=30, stop=["never there", stop])
    [tokens] = grown(asked)
    shown = [t for t in tokens if t.row == "default"]
    strings = words.strings([t.id for t in shown])
    kept = "".join(s if t.keep is None else s[: t.keep] for t, s in zip(shown, strings, strict=True))
    assert kept == text[: text.index(stop)]
    assert ("default", 0, "stop") in asked.finish


@pytest.mark.parametrize("positions", [Positions.ALL, Positions.CHOSEN])
def test_a_long_prompt_is_read_in_pieces_with_the_same_outcome(
    positions: Positions, language: LanguageModel, tiny: Tiny, topk: Coder, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["rain fell all night long over seven hills while sailors sang of rivers"] * 2
    steered = [steer(language, tiny, topk, 20.0, positions=positions, at=[2, 7])]
    whole, _ = run(language, tiny, steered, prompts=prompts)
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 3)
    pieces, _ = run(language, tiny, steered, prompts=prompts)
    assert pieces == whole


def test_a_prompt_is_read_as_one_row_below_the_first_steered_layer(
    language: LanguageModel, tiny: Tiny, topk: Coder
) -> None:
    rows: list[list[int]] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out, n=n: rows.append([n, out.shape[0]]))
        for n, block in enumerate(language.blocks)
    ]
    for one in (steer(language, tiny, topk, 5.0), steer(language, tiny, topk, 5.0, positions=Positions.GENERATED)):
        prefill = Prefill(made(language, tiny, [one]))
        prefill.step()
    for handle in handles:
        handle.remove()
    assert rows == [[0, 1], [1, 2], [2, 2], [0, 1], [1, 1], [2, 1]]


def test_logits_that_overflow_end_their_run_and_no_other(language: LanguageModel, tiny: Tiny, topk: Coder) -> None:
    with pytest.raises(NotFinite, match="lower the strength"):
        run(language, tiny, [steer(language, tiny, topk, float("inf"))])
    batch, well = Batch(language), made(language, tiny)
    bad = made(language, tiny, [steer(language, tiny, topk, float("inf"), positions=Positions.GENERATED)])
    for one in (well, bad):
        prefill = Prefill(one)
        prefill.step()
        batch.join(prefill)
    outcomes = {id(one): outcome for one, outcome in batch.step()}
    assert isinstance(outcomes[id(bad)], NotFinite)
    assert isinstance(outcomes[id(well)], list)
    assert batch.runs == [well]
