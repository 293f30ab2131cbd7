"""Where an SAE's weights are: their size in memory, and whether the gpu worker, if it answers, holds them."""

from __future__ import annotations

from dataclasses import dataclass

from app import present
from app.catalog import SourceCard
from app.errors import AtlasError
from app.gpu import Worker
from app.settings import Settings
from app.vectors import n_weights

FLOAT_BYTES = 4
"""SAEs are computed in float32 whatever their file holds."""


@dataclass(frozen=True)
class Placement:
    bytes: int
    """What it takes in memory once loaded; 0 when its weights are gone."""
    where: str
    """In words; empty where there is nothing to say."""

    @property
    def sentence(self) -> str:
        size = f"{present.size(self.bytes)} in memory" if self.bytes else "its weights are gone from this machine"
        return f"{size}; {self.where}" if self.where else "imported as evidence, without weights"


async def placement(worker: Worker, settings: Settings, source: SourceCard) -> Placement:
    """Ask the worker whether it holds an SAE."""
    if not source.has_weights:
        return Placement(0, "")
    name = source.path[1:]
    estimate = n_weights(settings, source.sae_hash) * FLOAT_BYTES
    try:
        status = await worker.status()
    except AtlasError:
        return Placement(estimate, "the gpu worker does not answer, so it is loaded nowhere")
    if name in status.loading:
        return Placement(estimate, f"being loaded by the gpu worker on {status.device}")
    for resident in status.residents:
        if (resident.kind, resident.id) == ("sae", name):
            return Placement(resident.bytes, f"loaded in the gpu worker on {status.device}")
    return Placement(estimate, "not loaded; the gpu worker loads it when it is first asked")
