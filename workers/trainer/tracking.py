"""Copies jobs' curves to TensorBoard event files and to Weights & Biases, where the settings ask for that.

The catalog has the curves in any case: a tracker that fails is said in the job's log and left out from then on, and no
job fails for it. Packages of the extras `tensorboard` and `wandb` are imported only here, in the trainer.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from app import log
from app.settings import Settings

_logger = log.get("trainer")


class Tracker(Protocol):
    """Takes the points of one job."""

    def add(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """`{tensorboard_dir}/job-{id}` for the whole job, and below it a directory for each SAE of several.

    So TensorBoard draws the SAEs of a grid as runs over each other. What a killed trainer wrote beyond its checkpoint
    is taken back: TensorBoard drops what has a later step than the first that is written again.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.writers: dict[str, Any] = {}

    def add(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        by_source: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            source, _, metric = name.rpartition("/")
            by_source.setdefault(source, {})[metric] = value
        for source, own in by_source.items():
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in own.items()])
            writer = self._writer(source, step)
            writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            writer.flush()

    def _writer(self, source: str, step: int) -> Any:
        """The file of a source; not by SummaryWriter, which starts two threads each and does not flush when told."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if source not in self.writers:
            directory = self.directory / source
            directory.mkdir(parents=True, exist_ok=True)
            writer = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
            writer.write_event(Event(step=step, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
            self.writers[source] = writer
        return self.writers[source]

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases:
    """One run for each job, gone on with when the job is resumed. WANDB_MODE and its like mean what they always do."""

    def __init__(self, settings: Settings, job_id: int, title: str, spec: Mapping[str, Any]) -> None:
        import wandb

        directory = settings.data_dir / "wandb"
        directory.mkdir(parents=True, exist_ok=True)
        # Several catalogs may share a project: their jobs have the same numbers.
        place = hashlib.sha256(str(settings.data_dir.resolve()).encode()).hexdigest()[:8]
        self.run = wandb.init(
            project=settings.wandb_project,
            id=f"sae-atlas-{place}-{job_id}",
            name=f"job {job_id}: {title}"[:120],
            config=dict(spec),
            dir=str(directory),
            resume="allow",
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, silent=True, init_timeout=30),
        )

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


_open: dict[tuple[Path, int], dict[str, Tracker]] = {}
_lock = Lock()


def publish(
    settings: Settings,
    job_id: int,
    spec: Mapping[str, Any],
    title: Callable[[], str],
    step: int,
    values: Mapping[str, float],
) -> None:
    """Hand one point of a job to all trackers that are asked for."""
    if not settings.tensorboard_dir and not settings.wandb_project:
        return
    with _lock:
        key = (settings.data_dir, job_id)
        if key not in _open:
            _open[key] = _started(settings, job_id, spec, title)
        for name, tracker in list(_open[key].items()):
            try:
                tracker.add(step, values)
            except Exception as error:  # whatever a foreign package raises: the job goes on
                del _open[key][name]
                _complain(job_id, name, error)


def close(settings: Settings, job_id: int) -> None:
    """Finish what was written of a job; its next point begins anew."""
    with _lock:
        for name, tracker in _open.pop((settings.data_dir, job_id), {}).items():
            try:
                tracker.close()
            except Exception as error:
                _complain(job_id, name, error)


def _started(settings: Settings, job_id: int, spec: Mapping[str, Any], title: Callable[[], str]) -> dict[str, Tracker]:
    makers: dict[str, Callable[[], Tracker]] = {}
    if settings.tensorboard_dir:
        makers["TensorBoard"] = lambda: TensorBoard(Path(settings.tensorboard_dir) / f"job-{job_id}")
    if settings.wandb_project:
        makers["Weights & Biases"] = lambda: WeightsAndBiases(settings, job_id, title(), spec)
    found: dict[str, Tracker] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:
            _complain(job_id, name, error)
    return found


def _complain(job_id: int, name: str, error: Exception) -> None:
    missing = isinstance(error, ImportError)
    extra = "tensorboard" if name == "TensorBoard" else "wandb"
    why = f"pip install 'sae-atlas[{extra}]'" if missing else f"{type(error).__name__}: {error}"
    _logger.warning(f"{name} gets no curves of this job", job=job_id, why=why[:500])
