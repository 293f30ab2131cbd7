"""The dbos executor of one trainer: takes queued rows into dbos, runs jobs step by step, resumes what a crash left.

Crash-only: stopping is the same path as kill -9. A step runs again until its outcome is recorded, so steps are
idempotent. A trainer that was silent too long and finds its job taken over ends itself rather than write on.

Nothing in the job database is trusted: dbos obeys each row's own `serialization` column, so a planted row could have
its pickle loaded. Here the pickle deserialiser raises, and the row ends as an error.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any

import structlog
from dbos import DBOS, DBOSClient, DBOSConfig, DBOSPortableJSONSerializer, EnqueueOptions
from dbos._serialization import DefaultSerializer
from sqlalchemy import select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from app import db, jobqueue, jobs, lockfile, log, remotes, trash
from app.errors import AtlasError
from app.settings import Settings
from app.tables import Beat, Job, JobState, now
from workers.trainer import joblog, kinds, tracking
from workers.trainer.kinds import Cancelled, JobContext, JobKind, Paused, Superseded

APPLICATION = "sae-atlas"
APPLICATION_VERSION = "1"
"""Fixed: dbos' default, a hash of the code, would strand queued jobs at every upgrade."""
QUEUE = "jobs"
MAX_CRASHES = 20
"""Times the trainer may die in one job before the job counts as the reason."""
SWEEP_SECONDS = 1.0
_PURGE_SECONDS = 3600.0
SUPERSEDED_EXIT = 75

_logger = log.get("trainer")
_Outcome = dict[str, Any]
"""What a durable step returns: {"outcome": "done" | "failed" | "cancelled", "value" | "error": ...}."""


class PickleRefused(Exception):
    """A row of the job database asked to be unpickled."""


def serve(settings: Settings, stop: Event) -> None:
    """Run jobs until `stop` is set. Raises Conflict when this slot is taken, SchemaError when a migration is due."""
    executor = f"{socket.gethostname()}-{settings.slot}"
    lock = _take_slot(settings)
    engine = db.connect(settings)
    db.check_schema(engine)
    sessions = db.sessions(engine)
    _beat(sessions, executor)
    runner = Runner(settings, sessions, executor)
    launch(settings, runner)
    client = DBOSClient(
        system_database_url=jobqueue.dbos_url(settings),
        serializer=DBOSPortableJSONSerializer(),
        application_name=APPLICATION,
    )
    _logger.info("trainer ready", executor=executor, queue=make_url(settings.queue_url).render_as_string())
    with joblog.recording(sessions):
        _attend(settings, sessions, client, runner, stop)
    _leave(sessions, executor)
    lock.close()
    engine.dispose()


def launch(settings: Settings, runner: Runner) -> None:
    """Start dbos in this process. On start it takes up again what this executor was doing when it died."""
    forbid_pickle()
    jobqueue.prepare_file(settings.queue_url)
    config: DBOSConfig = {
        "name": APPLICATION,
        "system_database_url": jobqueue.dbos_url(settings),
        "application_version": APPLICATION_VERSION,
        "executor_id": runner.executor,
        "serializer": DBOSPortableJSONSerializer(),
        "log_level": "WARNING",
        "enable_otlp": False,
    }
    DBOS(config=config)

    @DBOS.workflow(name="run_job", max_recovery_attempts=MAX_CRASHES)
    def run_job(job_id: int) -> str:  # pyright: ignore[reportUnusedFunction]
        return runner.run(job_id)

    @DBOS.workflow(name="help_job", max_recovery_attempts=MAX_CRASHES)
    def help_job(job_id: int) -> str:  # pyright: ignore[reportUnusedFunction]
        return runner.help(job_id)

    DBOS.listen_queues([QUEUE])
    DBOS.launch()
    DBOS.register_queue(QUEUE, worker_concurrency=1, polling_interval_sec=0.5)


def forbid_pickle() -> None:
    """Make dbos' pickle deserialiser raise, whatever a row's `serialization` column says."""

    def refuse(cls: DefaultSerializer, serialized_data: str) -> Any:
        raise PickleRefused("The job database holds a pickled value; SAE Atlas writes JSON only and loads no pickles.")

    DefaultSerializer.deserialize = refuse


