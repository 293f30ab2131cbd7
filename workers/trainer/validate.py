"""The job that looks at a newly added SAE on real text: its metrics as they come, and a verdict in words.

A verdict rests on evidence it names: explained variance, l0, norms; where these are bad, the same weights are tried
with other normalisations and at other hooks nearby, on few tokens, to say what would fit better.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sqlalchemy import select
from torch import Tensor

from app import corpora, documents, harvests
from app.corpora import DOCUMENTS, Stream
from app.documents import Document
from app.errors import BadFile, BadInput
from app.settings import Settings
from app.specs import ValidateSpec
from app.tables import Corpus
from workers.activations import outlier_limit, read_contexts
from workers.corpora import separator
from workers.language_model import LanguageModel
from workers.sae.coders import Coder, TranscoderCoder
from workers.sae.stats import ReconstructionStats
from workers.trainer import loaded
from workers.trainer.evaluate import evaluate
from workers.trainer.kinds import JobContext, JobKind

DEMO_CORPUS = Path(corpora.__file__).parent / "demo" / "corpus.jsonl.xz"
MAX_NORM_RATIO = 6.0
TRIAL_TOKENS = 512
"""Tokens of a trial: 21 hooks and a few normalisations are tried, each with the whole SAE."""

GOOD, POOR = 0.6, 0.3
"""Explained variance of published SAEs lies between 0.6 and 0.95; below POOR something is wrong."""
DENSE_SHARE = 0.25
"""An SAE that activates more of its latents on a token is not sparse: a threshold or a bias does not fit."""
CLEARLY_BETTER = 0.1
_KINDS = (
    "hook_resid_post",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_mlp_out",
    "hook_attn_out",
    "attn.hook_z",
    "hook_mlp_in",
)
"""The usual ones first: several hooks may hold the same tensor, and the first of them is named."""


class Validate(JobKind):
    name = "validate"

    def title(self, spec: dict[str, Any]) -> str:
        asked = ValidateSpec(**spec)
        return f"Check {asked.model}/{asked.source} on real text"

    def plan(self, context: JobContext) -> list[str]:
        return ["measure", "judge"]

    def run(self, context: JobContext, step: str) -> None:
        subject = _subject(context)
        refusal = _refusal(subject.model, subject.coder)
        if step == "measure":
            _write(context.directory / "measured.json", {} if refusal else _measure(context, subject))
        else:
            measured = json.loads((context.directory / "measured.json").read_text())
            judged = {"verdict": "mismatch", "findings": [refusal]} if refusal else judge(context, subject, measured)
            _write(context.directory / "judged.json", judged)

    def finish(self, context: JobContext) -> dict[str, Any]:
        spec = ValidateSpec(**context.spec)
        measured = json.loads((context.directory / "measured.json").read_text())
        judged = json.loads((context.directory / "judged.json").read_text())
        _, corpus = _corpus(context, spec)
        judged |= {"corpus": corpus, "n_tokens": measured.get("n_tokens", 0)}
        with context.sessions.begin() as session:
            source = harvests.source_named(session, spec.model, spec.source)
            source.metrics = {**source.metrics, **measured, "validation": judged}
        shown = {name: measured[name] for name in ("l0", "explained_variance", "ce_loss_score") if name in measured}
        words = {"verdict": judged["verdict"], "findings": " ".join(judged["findings"])}
        return {"url": f"/{spec.model}/{spec.source}", **words, **shown}


@dataclass(frozen=True)
class Subject:
    """What is looked at, and on which text."""

    spec: ValidateSpec
    model: LanguageModel
    coder: Coder
    stream: Stream

    @property
    def bos(self) -> int | None:
        return self.model.bos_for(self.coder.config)

    @property
    def context_size(self) -> int:
        return min(self.spec.context_size, self.model.card.n_ctx)

    def rows(self, n_tokens: int) -> np.ndarray:
        available = self.stream.n_contexts(self.context_size, self.bos)
        if not available:
            raise BadInput(f"The text is {len(self.stream.tokens)} tokens; one context takes {self.context_size}.")
        return np.arange(min(available, -(-n_tokens // (self.context_size - 1))))


@dataclass(frozen=True)
class Trial:
    """The same weights under another assumption."""

    what: str
    explained_variance: float


def judge(context: JobContext, subject: Subject, measured: dict[str, Any]) -> dict[str, Any]:
    """Return {"verdict", "findings": sentences, "trials": {assumption: explained variance}}."""
    findings = _complaints(subject.coder, measured)
    if not findings:
        return {"verdict": "fits", "findings": [_praise(measured)], "trials": {}}
    trials = list(_trials(context, subject))
    own = measured["explained_variance"]
    best = max(trials, key=lambda trial: trial.explained_variance, default=None)
    better = best is not None and best.explained_variance > max(own + CLEARLY_BETTER, POOR)
    if best is not None and better:
        findings.append(f"{best.what} explained variance would be {best.explained_variance:.3f}, not {own:.3f}.")
    elif best is not None and own < POOR:
        named = str(subject.coder.config["metadata"].get("model_name") or "no model")
        findings.append(
            f"No other hook of the layers around it and no other normalisation does much better (best "
            f"{best.explained_variance:.3f}), so it was probably trained on another model than "
            f"{subject.model.card.id}; its config names {named}."
        )
    bad = better or own < POOR or measured["l0"] > DENSE_SHARE * subject.coder.d_sae
    tried = {trial.what: round(trial.explained_variance, 4) for trial in trials}
    return {"verdict": "mismatch" if bad else "doubtful", "findings": findings, "trials": tried}


def _refusal(model: LanguageModel, coder: Coder) -> str:
    """Why the SAE cannot be computed with this model at all, or nothing."""
    for hook, size in ((coder.hook_name, coder.d_in), (coder.hook_name_out, coder.d_out)):
        try:
            width = model.hook_size(hook)
        except BadInput as error:
            return error.message
        if width != size:
            return f"The SAE works on {size} numbers a token; {hook} of {model.card.id} has {width}: not its model."
    return ""


def _praise(measured: dict[str, Any]) -> str:
    return (
        f"Explained variance {measured['explained_variance']:.3f} with {measured['l0']:.1f} features a token; "
        f"ce_loss_score {measured['ce_loss_score']:.3f}."
    )


def _complaints(coder: Coder, measured: dict[str, Any]) -> list[str]:
    explained, l0, score = (measured[name] for name in ("explained_variance", "l0", "ce_loss_score"))
    norms = (
        f"Activations at {coder.hook_name} have a mean norm of {measured['mean_norm']:.3g}, the mean activation one "
        f"of {measured['norm_of_mean']:.3g}; b_dec has {float(coder.b_dec.norm()):.3g}."
    )
    complaints: list[str] = []
    if explained < 0:
        complaints.append(
            f"Explained variance is {explained:.3f}: the reconstruction is worse than the mean activation, which "
            f"scores 0; SAEs that fit score {GOOD} to 0.95. {norms}"
        )
    elif explained < GOOD:
        complaints.append(f"Explained variance is {explained:.3f}; SAEs that fit score {GOOD} to 0.95. {norms}")
    if l0 > DENSE_SHARE * coder.d_sae:
        complaints.append(
            f"{l0:,.0f} of {coder.d_sae:,} features are active on a token ({l0 / coder.d_sae:.0%}), so it is not "
            "sparse here: its biases or thresholds expect activations of another size."
        )
    if l0 < 1:
        complaints.append(f"Only {l0:.2f} of {coder.d_sae:,} features are active on a token: it hardly sees the text.")
    if score < 0.5:
        complaints.append(
            f"ce_loss_score is {score:.3f}: with the reconstruction in its place the model keeps less than half of "
            "what this hook gives it (1 is all, 0 none)."
        )
    return complaints


@torch.inference_mode()
def _trials(context: JobContext, subject: Subject) -> Iterator[Trial]:
    """Explained variance of the same weights with other normalisations, and at other hooks of the layers around."""
    coder = subject.coder
    hooks = _other_hooks(subject.model, coder)
    acts = _sample(subject, [coder.hook_name, coder.hook_name_out, *hooks])
    # Centring twice is centring once, so what follows may reconstruct these like any activations.
    x, target = coder.seen(acts[coder.hook_name]), coder.aim(acts[coder.hook_name_out])
    others = [] if isinstance(coder, TranscoderCoder) else list(_other_normalisations(coder, x))
    for number, (what, reconstruct) in enumerate(others):
        context.report(number / (len(others) + len(hooks)), f"tries: {what}")
        yield Trial(what, _explained(x, reconstruct(x)))
    for number, hook in enumerate(hooks, len(others)):
        context.report(number / (len(others) + len(hooks)), f"tries {hook}")
        aim = target if isinstance(coder, TranscoderCoder) else acts[hook]
        yield Trial(f"At {hook}", _explained(coder.aim(aim), coder.predict(acts[hook])))


def _other_hooks(model: LanguageModel, coder: Coder) -> list[str]:
    layer = int(coder.hook_name.split(".")[1])
    layers = [number for number in (layer, layer - 1, layer + 1) if 0 <= number < model.card.n_layers]
    kinds = [kind for kind in _KINDS if kind in model.hook_kinds()]
    names = [f"blocks.{number}.{kind}" for number in layers for kind in kinds]
    return [name for name in names if name != coder.hook_name and model.hook_size(name) == coder.d_in]


def _other_normalisations(coder: Coder, x: Tensor) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    now = coder.switches.normalize_activations
    for name in ("none", "layer_norm", "constant_norm_rescale"):
        if name != now and not (name == "none" and now == "expected_average_only_in"):
            changed = dataclasses.replace(coder, config={**coder.config, "normalize_activations": name})
            yield f"With normalize_activations {name}", changed.reconstruct
    flipped = not coder.switches.apply_b_dec_to_input
    changed = dataclasses.replace(coder, config={**coder.config, "apply_b_dec_to_input": flipped})
    yield f"With apply_b_dec_to_input {str(flipped).lower()}", changed.reconstruct
    scale = coder.d_in**0.5 / float(x.norm(dim=-1).mean())
    yield (
        f"With activations scaled by {scale:.3g} to a mean norm of sqrt(d_in) = {coder.d_in**0.5:.1f} "
        "(expected_average_only_in, not folded into these weights)",
        lambda rows: coder.reconstruct(rows * scale) / scale,
    )
    for factor in (1 / 300, 1 / 100, 1 / 30, 1 / 10, 1 / 3, 3, 10, 30, 100, 300):
        yield (
            f"With activations scaled by {factor:.3g}",
            lambda rows, factor=factor: coder.reconstruct(rows * factor) / factor,
        )


def _sample(subject: Subject, hooks: list[str]) -> dict[str, Tensor]:
    """Activations of a few tokens at many hooks, [token, d], without first positions and the own hook's outliers."""
    parts = [
        acts
        for _, acts in read_contexts(
            subject.model, subject.stream, subject.rows(TRIAL_TOKENS), subject.context_size, hooks, subject.bos
        )
    ]
    flat = {hook: torch.cat([acts[hook][:, 1:].flatten(0, 1) for acts in parts]).float() for hook in hooks}
    own = flat[subject.coder.hook_name]
    kept = own.norm(dim=-1) <= outlier_limit(own, MAX_NORM_RATIO)
    return {hook: x[kept] for hook, x in flat.items()}


