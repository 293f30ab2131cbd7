"""Several processes that learn from the same batches: torchrun starts them for one step of a job (TrainSpec.processes).

Each takes its share of every batch's rows, gradients are averaged, and all have the same weights after each step
(data-parallel training). The first one writes checkpoints and tells how it goes. A process that ends ends them all;
what is repeated goes on from the checkpoints, as any other step does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from app import db
from app.errors import AtlasError
from app.settings import Settings
from app.tables import Job
from workers.device import device_of
from workers.sae import across
from workers.trainer.kinds import Cancelled, JobContext

_TOLD = "SAE_ATLAS_TOGETHER"
_FAULT = "together.fault"


class Interrupted(AtlasError):
    """Processes that trained together have ended before their work."""


@dataclass(frozen=True)
class Follower(JobContext):
    """The context of a process that does not lead: it says nothing, and is ended from outside."""

    def report(self, share_of_step: float, status: str = "") -> None:
        pass

    def metric(self, step: int, values: dict[str, float]) -> None:
        pass


def run(context: JobContext) -> None:
    """Start the processes and wait for them. Raises what the job was asked for meanwhile, or what stopped one."""
    fault = context.directory / _FAULT
    fault.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(context.spec["processes"]), "-m", "workers.trainer.together"]
    told = {
        "settings": context.settings.model_dump(mode="json", exclude_unset=True),
        "job": context.job_id,
        "executor": context.executor,
        "trainer": os.getpid(),
        "place": (context.step_index, context.n_steps),
    }
    threads = str(max(1, torch.get_num_threads() // int(context.spec["processes"])))
    variables = os.environ | {_TOLD: json.dumps(told), "OMP_NUM_THREADS": threads}
    with subprocess.Popen(command, env=variables) as group:
        try:
            code = group.wait()
        finally:
            group.terminate()
    if code:
        context.check()
        raise Interrupted(fault.read_text() if fault.exists() else f"A process of the training ended with {code}.")


def _end_with(trainer: int) -> None:
    """End this process when the trainer is gone: the job's next one starts processes of its own."""
    while True:
        time.sleep(1)
        try:
            os.kill(trainer, 0)
        except ProcessLookupError:
            os._exit(1)


def main() -> int:
    """Be one of the processes."""
    told: dict[str, Any] = json.loads(os.environ[_TOLD])
    Thread(target=_end_with, args=(told["trainer"],), daemon=True).start()
    settings = Settings(**told["settings"])
    on_gpu = device_of(settings) == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    context = _context(settings, told)
    try:
        _learn(context)
    except Cancelled:
        return 1  # the trainer looks up which it was
    except AtlasError as error:
        (context.directory / _FAULT).write_text(error.message)
        return 1
    dist.destroy_process_group()
    return 0


def _context(settings: Settings, told: dict[str, Any]) -> JobContext:
    sessions = db.sessions(db.connect(settings))
    with sessions() as session:
        job = session.get_one(Job, told["job"])
        spec = dict(job.spec)
    index, n_steps = told["place"]
    kind = JobContext if across.leads() else Follower
    directory = settings.job_dir(told["job"])
    return kind(settings, sessions, told["job"], spec, directory, told["executor"], "", index, n_steps)


def _learn(context: JobContext) -> None:
    from workers.trainer import train  # which imports this module

    whole = train.Run.resume(context)
    whole.norms()  # from the first shard, whose power of two all others use
    for step in whole.learning_steps():
        train.Train().run(context, step)


if __name__ == "__main__":
    code = main()
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # without waiting for processes that wait for this one
