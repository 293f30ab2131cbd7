"""Training losses and gradients against sae-lens' training classes and naive loops, and what becomes of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from app.trainspecs import Architecture
from workers.checkpoints import load_sae, save_sae
from workers.sae import sparse, training
from workers.sae.training import OBJECTIVES, Objective

B, D_IN, D_SAE, K = 7, 5, 96, 3
L1 = {"l1_coefficient": 0.7}
TOPK = {"k": K, "aux_k": D_IN // 2, "aux_coefficient": 0.5}
JUMP = {
    "l0_coefficient": 0.3,
    "bandwidth": 0.8,
    "initial_threshold": 0.2,
    "tanh_scale": 2.0,
    "pre_act_coefficient": 0.05,
}
BATCH = {**TOPK, "threshold_lr": 0.01}
FIELDS: dict[str, dict[str, Any]] = {
    "standard": L1,
    "gated": L1,
    "topk": TOPK,
    "jumprelu": {**JUMP, "penalty": "step"},
    "jumprelu tanh": {**JUMP, "penalty": "tanh"},
    "batchtopk": BATCH,
    "matryoshka_batchtopk": {**BATCH, "widths": (8, 40, D_SAE)},
    "transcoder": L1,
    "skip_transcoder": L1,
}
LENS: dict[str, dict[str, Any]] = {
    "standard": L1,
    "gated": L1,
    "topk": {"k": K},
    "jumprelu": {"jumprelu_sparsity_loss_mode": "step"},
    "jumprelu tanh": {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True, "jumprelu_tanh_scale": 2.0},
    "batchtopk": {"k": K},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [8, 40, D_SAE]},
}
NAMES = list(FIELDS)
PENALTIES: dict[str, set[str]] = {
    "standard": {"l1"},
    "gated": {"l1", "gate"},
    "topk": set(),
    "jumprelu": {"l0"},
    "jumprelu tanh": {"l0"},
    "batchtopk": set(),
    "matryoshka_batchtopk": {"inner_8", "inner_40"},
}
DEAD = {name: {"pre_act" if "jump" in name else "aux"} for name in PENALTIES if "topk" in name or "jump" in name}
TERMS = {
    "l1": "l1_loss",
    "l0": "l0_loss",
    "pre_act": "pre_act_loss",
    "gate": "auxiliary_reconstruction_loss",
    "aux": "auxiliary_reconstruction_loss",
    "inner_8": "inner_mse_loss_8",
    "inner_40": "inner_mse_loss_40",
}
"""Their names for what is added to the squared error."""


def objective(name: str, d_out: int = D_IN, **more: Any) -> Objective:
    return cast(Any, OBJECTIVES[name.split()[0]])(d_in=D_IN, d_out=d_out, d_sae=D_SAE, **(FIELDS[name] | more))


def drawn(made: Objective, seed: int = 3) -> dict[str, Tensor]:
    """Weights with nothing at its special initial value; decoder rows of norm 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = made.initial(torch.randn(made.d_out, generator=generator), generator)
    for name, tensor in weights.items():
        tensor += 0.2 * torch.rand(tensor.shape, generator=generator) if name == "threshold" else 0
        tensor += 0.3 * torch.randn(tensor.shape, generator=generator) if name != "threshold" else 0
    training.normalise_rows(weights["W_dec"])
    return {name: tensor.requires_grad_(True) for name, tensor in weights.items()}


def batch(d_out: int = D_IN) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = 2 * torch.randn(B, D_IN, generator=generator)
    return x, x if d_out == D_IN else torch.randn(B, d_out, generator=generator)


def nobody() -> Tensor:
    return torch.zeros(D_SAE, dtype=torch.bool)


def some_dead() -> Tensor:
    dead = nobody()
    dead[[2, 9, 11, 40, 41, 90]] = True
    return dead