def _explained(x: Tensor, x_hat: Tensor) -> float:
    stats = ReconstructionStats()
    stats.add_reconstruction(x, x_hat)
    return stats.metrics()["explained_variance"]


def _measure(context: JobContext, subject: Subject) -> dict[str, Any]:
    points: dict[int, dict[str, float]] = {}

    def watch(n_tokens: int, metrics: dict[str, float]) -> None:
        points[n_tokens] = {**points.get(n_tokens, {}), **metrics}
        context.metric(n_tokens, points[n_tokens])

    rows = subject.rows(subject.spec.n_tokens)
    metrics = evaluate(
        subject.model,
        subject.coder,
        subject.stream,
        rows,
        subject.context_size,
        len(rows),
        MAX_NORM_RATIO,
        context.report,
        watch,
    )
    x = _sample(subject, [subject.coder.hook_name])[subject.coder.hook_name]
    norms = {"mean_norm": float(x.norm(dim=-1).mean()), "norm_of_mean": float(x.mean(dim=0).norm())}
    return metrics | norms


def _subject(context: JobContext) -> Subject:
    spec = ValidateSpec(**context.spec)
    model = loaded.model(context, spec.model)
    with context.sessions() as session:
        source = harvests.source_named(session, spec.model, spec.source)
    return Subject(spec, model, loaded.coder(context, source.sae_hash), _text(context, spec, model))


