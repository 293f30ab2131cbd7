"""Durable jobs, with real trainer processes that are really killed."""

from __future__ import annotations

import base64
import os
import pickle
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dbos import DBOSClient, DBOSPortableJSONSerializer
from sqlalchemy import Engine, text

from app import db, jobqueue, jobs
from app.errors import Busy, Conflict, NotFound
from app.settings import Settings
from app.tables import Job, JobState, now
from workers.trainer import executor

REPOSITORY = Path(__file__).resolve().parents[2]


class Bench:
    """A data directory with a migrated catalog, and trainers on it."""

    def __init__(self, settings: Settings, engine: Engine) -> None:
        self.settings = settings
        self.sessions = db.sessions(engine)
        self.trainers: list[subprocess.Popen[bytes]] = []

    def trainer(self, slot: int = 0) -> subprocess.Popen[bytes]:
        log = (self.settings.data_dir / f"trainer-{slot}.log").open("ab")
        environment = {
            **os.environ,
            "SAE_ATLAS_DATA_DIR": str(self.settings.data_dir),
            "SAE_ATLAS_DATABASE_URL": self.settings.database_url,
            "SAE_ATLAS_SLOT": str(slot),
            "SAE_ATLAS_BEAT_SECONDS": str(self.settings.beat_seconds),
            "SAE_ATLAS_TAKEOVER_SECONDS": str(self.settings.takeover_seconds),
            "SAE_ATLAS_MAX_RUNNING_JOBS_PER_OWNER": str(self.settings.max_running_jobs_per_owner),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.toy_trainer"],
            cwd=REPOSITORY,
            env=environment,
            stdout=log,
            stderr=log,
        )
        self.trainers.append(process)
        return process

    def submit(self, owner: str = "", **spec: Any) -> int:
        settings = self.settings.model_copy(update={"owner": owner})
        with self.sessions.begin() as session:
            return jobs.submit(session, settings, "toy", "toy", spec).id

    def lines(self, job_id: int) -> list[str]:
        with self.sessions() as session:
            return [line.text for line in jobs.lines(session, job_id)]

    def started_order(self, ids: list[int]) -> list[int]:
        return sorted(ids, key=lambda job_id: self.job(job_id).started_at or now())

    def job(self, job_id: int) -> Job:
        with self.sessions() as session:
            return jobs.get(session, job_id)

    def ended(self, job_id: int) -> Job:
        self.until(lambda: JobState(self.job(job_id).state).ended and not self.job(job_id).cancel_requested)
        return self.job(job_id)

    def until(self, condition: Callable[[], Any], seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def starts(self, job_id: int) -> list[str]:
        file = self.settings.job_dir(job_id) / "starts"
        return file.read_text().splitlines() if file.exists() else []

    def log(self) -> str:
        return "\n".join(p.read_text() for p in self.settings.data_dir.glob("trainer-*.log"))[-6000:]

    def close(self) -> None:
        for process in self.trainers:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield from _bench(Settings(data_dir=tmp_path, beat_seconds=0.3, takeover_seconds=3.0))


@pytest.fixture
def bench_on_postgres(tmp_path: Path, postgres_server: str) -> Iterator[Bench]:
    """Catalog and queue in one Postgres, as several machines share them."""
    url = postgres_server.replace("postgresql://", "postgresql+psycopg://")
    settings = Settings(data_dir=tmp_path, database_url=url, beat_seconds=0.3, takeover_seconds=3.0)
    engine = db.connect(settings)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public; DROP SCHEMA IF EXISTS dbos CASCADE"))
    engine.dispose()
    yield from _bench(settings)


def _bench(settings: Settings) -> Iterator[Bench]:
    engine = db.connect(settings)
    db.migrate(engine)
    bench = Bench(settings, engine)
    yield bench
    bench.close()
    engine.dispose()


def test_a_job_runs_its_steps_in_order_and_keeps_its_curve(bench: Bench) -> None:
    job_id = bench.submit(steps=3)
    bench.trainer()
    job = bench.ended(job_id)
    assert job.state == JobState.DONE, job.error
    assert job.result == {
        "text": "part-0 after 0\npart-1 after 1\npart-2 after 2\n",
        "url": f"/jobs/{job_id}",
    }
    assert (job.done, job.status) == (1.0, "part-2 done")
    with bench.sessions() as session:
        assert [(m.step, m.values) for m in jobs.metrics(session, job_id)] == [(i, {"loss": 1.0}) for i in range(3)]
    assert job.created_at <= (job.started_at or job.created_at) <= (job.ended_at or job.created_at)


@pytest.mark.parametrize("database", ["bench", "bench_on_postgres"])
def test_a_job_whose_trainer_is_killed_in_mid_step_goes_on_at_that_step_with_the_same_outcome(
    request: pytest.FixtureRequest, database: str
) -> None:
    bench: Bench = request.getfixturevalue(database)
    job_id = bench.submit(steps=3, seconds=0.6)
    first = bench.trainer()
    bench.until(lambda: len(bench.starts(job_id)) == 2)
    first.kill()
    first.wait()
    second = bench.trainer()
    job = bench.ended(job_id)
    assert [line.split() for line in bench.starts(job_id)] == [
        ["part-0", str(first.pid)],
        ["part-1", str(first.pid)],
        ["part-1", str(second.pid)],
        ["part-2", str(second.pid)],
    ]
    assert job.result["text"] == "part-0 after 0\npart-1 after 1\npart-2 after 2\n"
    said = [line for line in bench.lines(job_id) if "its trainer stopped; the job goes on" in line]
    assert len(said) == 1, "whoever reads the log learns why it began twice"


def test_another_trainer_takes_the_job_of_a_stopped_one_over_and_the_stopped_one_ends_itself(bench: Bench) -> None:
    job_id = bench.submit(steps=2, seconds=2.5)
    silent = bench.trainer()
    bench.until(lambda: len(bench.starts(job_id)) == 1)
    silent.send_signal(signal.SIGSTOP)
    bench.trainer(slot=1)
    bench.until(lambda: len(bench.starts(job_id)) >= 2)
    silent.send_signal(signal.SIGCONT)
    assert silent.wait(timeout=20) == 75
    job = bench.ended(job_id)
    assert job.state == JobState.DONE
    assert job.executor.endswith("-1")


@pytest.mark.parametrize("database", ["bench", "bench_on_postgres"])
def test_two_trainers_share_the_queue(request: pytest.FixtureRequest, database: str) -> None:
    bench: Bench = request.getfixturevalue(database)
    ids = [bench.submit(steps=1, seconds=3.0) for _ in range(2)]
    trainers = {str(bench.trainer(slot=slot).pid) for slot in range(2)}
    bench.until(lambda: all(bench.starts(job_id) for job_id in ids))
    assert {bench.starts(job_id)[0].split()[1] for job_id in ids} == trainers
    assert {bench.ended(job_id).state for job_id in ids} == {JobState.DONE}


def test_one_trainer_runs_one_job_at_a_time(bench: Bench) -> None:
    ids = [bench.submit(steps=1, seconds=0.8) for _ in range(3)]
    bench.trainer()
    seen: list[int] = []

    def all_done() -> bool:
        states = [bench.job(job_id).state for job_id in ids]
        seen.append(states.count(JobState.RUNNING))
        return states == [JobState.DONE] * 3

    bench.until(all_done)
    assert max(seen) == 1


def test_a_running_job_is_cancelled_within_its_step_and_resumed_without_repeating_what_was_done(bench: Bench) -> None:
    job_id = bench.submit(steps=2, seconds=3.0)
    bench.trainer()
    bench.until(lambda: len(bench.starts(job_id)) == 2)
    asked = time.monotonic()
    with bench.sessions.begin() as session:
        jobs.cancel(session, job_id)
    assert bench.ended(job_id).state == JobState.CANCELLED
    assert time.monotonic() - asked < 2.5
    with bench.sessions.begin() as session:
        jobs.resume(session, job_id)
    assert bench.ended(job_id).state == JobState.DONE
    assert [line.split()[0] for line in bench.starts(job_id)] == ["part-0", "part-1", "part-1"]


def test_waiting_jobs_start_by_mark_then_by_turn_of_their_owners_then_by_priority(bench: Bench) -> None:
    running = bench.submit(steps=1, seconds=2.0)
    bench.trainer()
    bench.until(lambda: bench.starts(running))
    first, second, urgent = (bench.submit(owner="ada", steps=1) for _ in range(3))
    other, marked = (bench.submit(owner="bo", steps=1) for _ in range(2))
    with bench.sessions.begin() as session:
        jobs.set_priority(session, urgent, 5)
        jobs.run_next(session, marked)
        assert list(jobs.in_order(session, bench.settings)) == [marked, urgent, other, first, second]
    ids = [first, second, urgent, other, marked]
    assert {bench.ended(job_id).state for job_id in ids} == {JobState.DONE}
    assert bench.started_order(ids) == [marked, urgent, other, first, second]


def test_many_jobs_of_one_owner_delay_anothers_by_one_at_most(bench: Bench) -> None:
    many = [bench.submit(owner="ada", steps=1, seconds=0.2) for _ in range(40)]
    bench.trainer()
    bench.until(lambda: any(bench.starts(job_id) for job_id in many))
    late = bench.submit(owner="bo", steps=1)
    assert bench.ended(late).state == JobState.DONE
    assert sum(bool(bench.starts(job_id)) for job_id in many) <= 4


def test_an_owner_has_no_more_jobs_running_than_may(bench: Bench) -> None:
    bench.settings = bench.settings.model_copy(update={"max_running_jobs_per_owner": 1})
    ids = [bench.submit(owner="ada", steps=1, seconds=1.0) for _ in range(2)]
    for slot in range(2):
        bench.trainer(slot=slot)
    bench.until(lambda: any(bench.starts(job_id) for job_id in ids))
    other = bench.submit(owner="bo", steps=1)
    assert bench.ended(other).state == JobState.DONE
    for job_id in ids:
        bench.ended(job_id)
    first, second = sorted((bench.job(job_id) for job_id in ids), key=lambda job: job.started_at or now())
    assert first.ended_at
    assert second.started_at
    assert second.started_at >= first.ended_at


def test_what_the_trainer_logs_about_a_job_stays_with_it(bench: Bench) -> None:
    good, bad = bench.submit(steps=2), bench.submit(steps=1, fail="part-0", how="unknown")
    bench.trainer()
    for job_id in (good, bad):
        bench.ended(job_id)
    bench.until(lambda: any("job ended" in line for line in bench.lines(bad)))
    words = [line.split("  ")[0] for line in bench.lines(good)]
    assert words == ["job started", "step done", "step done", "step done", "step done", "job ended"]
    assert any("step failed" in line and "ZeroDivisionError: by zero" in line for line in bench.lines(bad))


def test_a_queued_job_is_cancelled_at_once_and_never_starts(bench: Bench) -> None:
    cancelled, other = bench.submit(steps=1), bench.submit(steps=1)
    with bench.sessions.begin() as session:
        assert jobs.cancel(session, cancelled).state == JobState.CANCELLED
    bench.trainer()
    bench.ended(other)
    assert bench.starts(cancelled) == []
    with bench.sessions.begin() as session:
        jobs.resume(session, cancelled)
    assert bench.ended(cancelled).state == JobState.DONE


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("known", "Text is 9 tokens; 8 fit."),
        ("unknown", "ZeroDivisionError: by zero"),
        ("disk", "The disk is full: "),
    ],
)
def test_a_failed_job_says_why_and_resumes_at_the_step_that_failed(bench: Bench, how: str, sentence: str) -> None:
    job_id = bench.submit(steps=2, fail="part-1", how=how)
    bench.trainer()
    job = bench.ended(job_id)
    assert job.state == JobState.FAILED
    assert job.error.startswith(sentence)
    (bench.settings.job_dir(job_id) / "mended").touch()
    with bench.sessions.begin() as session:
        jobs.resume(session, job_id)
    assert bench.ended(job_id).state == JobState.DONE
    assert [line.split()[0] for line in bench.starts(job_id)] == ["part-0", "part-1", "part-1"]


