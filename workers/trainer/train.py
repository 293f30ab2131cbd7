"""The job that trains SAEs: tokenise, read activations, optimise, evaluate, catalogue.

One pass of the model serves all SAEs of a job. What survives a crash lies in shards of activations and in one
checkpoint an SAE with weights, moments and counters. The order of the data depends on the seed alone, so a resumed run
ends with the same bits. Each SAE goes on from its own checkpoint, whichever of them a crash left behind.

    jobs/{id}/plan.json             what was decided at the start (app.trainplan)
             /corpus.json            the corpus that a dataset of the hub became
             /norms.json            scales and limits of each hook, from the first shard
             /{source}.safetensors  checkpoints
             /{source}.metrics.json, sae/{source}/       at the end
             /buffer/{hook}/        shards of the window, where they are not cached
             /spent.json            seconds and work so far, for the estimate of later jobs
             /snapshots/            app.curves; stays
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sqlalchemy.orm import Session

from app import corpora, curves, harvests, jobs, trainings, trainplan, visibility, weights
from app.errors import BadInput, TooLarge
from app.present import duration
from app.tables import Source
from app.trainplan import Plan, Window
from app.trainspecs import SaeSpec, TrainSpec
from workers import checkpoints
from workers.activations import POWER_FILE, Norms, Rows, Shard, Text, WindowReader, norms_of, write_shards
from workers.corpora import tokenised
from workers.device import device_of
from workers.sae import across
from workers.trainer import caches, loaded, together, watching
from workers.trainer.evaluate import evaluate
from workers.trainer.kinds import JobContext, JobKind
from workers.trainer.learning import Learner, fast_precision

STEPS_PER_METRIC = 10
TOGETHER = "optimise together"
"""The one step in which several processes do all learning steps; it goes on from the checkpoints."""
_KEPT = (curves.SNAPSHOTS,)


class Train(JobKind):
    name = "train"

    def title(self, spec: dict[str, Any]) -> str:
        return TrainSpec(**spec).title

    def plan(self, context: JobContext) -> list[str]:
        run = Run.begin(context)
        names = run.learning_steps() if run.spec.processes == 1 else [TOGETHER]
        n_saes = len(run.spec.saes)
        return [*names, *(f"evaluate {i + 1}/{n_saes}" for i in range(n_saes))]

    def run(self, context: JobContext, step: str) -> None:
        if step == TOGETHER:
            together.run(context)
            return
        run = Run.resume(context)
        match step.split():
            case ["activations", place]:
                run.read_shard(_place(place)[0], "activations")
            case ["optimise", place]:
                run.optimise_chunk(_place(place)[0])
            case ["window", place]:
                run.optimise_window(_place(place)[0])
            case [_, place]:
                _evaluate(run, run.spec.saes[_place(place)[0]])
            case _:
                raise AssertionError(step)

    def finish(self, context: JobContext) -> dict[str, Any]:
        if (done := context.directory / loaded.RESULT).exists():
            return json.loads(done.read_text())
        run = Run.resume(context)
        metrics = {
            s.source: json.loads((context.directory / f"{s.source}.metrics.json").read_text()) for s in run.spec.saes
        }
        with context.sessions.begin() as session:
            for sae in run.spec.saes:
                _catalogue(session, run, sae, metrics[sae.source])
            _queue_harvest(session, run)
        result: dict[str, Any] = {"url": f"/{run.spec.model}/{run.spec.saes[0].source}"}
        result |= metrics[run.spec.saes[0].source] if len(metrics) == 1 else {"saes": metrics}
        result["speed"] = run.spent.speed()
        _forget_learners(context.directory)
        _leave_result(context, result)
        return result


@dataclass
class Spent:
    """Seconds and work of a job so far. A crash may lose the last step's: nothing depends on it but estimates."""

    forward_seconds: float = 0.0
    forward_flops: float = 0.0
    step_seconds: float = 0.0
    step_flops: float = 0.0
    look_seconds: float = 0.0
    look_flops: float = 0.0

    def speed(self) -> dict[str, float]:
        """Return floating-point operations a second, as app.trainplan.measured_speed reads them."""
        return {
            "forward": self.forward_flops / self.forward_seconds if self.forward_seconds else 0.0,
            "step": self.step_flops / self.step_seconds if self.step_seconds else 0.0,
        }


