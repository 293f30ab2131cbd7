"""A real trainer with small shards that take their time: what tests of shared harvests run and kill."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from workers.trainer import harvest
from workers.trainer.kinds import JobContext

CONTEXTS_PER_SHARD, LATENTS_PER_STEP, CONTEXTS_PER_EFFECTS = 12, 16, 60
SHARD_SECONDS = 0.7


def cut_small() -> None:
    """Cut the work as the trainers of these tests do."""
    harvest.CONTEXTS_PER_SHARD = CONTEXTS_PER_SHARD
    harvest.LATENTS_PER_STEP = LATENTS_PER_STEP
    harvest.CONTEXTS_PER_EFFECTS = CONTEXTS_PER_EFFECTS


def slow_down() -> None:
    """Write down who begins which shard, and make each take a while."""
    read_shard = harvest.read_shard

    def slowly(context: JobContext, readings: Sequence[harvest.Reading], number: int) -> None:
        with (context.directory / "starts").open("a") as starts:
            starts.write(f"{number} {os.getpid()}\n")
        end = time.monotonic() + SHARD_SECONDS
        while time.monotonic() < end:
            context.check()
            time.sleep(0.05)
        read_shard(context, readings, number)

    harvest.read_shard = slowly


if __name__ == "__main__":
    from workers.trainer.__main__ import main

    cut_small()
    slow_down()
    main()