def test_a_job_that_cannot_be_planned_or_is_of_an_unknown_kind_fails_with_a_sentence(bench: Bench) -> None:
    unplanned = bench.submit(steps=1, how="plan")
    with bench.sessions.begin() as session:
        unknown = jobs.submit(session, bench.settings, "knit", "knit", {}).id
    bench.trainer()
    assert bench.ended(unplanned).error == "No steps: 0 asked, 1 needed."
    assert bench.ended(unknown).error.startswith("No job kind is called 'knit'")


def test_a_job_that_waits_while_no_trainer_runs_is_taken_up_later_though_nothing_but_its_row_exists(
    bench: Bench,
) -> None:
    job_id = bench.submit(steps=1)
    assert not (bench.settings.data_dir / "jobs.sqlite").exists()
    bench.trainer()
    assert bench.ended(job_id).state == JobState.DONE


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


def test_a_planted_pickle_ends_as_a_job_error_and_nothing_is_executed(bench: Bench, tmp_path: Path) -> None:
    bench.trainer()
    bench.ended(bench.submit(steps=1))
    bench.close()
    victim = bench.submit(steps=1)
    _enqueue(bench, victim)
    bomb = base64.b64encode(pickle.dumps({"args": (Bomb(tmp_path / "boom"),), "kwargs": {}})).decode()
    with sqlite3.connect(bench.settings.data_dir / "jobs.sqlite", timeout=30) as connection:
        for table in ("workflow_status", "workflow_input"):
            connection.execute(f"UPDATE {table} SET inputs = ? WHERE workflow_uuid = ?", (bomb, f"job-{victim}"))
        connection.execute(
            "UPDATE workflow_status SET serialization = 'py_pickle' WHERE workflow_uuid = ?", (f"job-{victim}",)
        )
        changed = connection.execute(
            "SELECT count(*) FROM workflow_status WHERE serialization = 'py_pickle' AND status = 'ENQUEUED'"
        ).fetchone()
    assert changed == (1,)
    trainer = bench.trainer()
    job = bench.ended(victim)
    assert job.state == JobState.FAILED
    assert "could not be read" in job.error
    assert not (tmp_path / "boom").exists()
    assert bench.ended(bench.submit(steps=1)).state == JobState.DONE
    assert trainer.poll() is None


