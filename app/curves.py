"""What a training job tells while it runs: its curves, its snapshots, and warnings in words. Pure but for files.

Curves are JobMetric rows, one every few optimiser steps, whose values are numbers by name. Names of the whole job stand
alone (`tokens_per_second`, `tokens`); those of an SAE carry its source's name where the job trains several:
`12-demo-k16/explained_variance`, and stand alone too where it trains one. `series` reads both. Metrics of an SAE:

    loss                squared error a token over the variance, plus the penalties: what is minimised
    explained_variance  1 - squared error / variance about the mean, of the batch
    l0                  mean number of active latents on a token
    dead_fraction       share of latents without an activation in the last dead_after_tokens tokens
    lr, grad_norm       learning rate; norm of the gradient before clipping
    penalty             what is added to the loss: L1, L0 or AuxK, weighted
    coefficient         the weight of the L1 or L0 penalty at this step (it rises in the warm-up)
    ce_loss_score       on held-out text, every evaluate_every_steps
    held_out_explained_variance, held_out_l0        likewise

Snapshots lie in the job's directory, one file for each SAE and look at held-out text, named by step so that they sort:

    snapshots/{source}/{step:09d}.json.gz    a Snapshot (JSON, gzip)
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from app.tables import JobMetric
from app.trainspecs import SaeSpec

SNAPSHOTS = "snapshots"


class _Stored(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Histogram(_Stored):
    """Counts between neighbouring edges."""

    edges: tuple[float, ...]
    """One more than counts."""
    counts: tuple[int, ...]


class Example(_Stored):
    """Some tokens around a feature's activation."""

    tokens: tuple[str, ...]
    """As shown; untrusted text."""
    values: tuple[float, ...]
    """The feature's activation on each."""


class FeatureNow(_Stored):
    """What a feature is at a step: the same features in all snapshots of an SAE, so that they can be followed."""

    index: int
    density: float
    """Share of the probe's tokens on which it is active."""
    max_act: float
    examples: tuple[Example, ...]
    """Strongest first, one a context; none where it is silent."""


class Snapshot(_Stored):
    """One look at an SAE in training, on the same held-out tokens each time."""

    step: int
    tokens: int
    """Tokens trained on by then."""
    n_probe: int
    """Held-out tokens looked at."""
    activations: Histogram
    """Non-zero activations by log10 of their size, in units of the model's own activations."""
    densities: Histogram
    """Latents by log10 of their density on the probe; silent ones are in none and counted by n_silent."""
    n_silent: int
    features: tuple[FeatureNow, ...]


def write_snapshot(job_dir: Path, source: str, snapshot: Snapshot) -> None:
    """Write a snapshot, whole or not at all; the same step again replaces it."""
    file = job_dir / SNAPSHOTS / source / f"{snapshot.step:09d}.json.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".new")
    scratch.write_bytes(gzip.compress(snapshot.model_dump_json().encode(), mtime=0))
    os.replace(scratch, file)


def snapshot_steps(job_dir: Path, source: str) -> tuple[int, ...]:
    """Return the steps at which an SAE was looked at, in order."""
    return tuple(sorted(int(file.name[:9]) for file in (job_dir / SNAPSHOTS / source).glob("*.json.gz")))


def read_snapshot(job_dir: Path, source: str, step: int) -> Snapshot:
    """Return the snapshot of a step. Raises FileNotFoundError."""
    file = job_dir / SNAPSHOTS / source / f"{step:09d}.json.gz"
    return Snapshot.model_validate_json(gzip.decompress(file.read_bytes()))


Curve = list[tuple[int, float]]
"""(step, value), in the order of steps."""


def series(points: Sequence[JobMetric], sources: Sequence[str]) -> dict[str, dict[str, Curve]]:
    """Return the curves by source and metric. Those of the whole job are in each source's; NaN is left out."""
    found: dict[str, dict[str, Curve]] = {source: {} for source in sources}
    for point in points:
        for source, name, value in _values(point, sources):
            found[source].setdefault(name, []).append((point.step, value))
    return found


