"""A feature table as a file: CSV that a spreadsheet may open, and JSON. Takes rows, yields lines, knows no database."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import orjson

from app.catalog import FeatureRow, SourceCard

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_FIELDS = {"label": "label", "density": "density", "max": "max_act", "token": "top_token", "logit": "top_logit"}


def csv_lines(source: SourceCard, rows: Iterable[FeatureRow], columns: Collection[str]) -> Iterator[bytes]:
    """Yield a CSV file in pieces. Texts that a spreadsheet would compute begin with an apostrophe."""
    names = ["model", "source", "index", *(_FIELDS[column] for column in columns)]
    yield _csv_line(names)
    for row in rows:
        entry = _entry(source, row, columns)
        yield _csv_line([_cell(entry[name]) for name in names])


def json_lines(source: SourceCard, rows: Iterable[FeatureRow], columns: Collection[str]) -> Iterator[bytes]:
    """Yield one JSON array of objects in pieces."""
    before = b"[\n"
    for row in rows:
        yield before + _json(_entry(source, row, columns))
        before = b",\n"
    yield b"\n]\n" if before != b"[\n" else b"[]\n"


def _entry(source: SourceCard, row: FeatureRow, columns: Collection[str]) -> dict[str, Any]:
    chosen = {_FIELDS[column]: getattr(row, _FIELDS[column]) for column in columns}
    return {"model": source.model_id, "source": source.name, "index": row.index, **chosen}


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.encode("utf-8", "replace").decode()
    # Spreadsheets skip blanks in front of a formula.
    return f"'{value}" if value.lstrip(" ").startswith(_FORMULA) else value


def _csv_line(cells: Collection[Any]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerow(cells)
    return out.getvalue().encode()


def _json(entry: dict[str, Any]) -> bytes:
    clean = {k: v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for k, v in entry.items()}
    return orjson.dumps(clean)
