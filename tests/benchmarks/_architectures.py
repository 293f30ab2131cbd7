"""Every architecture with its defaults on the demo's model: what is explained, beside sae-lens' trainer with its own.

Same tokens, batches, width and k; both trained on activations of mean norm sqrt(d_in), in bfloat16 where that is fast.
sae-lens' L1 coefficient is 5, since its default is meant for other units; the rest is its default. Transcoders are not
trained by sae-lens. Measured on tokens that neither has seen, by our evaluation of the SAEs as both libraries save
them. No time is measured here, and `make bench` leaves it out: it takes half an hour of one core.

    python -m tests.benchmarks _architectures
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from app.settings import Settings
from app.trainspecs import Architecture, SaeSpec
from tests.benchmarks.train import CONTEXT, _text, data
from workers.activations import read_contexts
from workers.checkpoints import load_sae
from workers.sae.coders import Coder
from workers.sae.stats import ReconstructionStats
from workers.trainer.learning import Learner, fast_precision
from workers.trainer.watching import coder_of

RESID, MLP_IN, MLP_OUT = "blocks.12.hook_resid_post", "blocks.12.mlp.hook_in", "blocks.12.hook_mlp_out"
BATCH, N_STEPS, D_SAE, K = 1024, 500, 2048, 32
N_CONTEXTS, N_HELD_OUT = 1664, 256
LENS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 5.0},
    "gated": {"l1_coefficient": 5.0},
    "topk": {"k": K},
    "jumprelu": {},
    "batchtopk": {"k": K},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [D_SAE // 16, D_SAE // 4, D_SAE]},
}


def main() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with data() as settings:
        train, held_out = _activations(settings)
        for architecture in Architecture:
            hooks = (MLP_IN, MLP_OUT) if architecture.is_transcoder else (RESID, RESID)
            figures[f"{architecture}, ours"] = _measured(_ours(architecture, hooks, train), hooks, held_out)
            if architecture in LENS:
                figures[f"{architecture}, sae-lens"] = _measured(_theirs(architecture, train), hooks, held_out)
    return figures


def _activations(settings: Settings) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Activations of some random contexts by hook, normalised, outliers left out: to train on, and held out."""
    text, _ = _text(settings)
    bos, hooks = text.model.card.bos_token_id, [RESID, MLP_IN, MLP_OUT]
    rows = np.random.default_rng([0, 0]).permutation(text.stream.n_contexts(CONTEXT, bos))[:N_CONTEXTS]
    parts: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
    for _, acts in read_contexts(text.model, text.stream, rows, CONTEXT, hooks, bos):
        for hook in hooks:
            parts[hook].append(acts[hook][:, 1:].flatten(0, 1).float())
    found = {hook: torch.cat(part) for hook, part in parts.items()}
    norms = {hook: x.norm(dim=-1) for hook, x in found.items()}
    kept = torch.stack([norm <= 6 * norm.median() for norm in norms.values()]).all(dim=0)
    n_train = int(kept[: -N_HELD_OUT * (CONTEXT - 1)].sum())
    scaled = {hook: x[kept] * (x.shape[1] ** 0.5 / x[kept][:n_train].norm(dim=-1).mean()) for hook, x in found.items()}
    return {hook: x[:n_train] for hook, x in scaled.items()}, {hook: x[n_train:] for hook, x in scaled.items()}


def _batches(n_rows: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(n_rows, generator=generator)
        yield from (part for part in order.split(BATCH) if len(part) == BATCH)


def _ours(architecture: Architecture, hooks: tuple[str, str], train: dict[str, Tensor]) -> Coder:
    own = {"k": K} if architecture.chooses_k else {}
    out = {"hook_name_out": hooks[1]} if architecture.is_transcoder else {}
    usual = {"hook_name": hooks[0], "set_name": "bench", "architecture": architecture, "d_sae": D_SAE}
    spec = SaeSpec.model_validate({**usual, **own, **out})
    x, target = train[hooks[0]], train[hooks[1]]
    learner, precision = Learner.fresh(spec, x.shape[1], target.mean(dim=0)), fast_precision("cpu")
    for _, rows in zip(range(N_STEPS), _batches(len(x)), strict=False):
        learner.learn(x[rows], target[rows], N_STEPS, precision, measure=False)
    return coder_of(learner.fold(1.0, 1.0), {"hook_name": hooks[0], **out})


def _theirs(architecture: Architecture, train: dict[str, Tensor]) -> Coder:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import get_sae_training_class
    from sae_lens.training.sae_trainer import SAETrainer

    x = train[RESID]
    torch.manual_seed(0)
    sae_class, config_class = get_sae_training_class(str(architecture))
    config = cast(Any, config_class)(d_in=x.shape[1], d_sae=D_SAE, **LENS[architecture])
    sae: Any = cast(Any, sae_class)(config)
    asked = SAETrainerConfig(
        total_training_samples=N_STEPS * BATCH, train_batch_size_samples=BATCH, autocast=True, lr_end=3e-5
    )
    trainer = SAETrainer(asked, sae, (x[rows] for rows in _batches(len(x))), None, None)
    for _ in range(N_STEPS):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
    with tempfile.TemporaryDirectory() as scratch:
        sae.save_inference_model(scratch)
        file = Path(scratch) / "cfg.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"metadata": {"hook_name": RESID}}))
        return load_sae(Path(scratch))


@torch.no_grad()
def _measured(coder: Coder, hooks: tuple[str, str], held_out: dict[str, Tensor]) -> str:
    stats = ReconstructionStats()
    for x, target in zip(held_out[hooks[0]].split(4096), held_out[hooks[1]].split(4096), strict=True):
        stats.add(x, coder, target)
    found = stats.metrics()
    return f"explained variance {found['explained_variance']:.3f}, l0 {found['l0']:.0f}, dead {found['dead']:.1%}"
