"""`sae-atlas migrate-db`: a SQLite catalog on a real Postgres, every table of it, or nothing at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from app import db, jobqueue, jobs, relocation, rows, supervisor
from app.errors import AtlasError, BadInput, Conflict, Unavailable
from app.settings import Settings
from app.tables import Beat, Job, Table, now
from tests import every_table


@pytest.fixture
def url(postgres_server: str) -> str:
    engine = db.connect(Settings(database_url=postgres_server.replace("postgresql://", "postgresql+psycopg://")))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public; DROP SCHEMA IF EXISTS dbos CASCADE"))
    engine.dispose()
    return postgres_server


@pytest.fixture
def target(url: str) -> Iterator[Engine]:
    engine = db.connect(Settings(database_url=url.replace("postgresql://", "postgresql+psycopg://")))
    yield engine
    engine.dispose()


@pytest.fixture
def full(settings: Settings) -> Settings:
    """A SQLite catalog and queue with rows in every table they have."""
    engine = db.connect(settings)
    db.migrate(engine)
    with db.writing(engine, foreign_keys=False) as connection:
        every_table.fill(connection, rows.tables(connection))
    engine.dispose()
    jobqueue.prepare(settings)
    engine = jobqueue.connect(settings)
    with db.writing(engine, foreign_keys=False) as connection:
        every_table.fill(connection, rows.tables(connection))
    engine.dispose()
    return settings


def silent(_share: float, _status: str) -> None:
    """Nobody watches the progress."""


def test_the_tables_that_are_moved_are_those_of_the_code_and_none_is_empty(full: Settings) -> None:
    engine = db.connect(full)
    with engine.connect() as connection:
        counts = {table.name: rows.count(connection, table) for table in rows.tables(connection)}
    engine.dispose()
    assert counts == {table.name: every_table.N_ROWS for table in Table.metadata.sorted_tables}


def test_every_row_of_every_table_arrives_and_ids_go_on(full: Settings, url: str, target: Engine) -> None:
    copied = relocation.relocate(full, url, silent)
    assert {one.table for one in copied} >= set(Table.metadata.tables) | {
        "dbos.workflow_status",
        "dbos.operation_outputs",
    }
    assert {one.rows for one in copied} == {every_table.N_ROWS}
    assert all(one.digest == one.copied for one in copied)
    source = db.connect(full)
    with source.connect() as before, target.connect() as after:
        names = every_table.columns(rows.tables(before))
        assert every_table.digests(after, names) == every_table.digests(before, names)
    source.dispose()
    db.check_schema(target)
    with db.sessions(target).begin() as session:
        job = jobs.submit(session, full, "toy", "the next", {})
        assert job.id == every_table.N_ROWS + 1


def test_the_command_prints_counts_and_digests(full: Settings, url: str) -> None:
    environment = os.environ | {"SAE_ATLAS_DATA_DIR": str(full.data_dir)}
    command = [sys.executable, "-m", "app.cli", "migrate-db", url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line = next(line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["features"])
    assert line[1] == str(every_table.N_ROWS)
    assert line[2] == line[3]
    assert "every table is the same on both sides" in done.stdout


def test_a_row_that_postgres_cannot_hold_leaves_it_as_it_was(full: Settings, url: str, target: Engine) -> None:
    engine = db.connect(full)
    with db.sessions(engine).begin() as session:
        session.add(Job(kind="toy", title="t" * 201, spec={}, result={}, workflow_id=""))
    engine.dispose()
    with pytest.raises(AtlasError, match=r"A row of jobs cannot be stored here: value too long"):
        relocation.relocate(full, url, silent)
    with target.connect() as connection:
        assert rows.tables(connection) == []


def test_a_target_that_holds_rows_is_refused(full: Settings, url: str, target: Engine) -> None:
    db.migrate(target)
    with db.sessions(target).begin() as session:
        session.add(Job(kind="toy", title="t", spec={}, result={}, workflow_id=""))
    with pytest.raises(Conflict, match="is not empty: jobs hold rows"):
        relocation.relocate(full, url, silent)


def test_an_interrupted_move_can_be_made_again(full: Settings, url: str, target: Engine) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(share: float, _status: str) -> None:
        if share > 0.5:
            raise Interrupted

    with pytest.raises(Interrupted):
        relocation.relocate(full, url, interrupt)
    with target.connect() as connection:
        assert rows.tables(connection) == []
    assert relocation.relocate(full, url, silent)


def test_nothing_is_moved_while_something_writes(full: Settings, url: str) -> None:
    with supervisor.hold(full), pytest.raises(Conflict, match="runs already"):
        relocation.relocate(full, url, silent)
    engine = db.connect(full)
    with db.sessions(engine).begin() as session:
        session.add(Beat(executor="here-0", host="here", pid=1, at=now(), job_id=None))
    engine.dispose()
    with pytest.raises(Conflict, match="A trainer works on this catalog"):
        relocation.relocate(full, url, silent)


def test_what_is_no_postgres_is_refused(full: Settings, tmp_path: Path) -> None:
    for url in ("nonsense", f"sqlite:///{tmp_path}/x.sqlite", "mysql://h/x"):
        with pytest.raises(BadInput, match="postgresql://user@host/name"):
            relocation.relocate(full, url, silent)
    with pytest.raises(Unavailable, match="cannot be reached") as refused:
        relocation.relocate(full, "postgresql://atlas:secret-word@127.0.0.1:1/atlas", silent)
    assert "secret-word" not in refused.value.message


def test_a_catalog_that_is_on_postgres_already_stays(url: str, target: Engine, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, database_url=url.replace("postgresql://", "postgresql+psycopg://"))
    with pytest.raises(BadInput, match="only SQLite catalogs are moved"):
        relocation.relocate(settings, url, silent)
