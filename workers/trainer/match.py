"""The job that finds, for every feature of two SAEs, the nearest features of the other by cosine of decoder rows."""

from __future__ import annotations

from typing import Any

from app import harvests, matches
from app.errors import BadInput
from app.specs import MatchSpec
from workers.sae.logits import nearest_between
from workers.trainer import loaded
from workers.trainer.kinds import JobContext, JobKind


class MatchSources(JobKind):
    name = "match"

    def title(self, spec: dict[str, Any]) -> str:
        asked = MatchSpec(**spec)
        return f"Match {asked.model}/{asked.source} with {asked.other}"

    def plan(self, context: JobContext) -> list[str]:
        return ["match"]

    def run(self, context: JobContext, step: str) -> None:
        """Compute and store both directions; doing it again stores the same."""
        spec = MatchSpec(**context.spec)
        with context.sessions() as session:
            source, other = (harvests.source_named(session, spec.model, name) for name in (spec.source, spec.other))
        here, there = loaded.coders(context, (source.sae_hash, other.sae_hash))
        if here.d_out != there.d_out:
            raise BadInput(
                f"{source.name} writes {here.d_out} numbers and {other.name} {there.d_out}: their decoder directions "
                "cannot be compared."
            )
        context.report(0.1, f"comparing {here.d_sae:,} with {there.d_sae:,} directions")
        onward = nearest_between(here.W_dec, there.W_dec, spec.n)
        context.report(0.5, "and back")
        back = nearest_between(there.W_dec, here.W_dec, spec.n)
        with context.sessions.begin() as session:
            for ids, found in (((source.id, other.id), onward), ((other.id, source.id), back)):
                matches.record(session, *ids, found.indices.numpy(), found.cosines.numpy())

    def finish(self, context: JobContext) -> dict[str, Any]:
        spec = MatchSpec(**context.spec)
        return {"url": f"/{spec.model}/{spec.source}"}
