"""Rows of whole databases: read from one snapshot, written in one transaction, counted and hashed.

Knows no table by name: what is there is found by reflection, so tables of later versions are carried too. A value has
one form on every database (times in UTC, JSON as its text, truths as 0 and 1), and so has a row's line; the digest of a
table is the sum of its lines' sha256, which does not depend on the order that a database likes best.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, Table
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError
from sqlalchemy.schema import AddConstraint, DropConstraint

from app import db
from app.errors import AtlasError, BadFile

NOT_CARRIED = frozenset({"alembic_version", "dbos_migrations"})
"""Tables that say which schema is there; whoever writes rows makes that schema first."""
BATCH_ROWS, BATCH_BYTES = 500, 2**23
_MODULUS = 2**256

Row = tuple[Any, ...]


@dataclass
class Digest:
    """How many rows were seen, and the sum of their hashes."""

    rows: int = 0
    total: int = 0

    def add(self, line: bytes) -> None:
        self.rows += 1
        self.total = (self.total + int.from_bytes(hashlib.sha256(line).digest(), "big")) % _MODULUS

    def merge(self, other: Digest) -> None:
        self.rows += other.rows
        self.total = (self.total + other.total) % _MODULUS

    @property
    def hex(self) -> str:
        return f"{self.total:064x}"


@contextmanager
def snapshot(engine: Engine) -> Generator[Connection]:
    """A connection that sees the database as it was at one moment, while others go on writing."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            connection.execute(sa.text("SELECT 1"))
            yield connection
            return
        with db.by_hand(connection):
            connection.exec_driver_sql("BEGIN")
            # The first read after BEGIN fixes what is seen.
            connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar()
            try:
                yield connection
            finally:
                connection.exec_driver_sql("ROLLBACK")


def tables(connection: Connection, schema: str | None = None) -> list[Table]:
    """Return the tables of a schema as the database describes them, by name."""
    found = sa.MetaData()
    names = sa.inspect(connection).get_table_names(schema)
    found.reflect(connection, schema, only=[name for name in names if name not in NOT_CARRIED], resolve_fks=True)
    return sorted((t for t in found.tables.values() if t.schema == schema), key=lambda table: table.name)


def every_table(connection: Connection, names: Iterable[str]) -> sa.MetaData:
    """Return those of these tables that are there, with what points at them in order."""
    found = sa.MetaData()
    there = set(sa.inspect(connection).get_table_names())
    found.reflect(connection, only=sorted(there & set(names)), resolve_fks=False)
    return found


def count(connection: Connection, table: Table) -> int:
    return connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0


def has_rows(connection: Connection, found: Iterable[Table]) -> bool:
    return any(connection.execute(sa.select(sa.literal(1)).select_from(table).limit(1)).first() for table in found)


def read(connection: Connection, table: Table) -> Iterator[Row]:
    """Yield a table's rows, a few hundred in memory at a time, each value in its one form."""
    as_text: dict[str, Callable[[Any], Any]] = {kind: _json_text(connection) for kind in ("json", "jsonb")}
    columns = [as_text.get(_kind(c), lambda c: c)(c).label(f"c{i}") for i, c in enumerate(table.columns)]
    forms = [_OUT.get(_kind(c)) for c in table.columns]
    result = connection.execute(sa.select(*columns).select_from(table).execution_options(yield_per=BATCH_ROWS))
    for row in result:
        yield tuple(v if v is None or f is None else f(v) for f, v in zip(forms, row, strict=True))


def line(row: Row) -> bytes:
    """Return a row as the line of JSON that is stored and hashed; bytes as base64."""
    plain = [base64.b64encode(value).decode() if isinstance(value, bytes) else value for value in row]
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()


def parsed(text: bytes, table: Table, names: Sequence[str]) -> Row:
    """Return the row of a line. Raises BadFile for one that does not fit the table's columns."""
    binary = [_kind(table.columns[name]) == "bytes" for name in names]
    try:
        values = json.loads(text)
        if not isinstance(values, list) or len(values) != len(names):
            raise ValueError(f"{len(names)} values expected")
        return tuple(
            base64.b64decode(v, validate=True) if b and v is not None else v
            for b, v in zip(binary, values, strict=True)
        )
    except (ValueError, TypeError, RecursionError) as error:
        raise BadFile(f"A row of {table.name} cannot be read: {str(error)[:200]}.") from None


def write(connection: Connection, table: Table, names: Sequence[str], rows: Iterable[Row]) -> Digest:
    """Insert rows in batches and return what was written. Raises AtlasError naming the table when one is refused."""
    statement = sa.insert(table).values(
        {table.columns[name]: _bound(connection, table.columns[name]) for name in names}
    )
    forms = [_IN.get(_kind(table.columns[name])) for name in names]
    digest = Digest()
    for batch in _batches(rows):
        values: list[dict[str, Any]] = []
        for row in batch:
            digest.add(line(row))
            shaped = [v if v is None or f is None else f(v) for f, v in zip(forms, row, strict=True)]
            values.append({f"v_{name}": value for name, value in zip(names, shaped, strict=True)})
        try:
            connection.execute(statement, values)
        except (DataError, IntegrityError, ProgrammingError) as error:
            reason = str(error.orig or error).splitlines()[0]
            raise AtlasError(
                f"A row of {table.name} cannot be stored here: {reason[:300]}. It is among the rows "
                f"{digest.rows - len(batch) + 1:,} to {digest.rows:,}; nothing was changed."
            ) from None
    return digest


