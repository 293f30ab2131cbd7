"""The arithmetic of a training job before it starts: which contexts, steps and files, and what they cost. Pure.

Activations lie in shards, each of some contexts. Cached, an epoch is one window: all shards, shuffled. In a buffer,
each shard's rows are dealt out to the PARTS windows that follow its making, so a window mixes PARTS shards, no more
than PARTS lie on disk at a time, and any window can be made again from the seed and its shards alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from app.protocol import ModelCard
from app.trainspecs import SaeSpec, TrainSpec

TOKENS_PER_SHARD = 65_536
PARTS = 8
"""Shards that a window of the buffer mixes."""


@dataclass(frozen=True)
class Part:
    """Rows of one shard: the `number`th of `of` random parts of them."""

    shard: int
    epoch: int
    number: int
    of: int


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together and cut into batches."""

    first_step: int
    n_batches: int
    parts: tuple[Part, ...]

    @property
    def end(self) -> int:
        return self.first_step + self.n_batches


@dataclass(frozen=True)
class Plan:
    """What a job does, in order."""

    cached: bool
    """All shards are kept on disk; else only those of the current window."""
    n_contexts: int
    """Distinct contexts read."""
    shards: tuple[tuple[int, int], ...]
    """[start, stop) of each shard in the order of the contexts."""
    windows: tuple[Window, ...]

    @property
    def n_steps(self) -> int:
        return self.windows[-1].end if self.windows else 0


