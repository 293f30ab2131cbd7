"""Causal effects against an offline recompute: the whole context again, with the feature taken out at the peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from app.corpora import Stream
from app.evidence import Effect
from tests.tiny import D_IN, D_SAE
from workers.language_model import LanguageModel
from workers.sae.coders import Coder, TranscoderCoder
from workers.trainer import effects as module
from workers.trainer.effects import N_VOTES, Peak, effects

CONTEXT, N_CONTEXTS = 11, 40


@pytest.fixture
def stream(language: LanguageModel) -> Stream:
    ids = np.random.default_rng(3).integers(2, language.card.d_vocab, N_CONTEXTS * (CONTEXT - 1)).astype("<u2")
    return Stream(ids, [0], ["t"], ["s"])


@pytest.fixture
def coders(standard: Coder, topk: Coder) -> list[Coder]:
    """Three places: a ReLU SAE, a TopK SAE one layer further up with scaled inputs, and a transcoder."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "W_enc": torch.randn(D_IN, D_SAE, generator=generator),
        "b_enc": torch.zeros(D_SAE),
        "W_dec": torch.randn(D_SAE, D_IN, generator=generator),
        "b_dec": torch.zeros(D_IN),
    }
    hooks = {"hook_name": "blocks.1.hook_mlp_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    higher = {"metadata": {"hook_name": "blocks.2.hook_resid_pre"}, "normalize_activations": "layer_norm"}
    scaled = dataclasses.replace(topk, config={**topk.config, **higher, "rescale_acts_by_decoder_norm": True})
    return [standard, scaled, TranscoderCoder(tensors, {"metadata": hooks})]


def some_peaks(model: LanguageModel, coders: Sequence[Coder], stream: Stream) -> list[Peak]:
    """Places where a latent is active, the last position of the corpus among them."""
    ids = torch.from_numpy(stream.contexts(np.arange(N_CONTEXTS), CONTEXT, 0))
    acts = model.read(ids, [c.hook_name for c in coders])
    found = [
        Peak(c, p, number, int(coder.encode(acts[coder.hook_name][c, p][None])[0].argmax()))
        for number, coder in enumerate(coders)
        for c, p in [(0, 1), (0, CONTEXT - 1), (3, 5), (3, 5 + number), (N_CONTEXTS - 1, CONTEXT - 1)]
    ]
    return list(dict.fromkeys(found))


@torch.no_grad()
def recomputed(model: LanguageModel, coder: Coder, stream: Stream, peak: Peak) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities from the peak to the context's end, without and with the reconstruction losing the latent."""
    ids = torch.from_numpy(stream.contexts(np.array([peak.context]), CONTEXT, 0))
    x = model.read(ids, [coder.hook_name])[coder.hook_name][0, peak.position]
    acts = coder.encode(x[None])
    without = acts.clone()
    without[0, peak.latent] = 0
    lost = coder.decode(acts) - coder.decode(without)
    if coder.switches.normalize_activations == "layer_norm":
        lost = lost * x.std()

    def ablate(y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[0, peak.position] -= lost[0]
        return y

    clean = model.hf(input_ids=ids).logits[0, peak.position :].log_softmax(-1)
    with model.edited({coder.hook_name_out: ablate}):
        return clean, model.hf(input_ids=ids).logits[0, peak.position :].log_softmax(-1)


def following(stream: Stream, peak: Peak, behind: int) -> int | None:
    offset = peak.context * (CONTEXT - 1) + peak.position + behind
    return int(stream.tokens[offset]) if offset < len(stream.tokens) else None


@pytest.mark.filterwarnings("error::FutureWarning")  # of arguments that transformers is about to drop
@pytest.mark.parametrize("reach", [0, 3, 100])
@pytest.mark.parametrize("how", ["appended", "one by one"])
def test_effects_equal_an_offline_recompute(
    how: str, reach: int, language: LanguageModel, coders: list[Coder], stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    agrees = module._agrees

    def watched(*args: object) -> bool:
        asked.append(agrees(*args))  # type: ignore[arg-type]
        return asked[-1] and how == "appended"

    monkeypatch.setattr(module, "_agrees", watched)
    monkeypatch.setattr(module, "CONTEXTS_PER_PASS", 2)
    monkeypatch.setattr(module, "LOGITS_BYTES", 2 * 8 * language.card.d_vocab * 4)  # two examples of a context a pass
    peaks = some_peaks(language, coders, stream)
    found: dict[Peak, Effect] = dict(effects(language, coders, stream, peaks, CONTEXT, 0, reach))
    assert asked == [True]
    assert set(found) == set(peaks)
    for peak, effect in found.items():
        clean, ablated = recomputed(language, coders[peak.coder], stream, peak)
        kl = (clean.exp() * (clean - ablated)).sum(-1)
        tokens = [following(stream, peak, behind) for behind in range(len(clean))]
        loss = [float(clean[i, t] - ablated[i, t]) if t is not None else np.nan for i, t in enumerate(tokens)]
        assert effect.loss_change == pytest.approx(loss[0], abs=1e-4, nan_ok=True)
        assert effect.kl == pytest.approx(float(kl[0]), abs=1e-4)
        change = (clean[0].exp() - ablated[0].exp()).numpy()
        for votes, sign in ((effect.up, 1), (effect.down, -1)):
            expected = np.sort(sign * change)[::-1][:N_VOTES]
            assert [sign * v for _, v in votes] == pytest.approx(expected[: len(votes)], abs=1e-4)
            assert all(change[t] == pytest.approx(v, abs=1e-4) for t, v in votes)
        n = min(reach, CONTEXT - 1 - peak.position)
        known = [change for change in loss[1 : 1 + n] if not np.isnan(change)]
        assert effect.n_later == n
        assert effect.later_kl == pytest.approx(float(kl[1 : 1 + n].mean()), abs=1e-4, nan_ok=True)
        assert effect.later_loss_change == pytest.approx(np.mean(known) if known else np.nan, abs=1e-4, nan_ok=True)
    assert max(effect.kl for effect in found.values()) > 0.01
    if reach:
        assert max(effect.later_kl for effect in found.values() if effect.n_later) > 0.001
        assert max(abs(effect.later_loss_change) for effect in found.values() if effect.n_later) > 0.001


def test_effects_of_a_peak_do_not_depend_on_its_company(
    language: LanguageModel, coders: list[Coder], stream: Stream
) -> None:
    peaks = some_peaks(language, coders, stream)
    together = dict(effects(language, coders, stream, peaks, CONTEXT, 0, 4))
    for peak in peaks[::4]:
        ((_, alone),) = effects(language, coders, stream, [peak], CONTEXT, 0, 4)
        assert alone.kl == pytest.approx(together[peak].kl, abs=1e-5)
        assert alone.later_kl == pytest.approx(together[peak].later_kl, abs=1e-5, nan_ok=True)
