"""Backups: everything a person made, in one archive that another directory or database can be restored from.

    head.json                          format, version, schema revision, what is inside
    catalog/{table}/{part}.jsonl.zst   rows of the catalog, from one snapshot (app.rows)
    queue/{table}/{part}.jsonl.zst     the same of the job queue's tables
    files/...                          the data directory's files
    checksums.json                     sha256 of every member above; of every table its columns, row count and digest

A plain tar, written to a temporary name and renamed. A server may run meanwhile: rows come from a snapshot, and files
are held by hard links from that moment on, so that what is deleted during the backup is in it still.
Rows know no database: a backup of SQLite restores to Postgres, and the other way round.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import IO, Any

import zstandard
from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection, Engine, Table, delete, select
from sqlalchemy.engine import make_url

from app import db, jobqueue, jobs, lockfile, rows, supervisor
from app.errors import AtlasError, BadFile, BadInput, Conflict, Full, NotFound
from app.settings import Settings
from app.tables import Model
from app.tables import Table as Catalog

FORMAT, VERSION = "sae-atlas-backup", 1
HEAD, CHECKSUMS = "head.json", "checksums.json"
TRANSIENT = frozenset({"run", "logs", "cache", "backups"})
"""Folders of the data directory that a backup leaves out; backups/ may hold the archives."""
WEIGHTS_FREE = frozenset({"vocabulary.json"})
"""What is kept of a model whose weights are not: enough to show tokens, as after importing a bundle."""
PART_BYTES = 2**26
MAX_PART_BYTES = 2**29
"""No part unpacks to more; one row has to fit."""
MAX_HEADER_BYTES = 2**16
"""Of a member's long name."""
MAX_INDEX_BYTES = 2**28

Report = Callable[[float, str], None]


class Head(BaseModel):
    format: str
    version: int
    created_at: datetime
    made_by: str
    schema_revision: str
    database: str
    models: bool
    activations: bool


class TableEntry(BaseModel):
    columns: list[str]
    rows: int
    digest: str


class Checksums(BaseModel):
    catalog: dict[str, TableEntry]
    queue: dict[str, TableEntry]
    members: dict[str, str]
    """Name -> sha256."""
    file_bytes: int


@dataclass(frozen=True)
class Contents:
    """What an archive holds."""

    head: Head
    checksums: Checksums

    @property
    def n_rows(self) -> int:
        return sum(entry.rows for entry in self.checksums.catalog.values())

    @property
    def n_files(self) -> int:
        return sum(name.startswith("files/") for name in self.checksums.members)


def backup(settings: Settings, target: Path, report: Report, *, models: bool = False, kept: bool = True) -> Contents:
    """Write a backup of the catalog, the job queue and the data directory's files to a new file.

    `models` takes the models' weights too, `kept` the activations that harvests kept. Raises Conflict when the file
    exists or another backup runs, NotFound when there is nothing to back up.
    """
    target = _checked_target(settings, target)
    lock = lockfile.hold(settings.data_dir / "run" / "backup.lock", "Another backup of this data directory runs.")
    engine = db.connect(settings)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        with lock, _snapshots(settings, engine) as (catalog, queue), _pinned(settings, models, kept) as files:
            revision = db.revision_of(catalog)
            if revision is None:
                raise NotFound(f"There is no catalog at {engine.url.render_as_string()}; nothing to back up.")
            head = Head(
                format=FORMAT,
                version=VERSION,
                created_at=datetime.now(UTC),
                made_by=version("sae-atlas"),
                schema_revision=revision,
                database=engine.dialect.name,
                models=models,
                activations=kept,
            )
            checksums = _write(scratch, head, catalog, queue, files, report)
            os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)
        engine.dispose()
    return Contents(head, checksums)


def restore(settings: Settings, archive: Path, report: Report, *, replace: bool = False) -> Contents:
    """Put a backup in place of what is there, all of it or nothing.

    Every hash is checked before anything is written. Raises Conflict when the data directory is served or holds
    something and `replace` is not given, BadFile for an archive that is damaged or not what backup writes.
    """
    with supervisor.hold(settings):
        _check_target(settings, replace)
        contents = verify(archive, lambda share, status: report(share * 0.3, status))
        _check_room(settings, archive, contents)
        scratch = Path(tempfile.mkdtemp(prefix=".restore-", dir=settings.data_dir))
        try:
            _Restoration(settings, contents, scratch).run(archive, lambda s, status: report(0.3 + s * 0.7, status))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return contents


