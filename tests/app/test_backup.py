"""Backup and restore: a real server and a real trainer go on writing, all is destroyed, and all comes back."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard
from sqlalchemy import select, text

from app import backups, db, jobqueue, jobs, rows, supervisor
from app.errors import BadFile, Conflict
from app.settings import Settings
from app.tables import Feature, Job, JobMetric, JobState, SteeringPreset
from tests import every_table
from tests.conftest import Catalog

REPOSITORY = Path(__file__).resolve().parents[2]


def silent(_share: float, _status: str) -> None:
    """Nobody watches the progress."""


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, filled_directory: Path, tmp_path: Path) -> Settings:
    """A filled catalog; on Postgres it came there by a restore, which tests that too."""
    shutil.copytree(filled_directory, tmp_path / "data")
    settings = Settings(data_dir=tmp_path / "data", beat_seconds=0.3, takeover_seconds=2.0)
    if request.param == "sqlite":
        return settings
    moved = settings.changed(database_url=emptied(request.getfixturevalue("postgres_server")))
    backups.backup(settings, tmp_path / "moving.tar", silent)
    shutil.rmtree(settings.data_dir)
    backups.restore(moved, tmp_path / "moving.tar", silent)
    return moved


def emptied(server: str) -> str:
    url = server.replace("postgresql://", "postgresql+psycopg://")
    engine = db.connect(Settings(database_url=url))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE; CREATE SCHEMA public; DROP SCHEMA IF EXISTS dbos CASCADE"))
    engine.dispose()
    return url


class Processes:
    """Real processes on one data directory."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.running: list[subprocess.Popen[str]] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, *module: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            cwd=REPOSITORY,
            env=self._environment(),
            stderr=(self.settings.data_dir.parent / f"{module[-1]}.log").open("a"),
            text=True,
        )
        self.running.append(process)
        return process

    def web(self) -> None:
        self.start("app")
        until(lambda: answers(self.url))

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments],
            cwd=REPOSITORY,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kill(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGKILL)
            process.wait()
        self.running.clear()

    def _environment(self) -> dict[str, str]:
        given = self.settings.model_dump(exclude_unset=True) | {"port": self.port}
        return os.environ | {f"SAE_ATLAS_{name.upper()}": str(value) for name, value in given.items()}


@pytest.fixture
def processes(place: Settings) -> Iterator[Processes]:
    made = Processes(place)
    yield made
    made.kill()


def until(condition: Callable[[], Any], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").status_code == 200
    except httpx.HTTPError:
        return False


class Writers:
    """Two that write without pause: one over HTTP, one that adds a job and its metric in one transaction."""

    def __init__(self, settings: Settings, url: str) -> None:
        self.settings, self.url = settings, url
        self.kept: list[str] = []
        self.pairs = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._post, self._pair)]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _post(self) -> None:
        with httpx.Client(base_url=self.url) as http:
            while not self._stop.is_set():
                name = f"preset {len(self.kept)}"
                body = {"modelId": "tiny", "name": name, "settings": {"n": len(self.kept)}}
                assert http.post("/api/steer/presets", json=body).status_code == 200
                self.kept.append(name)

    def _pair(self) -> None:
        engine = db.connect(self.settings)
        while not self._stop.is_set():
            with db.sessions(engine).begin() as session:
                job = Job(kind="pair", title="p", spec={}, result={}, workflow_id="", state=JobState.DONE)
                session.add(job)
                session.flush()
                session.add(JobMetric(job_id=job.id, step=0, values={"loss": 1.0}))
            self.pairs += 1
        engine.dispose()


def test_what_a_live_server_held_comes_back_after_everything_was_destroyed(
    place: Settings, processes: Processes, tmp_path: Path
) -> None:
    engine = db.connect(place)
    with db.sessions(engine).begin() as session:
        job_id = jobs.submit(session, place, "toy", "toy", {"steps": 4, "seconds": 1.0}).id
    processes.web()
    processes.start("tests.workers.toy_trainer")
    starts = place.job_dir(job_id) / "starts"
    until(lambda: starts.exists() and len(starts.read_text().splitlines()) >= 2)
    with Writers(place, processes.url) as writers:
        until(lambda: len(writers.kept) > 5 and writers.pairs > 5)
        acknowledged, pairs = list(writers.kept), writers.pairs
        said = processes.command("backup", str(tmp_path / "b.tar"))
        assert len(writers.kept) > len(acknowledged)
    assert "rows of" in said
    processes.kill()
    # Connections still open would read the destroyed file on, which no longer has a name.
    engine.dispose()
    destroy(place)
    assert "Restored" in processes.command("restore", str(tmp_path / "b.tar"))
    with db.sessions(engine)() as session:
        assert set(acknowledged) <= set(session.scalars(select(SteeringPreset.name)))
        ids = set(session.scalars(select(Job.id).where(Job.kind == "pair")))
        assert len(ids) >= pairs
        assert set(session.scalars(select(JobMetric.job_id).where(JobMetric.job_id.in_(ids)))) == ids
    begun = len(starts.read_text().splitlines())
    processes.web()
    page = httpx.get(f"{processes.url}/tiny/1-demo/3")
    assert page.status_code == 200
    assert "harbour" in page.text
    processes.start("tests.workers.toy_trainer")
    until(lambda: JobState(job_of(engine, job_id).state).ended)
    job = job_of(engine, job_id)
    engine.dispose()
    assert job.state == JobState.DONE, job.error
    assert job.result["text"].splitlines() == [f"part-{i} after {i}" for i in range(4)]
    steps = [line.split()[0] for line in starts.read_text().splitlines()]
    assert begun >= 2
    assert steps.count("part-0") == 1, "the queue's state came back: the job went on where the backup found it"