def lens(name: str, weights: dict[str, Tensor], aux: float) -> Any:
    sae_class, config_class = get_sae_training_class(name.split()[0])
    own = LENS[name] | ({"aux_loss_coefficient": aux} if "topk" in name else {})
    if "jump" in name:
        own |= {"l0_coefficient": 0.3, "jumprelu_bandwidth": 0.8, "pre_act_loss_coefficient": 0.05}
    sae: Any = cast(Any, sae_class)(cast(Any, config_class)(d_in=D_IN, d_sae=D_SAE, **own))
    for parameter, tensor in weights.items():
        getattr(sae, parameter.removesuffix("_T")).data = (
            tensor.detach().T.clone() if parameter == "W_enc_T" else tensor.detach().clone()
        )
    return sae


def gradients(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the decoder's part along its rows, which the norm constraint removes."""
    found = {name: tensor.grad.clone() for name, tensor in weights.items() if tensor.grad is not None}
    rows = weights["W_dec"].detach()
    found["W_dec"] -= (found["W_dec"] * rows).sum(-1, keepdim=True) * rows
    return found


@pytest.mark.parametrize("dead", [nobody(), some_dead()], ids=["none dead", "some dead"])
@pytest.mark.parametrize("name", LENS)
def test_losses_and_gradients_are_sae_lens_s(name: str, dead: Tensor) -> None:
    made = objective(name)
    weights, (x, target) = drawn(made), batch()
    ours = made.losses(weights, x, target, dead, 1.0)
    (ours.total * ours.variance).backward()
    assert ours.error is not None
    # AuxK is over the variance of the error here, and not scaled down where few are dead.
    spread = (ours.error - ours.error.mean(0)).square().sum(-1).mean()
    theirs = lens(name, weights, aux=float(0.5 * ours.variance / spread))
    coefficients = {n: float(getattr(c, "value", c)) for n, c in theirs.get_coefficients().items()}
    told = theirs.training_forward_pass(
        TrainStepInput(
            sae_in=x, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
        )
    )
    told.loss.backward()
    assert float(ours.mse) == pytest.approx(float(told.losses["mse_loss"]), rel=1e-5)
    assert set(ours.penalties) == PENALTIES[name] | (DEAD.get(name, set()) if bool(dead.any()) else set())
    for own, other in ours.penalties.items():
        assert float(other) == pytest.approx(float(told.losses[TERMS[own]]), rel=1e-5)
    assert float(ours.total * ours.variance) == pytest.approx(float(told.loss), rel=1e-5)
    assert float(ours.l0) == pytest.approx(float((told.feature_acts > 0).sum(-1).float().mean()))
    assert torch.equal(ours.fired, (told.feature_acts > 0).any(0))
    reference = {n: getattr(theirs, n.removesuffix("_T")) for n in weights}
    expected = gradients({n: _transposed(p) if n == "W_enc_T" else p for n, p in reference.items()})
    for n, gradient in gradients(weights).items():
        scale = float(expected[n].abs().max())
        torch.testing.assert_close(gradient, expected[n], rtol=1e-5, atol=1e-5 * scale, msg=lambda m, n=n: f"{n}: {m}")


def _transposed(p: Tensor) -> Tensor:
    q = p.detach().T
    q.grad = p.grad.T if p.grad is not None else None
    return q


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
def test_a_transcoder_s_loss_is_that_of_a_loop(name: str) -> None:
    made = objective(name, d_out=4)
    weights, (x, target) = drawn(made), batch(4)
    w = {n: t.detach() for n, t in weights.items()}
    mse = l1 = 0.0
    for row in range(B):
        acts = [max(0.0, float(w["W_enc_T"][j] @ x[row] + w["b_enc"][j])) for j in range(D_SAE)]
        y = w["b_dec"] + sum(a * w["W_dec"][j] for j, a in enumerate(acts))
        if name == "skip_transcoder":
            y = y + w["W_skip"] @ x[row]
        mse += float((target[row] - y).square().sum()) / B
        l1 += 0.5 * 0.7 * sum(acts) / B
    ours = made.losses(weights, x, target, nobody(), 0.5)
    assert float(ours.mse) == pytest.approx(mse, rel=1e-5)
    assert float(ours.penalties["l1"]) == pytest.approx(l1, rel=1e-5)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka_batchtopk"])
def test_sparse_products_are_the_dense_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = objective(name)
    found: list[tuple[Any, dict[str, Tensor]]] = []
    for share in (1.0, 0.0):
        monkeypatch.setattr(training, "_SPARSE_SHARE", share)
        weights, (x, target) = drawn(made), batch()
        losses = made.losses(weights, x, target, some_dead(), 1.0)
        losses.total.backward()
        found.append((losses, gradients(weights)))
    (fast, a), (slow, b) = found
    torch.testing.assert_close(fast.total, slow.total)
    assert torch.equal(fast.fired, slow.fired)
    for name_of, gradient in a.items():
        torch.testing.assert_close(gradient, b[name_of], rtol=1e-5, atol=1e-6)


def test_the_batch_s_largest_are_found_wherever_they_lie() -> None:
    generator = torch.Generator().manual_seed(1)
    for pre_acts in (
        torch.randn(50, 3000, generator=generator),
        torch.randn(50, 3000, generator=generator) - 4,  # fewer positive ones than asked for
        torch.randn(50, 3000, generator=generator).abs() * (torch.arange(50) == 7)[:, None],
        torch.zeros(50, 3000),
    ):
        pattern = sparse.choose_batch(pre_acts, 4)
        chosen = torch.zeros_like(pre_acts)
        chosen[pattern.rows, pattern.latents] = pre_acts[pattern.rows, pattern.latents]
        flat = pre_acts.relu().flatten()
        values, places = flat.topk(200)
        expected = torch.zeros_like(flat).scatter(0, places, values).view_as(pre_acts)
        assert torch.equal(chosen.relu(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_sae_lens_reads_the_folded_sae_and_reconstructs_the_model_s_own_activations(name: str, tmp_path: Path) -> None:
    transcoder = "transcoder" in name
    made = objective(name, d_out=4 if transcoder else D_IN)
    weights, (x, _) = drawn(made), batch()
    scale_in, scale_out = 0.25, 4.0 if transcoder else 0.25
    target = torch.zeros(B, made.d_out)
    losses = made.losses(weights, x * scale_in, target, nobody(), 1.0)
    assert losses.error is not None
    least = float(losses.least) * (1 - 1e-6) if losses.least is not None else 0.0
    folded = made.fold(weights, scale_in, scale_out, {"threshold": least})
    hooks = {
        "hook_name": "blocks.1.hook_resid_post",
        **({"hook_name_out": "blocks.1.hook_mlp_out"} if transcoder else {}),
    }
    config = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu", "normalize_activations": "none"}
    save_sae(tmp_path, {**config, "metadata": hooks, **folded.config}, folded.tensors)
    theirs, ours = cast(Any, SAE.load_from_disk(str(tmp_path))), load_sae(tmp_path)
    expected = -losses.error / scale_out  # the target was 0
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.predict(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.W_dec.norm(dim=-1), torch.ones(D_SAE))


def test_resampled_latents_point_to_what_is_reconstructed_worst() -> None:
    made = objective("gated")
    weights = {n: t.detach() for n, t in drawn(made).items()}
    dead, error = some_dead(), 1e-3 * torch.randn(B, D_IN, generator=torch.Generator().manual_seed(0))
    error[4] = torch.tensor([3.0, 0, 0, 4.0, 0])
    changed = training.resampled(weights, dead, error, error, torch.Generator().manual_seed(1))
    torch.testing.assert_close(changed["W_dec"][dead], torch.tensor([0.6, 0, 0, 0.8, 0]).expand(6, -1))
    alive = 0.2 * weights["W_enc_T"][~dead].norm(dim=-1).mean()
    torch.testing.assert_close(changed["W_enc_T"][dead].norm(dim=-1), alive.expand(6))
    assert not changed["b_mag"][dead].any()
    assert torch.equal(changed["W_dec"][~dead], weights["W_dec"][~dead])


def test_a_threshold_below_zero_is_brought_back() -> None:
    made = objective("jumprelu")
    weights = {n: t.detach() for n, t in drawn(made).items()}
    weights["threshold"][3] = -1
    made.project(weights)
    assert float(weights["threshold"][3]) == 0


def test_every_architecture_of_the_spec_has_its_class() -> None:
    assert set(OBJECTIVES) == set(Architecture)
