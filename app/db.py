"""Engine, sessions and migrations of the catalog, on SQLite and Postgres alike."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from app import visibility
from app.errors import AtlasError
from app.settings import Settings

MIGRATIONS = Path(__file__).resolve().parent.parent / "migrations"
_MIGRATION_LOCK = 7_216_340
_PRAGMAS = ("synchronous=NORMAL", "foreign_keys=ON", "cache_size=-65536", "mmap_size=1073741824")


class SchemaError(AtlasError):
    """The database's schema and the code do not fit; the message names the command to run."""


def connect(settings: Settings) -> Engine:
    """Return an engine for the catalog. SQLite runs in WAL mode with foreign keys on and waits 10 s for a lock."""
    url = settings.catalog_url
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    engine = create_engine(url, connect_args={"timeout": 10, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:  # pyright: ignore[reportUnusedFunction]
        cursor = connection.cursor()
        enter_wal(cursor)
        for pragma in _PRAGMAS:
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    return engine


def enter_wal(cursor: sqlite3.Cursor) -> None:
    """Switch to WAL. Of processes that do so at once SQLite refuses all but one, without waiting for its timeout."""
    deadline = time.monotonic() + 10
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def sessions(engine: Engine) -> sessionmaker[Session]:
    """Return what opens sessions; what each reads is narrowed to what its reader may see."""
    made = sessionmaker(engine, expire_on_commit=False)
    event.listen(made, "do_orm_execute", visibility.narrow)
    return made


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to a revision. Processes that start at once wait for the one that migrates."""
    # SQLite changes a table by making it anew and dropping the old one, which others point at meanwhile.
    with writing(engine, foreign_keys=False) as connection:
        migrate_on(connection, revision)


def migrate_on(connection: Connection, revision: str = "head") -> None:
    """Bring the schema to a revision, up or down, inside the connection's transaction."""
    config = _config()
    config.attributes["connection"] = connection
    if _is_below(revision, revision_of(connection)):
        command.downgrade(config, revision)
    else:
        command.upgrade(config, revision)


def revision_of(connection: Connection) -> str | None:
    """Return the schema's revision, None for a database without one."""
    return MigrationContext.configure(connection).get_current_revision()


def revisions() -> list[str]:
    """Return the revisions that this code knows, first to newest."""
    return [revision.revision for revision in ScriptDirectory.from_config(_config()).walk_revisions()][::-1]


def _is_below(revision: str, current: str | None) -> bool:
    if revision == "base" or revision.startswith("-"):
        return True
    known = revisions()
    return current in known and revision in known and known.index(revision) < known.index(current)


def check_schema(engine: Engine) -> None:
    """Raise SchemaError unless the schema is exactly the code's newest revision."""
    script = ScriptDirectory.from_config(_config())
    with engine.connect() as connection:
        current = revision_of(connection)
    newest = script.get_current_head()
    if current == newest:
        return
    known = {revision.revision for revision in script.walk_revisions()}
    if current is not None and current not in known:
        raise SchemaError(
            f"The database is at schema {current}, newer than this code ({newest}). Install the newer SAE Atlas again."
        )
    raise SchemaError(f"The database is at schema {current}, this code needs {newest}. Run `sae-atlas migrate`.")


def is_empty(engine: Engine) -> bool:
    """Tell whether nothing was ever migrated here: a first start, when making the schema surprises nobody."""
    with engine.connect() as connection:
        return revision_of(connection) is None


def is_current(engine: Engine) -> bool:
    """Tell whether the schema is the code's."""
    with engine.connect() as connection:
        return revision_of(connection) == revisions()[-1]


def settle(path: Path) -> None:
    """Write what a SQLite file's log holds into the file, which is then all there is of it."""
    connection = sqlite3.connect(path, timeout=30)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


@contextmanager
def writing(engine: Engine, *, foreign_keys: bool = True) -> Generator[Connection]:
    """Hold the database's own write lock in one transaction, for up to a minute of waiting.

    `foreign_keys` off leaves them unchecked on SQLite, where a table that others point at can be filled before them.
    """
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            with connection.begin():
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
                yield connection
            return
        if not foreign_keys:
            connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        try:
            with by_hand(connection):
                _begin_exclusive(connection, deadline=time.monotonic() + 60)
                try:
                    yield connection
                    connection.exec_driver_sql("COMMIT")
                except BaseException:
                    connection.exec_driver_sql("ROLLBACK")
                    raise
        finally:
            if not foreign_keys:  # the connection goes back to the pool
                connection.rollback()
                connection.exec_driver_sql("PRAGMA foreign_keys=ON")


@contextmanager
def by_hand(connection: Connection) -> Generator[None]:
    """Leave BEGIN and COMMIT to the caller: pysqlite begins by itself, never for a read, and commits before DDL."""
    driver: Any = connection.connection.dbapi_connection
    before, driver.isolation_level = driver.isolation_level, None
    try:
        yield
    finally:
        driver.isolation_level = before


def _begin_exclusive(connection: Any, deadline: float) -> None:
    while True:
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            return
        except OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
