"""Rows for every table of a database, whatever tables there are: what backups, moves and migrations must not lose.

Made from what the database says of itself, so that a table added later is filled and compared without a word here.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Table

from app import rows

N_ROWS = 3
"""The last row of each table is NULL wherever it may be."""
_TEXT = "é☃\u202e {{7*7}} <b>'\";--\n\t"


def fill(connection: Connection, tables: Sequence[Table]) -> None:
    """Add N_ROWS rows to each table; those that point at others point at rows that are there."""
    with rows.loading(connection, tables):
        for table in tables:
            names = [column.name for column in table.columns]
            rows.write(connection, table, names, [_row(table, number) for number in range(N_ROWS)])


def digests(connection: Connection, columns: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """Count and digest of these columns of tables."""
    found = {table.name: table for table in rows.tables(connection)}
    made = {name: rows.digest(connection, found[name], names) for name, names in columns.items()}
    return {name: (digest.rows, digest.hex) for name, digest in made.items()}


def columns(tables: Sequence[Table]) -> dict[str, list[str]]:
    return {table.name: [column.name for column in table.columns] for table in tables}


def _row(table: Table, number: int) -> rows.Row:
    return tuple(_value(column, number) for column in table.columns)


def _value(column: sa.Column[Any], number: int) -> Any:
    if column.nullable and not column.primary_key and number == N_ROWS - 1:
        return None
    target = next(iter(column.foreign_keys), None)
    if target is not None:
        return _value(target.column, number)
    match column.type:
        case sa.JSON():
            return f'{{"b": 1.10, "a": [null, "é"], "n": {number}}}'
        case sa.LargeBinary():
            return bytes(range(256)) * (number + 1)
        case sa.Boolean():
            return number % 2
        case sa.DateTime():
            moment = datetime(2025, 11, 25, 15, 30, 1, 234567, tzinfo=UTC) + timedelta(hours=number)
            return moment.isoformat(timespec="microseconds")
        case sa.Numeric() | sa.Float():
            return (0.1 + number) * 1e-7
        case sa.Integer():
            return number + 1
        case sa.String() if column.name == "attributes":  # dbos keeps JSON there, as text on SQLite
            return '{"b": 1,   "a": 2}'
        case sa.String(length=length):
            return f"{number} {column.name} {_TEXT}"[: length or None]
    raise AssertionError(f"no value for {column}")