def _enqueue(bench: Bench, job_id: int) -> None:
    """Hand a row over as a trainer does, without one."""
    client = DBOSClient(
        system_database_url=jobqueue.dbos_url(bench.settings),
        serializer=DBOSPortableJSONSerializer(),
        application_name=executor.APPLICATION,
    )
    executor._hand_over(bench.sessions, client, job_id)
    client.destroy()


def test_a_planted_step_result_is_not_unpickled_either(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit(steps=2, seconds=0.8)
    trainer = bench.trainer()
    bench.until(lambda: len(bench.starts(job_id)) == 2)
    trainer.kill()
    trainer.wait()
    bomb = base64.b64encode(pickle.dumps(Bomb(tmp_path / "boom"))).decode()
    with sqlite3.connect(bench.settings.data_dir / "jobs.sqlite", timeout=30) as connection:
        planted = connection.execute("UPDATE operation_outputs SET output = ?, serialization = 'py_pickle'", (bomb,))
        assert planted.rowcount >= 2
    bench.trainer()
    assert bench.ended(job_id).state == JobState.FAILED
    assert not (tmp_path / "boom").exists()


def test_the_job_file_is_private_and_in_wal_mode(bench: Bench) -> None:
    bench.trainer()
    file = bench.settings.data_dir / "jobs.sqlite"
    bench.until(lambda: file.exists() and file.stat().st_size > 0)
    bench.until(lambda: sqlite3.connect(file).execute("PRAGMA journal_mode").fetchone() == ("wal",))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_second_trainer_in_the_same_slot_is_refused_with_what_to_set(bench: Bench) -> None:
    bench.trainer()
    with bench.sessions() as session:
        bench.until(lambda: jobs.trainers(session, bench.settings))
    second = bench.trainer()
    assert second.wait(timeout=30) == 2
    assert "SAE_ATLAS_SLOT=1" in bench.log()


def test_a_trainer_told_to_stop_leaves_at_once_and_says_so(bench: Bench) -> None:
    job_id = bench.submit(steps=1, seconds=30.0)
    trainer = bench.trainer()
    bench.until(lambda: bench.starts(job_id))
    asked = time.monotonic()
    trainer.terminate()
    assert trainer.wait(timeout=10) == 0
    assert time.monotonic() - asked < 5
    with bench.sessions() as session:
        assert jobs.trainers(session, bench.settings) == []
    assert bench.job(job_id).state == JobState.RUNNING


def test_a_trainer_refuses_a_database_that_waits_for_a_migration(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "workers.trainer"],
        cwd=REPOSITORY,
        env={**os.environ, "SAE_ATLAS_DATA_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "Run `sae-atlas migrate`." in result.stderr


def test_the_verbs_refuse_what_makes_no_sense(bench: Bench) -> None:
    settings = bench.settings.model_copy(update={"max_waiting_jobs": 1})
    job_id = bench.submit(steps=1)
    with bench.sessions() as session:
        with pytest.raises(Busy, match="1 jobs wait already, 1 may"):
            jobs.submit(session, settings, "toy", "toy", {})
        with pytest.raises(Conflict, match="is queued"):
            jobs.resume(session, job_id)
        for unknown in (-1, 0, job_id + 1, 2**63):
            with pytest.raises(NotFound):
                jobs.get(session, unknown)
