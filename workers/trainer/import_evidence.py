"""The job that reads what a browser sent to /import: a bundle, a Neuronpedia export or batches of sae_dashboard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app import exchange, remotes, uploads, visibility
from app.documents import Report
from app.errors import AtlasError
from app.specs import ImportSpec
from workers.trainer.kinds import JobContext, JobKind

_FOUND = "imported.json"
_CHECK_SECONDS = 1.0


class ImportEvidence(JobKind):
    name = "import"

    def title(self, spec: dict[str, Any]) -> str:
        return exchange.title_of(ImportSpec(**spec))

    def plan(self, context: JobContext) -> list[str]:
        return ["fetch", "read"] if context.spec.get("url") else ["read"]

    def run(self, context: JobContext, step: str) -> None:
        """Read it in one transaction; doing it again renews the same sources."""
        spec = ImportSpec(**context.spec)
        if step == "fetch":
            remotes.fetch(context.settings, spec, context.report)
            return
        try:
            if spec.manifest_sha256:
                remotes.check_manifest(Path(spec.path), spec.manifest_sha256)
            with context.sessions.begin() as session:
                visibility.make_for_job(session, context.job_id)
                report = _beside(session, context)
                found = exchange.import_(session, context.settings, Path(spec.path), report, spec.model, spec.set_name)
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


def _beside(session: Session, context: JobContext) -> Report:
    """Return how an import in this transaction says how far it is.

    SQLite lets one transaction write at a time: once the import's does, a report would wait for it in vain.
    """
    checked = [0.0]

    def report(share: float, status: str) -> None:
        connection: Any = session.connection().connection.driver_connection
        if not getattr(connection, "in_transaction", False):
            context.report(share, status)
        elif time.monotonic() - checked[0] > _CHECK_SECONDS:
            checked[0] = time.monotonic()
            context.check()

    return report
