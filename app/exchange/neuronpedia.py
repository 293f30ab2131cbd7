"""Neuronpedia's export directories: JSON lines under the names of Neuronpedia's columns, read and written.

    {model}/{source}/{release,model,sourceset,source}.jsonl
    {model}/{source}/{features,activations,explanations}/batch-N.jsonl.gz

A download of any part will do: pages show what there is. Feature batches are in the text order of the index.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.documents import Report, json_rows, numbered_lines, unpacked
from app.errors import BadFile, BadInput
from app.exchange.exported import Exported
from app.exchange.imported import Intake, Place, catalogue, check_place, intake
from app.exchange.rows import (
    ActivationRow,
    ExplanationRow,
    FeatureRow,
    dense,
    examples_of,
    judged,
)
from app.hub import NEURONPEDIA_ID
from app.settings import Settings
from app.tables import Source

KINDS = ("features", "activations", "explanations")
ABOUT = ("release", "model", "sourceset", "source")
BATCH = 1_024


def write(session: Session, settings: Settings, model_id: str, name: str, out: Path, report: Report) -> Iterator[Path]:
    """Write a source's evidence as Neuronpedia exports it, under out/{model}/{source}, and yield its files."""
    return _written(Exported.open(session, settings, model_id, name), out, report)


def _written(found: Exported, out: Path, report: Report) -> Iterator[Path]:
    home = out / found.card.id / found.source.name
    for kind in KINDS:
        (home / kind).mkdir(parents=True)
    for kind, row in _about(found).items():
        (home / f"{kind}.jsonl").write_text(_line(row))
        yield home / f"{kind}.jsonl"
    yield from _write_features(found, home, report)
    path = home / "explanations" / "batch-0.jsonl.gz"
    with gzip.open(path, "wt", 6, encoding="utf-8") as lines:
        lines.writelines(_line(row) for row in found.explanations())
    yield path


def sources(path: Path) -> list[Path]:
    """The source directories of an export: the directory itself, or those two levels below."""
    if any((path / kind).is_dir() for kind in KINDS):
        return [path]
    return sorted(p for p in path.glob("*/*") if any((p / kind).is_dir() for kind in KINDS))


def import_(
    session: Session, settings: Settings, path: Path, report: Report, rename: Callable[[Place], Place]
) -> list[Source]:
    """Read every source of an export directory. Raises BadFile naming file, line and field of what is wrong."""
    found = sources(path)
    if not found:
        raise BadFile(f"{path} holds no {'/, '.join(KINDS)}/ with batch-N.jsonl.gz, as Neuronpedia's exports do.")
    return [_import_source(session, settings, home, report, rename) for home in found]


def _import_source(
    session: Session, settings: Settings, home: Path, report: Report, rename: Callable[[Place], Place]
) -> Source:
    place = rename(_place(home))
    check_place(session, place)
    with intake(settings) as rows:
        files = [(kind, file) for kind in KINDS for file in _batches(home / kind)]
        for number, (kind, file) in enumerate(files):
            report(0.5 * number / len(files), f"Reading {kind}/{file.name}")
            for line, row in _rows(file):
                _take(rows, kind, row, f"{kind}/{file.name}, line {line}", settings)
        return catalogue(session, settings, place, rows, report)


def _take(rows: Intake, kind: str, row: dict[str, Any], where: str, settings: Settings) -> None:
    index = row.get("index")
    if isinstance(index, str) and index.isascii() and index.isdigit() and len(index) < 10:
        index = row["index"] = int(index)
    if not isinstance(index, int) or not 0 <= index < settings.max_d_sae:
        raise BadFile(
            f"{where}: index {str(index)[:40]!r} is no feature; SAE_ATLAS_MAX_D_SAE is {settings.max_d_sae:,}."
        )
    if kind == "features":
        rows.add_feature(judged(FeatureRow, row, where), where)
    elif kind == "activations":
        rows.add_example(index, judged(ActivationRow, row, where), where)
    else:
        rows.add_explanation(judged(ExplanationRow, row, where))