def destroy(settings: Settings) -> None:
    shutil.rmtree(settings.data_dir)
    if settings.database_url:
        emptied(settings.database_url)


def job_of(engine: Any, job_id: int) -> Job:
    with db.sessions(engine)() as session:
        return jobs.get(session, job_id)


def test_every_table_and_every_file_comes_back_as_it_was(place: Settings, tmp_path: Path) -> None:
    engine = db.connect(place)
    clear(engine)
    with db.writing(engine, foreign_keys=False) as connection:
        tables = rows.tables(connection)
        every_table.fill(connection, tables)
        before = every_table.digests(connection, every_table.columns(tables))
    assert min(count for count, _ in before.values()) == every_table.N_ROWS
    (place.data_dir / "activations" / "key").mkdir(parents=True)
    (place.data_dir / "activations" / "key" / "0.bin").write_bytes(os.urandom(100_000))
    (place.data_dir / "models" / "tiny" / "model.safetensors").write_bytes(b"w" * 1000)
    files = contents(place.data_dir)
    backups.backup(place, tmp_path / "b.tar", silent, models=True)
    engine.dispose()
    destroy(place)
    backups.restore(place, tmp_path / "b.tar", silent)
    engine = db.connect(place)
    with engine.connect() as connection:
        assert every_table.digests(connection, every_table.columns(rows.tables(connection))) == before
    db.check_schema(engine)
    engine.dispose()
    assert contents(place.data_dir) == files


def clear(engine: Any) -> None:
    with db.writing(engine, foreign_keys=False) as connection:
        tables = rows.tables(connection)
        with rows.loading(connection, tables):
            for table in tables:
                connection.execute(table.delete())