def copy(source: Connection, table: Table, target: Connection, into: Table, seen: Callable[[int], None]) -> Digest:
    """Copy a table's rows as a stream, and return the digest of what was read. `seen` is told how many so far."""
    names = [column.name for column in table.columns]
    check_columns(into, names)
    rewritten = [_kind(into.columns[name]) == "jsonb" for name in names]

    def counted() -> Iterator[Row]:
        for number, row in enumerate(read(source, table)):
            if number % BATCH_ROWS == 0:
                seen(number)
            yield tuple(_one_form(v) if b and v is not None else v for b, v in zip(rewritten, row, strict=True))

    return write(target, into, names, counted())


def digest(connection: Connection, table: Table, names: Sequence[str]) -> Digest:
    """Return the digest of what a table holds, of these columns in this order."""
    order = [list(table.columns.keys()).index(name) for name in names]
    found = Digest()
    for row in read(connection, table):
        found.add(line(tuple(row[i] for i in order)))
    return found


@contextmanager
def loading(connection: Connection, found: Sequence[Table]) -> Generator[None]:
    """Take foreign keys away while rows come in any order; afterwards they hold again, and sequences go on.

    On SQLite the caller has set foreign_keys off, which cannot be done inside a transaction.
    """
    postgres = connection.dialect.name == "postgresql"
    keys = [key for table in found for key in table.foreign_key_constraints] if postgres else []
    for key in keys:
        connection.execute(DropConstraint(key))
    yield
    for key in keys:
        try:
            connection.execute(AddConstraint(key))
        except IntegrityError as error:
            raise BadFile(f"Rows point at rows that are missing: {str(error.orig).splitlines()[0]}.") from None
    if postgres:
        for table in found:
            _set_sequences(connection, table)
        return
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(3)
    if broken:
        raise BadFile(f"Rows point at rows that are missing: {', '.join(f'{b[0]} at {b[2]}' for b in broken)}.")


def check_columns(table: Table, names: Sequence[str]) -> None:
    """Raise BadFile unless a table has all of these columns."""
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise BadFile(f"{table.name} has no column {', '.join(missing)} here: the versions differ.")


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while True:
        batch: list[Row] = []
        size = 0
        for row in islice(iterator, BATCH_ROWS):
            batch.append(row)
            size += sum(len(value) for value in row if isinstance(value, (bytes, str)))
            if size > BATCH_BYTES:
                break
        if not batch:
            return
        yield batch


def _kind(column: sa.Column[Any]) -> str:
    kinds: tuple[tuple[str, type[sa.types.TypeEngine[Any]]], ...] = (
        ("jsonb", JSONB),
        ("json", sa.JSON),
        ("bytes", sa.LargeBinary),
        ("bool", sa.Boolean),
        ("time", sa.DateTime),
        ("float", sa.Numeric),
        ("float", sa.Float),
        ("int", sa.Integer),
        ("text", sa.String),
    )
    for name, kind in kinds:
        if isinstance(column.type, kind):
            return name
    raise AtlasError(f"Column {column.table.name}.{column.name} is of type {column.type}, which is not carried.")


def _json_text(connection: Connection) -> Callable[[Any], Any]:
    """JSON goes as its text, so that no number is rounded, no key moved, and SQL's NULL is not JSON's null."""
    if connection.dialect.name == "postgresql":
        return lambda column: sa.cast(column, sa.Text())
    return lambda column: sa.type_coerce(column, sa.Text())


def _bound(connection: Connection, column: sa.Column[Any]) -> Any:
    name = f"v_{column.name}"
    if _kind(column) not in ("json", "jsonb"):
        return sa.bindparam(name, type_=column.type)
    text = sa.bindparam(name, type_=sa.Text())
    return sa.cast(text, column.type) if connection.dialect.name == "postgresql" else text


def _utc(value: datetime) -> str:
    aware = value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return aware.isoformat(timespec="microseconds")


def _one_form(text: str) -> str:
    """JSONB forgets spaces and the order of keys."""
    return json.dumps(json.loads(text), sort_keys=True)


_OUT: dict[str, Callable[[Any], Any]] = {
    "jsonb": _one_form,
    "time": _utc,
    "bool": int,
    "int": int,
    "float": float,
    "bytes": bytes,
}
_IN: dict[str, Callable[[Any], Any]] = {"time": datetime.fromisoformat, "bool": bool}


def _set_sequences(connection: Connection, table: Table) -> None:
    name = connection.dialect.identifier_preparer.format_table(table)
    for column in table.columns:
        if _kind(column) != "int":
            continue
        sequence = connection.scalar(sa.select(sa.func.pg_get_serial_sequence(name, column.name)))
        if sequence:
            largest = connection.scalar(sa.select(sa.func.max(column)))
            connection.execute(sa.select(sa.func.setval(sequence, largest or 1, largest is not None)))