def _values(point: JobMetric, sources: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    for name, value in point.values.items():
        if not isinstance(value, int | float) or value != value:
            continue
        owner, _, metric = name.rpartition("/")
        for source in (owner,) if owner in sources else () if owner else sources:
            yield source, metric, float(value)


def key(source: str, metric: str, n_sources: int) -> str:
    """Return the name under which a metric of an SAE is written."""
    return metric if n_sources == 1 else f"{source}/{metric}"


@dataclass(frozen=True)
class Warning:
    """Something that will probably not come right by itself."""

    kind: str
    """dead, poor, dense, sparse, early_penalty or diverging."""
    text: str
    """What is seen, with its numbers."""
    advice: str
    """What to change."""


EARLY_SHARE = 0.1
"""Nothing but a penalty that is too high or a divergence is judged before this share of the steps."""
MANY_DEAD = 0.25
POOR = 0.6
DENSE_SHARE = 0.1
DENSE_L0 = 300.0


def warnings(curves: Mapping[str, Curve], spec: SaeSpec, n_steps: int) -> tuple[Warning, ...]:
    """Return what is worth a warning by now in the curves of one SAE, the gravest first."""
    steps = [curve[-1][0] for curve in curves.values() if curve]
    if not steps:
        return ()
    share = max(steps) / max(n_steps, 1)
    found: list[Warning | None] = [_diverging(curves, spec), _early_penalty(curves, spec, share)]
    if share >= EARLY_SHARE:
        found += [_dead(curves, spec), _poor(curves, spec, share), _dense(curves, spec, share), _sparse(curves, spec)]
    return tuple(warning for warning in found if warning is not None)


def _recent(curves: Mapping[str, Curve], name: str, n: int = 5) -> float | None:
    """The mean of a curve's last points: one batch says little."""
    last = [value for _, value in curves.get(name, [])[-n:]]
    return sum(last) / len(last) if last else None


def _diverging(curves: Mapping[str, Curve], spec: SaeSpec) -> Warning | None:
    """The loss rises well above its best, for a while, though no penalty is still warming up."""
    losses = curves.get("loss", [])
    warm = max(spec.l1_warmup_steps or 0, spec.l0_warmup_steps or 0)
    settled = [value for step, value in losses if step > warm]
    if len(settled) < 10:
        return None
    best, now = min(settled[:-5]), sum(settled[-5:]) / 5
    if now < 1.3 * best + 0.02 or min(settled[-5:]) < 1.1 * best:
        return None
    return Warning(
        "diverging",
        f"The loss is {now:.3g} over the last points; its best was {best:.3g}.",
        f"Lower lr (now {spec.lr:.1e}), to {spec.lr / 3:.1e} for example, or raise warmup_steps (now "
        f"{spec.warmup_steps:,}).",
    )


def _early_penalty(curves: Mapping[str, Curve], spec: SaeSpec, share: float) -> Warning | None:
    """Hardly anything is active while the training has only begun: the penalty won before features formed."""
    l0, explained = _recent(curves, "l0"), _recent(curves, "explained_variance")
    coefficient, warmup = _penalty_of(spec)
    if coefficient is None or l0 is None or explained is None or not 0.01 <= share <= 0.3:
        return None
    if l0 >= 3 or explained >= POOR:
        return None
    return Warning(
        "early_penalty",
        f"Only {l0:.1f} latents are active on a token, and {explained:.0%} of the variance is explained, "
        f"{share:.0%} into the training.",
        f"The penalty is too high at the start: lower {coefficient} (now {getattr(spec, coefficient):g}), or raise "
        f"{warmup} (now {getattr(spec, warmup):,}) so that features form first.",
    )


def _penalty_of(spec: SaeSpec) -> tuple[str | None, str]:
    if spec.l1_coefficient is not None:
        return "l1_coefficient", "l1_warmup_steps"
    return ("l0_coefficient", "l0_warmup_steps") if spec.l0_coefficient is not None else (None, "")


def _dead(curves: Mapping[str, Curve], spec: SaeSpec) -> Warning | None:
    dead = _recent(curves, "dead_fraction", 3)
    if dead is None or dead < MANY_DEAD:
        return None
    coefficient, warmup = _penalty_of(spec)
    if spec.treatment == "none":
        advice = "Let dead_latents revive them (leave the field out), or lower d_sae."
    elif spec.treatment == "aux_k":
        advice = f"Raise aux_k (now {spec.aux_k}), towards d_model / 2, or k; lower lr (now {spec.lr:.1e}) or d_sae."
    else:
        advice = (
            f"Lower {coefficient} (now {getattr(spec, coefficient or 'lr'):g}) or raise {warmup}; lower lr (now "
            f"{spec.lr:.1e}); or choose topk, whose AuxK loss revives more."
        )
    text = f"{dead:.0%} of {spec.d_sae:,} latents have not been active in the last {spec.dead_after_tokens:,} tokens."
    return Warning("dead", text, advice)


def _poor(curves: Mapping[str, Curve], spec: SaeSpec, share: float) -> Warning | None:
    explained = _recent(curves, "explained_variance")
    if explained is None or explained >= POOR or share < 0.25:
        return None
    coefficient, _ = _penalty_of(spec)
    change = f"lower {coefficient}" if coefficient else f"raise k (now {spec.k})"
    return Warning(
        "poor",
        f"{explained:.0%} of the variance is explained; most SAEs reach 60 to 95 %.",
        f"To reconstruct better {change}, raise d_sae (now {spec.d_sae:,}), or train on more tokens. Below 0 % look at "
        "lr first.",
    )


def _dense(curves: Mapping[str, Curve], spec: SaeSpec, share: float) -> Warning | None:
    l0 = _recent(curves, "l0")
    coefficient, warmup = _penalty_of(spec)
    past_warmup = not coefficient or curves["l0"][-1][0] > 2 * getattr(spec, warmup) if l0 is not None else False
    if l0 is None or share < 0.25 or not past_warmup or l0 <= min(DENSE_SHARE * spec.d_sae, DENSE_L0):
        return None
    change = f"raise {coefficient} (now {getattr(spec, coefficient):g})" if coefficient else f"lower k (now {spec.k})"
    return Warning(
        "dense",
        f"{l0:,.0f} of {spec.d_sae:,} latents are active on a token; SAEs that people can read have 20 to 150.",
        f"For sparser features {change}.",
    )


def _sparse(curves: Mapping[str, Curve], spec: SaeSpec) -> Warning | None:
    """A penalty that leaves next to nothing, after the start."""
    l0 = _recent(curves, "l0")
    coefficient, _ = _penalty_of(spec)
    if l0 is None or coefficient is None or l0 >= 1 or curves["l0"][-1][0] < 100:
        return None
    return Warning(
        "sparse",
        f"Only {l0:.2f} latents are active on a token: the SAE says next to nothing.",
        f"Lower {coefficient} (now {getattr(spec, coefficient):g}).",
    )