class Runner:
    """Executes jobs inside dbos workflows. Holds the process's identity and its sessions, no job's state."""

    def __init__(self, settings: Settings, sessions: sessionmaker[Session], executor: str) -> None:
        self.settings = settings
        self.sessions = sessions
        self.executor = executor
        self.busy = False
        """Whether a workflow runs in this process; set and read by different threads."""
        self.freed = False
        """Whether one has just ended."""

    def help(self, job_id: int) -> str:
        """Take shares of a running job that another trainer leads. What goes wrong here, that one meets too."""
        self.busy = True
        try:
            with self.sessions() as session:
                job = session.get(Job, job_id)
            if job is not None and job.state == JobState.RUNNING and job.executor != self.executor:
                context = _helping(self.settings, self.sessions, job, self.executor)
                _logger.info("helping", job=job_id, leader=job.executor)
                kinds.kind(job.kind).help(context)
            return "helped"
        except Cancelled:
            return "stopped"
        except Exception:
            _logger.warning("helping failed", job=job_id, trace=traceback.format_exc())
            return "failed"
        finally:
            self.busy, self.freed = False, True

    def run(self, job_id: int) -> str:
        """Run a job, or what is left of it, and return its end state. After a crash, done steps are replayed."""
        structlog.contextvars.bind_contextvars(job=job_id)
        self.busy = True
        try:
            job = self._claim(job_id)
            if job is None:
                return JobState.CANCELLED
            _logger.info("job started", kind=job.kind, trainer=self.executor)
            return self._run(job)
        finally:
            tracking.close(self.settings, job_id)
            self.busy, self.freed = False, True
            structlog.contextvars.unbind_contextvars("job")

    def _run(self, job: Job) -> str:
        directory = self.settings.job_dir(job.id)
        context = JobContext(_on_behalf(self.settings, job), self.sessions, job.id, job.spec, directory, self.executor)
        planned = self._step("plan", lambda: self._kind(job, directory).plan(context))
        if planned["outcome"] != "done":
            return self._end(job.id, planned)
        steps = [str(name) for name in planned["value"]]
        for index, name in enumerate(steps):
            part = replace(context, step_index=index, n_steps=len(steps))
            outcome = self._step(name, lambda part=part, name=name: self._work(job, part, name))
            if outcome["outcome"] != "done":
                return self._end(job.id, outcome)
        return self._end(job.id, self._step("finish", lambda: kinds.kind(job.kind).finish(context)))

    def _kind(self, job: Job, directory: Path) -> JobKind:
        directory.mkdir(parents=True, exist_ok=True)
        return kinds.kind(job.kind)

    def _work(self, job: Job, context: JobContext, name: str) -> None:
        context.check()
        kinds.kind(job.kind).run(context, name)
        context.report(1.0)

    def _step(self, name: str, work: Callable[[], Any]) -> _Outcome:
        """Run one durable step. What happened is its recorded value, so a replay decides the same."""
        return DBOS.run_step({"name": name}, lambda: self._attempt(name, work))

    def _attempt(self, name: str, work: Callable[[], Any]) -> _Outcome:
        started = time.monotonic()
        try:
            value = work()
        except Paused:
            return {"outcome": "paused"}
        except Cancelled:
            return {"outcome": "cancelled"}
        except Superseded as error:
            _logger.error("job was taken over while this trainer was silent; leaving", step=name, by=str(error))
            joblog.until_written()
            os._exit(SUPERSEDED_EXIT)
        except AtlasError as error:
            _logger.error("step refused", step=name, error=error.message)
            return {"outcome": "failed", "error": error.message}
        except Exception as error:
            _logger.error("step failed", step=name, trace=traceback.format_exc())
            return {"outcome": "failed", "error": _sentence(error, self.settings.data_dir)}
        _logger.info("step done", step=name, seconds=round(time.monotonic() - started, 2))
        return {"outcome": "done", "value": value}

    def _claim(self, job_id: int) -> Job | None:
        """Mark the job as running here. None when it was cancelled before it started."""
        with self.sessions.begin() as session:
            before = session.scalar(select(Job.state).where(Job.id == job_id))
            claimed = session.execute(
                update(Job)
                .where(Job.id == job_id, Job.state.in_([JobState.QUEUED, JobState.RUNNING]))
                .values(state=JobState.RUNNING, executor=self.executor)
            )
            job = session.get(Job, job_id)
            if job is None or getattr(claimed, "rowcount", 0) == 0:
                return None
            if before == JobState.RUNNING:
                job.status = "Its trainer stopped; it goes on after the last step that was done"
                _logger.warning("its trainer stopped; the job goes on after the last step that was done")
            job.started_at = job.started_at or now()
            return job

    def _end(self, job_id: int, outcome: _Outcome) -> str:
        match outcome["outcome"]:
            case "done":
                values = {"state": JobState.DONE, "done": 1.0, "result": outcome["value"] or {}, "error": ""}
            case "cancelled":
                values = {"state": JobState.CANCELLED}
            case "paused":
                values = {"state": JobState.PAUSED}
            case _:
                values = {"state": JobState.FAILED, "error": outcome["error"]}
        values |= {"cancel_requested": False, "pause_requested": False}
        _persist(lambda: _settle(self.sessions, job_id, values))
        why = {"error": outcome["error"]} if outcome.get("error") else {}
        _logger.info("job ended", state=str(values["state"]), **why)
        return str(values["state"])