@dataclass
class Run:
    """A job under way: what it was asked, what was decided, and the text that it reads."""

    context: JobContext
    spec: TrainSpec
    text: Text
    plan: Plan
    rows: Rows
    """Contexts to train on, in the order of the shards."""
    held_out: Rows
    directory: Path
    """Of the shards."""
    spent: Spent

    @classmethod
    def begin(cls, context: JobContext) -> Run:
        """Decide what depends on the state of the disk, once, and judge whether the job can run at all."""
        context.report(0.0, "reading the model and the corpus")
        spec = _with_text(context, TrainSpec(**context.spec))
        text = _text(context, spec)
        for sae in spec.saes:
            for hook in sae.hooks:
                text.model.hook_size(hook)  # raises BadInput for a hook that the model does not have
        _check_processes(spec, device_of(context.settings))
        n_train = _n_train(spec, text)
        plan = trainplan.plan(spec, text.model.card, context.settings.cache_bytes, n_train)
        if plan.n_steps == 0:
            raise TooLarge(
                f"A batch is {spec.batch_size:,} tokens, the corpus gives "
                f"{plan.n_contexts * trainplan.tokens_per_context(spec):,}."
            )
        _write_json(context.directory / "plan.json", {"cached": plan.cached, "n_steps": plan.n_steps})
        try:
            return cls.resume(context)
        except caches.NoRoom as full:
            if spec.cache != "auto":
                raise
            context.log("activations are not cached", why=full.message)
            buffered = spec.model_copy(update={"cache": "buffer"})
            plan = trainplan.plan(buffered, text.model.card, context.settings.cache_bytes, n_train)
            _write_json(context.directory / "plan.json", {"cached": False, "n_steps": plan.n_steps})
            return cls.resume(context)

    @classmethod
    def resume(cls, context: JobContext) -> Run:
        spec = _with_text(context, TrainSpec(**context.spec))
        text = _text(context, spec)
        card, n_train = text.model.card, _n_train(spec, text)
        cached = bool(json.loads((context.directory / "plan.json").read_text())["cached"])
        decided = spec.model_copy(update={"cache": "disk" if cached else "buffer"})
        plan = trainplan.plan(decided, card, context.settings.cache_bytes, n_train)
        rows, held_out = split(spec, text)
        if cached:
            corpus_hash = _corpus_hash(context, spec)
            directory = caches.cache_dir(
                context.settings, card.hash, corpus_hash, card.tokenizer_hash, spec.context_size, n_train, "bfloat16"
            )
            n_rows = plan.n_contexts * trainplan.tokens_per_context(spec)
            if across.leads():
                caches.use(context, directory, n_rows * trainplan.row_bytes(spec, card))
        else:
            directory = context.directory / "buffer"
        file = context.directory / "spent.json"
        spent = Spent(**json.loads(file.read_text())) if file.exists() else Spent()
        return cls(context, spec, text, plan, rows, held_out, directory, spent)

    def learning_steps(self) -> list[str]:
        """Names of what comes before the evaluation."""
        if not self.plan.cached:
            n_windows = len(self.plan.windows)
            return [f"window {i + 1}/{n_windows}" for i in range(n_windows)]
        n_shards, n_chunks = len(self.plan.shards), -(-self.plan.n_steps // self.spec.steps_per_checkpoint)
        names = [f"activations {i + 1}/{n_shards}" for i in range(n_shards)]
        return names + [f"optimise {i + 1}/{n_chunks}" for i in range(n_chunks)]

    @property
    def device(self) -> str:
        return device_of(self.context.settings)

    def shards(self, number: int) -> dict[str, Shard]:
        start, stop = self.plan.shards[number]
        return {hook: Shard(self.directory / hook, number, stop - start) for hook in self.spec.hooks}

    def read_shard(self, number: int, what: str) -> None:
        """Make the shard, unless it is there; a look at it tells the scales where it is the first.

        Several processes take shards in turn: the rows are there when all have passed across.wait().
        """
        if number % across.size() != across.rank():
            return
        if number and not self._has_powers():
            self.read_shard(0, what)
        start, stop = self.plan.shards[number]
        began = time.monotonic()
        n_tokens = (stop - start) * self.spec.context_size

        def progress(share: float) -> None:
            speed = share * n_tokens / max(time.monotonic() - began, 1e-6)
            said = f"{what} {number + 1} of {len(self.plan.shards)}, {speed:,.0f} tokens/s"
            self.context.report(share if what == "activations" else 0.0, said)

        if write_shards(self.directory, number, self.text, self.rows[start:stop], self.spec.hooks, progress):
            self.spent.forward_seconds += time.monotonic() - began
            self.spent.forward_flops += n_tokens * trainplan.forward_flops(self.spec, self.text.model.card)
            self._save_spent()

    def _has_powers(self) -> bool:
        """Whether the first shard has set what rows are multiplied by; not so where the cache was deleted meanwhile."""
        return all((self.directory / hook / POWER_FILE).exists() for hook in self.spec.hooks)

    def norms(self) -> dict[str, Norms]:
        """Scales and limits of all hooks, measured on the first shard and then kept."""
        file = self.context.directory / "norms.json"
        if across.leads() and not (file.exists() and self._has_powers()):
            self.read_shard(0, "activations")
            found = {hook: norms_of(shard, self.spec.max_norm_ratio) for hook, shard in self.shards(0).items()}
            _write_json(file, {hook: asdict(norms) for hook, norms in found.items()})
        across.wait()
        return {hook: Norms(**told) for hook, told in json.loads(file.read_text()).items()}

    def optimise_chunk(self, number: int) -> None:
        """Take the steps of one checkpoint, from cached activations."""
        size, norms = self.spec.steps_per_checkpoint, self.norms()
        first, end = number * size, min((number + 1) * size, self.plan.n_steps)
        learners = self.learners(norms)
        for window in self.plan.windows:
            if window.first_step < end and window.end > first:
                begin, stop = max(first, window.first_step), min(end, window.end)
                self._learn(learners, norms, window, begin, stop, (first, end))
        self._save(learners)

    def optimise_window(self, number: int) -> None:
        """Take the steps of one window of the buffer; shards that no later window needs are deleted."""
        window = self.plan.windows[number]
        needed = {part.shard for part in window.parts}
        norms = self.norms()
        learners = self.learners(norms)
        if any(learner.step < window.end for learner in learners):
            self._learn(learners, norms, window, window.first_step, window.end, (window.first_step, window.end))
            self._save(learners)
        later = {part.shard for after in self.plan.windows[number + 1 : number + 2] for part in after.parts}
        for shard in needed - later if across.leads() else ():
            for part in self.shards(shard).values():
                part.remove()

    def _learn(
        self,
        learners: list[Learner],
        norms: dict[str, Norms],
        window: Window,
        begin: int,
        stop: int,
        whole: tuple[int, int],
    ) -> None:
        """Take steps begin..stop of a window with every SAE that has not taken them."""
        for number in sorted({part.shard for part in window.parts}):
            self.read_shard(number, "activations of window")
        across.wait()
        shards = {part.shard: self.shards(part.shard) for part in window.parts}
        reader = _reader(self.context.directory, window, shards, norms, self.spec.data_seed)
        precision = _precision(self.spec, self.device)
        began, taken, looked = time.monotonic(), 0, 0.0
        for step in range(begin, stop):
            waiting = [learner for learner in learners if learner.step == step]
            if not waiting:
                continue
            batch = {hook: x.to(self.device) for hook, x in reader.batch(step).items()}
            last = step + 1 == self.plan.n_steps
            metrics: dict[str, float] = {}
            for learner in waiting:
                x, target = batch[learner.spec.hooks[0]], batch[learner.spec.hooks[-1]]
                measure = (step + 1) % STEPS_PER_METRIC == 0 or last
                told = learner.learn(x, target, self.plan.n_steps, precision, measure=measure)
                self.spent.step_flops += len(x) * trainplan.step_flops(learner.spec, self.text.model.card)
                metrics |= self._named(learner.spec, told or {})
            taken += 1
            seconds = time.monotonic() - began - looked
            speed = taken * self.spec.batch_size / seconds
            if across.leads() and ((step + 1) % self.spec.evaluate_every_steps == 0 or last):
                looking, work = time.monotonic(), self._looks_flops(1)
                metrics |= self._look(learners, norms, step + 1)
                looked += (took := time.monotonic() - looking)
                self.spent.look_seconds += took
                self.spent.look_flops += work
            if metrics:
                metrics |= {
                    "tokens": float((step + 1) * self.spec.batch_size),
                    "tokens_per_second": speed,
                    "seconds_left": self._left(step + 1, speed),
                }
                self.context.metric(step + 1, metrics)
            self._report(step + 1, whole, metrics, speed)
        self.spent.step_seconds += time.monotonic() - began - looked

    def _named(self, sae: SaeSpec, metrics: Mapping[str, float]) -> dict[str, float]:
        return {curves.key(sae.source, name, len(self.spec.saes)): value for name, value in metrics.items()}

    def _left(self, step: int, speed: float) -> float:
        """Seconds to the job's end: of the steps, of the looks at held-out text and of the evaluation."""
        steps = (self.plan.n_steps - step) * self.spec.batch_size / speed
        looks = self._looks_flops(trainplan.looks_after(self.spec, step, self.plan.n_steps))
        return steps + looks / self._looking_speed() + self.ending_seconds() * len(self.spec.saes)

    def ending_seconds(self) -> float:
        """Return how long the evaluation of one SAE at the end will take."""
        return sum(self.ending_flops()) / self._looking_speed()

    def ending_flops(self) -> tuple[float, float]:
        return trainplan.ending_flops(self.spec, self.text.model.card, len(self.held_out))

    def _looks_flops(self, n: int) -> float:
        first = not _bounds.get(self.context.directory)
        return trainplan.looks_flops(self.spec, self.text.model.card, len(self.held_out), n, first=first)

    def _looking_speed(self) -> float:
        """As fast as the looks so far; before the first as the model was read; else a guess."""
        if self.spent.look_seconds:
            return self.spent.look_flops / self.spent.look_seconds
        return self.spent.speed()["forward"] or trainplan.Speed().forward

    def _report(self, step: int, whole: tuple[int, int], metrics: Mapping[str, float], speed: float) -> None:
        left, n = self._left(step, speed), len(self.spec.saes)
        first = curves.key(self.spec.saes[0].source, "explained_variance", n)
        said = f"step {step:,} of {self.plan.n_steps:,}"
        if first in metrics:
            said += f", explained variance {metrics[first]:.3f}" + (f" ({self.spec.saes[0].source})" if n > 1 else "")
        share = (step - whole[0]) / max(whole[1] - whole[0], 1)
        self.context.report(share, f"{said}, {speed:,.0f} tokens/s, {duration(left)} left")

    def _look(self, learners: list[Learner], norms: dict[str, Norms], step: int) -> dict[str, float]:
        if self.context.directory not in _bounds:
            _bounds.clear()
            _bounds[self.context.directory] = {}
        probe = watching.make_probe(self.text, self.held_out, norms, _bounds[self.context.directory])
        found: dict[str, float] = {}
        for learner in learners:
            sae = learner.spec
            folded = learner.fold(norms[sae.hooks[0]].scale, norms[sae.hooks[-1]].scale)
            coder = watching.coder_of(folded, _metadata(self, sae))
            place = watching.Place(self.context.directory, sae.source, step, step * self.spec.batch_size)
            found |= self._named(sae, watching.look(probe, coder, norms[sae.hooks[0]].limit, place))
        return found

    def learners(self, norms: Mapping[str, Norms]) -> list[Learner]:
        """The SAEs as their checkpoints have them, or in memory where those are the same; fresh at first."""
        found: list[Learner] = []
        for sae in self.spec.saes:
            path = self.checkpoint(sae)
            stamp = path.stat().st_mtime_ns if path.exists() else 0
            held = _learners.get(path)
            if held is not None and held[0] == stamp and held[1].step == held[2]:
                found.append(held[1])
            elif path.exists():
                found.append(Learner.load(path, sae, self.device))
            else:
                into, out = norms[sae.hooks[0]], norms[sae.hooks[-1]]
                mean = torch.tensor(out.mean, device=self.device) * out.scale
                found.append(Learner.fresh(sae, len(into.mean), mean))
        _forget_learners(self.context.directory)
        return found

    def checkpoint(self, sae: SaeSpec) -> Path:
        return self.context.directory / f"{sae.source}.safetensors"

    def _save(self, learners: list[Learner]) -> None:
        for learner in learners:
            path = self.checkpoint(learner.spec)
            if across.leads():
                learner.save(path)
            across.wait()
            _learners[path] = (path.stat().st_mtime_ns, learner, learner.step)
        self._save_spent()

    def _save_spent(self) -> None:
        if across.leads():
            _write_json(self.context.directory / "spent.json", asdict(self.spent))


_learners: dict[Path, tuple[int, Learner, int]] = {}
"""The SAEs of the job in hand after its last checkpoint: (time of the checkpoint's file, SAE, its step then).

One that learned on after its checkpoint, in a step that was cancelled, is not taken again.
"""


def _forget_learners(directory: Path) -> None:
    for path in [path for path in _learners if path.parent == directory or len(_learners) > trainplan.PARTS]:
        del _learners[path]


_bounds: dict[Path, watching.Bounds] = {}
"""Of the job in hand."""

_readers: dict[tuple[Path, int], WindowReader] = {}


def _reader(
    directory: Path, window: Window, shards: dict[int, dict[str, Shard]], norms: dict[str, Norms], seed: int
) -> WindowReader:
    """The window's reader, kept from one checkpoint to the next: it holds the order of all rows."""
    key = (directory, window.first_step)
    if key not in _readers:
        _readers.clear()
        _readers[key] = WindowReader(window, shards, norms, seed)
    return _readers[key]


def split(spec: TrainSpec, text: Text) -> tuple[Rows, Rows]:
    """Return the context rows to train on, in random order, and the held-out rows at the corpus' end.

    The order does not depend on the seed: a longer job's contexts begin with a shorter one's, and share its cache.
    """
    n, n_train = text.stream.n_contexts(spec.context_size, text.model.card.bos_token_id), _n_train(spec, text)
    wanted = min(n_train, -(-spec.n_tokens // trainplan.tokens_per_context(spec)))
    rows = np.random.default_rng([0, 0]).permutation(n_train)[:wanted]
    return rows, np.arange(n_train, n)


def _check_processes(spec: TrainSpec, device: str) -> None:
    if device == "cuda" and spec.processes > (there := torch.cuda.device_count()):
        raise BadInput(
            f"processes is {spec.processes}; this trainer's machine has {there} GPUs, and each needs its own."
        )


def _n_train(spec: TrainSpec, text: Text) -> int:
    n = text.stream.n_contexts(spec.context_size, text.model.card.bos_token_id)
    return int(n * (1 - spec.held_out))


def _place(text: str) -> tuple[int, int]:
    number, _, total = text.partition("/")
    return int(number) - 1, int(total)


def _with_text(context: JobContext, spec: TrainSpec) -> TrainSpec:
    """Return the spec with a corpus of the catalog: a dataset of the hub becomes one at the job's start."""
    wanted = corpora.dataset_asked(spec)
    if wanted is None:
        return spec
    file = context.directory / "corpus.json"
    if not file.exists():
        with context.sessions.begin() as session:
            visibility.make_for_job(session, context.job_id)
            stored = corpora.of_dataset(session, wanted)
            name = (stored or corpora.add(session, context.settings, wanted, context.report)).name
        _write_json(file, {"name": name})
    usual = {name: TrainSpec.model_fields[name].default for name in ("text_column", "split")}
    return spec.model_copy(update={"corpus": json.loads(file.read_text())["name"], **usual})


def _text(context: JobContext, spec: TrainSpec) -> Text:
    model = loaded.model(context, spec.model)
    directory = context.settings.corpus_dir(_corpus_hash(context, spec))
    return Text(model, tokenised(model, directory, context.report), spec.context_size)


def _corpus_hash(context: JobContext, spec: TrainSpec) -> str:
    with context.sessions() as session:
        return corpora.corpus_named(session, spec.corpus).hash


def _precision(spec: TrainSpec, device: str) -> torch.dtype:
    return fast_precision(device) if spec.precision == "auto" else getattr(torch, spec.precision)


def _evaluate(run: Run, sae: SaeSpec) -> None:
    spec, model = run.spec, run.text.model
    norms = run.norms()
    learner = Learner.load(run.checkpoint(sae), sae, run.device)
    folded = learner.fold(norms[sae.hooks[0]].scale, norms[sae.hooks[-1]].scale)
    directory = run.context.directory / "sae" / sae.source
    _write_sae(run, sae, folded.tensors, folded.config, directory)
    coder = checkpoints.load_sae(directory, str(model.device))
    n_loss_contexts = trainplan.n_loss_contexts(spec)
    rows = run.held_out[: max(n_loss_contexts, trainplan.EVALUATION_CONTEXTS)]
    ending = _Ending(run, sae, *run.ending_flops())
    metrics = evaluate(
        model,
        coder,
        run.text.stream,
        rows,
        spec.context_size,
        n_loss_contexts,
        spec.max_norm_ratio,
        ending.report,
        checkpoint=run.context.directory / f"{sae.source}.evaluation.safetensors",
    )
    metrics["n_trained_tokens"] = learner.step * spec.batch_size
    _write_json(run.context.directory / f"{sae.source}.metrics.json", metrics)


@dataclass
class _Ending:
    """Says how far the evaluation of an SAE is, and how long those that follow will take."""

    run: Run
    sae: SaeSpec
    reading: float
    splicing: float
    """Work of both halves of the evaluation, as its reports count them."""
    first: tuple[float, float] | None = None
    """Share and time of the first report: an evaluation that is resumed does not begin at nothing."""

    def report(self, share: float, said: str) -> None:
        n, place = len(self.run.spec.saes), self.run.spec.saes.index(self.sae)
        done = 2 * (min(share, 0.5) * self.reading + max(share - 0.5, 0.0) * self.splicing)
        done /= self.reading + self.splicing
        self.first = self.first or (done, time.monotonic())
        gone, since = done - self.first[0], time.monotonic() - self.first[1]
        each = since / gone if gone > 0 else self.run.ending_seconds()
        left = each * (1 - done + n - place - 1)
        which = f"evaluation {place + 1} of {n}" if n > 1 else "evaluation"
        ahead = f", {duration(left)} left" if left else ""
        self.run.context.report(share, f"{which}: {said}{ahead}", left)


def _write_sae(
    run: Run, sae: SaeSpec, tensors: dict[str, torch.Tensor], config: dict[str, Any], directory: Path
) -> None:
    """Write the SAE in SAELens' format, with the normalisation folded in."""
    heads = sae.hook_name.endswith("attn.hook_z")
    whole = {
        **config,
        "d_in": tensors["W_enc"].shape[0],
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if heads else "none",
        "metadata": _metadata(run, sae),
    }
    checkpoints.save_sae(directory, whole, tensors, getattr(torch, run.spec.weights_dtype))


def _metadata(run: Run, sae: SaeSpec) -> dict[str, Any]:
    card = run.text.model.card
    return {
        "model_name": card.id,
        "hook_name": sae.hook_name,
        **({"hook_name_out": sae.hook_name_out} if sae.hook_name_out else {}),
        "context_size": run.spec.context_size,
        "prepend_bos": card.bos_token_id is not None,
        "dataset_path": run.spec.corpus,
        "training_architecture": str(sae.architecture),
        "trained_by": "sae-atlas",
        "sae_lens_version": "6.0.0",  # the shape of this config; without it sae-lens ignores the metadata
    }


def _catalogue(session: Session, run: Run, sae: SaeSpec, metrics: dict[str, Any]) -> Source:
    spec = run.spec.model_copy(update={"saes": (sae,)})
    spent = run.spent
    visibility.make_for_job(session, run.context.job_id)
    origin = {
        "kind": "trained",
        "job": run.context.job_id,
        "spec": spec.model_dump(mode="json", exclude={"harvest_tokens", "visibility"}, exclude_none=True),
        "corpus": {"name": run.spec.corpus, "hash": corpora.corpus_named(session, run.spec.corpus).hash},
        "trained_with": _software(),
        "hours": round((spent.forward_seconds + spent.step_seconds) / 3600, 4),
        "together_with": [other.source for other in run.spec.saes if other is not sae],
    }
    return harvests.catalogue_sae(
        session,
        run.context.settings,
        weights.check_sae(run.context.directory / "sae" / sae.source, None, run.context.settings),
        model_id=run.spec.model,
        set_name=sae.set_name,
        metrics=metrics,
        origin=origin,
    )


def _software() -> dict[str, str]:
    """Versions of what trained it, and the commit where this runs from a checkout."""
    told = {"sae-atlas": version("sae-atlas"), "torch": str(torch.__version__)}
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        said = subprocess.run(git, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return told
    return told | ({"commit": said.stdout.strip()} if said.returncode == 0 else {})


def _queue_harvest(session: Session, run: Run) -> None:
    """Queue one harvest of all trained SAEs, unless an interrupted `finish` has done so already."""
    spec, context = run.spec, run.context
    wanted = trainings.harvest_of(spec)
    if wanted is None:
        return
    sources, asked = wanted.sources, wanted.model_dump(mode="json")
    later = (job for job in jobs.recent(session) if job.id > context.job_id and job.kind == "harvest")
    if not any(job.spec == asked for job in later):
        title = f"Harvest {spec.model}/{sources[0]}" + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
        jobs.submit(session, context.settings, "harvest", title, asked)


def _leave_result(context: JobContext, result: dict[str, Any]) -> None:
    """Keep the result and the snapshots; delete checkpoints and shards of the buffer."""
    _write_json(context.directory / loaded.RESULT, result)
    for path in context.directory.iterdir():
        if path.is_dir() and path.name not in _KEPT:
            shutil.rmtree(path, ignore_errors=True)
        elif path.is_file() and path.name != loaded.RESULT:
            path.unlink(missing_ok=True)


def _write_json(path: Path, value: object) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(value))
    os.replace(scratch, path)
