"""Curves in TensorBoard's event files and in W&B's offline runs, read back; and trackers that fail and stop no job."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import db, jobs
from app.settings import Settings
from app.tables import Job
from workers.trainer import tracking
from workers.trainer.kinds import JobContext

POINTS: list[tuple[int, dict[str, float]]] = [
    (10, {"1-a/loss": 0.5, "1-b/loss": 0.25, "tokens": 100.0}),
    (20, {"1-a/loss": 0.125, "1-b/loss": 0.0625, "tokens": 200.0}),
]


def job(settings: Settings) -> JobContext:
    engine = db.connect(settings)
    db.migrate(engine)
    sessions = db.sessions(engine)
    with sessions.begin() as session:
        made = Job(kind="train", title="Train a grid", spec={"d_sae": 40}, result={}, workflow_id="")
        session.add(made)
        session.flush()
        return JobContext(settings, sessions, made.id, made.spec, settings.job_dir(made.id))


def write(context: JobContext, points: list[tuple[int, dict[str, float]]] = POINTS) -> None:
    for step, values in points:
        context.metric(step, values)


def events(directory: Path) -> Iterator[Any]:
    """All events of a directory's files: records of a length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(directory.glob("events.*"), key=lambda path: path.stat().st_mtime_ns):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16


def scalars(directory: Path) -> list[tuple[str, int, float]]:
    return [(v.tag, event.step, v.simple_value) for event in events(directory) for v in event.summary.value]


def test_tensorboard_gets_a_run_for_each_sae_at_once(settings: Settings, tmp_path: Path) -> None:
    context = job(settings.changed(tensorboard_dir=str(tmp_path / "runs")))
    write(context)
    runs = tmp_path / "runs" / f"job-{context.job_id}"
    assert scalars(runs / "1-a") == [("loss", 10, 0.5), ("loss", 20, 0.125)]
    assert scalars(runs / "1-b") == [("loss", 10, 0.25), ("loss", 20, 0.0625)]
    assert scalars(runs) == [("tokens", 10, 100.0), ("tokens", 20, 200.0)]
    tracking.close(context.settings, context.job_id)


def test_a_resumed_job_takes_back_what_it_writes_again(settings: Settings, tmp_path: Path) -> None:
    context = job(settings.changed(tensorboard_dir=str(tmp_path)))
    write(context)
    tracking.close(context.settings, context.job_id)
    write(context, POINTS[1:])
    tracking.close(context.settings, context.job_id)
    starts = [e.step for e in events(tmp_path / f"job-{context.job_id}") if e.session_log.status == 1]
    assert starts == [10, 20]


def wandb_records(file: Path) -> Iterator[Any]:
    """All records of an offline run: a header, then blocks as LevelDB's log has them, none of them split here."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at = file.read_bytes(), 7
    assert data.startswith(b":W&B")
    assert len(data) < 2**15
    while at + 7 <= len(data):
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        assert kind == 1
        yield Record.FromString(data[at + 7 : at + 7 + size])
        at += 7 + size


def test_weights_and_biases_writes_an_offline_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    context = job(settings.changed(wandb_project="saes"))
    write(context)
    tracking.close(context.settings, context.job_id)
    (file,) = (settings.data_dir / "wandb").glob("wandb/offline-run-*/run-*.wandb")
    records = list(wandb_records(file))
    run = next(r.run for r in records if r.HasField("run"))
    assert (run.project, run.display_name) == ("saes", f"job {context.job_id}: Train a grid")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["d_sae"] == 40
    told = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in r.history.item}
        for r in records
        if r.HasField("history")
    ]
    assert [(row["_step"], row["1-a/loss"], row["tokens"]) for row in told] == [(10, 0.5, 100.0), (20, 0.125, 200.0)]


def test_a_tracker_that_fails_is_said_once_and_the_job_goes_on(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    context = job(settings.changed(tensorboard_dir=str(tmp_path / "file")))
    write(context)
    tracking.close(context.settings, context.job_id)
    assert capsys.readouterr().out.count("TensorBoard gets no curves of this job") == 1
    with context.sessions() as session:
        assert len(jobs.metrics(session, context.job_id)) == 2


def test_without_the_settings_nothing_is_imported_or_written(settings: Settings) -> None:
    code = (
        "import sys, app.main, workers.trainer.tracking as t; from app.settings import Settings; "
        "t.publish(Settings(), 1, {}, str, 1, {'loss': 1.0}); print({'wandb', 'tensorboardX'} & set(sys.modules))"
    )
    environment = {"PATH": "", "SAE_ATLAS_DATA_DIR": str(settings.data_dir), "PYTHONPATH": ":".join(sys.path)}
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout == "set()\n"
