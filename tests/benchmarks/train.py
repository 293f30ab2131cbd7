"""Training a TopK SAE of the demo's model: a step against sae-lens and five matrix products, and from text to weights.

Same architecture, width, batch, tokens, first weights and learning rate on both sides; explained variance after the
same batches is told beside the times. `five products` are those of a dense step (encode, decode and the three of their
gradients) in the fastest precision, and nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from app import corpora, db
from app.settings import Settings
from app.tables import Job, JobState, Source
from app.trainspecs import SaeSpec, TrainSpec
from tests.benchmarks.servers import installed, interleaved, medians, peak, seconds
from workers.activations import Text, read_contexts
from workers.device import device_of
from workers.memory import keep_freed_memory
from workers.trainer import loaded, train
from workers.trainer.kinds import JobContext
from workers.trainer.learning import Learner, fast_precision

BATCH, K, CONTEXT, N_BATCHES, LR = 4096, 32, 128, 8, 1e-3
WIDTHS = {4_096: 5, 16_384: 2, 32_768: 1}
"""Rounds by d_sae: a step of sae-lens at 32k takes a quarter of a minute on two cores."""
LEARNING_STEPS = 24
END_TO_END_TOKENS = 524_288
"""The last step looks at held-out text, for 8 s on two cores; SAELens' runner does not. A small part of this many."""


def main() -> dict[str, Any]:
    if chosen := os.environ.get("SAE_ATLAS_BENCH_SIDE"):
        return {"side": chosen}
    figures: dict[str, Any] = {}
    with data() as settings:
        batches = _activations(settings)
        for d_sae, rounds in WIDTHS.items():
            figures |= _step(batches, d_sae, rounds)
        figures |= _learning(batches)
        figures |= _end_to_end(settings)
    return figures