def _text(context: JobContext, spec: ValidateSpec, model: LanguageModel) -> Stream:
    """The corpus' tokens where it was tokenised already; else those of its first documents, kept with the job."""
    corpus, _ = _corpus(context, spec)
    if corpus is not None:
        whole = corpora.tokens_dir(context.settings, corpus.hash, model.card.tokenizer_hash)
        if whole.is_dir():
            return Stream.open(whole)
    directory = context.directory / "tokens"
    if not directory.is_dir():
        source = corpora.documents(context.settings.corpus_dir(corpus.hash)) if corpus else _demo_documents()
        rows = _first_documents(model, source, 2 * spec.n_tokens + 4 * spec.context_size)
        corpora.write_stream(directory, rows, separator(model), model.card.d_vocab)
    return Stream.open(directory)


def _first_documents(
    model: LanguageModel, documents: Iterator[Document], n_tokens: int
) -> Iterator[tuple[Document, list[int]]]:
    while n_tokens > 0 and (batch := list(islice(documents, 16))):
        rows = model.tokenizer([d.text for d in batch], add_special_tokens=False, verbose=False).input_ids
        yield from zip(batch, rows, strict=True)
        n_tokens -= sum(map(len, rows))


def _demo_documents() -> Iterator[Document]:
    if not DEMO_CORPUS.is_file():
        raise BadFile("There is no text to check the SAE on. Add some with `sae-atlas corpus add FILE`.")
    return documents.read(DEMO_CORPUS).documents


def _corpus(context: JobContext, spec: ValidateSpec) -> tuple[Corpus | None, str]:
    """The corpus asked for, or the largest whose text can be read with this model; None means the demo's text."""
    with context.sessions() as session:
        if spec.corpus:
            return corpora.corpus_named(session, spec.corpus), spec.corpus
        for corpus in session.scalars(select(Corpus).order_by(Corpus.n_chars.desc(), Corpus.id)):
            if _readable(context.settings, corpus, spec.model):
                return corpus, corpus.name
    return None, "the demo's text"


def _readable(settings: Settings, corpus: Corpus, model_id: str) -> bool:
    """A corpus that came in a bundle has only tokens, of one tokenizer."""
    if (settings.corpus_dir(corpus.hash) / DOCUMENTS).is_file():
        return True
    card = json.loads((settings.model_dir(model_id) / "card.json").read_text(encoding="utf-8"))
    return corpora.tokens_dir(settings, corpus.hash, card["tokenizer_hash"]).is_dir()


def _write(path: Path, value: dict[str, Any]) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(value))
    os.replace(scratch, path)
