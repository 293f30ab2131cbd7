"""The job that embeds explanations for the search by meaning. Incremental: only texts without a vector are computed.

all-MiniLM-L6-v2 through transformers, on the trainer's device; app.meaning computes the same for queries without torch
(a test holds the two together).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

from app import embeddings, meaning
from app.errors import NotFound
from workers.device import device_of
from workers.trainer.kinds import JobContext, JobKind

BATCH = 256
STORE_EVERY = 4_096


class Embed(JobKind):
    name = "embed"

    def title(self, spec: dict[str, Any]) -> str:
        return "Learn the meaning of new labels"

    def plan(self, context: JobContext) -> list[str]:
        return ["embed"]

    def run(self, context: JobContext, step: str) -> None:
        where = meaning.directory()
        if where is None:
            raise NotFound(f"The embedding model is not installed; `{meaning.INSTALL}` installs it.")
        with context.sessions() as session:
            waiting = sorted(embeddings.missing(session).items(), key=lambda pair: len(pair[1]))
        if not waiting:
            return
        encoder = Encoder(where, device_of(context.settings))
        for start in range(0, len(waiting), STORE_EVERY):
            part = waiting[start : start + STORE_EVERY]
            made: list[meaning.Vectors] = []
            for at in range(0, len(part), BATCH):
                made.append(encoder.embed([text for _, text in part[at : at + BATCH]]))
                done = min(start + at + BATCH, start + len(part))
                context.report(done / len(waiting), f"{done:,} of {len(waiting):,} texts")
            with context.sessions.begin() as session:
                embeddings.store(session, [name for name, _ in part], np.concatenate(made))

    def finish(self, context: JobContext) -> dict[str, Any]:
        with context.sessions() as session:
            return {"url": "/search", "n_missing": len(embeddings.missing(session))}


class Encoder:
    """The embedding model on a device."""

    def __init__(self, where: Path, device: str) -> None:
        self._device = device
        self._tokenizer = AutoTokenizer.from_pretrained(str(where), local_files_only=True)
        self._model: nn.Module = AutoModel.from_pretrained(str(where), local_files_only=True).to(device).eval()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> meaning.Vectors:
        """Return one unit vector a text, [len(texts), 384]."""
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        batch = self._tokenizer(
            clean, padding=True, truncation=True, max_length=meaning.MAX_TOKENS, return_tensors="pt"
        ).to(self._device)
        hidden = self._model(**batch).last_hidden_state  # [batch, pos, 384]
        mask = batch["attention_mask"].unsqueeze(-1).float()
        mean = (hidden * mask).sum(1) / mask.sum(1)
        return nn.functional.normalize(mean, dim=1).cpu().numpy()