def _on_behalf(settings: Settings, job: Job) -> Settings:
    """Settings with which a job queues others: they are its owner's, and its end is not refused for want of room."""
    most = 2**31
    return settings.model_copy(
        update={"owner": job.owner, "max_waiting_jobs": most, "max_waiting_jobs_per_owner": most}
    )


def _settle(sessions: sessionmaker[Session], job_id: int, values: dict[str, Any]) -> None:
    with sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(ended_at=now(), **values))


def _persist(write: Callable[[], None], patience_seconds: float = 600.0) -> None:
    """Try a small write until it lands: a full disk or a locked database must not lose a job's end."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            write()
            return
        except OperationalError:
            if time.monotonic() > deadline:
                raise
            _logger.warning("the catalog cannot be written; trying again", exc_info=True)
            time.sleep(2.0)


def _sentence(error: Exception, data_dir: Path) -> str:
    """Say what went wrong in a job, for the person who started it."""
    if isinstance(error, AtlasError):
        return error.message
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "database or disk is full" in str(error) or "No space left on device" in str(error):
        free = shutil.disk_usage(data_dir).free
        return f"The disk is full: {free / 2**20:.0f} MiB free under {data_dir}. Make room, then resume the job."
    return f"{type(error).__name__}: {error}"


def _attend(
    settings: Settings, sessions: sessionmaker[Session], client: DBOSClient, runner: Runner, stop: Event
) -> None:
    """Beat, and sweep for rows to hand over, until stopped. Jobs run in dbos' threads meanwhile."""
    beaten, purge_at = time.monotonic(), time.monotonic() + 60
    while not _rested(settings, runner, stop):
        try:
            if time.monotonic() - beaten >= settings.beat_seconds:
                _beat(sessions, runner.executor)
                beaten = time.monotonic()
            sweep(settings, sessions, client, runner)
            if time.monotonic() >= purge_at:
                purge_at = time.monotonic() + _PURGE_SECONDS
                with sessions() as session:
                    trash.purge(session, settings)
                # Other people's servers may be slow, and a trainer that does not beat loses its jobs.
                Thread(target=_list_remotes, args=(settings, sessions), daemon=True).start()
        except Exception:
            # A locked or unreachable database: the next round tries again, and dbos retries its own writes.
            _logger.warning("sweep failed; trying again", exc_info=True)


def _list_remotes(settings: Settings, sessions: sessionmaker[Session]) -> None:
    try:
        remotes.refresh_old(sessions, settings)
    except Exception:
        _logger.warning("remote catalogs were not listed again", exc_info=True)


