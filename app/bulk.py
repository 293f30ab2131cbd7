"""Files of texts for bulk jobs, and what such a job leaves. Streams: memory does not grow with the file.

A job's directory holds activations.parquet (row, position, token, latent, value) or maxima.parquet (row, latent,
value), and with groups separating.json. `row` is the line of the text in the file, from 0.
"""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from sqlalchemy.orm import Session

from app import catalog, jobs
from app.errors import BadFile, BadInput, NotFound
from app.settings import Settings
from app.specs import BulkSpec
from app.tables import Job, JobState

FORMATS = (".jsonl", ".csv", ".parquet")
RESULT_FILES = ("activations.parquet", "maxima.parquet", "separating.json")
MAX_FIELD = 2**24


@dataclass(frozen=True)
class Row:
    """One text with the group it is of."""

    text: str
    label: str


@dataclass(frozen=True)
class Separating:
    """A feature that tells two groups of texts apart."""

    latent: int
    effect_size: float
    """Cohen's d of the texts' maxima on the training share: positive where the second group has more."""
    auc: float
    """Area under the ROC curve on held-out texts, of the second group against the first."""
    means: tuple[float, float]
    """Mean maximum in each group, all texts."""
    active: tuple[float, float]
    """Share of each group's texts on which it is active at all."""


def rows_of(path: Path, text_column: str, label_column: str) -> Iterator[Row]:
    """Yield the rows of a file. Raises BadFile naming the row and the column."""
    readers: Mapping[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    read = readers.get(path.suffix.lower())
    if read is None:
        raise BadFile(f"{path.name} ends in none of {', '.join(FORMATS)}; give one of these.")
    if not path.is_file():
        raise BadFile(f"There is no file {path}.")
    for number, found in enumerate(read(path)):
        for column in (text_column, *([label_column] if label_column else [])):
            if column not in found:
                known = ", ".join(map(str, found))[:300]
                raise BadFile(f"Row {number} of {path.name} has no column {column!r}; it has {known or 'none'}.")
        text = found[text_column]
        if not isinstance(text, str):
            raise BadFile(f"Row {number} of {path.name}: {text_column!r} is {type(text).__name__}, not a text.")
        yield Row(text, str(found[label_column]) if label_column else "")


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number in itertools.count():
            try:
                line = lines.readline(MAX_FIELD)
                if not line:
                    return
                found = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                raise BadFile(f"Line {number + 1} of {path.name} is no JSON: {str(error)[:200]}.") from None
            if found is None:
                continue
            if not isinstance(found, dict):
                raise BadFile(f"Line {number + 1} of {path.name} is no JSON object.")
            yield cast(dict[str, Any], found)


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(min(MAX_FIELD, sys.maxsize))
    with path.open(encoding="utf-8-sig", newline="") as lines:
        try:
            for found in csv.DictReader(lines):
                yield {name: value for name, value in found.items() if name is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise BadFile(f"{path.name} cannot be read as CSV: {error}.") from None


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise BadFile(f"{path.name} cannot be read as parquet: {str(error).splitlines()[0]}.") from None


def queue(session: Session, settings: Settings, spec: BulkSpec) -> Job:
    """Queue a bulk job, after looking at the file's first row. The caller commits."""
    catalog.source_card(session, spec.model, spec.source)
    if importlib.util.find_spec("pyarrow") is None:
        raise BadInput("Activations are written as parquet, which needs a package: pip install 'sae-atlas[data]'.")
    path = Path(spec.path)
    first = next(rows_of(path, spec.text_column, spec.label_column), None)
    if first is None:
        raise BadFile(f"{path.name} holds no row.")
    title = f"Encode {path.name} with {spec.model}/{spec.source}"
    return jobs.submit(session, settings, "bulk", title, spec.model_dump())


@dataclass(frozen=True)
class Outcome:
    """What a finished bulk job left."""

    job: Job
    groups: tuple[tuple[str, int], ...]
    """The two groups with their numbers of texts; none where no groups were compared."""
    separating: tuple[Separating, ...]
    files: Mapping[str, Path]


def outcome(session: Session, settings: Settings, job_id: int) -> Outcome:
    """Return what a finished bulk job left. Raises NotFound."""
    job = jobs.get(session, job_id)
    if job.kind != "bulk" or job.state != JobState.DONE:
        raise NotFound(f"Job {job_id} is no finished bulk job; its page says how it is.")
    directory = settings.job_dir(job_id)
    files = {name: directory / name for name in RESULT_FILES if (directory / name).is_file()}
    if "separating.json" not in files:
        return Outcome(job, (), (), files)
    found = json.loads(files["separating.json"].read_text())
    groups = tuple((str(name), int(n)) for name, n in found["groups"])
    return Outcome(job, groups, tuple(_separating(feature) for feature in found["features"]), files)


def _separating(found: dict[str, Any]) -> Separating:
    return Separating(
        latent=found["latent"],
        effect_size=found["effect_size"],
        auc=found["auc"],
        means=(found["means"][0], found["means"][1]),
        active=(found["active"][0], found["active"][1]),
    )
