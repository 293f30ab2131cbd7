"""Harvest of the demo SAE from its corpus against the bare cost: forward to the hook and the encode matmul."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app import corpora, db, spill
from app.settings import Settings
from app.specs import HarvestSpec
from tests.benchmarks.servers import demo, interleaved, medians, seconds
from workers.memory import keep_freed_memory
from workers.trainer import harvest
from workers.trainer.kinds import JobContext

N_CONTEXTS, CONTEXT, ROUNDS = 128, 128, 5
DEMO_TOKENS = 1_200_000


def main() -> dict[str, Any]:
    """Interleave reading with the bare cost; assemble all features from as many records as the demo has."""
    keep_freed_memory()
    with demo() as servers, tempfile.TemporaryDirectory() as scratch:
        reading = _reading(servers.settings, servers.model, servers.source, Path(scratch))
        number = itertools.count()
        sides = {
            "bare": lambda: seconds(lambda: _bare(reading)),
            "reading": lambda: seconds(lambda: _read([reading], Path(scratch) / f"{next(number)}.bin")),
            "two SAEs": lambda: seconds(lambda: _read([reading] * 2, Path(scratch) / f"{next(number)}.bin")),
        }
        took = medians(interleaved(sides, ROUNDS, warm_up=1))
        n = N_CONTEXTS * CONTEXT
        whole_corpus = _as_large_as_the_demo(reading, Path(scratch), DEMO_TOKENS // n)
        d_sae = reading.coder.d_sae
        assembly = seconds(lambda: sum(1 for _ in harvest.assembled(*whole_corpus, 0, d_sae)))
        fewer_latents = seconds(lambda: sum(1 for _ in harvest.assembled(*whole_corpus, 0, d_sae // 2)))
        half = _as_large_as_the_demo(reading, Path(scratch), DEMO_TOKENS // n // 2)
        fewer_tokens = seconds(lambda: sum(1 for _ in harvest.assembled(*half, 0, d_sae)))
    whole = took["reading"] * DEMO_TOKENS / n + assembly
    return {
        "bare": f"{n / took['bare']:,.0f} tokens/s",
        "harvest, reading": f"{n / took['reading']:,.0f} tokens/s",
        "ratio": round(took["bare"] / took["reading"], 2),
        "reading two SAEs in one pass over reading one": round(took["two SAEs"] / took["reading"], 2),
        "assembling all over half of the latents": round(assembly / fewer_latents, 2),
        "assembling from all over half of the tokens": round(assembly / fewer_tokens, 2),
        f"assembling {servers.d_sae:,} features": f"{assembly:.1f} s",
        "ratio of a whole harvest of 1.2M tokens (aim >= 0.6)": round(took["bare"] * DEMO_TOKENS / n / whole, 2),
    }


def _reading(settings: Settings, model: str, source: str, scratch: Path) -> harvest.Reading:
    make = db.sessions(db.connect(settings))
    with make() as session:
        corpus = corpora.corpora(session)[0].name
    n_tokens = N_CONTEXTS * (CONTEXT - 1)
    spec = HarvestSpec(model=model, sources=(source,), corpus=corpus, n_tokens=n_tokens, context_size=CONTEXT)
    return harvest.reading_of(JobContext(settings, make, 0, spec.model_dump(), scratch))


def _as_large_as_the_demo(
    reading: harvest.Reading, scratch: Path, n_shards: int
) -> tuple[harvest.Reading, spill.Spill]:
    """A spill of n_shards shards, each with the activations that were read, placed one after another in the corpus."""
    shard = spill.Spill([scratch / "0.bin"], reading.coder.d_sae).records(0, reading.coder.d_sae)
    latents = np.repeat(np.arange(reading.coder.d_sae), np.diff(shard.starts))
    paths = [scratch / f"shard-{i}.bin" for i in range(n_shards)]
    for i, path in enumerate(paths):
        spill.write(path, latents, shard.tokens + i * N_CONTEXTS * CONTEXT, shard.values, reading.coder.d_sae)
    spec = reading.spec.model_copy(update={"n_tokens": n_shards * N_CONTEXTS * (CONTEXT - 1)})
    return dataclasses.replace(reading, spec=spec), spill.Spill(paths, reading.coder.d_sae)


def _bare(reading: harvest.Reading) -> None:
    """Nothing but the model up to the hook and x W_enc, in the same batches."""
    coder, hook = reading.coder, reading.coder.hook_name
    with torch.inference_mode():
        for rows in np.array_split(np.arange(N_CONTEXTS), N_CONTEXTS // 16):
            ids = torch.from_numpy(reading.stream.contexts(rows, CONTEXT, reading.bos))
            x = reading.model.read(ids, [hook])[hook].flatten(0, 1)
            torch.addmm(coder.b_enc, x, coder.W_enc)


def _read(readings: list[harvest.Reading], path: Path) -> None:
    columns = [found for _, found in harvest.sparse_activations(readings, np.arange(N_CONTEXTS))]
    for number, reading in enumerate(readings):
        parts = zip(*(found[number] for found in columns), strict=True)
        latents, tokens, values = (np.concatenate(part) for part in parts)
        spill.write(
            path.with_stem(f"{path.stem}-{number}" if number else path.stem),
            latents,
            tokens,
            values,
            reading.coder.d_sae,
        )
