"""Every architecture and switch against sae-lens on the same weights, and the fast paths against the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from workers.checkpoints import load_sae, save_sae
from workers.sae.coders import CODERS, Coder, fold_decoder_norms

D_IN, D_OUT, D_SAE, K, BATCH, N_HEADS = 6, 7, 11, 4, 5, 2
TRANSCODERS = [name for name in CODERS if "transcoder" in name]
TRAINED = Path(__file__).parents[2] / "app" / "demo" / "bundle" / "sae"


def tensors(architecture: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    d_out = D_OUT if architecture in TRANSCODERS else D_IN
    made = {"W_enc": random(D_IN, D_SAE), "W_dec": random(D_SAE, d_out), "b_dec": random(d_out)}
    for name in CODERS[architecture].parameters:
        made.setdefault(name, random(d_out, D_IN) if name == "W_skip" else random(D_SAE) * 0.3)
    if "threshold" in made:
        made["threshold"] = made["threshold"].abs()
    return made


def config(architecture: str, **switches: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": architecture not in TRANSCODERS,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
        if architecture in TRANSCODERS
        else {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"},
    }
    own = {"k": K} if architecture == "topk" else {"d_out": D_OUT} if architecture in TRANSCODERS else {}
    return base | own | switches


NORMALISATIONS: list[dict[str, Any]] = [
    {"normalize_activations": name} for name in ("layer_norm", "constant_norm_rescale", "expected_average_only_in")
]
CASES = [
    (architecture, switches)
    for architecture in CODERS
    for switches in [{}, *NORMALISATIONS, *([] if architecture in TRANSCODERS else [{"apply_b_dec_to_input": False}])]
] + [
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"}),
    ("jumprelu", {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm"}),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} {case[1]}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Coder, SAE[Any]]:
    architecture, switches = request.param
    save_sae(tmp_path, config(architecture, **switches), tensors(architecture))
    return load_sae(tmp_path), SAE.load_from_disk(str(tmp_path))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def inputs() -> torch.Tensor:
    return 3 * torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(8)) + 0.5


def test_activations_and_reconstructions_equal_those_of_sae_lens(pair: tuple[Coder, SAE[Any]]) -> None:
    ours, theirs = pair
    x = inputs()
    with torch.no_grad():
        acts, x_hat = theirs.encode(x), theirs(x)
    assert apart(ours.encode(x), acts) < 1e-5
    assert apart(ours.reconstruct(x), x_hat) < 1e-5
    target = x if ours.d_out == ours.d_in else torch.ones(BATCH, ours.d_out)
    assert apart(ours.error(x, target), target - x_hat) < 1e-5
    assert (acts > 0).any()
    assert (acts == 0).any()


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1e3])
@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_normalisation_agrees_for_inputs_of_any_size(tmp_path: Path, normalisation: str, size: float) -> None:
    save_sae(tmp_path, config("standard", normalize_activations=normalisation), tensors("standard"))
    ours, theirs = load_sae(tmp_path), SAE.load_from_disk(str(tmp_path))
    x = inputs() * size
    with torch.no_grad():
        assert apart(ours.encode(x), theirs.encode(x)) < 1e-5
        assert apart(ours.reconstruct(x), theirs(x)) < 1e-5


def test_attention_z_with_flattened_heads_gives_what_sae_lens_makes_of_its_heads(tmp_path: Path) -> None:
    z = {"reshape_activations": "hook_z", "metadata": {"hook_name": "blocks.1.attn.hook_z"}}
    save_sae(tmp_path, config("jumprelu", **z), tensors("jumprelu"))
    ours, theirs = load_sae(tmp_path), SAE.load_from_disk(str(tmp_path))
    x = inputs()
    with torch.no_grad():
        heads = x.view(BATCH, N_HEADS, D_IN // N_HEADS)
        assert apart(ours.encode(x), theirs.encode(heads)) < 1e-5
        assert apart(ours.reconstruct(x), theirs(heads).flatten(-2)) < 1e-5


@pytest.mark.parametrize("architecture", [name for name in CODERS if name != "topk"])
def test_folded_decoder_norms_equal_those_of_sae_lens(tmp_path: Path, architecture: str) -> None:
    save_sae(tmp_path, config(architecture), tensors(architecture))
    ours, theirs = fold_decoder_norms(load_sae(tmp_path)), SAE.load_from_disk(str(tmp_path), fold_W_dec_norm=True)
    with torch.no_grad():
        assert apart(ours.encode(inputs()), theirs.encode(inputs())) < 1e-5
        assert apart(ours.reconstruct(inputs()), theirs(inputs())) < 1e-5
    torch.testing.assert_close(ours.W_dec.norm(dim=-1), torch.ones(D_SAE))


def test_a_topk_sae_is_folded_only_where_that_keeps_its_choice(tmp_path: Path) -> None:
    save_sae(tmp_path, config("topk", rescale_acts_by_decoder_norm=True), tensors("topk"))
    scaled = load_sae(tmp_path)
    folded = fold_decoder_norms(scaled)
    assert apart(folded.encode(inputs()), scaled.encode(inputs())) < 1e-5
    assert apart(folded.reconstruct(inputs()), scaled.reconstruct(inputs())) < 1e-5
    with pytest.raises(ValueError, match="changes the choice"):
        fold_decoder_norms(type(scaled)(scaled.tensors, config("topk")))


def test_the_trained_weights_of_the_demo_agree_with_sae_lens() -> None:
    ours, theirs = load_sae(TRAINED), SAE.load_from_disk(str(TRAINED))
    x = 40 * torch.randn(64, ours.d_in, generator=torch.Generator().manual_seed(1)) + ours.b_dec
    with torch.no_grad():
        acts, x_hat = theirs.encode(x), theirs(x)
    assert apart(ours.encode(x), acts) < 1e-5
    assert apart(ours.reconstruct(x), x_hat) < 1e-5
    assert apart(ours.error(x), x - x_hat) < 1e-5


def test_a_transcoder_writes_where_its_config_says(tmp_path: Path) -> None:
    save_sae(tmp_path, config("transcoder"), tensors("transcoder"))
    coder = load_sae(tmp_path)
    assert (coder.d_in, coder.d_out) == (D_IN, D_OUT)
    assert (coder.hook_name, coder.hook_name_out) == ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out")


def test_some_latents_cost_less_and_have_the_same_activations(pair: tuple[Coder, SAE[Any]]) -> None:
    ours, _ = pair
    latents = torch.tensor([7, 0, 3])
    torch.testing.assert_close(ours.encode_latents(inputs(), latents), ours.encode(inputs())[:, latents])


def test_topk_and_sparse_forms_hold_the_same_activations(pair: tuple[Coder, SAE[Any]]) -> None:
    ours, _ = pair
    acts = ours.encode(inputs())
    top = ours.encode_topk(inputs(), 3)
    torch.testing.assert_close(top.values, acts.topk(3).values)
    torch.testing.assert_close(acts.gather(1, top.indices), top.values)
    sparse = ours.encode_sparse(inputs())
    dense = torch.zeros_like(acts)
    dense[sparse.rows, sparse.latents] = sparse.values
    torch.testing.assert_close(dense, acts)


def test_sixteen_bit_weights_are_read_by_sae_lens_too(tmp_path: Path) -> None:
    save_sae(tmp_path, config("topk"), tensors("topk"), torch.float16)
    ours, theirs = load_sae(tmp_path), SAE.load_from_disk(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(inputs()), theirs.encode(inputs()).float(), rtol=1e-5, atol=1e-5)


def test_what_latents_write_and_what_is_written_without_them_add_up(pair: tuple[Coder, SAE[Any]]) -> None:
    ours, _ = pair
    x = inputs()
    active, writes, without = ours.parts(x)
    assert apart(without.index_add(0, active.rows, writes), ours.reconstruct(x)) < 1e-5
