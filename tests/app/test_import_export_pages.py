"""Evidence in and out by the browser: archives that do harm are refused, what goes out comes back."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard
from sqlalchemy import select
from starlette.testclient import TestClient

from app import archives, db, jobs, uploads
from app.errors import TooLarge
from app.exchange import Format
from app.main import create_app
from app.settings import Settings
from app.tables import Job, Source
from tests.conftest import D_SAE
from workers.trainer.import_evidence import ImportEvidence
from workers.trainer.kinds import JobContext

JSON = {"accept": "application/json"}
FEATURE = {"feature_index": 0, "activations": [{"tokens": ["a", "b"], "values": [0, 2.5]}], "frac_nonzero": 0.01}
BATCH = json.dumps({"model_id": "other", "layer": 3, "sae_set": "x", "features": [FEATURE]}).encode()


def send(client: TestClient, files: dict[str, bytes], **fields: str) -> httpx.Response:
    parts = [("files", (name, content, "application/octet-stream")) for name, content in files.items()]
    return client.post("/import", data=fields, files=parts or {"x": ("", b"")}, headers=JSON)


def zip_of(files: dict[str, bytes]) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return sink.getvalue()


def tar_of(files: dict[str, bytes], mode: Any = "w:gz", link: str = "") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        if link:
            entry = tarfile.TarInfo("batch-1.json")
            entry.type, entry.linkname = tarfile.SYMTYPE, link
            archive.addfile(entry)
    return sink.getvalue()


def link_zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        entry = zipfile.ZipInfo("batch-0.json")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    return sink.getvalue()


def run(settings: Settings) -> dict[str, Any]:
    """Do the newest import job as a trainer would, twice, as after a crash."""
    sessions = db.sessions(db.connect(settings))
    with sessions() as session:
        job = jobs.recent(session, 1)[0]
    settings.job_dir(job.id).mkdir(parents=True, exist_ok=True)
    context = JobContext(settings, sessions, job.id, job.spec, settings.job_dir(job.id))
    kind = ImportEvidence()
    assert job.kind == kind.name
    for step in [*kind.plan(context)] * 2:
        kind.run(context, step)
    return kind.finish(context)


GOOD = {
    "a folder": {"dash/batch-0.json": BATCH, "dash/notes.txt": b"x"},
    "a file": {"batch-0.json": BATCH},
    "a zip": {"dash.zip": zip_of({"deep/dash/batch-0.json": BATCH})},
    "a tar": {"dash.tar": tar_of({"batch-0.json": BATCH}, "w")},
    "a tar.gz": {"dash.tar.gz": tar_of({"dash/batch-0.json": BATCH})},
    "a tar.xz": {"dash.tar.xz": tar_of({"dash/batch-0.json": BATCH}, "w:xz")},
    "a tar.zst": {"dash.tar.zst": zstandard.compress(tar_of({"dash/batch-0.json": BATCH}, "w"))},
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_sent_becomes_a_job_and_then_a_page(client: TestClient, settings: Settings, case: str) -> None:
    assert send(client, GOOD[case]).json() == {"url": "/jobs/1"}
    assert run(settings) == {"url": "/other/3-x", "sources": ["other/3-x"], "features": 1}
    assert list(uploads.home(settings).iterdir()) == []
    page = client.get("/other/3-x/0")
    assert page.status_code == 200
    assert "<dd>about " in page.text, "the number of active tokens is derived from the density"
    assert client.get("/other/3-x").status_code == 200


BAD: dict[str, tuple[dict[str, bytes], dict[str, str], int, str]] = {
    "11 a name that leads out of a zip": ({"a.zip": zip_of({"../../evil.json": b"x"})}, {}, 422, "no place below"),
    "11 an absolute name in a tar": ({"a.tar.gz": tar_of({"/etc/evil.json": b"x"})}, {}, 422, "no place below"),
    "11 a link in a tar": ({"a.tar": tar_of({}, "w", "/etc/passwd")}, {}, 422, "holds a link"),
    "11 a link in a zip": ({"a.zip": link_zip()}, {}, 422, "holds a link"),
    "11 a folder that leads out": ({"x/../../batch-0.json": BATCH}, {}, 422, "no place below"),
    "11 a zip bomb": ({"a.zip": zip_of({"batch-0.json": bytes(3_000_000)})}, {}, 413, "unpacks to more than 2,000,000"),
    "no zip": ({"a.zip": b"PK no"}, {}, 422, "cannot be unpacked"),
    "a tar that breaks off": ({"a.tar.gz": tar_of({"batch-0.json": BATCH * 90})[:-60]}, {}, 422, "cannot be"),
    "two archives": ({"a.zip": zip_of({}), "b.zip": zip_of({})}, {}, 422, "More than one archive"),
    "nothing of ours": ({"a.zip": zip_of({"readme.md": b"x"})}, {}, 422, "no bundle"),
    "nothing": ({}, {}, 422, "Nothing was sent"),
    "a picture": ({"cat.png": b"x"}, {}, 422, "no part of an import"),
    "a model id that is a path": ({"batch-0.json": BATCH}, {"model": "../x"}, 422, ""),
    "a bad set name": ({"batch-0.json": BATCH}, {"set_name": "A B"}, 422, "set name"),
    "a bundle under another name": ({"manifest.json": b"{}"}, {"set_name": "y"}, 422, "says itself"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_harm_or_is_none_is_refused_and_nothing_stays(
    client: TestClient, settings: Settings, case: str
) -> None:
    files, fields, status, words = BAD[case]
    client.app.state.settings = settings.model_copy(update={"max_import_bytes": 2_000_000})  # type: ignore[attr-defined]
    answer = send(client, files, **fields)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["message"]
    assert list(uploads.home(settings).iterdir()) == []
    assert not list(settings.data_dir.parent.rglob("evil.json"))
    with db.sessions(db.connect(settings))() as session:
        assert session.scalars(select(Job)).all() == []


def test_an_import_over_the_limit_is_stopped_in_its_middle(client: TestClient, settings: Settings) -> None:
    client.app.state.settings = settings.model_copy(update={"max_import_bytes": 1000})  # type: ignore[attr-defined]

    def body() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.zip"\r\n\r\n'
        for _ in range(64):
            yield b"x" * 2**20

    answer = client.post("/import", content=body(), headers=JSON | {"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 413
    assert "SAE_ATLAS_MAX_IMPORT_BYTES" in answer.json()["message"]
    assert list(uploads.home(settings).iterdir()) == []


def test_what_a_job_refuses_is_not_kept(client: TestClient, settings: Settings) -> None:
    send(client, {"batch-0.json": BATCH[:-30]})
    with pytest.raises(Exception, match=r"no JSON|cut off"):
        run(settings)
    assert list(uploads.home(settings).iterdir()) == []


def test_a_budget_of_files_and_bytes_holds_across_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILES", 3)
    (tmp_path / "sent-a.zip").write_bytes(zip_of({f"{n}.json": b"" for n in range(4)}))
    with pytest.raises(TooLarge, match=r"a\.zip holds more than 3 files"):
        archives.unpack(tmp_path / "sent-a.zip", tmp_path / "out", 100)


# Downloads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Format.NEURONPEDIA, Format.SAE_DASHBOARD])
def test_a_download_is_what_the_import_page_takes(client: TestClient, settings: Settings, form: Format) -> None:
    answer = client.get(f"/tiny/1-demo/export/{form}")
    assert answer.headers["content-type"] == "application/zip"
    assert f'filename="tiny-1-demo-{form}.zip"' in answer.headers["content-disposition"]
    send(client, {"down.zip": answer.content}, model="copy", set_name="back")
    assert run(settings)["sources"] == ["copy/1-back"]
    with db.sessions(db.connect(settings))() as session:
        made = session.scalars(select(Source).where(Source.model_id == "copy")).one()
        assert made.d_sae == D_SAE
    assert "harbour" in client.get("/copy/1-back/3").text
    assert "<dd>about " not in client.get("/copy/1-back/3").text, "our own exports say their counts"
    assert not list((settings.data_dir / "cache").glob("export-*"))


def test_parquet_is_downloaded_with_every_table(client: TestClient) -> None:
    answer = client.get("/tiny/1-demo/export/parquet")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        names = {Path(name).stem for name in archive.namelist()}
    assert names == {"features", "examples", "silent", "effects", "logits", "explanations"}


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/tiny/2-plain/export/parquet", 404),
        ("/tiny/1-demo/export/bundle", 404),
        ("/tiny/1-demo/export/exe", 422),
        ("/tiny/9-no/export/parquet", 404),
    ],
)
def test_what_cannot_be_exported_is_said_and_no_download_begins(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert "content-disposition" not in answer.headers


def test_a_zip_is_sent_while_it_is_written(tmp_path: Path) -> None:
    written: list[str] = []

    def files() -> Iterator[tuple[str, Path]]:
        for name in ("a.json", "b.json"):
            written.append(name)
            (tmp_path / name).write_bytes(b"x" * 10_000)
            yield name, tmp_path / name

    parts = archives.zipped("root", files())
    first = next(parts)
    assert written == ["a.json"]
    content = first + b"".join(parts)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["root/a.json", "root/b.json"]
        assert archive.read("root/b.json") == b"x" * 10_000


def test_pages_of_an_import_alone_say_that_there_are_no_weights(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "alone", database_url="", worker_socket="", log_level="WARNING")
    engine = db.connect(settings)
    db.migrate(engine)
    with TestClient(create_app(settings), base_url="http://localhost:3000", raise_server_exceptions=False) as client:
        assert send(client, {"batch-0.json": BATCH}).status_code == 200
        run(settings)
        for path in ("/", "/other", "/other/3-x", "/other/3-x/0", "/corpora", "/harvests", "/harvests/1", "/jobs/1"):
            assert client.get(path).status_code == 200, path
        assert "No weights here" in client.get("/other/3-x/0").text or "browsing" in client.get("/other/3-x/0").text
        assert "no SAE with weights here" in client.get("/other/harvest").text
        assert client.get("/harvests/1").text.count("came in a bundle or an import") == 1
