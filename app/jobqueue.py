"""The job queue's own database, which dbos keeps: where it is, how its tables are made. Runs no jobs."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.engine import make_url

from app import db
from app.errors import AtlasError
from app.settings import Settings

SCHEMA = "dbos"
"""Of its tables on Postgres."""


def dbos_url(settings: Settings) -> str:
    """Return the URL as dbos wants it: it picks the Postgres driver itself."""
    url = make_url(settings.queue_url)
    return url.set(drivername=url.get_backend_name()).render_as_string(hide_password=False)


def connect(settings: Settings) -> Engine:
    return create_engine(settings.queue_url)


def shares_catalog(settings: Settings) -> bool:
    """Tell whether catalog and queue lie in one database, so that one transaction has both."""
    return settings.queue_url == settings.catalog_url


def exists(settings: Settings) -> bool:
    """Tell whether there is a database to connect to; a SQLite file would be made by looking."""
    url = make_url(settings.queue_url)
    return url.get_backend_name() != "sqlite" or Path(url.database or "").is_file()


def schema(connection: Connection) -> str | None:
    return SCHEMA if connection.dialect.name == "postgresql" else None


def prepare(settings: Settings) -> None:
    """Make the queue's tables as dbos would at a trainer's start. Doing it again changes nothing."""
    prepare_file(settings.queue_url)
    from dbos import DBOS  # a second to import: only here

    try:
        DBOS.migrate(dbos_url(settings), schema=SCHEMA)
    except Exception as error:
        raise AtlasError(f"The job queue's tables cannot be made: {str(error).splitlines()[0]}.") from error


def prepare_file(url: str) -> None:
    """Make the queue's SQLite file private and WAL before dbos opens it: 200 jobs take 5 s then, not 16 s."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return
    path = Path(parsed.database)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.chmod(0o600)
    connection = sqlite3.connect(path, timeout=30)
    db.enter_wal(connection.cursor())
    connection.close()
