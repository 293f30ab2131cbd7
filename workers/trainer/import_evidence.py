"""The job that reads what a browser sent to /import: a bundle, a Neuronpedia export or batches of sae_dashboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app import exchange, uploads, visibility
from app.errors import AtlasError
from app.specs import ImportSpec
from workers.trainer.kinds import JobContext, JobKind

_FOUND = "imported.json"


class ImportEvidence(JobKind):
    name = "import"

    def title(self, spec: dict[str, Any]) -> str:
        return exchange.title_of(ImportSpec(**spec))

    def plan(self, context: JobContext) -> list[str]:
        return ["read"]

    def run(self, context: JobContext, step: str) -> None:
        """Read it in one transaction; doing it again renews the same sources."""
        spec = ImportSpec(**context.spec)
        try:
            with context.sessions.begin() as session:
                visibility.make_for_job(session, context.job_id)
                found = exchange.import_(
                    session, context.settings, Path(spec.path), context.report, spec.model, spec.set_name
                )
                names = [f"{source.model_id}/{source.name}" for source in found]
                n_features = sum(source.d_sae for source in found)
        except AtlasError:
            uploads.forget(context.settings, spec.root)  # it would be refused again
            raise
        (context.directory / _FOUND).write_text(json.dumps({"sources": names, "features": n_features}))

    def finish(self, context: JobContext) -> dict[str, Any]:
        uploads.forget(context.settings, ImportSpec(**context.spec).root)
        found = json.loads((context.directory / _FOUND).read_text())
        return {"url": f"/{found['sources'][0]}", **found}
