"""Evidence in and out of the catalog, by format.

    rows          one feature and its examples as rows under Neuronpedia's column names, judged; both directions
    exported      what all exports read
    imported      a place in the catalog for evidence that comes without model, weights or corpus
    neuronpedia   export directories, read and written
    sae_dashboard batches of JSON, read and written
    tables        parquet tables, written

SAE Atlas' own format, which loses nothing, is app.bundles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from sqlalchemy.orm import Session

from app import bundles
from app.documents import Report
from app.errors import BadFile, BadInput
from app.exchange import neuronpedia, sae_dashboard, tables
from app.exchange.exported import fresh_directory
from app.exchange.imported import Place
from app.settings import Settings
from app.specs import ImportSpec
from app.tables import Source


class Format(StrEnum):
    BUNDLE = "bundle"
    PARQUET = "parquet"
    NEURONPEDIA = "neuronpedia"
    SAE_DASHBOARD = "sae-dashboard"


def export(
    session: Session, settings: Settings, model_id: str, name: str, out: Path, form: Format, report: Report
) -> None:
    """Write a source with its evidence into a new directory. Raises NotFound without evidence."""
    with fresh_directory(out) as scratch:
        for _ in files(session, settings, model_id, name, scratch, form, report):
            pass


def files(
    session: Session, settings: Settings, model_id: str, name: str, out: Path, form: Format, report: Report
) -> Iterator[Path]:
    """Write a source with its evidence into a directory, and yield each file once it is whole.

    What cannot be exported is refused here, before the first one.
    """
    match form:
        case Format.BUNDLE:
            return bundles.write(session, settings, model_id, name, out, report)
        case Format.PARQUET:
            return tables.write(session, settings, model_id, name, out, report)
        case Format.NEURONPEDIA:
            return neuronpedia.write(session, settings, model_id, name, out, report)
        case Format.SAE_DASHBOARD:
            return sae_dashboard.write(session, settings, model_id, name, out, report)


def title_of(spec: ImportSpec) -> str:
    return f"Import {spec.uploaded_as or Path(spec.path).name}"


def found_in(path: Path) -> Path:
    """Return what can be imported in a directory: itself, or the only thing it holds.

    Raises BadFile where it is none of the formats.
    """
    for _ in range(4):
        if is_known(path):
            return path
        inside = [entry for entry in path.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
        if len(inside) != 1 or not inside[0].is_dir():
            break
        path = inside[0]
    raise BadFile(
        f"This is no bundle ({bundles.MANIFEST}), no Neuronpedia export (features/batch-N.jsonl.gz, ...) and no "
        "directory of sae_dashboard's batches (batch-N.json)."
    )


def is_known(path: Path) -> bool:
    return bool(
        (path / bundles.MANIFEST).is_file()
        or sae_dashboard.batches(path)
        or (path.is_dir() and neuronpedia.sources(path))
    )


def import_(
    session: Session, settings: Settings, path: Path, report: Report, model_id: str = "", set_name: str = ""
) -> list[Source]:
    """Read whatever lies at a path, told by its files. Raises BadFile when they are none of the formats."""

    def rename(place: Place) -> Place:
        return replace(place, model_id=model_id or place.model_id, set_name=set_name or place.set_name)

    if (path / bundles.MANIFEST).is_file():
        if model_id or set_name:
            raise BadInput("A bundle says itself where it belongs; --model and --set are for other formats.")
        return [bundles.import_bundle(session, settings, path, report)]
    if sae_dashboard.batches(path):
        return sae_dashboard.import_(session, settings, path, report, rename)
    if path.is_dir() and neuronpedia.sources(path):
        return neuronpedia.import_(session, settings, path, report, rename)
    raise BadFile(
        f"{path} is no bundle ({bundles.MANIFEST}), no Neuronpedia export (features/batch-N.jsonl.gz, ...) and no "
        "directory of sae_dashboard's batches (batch-N.json)."
    )
