"""Kinds of durable jobs: the interface each implements and their registry. Knows the catalog, not dbos, not torch.

A kind plans a job as named steps. The executor makes each name a durable step: a job whose process dies goes on at the
step it was in, so `run` must be idempotent (temporary file and rename, upserts).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, cast

from sqlalchemy import select, update
from sqlalchemy.orm import Session, sessionmaker

from app import log
from app.errors import BadInput
from app.settings import Settings
from app.tables import Job, JobMetric, JobState
from workers.trainer import tracking

REPORT_SECONDS = 0.5
"""Progress is written, and a cancel request looked for, at most this often."""

_logger = log.get("trainer")


class Cancelled(Exception):
    """Somebody asked to cancel the job; raised inside `run` and handled by the executor."""


class Paused(Cancelled):
    """Somebody asked to pause the job; as a cancelled one it stops, and says so otherwise."""


class Superseded(Exception):
    """Another trainer took the job over while this one was silent; this one must stop writing."""


@dataclass(frozen=True)
class JobContext:
    """What a kind's step may use: settings, catalog, spec, a directory of its own, and ways to say how it goes."""

    settings: Settings
    sessions: sessionmaker[Session]
    job_id: int
    spec: dict[str, Any]
    directory: Path
    """settings.job_dir(job_id); exists. Checkpoints and spilled activations lie here."""
    executor: str = ""
    """The trainer that runs the step; empty means that ownership is not checked."""
    helper: str = ""
    """The trainer that takes shares of a job that another one leads."""
    step_index: int = 0
    n_steps: int = 1
    _last: list[float] = field(default_factory=lambda: [0.0])

    @property
    def worker(self) -> str:
        """Who does the work: the trainer that leads the job, or one that helps."""
        return self.helper or self.executor

    def report(self, share_of_step: float, status: str = "", seconds_left: float | None = None) -> None:
        """Say how far the step is (0..1), cheaply enough for an inner loop. Raises Cancelled when cancel was asked.

        An empty status leaves the latest one standing. Seconds left are those after the last point of the curves.
        """
        if time.monotonic() - self._last[0] < REPORT_SECONDS and share_of_step < 1:
            return
        self._last[0] = time.monotonic()
        self.check()
        if self.helper:
            return  # the leading trainer says how far the job is
        done = (self.step_index + min(max(share_of_step, 0.0), 1.0)) / self.n_steps
        values = {"done": done, "status": status} if status else {"done": done}
        with self.sessions.begin() as session:
            session.execute(update(Job).where(Job.id == self.job_id).values(values))
            if seconds_left is not None:
                points = select(JobMetric).where(JobMetric.job_id == self.job_id).order_by(JobMetric.step.desc())
                if (last := session.scalar(points.limit(1))) is not None:
                    last.values = {**last.values, "seconds_left": seconds_left}

    def check(self) -> None:
        """Raise Cancelled or Paused when that was asked, Superseded when another trainer has the job. Not throttled."""
        wanted = select(Job.cancel_requested, Job.pause_requested, Job.executor, Job.state)
        with self.sessions() as session:
            row = session.execute(wanted.where(Job.id == self.job_id)).one()
        if row.cancel_requested or (self.helper and row.state != JobState.RUNNING):
            raise Cancelled
        if row.pause_requested:
            raise Paused
        if self.executor and row.executor != self.executor:
            raise Superseded(row.executor)

    def cancelled(self) -> bool:
        """Tell whether the step should stop early; for code that must tidy up before it raises."""
        try:
            self.check()
        except (Cancelled, Superseded):
            return True
        return False

    def metric(self, step: int, values: dict[str, float]) -> None:
        """Write one point of the job's curves; the same step again replaces it."""
        with self.sessions.begin() as session:
            session.merge(JobMetric(job_id=self.job_id, step=step, values=values))
        tracking.publish(self.settings, self.job_id, self.spec, self._title, step, values)

    def _title(self) -> str:
        with self.sessions() as session:
            return session.scalar(select(Job.title).where(Job.id == self.job_id)) or ""

    def log(self, event: str, **details: Any) -> None:
        _logger.info(event, job=self.job_id, **details)


class JobKind(ABC):
    """One kind of job. Instances hold no state: what must survive a crash lies in the context's directory."""

    name: ClassVar[str]
    shared: ClassVar[bool] = False
    """Whether idle trainers may take shares of its steps (workers.trainer.shares)."""

    @abstractmethod
    def title(self, spec: dict[str, Any]) -> str:
        """Return one line that tells this job from others of its kind."""

    @abstractmethod
    def plan(self, context: JobContext) -> list[str]:
        """Return the names of the steps, in order; asked once, then kept. Steps of 5-30 s make resuming cheap."""

    @abstractmethod
    def run(self, context: JobContext, step: str) -> None:
        """Do one step. Idempotent: it may run again after a crash in its middle or just after its end."""

    def help(self, context: JobContext) -> None:
        """Take shares of a job that another trainer leads, until none is free. Only asked of shared kinds."""
        raise NotImplementedError

    def has_free_share(self, context: JobContext) -> bool:
        """Tell whether there is something to help with. Cheap: idle trainers ask every second."""
        return False

    @abstractmethod
    def finish(self, context: JobContext) -> dict[str, Any]:
        """Put the outcome into the catalog and return Job.result, such as {"url": ..., metrics}. Idempotent too."""


_REGISTRY = {
    "bulk": "workers.trainer.bulk:Bulk",
    "corpus": "workers.trainer.add_corpus:AddCorpus",
    "embed": "workers.trainer.embed:Embed",
    "eval": "workers.trainer.evaluation:Evaluate",
    "train": "workers.trainer.train:Train",
    "harvest": "workers.trainer.harvest:Harvest",
    "import": "workers.trainer.import_evidence:ImportEvidence",
    "sweep": "workers.trainer.sweep:Sweep",
    "validate": "workers.trainer.validate:Validate",
    "map": "workers.trainer.map:DrawMap",
    "match": "workers.trainer.match:MatchSources",
}
"""Kinds by name, imported only when one is asked for: torch takes seconds."""


def names() -> list[str]:
    return sorted(_REGISTRY)


def kind(name: str) -> JobKind:
    """Return the kind of that name. Raises BadInput naming the known ones."""
    if name not in _REGISTRY:
        raise BadInput(f"No job kind is called {name!r}; this version knows {', '.join(names())}.")
    module, _, attribute = _REGISTRY[name].partition(":")
    return cast(Callable[[], JobKind], getattr(import_module(module), attribute))()


def register(name: str, place: str) -> None:
    """Add a kind as `module:Class`; for tests and extensions."""
    _REGISTRY[name] = place
