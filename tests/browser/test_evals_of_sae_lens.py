"""The demo's model and its trained SAE, by our evaluation and by sae-lens' run_evals on the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.evals import EvalConfig, get_recons_loss, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sqlalchemy import select
from transformer_lens.model_bridge import TransformerBridge

from app import corpora, db
from app.settings import Settings
from app.tables import Source
from tests.browser.conftest import Demo
from workers.checkpoints import load_sae
from workers.language_model import LanguageModel
from workers.trainer.evaluate import evaluate

N_CONTEXTS, CONTEXT = 12, 64


@dataclass(frozen=True)
class Measured:
    """The demo's SAE by our evaluation, and what sae-lens needs to measure it on the same contexts."""

    ours: dict[str, Any]
    model_dir: str
    sae_dir: str
    ids: list[list[int]]
    bos: int


@pytest.fixture(scope="module")
def measured(demo_server: Demo) -> Measured:
    settings = Settings(data_dir=demo_server.data_dir, device="cpu")
    with db.sessions(db.connect(settings))() as session:
        source = session.scalars(select(Source).order_by(Source.id)).first()
        assert source is not None
        directory, corpus = settings.sae_dir(source.sae_hash), corpora.corpora(session)[0].hash
        model = LanguageModel.load(settings.model_dir(source.model_id))
    stream = corpora.Stream.open(corpora.tokens_dir(settings, corpus, model.card.tokenizer_hash))
    coder = load_sae(directory, "cpu")
    rows = _plain(model, stream, coder.hook_name)
    bos = model.card.bos_token_id
    assert bos is not None
    ids = stream.contexts(rows, CONTEXT, bos)
    ours = evaluate(model, coder, stream, rows, CONTEXT, len(rows), 1e9, lambda *_: None)
    return Measured(ours, str(settings.model_dir(source.model_id)), str(directory), ids.tolist(), bos)


def test_sae_lens_evals_of_the_demo_agree_where_the_definitions_do(measured: Measured) -> None:
    ours, theirs = measured.ours, _theirs(measured.model_dir, measured.sae_dir, measured.ids)
    quality, cost = theirs["reconstruction_quality"], theirs["model_performance_preservation"]
    assert ours["l0"] == pytest.approx(theirs["sparsity"]["l0"], rel=1e-4)
    assert ours["explained_variance"] == pytest.approx(quality["explained_variance"], abs=1e-4)
    assert ours["cosine_similarity"] == pytest.approx(quality["cossim"], abs=1e-4)
    # Ours counts the prediction from the first token, which no SAE changes, too: the loss that the SAE adds is spread
    # over one more prediction of each context. sae-lens' ablation zeroes first tokens and ours does not, so that the
    # scores themselves are of different things.
    added = (ours["ce_loss_sae"] - ours["ce_loss_clean"]) * (CONTEXT - 1) / (CONTEXT - 2)
    assert added == pytest.approx(cost["ce_loss_with_sae"] - cost["ce_loss_without_sae"], abs=1e-4)


def test_ce_loss_score_and_kl_div_score_are_those_of_sae_lens_losses(measured: Measured) -> None:
    """By sae-lens' get_recons_loss, token by token, with what its run_evals does otherwise made the same.

    In its scores zeros replace first tokens too; as the reconstruction of an SAE without weights they do not, which is
    what ours says. It leaves out what is predicted from special tokens, and counts the divergence at the last position,
    where nothing is left to predict; here every prediction of a token of the context counts.
    """
    bridge: Any = TransformerBridge.boot_transformers(measured.model_dir, device="cpu", dtype=torch.float32)
    sae = SAE.load_from_disk(measured.sae_dir)
    zero = SAE.load_from_disk(measured.sae_dir)
    for parameter in zero.parameters():
        parameter.data.zero_()
    spliced, zeroed = (_losses(bridge, s, measured) for s in (sae, zero))
    ours, clean = measured.ours, spliced["ce_loss_without_sae"]
    assert ours["ce_loss_clean"] == pytest.approx(clean, abs=1e-4)
    assert ours["ce_loss_sae"] == pytest.approx(spliced["ce_loss_with_sae"], abs=1e-4)
    assert ours["ce_loss_zero"] == pytest.approx(zeroed["ce_loss_with_sae"], abs=1e-3)
    assert ours["kl_sae"] == pytest.approx(spliced["kl_div_with_sae"], abs=1e-4)
    assert ours["kl_zero"] == pytest.approx(zeroed["kl_div_with_sae"], abs=1e-3)
    worst = zeroed["ce_loss_with_sae"]
    score = (worst - spliced["ce_loss_with_sae"]) / (worst - clean)
    assert ours["ce_loss_score"] == pytest.approx(score, abs=1e-4)
    assert ours["kl_div_score"] == pytest.approx(1 - spliced["kl_div_with_sae"] / zeroed["kl_div_with_sae"], abs=1e-4)


@torch.no_grad()
def _losses(bridge: Any, sae: SAE[Any], measured: Measured) -> dict[str, float]:
    """Mean losses over the predictions of tokens of the contexts; the first position of each stays as it is."""
    found = get_recons_loss(
        sae,
        bridge,
        ActivationScaler(),
        torch.tensor(measured.ids),
        compute_kl=True,
        compute_ce_loss=True,
        ignore_tokens=[measured.bos],
    )
    return {name: float(values[:, : CONTEXT - 1].mean()) for name, values in found.items()}


def _plain(model: LanguageModel, stream: corpora.Stream, hook: str) -> npt.NDArray[np.int64]:
    """Contexts in which only first positions are special tokens or attention sinks.

    sae-lens leaves special tokens out wherever they stand, and reconstructs sinks, a hundred times as long as other
    activations, which would drown these in explained variance.
    """
    rows = np.arange(2 * N_CONTEXTS)
    ids = torch.from_numpy(stream.contexts(rows, CONTEXT, model.card.bos_token_id))
    special = torch.isin(ids[:, 1:], torch.tensor(model.tokenizer.all_special_ids)).any(dim=1)
    norms = model.read(ids, [hook])[hook][:, 1:].norm(dim=-1)
    kept = ~special & (norms.amax(dim=1) < 6 * norms.median())
    assert int(kept.sum()) >= N_CONTEXTS
    return rows[kept.numpy()][:N_CONTEXTS]


def _theirs(model: str, sae_directory: str, ids: list[list[int]]) -> dict[str, Any]:
    bridge: Any = TransformerBridge.boot_transformers(model, device="cpu", dtype=torch.float32)
    sae = SAE.load_from_disk(sae_directory)
    store = ActivationsStore(
        bridge,
        Dataset.from_dict({"tokens": ids}),
        streaming=False,
        hook_name=str(sae.cfg.metadata.hook_name),
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=sae.cfg.d_in,
        n_batches_in_buffer=1,
        total_training_tokens=len(ids) * CONTEXT,
        store_batch_size_prompts=len(ids),
        train_batch_size_tokens=CONTEXT,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    asked = EvalConfig(
        batch_size_prompts=len(ids),
        n_eval_reconstruction_batches=1,
        n_eval_sparsity_variance_batches=1,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    found, _ = run_evals(sae, store, bridge, ActivationScaler(), asked)
    return found
