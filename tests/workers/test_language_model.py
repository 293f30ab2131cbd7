"""Activations against transformers' own hidden states and transformer-lens' hooks; edits; token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

from app.errors import BadInput
from app.tokens import vocabulary
from tests.tiny import TEXT, Tiny
from workers.language_model import HOOK_POINTS, LanguageModel


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> LanguageModel:
    return LanguageModel.load(Path(tiny.model.path))


def rows(model: LanguageModel) -> torch.Tensor:
    return torch.tensor([model.to_ids(TEXT)[:13], model.to_ids(TEXT[40:])[:13]])


def test_every_hook_of_every_layer_equals_transformer_lens(model: LanguageModel, tiny: Tiny) -> None:
    bridge = TransformerBridge.boot_transformers(tiny.model.path, device="cpu", dtype=torch.float32)
    _, cache = bridge.run_with_cache(rows(model))
    for layer in range(model.card.n_layers):
        names = [f"blocks.{layer}.{kind}" for kind in HOOK_POINTS if kind != "hook_mlp_in"]
        for name, acts in model.read(rows(model), names).items():
            expected = cache[name].reshape(acts.shape)
            scale = float(expected.abs().max())  # eager attention against SDPA: equal to rounding
            torch.testing.assert_close(acts / scale, expected / scale, rtol=0, atol=1e-5, msg=name)


def test_residuals_equal_the_hidden_states_of_transformers(model: LanguageModel) -> None:
    states = model.hf(rows(model), output_hidden_states=True).hidden_states
    for layer in range(model.card.n_layers - 1):  # transformers normalises the last one
        read = model.read(rows(model), [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_resid_post"])
        torch.testing.assert_close(read[f"blocks.{layer}.hook_resid_pre"], states[layer])
        torch.testing.assert_close(read[f"blocks.{layer}.hook_resid_post"], states[layer + 1])


def test_the_forward_pass_stops_at_the_deepest_hook(model: LanguageModel) -> None:
    ran: list[int] = []
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.blocks)]
    model.read(rows(model), ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"])
    for handle in handles:
        handle.remove()
    assert ran == [0]


def test_padding_changes_no_activation(model: LanguageModel) -> None:
    short, long = model.to_ids("the cat"), model.to_ids(TEXT)
    ids, mask = model.pad([short, long])
    hook = "blocks.2.hook_resid_post"
    padded = model.read(ids, [hook], mask)[hook]
    alone = model.read(torch.tensor([short]), [hook])[hook]
    torch.testing.assert_close(padded[:1, : len(short)], alone, rtol=1e-4, atol=1e-5)


def test_an_edit_reaches_the_logits_and_goes_away_again(model: LanguageModel) -> None:
    before = model.hf(rows(model)).logits
    with model.edited({"blocks.1.hook_resid_post": torch.zeros_like}):
        assert not torch.allclose(model.hf(rows(model)).logits, before)
    torch.testing.assert_close(model.hf(rows(model)).logits, before)


def test_logits_equal_those_of_transformers_on_the_same_directory(model: LanguageModel, tiny: Tiny) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tiny.model.path, dtype=torch.float32)
    torch.testing.assert_close(model.hf(rows(model)).logits, other(rows(model)).logits)


@pytest.mark.parametrize("name", ["blocks.9.hook_resid_post", "blocks.1.hook_nothing", "embed", "blocks.1.__class__"])
def test_an_unknown_hook_is_named_in_the_error(model: LanguageModel, name: str) -> None:
    with pytest.raises(BadInput, match=r"hook|layers"):
        model.hook_size(name)


def test_a_lone_surrogate_is_refused(model: LanguageModel) -> None:
    with pytest.raises(BadInput, match="surrogate at character 4"):
        model.to_ids("the \ud800")


def test_the_vocabulary_spells_every_text_exactly(model: LanguageModel, tiny: Tiny) -> None:
    words = vocabulary(Path(tiny.model.path) / "vocabulary.json")
    text = "the cat — naïve 猫 🙂\n\tend"
    assert "".join(words.strings(model.to_ids(text, prepend_bos=False))) == text