@contextmanager
def data() -> Generator[Settings]:
    """The demo's model and corpus, in the data directory that is given or in a fresh one."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="sae-atlas-bench-") as scratch:
        given = Settings()
        settings = given if "data_dir" in given.model_fields_set else Settings(data_dir=Path(scratch) / "data")
        installed(settings)
        yield settings


def _activations(settings: Settings) -> list[Tensor]:
    """Normalised batches of the demo's hook."""
    text, hook = _text(settings)
    n_contexts = -(-N_BATCHES * BATCH // (CONTEXT - 1)) + 8
    bos = text.model.card.bos_token_id
    parts = [
        acts[hook][:, 1:].flatten(0, 1)
        for _, acts in read_contexts(text.model, text.stream, np.arange(n_contexts), CONTEXT, [hook], bos)
    ]
    x = torch.cat(parts).float()
    norms = x.norm(dim=-1)
    x = x[norms <= 6 * norms.median()]
    x = x * (x.shape[1] ** 0.5 / x.norm(dim=-1).mean())
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return list(x[order][: N_BATCHES * BATCH].split(BATCH))


def _text(settings: Settings) -> tuple[Text, str]:
    with db.sessions(db.connect(settings))() as session:
        source = session.query(Source).first()
        assert source is not None
        corpus, model_id, hook = corpora.corpora(session)[0], source.model_id, source.hook_name
    model = loaded.model(_context(settings, {}, Path("/")), model_id)
    stream = corpora.Stream.open(corpora.tokens_dir(settings, corpus.hash, model.card.tokenizer_hash))
    return Text(model, stream, CONTEXT), hook


def _context(settings: Settings, spec: dict[str, Any], directory: Path, job_id: int = 0) -> JobContext:
    return JobContext(settings, db.sessions(db.connect(settings)), job_id, spec, directory)


def _spec(d_sae: int) -> SaeSpec:
    return SaeSpec.model_validate(
        {"hook_name": "blocks.0.hook_resid_post", "set_name": "bench", "d_sae": d_sae, "k": K, "lr": LR}
        | {"warmup_steps": 0, "decay_share": 0.0}
    )


def _ours(d_sae: int, batches: list[Tensor]) -> Callable[[], float]:
    """A function that takes the next step and returns its seconds; `.learner` holds the SAE."""
    learner = Learner.fresh(_spec(d_sae), batches[0].shape[1], torch.cat(batches).mean(dim=0))
    precision = fast_precision("cpu")

    def step() -> float:
        x = batches[learner.step % len(batches)]
        return seconds(lambda: learner.learn(x, x, 10**6, precision, measure=True))

    step.learner = learner  # pyright: ignore[reportFunctionMemberAccess]
    return step


def _theirs(d_sae: int, batches: list[Tensor]) -> Callable[[], float]:
    """The same of sae-lens' SAETrainer, with the same first weights."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    d_in = batches[0].shape[1]
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=K))
    fresh = Learner.fresh(_spec(d_sae), d_in, torch.cat(batches).mean(dim=0)).weights
    sae.W_enc.data, sae.b_enc.data = fresh["W_enc_T"].data.T.contiguous(), fresh["b_enc"].data.clone()
    sae.W_dec.data, sae.b_dec.data = fresh["W_dec"].data.clone(), fresh["b_dec"].data.clone()
    config = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=BATCH, lr=LR)
    config.lr_end = LR
    trainer = SAETrainer(config, sae, iter(batches), None, None)
    number = iter(range(10**9))

    def step() -> float:
        x = batches[next(number) % len(batches)]
        return seconds(lambda: trainer.step(x))

    step.sae = sae  # pyright: ignore[reportFunctionMemberAccess]
    return step


def _products(d_sae: int, batches: list[Tensor]) -> Callable[[], float]:
    """Five dense products of a step in the fastest precision."""
    dtype = fast_precision("cpu")
    x = batches[0].to(dtype)
    W = torch.randn(d_sae, x.shape[1]).to(dtype)
    acts = torch.randn(BATCH, d_sae).to(dtype)

    def five() -> None:
        for _ in range(2):
            torch.mm(x, W.T)
            torch.mm(acts.T, x)
        torch.mm(acts, W)

    return lambda: seconds(five)


def _step(batches: list[Tensor], d_sae: int, rounds: int) -> dict[str, Any]:
    sides = {name: make(d_sae, batches) for name, make in _SIDES.items()}
    took = medians(interleaved(sides, rounds, warm_up=1))
    return {
        f"step at d_sae {d_sae:,}": ", ".join(f"{name} {value * 1e3:,.0f} ms" for name, value in took.items()),
        f"sae-lens over ours at {d_sae:,} (aim >= 4)": round(took["sae-lens"] / took["ours"], 1),
        f"five products over ours at {d_sae:,} (aim >= 0.6)": round(took["five products"] / took["ours"], 2),
    }


_SIDES = {"ours": _ours, "sae-lens": _theirs, "five products": _products}


def _learning(batches: list[Tensor]) -> dict[str, Any]:
    """What each explains of the last batch after the same steps on the others."""
    train_on, held_out = batches[:-1], batches[-1]
    ours, theirs = _ours(4_096, train_on), _theirs(4_096, train_on)
    for _ in range(LEARNING_STEPS):
        ours()
        theirs()
    coder = cast(Any, ours).learner
    losses = coder.objective.losses(coder.weights, held_out, held_out, coder.tokens_since_active > 10**9, 1.0)
    mine = 1 - float((losses.mse / losses.variance).detach())
    with torch.no_grad():
        error = (held_out - cast(Any, theirs).sae(held_out)).square().sum()
    other = 1 - float(error / (held_out - held_out.mean(dim=0)).square().sum())
    return {f"explained variance after {LEARNING_STEPS} steps": f"ours {mine:.4f}, sae-lens {other:.4f}"}


# From text ---------------------------------------------------------------------------------------------------------


def _end_to_end(settings: Settings) -> dict[str, Any]:
    """Each side in a process of its own, so that its peak memory is its own."""
    told = {side: _apart(settings, side) for side in ("job", "runner", "bare")}
    rate = {side: END_TO_END_TOKENS / t["seconds"] for side, t in told.items()}
    return {
        "from text": f"ours {rate['job']:,.0f} tokens/s, SAELens' runner {rate['runner']:,.0f}, "
        f"forward and five products {rate['bare']:,.0f}",
        "ours over SAELens' runner (aim >= 2)": round(rate["job"] / rate["runner"], 1),
        "ours over forward and five products (aim >= 0.8)": round(rate["job"] / rate["bare"], 2),
        "peak memory, MiB": f"ours {told['job']['peak_mib']:,.0f}, SAELens' runner {told['runner']['peak_mib']:,.0f}",
    }


def _apart(settings: Settings, side: str) -> dict[str, float]:
    variables = os.environ | {"SAE_ATLAS_DATA_DIR": str(settings.data_dir), "SAE_ATLAS_BENCH_SIDE": side}
    program = "from tests.benchmarks import train; train.side()"
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def side() -> None:
    """One side of the comparison from text; prints its seconds and its peak memory."""
    keep_freed_memory()
    settings = Settings()
    took = {"job": _job, "runner": _runner, "bare": _bare}[os.environ["SAE_ATLAS_BENCH_SIDE"]](settings)
    # Not getrusage's: that begins with what the process had that started this one.
    print(json.dumps({"seconds": took, "peak_mib": peak() / 2**20}))


def _job(settings: Settings) -> float:
    """All steps of a training job but the evaluation at its end, which SAELens' runner has none of."""
    text, hook = _text(settings)
    with tempfile.TemporaryDirectory() as scratch, db.sessions(db.connect(settings)).begin() as session:
        corpus = corpora.corpora(session)[0].name
        spec = {"model": text.model.card.id, "corpus": corpus, "hook_name": hook, "set_name": "bench", "k": K}
        spec |= {"n_tokens": END_TO_END_TOKENS, "epochs": 1, "d_sae": 4096, "lr": LR, "cache": "buffer"}
        full = TrainSpec.model_validate(spec).model_dump(mode="json")
        job = Job(kind="train", title="bench", spec=full, workflow_id="", result={}, state=JobState.DONE)
        session.add(job)
        session.flush()
        job_id = job.id
        session.commit()
        context = _context(settings, full, Path(scratch), job_id)
        kind = train.Train()

        def whole() -> None:
            for step in kind.plan(context):
                if not step.startswith("evaluate"):
                    kind.run(context, step)

        return seconds(whole)


def _bare(settings: Settings) -> float:
    """The model to the hook, and five products a batch."""
    text, hook = _text(settings)
    rows = np.arange(END_TO_END_TOKENS // CONTEXT)
    products = _products(4096, [torch.randn(BATCH, text.model.card.d_model)])

    def whole() -> None:
        with torch.autocast(device_of(settings), fast_precision("cpu")):
            for _ in read_contexts(text.model, text.stream, rows, CONTEXT, [hook], text.model.card.bos_token_id):
                pass
        for _ in range(END_TO_END_TOKENS // BATCH):
            products()

    return seconds(whole)


def _runner(settings: Settings) -> float:
    """LanguageModelSAETrainingRunner on the same tokens, from its construction on; the model is loaded before."""
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig
    from transformer_lens.model_bridge import TransformerBridge

    text, hook = _text(settings)
    rows = np.arange(2 * END_TO_END_TOKENS // CONTEXT)
    ids = text.stream.contexts(rows, CONTEXT, text.model.card.bos_token_id).tolist()
    bridge: Any = TransformerBridge.boot_transformers(str(settings.model_dir(text.model.card.id)), device="cpu")
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(
            d_in=text.model.card.d_model, d_sae=4096, k=K, normalize_activations="expected_average_only_in"
        ),
        model_name=text.model.card.id,
        hook_name=hook,
        dataset_path="",
        context_size=CONTEXT,
        training_tokens=END_TO_END_TOKENS,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=16,
        n_batches_in_buffer=128,  # of context_size tokens
        n_batches_for_norm_estimate=2,
        lr=LR,
        streaming=False,
        output_path=None,
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    began = time.perf_counter()
    dataset: Any = Dataset.from_dict({"input_ids": ids})
    LanguageModelSAETrainingRunner(config, override_dataset=dataset, override_model=bridge).run()
    return time.perf_counter() - began
