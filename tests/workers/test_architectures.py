"""Tiny models of each architecture: their cards, hooks against transformers and transformer-lens, edits, caches."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from app.errors import BadInput
from app.protocol import GenerateRequest, ModelCard, ModelRef, SteerDirection, SteerRow
from tests.tiny import TEXT, save_tiny_model
from workers.gpu import generation
from workers.gpu.generation import Batch, Prefill, Run
from workers.gpu.interventions import intervention
from workers.install_model import install
from workers.language_model import HOOK_POINTS, LanguageModel

N_LAYERS, D_MODEL, N_HEADS, WINDOW = 3, 24, 4, 5


def sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 300,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEADS,
        "intermediate_size": 52,
        "max_position_embeddings": 96,
    } | more


GEMMA = {"num_key_value_heads": 2, "head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 10}
LOCAL_GLOBAL = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(vocab_size=300, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=96),
    "pythia": lambda: GPTNeoXConfig(**sizes(rotary_pct=0.5)),
    "neox-sequential": lambda: GPTNeoXConfig(**sizes(use_parallel_residual=False)),
    "llama": lambda: LlamaConfig(**sizes(num_key_value_heads=2)),
    "mistral": lambda: MistralConfig(**sizes(num_key_value_heads=2, head_dim=10, sliding_window=WINDOW)),
    "gemma2": lambda: Gemma2Config(**sizes(**GEMMA)),
    "gemma3-text": lambda: Gemma3TextConfig(**sizes(**GEMMA, **LOCAL_GLOBAL)),
    "qwen2": lambda: Qwen2Config(**sizes(num_key_value_heads=2)),
    "qwen3": lambda: Qwen3Config(**sizes(num_key_value_heads=2, head_dim=10)),
}
PARALLEL = {"pythia"}
SHIFT = torch.linspace(-1, 2, D_MODEL)
"""Not the same everywhere: a LayerNorm removes that."""


@dataclass(frozen=True)
class Made:
    """A tiny model on disk and in memory."""

    name: str
    path: Path
    card: ModelCard
    model: LanguageModel

    @property
    def ids(self) -> torch.Tensor:
        return torch.tensor([self.model.to_ids(TEXT)[:17], self.model.to_ids(TEXT[40:])[:17]])


@pytest.fixture(scope="module", params=CONFIGS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    name: str = request.param
    directory = tmp_path_factory.mktemp(name)
    save_tiny_model(directory / "hf")
    (directory / "hf" / "model.safetensors").unlink()
    torch.manual_seed(3)
    hf = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))  # norms and biases too: fresh ones hide a mistake
    hf.save_pretrained(directory / "hf")
    card = install("directory", str(directory / "hf"), name, name, directory)
    yield Made(name, directory / name, card, LanguageModel.load(directory / name))
    shutil.rmtree(directory)


def test_the_card_knows_the_language_model(made: Made) -> None:
    card = made.card
    head = 10 if made.name in ("mistral", "gemma2", "gemma3-text", "qwen3") else D_MODEL // N_HEADS
    assert (card.n_layers, card.d_model, card.n_heads, card.d_head) == (N_LAYERS, D_MODEL, N_HEADS, head)
    assert (card.d_mlp, card.d_vocab, card.n_ctx) == (4 * D_MODEL if made.name == "gpt2" else 52, 300, 96)
    assert (card.bos_token_id, card.has_chat_template) == (0, True)


def test_every_hook_of_every_layer_is_what_transformer_lens_says(made: Made) -> None:
    bridge = TransformerBridge.boot_transformers(str(made.path), device="cpu", dtype=torch.float32)
    bridge.set_use_hook_mlp_in(True)
    _, cache = bridge.run_with_cache(made.ids)
    names = [f"blocks.{layer}.{kind}" for layer in range(N_LAYERS) for kind in made.model.hook_kinds()]
    for name, acts in made.model.read(made.ids, names).items():
        expected = cache[name].reshape(acts.shape)
        scale = float(expected.abs().max())
        torch.testing.assert_close(acts / scale, expected / scale, rtol=0, atol=1e-5, msg=name)
    assert acts.shape[-1] == made.model.hook_size(name)
    missing = {"hook_resid_mid"} if made.name in PARALLEL else set[str]()
    assert set(made.model.hook_kinds()) == set(HOOK_POINTS) - missing


def test_residuals_are_the_hidden_states_of_transformers(made: Made) -> None:
    """In every layer. Its last hidden state has gone through the final norm, and here so does the last residual."""
    states = made.model.hf(made.ids, output_hidden_states=True).hidden_states
    assert len(states) == N_LAYERS + 1
    for layer in range(N_LAYERS):
        names = [f"blocks.{layer}.hook_resid_pre", f"blocks.{layer}.hook_resid_post"]
        pre, post = (made.model.read(made.ids, names)[name] for name in names)
        torch.testing.assert_close(pre, states[layer])
        last = layer == N_LAYERS - 1
        torch.testing.assert_close(made.model.final_norm()(post) if last else post, states[layer + 1])


def test_the_parts_of_a_block_add_up_to_its_output(made: Made) -> None:
    kinds = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    read = made.model.read(made.ids, [f"blocks.1.{kind}" for kind in kinds])
    pre, attn, mlp, post = (read[f"blocks.1.{kind}"] for kind in kinds)
    torch.testing.assert_close(pre + attn + mlp, post, rtol=1e-4, atol=1e-4)


def test_an_edit_changes_what_its_hook_stands_for_and_no_more(made: Made) -> None:
    names = {kind: f"blocks.1.{kind}" for kind in made.model.hook_kinds()}
    clean = made.model.read(made.ids, list(names.values()))
    mlp_change = _mlp_moved(made, names) - clean[names["hook_mlp_out"]]
    assert float(mlp_change.abs().max()) > 0.1
    # Where the stream moves before the MLP reads it, the MLP's output moves too.
    seen = SHIFT + mlp_change
    expected = {
        "hook_attn_out": SHIFT + 0 * seen if made.name in PARALLEL else seen,
        "hook_resid_mid": seen,
        "hook_mlp_in": mlp_change,
        "hook_mlp_out": SHIFT + 0 * seen,
        "hook_resid_post": SHIFT + 0 * seen,
    }
    for kind in expected.keys() & names.keys():
        with made.model.edited({names[kind]: lambda h: h + SHIFT}):
            moved = _read(made, "blocks.2.hook_resid_pre") - clean[names["hook_resid_post"]]
        torch.testing.assert_close(moved, expected[kind], rtol=1e-3, atol=1e-3, msg=kind)


def _read(made: Made, name: str) -> torch.Tensor:
    return made.model.read(made.ids, [name])[name]


def _mlp_moved(made: Made, names: dict[str, str]) -> torch.Tensor:
    """The MLP's output when its input alone is moved."""
    with made.model.edited({names["hook_mlp_in"]: lambda h: h + SHIFT}):
        return _read(made, names["hook_mlp_out"])