def _rested(settings: Settings, runner: Runner, stop: Event) -> bool:
    """Wait for the next sweep, less long when a job has just ended. True when this process should stop."""
    deadline = time.monotonic() + min(SWEEP_SECONDS, settings.beat_seconds)
    while not stop.wait(0.1):
        if time.monotonic() >= deadline or runner.freed:
            runner.freed = False
            return False
    return True


def sweep(settings: Settings, sessions: sessionmaker[Session], client: DBOSClient, runner: Runner) -> None:
    """Take over from silent trainers, settle rows whose workflow ended without them, and take work when free."""
    with sessions() as session:
        open_jobs = session.scalars(select(Job).where(Job.state.in_([JobState.QUEUED, JobState.RUNNING]))).all()
    if not open_jobs:
        return
    _take_over(settings, sessions, client, runner.executor)
    _reconcile(sessions, client, [job for job in open_jobs if job.workflow_id])
    if not runner.busy and not _on_deck(client, runner.executor):
        with sessions() as session:
            job_id = jobs.next_job(session, settings)
        if job_id is not None:
            _hand_over(sessions, client, job_id)
        else:
            _offer_help(settings, sessions, client, runner.executor)


def _on_deck(client: DBOSClient, executor: str) -> bool:
    """Tell whether dbos has a workflow that no trainer runs yet, or one of this trainer that is about to run.

    Rows are handed over one at a time, when a trainer is free: what is in dbos' queue starts in the order it came,
    while the order of rows may still change.
    """
    known = client.list_workflows(status=["ENQUEUED", "PENDING"], queue_name=QUEUE, load_input=False, load_output=False)
    return any(w.status == "ENQUEUED" or w.executor_id == executor for w in known)


def _hand_over(sessions: sessionmaker[Session], client: DBOSClient, job_id: int) -> None:
    """Enqueue a row's workflow, or rewind it to its first step that is not done. Doing it twice does no harm."""
    workflow_id = f"job-{job_id}"
    found = client.list_workflows(workflow_ids=[workflow_id], load_input=False, load_output=False)
    if not found:
        options: EnqueueOptions = {
            "workflow_name": "run_job",
            "queue_name": QUEUE,
            "workflow_id": workflow_id,
            "app_version": APPLICATION_VERSION,
        }
        client.enqueue(options, job_id)
    elif found[0].status not in ("ENQUEUED", "PENDING", "DELAYED"):
        client.rewind_workflow(
            workflow_id,
            start_step=_first_undone(client, workflow_id),
            application_version=APPLICATION_VERSION,
            queue_name=QUEUE,
        )
    with sessions.begin() as session:
        session.execute(update(Job).where(Job.id == job_id).values(workflow_id=workflow_id, run_next=False))


def _offer_help(settings: Settings, sessions: sessionmaker[Session], client: DBOSClient, executor: str) -> None:
    """Enqueue a workflow that helps with a running job, when this trainer has nothing to do and the job has shares.

    Asked only when nothing waits: a job nobody works on comes before help for one that runs.
    """
    with sessions() as session:
        running = session.scalars(select(Job).where(Job.state == JobState.RUNNING, Job.executor != executor)).all()
    for job in running:
        kind = kinds.kind(job.kind)
        if not kind.shared or not kind.has_free_share(_helping(settings, sessions, job, executor)):
            continue
        prefix = f"help-{job.id}-"
        waiting = client.list_workflows(
            workflow_id_prefix=prefix, status="ENQUEUED", load_input=False, load_output=False
        )
        if not waiting:
            options: EnqueueOptions = {
                "workflow_name": "help_job",
                "queue_name": QUEUE,
                "workflow_id": f"{prefix}{executor}-{time.time_ns()}",
                "app_version": APPLICATION_VERSION,
            }
            client.enqueue(options, job.id)
        return


def _helping(settings: Settings, sessions: sessionmaker[Session], job: Job, executor: str) -> JobContext:
    return JobContext(settings, sessions, job.id, job.spec, settings.job_dir(job.id), helper=executor)