def verify(archive: Path, report: Report) -> Contents:
    """Read an archive to its end and return what it holds. Raises BadFile unless every member is as recorded."""
    found: dict[str, str] = {}
    head: Head | None = None
    checksums: Checksums | None = None
    size = max(archive.stat().st_size, 1) if archive.is_file() else 1
    for member, stream in _members(archive):
        name = member.name
        if checksums is not None or name in found or (head is None) != (name == HEAD):
            raise BadFile(f"{archive} is no backup of SAE Atlas: {name[:80]!r} is not where it belongs.")
        report(member.offset / size, f"Checking {name[:60]}")
        if name == CHECKSUMS:
            checksums = _index(stream, Checksums, archive)
            continue
        if name == HEAD:
            head = _index(io.BytesIO(data := stream.read(MAX_HEADER_BYTES)), Head, archive)
            found[name] = hashlib.sha256(data).hexdigest()
            continue
        _check_name(name)
        found[name] = _sha256(stream)
    if head is None or checksums is None:
        raise BadFile(f"{archive} is no whole backup: it ends before its checksums.")
    _check_head(head, archive)
    for name in sorted(found.keys() | checksums.members.keys()):
        if found.get(name) != checksums.members.get(name):
            what = (
                "is missing" if name not in found else "was added" if name not in checksums.members else "was changed"
            )
            raise BadFile(f"{archive} is damaged: {name[:80]} {what}.")
    return Contents(head, checksums)


# Writing ---------------------------------------------------------------------------------------------------------


def _checked_target(settings: Settings, target: Path) -> Path:
    target = target.absolute()
    if target.exists():
        raise Conflict(f"{target} exists already; choose a new file.")
    if not target.parent.is_dir():
        raise BadInput(f"{target.parent} is no directory.")
    inside = target.resolve().is_relative_to(settings.data_dir.resolve())
    if inside and not target.resolve().is_relative_to(settings.data_dir.resolve() / "backups"):
        raise BadInput(
            f"{target} lies in the data directory; choose another place, or {settings.data_dir / 'backups'}."
        )
    return target


@contextlib.contextmanager
def _snapshots(settings: Settings, engine: Engine) -> Generator[tuple[Connection, Connection | None]]:
    """The catalog and the queue as they are now. The queue's is the later one: it may know more, never less."""
    with rows.snapshot(engine) as catalog:
        if jobqueue.shares_catalog(settings):
            yield catalog, catalog
            return
        if not jobqueue.exists(settings):
            yield catalog, None
            return
        other = jobqueue.connect(settings)
        try:
            with rows.snapshot(other) as queue:
                yield catalog, queue
        finally:
            other.dispose()


@contextlib.contextmanager
def _pinned(settings: Settings, models: bool, kept: bool) -> Generator[list[tuple[str, Path]]]:
    """The data directory's files by name, held by hard links where the file system has them."""
    for stale in settings.data_dir.glob(".backup-*"):
        shutil.rmtree(stale, ignore_errors=True)
    pins = Path(tempfile.mkdtemp(prefix=".backup-", dir=settings.data_dir))
    try:
        found: list[tuple[str, Path]] = []
        for name, path in _files(settings):
            first = name.partition("/")[0]
            if (first == "activations" and not kept) or (
                first == "models" and not models and path.name not in WEIGHTS_FREE
            ):
                continue
            pin = pins / str(len(found))
            try:
                os.link(path, pin)
            except FileNotFoundError:
                continue
            except OSError:
                pin = path
            found.append((name, pin))
        yield found
    finally:
        shutil.rmtree(pins, ignore_errors=True)


def _files(settings: Settings) -> Iterator[tuple[str, Path]]:
    """Yield the files worth keeping, with links followed: a folder may lie on another disk."""
    root = settings.data_dir
    for folder, folders, names in os.walk(root, followlinks=True):
        at = Path(folder)
        top = at == root
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not (top and f in TRANSIENT))
        for name in sorted(names):
            path = at / name
            if not name.startswith(".") and path.is_file() and not (top and _is_database(settings, path)):
                yield path.relative_to(root).as_posix(), path.resolve()


def _is_database(settings: Settings, path: Path) -> bool:
    own = [root / name for root in (settings.data_dir,) for name in ("atlas.sqlite", "jobs.sqlite")]
    given = [_database_file(url) for url in (settings.catalog_url, settings.queue_url)]
    names = {file.absolute() for file in (*own, *given) if file is not None}
    return any(path.absolute() == Path(f"{file}{end}") for file in names for end in ("", "-wal", "-shm", "-journal"))