def plan(spec: TrainSpec, card: ModelCard, cache_bytes: int, n_contexts: int | None = None) -> Plan:
    """Return the plan of a job; n_contexts is how many the corpus has for training, None where that is not known.

    The plan of a corpus that gives less than a batch has no windows.
    """
    wanted = -(-spec.n_tokens // tokens_per_context(spec))
    n_contexts = wanted if n_contexts is None else min(wanted, n_contexts)
    cached = is_cached(spec, card, cache_bytes, n_contexts)
    per_shard = TOKENS_PER_SHARD if cached else -(-max(spec.buffer_tokens, PARTS * spec.batch_size) // PARTS)
    size = max(1, per_shard // spec.context_size if cached else -(-per_shard // tokens_per_context(spec)))
    shards = tuple((start, min(start + size, n_contexts)) for start in range(0, n_contexts, size))
    if n_contexts * tokens_per_context(spec) < spec.batch_size:
        return Plan(cached, n_contexts, shards, ())
    windows = _epochs(spec, shards) if cached else _buffered(spec, shards)
    return Plan(cached, n_contexts, shards, tuple(windows))


def tokens_per_context(spec: TrainSpec) -> int:
    """The first position of a context is never learned from."""
    return spec.context_size - 1


def is_cached(spec: TrainSpec, card: ModelCard, cache_bytes: int, n_contexts: int) -> bool:
    if spec.cache != "auto":
        return spec.cache == "disk"
    return n_contexts * tokens_per_context(spec) * row_bytes(spec, card) <= cache_bytes


def row_bytes(spec: TrainSpec, card: ModelCard) -> int:
    """What the activations of one token take at all hooks, in 16 bits, with their norms."""
    return sum(2 * hook_width(hook, card) + 4 for hook in spec.hooks)


def hook_width(hook_name: str, card: ModelCard) -> int:
    return card.n_heads * card.d_head if hook_name.endswith("attn.hook_z") else card.d_model


def _epochs(spec: TrainSpec, shards: tuple[tuple[int, int], ...]) -> Iterator[Window]:
    n_rows = sum(stop - start for start, stop in shards) * tokens_per_context(spec)
    n_batches = max(1, round(n_rows / spec.batch_size))
    for epoch in range(spec.epochs):
        parts = tuple(Part(shard, epoch, 0, 1) for shard in range(len(shards)))
        yield Window(epoch * n_batches, n_batches, parts)


def _buffered(spec: TrainSpec, shards: tuple[tuple[int, int], ...]) -> Iterator[Window]:
    """Windows of at least a batch each: small ones, as the first and the last, are joined to their neighbours."""
    order = [(shard, epoch) for epoch in range(spec.epochs) for shard in range(len(shards))]
    groups: list[list[Part]] = []
    waiting: list[Part] = []
    for number in range(len(order) + PARTS - 1):
        newest = [(place, number - place) for place in range(max(0, number - PARTS + 1), min(number + 1, len(order)))]
        waiting += [Part(*order[place], part, PARTS) for place, part in newest]
        if _n_rows(spec, shards, waiting) >= spec.batch_size:
            groups.append(waiting)
            waiting = []
    groups[-1] += waiting
    step = 0
    for parts in groups:
        n_batches = round(_n_rows(spec, shards, parts) / spec.batch_size)
        yield Window(step, n_batches, tuple(parts))
        step += n_batches


def _n_rows(spec: TrainSpec, shards: tuple[tuple[int, int], ...], parts: Iterable[Part]) -> float:
    contexts = sum((shards[part.shard][1] - shards[part.shard][0]) / part.of for part in parts)
    return contexts * tokens_per_context(spec)


@dataclass(frozen=True)
class Speed:
    """What a machine computes a second, in multiply-adds counted as two."""

    forward: float = 2.5e11
    """The model's forward pass: with it the demo's training is estimated at the 20 minutes that it took."""
    step: float = 1.2e11
    """Training steps of SAEs."""
    measured: bool = False
    """By an earlier job; else a guess for two CPU cores."""


@dataclass(frozen=True)
class Estimate:
    """What a job will take. Bytes and seconds."""

    tokens: int
    """Distinct tokens."""
    tokens_seen: int
    """By each SAE, over all epochs."""
    steps: int
    cached: bool
    memory_bytes: int
    disk_bytes: int
    """At the most at a time: activations and checkpoints."""
    sae_bytes: int
    """What stays: the SAEs' files."""
    forward_flops: float
    step_flops: float
    seconds: float
    """Of the model's runs and the SAEs' steps."""
    looks: int
    """At held-out text, while it trains."""
    evaluation_seconds: float
    """Of those looks and of the evaluation at the end."""


LOOK_CONTEXTS, LOOK_LOSS_CONTEXTS = 32, 8
"""Contexts that a look at held-out text reads, and those on which it tells the loss with the SAE spliced in."""
EVALUATION_CONTEXTS = 800
"""Contexts that the evaluation at the end reads, where there are as many; more where n_eval_tokens asks for it."""


def estimate(
    spec: TrainSpec, card: ModelCard, cache_bytes: int, speed: Speed | None = None, n_contexts: int | None = None
) -> Estimate:
    """Return what a job takes; n_contexts as in `plan`, whose windows are not made for it.

    Steps from a buffer are those of all rows together: the plan rounds each window and may differ by one in fifty.
    """
    speed = speed or Speed()
    wanted = -(-spec.n_tokens // tokens_per_context(spec))
    share = spec.held_out / (1 - spec.held_out)
    n_held_out = max(1, round((wanted if n_contexts is None else n_contexts) * share))
    n_contexts = wanted if n_contexts is None else min(wanted, n_contexts)
    cached = is_cached(spec, card, cache_bytes, n_contexts)
    tokens = n_contexts * tokens_per_context(spec)
    n_steps = _n_steps(spec, cached, tokens)
    seen = n_steps * spec.batch_size
    forward = forward_flops(spec, card) * n_contexts * spec.context_size * (1 if cached else spec.epochs)
    steps = sum(step_flops(sae, card) for sae in spec.saes) * seen
    n_rows = tokens if cached else min(tokens, max(spec.buffer_tokens, PARTS * spec.batch_size))
    weights = [n_weights(sae, card) for sae in spec.saes]
    return Estimate(
        tokens=tokens,
        tokens_seen=seen,
        steps=n_steps,
        cached=cached,
        memory_bytes=4 * card.n_params + sum(20 * n for n in weights) + max(_batch_bytes(spec, s) for s in spec.saes),
        disk_bytes=n_rows * row_bytes(spec, card) + sum(12 * n for n in weights) + 12 * max(weights),
        sae_bytes=sum(weights) * (2 if spec.weights_dtype == "float16" else 4),
        forward_flops=forward,
        step_flops=steps,
        seconds=forward / speed.forward + steps / speed.step,
        looks=_n_looks(spec, n_steps),
        evaluation_seconds=evaluation_flops(spec, card, n_steps, n_held_out) / speed.forward,
    )


def _n_looks(spec: TrainSpec, n_steps: int) -> int:
    return -(-n_steps // spec.evaluate_every_steps)


def n_loss_contexts(spec: TrainSpec) -> int:
    """Contexts on which the evaluation at the end tells the loss with the SAE spliced in."""
    return -(-spec.n_eval_tokens // spec.context_size)


def evaluation_flops(spec: TrainSpec, card: ModelCard, n_steps: int, n_held_out: int) -> float:
    """Of all looks and of the evaluation at the end."""
    ending = sum(ending_flops(spec, card, n_held_out)) * len(spec.saes)
    return looks_flops(spec, card, n_held_out, _n_looks(spec, n_steps), first=True) + ending


def looks_after(spec: TrainSpec, step: int, n_steps: int) -> int:
    """Return how many looks at held-out text follow a step."""
    return 0 if step >= n_steps else _n_looks(spec, n_steps) - step // spec.evaluate_every_steps


def looks_flops(spec: TrainSpec, card: ModelCard, n_held_out: int, n: int, *, first: bool) -> float:
    """Of some looks at all SAEs; the first of a job runs the model also as it is and with zeros at each hook."""
    if not n:
        return 0.0
    read, spliced = _at_most(n_held_out, LOOK_CONTEXTS, LOOK_LOSS_CONTEXTS)
    runs = n * len(spec.saes) + (2 * len({sae.hooks for sae in spec.saes}) if first else 0)
    return n * _reading_flops(spec, card, spec.saes, read) + _running_flops(spec, card, spliced, runs)


def ending_flops(spec: TrainSpec, card: ModelCard, n_held_out: int) -> tuple[float, float]:
    """Of the evaluation of one SAE at the end, on average: its reconstruction, and the loss with it spliced in."""
    n_spliced = n_loss_contexts(spec)
    read, spliced = _at_most(n_held_out, max(n_spliced, EVALUATION_CONTEXTS), n_spliced)
    # Each runs the model apart: clean, with the SAE and with zeros in its place.
    reading = sum(_reading_flops(spec, card, (sae,), read) for sae in spec.saes) / len(spec.saes)
    return reading, _running_flops(spec, card, spliced, 3)


def _at_most(n_held_out: int, n_read: int, n_spliced: int) -> tuple[int, int]:
    return min(n_read, n_held_out), min(n_spliced, n_held_out)


def _reading_flops(spec: TrainSpec, card: ModelCard, saes: Sequence[SaeSpec], n_contexts: int) -> float:
    """Of contexts that are read once for SAEs that encode and decode them."""
    coding = sum(4.0 * hook_width(sae.hooks[0], card) * sae.d_sae for sae in saes)
    return spec.context_size * n_contexts * (forward_flops(spec, card) + coding)


def _running_flops(spec: TrainSpec, card: ModelCard, n_contexts: int, n_runs: int) -> float:
    """Of the whole model on some contexts, so often."""
    whole = card.n_layers * _block_flops(spec, card) + 2.0 * card.d_model * card.d_vocab
    return spec.context_size * n_contexts * n_runs * whole


def _n_steps(spec: TrainSpec, cached: bool, tokens: int) -> int:
    if tokens < spec.batch_size:
        return 0
    whole = tokens / spec.batch_size
    return spec.epochs * max(1, round(whole)) if cached else max(1, round(spec.epochs * whole))


def forward_flops(spec: TrainSpec, card: ModelCard) -> float:
    """Of one token through the blocks up to the deepest hook."""
    depth = 1 + max(int(hook.split(".")[1]) for hook in spec.hooks)
    return min(depth, card.n_layers) * _block_flops(spec, card)


def _block_flops(spec: TrainSpec, card: ModelCard) -> float:
    blocks = max(card.n_params - card.d_vocab * card.d_model, 0) / max(card.n_layers, 1)
    return 2 * blocks + 4 * spec.context_size * card.n_heads * card.d_head


def step_flops(sae: SaeSpec, card: ModelCard) -> float:
    """Of one token in a training step: five dense matrix products, or one where only k latents are active."""
    d_in, d_out = hook_width(sae.hooks[0], card), hook_width(sae.hooks[-1], card)
    if sae.architecture.chooses_k:
        return 2.0 * d_in * sae.d_sae + 8.0 * d_in * (sae.k or 0)
    return (4.0 * d_in + 6.0 * d_out) * sae.d_sae


def n_weights(sae: SaeSpec, card: ModelCard) -> int:
    d_in, d_out = hook_width(sae.hooks[0], card), hook_width(sae.hooks[-1], card)
    skip = d_in * d_out if sae.architecture == "skip_transcoder" else 0
    return (d_in + d_out + 3) * sae.d_sae + d_out + skip


def _batch_bytes(spec: TrainSpec, sae: SaeSpec) -> int:
    per_latent = 6 if sae.architecture.chooses_k else 20
    return spec.batch_size * sae.d_sae * per_latent


def measured_speed(results: Iterable[Mapping[str, Any]]) -> Speed:
    """Return the speed that finished training jobs had (Job.result), the first that says so; else the guess."""
    for result in results:
        told: Any = result.get("speed")
        if isinstance(told, dict) and told.get("forward") and told.get("step"):
            return Speed(float(cast(Any, told)["forward"]), float(cast(Any, told)["step"]), measured=True)
    return Speed()
