"""A harvest that two real trainer processes share, one of which is killed: the same evidence to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select, text
from sqlalchemy.orm import Session, sessionmaker

from app import corpora, db, documents, harvests, jobs, weights
from app.settings import Settings
from app.specs import HarvestSpec
from app.tables import Evidence, Harvest, Job, JobShare, JobState, Model
from tests.tiny import TEXT, Tiny
from tests.workers import slow_trainer
from workers.language_model import LanguageModel
from workers.trainer import harvest
from workers.trainer.kinds import JobContext

REPOSITORY = Path(__file__).resolve().parents[2]
CONTEXT = 9


class Bench:
    """A data directory with the tiny model, two SAEs and a corpus, and trainers on it."""

    def __init__(self, settings: Settings, tiny: Tiny, scratch: Path) -> None:
        self.settings = settings
        (settings.data_dir / "models").mkdir(parents=True)
        (settings.data_dir / "models" / "tiny").symlink_to(tiny.model.path)
        self.engine = db.connect(settings)
        if self.engine.dialect.name == "postgresql":
            with self.engine.begin() as connection:
                fresh = "DROP SCHEMA public CASCADE; CREATE SCHEMA public; DROP SCHEMA IF EXISTS dbos CASCADE"
                connection.execute(text(fresh))
        db.migrate(self.engine)
        self.sessions: sessionmaker[Session] = db.sessions(self.engine)
        self.trainers: list[subprocess.Popen[bytes]] = []
        self.begun: list[tuple[int, int]] = []
        words = TEXT.split()
        (scratch / "c.txt").write_text("\n\n".join(" ".join(words[i % 7 :: 1 + i % 5]) for i in range(60)))
        with self.sessions.begin() as session:
            card = LanguageModel.load(Path(tiny.model.path)).card
            session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
            corpora.add_corpus(session, settings, documents.read(scratch / "c.txt"), "c")
            for sae, name in ((tiny.topk, "x"), (tiny.standard, "y")):
                facts = weights.check_sae(Path(sae.path), card.d_model, settings)
                harvests.catalogue_sae(session, settings, facts, model_id="tiny", set_name=name, metrics={}, origin={})

    def submit(self) -> int:
        spec = HarvestSpec(
            model="tiny",
            sources=("1-x", "1-y"),
            corpus="c",
            n_tokens=1_500,
            context_size=CONTEXT,
            n_top=4,
            n_effects=2,
            draw_map=False,
        )  # pyright: ignore[reportCallIssue]
        with self.sessions.begin() as session:
            return jobs.submit(session, self.settings, "harvest", "h", spec.model_dump(mode="json")).id

    def trainer(self, slot: int) -> subprocess.Popen[bytes]:
        log = (self.settings.data_dir / f"trainer-{slot}.log").open("ab")
        given = self.settings.model_dump(exclude_unset=True) | {"slot": slot, "threads": 1}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment |= {f"SAE_ATLAS_{name.upper()}": str(value) for name, value in given.items()}
        command = [sys.executable, "-m", "tests.workers.slow_trainer"]
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
        self.trainers.append(process)
        return process

    def job(self, job_id: int) -> Job:
        with self.sessions() as session:
            return jobs.get(session, job_id)

    def until(self, condition: Callable[[], Any], seconds: float = 180.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def log(self) -> str:
        return "\n".join(p.read_text() for p in self.settings.data_dir.glob("trainer-*.log"))[-6000:]

    def starts(self, job_id: int) -> list[tuple[int, int]]:
        """Which process began which shard; remembered, as the job's directory goes with its end."""
        file = self.settings.job_dir(job_id) / "starts"
        with suppress(FileNotFoundError):
            lines = file.read_text().splitlines()
            self.begun = [(int(shard), int(pid)) for shard, pid in (line.split() for line in lines)]
        return self.begun

    def ended(self, job_id: int) -> bool:
        self.starts(job_id)
        return JobState(self.job(job_id).state).ended

    def done(self, job_id: int) -> set[str]:
        with self.sessions() as session:
            return set(session.scalars(select(JobShare.name).where(JobShare.job_id == job_id, JobShare.done)))

    def evidence(self) -> dict[tuple[int, int], tuple[bytes, bytes | None]]:
        with self.sessions() as session:
            rows = session.execute(select(Evidence, Harvest.source_id).join(Harvest, Harvest.id == Evidence.harvest_id))
            return {(source_id, e.index): (e.blob, e.effects) for e, source_id in rows}

    def summaries(self) -> list[dict[str, Any]]:
        with self.sessions() as session:
            return list(session.scalars(select(Harvest.summary).order_by(Harvest.source_id)))

    def close(self) -> None:
        for process in self.trainers:
            process.kill()
            process.wait()
        self.engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def bench(request: pytest.FixtureRequest, tiny: Tiny, tmp_path: Path) -> Iterator[Bench]:
    url = ""
    if request.param == "postgresql":
        server: str = request.getfixturevalue("postgres_server")
        url = server.replace("postgresql://", "postgresql+psycopg://")
    settings = Settings(
        data_dir=tmp_path / "data", database_url=url, device="cpu", beat_seconds=0.3, takeover_seconds=3.0
    )
    made = Bench(settings, tiny, tmp_path)
    yield made
    made.close()


def alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same harvest in this process, cut the same way."""
    for name in ("CONTEXTS_PER_SHARD", "LATENTS_PER_STEP", "CONTEXTS_PER_EFFECTS"):
        monkeypatch.setattr(harvest, name, getattr(slow_trainer, name))
    with bench.sessions.begin() as session:
        spec = dict(session.scalars(select(Job.spec).where(Job.kind == "harvest")).first() or {})
        job_id = jobs.submit(session, bench.settings, "harvest", "h", spec).id
        jobs.get(session, job_id).state = JobState.DONE  # no trainer may take it
    context = JobContext(bench.settings, bench.sessions, job_id, spec, bench.settings.job_dir(job_id))
    context.directory.mkdir(parents=True)
    # Sums are split among threads: to be the same to the bit, a harvest has as many everywhere. Tests before this one
    # may have changed this process' number.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kind = harvest.Harvest()
        for step in kind.plan(context):
            kind.run(context, step)
        kind.finish(context)
    finally:
        torch.set_num_threads(before)


def test_two_trainers_share_a_harvest_and_a_killed_one_loses_at_most_its_shard(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = bench.submit()
    first, second = bench.trainer(0), bench.trainer(1)
    bench.until(lambda: {pid for _, pid in bench.starts(job_id)} == {first.pid, second.pid})
    bench.until(lambda: bench.done(job_id))
    first.kill()
    first.wait()
    finished = bench.done(job_id)
    third = bench.trainer(0)
    bench.until(lambda: bench.ended(job_id))
    assert bench.job(job_id).state == JobState.DONE, bench.job(job_id).error
    second.kill()
    third.kill()
    shared, shared_summaries = bench.evidence(), bench.summaries()
    lost = [shard for shard, pid in bench.starts(job_id) if pid == first.pid][-1:]
    begun = [shard for shard, _ in bench.starts(job_id)]
    assert begun
    again = {shard for shard in begun if begun.count(shard) > 1}
    assert again <= set(lost)
    assert not {f"read {shard + 1}/{1 + max(begun)}" for shard in again} & finished
    assert sum(effects is not None for _, effects in shared.values()) == 80
    alone(bench, monkeypatch)
    assert bench.evidence() == shared
    assert bench.summaries() == shared_summaries


@pytest.mark.parametrize("bench", ["sqlite"], indirect=True)
def test_a_harvest_pauses_and_goes_on_without_reading_a_shard_twice(bench: Bench) -> None:
    job_id = bench.submit()
    bench.trainer(0)
    bench.until(lambda: len(bench.done(job_id)) >= 2)
    with bench.sessions.begin() as session:
        jobs.pause(session, job_id)
    bench.until(lambda: bench.job(job_id).state == JobState.PAUSED)
    assert not bench.job(job_id).pause_requested
    before = bench.done(job_id)
    with bench.sessions.begin() as session:
        jobs.resume(session, job_id)
    bench.until(lambda: bench.ended(job_id))
    assert bench.job(job_id).state == JobState.DONE, bench.job(job_id).error
    begun = [f"read {shard + 1}" for shard, _ in bench.starts(job_id)]
    assert [begun.count(name.partition("/")[0]) for name in sorted(before)] == [1] * len(before)