def _first_undone(client: DBOSClient, workflow_id: str) -> int:
    steps = client.list_workflow_steps(workflow_id)
    done = [isinstance(s["output"], dict) and s["output"].get("outcome") == "done" for s in steps]
    undone = [s["function_id"] for s, ok in zip(steps, done, strict=True) if not ok]
    return undone[0] if undone else max((s["function_id"] for s in steps), default=0) + 1


def _take_over(settings: Settings, sessions: sessionmaker[Session], client: DBOSClient, executor: str) -> None:
    """Put jobs of trainers that fell silent back into the queue.

    Touching the dead trainer's beat is the lease: of several sweepers one wins, and if that one dies too, the beat
    grows old again.
    """
    running = client.list_workflows(status="PENDING", queue_name=QUEUE, load_input=False, load_output=False)
    owners = {w.executor_id for w in running if w.executor_id and w.executor_id != executor}
    for owner in owners:
        if not _win_lease(sessions, owner, settings.takeover_seconds):
            continue
        for workflow in running:
            if workflow.executor_id == owner:
                _logger.warning("taking over from a silent trainer", silent=owner, workflow=workflow.workflow_id)
                client.resume_workflow(workflow.workflow_id, queue_name=QUEUE)


def _win_lease(sessions: sessionmaker[Session], owner: str, takeover_seconds: float) -> bool:
    with sessions.begin() as session:
        if session.get(Beat, owner) is None:
            session.add(Beat(executor=owner, host="", pid=0, at=now() - timedelta(days=1), job_id=None))
            session.flush()
        oldest = now() - timedelta(seconds=takeover_seconds)
        won = session.execute(update(Beat).where(Beat.executor == owner, Beat.at < oldest).values(at=now(), pid=0))
        return getattr(won, "rowcount", 0) == 1


def _reconcile(sessions: sessionmaker[Session], client: DBOSClient, jobs: list[Job]) -> None:
    """Fail rows whose workflow ended without settling them: unreadable records, or a job that kills its trainer."""
    if not jobs:
        return
    ended = client.list_workflows(
        workflow_ids=[job.workflow_id for job in jobs],
        status=["ERROR", "CANCELLED", "MAX_RECOVERY_ATTEMPTS_EXCEEDED", "SUCCESS"],
        load_input=False,
        load_output=False,
    )
    for workflow in ended:
        job_id = next(job.id for job in jobs if job.workflow_id == workflow.workflow_id)
        reason = (
            f"The trainer died {MAX_CRASHES} times in this job; its log says where."
            if workflow.status == "MAX_RECOVERY_ATTEMPTS_EXCEEDED"
            else f"The queue ended this job as {workflow.status} without running it; its record could not be read."
        )
        with sessions.begin() as session:
            lost = update(Job).where(Job.id == job_id, Job.state.in_([JobState.QUEUED, JobState.RUNNING]))
            lost = lost.where(Job.workflow_id == workflow.workflow_id)
            session.execute(lost.values(state=JobState.FAILED, error=reason, ended_at=now()))


def _beat(sessions: sessionmaker[Session], executor: str) -> None:
    with sessions.begin() as session:
        running = select(Job.id).where(Job.executor == executor, Job.state == JobState.RUNNING).limit(1)
        job_id = session.scalar(running)
        session.merge(Beat(executor=executor, host=socket.gethostname(), pid=os.getpid(), at=now(), job_id=job_id))


def _leave(sessions: sessionmaker[Session], executor: str) -> None:
    """Say that this trainer stops, so that another need not wait to take its job over."""
    with sessions.begin() as session:
        gone = update(Beat).where(Beat.executor == executor)
        session.execute(gone.values(at=now() - timedelta(days=1), pid=0))


def _take_slot(settings: Settings) -> IO[str]:
    """Lock this slot for the life of the process, so that no two trainers share an executor id."""
    return lockfile.hold(
        settings.data_dir / "run" / f"trainer-{settings.slot}.lock",
        f"A trainer runs in slot {settings.slot} already. For a second one set SAE_ATLAS_SLOT={settings.slot + 1}.",
    )
