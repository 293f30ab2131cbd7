"""Evidence sent in batches over the API, as the official client does: a set is announced, then features arrive.

Batches are kept as a Neuronpedia export under data_dir/batches/{model}/{source}, which the import reads. A source with
few features is in the catalog when the answer is sent; a larger one is read again by a job, once for many batches.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import catalog, jobs, lockfile, visibility
from app.errors import BadInput, Conflict, Forbidden, NotFound, TooLarge
from app.exchange import neuronpedia
from app.exchange.imported import ensure_model
from app.harvests import check_set_name
from app.models import check_id
from app.people import Actor
from app.settings import Settings
from app.specs import ImportSpec
from app.tables import Job, JobState, Model, Source, SourceSet

MAX_LAYERS = 1_000
AT_ONCE = 1_024
"""Features of a source up to which a batch is in the catalog when it is answered."""
Rows = dict[str, Sequence[dict[str, Any]]]
"""Rows of a batch by their kind: features, activations, explanations."""


@dataclass(frozen=True)
class SetCard:
    """A source set as clients know it."""

    model_id: str
    name: str
    description: str
    url: str
    owner: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Taken:
    """What became of a batch."""

    n_features: int
    job_id: int | None = None
    """The job that puts it into the catalog; None when it is there."""


def new_model(session: Session, model_id: str, name: str, n_layers: int) -> Model:
    """Add a model that is known by name alone. Raises Conflict when the name is taken."""
    if session.get(Model, check_id(model_id)) is not None:
        raise Conflict(f"The model {model_id} is here already.")
    if not 1 <= n_layers <= MAX_LAYERS:
        raise BadInput(f"A model has 1 to {MAX_LAYERS:,} layers; not {n_layers:,}.")
    return ensure_model(session, model_id, name, n_layers)


def new_set(session: Session, who: Actor, model_id: str, name: str, description: str, url: str) -> SetCard:
    """Announce a set: a source for each layer, filled by batches. Raises Conflict when the name is taken."""
    card = catalog.model_entry(session, model_id).card
    check_set_name(name)
    with visibility.unlimited(session):
        taken = session.scalar(select(Source.id).where(Source.model_id == model_id, Source.set_name == name).limit(1))
    if taken is not None or session.get(SourceSet, (model_id, name)) is not None:
        raise Conflict(f"{model_id} has a set {name} already; choose another name.")
    session.add(SourceSet(model_id=card.id, name=name, description=description, url=url, owner=who.name))
    session.flush()
    return set_card(session, model_id, name)


def set_card(session: Session, model_id: str, name: str) -> SetCard:
    """Return a set that was announced, or that sources of the catalog belong to. Raises NotFound."""
    card = catalog.model_entry(session, model_id).card
    announced = session.get(SourceSet, (card.id, name[:64]))
    if announced is not None:
        layers = tuple(f"{layer}-{announced.name}" for layer in range(card.n_layers))
        return SetCard(card.id, announced.name, announced.description, announced.url, announced.owner, layers)
    wanted = select(Source.name).where(Source.model_id == card.id, Source.set_name == name).order_by(Source.layer)
    found = tuple(session.scalars(wanted))
    if not found:
        raise NotFound(f"{card.id} has no set {name[:80]!r}.")
    return SetCard(card.id, name, "", "", "", found)


def add(session: Session, settings: Settings, who: Actor, model_id: str, source: str, rows: Rows) -> Taken:
    """Keep a batch and put it into the catalog. The caller commits.

    Raises NotFound for a set that nobody announced, Forbidden for another's, Conflict for a feature that is there.
    """
    _check_owner(session, who, model_id, source)
    home = settings.data_dir / "batches" / model_id / source
    lock = settings.data_dir / "run" / "batches" / f"{model_id}-{source}.lock"
    with lockfile.hold(lock, f"Another batch of {model_id}/{source} is being read; send this one again.", seconds=60):
        there = session.scalar(select(Source.id).where(Source.model_id == model_id, Source.name == source))
        waiting = _waiting(session, home)
        if there is None and not waiting:
            shutil.rmtree(home, ignore_errors=True)  # it was removed, and begins anew
        known = _known(home)
        fresh = _checked(settings, rows, known, f"{model_id}/{source}")
        _write(home, rows, fresh)
        try:
            return _catalogued(session, settings, who, home, len(known) + len(fresh), len(fresh), waiting)
        except BaseException:
            _unwrite(home, rows, known)
            raise


def _check_owner(session: Session, who: Actor, model_id: str, source: str) -> None:
    layer, _, name = source.partition("-")
    card = catalog.model_entry(session, model_id).card
    announced = session.get(SourceSet, (card.id, name[:64]))
    if announced is None:
        raise NotFound(f"Nobody announced a set {name[:64]!r} of {card.id}; POST /api/source-set/new first.")
    if not layer.isascii() or not layer.isdigit() or str(int(layer[:9])) != layer or int(layer) >= card.n_layers:
        raise NotFound(f"{card.id} has {card.n_layers} layers; {source[:80]!r} is a source of none of them.")
    if not visibility.may_change(who, announced.owner):
        raise Forbidden(f"The set {announced.name} is {announced.owner}'s; only they send features to it.")


def _checked(settings: Settings, rows: Rows, known: set[int], place: str) -> list[int]:
    """Return the features of a batch that are new. Raises Conflict for one that is not, or is there twice."""
    fresh = [int(row["index"]) for row in rows["features"]]
    for index in fresh:
        if index in known or fresh.count(index) > 1:
            raise Conflict(f"Feature {index} of {place} was sent already; remove the source to begin anew.")
        if index >= settings.max_d_sae:
            raise TooLarge(f"Feature {index:,} of {place} is too high; SAE_ATLAS_MAX_D_SAE is {settings.max_d_sae:,}.")
    alone = {int(row["index"]) for row in rows["activations"]} - known - set(fresh)
    if alone:
        raise NotFound(f"Feature {min(alone)} of {place} was not sent yet; upload it before more of its activations.")
    return fresh


def _catalogued(
    session: Session, settings: Settings, who: Actor, home: Path, n_all: int, n_new: int, waiting: Job | None
) -> Taken:
    if n_all > AT_ONCE or waiting is not None:
        if waiting is None:
            spec = ImportSpec(
                path=str(home), root=str(home), uploaded_as=f"{home.parent.name}/{home.name}", model="", set_name=""
            )
            waiting = jobs.submit(session, settings, "import", f"Import {spec.uploaded_as}", spec.model_dump())
        return Taken(n_new, waiting.id)
    visibility.make_for(session, who.name)
    neuronpedia.import_(session, settings, home, lambda _done, _status: None, lambda place: place)
    return Taken(n_new)


def _waiting(session: Session, home: Path) -> Job | None:
    """Return a job that will read this place and has not begun."""
    found = jobs.moving(session, "import", {"path": str(home)})
    return found if found is not None and found.state == JobState.QUEUED and not found.workflow_id else None


def _known(home: Path) -> set[int]:
    file = home / "known.txt"
    return {int(line) for line in file.read_text().split()} if file.is_file() else set()


def _write(home: Path, rows: Rows, fresh: Sequence[int]) -> None:
    """Add a batch to what lies there; a reader sees all of a file or none of it."""
    for kind, batch in rows.items():
        (home / kind).mkdir(parents=True, exist_ok=True)
        if batch:
            _replace(_next(home / kind), batch)
    with (home / "known.txt").open("a") as known:
        known.writelines(f"{index}\n" for index in fresh)


def _replace(path: Path, batch: Iterable[dict[str, Any]]) -> None:
    scratch = path.with_name(f".{path.name}.new")
    with gzip.open(scratch, "wt", 3, encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in batch)
    scratch.replace(path)


def _unwrite(home: Path, rows: Rows, known: set[int]) -> None:
    """Take the last batch back: the catalog refused it."""
    for kind, batch in rows.items():
        if batch:
            (home / kind / f"batch-{_count(home / kind) - 1}.jsonl.gz").unlink(missing_ok=True)
    (home / "known.txt").write_text("".join(f"{index}\n" for index in sorted(known)))


def _next(folder: Path) -> Path:
    return folder / f"batch-{_count(folder)}.jsonl.gz"


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("batch-*.jsonl.gz"))
