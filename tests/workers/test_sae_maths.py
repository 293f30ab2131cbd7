"""Losses, statistics and logit effects against plain formulas."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from workers.sae.coders import StandardCoder
from workers.sae.logits import fold_final_norm, logit_effects, nearest_between, nearest_rows
from workers.sae.stats import ReconstructionStats
from workers.sae.training import TopK, normalise_rows, remove_parallel_gradient

D_IN, D_SAE, K, BATCH = 5, 9, 3, 7


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


OBJECTIVE = TopK(D_IN, D_IN, D_SAE, k=K, aux_k=2, aux_coefficient=1.0)


def parameters() -> dict[str, torch.Tensor]:
    drawn = OBJECTIVE.initial(random(D_IN, seed=5), torch.Generator().manual_seed(1))
    return {name: torch.nn.Parameter(tensor) for name, tensor in drawn.items()}


def test_predicting_the_mean_explains_no_variance_and_the_identity_all() -> None:
    x = random(BATCH, D_IN) + 100
    for x_hat, explained in ((x.mean(0).expand_as(x), 0.0), (x, 1.0)):
        stats = ReconstructionStats()
        stats.add_reconstruction(x, x_hat)
        assert stats.metrics()["explained_variance"] == pytest.approx(explained, abs=1e-9)


def test_metrics_do_not_depend_on_how_rows_are_batched() -> None:
    p = parameters()
    coder = StandardCoder(tensors={**p, "W_enc": p["W_enc_T"].T}, config={"metadata": {"hook_name": "x"}})
    x = random(BATCH, D_IN)
    whole, parts = ReconstructionStats(), ReconstructionStats()
    with torch.no_grad():
        whole.add(x, coder)
        for part in x.split(2):
            parts.add(part, coder)
    assert whole.metrics() == pytest.approx(parts.metrics())


def test_the_loss_is_one_minus_explained_variance_of_the_k_largest() -> None:
    x, p = random(BATCH, D_IN, seed=2), parameters()
    loss = OBJECTIVE.losses(p, x, x, torch.zeros(D_SAE, dtype=torch.bool), 1.0)
    x_hat = torch.zeros_like(x)
    for row in range(BATCH):
        pre = p["W_enc_T"] @ (x[row] - p["b_dec"]) + p["b_enc"]
        for latent in sorted(range(D_SAE), key=lambda i: -pre[i].item())[:K]:
            x_hat[row] += pre[latent].clamp_min(0) * p["W_dec"][latent]
        x_hat[row] += p["b_dec"]
    expected = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    torch.testing.assert_close(loss.total, expected)


def test_only_dead_latents_learn_from_the_aux_loss() -> None:
    x, p = random(BATCH, D_IN, seed=2), parameters()
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[[2, 6]] = True
    with_aux = OBJECTIVE.losses(p, x, x, dead, 1.0)
    without = OBJECTIVE.losses(p, x, x, torch.zeros_like(dead), 1.0)
    (with_aux.total - without.total).backward()
    grad = p["W_dec"].grad
    assert grad is not None
    assert set(grad.abs().sum(-1).nonzero().flatten().tolist()) <= {2, 6}
    assert float(with_aux.penalties["aux"]) > 0


def test_decoder_rows_keep_norm_one_and_gradients_stay_orthogonal() -> None:
    W_dec = parameters()["W_dec"]
    (W_dec * random(D_SAE, D_IN, seed=4)).sum().backward()
    remove_parallel_gradient(W_dec)
    assert W_dec.grad is not None
    torch.testing.assert_close((W_dec.grad * W_dec).sum(-1), torch.zeros(D_SAE), atol=1e-6, rtol=0)
    with torch.no_grad():
        W_dec.add_(random(D_SAE, D_IN, seed=6))
    normalise_rows(W_dec)
    torch.testing.assert_close(W_dec.norm(dim=-1), torch.ones(D_SAE))


def test_logit_effects_equal_a_loop_over_the_vocabulary() -> None:
    rows, unembedding, weight = random(3, D_IN), random(12, D_IN, seed=3), random(D_IN, seed=9)
    effects = logit_effects(fold_final_norm(rows, weight, centred=False), unembedding, n=4)
    for row in range(3):
        each = [float((rows[row] * weight) @ unembedding[t]) for t in range(12)]
        order = sorted(range(12), key=lambda t: -each[t])
        assert effects.top_ids[row].tolist() == order[:4]
        assert effects.bottom_ids[row].tolist() == order[::-1][:4]
        assert effects.histogram[row].tolist() == np.histogram(each, bins=50)[0].tolist()
        assert float(effects.high[row]) == pytest.approx(max(each), abs=1e-6)
        z = (np.array(each) - np.mean(each)) / np.std(each)
        assert float(effects.mean[row]) == pytest.approx(np.mean(each), abs=1e-5)
        assert float(effects.deviation[row]) == pytest.approx(np.std(each), abs=1e-5)
        assert float(effects.skew[row]) == pytest.approx((z**3).mean(), abs=1e-4)
        assert float(effects.kurtosis[row]) == pytest.approx((z**4).mean(), abs=1e-4)


def test_a_layernorm_takes_the_mean_out_of_the_direction() -> None:
    rows, unembedding, weight = random(3, D_IN), random(12, D_IN, seed=3), random(D_IN, seed=9)
    by_token = unembedding * weight
    by_token -= by_token.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(fold_final_norm(rows, weight, centred=True) @ unembedding.T, rows @ by_token.T)


def test_nearest_rows_leave_out_the_row_itself() -> None:
    W_dec = random(D_SAE, D_IN)
    found = nearest_rows(torch.nn.functional.normalize(W_dec, dim=-1), 4, 7, n=3)
    for place, row in enumerate(range(4, 7)):
        cosines = torch.cosine_similarity(W_dec[row], W_dec, dim=-1)
        cosines[row] = -2
        torch.testing.assert_close(found.cosines[place], cosines.topk(3).values)
        assert found.indices[place].tolist() == cosines.topk(3).indices.tolist()


def test_nearest_features_of_another_sae_equal_the_whole_matrix_of_cosines() -> None:
    rows, others = random(13, D_IN, seed=2), random(7, D_IN, seed=4)
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], others[None], dim=-1)
    found = nearest_between(rows, others, n=3, block=5)
    expected = cosines.topk(3, dim=-1)
    assert found.indices.tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.cosines, expected.values)


def test_effects_on_a_vocabulary_of_256k_take_little_memory() -> None:
    program = """
import resource, torch
from workers.memory import keep_freed_memory
from workers.sae.logits import logit_effects
keep_freed_memory()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
unembedding = torch.randn(256_000, 8)
logit_effects(torch.randn(1, 8), unembedding[:1000])
before = peak()
found = logit_effects(torch.randn(600, 8), unembedding)
assert found.histogram.sum(dim=1).eq(256_000).all()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 600  # MiB; all rows at once would take 3,500 with histogram and moments
