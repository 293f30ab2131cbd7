"""Attribution in every architecture: terms add up to the logit, estimates meet the true change, losses are the model's.

Also here, since it needs the same models: a text's activations alone and in padded batches, against sae-lens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from torch.nn.functional import cross_entropy

from app.errors import BadInput
from app.protocol import SaeQuery, SaeRef, Target
from tests.tiny import D_SAE, TEXT, save_tiny_sae
from tests.workers.test_architectures import Made, made
from workers.checkpoints import load_sae
from workers.gpu import attribution
from workers.gpu.encoding import Text, encode
from workers.language_model import LanguageModel
from workers.sae.coders import Coder

__all__ = ["made"]
P = 9


def coder_at(directory: Path, hook: str, width: int, architecture: str = "topk", **config: Any) -> Coder:
    save_tiny_sae(directory, architecture, seed=5, hook=hook, d_in=width, **config)
    return load_sae(directory)


def ids_of(model: LanguageModel) -> list[int]:
    return model.to_ids(TEXT)[:17]


def true_logits(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(torch.tensor([ids])).logits[0].float()


def uncapped(model: LanguageModel, logits: torch.Tensor) -> torch.Tensor:
    most = getattr(model.hf.config, "final_logit_softcapping", None)
    return logits if not most else most * torch.atanh(logits / most)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("hook_resid_post", {}),
        ("hook_resid_pre", {"normalize_activations": "layer_norm"}),
        ("hook_mlp_out", {"normalize_activations": "constant_norm_rescale"}),
        ("hook_attn_out", {"architecture": "standard"}),
        ("attn.hook_z", {}),
    ],
)
def test_the_terms_add_up_to_the_logit(made: Made, tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    model, hook = made.model, f"blocks.1.{kind}"
    coder, ids = coder_at(tmp_path / "sae", hook, model.hook_size(hook), **config), ids_of(model)
    logits = true_logits(model, ids)[P]
    if kind == "attn.hook_z" and made.name.startswith("gemma"):
        with pytest.raises(BadInput, match="normalises what attention writes"):
            attribution.attribute(model, coder, ids, Target(position=P, token=3), 5)
        return
    for against in (None, 11):
        found = attribution.attribute(model, coder, ids, Target(position=P, token=7, against=against), 3)
        expected = uncapped(model, logits)[7] - (0 if against is None else uncapped(model, logits)[against])
        terms = [f.value for f in found.features]
        total = sum(terms) + found.rest + found.bias + found.error + found.elsewhere + found.constant
        assert total == pytest.approx(float(expected), abs=1e-3 * max(1.0, abs(float(expected))))
        assert found.logit == pytest.approx(total, abs=1e-3 * max(1.0, abs(total)))
        assert found.capped == pytest.approx(float(logits[7] - (0 if against is None else logits[against])), abs=1e-3)
        assert len(terms) == 3
        assert sorted(terms, key=abs, reverse=True) == terms


def test_a_hook_that_only_a_module_reads_has_no_direct_part(made: Made, tmp_path: Path) -> None:
    coder, ids = coder_at(tmp_path / "sae", "blocks.1.hook_mlp_in", made.model.card.d_model), ids_of(made.model)
    with pytest.raises(BadInput, match="not to the residual stream"):
        attribution.attribute(made.model, coder, ids, Target(position=P, token=3), 5)
    assert attribution.gradient(made.model, coder, ids, Target(position=P, token=3), 5).positions
    latent = encode(made.model, [Text(ids, [(coder, SaeQuery(sae=SaeRef(id="x", path="x"), top_k=1))])])[0][0]
    ablated = attribution.ablate(made.model, coder, ids, latent.top_indices[P][0], Target(position=P, token=3), None)
    assert ablated.direct is None
    assert ablated.before != ablated.after


def test_predictions_and_losses_are_the_models_own(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(made.model)
    monkeypatch.setattr(attribution, "LOGIT_BYTES", 4 * 300 * 5)  # several pieces
    found = attribution.predict(made.model, ids, 4)
    logits = true_logits(made.model, ids)
    probabilities, best = logits.softmax(-1).topk(4)
    assert [p.ids for p in found] == best.tolist()
    np.testing.assert_allclose([p.probabilities for p in found], probabilities, atol=1e-5)
    losses = cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    np.testing.assert_allclose([p.loss for p in found[:-1]], losses, atol=1e-3)  # type: ignore[arg-type]
    assert found[-1].loss is None
    assert attribution.predict(made.model, ids, 4, P)[0].ids == best[P].tolist()


def test_at_the_last_layer_direct_gradient_and_true_change_meet(made: Made, tmp_path: Path) -> None:
    hook, ids = "blocks.2.hook_resid_post", ids_of(made.model)
    coder = coder_at(tmp_path / "sae", hook, made.model.card.d_model, scale=1e-3)
    target = Target(position=P, token=7, against=11)
    direct = attribution.attribute(made.model, coder, ids, target, 5)
    assert direct.elsewhere == pytest.approx(0, abs=1e-4 * max(1.0, abs(direct.logit)))
    feature = max(direct.features, key=lambda f: abs(f.value))
    slopes = attribution.gradient(made.model, coder, ids, target, 1000)
    assert {position for position, *_ in slopes.positions if abs(_[-1]) > 1e-7} == {P}, "later tokens see nothing"
    by_gradient = {latent: effect for position, latent, _, effect in slopes.positions if position == P}
    ablated = attribution.ablate(made.model, coder, ids, feature.latent, target, P)
    assert ablated.direct == pytest.approx(feature.value, rel=1e-3)
    assert ablated.gradient == pytest.approx(by_gradient[feature.latent], rel=1e-3)
    true_change = ablated.before - ablated.after
    assert true_change == pytest.approx(ablated.gradient, rel=0.05, abs=2e-4 * max(1.0, abs(ablated.before)))


def test_small_writes_in_an_early_layer_change_the_loss_as_the_gradient_says(made: Made, tmp_path: Path) -> None:
    hook, ids = "blocks.0.hook_resid_post", ids_of(made.model)
    coder = coder_at(tmp_path / "sae", hook, made.model.card.d_model, scale=3e-3)
    slopes = attribution.gradient(made.model, coder, ids, None, 100)
    latent, effect = slopes.latents[0]
    ablated = attribution.ablate(made.model, coder, ids, latent, Target(position=P, token=7), None)
    assert ablated.loss_before == pytest.approx(slopes.value, abs=1e-4)
    assert ablated.loss_before - ablated.loss_after == pytest.approx(effect, rel=0.3, abs=1e-3)
    later = attribution.gradient(made.model, coder, ids, None, 1000, skip=1)
    every = attribution.gradient(made.model, coder, ids, None, 1000)
    assert sorted(later.positions) == sorted(p for p in every.positions if p[0] > 0)
    assert later.value == every.value
    summed = sum(value for _, at, _, value in slopes.positions if at == latent)
    assert summed == pytest.approx(effect, rel=1e-2, abs=1e-6)


def test_faithfulness_is_what_splicing_by_hand_gives(made: Made, tmp_path: Path) -> None:
    hook, ids = "blocks.1.hook_resid_post", ids_of(made.model)
    coder = coder_at(tmp_path / "sae", hook, made.model.card.d_model)
    theirs = SAE.load_from_disk(tmp_path / "sae")
    found = attribution.faithful(made.model, coder, ids)
    with torch.no_grad():
        x = made.model.read(torch.tensor([ids]), [hook])[hook][0]
        acts = theirs.encode(x)
        x_hat = theirs.decode(acts)
    rest, hat = x[1:], x_hat[1:]
    variance = (rest - rest.mean(0)).square().sum()
    assert found.explained_variance == pytest.approx(float(1 - (rest - hat).square().sum() / variance), rel=1e-4)
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(rest, hat, dim=-1).mean()), abs=1e-4)
    assert found.l0 == pytest.approx(float((acts[1:] > 0).sum(-1).float().mean()))
    for name, fresh in (("clean", x), ("spliced", x_hat), ("ablated", torch.zeros_like(x))):
        whole = torch.cat([x[:1], fresh[1:]])[None]
        with made.model.edited({hook: lambda _, whole=whole: whole}):
            logits = true_logits(made.model, ids)
        loss = float(cross_entropy(logits[:-1], torch.tensor(ids[1:])))
        assert getattr(found, f"loss_{name}") == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "standard"])
def test_values_alone_and_in_any_batch_are_those_of_sae_lens(made: Made, tmp_path: Path, architecture: str) -> None:
    model, hook = made.model, "blocks.1.hook_resid_post"
    coder = coder_at(tmp_path / "sae", hook, model.card.d_model, architecture)
    theirs = SAE.load_from_disk(tmp_path / "sae")
    rows = [model.to_ids(TEXT[start:])[:length] for start, length in ((0, 3), (20, 41), (9, 17), (30, 2))]
    query = SaeQuery(sae=SaeRef(id="x", path="x"), top_k=D_SAE, latents=[4, 2])
    expected: list[np.ndarray] = []
    for ids in rows:
        with torch.no_grad():
            states = model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[2]
            expected.append(theirs.encode(states)[0].numpy())
    for batch in ([0], [1], [2, 0], [0, 1, 2, 3], [3, 1]):
        answers = encode(model, [Text(rows[n], [(coder, query)]) for n in batch])
        for n, [acts] in zip(batch, answers, strict=True):
            found = np.zeros_like(expected[n])
            for position, (indices, values) in enumerate(zip(acts.top_indices, acts.top_values, strict=True)):
                found[position, indices] = values
            scale = max(1.0, float(expected[n].max()))
            np.testing.assert_allclose(found / scale, expected[n] / scale, atol=1e-4)
            np.testing.assert_allclose(np.array(acts.latents) / scale, expected[n][:, [4, 2]].T / scale, atol=1e-4)
