"""A trainer process whose job kind, `toy`, appends lines to files: what the executor's tests run and kill."""

from __future__ import annotations

import errno
import os
import time
from typing import Any, ClassVar

from app.errors import BadInput
from workers.trainer import kinds
from workers.trainer.kinds import JobContext, JobKind


class Toy(JobKind):
    """spec: steps, seconds of each, fail (the step that fails until `{directory}/mended` exists), how it fails."""

    name: ClassVar[str] = "toy"

    def title(self, spec: dict[str, Any]) -> str:
        return f"{spec['steps']} toy steps"

    def plan(self, context: JobContext) -> list[str]:
        if context.spec.get("how") == "plan":
            raise BadInput("No steps: 0 asked, 1 needed.")
        return [f"part-{i}" for i in range(context.spec["steps"])]

    def run(self, context: JobContext, step: str) -> None:
        with (context.directory / "starts").open("a") as starts:
            starts.write(f"{step} {os.getpid()}\n")
        self._maybe_fail(context, step)
        end = time.monotonic() + context.spec.get("seconds", 0.0)
        while time.monotonic() < end:
            context.report(0.5, f"in {step}")
            time.sleep(0.02)
        previous = sorted(context.directory.glob("part-*.txt"))
        part = context.directory / f"{step}.new"
        part.write_text(f"{step} after {len([p for p in previous if p.stem != step])}\n")
        part.rename(context.directory / f"{step}.txt")
        context.metric(int(step.removeprefix("part-")), {"loss": 1.0})
        context.report(1.0, f"{step} done")

    def _maybe_fail(self, context: JobContext, step: str) -> None:
        if context.spec.get("fail") != step or (context.directory / "mended").exists():
            return
        match context.spec.get("how"):
            case "known":
                raise BadInput("Text is 9 tokens; 8 fit.")
            case "disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "die":
                os.abort()
            case _:
                raise ZeroDivisionError("by zero")

    def finish(self, context: JobContext) -> dict[str, Any]:
        lines = [p.read_text() for p in sorted(context.directory.glob("part-*.txt"))]
        return {"text": "".join(lines), "url": f"/jobs/{context.job_id}"}


if __name__ == "__main__":
    from workers.trainer.__main__ import main

    kinds.register("toy", "tests.workers.toy_trainer:Toy")
    main()
