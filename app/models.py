"""Verbs on language models: make one's directory in a subprocess that may import torch, and catalogue it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.catalog import RESERVED
from app.errors import AtlasError, BadFile, BadInput
from app.protocol import ModelCard
from app.settings import Settings
from app.tables import Model

Report = Callable[[float, str], None]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_BAR = re.compile(r"(?P<what>[^:|]{1,80}?)\.*: +(?P<percent>\d{1,3})%\|")
"""A line of tqdm, by which transformers tells its progress."""


class Origin(NamedTuple):
    """Where a model is taken from."""

    kind: Literal["gguf", "directory", "hub"]
    source: str


def origin(given: str) -> Origin:
    """Tell a GGUF file, a directory and a hub id apart. Raises BadInput before anything is opened or fetched."""
    path = Path(given).expanduser()
    if path.is_dir():
        return Origin("directory", str(path.resolve()))
    if path.suffix == ".gguf" and path.is_file():
        return Origin("gguf", str(path.resolve()))
    if _HUB_ID.fullmatch(given) and ".." not in given:
        return Origin("hub", given)
    raise BadInput(f"{given[:200]!r} is no directory, no .gguf file and no hub id such as EleutherAI/pythia-70m.")


def check_id(model_id: str) -> str:
    """Return a usable model id. Raises BadInput: ids are the first part of addresses."""
    if not _ID.fullmatch(model_id) or ".." in model_id:
        raise BadInput(f"{model_id[:100]!r} cannot be a model id: use letters, digits, dots, dashes, at most 100.")
    if model_id.lower() in RESERVED:
        raise BadInput(f"{model_id!r} cannot be a model id: the address /{model_id} is a page of its own.")
    return model_id


def install(settings: Settings, where: Origin, model_id: str, name: str, report: Report) -> ModelCard:
    """Write models/{model_id} and return its card. A model that is there already is left as it is."""
    target = settings.model_dir(check_id(model_id))
    if (target / "card.json").is_file():
        return ModelCard.model_validate_json((target / "card.json").read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "workers.install_model", where.kind, where.source]
    command += ["--id", model_id, "--name", name, "--out", str(target.parent)]
    report(0.0, "Loading torch and transformers")
    lines = _run(command, report)
    try:
        return ModelCard.model_validate_json(lines[-1])
    except (IndexError, ValueError):
        raise AtlasError(f"Installing {model_id} ended without a model card; its output was {lines[-3:]}.") from None


def add(session: Session, card: ModelCard) -> Model:
    """Put a model into the catalog, or renew its entry."""
    model = session.get(Model, card.id)
    if model is None:
        model = Model(id=card.id, name=card.name, hash=card.hash, card={})
        session.add(model)
    model.name, model.hash, model.card = card.name, card.hash, card.model_dump()
    session.flush()
    return model


def names(session: Session) -> list[str]:
    return list(session.scalars(select(Model.id).order_by(Model.id)))


def _run(command: list[str], report: Report) -> list[str]:
    """Run an installer: its stderr is progress, its stdout the result. Raises BadFile with its last words."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said: list[str] = []
        for line in process.stderr:
            said = [*said[-30:], line.rstrip()]
            bar = _BAR.match(line)
            if bar:
                report(int(bar["percent"]) / 100, bar["what"])
            elif line.strip() and not line.startswith(" "):
                report(0.0, line.strip()[:80])
        lines = process.stdout.read().splitlines()
    if process.returncode != 0:
        last = next((line for line in reversed(said) if line.strip()), "nothing was said")
        if "No module named" in last:
            raise AtlasError(f"{last}. Install the worker's packages: pip install 'sae-atlas[worker]'.")
        raise BadFile(last)
    return lines
