"""Verbs on jobs against the real schema; that trainers act on them is tests/workers/test_executor.py's matter."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy.orm import Session

from app import db, jobs
from app.errors import BadInput, Busy, Conflict, NotFound
from app.settings import Settings
from app.tables import Beat, JobLine, JobMetric, JobState, now


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path, max_waiting_jobs=3)


@pytest.fixture
def session(settings: Settings) -> Iterator[Session]:
    engine = db.connect(settings)
    db.migrate(engine)
    with db.sessions(engine)() as session:
        yield session
    engine.dispose()


def test_a_submitted_job_waits_with_its_spec(session: Session, settings: Settings) -> None:
    job = jobs.submit(session, settings, "train", "t" * 300, {"k": 3})
    found = jobs.get(session, job.id)
    assert (found.state, found.kind, found.spec, len(found.title)) == (JobState.QUEUED, "train", {"k": 3}, 200)
    assert found.workflow_id == ""


def test_no_more_than_the_allowed_number_wait(session: Session, settings: Settings) -> None:
    ids = [jobs.submit(session, settings, "train", "t", {}).id for _ in range(3)]
    with pytest.raises(Busy, match="3 jobs wait already, 3 may"):
        jobs.submit(session, settings, "train", "t", {})
    jobs.cancel(session, ids[0])
    jobs.submit(session, settings, "train", "t", {})


def test_jobs_are_listed_newest_first_and_paged(session: Session, settings: Settings) -> None:
    ids = [jobs.submit(session, settings, "train", "t", {}).id for _ in range(3)]
    assert [job.id for job in jobs.recent(session, limit=2)] == [ids[2], ids[1]]
    assert [job.id for job in jobs.recent(session, limit=2, offset=2)] == [ids[0]]


@pytest.mark.parametrize("job_id", [0, -1, 7, 2**31, 2**63])
def test_an_unknown_job_is_not_found(session: Session, job_id: int) -> None:
    with pytest.raises(NotFound, match=f"No job {job_id}"):
        jobs.get(session, job_id)


def test_curves_come_in_the_order_of_their_steps(session: Session, settings: Settings) -> None:
    job_id = jobs.submit(session, settings, "train", "t", {}).id
    session.add_all(JobMetric(job_id=job_id, step=step, values={"loss": float(step)}) for step in (5, 2, 3))
    assert [m.step for m in jobs.metrics(session, job_id)] == [2, 3, 5]


def test_cancelling_a_running_job_asks_its_trainer_and_leaves_the_state(session: Session, settings: Settings) -> None:
    job = jobs.submit(session, settings, "train", "t", {})
    job.state = JobState.RUNNING
    assert jobs.cancel(session, job.id).cancel_requested
    assert jobs.get(session, job.id).state == JobState.RUNNING


def test_cancelling_a_finished_job_changes_nothing(session: Session, settings: Settings) -> None:
    job = jobs.submit(session, settings, "train", "t", {})
    job.state = JobState.DONE
    cancelled = jobs.cancel(session, job.id)
    assert (cancelled.state, cancelled.cancel_requested) == (JobState.DONE, False)


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.RUNNING, JobState.DONE])
def test_only_a_failed_cancelled_or_paused_job_resumes(session: Session, settings: Settings, state: JobState) -> None:
    job = jobs.submit(session, settings, "train", "t", {})
    job.state = state
    with pytest.raises(Conflict, match=f"is {state}; only a failed, cancelled or paused job"):
        jobs.resume(session, job.id)


def test_a_resumed_job_waits_again_without_its_error(session: Session, settings: Settings) -> None:
    job = jobs.submit(session, settings, "train", "t", {})
    job.state, job.error, job.workflow_id, job.done = JobState.FAILED, "no room", "job-1", 0.4
    resumed = jobs.resume(session, job.id)
    assert (resumed.state, resumed.error, resumed.workflow_id, resumed.done) == (JobState.QUEUED, "", "", 0.4)


def test_only_trainers_that_beat_lately_count_as_running(session: Session, settings: Settings) -> None:
    old = now() - timedelta(seconds=settings.takeover_seconds + 1)
    for executor, at, pid in (("here-0", now(), 5), ("gone-0", old, 6), ("leased-0", now(), 0)):
        session.add(Beat(executor=executor, host="h", pid=pid, at=at, job_id=None))
    session.flush()
    assert [beat.executor for beat in jobs.trainers(session, settings)] == ["here-0"]


def test_one_owner_has_a_limit_of_waiting_jobs_of_their_own(session: Session, settings: Settings) -> None:
    ada = settings.model_copy(update={"owner": "ada", "max_waiting_jobs_per_owner": 2})
    for _ in range(2):
        jobs.submit(session, ada, "train", "t", {})
    with pytest.raises(Busy, match="2 jobs of ada wait already, 2 of one owner may"):
        jobs.submit(session, ada, "train", "t", {})
    assert jobs.submit(session, ada.model_copy(update={"owner": "bo"}), "train", "t", {}).owner == "bo"


def test_owners_take_turns_each_with_their_own_priorities(session: Session, settings: Settings) -> None:
    ids = _submit(session, settings, "ada", "ada", "ada", "bo", "bo")
    jobs.set_priority(session, ids[2], 7)
    assert list(jobs.in_order(session, settings)) == [ids[2], ids[3], ids[0], ids[4], ids[1]]


def test_who_has_a_job_running_waits_for_those_who_have_none(session: Session, settings: Settings) -> None:
    running, waiting, other = _submit(session, settings, "ada", "ada", "bo")
    jobs.get(session, running).state = JobState.RUNNING
    assert list(jobs.in_order(session, settings)) == [other, waiting]


def test_the_mark_to_run_next_moves_and_goes_when_its_job_is_paused(session: Session, settings: Settings) -> None:
    first, second, third = _submit(session, settings, "ada", "ada", "bo")
    jobs.run_next(session, second)
    jobs.run_next(session, third)
    assert next(jobs.in_order(session, settings)) == third
    jobs.pause(session, third)
    assert list(jobs.in_order(session, settings)) == [first, second]


def test_who_has_as_many_running_as_may_does_not_get_another(session: Session, settings: Settings) -> None:
    limited = settings.model_copy(update={"max_running_jobs_per_owner": 1})
    running, waiting = _submit(session, settings, "ada", "ada")
    jobs.get(session, running).state = JobState.RUNNING
    assert jobs.next_job(session, limited) is None
    jobs.run_next(session, waiting)
    assert jobs.next_job(session, limited) is None
    assert jobs.next_job(session, settings) == waiting


def test_only_the_place_of_a_waiting_job_changes_and_within_bounds(session: Session, settings: Settings) -> None:
    [job_id] = _submit(session, settings, "ada")
    with pytest.raises(BadInput, match="priority of 101 is out of bounds; it goes from -100 to 100"):
        jobs.set_priority(session, job_id, 101)
    jobs.get(session, job_id).state = JobState.RUNNING
    for change in (lambda: jobs.set_priority(session, job_id, 1), lambda: jobs.run_next(session, job_id)):
        with pytest.raises(Conflict, match="is running; only the place of a job that waits"):
            change()


def test_a_log_keeps_its_newest_lines_and_can_be_followed(session: Session, settings: Settings) -> None:
    long, short = _submit(session, settings, "ada", "ada")
    for start in range(0, jobs.LINES_KEPT + 10, 10):
        lines = [JobLine(job_id=long, level="info", text=str(n)) for n in range(start, start + 10)]
        jobs.write_lines(session, [*lines, JobLine(job_id=short, level="info", text="x")] if not start else lines)
    kept = jobs.lines(session, long)
    assert [line.text for line in kept] == [str(n) for n in range(10, jobs.LINES_KEPT + 10)]
    assert [line.text for line in jobs.lines(session, long, after=kept[-3].id)] == [k.text for k in kept[-2:]]
    assert [line.text for line in jobs.lines(session, long, limit=2)] == [k.text for k in kept[-2:]]
    assert len(jobs.lines(session, short)) == 1


def _submit(session: Session, settings: Settings, *owners: str) -> list[int]:
    roomy = settings.model_copy(update={"max_waiting_jobs": 100})
    return [jobs.submit(session, roomy.model_copy(update={"owner": owner}), "train", "t", {}).id for owner in owners]