def _database_file(url: str) -> Path | None:
    parsed = make_url(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def _write(
    path: Path,
    head: Head,
    catalog: Connection,
    queue: Connection | None,
    files: Sequence[tuple[str, Path]],
    report: Report,
) -> Checksums:
    checksums = Checksums(catalog={}, queue={}, members={}, file_bytes=0)
    with _private(path) as raw:
        # The GNU format has no limit on sizes, and long names only where one is long.
        with tarfile.open(fileobj=raw, mode="w", format=tarfile.GNU_FORMAT) as tar:
            writer = _Writer(tar, checksums.members, path.parent)
            writer.add_bytes(HEAD, head.model_dump_json(indent=1).encode())
            checksums.catalog |= _write_tables(writer, "catalog", catalog, None, lambda s, t: report(s * 0.5, t))
            if queue is not None:
                report(0.5, "Reading the job queue")
                checksums.queue |= _write_tables(writer, "queue", queue, jobqueue.schema(queue), lambda _s, _t: None)
            checksums.file_bytes = _write_files(writer, files, lambda s, t: report(0.5 + s * 0.5, t))
            del writer.members
            _add(tar, CHECKSUMS, io.BytesIO(data := checksums.model_dump_json().encode()), len(data))
        raw.flush()
        os.fsync(raw.fileno())
    return checksums


def _private(path: Path) -> IO[bytes]:
    # An archive holds whatever the catalog holds, passwords' hashes too.
    return os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "wb")


@dataclass
class _Writer:
    """Adds members and remembers their hashes."""

    tar: tarfile.TarFile
    members: dict[str, str]
    scratch: Path

    def add_bytes(self, name: str, data: bytes) -> None:
        self.add(name, io.BytesIO(data), len(data))

    def add(self, name: str, stream: IO[bytes], size: int) -> None:
        hashing = _Hashing(stream)
        _add(self.tar, name, hashing, size)
        self.members[name] = hashing.digest.hexdigest()
        self.tar.members = []  # type: ignore[assignment] # tarfile would remember every member

    def part(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self.scratch)


