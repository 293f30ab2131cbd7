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
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

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
    return sessionmaker(engine, expire_on_commit=False)


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to a revision. Processes that start at once wait for the one that migrates."""
    with _one_at_a_time(engine) as connection:
        config = _config()
        config.attributes["connection"] = connection
        if revision == "base" or revision.startswith("-"):
            command.downgrade(config, revision)
        else:
            command.upgrade(config, revision)


def check_schema(engine: Engine) -> None:
    """Raise SchemaError unless the schema is exactly the code's newest revision."""
    script = ScriptDirectory.from_config(_config())
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
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
        return MigrationContext.configure(connection).get_current_revision() is None


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return config


@contextmanager
def _one_at_a_time(engine: Engine) -> Generator[Any]:
    """Hold the database's own write lock while migrating, for up to a minute of waiting."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            with connection.begin():
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
                yield connection
            return
        _begin_exclusive(connection, deadline=time.monotonic() + 60)
        try:
            yield connection
            connection.exec_driver_sql("COMMIT")
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise


def _begin_exclusive(connection: Any, deadline: float) -> None:
    # pysqlite opens transactions by itself and commits before DDL; in autocommit mode BEGIN and COMMIT are ours.
    connection.connection.dbapi_connection.isolation_level = None
    while True:
        try:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            return
        except OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
