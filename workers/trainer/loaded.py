"""What kinds of jobs share: the model and SAE in memory (the last ones used), and tidying up at the end."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from app.errors import NotFound
from app.tables import Model
from workers.checkpoints import load_sae
from workers.device import device_of
from workers.language_model import LanguageModel
from workers.sae.coders import Coder
from workers.trainer.kinds import JobContext


def model(context: JobContext, model_id: str) -> LanguageModel:
    """Return the model in float32, loading it on first use."""
    with context.sessions() as session:
        if session.get(Model, model_id) is None:
            raise NotFound(f"There is no model {model_id!r}. Add it with `sae-atlas model add`.")
    return _load(context.settings.model_dir(model_id), device_of(context.settings))


@lru_cache(maxsize=1)
def _load(path: Path, where: str) -> LanguageModel:
    return LanguageModel.load(path, where, torch.float32)


def coder(context: JobContext, sae_hash: str) -> Coder:
    return coders(context, (sae_hash,))[0]


def coders(context: JobContext, sae_hashes: Sequence[str]) -> list[Coder]:
    """Return the SAEs of a job; they stay in memory until a job asks for others."""
    where = device_of(context.settings)
    wanted = [(context.settings.sae_dir(sae_hash), where) for sae_hash in sae_hashes]
    for key in set(_coders) - set(wanted):
        del _coders[key]
    for key in wanted:
        if key not in _coders:
            _coders[key] = load_sae(*key)
    return [_coders[key] for key in wanted]


_coders: dict[tuple[Path, str], Coder] = {}


RESULT = "result.json"


def leave_only_result(context: JobContext, result: dict[str, Any]) -> None:
    """Keep a finished job's result and delete its checkpoints; `finish`, run again after a crash, returns it."""
    scratch = context.directory / f"{RESULT}.new"
    scratch.write_text(json.dumps(result))
    os.replace(scratch, context.directory / RESULT)
    for path in context.directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != RESULT:
            path.unlink(missing_ok=True)
