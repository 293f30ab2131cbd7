"""The job that stores a corpus: large files that a browser sent, or a dataset of the hub, streamed."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from app import corpora, uploads, visibility
from app.specs import CorpusSpec
from workers.trainer.kinds import JobContext, JobKind

_NAME = "corpus.json"


class AddCorpus(JobKind):
    name = "corpus"

    def title(self, spec: dict[str, Any]) -> str:
        return corpora.title_of(CorpusSpec(**spec))

    def plan(self, context: JobContext) -> list[str]:
        return ["read"]

    def run(self, context: JobContext, step: str) -> None:
        """Read it all; text that was stored before an interruption is found again by its hash."""
        spec = CorpusSpec(**context.spec)
        with context.sessions.begin() as session:
            visibility.make_for_job(session, context.job_id)
            corpus = corpora.add(session, context.settings, spec, context.report)
            found = {"name": corpus.name, "documents": corpus.n_documents, "characters": corpus.n_chars}
        (context.directory / _NAME).write_text(json.dumps(found))

    def finish(self, context: JobContext) -> dict[str, Any]:
        uploads.forget(context.settings, CorpusSpec(**context.spec).path)
        found = json.loads((context.directory / _NAME).read_text())
        return {"url": f"/corpora/{quote(found['name'], safe='')}", **found}
