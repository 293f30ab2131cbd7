"""Our side of the comparison with sae-dashboard, in a process of its own so that its memory can be measured.

Reads what is asked from the JSON file that is its argument and writes figures.json beside it: whole harvest jobs, from
the plan to the evidence in a catalog, without the effects and the map, which sae-dashboard has not.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sqlalchemy import delete, func, select, text, update

from app import corpora, db, jobs
from app.settings import Settings
from app.specs import HarvestSpec
from app.tables import Evidence, Explanation, Feature, Harvest, JobState, Source
from tests.benchmarks.servers import peak, reset_peak, seconds
from workers.memory import keep_freed_memory
from workers.trainer import harvest
from workers.trainer.kinds import JobContext

CONTEXT = 128


def main() -> None:
    file = Path(sys.argv[1])
    asked = json.loads(file.read_text())
    keep_freed_memory()
    torch.set_num_threads(asked["threads"])
    settings = catalog_of(Settings(data_dir=asked["data_dir"], device="cpu"), file.parent)
    figures: list[dict[str, Any]] = []
    for n_contexts in asked["n_contexts"]:
        context = job(settings, asked["model_id"], asked["source"], n_contexts)
        reading = harvest.reading_of(context)
        if not figures:
            save_tokens_and_acts(reading, max(asked["n_contexts"]), file.parent)
        reset_peak()
        bare_before = seconds(lambda r=reading: bare(r))
        took = whole(context)
        took["bare"] = (bare_before + seconds(lambda r=reading: bare(r))) / 2
        figures.append(
            {
                "n_contexts": n_contexts,
                **took,
                "peak_bytes": peak(),
                "bytes_a_feature": bytes_a_feature(context),
                "some": some_features(context, reading, asked["n_features"]),
            }
        )
        (file.parent / "figures.json").write_text(json.dumps(figures))


def catalog_of(settings: Settings, scratch: Path) -> Settings:
    """A catalog with the same models, SAEs and corpora, without any evidence; SAEs that are added stay in it."""
    for name in ("models", "corpora"):
        (scratch / name).symlink_to(settings.data_dir / name)
    (scratch / "saes").mkdir()
    for sae in (settings.data_dir / "saes").iterdir():
        (scratch / "saes" / sae.name).symlink_to(sae)
    engine = db.connect(settings)
    with engine.connect() as connection:
        connection.execute(text("VACUUM INTO :path"), {"path": str(scratch / "atlas.sqlite")})
    engine.dispose()
    copied = Settings(data_dir=scratch, device="cpu")
    with db.sessions(db.connect(copied)).begin() as session:
        session.execute(update(Source).values(harvest_id=None))
        for table in (Evidence, Feature, Explanation, Harvest):
            session.execute(delete(table))
    return copied


def job(settings: Settings, model: str, source: str, n_contexts: int) -> JobContext:
    make = db.sessions(db.connect(settings))
    with make.begin() as session:
        spec = HarvestSpec(
            model=model,
            sources=(source,),
            corpus=corpora.corpora(session)[0].name,
            n_tokens=n_contexts * (CONTEXT - 1),
            context_size=CONTEXT,
            n_effects=0,
            draw_map=False,
        ).model_dump(mode="json")
        job_id = jobs.submit(session, settings, "harvest", "benchmark", spec).id
        jobs.get(session, job_id).state = JobState.DONE  # no trainer may take it
    settings.job_dir(job_id).mkdir(parents=True)
    return JobContext(settings, make, job_id, spec, settings.job_dir(job_id))


def whole(context: JobContext) -> dict[str, float]:
    """Do a harvest as the trainer does and return the seconds of its phases."""
    kind = harvest.Harvest()
    took = {"plan": 0.0, "read": 0.0, "assemble": 0.0, "preview": 0.0}
    steps: list[str] = []
    took["plan"] = seconds(lambda: steps.extend(kind.plan(context)))
    for step in steps:
        took[step.split()[0]] += seconds(lambda s=step: kind.run(context, s))
    took["finish"] = seconds(lambda: kind.finish(context))
    return took


def bare(reading: harvest.Reading) -> None:
    """Nothing but the model up to the hook and x W_enc, in the same batches."""
    coder, hook = reading.coder, reading.coder.hook_name
    rows = np.arange(reading.n_contexts)
    with torch.inference_mode():
        for _, acts in harvest.read_contexts(reading.model, reading.stream, rows, CONTEXT, [hook], reading.bos):
            torch.addmm(coder.b_enc, acts[hook].flatten(0, 1), coder.W_enc)


def some_features(context: JobContext, reading: harvest.Reading, n: int) -> float:
    """Seconds to read the same text and make the evidence of the first n features alone."""

    def work() -> None:
        directory = context.settings.data_dir / f"some-{reading.n_contexts}"
        directory.mkdir()
        own = dataclasses.replace(reading, directory=directory)
        for number, _ in enumerate(own.shards()):
            harvest.read_shard(context, [own], number)
        records = harvest.assembled(own, own.spilled(), 0, n)
        (directory / "blobs").write_bytes(b"".join(harvest.pack(record.evidence) for record in records))

    return seconds(work)


def bytes_a_feature(context: JobContext) -> float:
    with context.sessions() as session:
        return float(session.scalar(select(func.avg(func.length(Evidence.blob)))) or 0)


def save_tokens_and_acts(reading: harvest.Reading, n_contexts: int, directory: Path) -> None:
    """What the other side reads, and the activations of four contexts that its own are held against."""
    ids = reading.stream.contexts(np.arange(n_contexts), CONTEXT, reading.bos)
    np.save(directory / "tokens.npy", ids.astype(np.int64))
    hook = reading.coder.hook_name
    x = reading.model.read(torch.from_numpy(ids[:4]), [hook])[hook]
    np.save(directory / "acts.npy", reading.coder.encode(x.flatten(0, 1)).view(*x.shape[:2], -1).numpy())


if __name__ == "__main__":
    main()
