"""Looks at SAEs in training on held-out text: ce_loss_score, histograms, a few features with examples (app.curves).

Nothing here touches the training's state or randomness: a look that is repeated after a crash changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from app.curves import Example, FeatureNow, Histogram, Snapshot, read_snapshot, snapshot_steps, write_snapshot
from app.trainplan import LOOK_CONTEXTS, LOOK_LOSS_CONTEXTS
from workers.activations import Norms, Text, read_contexts
from workers.sae.coders import CODERS, Coder
from workers.sae.stats import ReconstructionStats
from workers.sae.training import Folded
from workers.trainer.evaluate import LossBounds, ce_loss_score, loss_bounds

N_FEATURES = 8
N_EXAMPLES = 3
AROUND = 10
"""Tokens shown before and after a peak."""
_BYTES = 128 * 2**20
_LOG_EDGES = tuple(round(-3 + 0.25 * i, 2) for i in range(25))
_DENSITY_EDGES = tuple(round(-5 + 0.25 * i, 2) for i in range(21))


Bounds = dict[tuple[str, str], LossBounds]
"""By an SAE's hooks. Filled by the first look; they stay the same through a training."""


@dataclass(frozen=True)
class Probe:
    """Held-out contexts and their activations at the job's hooks, without first positions."""

    text: Text
    rows: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    """[context, pos], first position left out"""
    acts: dict[str, Tensor]
    """[context * pos, d] in the model's own units"""
    kept: Tensor
    """[context * pos], False for outliers"""
    bounds: Bounds


def make_probe(text: Text, held_out: npt.NDArray[np.int64], norms: Mapping[str, Norms], bounds: Bounds) -> Probe:
    rows, bos = held_out[:LOOK_CONTEXTS], text.model.card.bos_token_id
    parts: dict[str, list[Tensor]] = {hook: [] for hook in norms}
    for _, acts in read_contexts(text.model, text.stream, rows, text.context_size, list(norms), bos):
        for hook in norms:
            parts[hook].append(acts[hook][:, 1:].flatten(0, 1).float())
    found = {hook: torch.cat(part) for hook, part in parts.items()}
    kept = torch.stack([found[hook].norm(dim=-1) <= limit.limit for hook, limit in norms.items()]).all(dim=0)
    return Probe(text, rows, text.stream.contexts(rows, text.context_size, bos)[:, 1:], found, kept, bounds)


def coder_of(folded: Folded, metadata: Mapping[str, Any]) -> Coder:
    """Return an SAE in training as the one that it would be in use."""
    config = {"normalize_activations": "none", "metadata": dict(metadata), **folded.config}
    return CODERS[folded.config["architecture"]](tensors=folded.tensors, config=config)


@dataclass(frozen=True)
class Place:
    """Whose snapshot it is, and of when."""

    job_dir: Path
    source: str
    step: int
    tokens: int


@torch.inference_mode()
def look(probe: Probe, coder: Coder, limit: float, place: Place) -> dict[str, float]:
    """Return held-out metrics and write a snapshot; its features are those of the first snapshot."""
    stats, columns, sizes = ReconstructionStats(), [], torch.zeros(len(_LOG_EDGES) - 1)
    counts = torch.zeros(coder.d_sae)
    x, target = probe.acts[coder.hook_name], probe.acts[coder.hook_name_out]
    followed = _followed(place)
    batch = max(1, _BYTES // (4 * coder.d_sae))
    for at in torch.arange(len(x)).split(batch):
        acts = coder.encode(x[at]) * probe.kept[at, None]
        seen = at[probe.kept[at]]
        stats.add(x[seen], coder, target[seen])
        counts += (acts > 0).sum(dim=0)
        sizes += torch.histc(acts[acts > 0].log10(), len(sizes), _LOG_EDGES[0], _LOG_EDGES[-1])
        columns.append(acts if followed is None else acts[:, torch.tensor(followed)])
    n = int(probe.kept.sum())
    density = counts / n
    if followed is None:
        followed = _choose(density)
        columns = [acts[:, torch.tensor(followed)] for acts in columns]
    table = torch.cat(columns)
    snapshot = Snapshot(
        step=place.step,
        tokens=place.tokens,
        n_probe=n,
        activations=Histogram(edges=_LOG_EDGES, counts=tuple(int(c) for c in sizes)),
        densities=_density_histogram(density),
        n_silent=int((counts == 0).sum()),
        features=tuple(_feature(probe, i, table[:, n_th], density[i]) for n_th, i in enumerate(followed)),
    )
    write_snapshot(place.job_dir, place.source, snapshot)
    found = stats.metrics()
    rows, hooks = probe.rows[:LOOK_LOSS_CONTEXTS], (coder.hook_name, coder.hook_name_out)
    if hooks not in probe.bounds:
        probe.bounds[hooks] = loss_bounds(probe.text, coder, rows, limit)
    score = ce_loss_score(probe.text, coder, rows, limit, probe.bounds[hooks])
    metrics = {"ce_loss_score": score, "held_out_l0": found["l0"]}
    return metrics | {"held_out_explained_variance": found["explained_variance"]}


def _followed(place: Place) -> list[int] | None:
    steps = snapshot_steps(place.job_dir, place.source)
    if not steps:
        return None
    return [feature.index for feature in read_snapshot(place.job_dir, place.source, steps[0]).features]


def _choose(density: Tensor) -> list[int]:
    """Features to follow: spread over those that fire now and then, from rare to common."""
    order = density.argsort(stable=True)
    usual = order[(density[order] > 0.001) & (density[order] < 0.2)]
    pool = usual if len(usual) >= N_FEATURES else order[-max(N_FEATURES, len(order) // 2) :]
    places = torch.linspace(0, len(pool) - 1, min(N_FEATURES, len(pool))).long()
    return sorted(set(pool[places].tolist()))


def _density_histogram(density: Tensor) -> Histogram:
    logs = density[density > 0].log10()
    counts = torch.histc(logs, len(_DENSITY_EDGES) - 1, _DENSITY_EDGES[0], _DENSITY_EDGES[-1])
    return Histogram(edges=_DENSITY_EDGES, counts=tuple(int(c) for c in counts))


def _feature(probe: Probe, index: int, acts: Tensor, density: Tensor) -> FeatureNow:
    by_context = acts.view(probe.ids.shape)
    peaks, positions = by_context.max(dim=1)
    strongest = peaks.argsort(descending=True, stable=True)[:N_EXAMPLES]
    examples = tuple(_example(probe, by_context, int(c), int(positions[c])) for c in strongest if peaks[c] > 0)
    return FeatureNow(index=index, density=_short(density), max_act=_short(acts.max()), examples=examples)


def _example(probe: Probe, acts: Tensor, context: int, position: int) -> Example:
    window = slice(max(0, position - AROUND), position + AROUND + 1)
    ids: Sequence[int] = probe.ids[context, window].tolist()
    tokens = tuple(probe.text.model.tokenizer.decode([i]) for i in ids)
    return Example(tokens=tokens, values=tuple(_short(v) for v in acts[context, window]))


def _short(value: Tensor) -> float:
    """Four digits: snapshots stay small."""
    number = float(value)
    return 0.0 if number == 0 else round(number, 3 - math.floor(math.log10(abs(number))))
