"""Moving a catalog from SQLite to Postgres: every table, and the job queue, in one transaction, compared afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Table, make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from app import db, jobqueue, jobs, rows, supervisor
from app.errors import AtlasError, BadInput, Conflict, NotFound, Unavailable
from app.settings import Settings

Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Copied:
    """One table: its rows, and their digest on both sides."""

    table: str
    rows: int
    digest: str
    copied: str


def relocate(settings: Settings, url: str, report: Report) -> list[Copied]:
    """Copy the SQLite catalog and its queue to an empty Postgres. Nothing is left there unless all of it arrived.

    Raises Conflict while something serves or works on the catalog, since what it wrote meanwhile would be lost, and
    when the target holds rows; BadInput for a target that is no Postgres.
    """
    target = _target(settings, url)
    with supervisor.hold(settings):
        source_engine = db.connect(settings)
        db.check_schema(source_engine)
        with db.sessions(source_engine)() as session:
            if jobs.trainers(session, settings):
                raise Conflict("A trainer works on this catalog. Stop it: what it writes meanwhile would be lost.")
        _check_empty(target)
        jobqueue.prepare(target)
        try:
            with rows.snapshot(source_engine) as source:
                return _copy_all(settings, target, source, report)
        finally:
            source_engine.dispose()


def shown(url: str) -> str:
    """Return a URL without its password."""
    return make_url(url).render_as_string()


def _target(settings: Settings, url: str) -> Settings:
    if not settings.catalog_url.startswith("sqlite"):
        raise BadInput(f"The catalog is at {shown(settings.catalog_url)}; only SQLite catalogs are moved.")
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise BadInput(f"{url[:80]!r} is no database URL; write postgresql://user@host/name.") from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise BadInput(f"{shown(url)[:80]!r} is no Postgres; write postgresql://user@host/name.")
    full = parsed.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
    return settings.changed(database_url=full, jobs_database_url="")


def _check_empty(target: Settings) -> None:
    engine = db.connect(target)
    try:
        with engine.connect() as connection:
            found = [*rows.tables(connection), *rows.tables(connection, jobqueue.SCHEMA)]
            filled = [table.fullname for table in found if rows.has_rows(connection, [table])]
    except OperationalError as error:
        reason = str(error.orig).strip().splitlines()[0]
        raise Unavailable(f"{engine.url.render_as_string()} cannot be reached: {reason}") from None
    finally:
        engine.dispose()
    if filled:
        raise Conflict(
            f"{engine.url.render_as_string()} is not empty: {', '.join(filled[:5])} hold rows. Give an empty database."
        )


def _copy_all(settings: Settings, target: Settings, source: Connection, report: Report) -> list[Copied]:
    engine = db.connect(target)
    try:
        with db.writing(engine) as connection:
            db.migrate_on(connection)
            copied = _copy(source, None, connection, None, lambda s, t: report(s * 0.9, t))
            if jobqueue.exists(settings):
                queue_engine = jobqueue.connect(settings)
                with rows.snapshot(queue_engine) as queue:
                    copied += _copy(queue, None, connection, jobqueue.SCHEMA, lambda s, t: report(0.9 + s * 0.1, t))
                queue_engine.dispose()
            return copied
    finally:
        engine.dispose()


def _copy(
    source: Connection, source_schema: str | None, target: Connection, target_schema: str | None, report: Report
) -> list[Copied]:
    found = rows.tables(source, source_schema)
    into = {table.name: table for table in rows.tables(target, target_schema)}
    total = max(sum(rows.count(source, table) for table in found), 1)
    _empty_defaults(target, list(into.values()))
    copied: list[Copied] = []
    done = 0
    with rows.loading(target, list(into.values())):
        for table in found:
            if table.name not in into:
                raise NotFound(f"The target has no table {table.name}: the versions differ.")
            read = rows.copy(
                source,
                table,
                target,
                into[table.name],
                lambda n, t=table.name, d=done: report((d + n) / total, f"Copying {t}: {n:,} rows"),
            )
            done += read.rows
            copied.append(_compared(table, read, target, into[table.name]))
    return copied


def _empty_defaults(target: Connection, found: Sequence[Table]) -> None:
    """Rows that migrations put into fresh tables are in the source too."""
    for table in found:
        target.execute(table.delete())


def _compared(table: Table, read: rows.Digest, target: Connection, into: Table) -> Copied:
    """Read back what was written. Raises AtlasError, which undoes the whole copy, when it differs."""
    there = rows.digest(target, into, [column.name for column in table.columns])
    if (there.rows, there.hex) != (read.rows, read.hex):
        raise AtlasError(
            f"Table {table.name} has {read.rows:,} rows in SQLite and {there.rows:,} in Postgres, digests "
            f"{read.hex[:16]} and {there.hex[:16]}: they differ. Nothing was changed."
        )
    return Copied(into.fullname, read.rows, read.hex, there.hex)