def contents(data_dir: Path) -> dict[str, str]:
    return {
        str(path.relative_to(data_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in data_dir.rglob("*")
        if path.is_file() and path.relative_to(data_dir).parts[0] != "run" and ".sqlite" not in path.name
    }


def test_ids_go_on_after_a_restore(place: Settings, tmp_path: Path) -> None:
    backups.backup(place, tmp_path / "b.tar", silent)
    destroy(place)
    backups.restore(place, tmp_path / "b.tar", silent)
    engine = db.connect(place)
    with db.sessions(engine).begin() as session:
        ids = [jobs.submit(session, place, "toy", "t", {}).id for _ in range(2)]
    engine.dispose()
    assert ids == [1, 2]


def test_weights_of_models_stay_where_a_backup_without_them_replaces_the_rest(place: Settings, tmp_path: Path) -> None:
    model = place.model_dir("tiny")
    (model / "model.safetensors").write_bytes(b"w" * 1000)
    (model / "card.json").write_text(json.dumps({"hash": "f" * 64}))
    made = backups.backup(place, tmp_path / "b.tar", silent)
    assert [name for name in made.checksums.members if "files/models" in name] == ["files/models/tiny/vocabulary.json"]
    (place.data_dir / "corpora" / "later").write_text("made after the backup")
    backups.restore(place, tmp_path / "b.tar", silent, replace=True)
    assert (model / "model.safetensors").read_bytes() == b"w" * 1000
    assert not (place.data_dir / "corpora" / "later").exists()
    (model / "card.json").write_text(json.dumps({"hash": "another model of that name"}))
    backups.restore(place, tmp_path / "b.tar", silent, replace=True)
    assert sorted(path.name for path in model.iterdir()) == ["vocabulary.json"]


def test_a_restore_over_something_is_refused_without_replace(place: Settings, tmp_path: Path) -> None:
    backups.backup(place, tmp_path / "b.tar", silent)
    with pytest.raises(Conflict, match="is not empty"):
        backups.restore(place, tmp_path / "b.tar", silent)
    engine = db.connect(place)
    with db.sessions(engine).begin() as session:
        jobs.submit(session, place, "toy", "made after the backup", {})
    engine.dispose()
    backups.restore(place, tmp_path / "b.tar", silent, replace=True)
    with db.sessions(engine)() as session:
        assert jobs.recent(session) == []
        assert len(session.scalars(select(Feature)).all()) == Catalog.d_sae
    engine.dispose()


def test_a_restore_waits_for_nobody_who_works_there(place: Settings, processes: Processes, tmp_path: Path) -> None:
    backups.backup(place, tmp_path / "b.tar", silent)
    with supervisor.hold(place), pytest.raises(Conflict, match="runs already"):
        backups.restore(place, tmp_path / "b.tar", silent, replace=True)
    processes.start("tests.workers.toy_trainer")
    engine = db.connect(place)
    with db.sessions(engine)() as session:
        until(lambda: session.rollback() or jobs.trainers(session, place))
    with pytest.raises(Conflict, match=r"Trainers work on this catalog \(.+-0\)"):
        backups.restore(place, tmp_path / "b.tar", silent, replace=True)
    engine.dispose()


def test_a_backup_leaves_nothing_behind_and_overwrites_nothing(place: Settings, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "b.tar"
    (place.data_dir / "saes" / "gone").symlink_to(tmp_path / "nowhere")
    backups.backup(place, target, silent)
    assert [path.name for path in target.parent.iterdir()] == ["b.tar"]
    assert target.stat().st_mode & 0o777 == 0o600
    assert not list(place.data_dir.glob(".*"))
    with pytest.raises(Conflict, match="exists already"):
        backups.backup(place, target, silent)


# Archives that were not made by backup ---------------------------------------------------------------------------


@pytest.fixture
def archive(filled: Catalog, settings: Settings, tmp_path: Path) -> Path:
    backups.backup(settings, tmp_path / "good.tar", silent)
    return tmp_path / "good.tar"


@pytest.fixture
def empty(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "empty")


def rewritten(archive: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None], *, sign: bool) -> Path:
    """Return a copy with changed members; `sign` makes the checksums say that it is as it should be."""
    with tarfile.open(archive) as tar:
        members = [(m, f.read() if (f := tar.extractfile(m)) else b"") for m in tar.getmembers()]
    change(members)
    if sign:
        info, data = next(m for m in members if m[0].name == "checksums.json")
        checksums = json.loads(data)
        named = {m.name: hashlib.sha256(d).hexdigest() for m, d in members if m.name != "checksums.json"}
        members[members.index((info, data))] = (info, json.dumps(checksums | {"members": named}).encode())
    path = archive.with_name("changed.tar")
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def added(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Callable[[list[Any]], None]:
    def change(members: list[Any]) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        members.insert(-1, (info, data))

    return change


def changed(name: str, data: Callable[[bytes], bytes]) -> Callable[[list[Any]], None]:
    def change(members: list[Any]) -> None:
        index = next(i for i, (info, _) in enumerate(members) if info.name.startswith(name))
        members[index] = (members[index][0], data(members[index][1]))

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (added("files/../../evil"), "no place in a data directory"),
        (added("/etc/evil"), "no place in a data directory"),
        (added("files//etc/evil"), "no place in a data directory"),
        (added("files/saes/..\\evil"), "no place in a data directory"),
        (added("files/.ssh/authorized_keys"), "no place in a data directory"),
        (added("files/run/worker.sock"), "no place in a data directory"),
        (added("files/atlas.sqlite-wal"), "no place in a data directory"),
        (added("catalog/../../evil.jsonl.zst"), "no place in a data directory"),
        (added("files/saes/link", kind=tarfile.SYMTYPE, link="/etc/passwd"), "no plain file"),
        (added("files/saes/link", kind=tarfile.LNKTYPE, link="head.json"), "no plain file"),
        (added("files/saes/pipe", kind=tarfile.FIFOTYPE), "no plain file"),
        (added("files/saes/device", kind=tarfile.CHRTYPE), "no plain file"),
        (added("files/saes/sparse", kind=tarfile.GNUTYPE_SPARSE), "no plain file"),
        (added("x", kind=tarfile.XHDTYPE), "no plain file"),
        (added("files/saes"), "as a file and as a folder"),
        (added("catalog/unknown/00000.jsonl.zst"), "which this version does not have"),
        (added("queue/dbos_migrations/00000.jsonl.zst"), "does not have|no place"),
        (changed("catalog/features/", lambda _: zeros(2**29 + 2**20)), "unpacks to more than"),
        (changed("catalog/features/", lambda _: b"not zstd"), "cannot be unpacked"),
        (changed("catalog/features/", lambda d: packed(unpacked(d)[:-9])), "in the middle of a row"),
        (changed("catalog/features/", lambda d: packed(unpacked(d).split(b"\n", 1)[1])), "39 rows .* should have 40"),
        (changed("catalog/features/", lambda d: packed(b"[1]\n" + unpacked(d))), "cannot be read: .* values expected"),
        (changed("catalog/features/", lambda d: packed(b"[" * 100_000 + b"\n")), "cannot be read"),
        (changed("head.json", lambda d: d.replace(b"sae-atlas-backup", b"other-backup")), "other-backup version 1"),
        (changed("head.json", lambda d: d.replace(b'"schema_revision":', b'"schema_revision": "9999", "x":')), "9999"),
    ],
)
def test_a_hostile_archive_is_refused_and_nothing_is_written(
    archive: Path, empty: Settings, change: Callable[[list[Any]], None], reason: str
) -> None:
    bad = rewritten(archive, change, sign=True)
    with pytest.raises(BadFile, match=reason):
        backups.restore(empty, bad, silent)
    assert contents(empty.data_dir) == {}
    assert not list(empty.data_dir.glob(".*"))
    assert not (empty.data_dir.parent / "evil").exists()
    backups.restore(empty, archive, silent)


def packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def unpacked(data: bytes) -> bytes:
    return b"".join(zstandard.ZstdDecompressor().read_to_iter(io.BytesIO(data)))


def zeros(n: int) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    return b"".join(compressor.compress(bytes(2**20)) for _ in range(n // 2**20)) + compressor.flush()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed("files/saes", lambda d: d[:-1] + b"!"), "files/saes.* was changed"),
        (added("files/saes/more"), "files/saes/more was added"),
        (lambda members: members.pop(2), "is missing"),
        (lambda members: members.pop(), "ends before its checksums"),
        (lambda members: members.append(members[1]), "not where it belongs"),
        (lambda members: members.clear(), "ends before its checksums"),
    ],
)
def test_a_damaged_archive_is_refused_by_its_hashes(
    archive: Path, empty: Settings, change: Callable[[list[Any]], None], reason: str
) -> None:
    with pytest.raises(BadFile, match=reason):
        backups.restore(empty, rewritten(archive, change, sign=False), silent)


def test_an_archive_cut_anywhere_is_refused(archive: Path, empty: Settings, tmp_path: Path) -> None:
    data = archive.read_bytes()
    for length in (0, 100, 512, 1500, len(data) // 2, len(data) - 12_000):
        (tmp_path / "cut.tar").write_bytes(data[:length])
        with pytest.raises(BadFile, match=r"cut off|ends before|no backup"):
            backups.restore(empty, tmp_path / "cut.tar", silent)


def test_a_restore_that_fails_leaves_what_was_there(place: Settings, tmp_path: Path) -> None:
    backups.backup(place, tmp_path / "b.tar", silent)
    shortened = changed("catalog/features/", lambda d: packed(unpacked(d).split(b"\n", 1)[1]))
    bad = rewritten(tmp_path / "b.tar", shortened, sign=True)
    before = contents(place.data_dir)
    with pytest.raises(BadFile, match="39 rows"):
        backups.restore(place, bad, silent, replace=True)
    assert contents(place.data_dir) == before
    engine = db.connect(place)
    with db.sessions(engine)() as session:
        assert len(session.scalars(select(Feature)).all()) == Catalog.d_sae
    engine.dispose()


def test_large_files_pass_through_in_pieces(filled: Catalog, settings: Settings, tmp_path: Path) -> None:
    with (settings.sae_dir("aa") / "large.bin").open("wb") as large:
        large.truncate(400 * 2**20)
    measured = (
        "import atexit, re, sys; from pathlib import Path; from app.cli import main; "
        "peak = lambda: print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]); "
        "atexit.register(peak); main()"
    )
    for arguments in (("backup", "b.tar"), ("restore", "b.tar", "--replace")):
        environment = os.environ | {"SAE_ATLAS_DATA_DIR": str(settings.data_dir), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", measured, *arguments]
        said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
        assert int(said.split()[-1]) * 1024 < 300 * 2**20
    assert (settings.sae_dir("aa") / "large.bin").stat().st_size == 400 * 2**20


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_the_queue_of_a_restored_directory_is_private(place: Settings, tmp_path: Path) -> None:
    jobqueue.prepare(place)
    backups.backup(place, tmp_path / "b.tar", silent)
    destroy(place)
    backups.restore(place, tmp_path / "b.tar", silent)
    assert (place.data_dir / "jobs.sqlite").stat().st_mode & 0o777 == 0o600