def _place(home: Path) -> Place:
    """Say which source a directory is of: its own files know, else its first row, else its name."""
    about = {kind: _first(home / f"{kind}.jsonl") for kind in ABOUT}
    model, source = about["model"], about["source"]
    first = next((row for kind in KINDS for file in _batches(home / kind)[:1] for _, row in _rows(file)), {})
    model_id = _text(source.get("modelId") or model.get("id") or first.get("modelId") or home.parent.name)
    name = _text(source.get("id") or first.get("layer") or home.name)
    match = NEURONPEDIA_ID.fullmatch(f"{model_id}/{name}")
    if not match:
        raise BadInput(f"{model_id}/{name} is no source such as gpt2-small/8-res-jb; is {home} a source's directory?")
    prompts, length = _count(source.get("num_prompts")), _count(source.get("num_tokens_in_prompt"))
    return Place(
        model_id=model_id,
        layer=int(match[1]),
        set_name=match[2],
        n_layers=min(_count(model.get("layers")), 1_000),
        model_name=_text(model.get("displayName")),
        hook_name=_text(source.get("hookName") or first.get("hookName")),
        dataset=_text(source.get("dataset")),
        tokens_seen=prompts * length if prompts * length < 2**62 else 0,
        n_features=_count(source.get("d_sae")),
        origin={"imported_from": "a Neuronpedia export", "neuronpedia_id": f"{model_id}/{name}"},
    )


def _about(found: Exported) -> dict[str, dict[str, Any]]:
    card, source = found.card, found.source
    return {
        "release": {"name": source.set_name, "description": "Exported by SAE Atlas", "creatorName": "local"},
        "model": {
            "id": card.id,
            "displayName": card.name,
            "displayNameShort": card.name,
            "layers": card.n_layers,
            "neuronsPerLayer": card.d_mlp,
            "owner": card.origin,
        },
        "sourceset": {"modelId": card.id, "name": source.set_name, "type": source.architecture},
        "source": {
            "id": source.name,
            "modelId": card.id,
            "setName": source.set_name,
            "dataset": found.harvest.corpus,
            "hookName": source.hook_name,
            "d_sae": source.d_sae,
        },
    }


def _write_features(found: Exported, home: Path, report: Report) -> Iterator[Path]:
    batch: list[tuple[str, list[str]]] = []
    number = 0
    for place, (index, evidence, effects) in enumerate(found.features()):
        row = {"modelId": found.card.id, "layer": found.source.name} | found.feature_row(evidence, index)
        row |= {"sourceSetName": found.source.set_name, "hookName": found.source.hook_name}
        examples = [
            _line(_activation(found, index, n, example, bounds) | found.effect_of(example, bounds, effects))
            for n, (example, bounds) in enumerate(examples_of(evidence))
        ]
        batch.append((_line(row), examples))
        if len(batch) == BATCH:
            yield from _write_batch(home, number, batch)
            batch, number = [], number + 1
        report(place / max(found.source.d_sae, 1), f"Writing feature {index:,} of {found.source.d_sae:,}")
    if batch:
        yield from _write_batch(home, number, batch)


def _write_batch(home: Path, number: int, batch: list[tuple[str, list[str]]]) -> Iterator[Path]:
    paths = [home / kind / f"batch-{number}.jsonl.gz" for kind in ("features", "activations")]
    with (
        gzip.open(paths[0], "wt", 6, encoding="utf-8") as features,
        gzip.open(paths[1], "wt", 6, encoding="utf-8") as activations,
    ):
        for line, examples in batch:
            features.write(line)
            activations.writelines(examples)
    yield from paths


def _activation(
    found: Exported, index: int, number: int, example: Any, bounds: tuple[float, float, float]
) -> dict[str, Any]:
    tokens = found.tokens(example)
    values = dense(example, len(tokens), found.skipped)
    peak = example.peak - found.skipped
    return {
        "id": f"{found.harvest.id}-{index}-{number}",
        "modelId": found.card.id,
        "layer": found.source.name,
        "index": str(index),
        "dataIndex": str(example.context),
        "dataSource": found.harvest.corpus,
        "dataTitle": found.title(example),
        "tokens": tokens,
        "values": values,
        "maxValue": example.max,
        "maxValueTokenIndex": peak,
        "minValue": min(values),
        "binMin": bounds[0],
        "binMax": bounds[1],
        "binContains": bounds[2],
        "qualifyingTokenIndex": peak,
        "createdAt": found.harvest.created_at,
    }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"


def _batches(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if p.is_file() and p.name.endswith((".jsonl", ".jsonl.gz"))]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with unpacked(file) as opened:
        yield from json_rows(numbered_lines(opened, file.name), file.name, "a JSON object")


def _first(file: Path) -> dict[str, Any]:
    for suffix in ("", ".gz"):
        there = file.with_name(file.name + suffix)
        if there.is_file():
            return next((row for _, row in _rows(there)), {})
    return {}


def _text(value: Any) -> str:
    return value.replace("\0", "")[:200] if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 < value < 2**40 else 0
