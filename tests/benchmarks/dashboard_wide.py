"""Harvest of a trained SAE of 16,384 latents against sae-dashboard 0.8.0 and the bare cost, as `dashboard` does it.

The SAE is trained on first use, on the demo's model and corpus by this project's trainer, and kept in the cache
directory: sae-dashboard's cost depends on how often features fire, which random weights do not tell.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import platformdirs
import torch
from sqlalchemy import select

from app import corpora, db, harvests, jobs, weights
from app.settings import Settings
from app.tables import JobState, Source
from app.trainspecs import TrainSpec
from tests.benchmarks import _harvest, dashboard, servers
from workers.memory import keep_freed_memory
from workers.trainer.kinds import JobContext
from workers.trainer.train import Train

TRAINING: dict[str, Any] = {
    "hook_name": "blocks.12.hook_resid_post",
    "set_name": "wide",
    "architecture": "topk",
    "d_sae": 16_384,
    "k": 32,
    "context_size": 128,
    "n_tokens": 300_000,
    "epochs": 2,
    "batch_size": 2_048,
    "warmup_steps": 50,
    "aux_k": 256,
    "dead_after_tokens": 40_000,
    "held_out": 0.005,
    "n_eval_tokens": 5_000,
    "harvest_tokens": 0,
}


def main() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sae-atlas-bench-") as scratch:
        given = dashboard.demo(Path(scratch))
        demo = servers.installed(given)
        (copy := Path(scratch) / "wide").mkdir()
        settings = _harvest.catalog_of(given, copy)
        source = catalogued(settings, demo.model_id, trained(settings, demo.model_id))
        about = source.metrics
        return {
            "explained variance / dead latents of the SAE": f"{about['explained_variance']:.3f} / {about['dead']:.1%}",
            **dashboard.compared(settings, source, Path(scratch)),
        }


def trained(settings: Settings, model: str) -> Path:
    """Return the directory of the SAE, trained where it is not there yet, with its metrics beside it."""
    name = hashlib.sha256(json.dumps(TRAINING).encode()).hexdigest()[:12]
    cache = platformdirs.user_cache_path("sae-atlas") / "bench" / f"sae-{TRAINING['d_sae']}-{name}"
    if not cache.exists():
        print(f"training an SAE of {TRAINING['d_sae']:,} latents, once", file=sys.stderr)
        keep_freed_memory()
        torch.set_num_threads(os.cpu_count() or 1)
        context = _job(settings, model)
        kind = Train()
        for step in kind.plan(context):
            print(f"  {step}", file=sys.stderr)
            kind.run(context, step)
        kind.finish(context)
        with context.sessions() as session:
            made = session.scalars(select(Source).where(Source.set_name == TRAINING["set_name"])).one()
        fresh = cache.with_name(f"{cache.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(settings.sae_dir(made.sae_hash), fresh / "sae")
        (fresh / "metrics.json").write_text(json.dumps(made.metrics))
        fresh.rename(cache)
    return cache


def _job(settings: Settings, model: str) -> JobContext:
    make = db.sessions(db.connect(settings))
    with make.begin() as session:
        spec = TrainSpec(model=model, corpus=corpora.corpora(session)[0].name, **TRAINING).model_dump(mode="json")
        job_id = jobs.submit(session, settings, "train", "benchmark", spec).id
        jobs.get(session, job_id).state = JobState.DONE  # no trainer may take it
    settings.job_dir(job_id).mkdir(parents=True)
    return JobContext(settings, make, job_id, spec, settings.job_dir(job_id))


def catalogued(settings: Settings, model: str, cache: Path) -> Source:
    with db.sessions(db.connect(settings)).begin() as session:
        return harvests.catalogue_sae(
            session,
            settings,
            weights.check_sae(cache / "sae", None, settings),
            model_id=model,
            set_name=str(TRAINING["set_name"]),
            metrics=json.loads((cache / "metrics.json").read_text()),
            origin={},
        )


if __name__ == "__main__":
    from tests.benchmarks.__main__ import show

    show("dashboard_wide", main())
