"""Every architecture and switch against sae-lens on the same weights, and the fast paths against the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE

from workers.checkpoints import load_sae, save_sae
from workers.sae.coders import CODERS, Coder

D_IN, D_SAE, K, BATCH = 6, 11, 4, 5


def tensors(architecture: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    made = {"W_enc": random(D_IN, D_SAE), "W_dec": random(D_SAE, D_IN), "b_dec": random(D_IN)}
    for name in CODERS[architecture].parameters:
        made.setdefault(name, random(D_SAE) * 0.3)
    if architecture == "jumprelu":
        made["threshold"] = made["threshold"].abs()
    return made


def config(architecture: str, **switches: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "architecture": architecture,
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"},
    }
    return base | ({"k": K} if architecture == "topk" else {}) | switches


SWITCHES: list[dict[str, Any]] = [
    {},
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"normalize_activations": "expected_average_only_in"},
]
CASES = [(a, s) for a in CODERS for s in SWITCHES] + [("topk", {"rescale_acts_by_decoder_norm": True})]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} {case[1]}")
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Coder, SAE[Any]]:
    architecture, switches = request.param
    save_sae(tmp_path, config(architecture, **switches), tensors(architecture))
    return load_sae(tmp_path), SAE.load_from_disk(str(tmp_path))


def inputs() -> torch.Tensor:
    return 3 * torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(8)) + 0.5


def test_activations_and_reconstructions_equal_those_of_sae_lens(pair: tuple[Coder, SAE[Any]]) -> None:
    ours, theirs = pair
    x = inputs()
    with torch.no_grad():
        acts = theirs.encode(x)
        torch.testing.assert_close(ours.encode(x), acts, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.reconstruct(x), theirs.decode(acts), rtol=1e-5, atol=1e-5)
    assert (acts > 0).any()
    assert (acts == 0).any()


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
