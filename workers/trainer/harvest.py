"""The job that computes evidence: one pass of the model over a corpus, every feature of an SAE.

The corpus is cut into shards, each a durable step that spills the SAE's sparse activations; the last steps assemble
evidence from all of them, some latents at a time: memory does not grow with the corpus beyond the records of one chunk
of latents and a bounded sample for correlations; disk does, by 8 bytes for each activation.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from app import corpora, embeddings, harvests, wording
from app.corpora import Stream
from app.errors import Conflict
from app.evidence import Example, FeatureEvidence, pack, unpack
from app.harvests import FeatureRecord
from app.specs import HarvestSpec
from app.tables import Harvest as HarvestRow
from app.tokens import Vocabulary, vocabulary
from workers.activations import read_contexts
from workers.corpora import tokenised
from workers.language_model import LanguageModel
from workers.sae.coders import Coder
from workers.sae.logits import LogitEffects, Nearest, fold_final_norm, logit_effects, nearest_rows
from workers.trainer import assemble, explain, loaded, spill
from workers.trainer.kinds import JobContext, JobKind
from workers.trainer.loaded import RESULT

CONTEXTS_PER_SHARD = 512
LATENTS_PER_STEP = 1_024
LATENTS_PER_CHUNK = 256
SAE_HASH = "sae_hash"
"""File of a job that names the SAE it was planned for."""


@dataclass(frozen=True)
class Reading:
    """Everything a step of one harvest needs."""

    spec: HarvestSpec
    model: LanguageModel
    coder: Coder
    stream: Stream
    vocabulary: Vocabulary
    corpus_id: int
    sae_hash: str

    @property
    def bos(self) -> int | None:
        return self.model.bos_for(self.coder.config)

    @property
    def n_contexts(self) -> int:
        available = self.stream.n_contexts(self.spec.context_size, self.bos)
        return min(available, -(-self.spec.n_tokens // self.positions))

    @property
    def positions(self) -> int:
        """Positions of a context that count: all but the first."""
        return self.spec.context_size - 1

    @property
    def sampling(self) -> assemble.Sampling:
        return assemble.Sampling(
            self.spec.context_size, self.bos, self.spec.n_top, self.spec.n_per_interval, self.spec.seed
        )


class Harvest(JobKind):
    name = "harvest"

    def title(self, spec: dict[str, Any]) -> str:
        asked = HarvestSpec(**spec)
        return f"Harvest {asked.model}/{asked.source} from {asked.corpus}"

    def plan(self, context: JobContext) -> list[str]:
        (context.directory / SAE_HASH).unlink(missing_ok=True)
        reading = reading_of(context)
        (context.directory / SAE_HASH).write_text(reading.sae_hash)
        n_shards = -(-reading.n_contexts // CONTEXTS_PER_SHARD)
        n_parts = -(-reading.coder.d_sae // LATENTS_PER_STEP)
        return [
            *(f"read {i + 1}/{n_shards}" for i in range(n_shards)),
            *(f"assemble {i + 1}/{n_parts}" for i in range(n_parts)),
        ]

    def run(self, context: JobContext, step: str) -> None:
        reading = reading_of(context)
        verb, _, place = step.partition(" ")
        number, total = (int(n) for n in place.split("/"))
        if verb == "read":
            _read_shard(context, reading, number - 1, total)
        else:
            _assemble_part(context, reading, number - 1)

    def finish(self, context: JobContext) -> dict[str, Any]:
        if (done := context.directory / RESULT).exists():
            return json.loads(done.read_text())
        reading = reading_of(context)
        records = list(_stored_records(context, reading))
        n_tokens = reading.n_contexts * reading.positions
        with context.sessions.begin() as session:
            source = harvests.source_named(session, reading.spec.model, reading.spec.source)
            harvests.record(
                session,
                source,
                HarvestRow(
                    corpus_id=reading.corpus_id,
                    tokenizer_hash=reading.model.card.tokenizer_hash,
                    context_size=reading.spec.context_size,
                    bos_token_id=reading.bos,
                    n_tokens=n_tokens,
                    summary=summary(records, reading),
                ),
                records,
            )
            wording.fill(session, context.settings, source)
            embeddings.queue(session, context.settings)
        dead = sum(r.evidence.n_active == 0 for r in records)
        result = {"url": f"/{reading.spec.model}/{reading.spec.source}", "n_tokens": n_tokens, "dead_features": dead}
        loaded.leave_only_result(context, result)
        return result


def reading_of(context: JobContext) -> Reading:
    """Load what a harvest job works with; model and SAE stay in memory between its steps."""
    spec = HarvestSpec(**context.spec)
    model = loaded.model(context, spec.model)
    with context.sessions() as session:
        source = harvests.source_named(session, spec.model, spec.source)
        corpus = corpora.corpus_named(session, spec.corpus)
    planned = context.directory / SAE_HASH
    if planned.exists() and planned.read_text() != source.sae_hash:
        raise Conflict(f"{spec.model}/{spec.source} was replaced by another SAE during its harvest. Start it again.")
    settings = context.settings
    return Reading(
        spec,
        model,
        loaded.coder(context, source.sae_hash),
        tokenised(model, settings.corpus_dir(corpus.hash), context.report),
        vocabulary(settings.model_dir(spec.model) / "vocabulary.json"),
        corpus.id,
        source.sae_hash,
    )


def _shard_path(context: JobContext, number: int) -> Path:
    return context.directory / f"spill-{number:05d}.bin"


def _read_shard(context: JobContext, reading: Reading, number: int, total: int) -> None:
    """Run the model over one shard's contexts and spill the SAE's activations."""
    path = _shard_path(context, number)
    if path.exists():
        return
    rows = np.arange(number * CONTEXTS_PER_SHARD, min((number + 1) * CONTEXTS_PER_SHARD, reading.n_contexts))
    started, n_read = time.monotonic(), 0
    parts: list[tuple[npt.NDArray[Any], ...]] = []
    for part, columns in sparse_activations(reading, rows):
        parts.append(columns)
        n_read += len(part) * reading.spec.context_size
        speed = n_read / (time.monotonic() - started)
        left = (total - number) * CONTEXTS_PER_SHARD * reading.spec.context_size / speed
        context.report(
            n_read / (len(rows) * reading.spec.context_size),
            f"read {(number * CONTEXTS_PER_SHARD + n_read // reading.spec.context_size):,} of {reading.n_contexts:,} "
            f"contexts, {speed:,.0f} tokens/s, {left / 60:.0f} min left",
        )
    latents, tokens, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    spill.write(path, latents, tokens, values, reading.coder.d_sae)


def sparse_activations(
    reading: Reading, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], tuple[npt.NDArray[Any], ...]]]:
    """Yield (contexts, (latents, tokens, values)) a forward pass at a time; first positions are left out."""
    size = reading.spec.context_size
    hook = reading.coder.hook_name
    for part, acts in read_contexts(reading.model, reading.stream, rows, size, [hook], reading.bos):
        found = reading.coder.encode_sparse(acts[hook][:, 1:].flatten(0, 1))
        row = found.rows.cpu().numpy()
        tokens = part[row // reading.positions] * size + row % reading.positions + 1
        yield part, (found.latents.cpu().numpy(), tokens, found.values.float().cpu().numpy())


def _spill(context: JobContext, reading: Reading) -> spill.Spill:
    n_shards = -(-reading.n_contexts // CONTEXTS_PER_SHARD)
    return spill.Spill([_shard_path(context, i) for i in range(n_shards)], reading.coder.d_sae)


def _part_path(context: JobContext, number: int) -> Path:
    return context.directory / f"features-{number:05d}.json"


def _assemble_part(context: JobContext, reading: Reading, number: int) -> None:
    path = _part_path(context, number)
    if path.exists():
        return
    start = number * LATENTS_PER_STEP
    end = min(start + LATENTS_PER_STEP, reading.coder.d_sae)
    lines: list[str] = []
    for record in assembled(reading, _spill(context, reading), start, end):
        lines.append(json.dumps({**record.__dict__, "evidence": pack(record.evidence).hex()}))
        context.report(
            (record.index - start) / (end - start), f"assembled {record.index:,} of {reading.coder.d_sae:,} features"
        )
    scratch = path.with_suffix(".new")
    scratch.write_text("\n".join(lines))
    os.replace(scratch, path)


def _stored_records(context: JobContext, reading: Reading) -> Iterator[FeatureRecord]:
    n_parts = -(-reading.coder.d_sae // LATENTS_PER_STEP)
    for number in range(n_parts):
        for line in _part_path(context, number).read_text().splitlines():
            row = json.loads(line)
            yield FeatureRecord(**{**row, "evidence": unpack(bytes.fromhex(row["evidence"]))})


def assembled(reading: Reading, records: spill.Spill, start: int, end: int) -> Iterator[FeatureRecord]:
    """Yield the features start..end from the spilled activations and the weights."""
    n_tokens = reading.n_contexts * reading.positions
    correlation = _correlation(records, reading)
    unembedding = folded_unembedding(reading.model)
    for low in range(start, end, LATENTS_PER_CHUNK):
        high = min(low + LATENTS_PER_CHUNK, end)
        chunk = records.records(low, high)
        W_dec = reading.coder.W_dec
        # A hook that is not the residual stream (attn.hook_z) has no direct path of this width to the logits.
        fits = W_dec.shape[1] == unembedding.shape[1]
        effects = logit_effects(W_dec[low:high], unembedding) if fits else None
        nearest = nearest_rows(W_dec, low, high)
        strongest = correlation.strongest(low, high)
        for place in range(high - low):
            found = assemble.activity(low + place, *chunk.of(place), reading.stream, reading.sampling)
            evidence = _evidence(found, n_tokens, place, effects, nearest, strongest, W_dec[low + place])
            yield _record(low + place, evidence, reading)


def _correlation(records: spill.Spill, reading: Reading) -> assemble.Correlation:
    """The correlations of one spill, kept for the steps that assemble the rest of its latents."""
    if _correlations.get("key") != records.key:
        _correlations.clear()
        made = assemble.Correlation.of(records, reading.coder.d_sae, reading.n_contexts, reading.spec.context_size)
        _correlations.update(key=records.key, made=made)
    return _correlations["made"]


_correlations: dict[str, Any] = {}


def folded_unembedding(model: LanguageModel) -> torch.Tensor:
    centred = isinstance(model.final_norm(), nn.LayerNorm)
    return fold_final_norm(model.unembedding().float(), model.final_gain(), centred=centred)


def _evidence(
    found: assemble.Activity,
    n_tokens: int,
    place: int,
    effects: LogitEffects | None,
    nearest: Nearest,
    strongest: tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]],
    row: torch.Tensor,
) -> FeatureEvidence:
    empty = np.zeros(0)
    components = row.abs().topk(min(3, len(row))).indices
    # Correlation means nothing for a feature that never fired.
    alive = found.n_active > 0
    return FeatureEvidence(
        n_active=found.n_active,
        n_tokens=n_tokens,
        max_act=found.max_act,
        mean_act=found.mean_act,
        histogram=found.histogram,
        top=found.top,
        intervals=found.intervals,
        top_logit_ids=effects.top_ids[place].cpu().numpy() if effects else empty,
        top_logits=effects.top[place].cpu().numpy() if effects else empty,
        bottom_logit_ids=effects.bottom_ids[place].cpu().numpy() if effects else empty,
        bottom_logits=effects.bottom[place].cpu().numpy() if effects else empty,
        logits_low=float(effects.low[place]) if effects else 0.0,
        logits_high=float(effects.high[place]) if effects else 0.0,
        logits_histogram=effects.histogram[place].cpu().numpy() if effects else empty,
        neighbours=nearest.indices[place].cpu().numpy(),
        cosines=nearest.cosines[place].cpu().numpy(),
        correlated=strongest[0][place] if alive else empty,
        pearson=strongest[1][place] if alive else empty,
        neurons=components.cpu().numpy(),
        neuron_weights=row[components].cpu().numpy(),
    )


def _record(index: int, evidence: FeatureEvidence, reading: Reading) -> FeatureRecord:
    peaks = [_token_at(e, e.peak, reading) for e in evidence.top]
    before = [_token_at(e, e.peak - 1, reading) for e in evidence.top]
    promoted = [reading.vocabulary.string(int(i)) for i in evidence.top_logit_ids]
    return FeatureRecord(
        index=index,
        evidence=evidence,
        label=explain.heuristic_label(peaks, before, promoted),
        top_token=peaks[0] if peaks else "",
        top_logit=promoted[0] if promoted else "",
    )


def _token_at(example: Example, position: int, reading: Reading) -> str:
    ids = reading.stream.context(example.context, reading.spec.context_size, reading.bos)
    return reading.vocabulary.string(ids[max(position, 0)])


def summary(records: list[FeatureRecord], reading: Reading) -> dict[str, Any]:
    """Distributions over the whole SAE: log10 densities of live features, and the counts at both ends."""
    densities = np.array([r.evidence.density for r in records])
    live = densities[densities > 0]
    counts, edges = np.histogram(np.log10(live), bins=40) if len(live) else (np.zeros(0), np.zeros(0))
    return {
        "density_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "n_dead": int((densities == 0).sum()),
        "n_dense": int((densities > 0.1).sum()),
        "l0": float(densities.sum()),
        "model_hash": reading.model.card.hash,
        "sae_hash": reading.sae_hash,
        "seed": reading.spec.seed,
    }
