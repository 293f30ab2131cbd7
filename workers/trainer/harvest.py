"""The job that computes evidence: one pass of the model over a corpus, every feature of all SAEs given together.

The corpus is cut into shards; a shard is a durable step that runs the model once, to the deepest hook, and spills each
SAE's sparse activations. More steps assemble evidence, some latents at a time, and measure causal effects, some
contexts at a time. All of them are shares that any trainer on the database may take (workers.trainer.shares), and none
depends on who did the others: evidence is a function of text, SAE and seed alone, to the bit.

Memory does not grow with the corpus beyond the records of one chunk of latents and a bounded sample for correlations;
disk does, by 8 bytes for each activation, given back at the end unless they are to be kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from sqlalchemy.orm import Session
from torch import nn

from app import corpora, embeddings, harvests, jobs, maps, spill, wording
from app.corpora import Stream
from app.errors import BadInput, Conflict
from app.evidence import Effect, FeatureEvidence, pack, pack_effects, unpack, unpack_effects
from app.harvests import FeatureRecord
from app.labels import Text, row_of
from app.specs import HarvestSpec, MapSpec
from app.spill import Kept
from app.tables import Harvest as HarvestRow
from app.tables import HarvestState
from app.tokens import Vocabulary, vocabulary
from workers.activations import read_contexts
from workers.corpora import tokenised
from workers.language_model import LanguageModel
from workers.sae.coders import Coder
from workers.sae.logits import LogitEffects, Nearest, fold_final_norm, logit_effects, nearest_rows
from workers.trainer import assemble, distributions, loaded, shares
from workers.trainer.effects import Peak, effects
from workers.trainer.kinds import JobContext, JobKind
from workers.trainer.loaded import RESULT
from workers.trainer.negatives import TokenPlaces, hard_negatives, random_silent

CONTEXTS_PER_SHARD = 512
CONTEXTS_PER_EFFECTS = 1_024
LATENTS_PER_STEP = 1_024
LATENTS_PER_CHUNK = 256
ENCODE_BYTES = 256 * 2**20
"""Most memory that the dense activations of one batch take while they are made sparse."""
SAE_HASHES = "sae_hashes"
"""File of a job that names the SAEs it was planned for."""
PLAN = "plan.json"
_HARD_NEIGHBOURS = 3


@dataclass(frozen=True)
class Reading:
    """Everything a step needs of one SAE's harvest."""

    spec: HarvestSpec
    source: str
    model: LanguageModel
    coder: Coder
    stream: Stream
    vocabulary: Vocabulary
    corpus_id: int
    sae_hash: str
    directory: Path
    """Where its sparse activations lie: with the job, or where they are kept."""
    n_read: int | None = None
    """Contexts read so far, while the harvest is partial."""

    @property
    def bos(self) -> int | None:
        return self.model.bos_for(self.coder.config)

    @property
    def n_contexts(self) -> int:
        if self.n_read is not None:
            return self.n_read
        available = self.stream.n_contexts(self.spec.context_size, self.bos)
        return min(available, -(-self.spec.n_tokens // self.positions))

    @property
    def positions(self) -> int:
        """Positions of a context that count: all but the first."""
        return self.spec.context_size - 1

    @property
    def n_tokens(self) -> int:
        return self.n_contexts * self.positions

    @property
    def sampling(self) -> assemble.Sampling:
        return assemble.Sampling(
            self.spec.context_size, self.bos, self.spec.n_top, self.spec.n_per_interval, self.spec.seed
        )

    @property
    def text(self) -> Text:
        return Text(self.stream, self.vocabulary, self.spec.context_size, self.bos)

    @property
    def n_parts(self) -> int:
        """Steps that assemble its features."""
        return -(-self.coder.d_sae // LATENTS_PER_STEP)

    def shard(self, number: int) -> Path:
        start, end = _bounds(number, CONTEXTS_PER_SHARD, self.n_contexts)
        return spill.shard_path(self.directory, start, end)

    def shards(self) -> list[Path]:
        return [self.shard(number) for number in range(-(-self.n_contexts // CONTEXTS_PER_SHARD))]

    def spilled(self) -> spill.Spill:
        return spill.Spill(self.shards(), self.coder.d_sae)


class Harvest(JobKind):
    name = "harvest"
    shared: ClassVar[bool] = True

    def title(self, spec: dict[str, Any]) -> str:
        asked = HarvestSpec(**spec)
        return title_of(asked)

    def plan(self, context: JobContext) -> list[str]:
        (context.directory / SAE_HASHES).unlink(missing_ok=True)
        readings = readings_of(context)
        _write(context.directory / SAE_HASHES, json.dumps([r.sae_hash for r in readings]))
        steps = _steps(readings)
        _write(context.directory / PLAN, json.dumps(steps))
        shares.forget(context)
        return steps

    def run(self, context: JobContext, step: str) -> None:
        readings = readings_of(context)
        if step.startswith("preview"):
            _preview(context, readings, step)
            return
        phases = shares.phases(_planned(context))
        shares.take(context, phases, step, lambda name: _work(context, readings, name))

    def help(self, context: JobContext) -> None:
        """Take shares of a job that another trainer leads, until none is free."""
        readings = readings_of(context)
        shares.help_with(context, shares.phases(_planned(context)), lambda name: _work(context, readings, name))

    def has_free_share(self, context: JobContext) -> bool:
        planned = context.directory / PLAN
        return planned.exists() and shares.free(context, shares.phases(_planned(context)))

    def finish(self, context: JobContext) -> dict[str, Any]:
        if (done := context.directory / RESULT).exists():
            return json.loads(done.read_text())
        readings = readings_of(context)
        phases = shares.phases(_planned(context))
        shares.complete(context, phases, lambda name: _work(context, readings, name))
        measured = _stored_effects(context) if readings[0].spec.n_effects else None
        dead: dict[str, int] = {}
        for number, reading in enumerate(readings):
            records = _stored_records(context, reading, number, measured)
            dead[reading.source] = _record(context, reading, records, HarvestState.COMPLETE)
        _tidy_kept(readings)
        spec = readings[0].spec
        if spec.draw_map:
            for reading in readings:
                _queue_map(context, reading)
        result: dict[str, Any] = {
            "url": f"/{spec.model}/{spec.sources[0]}",
            "n_tokens": readings[0].n_tokens,
            "dead_features": dead[spec.sources[0]] if len(dead) == 1 else dead,
        }
        loaded.leave_only_result(context, result)
        return result


def title_of(spec: HarvestSpec) -> str:
    return f"Harvest {', '.join(f'{spec.model}/{source}' for source in spec.sources)} from {spec.corpus}"


def readings_of(context: JobContext) -> list[Reading]:
    """Load what a harvest job works with; model and SAEs stay in memory between its steps.

    Raises Conflict when one of the SAEs was replaced since the plan was made, BadInput when they do not read the same
    tokens, as when one was trained with a first token before every text and another without.
    """
    spec = HarvestSpec(**context.spec)
    model = loaded.model(context, spec.model)
    with context.sessions() as session:
        sources = [harvests.source_named(session, spec.model, name) for name in spec.sources]
        corpus = corpora.corpus_named(session, spec.corpus)
    hashes = [source.sae_hash for source in sources]
    planned = context.directory / SAE_HASHES
    if planned.exists():
        for source, old in zip(sources, json.loads(planned.read_text()), strict=True):
            if source.sae_hash != old:
                raise Conflict(
                    f"{spec.model}/{source.name} was replaced by another SAE during its harvest. Start it again."
                )
    coders = loaded.coders(context, hashes)
    if len({model.bos_for(coder.config) for coder in coders}) > 1:
        raise BadInput("These SAEs do not all read texts with the model's first token; harvest them apart.")
    settings = context.settings
    stream = tokenised(model, settings.corpus_dir(corpus.hash), context.report)
    words = vocabulary(settings.model_dir(spec.model) / "vocabulary.json")
    readings: list[Reading] = []
    for number, (source, coder) in enumerate(zip(sources, coders, strict=True)):
        directory = context.directory / f"activations-{number}"
        if spec.keep_activations:
            about = _kept(spec, model, coder, source.sae_hash, corpus.hash)
            directory = settings.activations_dir(_key(about, model))
            if not (directory / spill.ABOUT).exists():
                about.write(directory)
        directory.mkdir(parents=True, exist_ok=True)
        readings.append(Reading(spec, source.name, model, coder, stream, words, corpus.id, source.sae_hash, directory))
    return readings


def reading_of(context: JobContext) -> Reading:
    """The reading of a harvest's first source."""
    return readings_of(context)[0]


def _kept(spec: HarvestSpec, model: LanguageModel, coder: Coder, sae_hash: str, corpus_hash: str) -> Kept:
    return Kept(
        spec.model,
        sae_hash,
        corpus_hash,
        model.card.tokenizer_hash,
        spec.context_size,
        model.bos_for(coder.config),
        coder.d_sae,
    )


def _key(about: Kept, model: LanguageModel) -> str:
    """Names kept activations by all they depend on."""
    return hashlib.sha256(json.dumps([vars(about), model.card.hash]).encode()).hexdigest()[:16]


def _steps(readings: Sequence[Reading]) -> list[str]:
    n_shards, n_contexts = len(readings[0].shards()), readings[0].n_contexts
    marks = {-(-n_shards // 8), -(-n_shards // 2)} - {n_shards}
    steps: list[str] = []
    for number in range(1, n_shards + 1):
        steps.append(f"read {number}/{n_shards}")
        if number in marks:
            steps.append(f"preview {number}/{n_shards}")
    for reading in readings:
        steps += [f"assemble {reading.source} {i + 1}/{reading.n_parts}" for i in range(reading.n_parts)]
    if readings[0].spec.n_effects:
        n_effects = -(-n_contexts // CONTEXTS_PER_EFFECTS)
        steps += [f"effects {i + 1}/{n_effects}" for i in range(n_effects)]
    return steps


def _planned(context: JobContext) -> list[str]:
    return json.loads((context.directory / PLAN).read_text())


def _work(context: JobContext, readings: Sequence[Reading], step: str) -> None:
    """Do one share."""
    verb, *names, place = step.split(" ")
    number = int(place.partition("/")[0])
    match verb:
        case "read":
            read_shard(context, readings, number - 1)
        case "assemble":
            index = readings[0].spec.sources.index(names[0])
            _assemble_part(context, readings[index], index, number - 1)
        case _:
            _measure_effects(context, readings, number - 1)


def _bounds(number: int, size: int, n: int) -> tuple[int, int]:
    return number * size, min((number + 1) * size, n)


def read_shard(context: JobContext, readings: Sequence[Reading], number: int) -> None:
    """Run the model over one shard's contexts and spill the activations of every SAE that lacks them."""
    missing = [r for r in readings if not (r.shard(number).exists() and distributions.path(r.shard(number)).exists())]
    if not missing:
        return
    first = missing[0]
    rows = np.arange(*_bounds(number, CONTEXTS_PER_SHARD, first.n_contexts))
    started, n_read, size = time.monotonic(), 0, first.spec.context_size
    parts: list[list[tuple[npt.NDArray[Any], ...]]] = [[] for _ in missing]
    figures = [distributions.Figures.empty(size, r.coder.d_out) for r in missing]
    for part, columns in sparse_activations(missing, rows, figures):
        for column, found in zip(parts, columns, strict=True):
            column.append(found)
        n_read += len(part)
        speed = n_read * size / (time.monotonic() - started)
        context.report(n_read / len(rows), _progress(context, first, n_read, speed))
    for reading, columns, seen in zip(missing, parts, figures, strict=True):
        latents, tokens, values = (np.concatenate(column) for column in zip(*columns, strict=True))
        seen.count(tokens, size, len(rows))
        seen.write(distributions.path(reading.shard(number)))
        spill.write(reading.shard(number), latents, tokens, values, reading.coder.d_sae)


def _progress(context: JobContext, reading: Reading, n_read: int, speed: float) -> str:
    done, working = shares.counts(context, "read")
    n_done = min(done * CONTEXTS_PER_SHARD + n_read, reading.n_contexts)
    together = speed * max(working, 1)
    left = (reading.n_contexts - n_done) * reading.spec.context_size / together
    others = f" by {working} trainers" if working > 1 else ""
    return (
        f"read {n_done:,} of {reading.n_contexts:,} contexts, {together:,.0f} tokens/s{others}, "
        f"{_minutes(left)} left of reading"
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def sparse_activations(
    readings: Sequence[Reading], rows: npt.NDArray[np.int64], figures: Sequence[distributions.Figures] = ()
) -> Iterator[tuple[npt.NDArray[np.int64], list[tuple[npt.NDArray[Any], ...]]]]:
    """Yield (contexts, (latents, tokens, values) of each SAE) a forward pass at a time; first positions are left out.

    The model runs once for all of them. Figures, where given, see the reconstructions of the first pass.
    """
    first = readings[0]
    size, positions = first.spec.context_size, first.positions
    hooks = list(dict.fromkeys(hook for r in readings for hook in (r.coder.hook_name, *_out(r, figures))))
    for part, acts in read_contexts(first.model, first.stream, rows, size, hooks, first.bos):
        columns: list[tuple[npt.NDArray[Any], ...]] = []
        for number, reading in enumerate(readings):
            x = acts[reading.coder.hook_name][:, 1:]
            columns.append(_sparse(reading, x.flatten(0, 1), part, positions))
            if figures and part[0] == rows[0]:
                target = acts[reading.coder.hook_name_out][:, 1:] if _out(reading, figures) else x
                figures[number].add(reading.coder, x, target)
        yield part, columns


def _out(reading: Reading, figures: Sequence[distributions.Figures]) -> tuple[str, ...]:
    """The hook a transcoder predicts, where its reconstruction is looked at."""
    other = reading.coder.hook_name_out != reading.coder.hook_name
    return (reading.coder.hook_name_out,) if other and figures else ()


def _sparse(
    reading: Reading, x: torch.Tensor, contexts: npt.NDArray[np.int64], positions: int
) -> tuple[npt.NDArray[Any], ...]:
    per_batch = max(1, ENCODE_BYTES // (4 * reading.coder.d_sae))
    found: list[tuple[npt.NDArray[Any], ...]] = []
    for start in range(0, len(x), per_batch):
        part = reading.coder.encode_sparse(x[start : start + per_batch])
        row = part.rows.cpu().numpy() + start
        tokens = contexts[row // positions] * (positions + 1) + row % positions + 1
        found.append(
            (part.latents.cpu().numpy().astype("<u4"), tokens.astype("<u4"), part.values.float().cpu().numpy())
        )
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


def _preview(context: JobContext, readings: Sequence[Reading], step: str) -> None:
    """Show what the finished shards say, where the source has no complete evidence from this corpus yet."""
    total = len(readings[0].shards())
    for reading in readings:
        done = 0
        while done < total and reading.shard(done).exists() and distributions.path(reading.shard(done)).exists():
            done += 1
        with context.sessions() as session:
            source = harvests.source_named(session, reading.spec.model, reading.source)
            complete = harvests.complete_from(session, source, reading.corpus_id)
        if complete or not done:
            continue
        n_read = _bounds(done - 1, CONTEXTS_PER_SHARD, reading.n_contexts)[1]
        partial = replace(reading, n_read=n_read)
        context.report(0.0, f"showing what {done} of {total} shards say of {reading.source}")
        # All of them before the catalog is written: a transaction that waits for features locks everybody out.
        records: list[FeatureRecord] = []
        for record in assembled(partial, partial.spilled(), 0, reading.coder.d_sae):
            records.append(record)
            context.report((record.index + 1) / (reading.coder.d_sae + 1))
        _record(context, partial, iter(records), HarvestState.PARTIAL, {"progress": {"done": done, "total": total}})


def _part_path(context: JobContext, number: int, part: int) -> Path:
    return context.directory / f"features-{number}-{part:05d}.json"


def _assemble_part(context: JobContext, reading: Reading, number: int, part: int) -> None:
    path = _part_path(context, number, part)
    if path.exists():
        return
    start, end = _bounds(part, LATENTS_PER_STEP, reading.coder.d_sae)
    lines: list[str] = []
    peaks: list[tuple[int, int, int]] = []
    for record in assembled(reading, reading.spilled(), start, end):
        lines.append(json.dumps({**_plain(record), "evidence": pack(record.evidence).hex()}))
        peaks += [(e.context, e.peak, record.index) for e in record.evidence.top[: reading.spec.n_effects]]
        context.report(
            (record.index - start) / (end - start),
            f"assembled {record.index:,} of {reading.coder.d_sae:,} features of {reading.source}",
        )
    _write(_peaks_path(path), json.dumps(peaks))
    _write(path, "\n".join(lines))


def _plain(record: FeatureRecord) -> dict[str, Any]:
    return {"index": record.index, "label": record.label, "top_token": record.top_token, "top_logit": record.top_logit}


def _peaks_path(part: Path) -> Path:
    return part.with_suffix(".peaks")


def _effects_path(context: JobContext, number: int) -> Path:
    return context.directory / f"effects-{number:05d}.json"


def _measure_effects(context: JobContext, readings: Sequence[Reading], number: int) -> None:
    """Measure the causal effect of the top examples that lie in some contexts, for all SAEs."""
    path = _effects_path(context, number)
    if path.exists():
        return
    first = readings[0]
    low, high = _bounds(number, CONTEXTS_PER_EFFECTS, first.n_contexts)
    peaks = [
        Peak(c, position, k, latent)
        for k, reading in enumerate(readings)
        for part in range(reading.n_parts)
        for c, position, latent in json.loads(_peaks_path(_part_path(context, k, part)).read_text())
        if low <= c < high
    ]
    coders = [reading.coder for reading in readings]
    started = time.monotonic()
    lines: list[str] = []
    asked = (first.spec.context_size, first.bos, first.spec.effect_reach)
    for peak, effect in effects(first.model, coders, first.stream, peaks, *asked):
        lines.append(json.dumps([peak.coder, peak.latent, pack_effects([effect]).hex()]))
        speed = len(lines) / (time.monotonic() - started)
        left = (len(peaks) - len(lines)) / speed
        context.report(
            len(lines) / len(peaks),
            f"measured {len(lines):,} of {len(peaks):,} effects of contexts {low:,} to {high:,}, {speed:,.0f}/s, "
            f"{_minutes(left)} left of them",
        )
    _write(path, "\n".join(lines))


def _stored_effects(context: JobContext) -> dict[tuple[int, int], list[Effect]]:
    """Every measured effect by (number of the source, latent)."""
    found: dict[tuple[int, int], list[Effect]] = {}
    for path in sorted(context.directory.glob("effects-*.json")):
        for line in path.read_text().splitlines():
            number, latent, packed = json.loads(line)
            found.setdefault((number, latent), []).extend(unpack_effects(bytes.fromhex(packed)))
    return found


def _stored_records(
    context: JobContext, reading: Reading, number: int, measured: dict[tuple[int, int], list[Effect]] | None
) -> Iterator[FeatureRecord]:
    for part in range(reading.n_parts):
        for line in _part_path(context, number, part).read_text().splitlines():
            row = json.loads(line)
            blob = bytes.fromhex(row.pop("evidence"))
            evidence = unpack(blob)
            effects = _in_order(evidence, measured, number, row["index"])
            yield FeatureRecord(**row, evidence=evidence, effects=effects, blob=blob)


def _in_order(
    evidence: FeatureEvidence,
    measured: dict[tuple[int, int], list[Effect]] | None,
    number: int,
    latent: int,
) -> tuple[Effect, ...] | None:
    """A feature's effects in the order of its top examples; None where none were to be measured."""
    if measured is None:
        return None
    by_context = {effect.context: effect for effect in measured.get((number, latent), [])}
    return tuple(by_context[e.context] for e in evidence.top if e.context in by_context)


def _record(
    context: JobContext,
    reading: Reading,
    records: Iterator[FeatureRecord],
    state: HarvestState,
    more: dict[str, Any] | None = None,
) -> int:
    """Put the evidence into the catalog and return the number of dead features."""
    densities: list[float] = []

    def counted() -> Iterator[FeatureRecord]:
        for record in records:
            densities.append(record.evidence.density)
            yield record

    row = HarvestRow(
        corpus_id=reading.corpus_id,
        tokenizer_hash=reading.model.card.tokenizer_hash,
        context_size=reading.spec.context_size,
        bos_token_id=reading.bos,
        n_tokens=reading.n_tokens,
        summary={},
        state=state,
        job_id=context.job_id,
        activations=reading.directory.name if reading.spec.keep_activations else "",
    )
    with context.sessions.begin() as session:
        source = harvests.source_named(session, reading.spec.model, reading.source)
        harvest = harvests.record(session, source, row, counted())
        harvest.summary = summary(np.array(densities), reading) | (more or {})
        if source.harvest_id == harvest.id:
            wording.fill(session, context.settings, source)
            embeddings.queue(session, context.settings)
    return sum(density == 0 for density in densities)


def _tidy_kept(readings: Sequence[Reading]) -> None:
    """Delete kept shards that a longer one of the same contexts made needless."""
    for reading in readings:
        used = {path for _, _, path in spill.shards(reading.directory)}
        for path in set(reading.directory.glob("*.bin")) - used:
            path.unlink(missing_ok=True)
            distributions.path(path).unlink(missing_ok=True)


def _queue_map(context: JobContext, reading: Reading) -> None:
    """Queue a map of the decoder directions, unless there is one or an interrupted `finish` has done so already."""
    spec = MapSpec(model=reading.spec.model, source=reading.source, seed=reading.spec.seed)
    asked = spec.model_dump(mode="json")
    with context.sessions.begin() as session:
        source = harvests.source_named(session, spec.model, spec.source)
        if maps.map_of(session, source.id) is None and not _queued(session, context, asked):
            jobs.submit(session, context.settings, "map", f"Draw the map of {spec.model}/{spec.source}", asked)


def _queued(session: Session, context: JobContext, spec: dict[str, Any]) -> bool:
    return any(j.kind == "map" and j.spec == spec and j.id > context.job_id for j in jobs.recent(session))


def assembled(reading: Reading, records: spill.Spill, start: int, end: int) -> Iterator[FeatureRecord]:
    """Yield the features start..end from the spilled activations and the weights."""
    correlation, places = _statistics(records, reading)
    unembedding = reading.model.unembedding()
    silence = _Silence(reading, records, places)
    W_dec = reading.coder.W_dec
    unit = torch.nn.functional.normalize(W_dec, dim=-1)
    for low, high in records.chunks(start, end, LATENTS_PER_CHUNK):
        chunk = records.records(low, high)
        # A hook that is not the residual stream (attn.hook_z) has no direct path of this width to the logits.
        fits = W_dec.shape[1] == unembedding.shape[1]
        promoted = logit_effects(folded(reading.model, W_dec[low:high]), unembedding) if fits else None
        nearest = nearest_rows(unit, low, high)
        strongest = correlation.strongest(low, high)
        for place in range(high - low):
            tokens, values = chunk.of(place)
            found = assemble.activity(low + place, tokens, values, reading.stream, reading.sampling)
            evidence = _evidence(found, reading.n_tokens, place, promoted, nearest, strongest, W_dec[low + place])
            evidence = silence.added(low + place, evidence, tokens)
            label, top_token, top_logit = row_of(evidence, reading.text)
            yield FeatureRecord(low + place, evidence, label, top_token, top_logit)


def _statistics(records: spill.Spill, reading: Reading) -> tuple[assemble.Correlation, TokenPlaces]:
    """Correlations and places of tokens of one spill, kept for the steps that assemble the rest of its latents."""
    if _kept_statistics.get("key") != records.key:
        _kept_statistics.clear()
        size = reading.spec.context_size
        made = (
            assemble.Correlation.of(records, reading.coder.d_sae, reading.n_contexts, size),
            TokenPlaces.of(reading.stream, reading.n_contexts, size, reading.bos),
        )
        _kept_statistics.update(key=records.key, made=made)
    return _kept_statistics["made"]


_kept_statistics: dict[str, Any] = {}


class _Silence:
    """Adds to a feature's evidence the contexts in which it stays silent; remembers where neighbours peak."""

    def __init__(self, reading: Reading, records: spill.Spill, places: TokenPlaces) -> None:
        self._reading, self._records, self._places = reading, records, places
        self._peaks: dict[int, list[tuple[int, int]]] = {}

    def added(self, latent: int, evidence: FeatureEvidence, tokens: npt.NDArray[np.int64]) -> FeatureEvidence:
        spec, size = self._reading.spec, self._reading.spec.context_size
        active = np.unique(tokens // size)
        seed = [spec.seed, latent]
        return replace(
            evidence,
            silent=random_silent(active, self._reading.n_contexts, size, spec.n_silent, seed),
            hard_negatives=hard_negatives(
                evidence.top,
                active,
                evidence.neighbours[:_HARD_NEIGHBOURS].tolist(),
                self._places,
                self._peaks_of,
                self._reading.text.token_at,
                size,
                spec.n_hard,
                seed,
            ),
        )

    def _peaks_of(self, latent: int) -> Iterator[tuple[int, int]]:
        if latent not in self._peaks:
            tokens, values = self._records.records(latent, latent + 1).of(0)
            highest = np.lexsort((tokens, -values))[:50]
            self._peaks[latent] = [divmod(int(t), self._reading.spec.context_size) for t in tokens[highest]]
        yield from self._peaks[latent]


def folded(model: LanguageModel, rows: torch.Tensor) -> torch.Tensor:
    """Directions with the model's final norm folded in, ready for its unembedding."""
    centred = isinstance(model.final_norm(), nn.LayerNorm)
    return fold_final_norm(rows.float(), model.final_gain(), centred=centred)


def _evidence(
    found: assemble.Activity,
    n_tokens: int,
    place: int,
    promoted: LogitEffects | None,
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
        neighbours=nearest.indices[place].cpu().numpy(),
        cosines=nearest.cosines[place].cpu().numpy(),
        correlated=strongest[0][place] if alive else empty,
        pearson=strongest[1][place] if alive else empty,
        neurons=components.cpu().numpy(),
        neuron_weights=row[components].cpu().numpy(),
        **_logits(promoted, place),
    )


def _logits(promoted: LogitEffects | None, place: int) -> dict[str, Any]:
    """The fields of evidence that say what a feature does to the logits."""
    if promoted is None:
        names = ("top_logit_ids", "top_logits", "bottom_logit_ids", "bottom_logits", "logits_histogram")
        return {**{name: np.zeros(0) for name in names}, "logits_low": 0.0, "logits_high": 0.0}
    return {
        "top_logit_ids": promoted.top_ids[place].cpu().numpy(),
        "top_logits": promoted.top[place].cpu().numpy(),
        "bottom_logit_ids": promoted.bottom_ids[place].cpu().numpy(),
        "bottom_logits": promoted.bottom[place].cpu().numpy(),
        "logits_histogram": promoted.histogram[place].cpu().numpy(),
        "logits_low": float(promoted.low[place]),
        "logits_high": float(promoted.high[place]),
        "logits_mean": float(promoted.mean[place]),
        "logits_deviation": float(promoted.deviation[place]),
        "logits_skew": float(promoted.skew[place]),
        "logits_kurtosis": float(promoted.kurtosis[place]),
    }


def summary(densities: npt.NDArray[np.float64], reading: Reading) -> dict[str, Any]:
    """Distributions over the whole SAE (workers.trainer.distributions) and what they were made from."""
    figures = distributions.Figures.merged([distributions.path(path) for path in reading.shards()])
    return {
        **distributions.of_densities(densities),
        **figures.summary(),
        "decoder_norms": distributions.of_norms(reading.coder.W_dec.float().norm(dim=-1).cpu().numpy()),
        "model_hash": reading.model.card.hash,
        "sae_hash": reading.sae_hash,
        "seed": reading.spec.seed,
    }


def _write(path: Path, content: str) -> None:
    """Write a file whole or not at all; two trainers may write the same one."""
    scratch = path.with_name(f"{path.name}.new-{os.getpid()}")
    scratch.write_text(content)
    os.replace(scratch, path)
