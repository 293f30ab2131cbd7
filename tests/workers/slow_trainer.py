"""A real trainer with small steps that take their time: what tests of shared harvests and of bulk jobs run and kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from app.settings import Settings
from app.specs import BulkSpec
from workers.trainer import bulk, harvest
from workers.trainer.kinds import JobContext

REPOSITORY = Path(__file__).resolve().parents[2]
CONTEXTS_PER_SHARD, LATENTS_PER_STEP, CONTEXTS_PER_EFFECTS = 12, 16, 60
TEXTS_PER_STEP = 4
SHARD_SECONDS = 0.7


def cut_small() -> None:
    """Cut the work as the trainers of these tests do."""
    harvest.CONTEXTS_PER_SHARD = CONTEXTS_PER_SHARD
    harvest.LATENTS_PER_STEP = LATENTS_PER_STEP
    harvest.CONTEXTS_PER_EFFECTS = CONTEXTS_PER_EFFECTS


def slow_down() -> None:
    """Write down who begins which shard or part, and make each take a while."""
    read_shard, encode_part = harvest.read_shard, bulk.encode_part

    def slow_shard(context: JobContext, readings: Sequence[harvest.Reading], number: int) -> None:
        _take_a_while(context, number)
        read_shard(context, readings, number)

    def slow_part(context: JobContext, spec: BulkSpec, number: int, total: int) -> None:
        _take_a_while(context, number)
        encode_part(context, spec, number, total)

    harvest.read_shard, bulk.encode_part = slow_shard, slow_part


def _take_a_while(context: JobContext, number: int) -> None:
    with (context.directory / "starts").open("a") as starts:
        starts.write(f"{number} {os.getpid()}\n")
    end = time.monotonic() + SHARD_SECONDS
    while time.monotonic() < end:
        context.check()
        time.sleep(0.05)


@contextmanager
def running(settings: Settings, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run this trainer on a data directory, and kill it at the end."""
    given = settings.model_dump(exclude_unset=True) | {"threads": 1}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment |= {f"SAE_ATLAS_{name.upper()}": str(value) for name, value in given.items()}
    command = [sys.executable, "-m", "tests.workers.slow_trainer"]
    with log.open("ab") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    from workers.trainer.__main__ import main

    cut_small()
    bulk.TEXTS_PER_STEP = TEXTS_PER_STEP
    slow_down()
    main()