def _add(tar: tarfile.TarFile, name: str, stream: Any, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o600, int(datetime.now(UTC).timestamp())
    tar.addfile(info, stream)


class _Hashing:
    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        block = self._stream.read(size)
        self.digest.update(block)
        return block


def _write_tables(
    writer: _Writer, place: str, connection: Connection, schema: str | None, report: Report
) -> dict[str, TableEntry]:
    found = rows.tables(connection, schema)
    total = max(sum(rows.count(connection, table) for table in found), 1)
    done = 0
    entries: dict[str, TableEntry] = {}
    for table in found:
        digest = rows.Digest()
        lines = (rows.line(row) for row in rows.read(connection, table))
        for number, part in enumerate(_parts(writer, lines, digest, table.name)):
            with part:
                size = part.seek(0, os.SEEK_END)
                part.seek(0)
                writer.add(f"{place}/{table.name}/{number:05}.jsonl.zst", part, size)
            report((done + digest.rows) / total, f"Reading {table.name}: {digest.rows:,} rows")
        done += digest.rows
        columns = [column.name for column in table.columns]
        entries[table.name] = TableEntry(columns=columns, rows=digest.rows, digest=digest.hex)
    return entries


def _parts(writer: _Writer, lines: Iterator[bytes], digest: rows.Digest, table: str) -> Iterator[IO[bytes]]:
    """Pack lines into files of some 64 MiB: what is on disk beside the archive, and what a reader unpacks at once."""
    line = next(lines, None)
    while line is not None:
        part, size = writer.part(), 0
        with zstandard.ZstdCompressor(level=3).stream_writer(part, closefd=False) as out:
            while line is not None and size < PART_BYTES:
                size += len(line) + 1
                if size > MAX_PART_BYTES:
                    raise AtlasError(f"A row of {table} takes {len(line):,} bytes; a backup holds {MAX_PART_BYTES:,}.")
                digest.add(line)
                out.write(line + b"\n")
                line = next(lines, None)
        yield part


def _write_files(writer: _Writer, files: Sequence[tuple[str, Path]], report: Report) -> int:
    total = max(sum(path.stat().st_size for _, path in files), 1)
    done = 0
    for name, path in files:
        report(done / total, f"Storing {name}")
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            try:
                writer.add(f"files/{name}", stream, size)
            except OSError as error:
                if "end of data" not in str(error):
                    raise
                raise AtlasError(f"{name} became shorter while it was read. Try again.") from None
        done += size
    return done


# Reading ---------------------------------------------------------------------------------------------------------


class _Member(tarfile.TarInfo):
    """Refuses what a backup never holds before tarfile acts on it: links, devices, sparse files, endless headers."""

    def _proc_member(self, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type == tarfile.GNUTYPE_LONGNAME and self.size <= MAX_HEADER_BYTES:
            return super()._proc_member(tarfile_)  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]
        if self.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or self.size < 0:
            raise BadFile(f"The archive holds {self.name[:80]!r}, which is no plain file. Nothing was restored.")
        return super()._proc_member(tarfile_)  # type: ignore[misc] # pyright: ignore[reportAttributeAccessIssue]


def _members(archive: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
    """Yield the members one by one, each with its bytes, to be read before the next."""
    try:
        with tarfile.open(archive, "r:", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[assignment]
                if member.offset_data + member.size > archive.stat().st_size:
                    raise tarfile.ReadError("unexpected end of data")
                stream = tar.extractfile(member)
                assert stream is not None, "plain files only: _Member has seen to it"
                yield member, stream
    except tarfile.TarError as error:
        raise BadFile(f"{archive} cannot be read as a backup: {error}. It may be cut off.") from None


def _check_name(name: str) -> None:
    """Raise BadFile unless a member is part of a table, or a file that belongs into a data directory."""
    parts = name.split("/")
    plain = all(part not in ("", ".", "..") and "\\" not in part and "\0" not in part for part in parts)
    rooted = plain and not PurePosixPath(name).is_absolute()
    if rooted and parts[0] in ("catalog", "queue") and len(parts) == 3 and name.endswith(".jsonl.zst"):
        return
    allowed = rooted and parts[0] == "files" and len(parts) > 1 and not any(p.startswith(".") for p in parts)
    if not allowed or parts[1] in TRANSIENT or parts[1].startswith(("atlas.sqlite", "jobs.sqlite")):
        raise BadFile(f"The archive holds {name[:80]!r}, which is no place in a data directory. Nothing was restored.")


def _index(stream: IO[bytes], kind: type[Any], archive: Path) -> Any:
    data = stream.read(MAX_INDEX_BYTES + 1)
    try:
        if len(data) > MAX_INDEX_BYTES:
            raise ValueError(f"it is larger than {MAX_INDEX_BYTES:,} bytes")
        return kind.model_validate_json(data)
    except (ValidationError, ValueError, RecursionError) as error:
        raise BadFile(f"{archive} is no backup of SAE Atlas: {str(error).splitlines()[0]}.") from None


def _check_head(head: Head, archive: Path) -> None:
    if (head.format, head.version) != (FORMAT, VERSION):
        raise BadFile(f"{archive} is {head.format[:40]} version {head.version}; this version reads {FORMAT} {VERSION}.")
    known = db.revisions()
    if head.schema_revision not in known:
        raise BadFile(
            f"{archive} was made at schema {head.schema_revision[:40]} by SAE Atlas {head.made_by[:40]}; this code "
            f"knows up to {known[-1]}. Install the newer SAE Atlas first."
        )


def _sha256(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while block := stream.read(2**20):
        digest.update(block)
    return digest.hexdigest()


# Restoring -------------------------------------------------------------------------------------------------------


def _check_target(settings: Settings, replace: bool) -> None:
    """Raise Conflict when trainers work on the catalog, or when something is there that may not be replaced."""
    engine = db.connect(settings)
    try:
        if not db.is_empty(engine):
            with db.sessions(engine)() as session:
                alive = jobs.trainers(session, settings) if db.is_current(engine) else []
            if alive:
                names = ", ".join(beat.executor for beat in alive)
                raise Conflict(
                    f"Trainers work on this catalog ({names}). Stop them; one that was killed counts for "
                    f"{settings.takeover_seconds:g} s more."
                )
        with engine.connect() as connection:
            filled = not db.is_empty(engine) and rows.has_rows(connection, rows.tables(connection))
    finally:
        engine.dispose()
    first = next(_files(settings), None)
    if (filled or first is not None) and not replace:
        what = f"The catalog at {engine.url.render_as_string()}" if filled else f"The directory {settings.data_dir}"
        raise Conflict(f"{what} is not empty. Restore to an empty place, or replace everything with --replace.")


def _check_room(settings: Settings, archive: Path, contents: Contents) -> None:
    needed, free = contents.checksums.file_bytes, shutil.disk_usage(settings.data_dir).free
    if needed > free:
        raise Full(f"{archive} holds {needed:,} bytes of files; {free:,} are free under {settings.data_dir}.")


@dataclass
class _Restoration:
    """One restore: files go to a scratch directory, rows into open transactions; then both take effect together."""

    settings: Settings
    contents: Contents
    scratch: Path
    written: dict[tuple[str, str], rows.Digest] = field(default_factory=dict[tuple[str, str], rows.Digest])

    def run(self, archive: Path, report: Report) -> None:
        (self.scratch / "new").mkdir()
        fresh = self._fresh()
        if self.contents.checksums.queue:
            jobqueue.prepare(fresh)
        engine = db.connect(fresh)
        swap = _Swap(self.settings, self.scratch)
        try:
            with db.writing(engine, foreign_keys=False) as catalog:
                self._clear(catalog)
                db.migrate_on(catalog, self.contents.head.schema_revision)
                with self._queue(fresh, catalog) as queue:
                    self._load(archive, catalog, queue, report)
                db.migrate_on(catalog)
                hashes = {row.id: row.hash for row in catalog.execute(select(Model.id, Model.hash))}
                swap.make({} if self.contents.head.models else hashes)
        except BaseException:
            swap.undo()
            raise
        finally:
            engine.dispose()
        self._place_databases(fresh)

    def _fresh(self) -> Settings:
        """The settings with SQLite files in the scratch directory instead: they replace the old ones at the end."""
        given: dict[str, Any] = {}
        if _database_file(self.settings.catalog_url):
            given["database_url"] = f"sqlite:///{self.scratch / 'atlas.sqlite'}"
        if _database_file(self.settings.queue_url):
            given["jobs_database_url"] = f"sqlite:///{self.scratch / 'jobs.sqlite'}"
        return self.settings.changed(**given)

    def _clear(self, catalog: Connection) -> None:
        """Drop the catalog's tables, and no others that may share its database."""
        mine = {table.name for table in Catalog.metadata.sorted_tables} | {"alembic_version"}
        metadata = rows.every_table(catalog, mine)
        metadata.drop_all(catalog)

    @contextlib.contextmanager
    def _queue(self, fresh: Settings, catalog: Connection) -> Generator[Connection | None]:
        """The queue's tables, made and emptied, in a transaction."""
        if not self.contents.checksums.queue:
            yield None
            return
        if jobqueue.shares_catalog(fresh):
            _empty(catalog, rows.tables(catalog, jobqueue.schema(catalog)))
            yield catalog
            return
        engine = jobqueue.connect(fresh)
        try:
            with db.writing(engine, foreign_keys=False) as queue:
                _empty(queue, rows.tables(queue, jobqueue.schema(queue)))
                yield queue
        finally:
            engine.dispose()

    def _load(self, archive: Path, catalog: Connection, queue: Connection | None, report: Report) -> None:
        places: dict[str, tuple[Connection, dict[str, Table]]] = {"catalog": (catalog, _by_name(catalog, None))}
        if queue is not None:
            places["queue"] = (queue, _by_name(queue, jobqueue.schema(queue)))
        size = max(archive.stat().st_size, 1)
        with contextlib.ExitStack() as stack:
            for connection, tables in places.values():
                stack.enter_context(rows.loading(connection, list(tables.values())))
            for member, stream in _members(archive):
                place, _, rest = member.name.partition("/")
                report(member.offset / size, f"Restoring {rest[:60] or place}")
                if place in ("catalog", "queue"):
                    self._load_part(place, rest.partition("/")[0], stream, places.get(place))
                elif place == "files":
                    self._extract(rest, stream, member)
        self._check_digests()

    def _load_part(
        self, place: str, name: str, stream: IO[bytes], target: tuple[Connection, dict[str, Table]] | None
    ) -> None:
        entry = getattr(self.contents.checksums, place).get(name)
        if entry is None or target is None or name not in target[1]:
            raise BadFile(f"The archive holds rows of a table {name[:80]!r}, which this version does not have.")
        connection, table = target[0], target[1][name]
        rows.check_columns(table, entry.columns)
        parsed = (rows.parsed(line, table, entry.columns) for line in _lines(stream))
        written = rows.write(connection, table, entry.columns, parsed)
        self.written.setdefault((place, name), rows.Digest()).merge(written)

    def _extract(self, name: str, stream: IO[bytes], member: tarfile.TarInfo) -> None:
        _check_name(member.name)
        path = self.scratch / "new" / name
        digest = hashlib.sha256()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as out:
                while block := stream.read(2**20):
                    digest.update(block)
                    out.write(block)
        except (FileExistsError, NotADirectoryError):
            raise BadFile(f"The archive holds {name[:80]!r} as a file and as a folder.") from None
        if digest.hexdigest() != self.contents.checksums.members.get(member.name):
            raise BadFile(f"{name[:80]} changed while it was restored.")

    def _check_digests(self) -> None:
        for place, entries in (("catalog", self.contents.checksums.catalog), ("queue", self.contents.checksums.queue)):
            for name, entry in entries.items():
                found = self.written.get((place, name), rows.Digest())
                if (found.rows, found.hex) != (entry.rows, entry.digest):
                    raise BadFile(
                        f"Table {name} has {found.rows:,} rows in the archive and should have {entry.rows:,}, or they "
                        "differ. Nothing was restored."
                    )

    def _place_databases(self, fresh: Settings) -> None:
        for old, new in ((self.settings.catalog_url, fresh.catalog_url), (self.settings.queue_url, fresh.queue_url)):
            path, made = _database_file(old), _database_file(new)
            if path is None or made is None or not made.exists():
                continue
            db.settle(made)
            for end in ("-wal", "-shm"):
                Path(f"{path}{end}").unlink(missing_ok=True)
            os.replace(made, path)


@dataclass
class _Swap:
    """Exchanges the data directory's folders for the restored ones by renames that can be taken back."""

    settings: Settings
    scratch: Path
    moves: list[tuple[Path, Path]] = field(default_factory=list[tuple[Path, Path]])

    def make(self, keep: dict[str, str]) -> None:
        """Exchange them. Of `keep` (id -> hash) models stay whose weights are those that the catalog speaks of."""
        old, new = self.scratch / "old", self.scratch / "new"
        old.mkdir()
        for entry in sorted(self.settings.data_dir.iterdir()):
            skipped = entry.name in TRANSIENT or entry.name.startswith(".")
            if not skipped and not _is_database(self.settings, entry):
                self._move(entry, old / entry.name)
        for model in sorted((old / "models").iterdir()) if (old / "models").is_dir() else ():
            if model.name in keep and _model_hash(model) == keep[model.name]:
                shutil.rmtree(new / "models" / model.name, ignore_errors=True)
                (new / "models").mkdir(exist_ok=True)
                self._move(model, new / "models" / model.name)
        for entry in sorted(new.iterdir()):
            self._move(entry, self.settings.data_dir / entry.name)

    def _move(self, source: Path, target: Path) -> None:
        os.rename(source, target)
        self.moves.append((source, target))

    def undo(self) -> None:
        for source, target in reversed(self.moves):
            os.rename(target, source)
        self.moves.clear()


def _model_hash(directory: Path) -> str | None:
    try:
        return json.loads((directory / "card.json").read_bytes())["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _by_name(connection: Connection, schema: str | None) -> dict[str, Table]:
    return {table.name: table for table in rows.tables(connection, schema)}


def _empty(connection: Connection, found: Sequence[Table]) -> None:
    names = [connection.dialect.identifier_preparer.format_table(table) for table in found]
    if connection.dialect.name == "postgresql" and names:
        connection.exec_driver_sql(f"TRUNCATE {', '.join(names)}")
        return
    for table in found:
        connection.execute(delete(table))


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Unpack the lines of a part. Raises BadFile for one that unpacks without end, or is no such file."""
    rest: list[bytes] = []
    done = 0
    try:
        for block in zstandard.ZstdDecompressor(max_window_size=2**27).read_to_iter(stream):
            done += len(block)
            if done > MAX_PART_BYTES:
                raise BadFile(f"A part of the archive unpacks to more than {MAX_PART_BYTES:,} bytes.")
            # Joined once a line: adding block to block would copy a long row again and again.
            first, *more = block.split(b"\n")
            rest.append(first)
            if more:
                yield b"".join(rest)
                yield from more[:-1]
                rest = [more[-1]]
    except zstandard.ZstdError as error:
        raise BadFile(f"A part of the archive cannot be unpacked: {error}.") from None
    if any(rest):
        raise BadFile("A part of the archive ends in the middle of a row.")