def test_generation_with_its_cache_equals_reading_everything_again(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 7)  # pieces longer than the sliding window, and a rest
    prompt = made.model.to_ids(TEXT)[:24]
    request = GenerateRequest(
        model=ModelRef(id=made.name, path=str(made.path)),
        rows=[SteerRow(name="default"), SteerRow(name="steered")],
        max_new_tokens=12,
        temperature=0,
    )
    names = [f"blocks.1.{kind}" for kind in ("hook_mlp_in", "hook_attn_out", "hook_resid_post")]
    edits = {name: lambda h: h + 0.7 * SHIFT for name in names}
    vector = base64.b64encode(SHIFT.numpy().astype("<f4").tobytes()).decode()
    steered = tuple(
        intervention(
            SteerDirection(hook_name=name, vector=vector, coefficient=0.7 * float(SHIFT.norm())), {}, made.model
        )
        for name in names
    )
    run = Run(made.model, request, [prompt, prompt], [(), steered])
    prefill, batch = Prefill(run), Batch(made.model)
    while not prefill.done:
        prefill.step()
    tokens = batch.join(prefill)
    assert isinstance(tokens, list)
    while len(batch):
        [(_, more)] = batch.step()
        assert isinstance(more, list)
        tokens += more
    found = {name: [token.id for token in tokens if token.row == name] for name in ("default", "steered")}
    assert found["default"] == _slowly(made.model, prompt, {}, len(found["default"]))
    # The first token has no activations, so it is not steered.
    spared = {name: lambda h: torch.cat([h[:, :1], h[:, 1:] + 0.7 * SHIFT], dim=1) for name in edits}
    assert found["steered"] == _slowly(made.model, prompt, spared, len(found["steered"]))


@torch.inference_mode()
def _slowly(model: LanguageModel, prompt: list[int], edits: dict[str, Any], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        with model.edited(edits):
            ids.append(int(model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_the_gain_of_the_final_norm_is_what_it_multiplies_by(made: Made) -> None:
    norm = made.model.final_norm()
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(0))
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else x
    expected = norm(x) - norm(torch.zeros_like(x))
    plain = centred / centred.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(plain * made.model.final_gain(), expected, rtol=1e-3, atol=1e-4)


def test_a_parallel_block_has_no_residual_in_its_middle(made: Made) -> None:
    if made.name in PARALLEL:
        with pytest.raises(BadInput, match=r"no hook 'blocks\.0\.hook_resid_mid'; known are"):
            made.model.hook_size("blocks.0.hook_resid_mid")
    else:
        assert made.model.hook_size("blocks.0.hook_resid_mid") == D_MODEL
