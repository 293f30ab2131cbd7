"""Corpora in the browser: what is uploaded is stored to the character, what is refused leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from sqlalchemy import select
from starlette.testclient import TestClient

from app import corpora, db, documents, jobs, trash, uploads
from app.settings import Settings
from app.specs import CorpusSpec
from app.tables import Corpus, Job
from app.web import corpora as pages
from tests.conftest import Catalog
from workers.trainer.add_corpus import AddCorpus
from workers.trainer.kinds import JobContext

JSON = {"accept": "application/json"}
ROWS = [
    {"body": "One <b>line</b>\nand\tanother  \u202e.", "name": "First", "url": "https://a.example/1"},
    {"body": "\n\nBegins empty", "name": "<Second>", "url": ""},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
COLUMNS = {"text_column": "body", "title_column": "name", "source_column": "url"}


def send(
    client: TestClient, files: dict[str, bytes], headers: dict[str, str] | None = None, **fields: str
) -> httpx.Response:
    parts = [("files", (name, content, "application/octet-stream")) for name, content in files.items()]
    return client.post("/corpora", data=fields, files=parts, headers=headers, follow_redirects=False)


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


def left(settings: Settings) -> list[str]:
    """What uploads left: nothing but corpora."""
    found = [*uploads.home(settings).glob("*"), *(settings.data_dir / "corpora").glob(".*")]
    return [str(path) for path in found]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl.gz", gzip.compress(LINES)),
        ("rows.jsonl.xz", lzma.compress(LINES)),
        ("rows.jsonl.zst", zstandard.compress(LINES)),
        ("rows.parquet", parquet()),
    ],
)
def test_an_upload_is_stored_to_the_character(
    client: TestClient, settings: Settings, name: str, content: bytes
) -> None:
    answer = send(client, {name: content}, licence="CC0", about="Two rows.", **COLUMNS)
    assert (answer.status_code, answer.headers["location"]) == (303, "/corpora/rows")
    assert left(settings) == []
    page = client.get("/corpora/rows").text
    for words in ("First", "&lt;Second&gt;", "https://a.example/1", "CC0", "Two rows.", name, "Not tokenised yet"):
        assert words in page
    assert client.get("/corpora/rows/0/text").content.decode() == ROWS[0]["body"]
    shown = client.get("/corpora/rows/1").text
    assert f'aria-label="Text">\n{ROWS[1]["body"]}</pre>' in shown
    assert "One &lt;b&gt;line" in client.get("/corpora/rows/0").text


def test_plain_text_and_a_folder_become_one_corpus(client: TestClient, settings: Settings) -> None:
    files = {"books/a.txt": b"Alpha", "books/cover.png": b"\x89PNG", "books/more/a.md": b"Beta"}
    assert send(client, files, JSON, name="Two books").json() == {"url": "/corpora/Two%20books"}
    page = client.get("/corpora/Two%20books").text
    assert "Alpha" in page
    assert "Beta" in page
    assert left(settings) == []


REFUSED: dict[str, tuple[dict[str, bytes], dict[str, str], int, str]] = {
    "no such column": ({"a.jsonl": LINES}, {"text_column": "txt"}, 422, "there are: body, name, url"),
    "no JSON": ({"a.jsonl": b"{"}, {}, 422, "a.jsonl, line 1: expected a JSON object"),
    "a binary file": ({"a.txt": b"a\0b"}, {}, 422, "NUL bytes"),
    "no format of ours": ({"a.docx": b"PK"}, {}, 422, "a corpus is text"),
    "nothing in it": ({"a.txt": b""}, {}, 422, "There is no text in it"),
    "not parquet": ({"a.parquet": b"PAR1"}, {}, 422, "cannot be read as parquet"),
    "broken compression": ({"a.txt.gz": b"no gzip"}, {}, 422, "cannot be read"),
    "no file": ({}, {"name": "x"}, 422, "No file was sent"),
    "a name that is taken": ({"a.txt": b"x"}, {"name": "made"}, 409, "choose another name"),
    "a name that is a path": ({"a.txt": b"x"}, {"name": "../../etc"}, 422, "cannot be a corpus name"),
    "a traversal": ({"../../a.docx": b"x", "../../../b.txt": b"x"}, {"name": "up"}, 303, ""),
    "a limit that is none": ({"a.txt": b"x"}, {"max_chars": "many"}, 422, "characters at most"),
    "twice": ({"a/a.txt": b"x", "a//a.txt": b"x"}, {"name": "x"}, 303, ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_corpus_is_refused_and_nothing_stays(client: TestClient, settings: Settings, case: str) -> None:
    files, fields, status, words = REFUSED[case]
    before = sorted((settings.data_dir).rglob("*"))
    parts = files or {"": b""}
    answer = send(client, parts, JSON, **fields)
    if status == 303:  # nothing dangerous: the names of folders are dropped or joined
        assert answer.status_code == 200
        assert not (settings.data_dir.parent / "b.txt").exists()
        return
    assert answer.status_code == status
    assert words in answer.json()["message"]
    after = [path for path in sorted(settings.data_dir.rglob("*")) if path != uploads.home(settings)]
    assert [path for path in after if "atlas.sqlite" not in path.name] == [
        path for path in before if "atlas.sqlite" not in path.name
    ]


def test_the_form_keeps_what_was_typed_and_says_what_is_wrong_where(client: TestClient) -> None:
    answer = send(client, {"a.txt": b"x"}, name="made", licence="CC BY", max_chars="-3")
    assert answer.status_code == 422
    assert 'value="CC BY"' in answer.text
    assert 'id="field-max_chars-error"' in answer.text
    assert "greater than or equal to 0" in answer.text


def test_an_upload_over_the_limit_is_stopped_in_its_middle(client: TestClient, settings: Settings) -> None:
    client.app.state.settings = settings.model_copy(update={"max_corpus_bytes": 1000})  # type: ignore[attr-defined]
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'
        for _ in range(64):
            sent += 2**20
            yield b"x" * 2**20

    answer = client.post("/corpora", content=body(), headers=JSON | {"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 413
    assert "1,000 bytes that SAE_ATLAS_MAX_CORPUS_BYTES allows" in answer.json()["message"]
    assert left(settings) == []


def test_large_uploads_and_datasets_are_queued(
    client: TestClient, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "SMALL_BYTES", 10)
    assert send(client, {"big.jsonl": LINES}, **COLUMNS).headers["location"] == "/jobs/1"
    hub = client.post(
        "/corpora", data={"dataset": "owner/texts", "max_chars": "1,000"}, files={"x": ("", b"")}, headers=JSON
    )
    assert hub.json() == {"url": "/jobs/2"}
    with db.sessions(db.connect(settings))() as session:
        kept, asked = session.scalars(select(Job).order_by(Job.id))
    assert (asked.kind, asked.spec["dataset"], asked.spec["max_chars"]) == ("corpus", "owner/texts", 1000)
    assert asked.spec["name"] == "texts"
    assert (Path(kept.spec["path"]) / "big.jsonl").read_bytes() == LINES


@pytest.mark.parametrize("dataset", ["../../etc", "http://169.254.169.254/x", "file:///etc/passwd", "a/b/c"])
def test_a_place_that_is_no_dataset_is_refused_before_a_socket_opens(client: TestClient, dataset: str) -> None:
    answer = client.post(
        "/corpora", data={"dataset": dataset, "name": "x", "max_chars": "9"}, files={"x": ("", b"")}, headers=JSON
    )
    assert answer.status_code == 422
    assert "is no dataset of the hub" in answer.json()["message"]


def test_a_dataset_without_a_limit_is_refused(client: TestClient) -> None:
    answer = client.post("/corpora", data={"dataset": "a/b"}, files={"x": ("", b"")}, headers=JSON)
    assert answer.status_code == 422
    assert "limit its documents or characters" in answer.json()["message"]


def test_a_corpus_with_evidence_stays_and_says_whose(client: TestClient, settings: Settings) -> None:
    page = client.get("/corpora").text
    assert "/harvests/1" in page
    assert "tiny/1-demo" in page
    answer = client.post("/corpora/made/remove", follow_redirects=False)
    assert answer.status_code == 409
    assert "shown by tiny/1-demo" in answer.text
    send(client, {"mine.txt": b"Some text."})
    with db.sessions(db.connect(settings))() as session:
        directory = settings.corpus_dir(corpora.corpus_named(session, "mine").hash)
    assert directory.is_dir()
    assert client.post("/corpora/mine/remove", follow_redirects=False).headers["location"] == "/corpora"
    assert client.get("/corpora/mine").status_code == 404
    assert directory.is_dir()
    with db.sessions(db.connect(settings))() as session:
        assert trash.purge(session, settings, timedelta(0)) == 1
    assert not directory.exists()


def test_documents_are_found_in_the_middle_of_a_large_corpus(
    filled: Catalog, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "_FRAME_BYTES", 2000)
    lines = [json.dumps({"text": f"document {n} " * 20}) for n in range(100)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    with db.sessions(db.connect(settings))() as session:
        corpus = corpora.add_corpus(session, settings, documents.read(tmp_path / "many.jsonl"), "many")
        session.commit()
        directory = settings.corpus_dir(corpus.hash)
    assert len(json.loads((directory / corpora.INDEX).read_text())["first"]) > 10
    every = list(corpora.documents(directory))
    assert len(every) == 100
    assert [next(corpora.documents(directory, n)) for n in range(100)] == every
    (directory / corpora.INDEX).unlink()  # as corpora of before had none
    assert next(corpora.documents(directory, 57)) == every[57]


def test_a_corpus_that_came_as_tokens_is_read_from_them(client: TestClient) -> None:
    page = client.get("/corpora/made").text
    assert "It came as tokens" in page
    assert "&lt;Second&gt;" in page
    assert client.get("/corpora/made/0/text").text == "The harbour is cold\n ships sail to seaThe harbour is cold."


@pytest.mark.parametrize("path", ["/corpora/nope", "/corpora/made/2", "/corpora/made/x", "/corpora/made/9999999999"])
def test_what_is_not_there_is_said(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_job_reads_what_was_sent_and_forgets_it(filled: Catalog, settings: Settings) -> None:
    sent = uploads.fresh(settings, "corpus")
    sent.mkdir()
    (sent / "rows.jsonl").write_bytes(LINES)
    spec = CorpusSpec.model_validate({"name": "rows", "path": str(sent), **COLUMNS})
    sessions = db.sessions(db.connect(settings))
    with sessions.begin() as session:
        job_id = jobs.submit(session, settings, "corpus", "", spec.model_dump(mode="json")).id
    settings.job_dir(job_id).mkdir(parents=True)
    context = JobContext(settings, sessions, job_id, spec.model_dump(mode="json"), settings.job_dir(job_id))
    kind = AddCorpus()
    for _ in range(2):  # as after a crash behind the step
        for step in kind.plan(context):
            kind.run(context, step)
    result = kind.finish(context)
    assert result == {
        "url": "/corpora/rows",
        "name": "rows",
        "documents": 2,
        "characters": sum(len(r["body"]) for r in ROWS),
    }
    assert not sent.exists()
    with context.sessions() as session:
        assert session.scalars(select(Corpus.name)).all() == ["made", "rows"]
