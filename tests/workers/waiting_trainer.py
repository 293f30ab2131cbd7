"""A trainer process whose `map` jobs go on only when a test lets them: `{data_dir}/go-{job}-{step}` is there."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from app.specs import MapSpec
from workers.trainer import kinds
from workers.trainer.kinds import JobContext, JobKind

STEPS = 4


class Waiting(JobKind):
    name: ClassVar[str] = "map"

    def title(self, spec: dict[str, Any]) -> str:
        return f"a map of {MapSpec(**spec).source}"

    def plan(self, context: JobContext) -> list[str]:
        return [f"step-{n}" for n in range(STEPS)]

    def run(self, context: JobContext, step: str) -> None:
        context.report(0.0, f"waits in {step}")
        while not (context.settings.data_dir / f"go-{context.job_id}-{step}").exists():
            context.check()
            time.sleep(0.05)

    def finish(self, context: JobContext) -> dict[str, Any]:
        return {"url": f"/jobs/{context.job_id}"}


if __name__ == "__main__":
    from workers.trainer.__main__ import main

    kinds.register("map", "tests.workers.waiting_trainer:Waiting")
    main()
