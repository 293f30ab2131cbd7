"""Migrations and first starts, on SQLite and on a real Postgres."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, inspect, text

from app import db, rows
from app.db import SchemaError
from app.settings import Settings
from app.tables import Job, Table
from tests import every_table
from tests.conftest import D_SAE, fill

_MODEL = "INSERT INTO models (id, name, hash, card, created_at) VALUES ('m', 'm', '', '{}', '2026-01-01')"
_SOURCE = (
    "INSERT INTO sources (id, model_id, name, layer, set_name, is_default, sae_hash, architecture, hook_name, d_in, "
    "d_sae, config, metrics, origin, created_at) VALUES (1, 'm', '1-s', 1, 's', false, '', 'topk', 'h', 1, 2, '{}', "
    "'{}', '{}', '2026-01-01')"
)


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "sqlite":
        return Settings(data_dir=tmp_path)
    uri: str = request.getfixturevalue("postgres_server")
    return Settings(data_dir=tmp_path, database_url=uri.replace("postgresql://", "postgresql+psycopg://"))


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = db.connect(settings)
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text("DROP SCHEMA public CASCADE"))
            connection.execute(text("CREATE SCHEMA public"))
    yield engine
    engine.dispose()


def test_migrations_build_exactly_the_tables_of_the_code(engine: Engine) -> None:
    db.migrate(engine)
    assert compare_to_code(engine) == []


def test_migrations_go_down_to_nothing_and_up_again(engine: Engine) -> None:
    db.migrate(engine)
    db.migrate(engine, "base")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    db.migrate(engine)
    db.check_schema(engine)


def test_a_filled_catalog_is_migrated_as_a_server_does_it(engine: Engine, settings: Settings) -> None:
    db.migrate(engine)
    with db.sessions(engine).begin() as session:
        fill(session, settings)
    db.migrate(engine, "0016")
    db.migrate(engine)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM features")) == D_SAE
        if engine.dialect.name == "sqlite":
            assert connection.scalar(text("PRAGMA foreign_keys")) == 1
            assert connection.execute(text("PRAGMA foreign_key_check")).all() == []


def test_every_revision_goes_up_down_and_up_again_with_rows_in_every_table(engine: Engine) -> None:
    """What both schemas can hold is the same before and after, in each table, to the digest."""
    known = db.revisions()
    for below, above in itertools.pairwise(known):
        start_at(engine, below)
        with db.writing(engine, foreign_keys=False) as connection:
            tables = rows.tables(connection)
            every_table.fill(connection, tables)
            before = every_table.columns(tables)
        db.migrate(engine, above)
        with engine.connect() as connection:
            after = every_table.columns(rows.tables(connection))
        shared = {t: [c for c in columns if c in after[t]] for t, columns in before.items() if t in after}
        with engine.connect() as connection:
            upped = every_table.digests(connection, shared)
        db.migrate(engine, below)
        with engine.connect() as connection:
            assert db.revision_of(connection) == below
            assert every_table.columns(rows.tables(connection)) == before
            assert every_table.digests(connection, shared) == upped, f"{above} down to {below}"
        db.migrate(engine, above)
        with engine.connect() as connection:
            assert every_table.digests(connection, shared) == upped, f"{below} up to {above}"
        assert {count for count, _ in upped.values()} == {every_table.N_ROWS}


def start_at(engine: Engine, revision: str) -> None:
    db.migrate(engine, "base")
    db.migrate(engine, revision)


def test_the_first_revisions_rows_survive_all_later_ones(engine: Engine) -> None:
    start_at(engine, db.revisions()[0])
    with db.writing(engine, foreign_keys=False) as connection:
        tables = rows.tables(connection)
        every_table.fill(connection, tables)
        first = every_table.columns(tables)
    db.migrate(engine)
    with engine.connect() as connection:
        newest = every_table.columns(rows.tables(connection))
        kept = {table: [c for c in columns if c in newest.get(table, ())] for table, columns in first.items()}
        found = every_table.digests(connection, {table: columns for table, columns in kept.items() if columns})
    assert {count for count, _ in found.values()} == {every_table.N_ROWS}
    assert compare_to_code(engine) == []


def compare_to_code(engine: Engine) -> list[object]:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"render_as_batch": True})
        return list(compare_metadata(context, Table.metadata))


def test_migrating_twice_keeps_what_is_there(engine: Engine) -> None:
    db.migrate(engine)
    with db.sessions(engine).begin() as session:
        session.add(Job(kind="toy", title="t", spec={"a": 1}, result={}, workflow_id=""))
    db.migrate(engine)
    with db.sessions(engine)() as session:
        job = session.query(Job).one()
        assert job.spec == {"a": 1}
        assert job.created_at.tzinfo is not None


def test_words_of_features_move_to_their_own_table_and_back(engine: Engine) -> None:
    before, now = "SELECT latent, tokens, logits FROM features", "SELECT kind, latent, text FROM feature_words"
    db.migrate(engine, "0006")
    with engine.begin() as connection:
        connection.execute(text(_MODEL))
        connection.execute(text(_SOURCE))
        for latent, words in ((0, "'\x1fa\x1f', '\x1fb\x1f'"), (1, "NULL, NULL")):
            connection.execute(text(f"INSERT INTO features VALUES (1, {latent}, 0.5, 2, 'l', 't', 'u', {words})"))
    db.migrate(engine, "0008")
    with engine.connect() as connection:
        assert set(connection.execute(text(now)).all()) == {("tokens", 0, "\x1fa\x1f"), ("logits", 0, "\x1fb\x1f")}
        assert connection.execute(text("SELECT latent, density, label FROM features ORDER BY latent")).all() == [
            (0, 0.5, "l"),
            (1, 0.5, "l"),
        ]
    db.migrate(engine, "-1")
    with engine.connect() as connection:
        assert set(connection.execute(text(before)).all()) == {(0, "\x1fa\x1f", "\x1fb\x1f"), (1, None, None)}


def test_a_fresh_database_is_empty_and_says_what_to_run(engine: Engine) -> None:
    assert db.is_empty(engine)
    with pytest.raises(SchemaError, match=r"Run `sae-atlas migrate`\."):
        db.check_schema(engine)
    db.migrate(engine)
    assert not db.is_empty(engine)


def test_a_schema_newer_than_the_code_is_refused_with_both_revisions(engine: Engine) -> None:
    db.migrate(engine)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaError, match=r"schema 9999, newer than this code \(\d+\)"):
        db.check_schema(engine)


def test_of_processes_that_start_at_once_on_an_empty_database_one_migrates(engine: Engine, settings: Settings) -> None:
    code = (
        "import sys, time; from app import db; from app.settings import Settings; "
        "e = db.connect(Settings(data_dir=sys.argv[1], database_url=sys.argv[2])); "
        "time.sleep(max(0, float(sys.argv[3]) - time.time())); db.migrate(e); db.check_schema(e); print('ready')"
    )
    together = time.time() + 4
    arguments = [sys.executable, "-c", code, str(settings.data_dir), settings.database_url, str(together)]
    starts = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    results = [process.communicate(timeout=300) for process in starts]
    assert [out for out, _ in results] == ["ready\n"] * 3, results


def test_a_locked_sqlite_is_waited_for(tmp_path: Path) -> None:
    engine = db.connect(Settings(data_dir=tmp_path))
    db.migrate(engine)
    with engine.connect() as connection:
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 10_000
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
    engine.dispose()
