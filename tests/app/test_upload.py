"""Adding an SAE through the browser's form, and removing one: what is refused leaves nothing behind."""

from __future__ import annotations

import json
import pickle
import struct
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy import func, select
from starlette.testclient import TestClient

from app import db, harvests, trash
from app.main import create_app
from app.settings import Settings
from app.tables import Evidence, Explanation, Feature, Harvest, Job, Source, Trash
from app.web import multipart
from app.weights import CONFIG, WEIGHTS
from tests.app.conftest import listening
from tests.app.test_weights import config, encode, tensors
from tests.conftest import Catalog


def weights_file(**changes: Any) -> bytes:
    header, data = encode(tensors(**changes))
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


GOOD = weights_file()
JSON = {"accept": "application/json"}


def send(
    client: TestClient, files: dict[str, bytes], headers: dict[str, str] | None = None, **fields: str
) -> httpx.Response:
    parts = [("files", (name, content, "application/octet-stream")) for name, content in files.items()]
    return client.post(
        "/upload",
        data={"model": "tiny", "set_name": "up"} | fields,
        files=parts,
        headers=headers,
        follow_redirects=False,
    )


def sae(cfg: Any = None, weights: bytes = GOOD) -> dict[str, bytes]:
    return {
        CONFIG: cfg if isinstance(cfg, bytes) else json.dumps(config() if cfg is None else cfg).encode(),
        WEIGHTS: weights,
    }


def n_sources(settings: Settings) -> int:
    with db.sessions(db.connect(settings))() as session:
        return session.scalar(select(func.count()).select_from(Source)) or 0


def stored(settings: Settings) -> set[str]:
    return {path.name for path in (settings.data_dir / "saes").iterdir()}


def test_an_uploaded_sae_is_stored_catalogued_and_checked(client: TestClient, settings: Settings) -> None:
    before = stored(settings)
    answer = send(client, sae())
    assert (answer.status_code, answer.headers["location"]) == (303, "/tiny/1-up")
    page = client.get("/tiny/1-up").text
    assert "It is being checked on real text" in page
    # The page asks for this line again and again; what it gets must hold it.
    polled = client.get("/tiny/1-up", headers={"hx-request": "true", "hx-target": "p#check"}).text
    assert 'id="check"' in polled
    with db.sessions(db.connect(settings))() as session:
        source = harvests.source_named(session, "tiny", "1-up")
        job = session.scalars(select(Job)).one()
    assert (job.kind, job.spec["source"]) == ("validate", "1-up")
    assert stored(settings) - before == {source.sae_hash}
    assert (settings.sae_dir(source.sae_hash) / WEIGHTS).read_bytes() == GOOD


def test_a_script_gets_the_address_and_a_folder_may_be_sent(client: TestClient) -> None:
    files = {f"checkpoints/final/{name}": content for name, content in sae().items()}
    answer = send(client, files | {"checkpoints/final/notes.txt": b"x"}, JSON)
    assert answer.json() == {"url": "/tiny/1-up"}


def test_the_same_sae_again_leads_to_its_page_and_another_is_refused(client: TestClient, settings: Settings) -> None:
    send(client, sae())
    assert send(client, sae()).headers["location"] == "/tiny/1-up"
    assert n_sources(settings) == 4
    other = send(client, sae(config(apply_b_dec_to_input=False)), JSON)
    assert other.status_code == 409
    assert "Choose another set name" in other.json()["message"]


REFUSED: dict[str, tuple[dict[str, bytes], str]] = {
    "1 a pickle": ({"sae.pt": pickle.dumps(1), CONFIG: b"{}"}, "is a pickle"),
    "1 a renamed pickle": (sae(weights=pickle.dumps([1] * 99, protocol=2)), "renamed pickle"),
    "2 a huge header": (sae(weights=struct.pack("<Q", 2**62) + b"{}"), "header claims"),
    "3 truncated": (sae(weights=GOOD[:-1]), "cut off"),
    "3 trailing": (sae(weights=GOOD + b"x"), "follow the last tensor"),
    "4 duplicate keys": (sae(weights=struct.pack("<Q", 15) + b'{"a":1,"a":2}  '), "twice"),
    "5 too wide": (sae(config(d_sae=2**40)), "whole number from 1 to"),
    "6 the wrong width": (sae(config(d_in=4)), "d_in = 4"),
    "7 a tensor too many": (sae(weights=weights_file(more=tensors()["b_dec"])), "holds 'more' too"),
    "8 not a number": (sae(weights=weights_file(b_dec=tensors()["b_dec"] * float("nan"))), "NaN"),
    "9 unknown": (sae(config(architecture="magic")), "'magic' is not known"),
    "9 k of 0": (sae(config(architecture="topk", k=0)), "k is 0"),
    "9 deep": (sae(b"[" * 10_000 + b"]" * 10_000), "nested"),
    "9 a large config": (sae(b" " * 3_000_000), "at most 1,048,576"),
    "10 a path": (sae(config(dataset="../../etc/passwd")), "names a place"),
    "no weights": ({CONFIG: b"{}"}, "The upload holds cfg.json, but no weights"),
    "nothing": ({"readme.txt": b"x"}, "No SAE was sent"),
    "layer": (sae(config(metadata={"hook_name": "blocks.9.hook_resid_post"})), "layers 0 to 2"),
    "twice": ({f"a/{CONFIG}": b"{}", f"b/{CONFIG}": b"{}"}, "sent twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why_and_leaves_nothing(client: TestClient, settings: Settings, name: str) -> None:
    files, sentence = REFUSED[name]
    before = stored(settings)
    answer = send(client, files, JSON)
    assert answer.status_code == 422
    assert sentence in answer.json()["message"]
    page = send(client, files)
    assert page.status_code == 422
    assert "Add an SAE" in page.text
    assert (stored(settings), n_sources(settings)) == (before, 3)


@pytest.mark.parametrize(("field", "value", "status"), [("model", "none", 404), ("set_name", "../x", 422)])
def test_a_field_that_names_nothing_is_refused(client: TestClient, field: str, value: str, status: int) -> None:
    assert send(client, sae(), JSON, **{field: value}).status_code == status


def test_what_is_no_form_is_refused(client: TestClient) -> None:
    assert client.post("/upload", content=b"x", headers=JSON).status_code == 422
    broken = JSON | {"content-type": "multipart/form-data; boundary=b"}
    assert client.post("/upload", content=b"--b\r\nnonsense", headers=broken).status_code == 422


def test_another_sites_upload_and_removal_are_refused(client: TestClient) -> None:
    elsewhere = {"sec-fetch-site": "cross-site"}
    assert client.post("/upload", content=b"x", headers=elsewhere).status_code == 403
    assert client.post("/tiny/1-demo/remove", headers=elsewhere).status_code == 403


def test_an_upload_over_the_limit_is_refused_in_its_middle(filled: Catalog, settings: Settings) -> None:
    """In chunks, of unknown length, against a real server: 413 comes while the client still sends."""
    small = settings.model_copy(update={"max_sae_bytes": 2**20})
    before = stored(small)
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        head = f'--b\r\ncontent-disposition: form-data; name="files"; filename="{WEIGHTS}"\r\n\r\n'
        yield head.encode()
        for _ in range(400):
            sent += 2**20
            yield bytes(2**20)

    headers = JSON | {"content-type": "multipart/form-data; boundary=b"}
    with serving(small) as url:
        try:
            answer = httpx.post(f"{url}/upload", content=body(), headers=headers, timeout=20)
            assert answer.status_code == 413
            assert "1,048,576 bytes that SAE_ATLAS_MAX_SAE_BYTES allows" in answer.json()["message"]
        except httpx.TransportError:
            pass  # the server closes what it no longer reads, perhaps before the client looks for its answer
        assert 0 < sent < 400 * 2**20
        deadline = time.monotonic() + 5
        while stored(small) != before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (stored(small), n_sources(small)) == (before, 3)


def test_an_upload_that_says_it_is_too_large_is_refused_at_once(client: TestClient, settings: Settings) -> None:
    declared = str(settings.max_sae_bytes + multipart.SLACK_BYTES + 1)
    answer = client.post("/upload", content=b"x", headers=JSON | {"content-length": declared})
    assert answer.status_code == 413


@contextmanager
def serving(settings: Settings) -> Generator[str]:
    with listening() as listener:
        config = uvicorn.Config(create_app(settings), log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def test_a_removed_sae_is_gone_at_once_and_its_rows_and_weights_when_the_trash_is_emptied(
    client: TestClient, settings: Settings
) -> None:
    assert "Remove 1-demo</button>" in client.get("/tiny/1-demo").text
    answer = client.post("/tiny/1-demo/remove", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/tiny")
    assert client.get("/tiny/1-demo").status_code == 404
    assert client.get("/tiny").status_code == 200
    assert settings.sae_dir("aa").exists()
    with db.sessions(db.connect(settings))() as session:
        assert trash.purge(session, settings, timedelta(0)) == 1
        left = [session.scalar(select(func.count()).select_from(t)) for t in (Feature, Evidence, Harvest, Explanation)]
        assert session.scalars(select(Source.name).where(Source.is_default)).all() == ["1-other"]
    assert left == [0, 0, 0, 0]
    assert not settings.sae_dir("aa").exists()
    assert client.post("/tiny/1-demo/remove").status_code == 404


def test_weights_that_another_source_uses_stay(client: TestClient, settings: Settings) -> None:
    send(client, sae())
    send(client, sae(), set_name="twin")
    with db.sessions(db.connect(settings))() as session:
        directory = settings.sae_dir(harvests.source_named(session, "tiny", "1-up").sae_hash)
    assert "Its weights stay: tiny/1-twin uses them too" in client.get("/tiny/1-up").text
    client.post("/tiny/1-up/remove")
    client.post("/tiny/1-twin/remove")
    with db.sessions(db.connect(settings))() as session:
        assert trash.purge(session, settings) == 0
        assert directory.is_dir(), "both can still be restored"
        oldest = session.scalars(select(Trash).order_by(Trash.id)).first()
        assert oldest is not None
        oldest.deleted_at -= timedelta(days=31)
        session.commit()
        assert trash.purge(session, settings) == 1
        assert directory.is_dir(), "the other one needs them"
        assert trash.purge(session, settings, timedelta(0)) == 1
    assert not directory.exists()


def test_an_sae_added_while_its_weights_are_being_removed_keeps_them(client: TestClient, settings: Settings) -> None:
    """The removal has decided that nobody uses the weights, and has not committed yet."""
    send(client, sae())
    with db.sessions(db.connect(settings))() as session:
        directory = settings.sae_dir(harvests.source_named(session, "tiny", "1-up").sae_hash)
        harvests.remove_source(session, settings, "tiny", "1-up")
        adding = threading.Thread(target=lambda: send(client, sae(), set_name="twin"))
        adding.start()
        adding.join(0.3)
        assert adding.is_alive(), "it waits for the removal"
        assert directory.is_dir()
        session.commit()
        assert not directory.exists()
    adding.join(20)
    assert (directory / WEIGHTS).read_bytes() == GOOD
    assert client.get("/tiny/1-twin").status_code == 200


@pytest.mark.parametrize("ending", ["rollback", "close"])
def test_a_removal_that_does_not_commit_keeps_the_weights_and_lets_go(
    client: TestClient, settings: Settings, ending: str
) -> None:
    send(client, sae())
    session = db.sessions(db.connect(settings))()
    directory = settings.sae_dir(harvests.source_named(session, "tiny", "1-up").sae_hash)
    harvests.remove_source(session, settings, "tiny", "1-up")
    getattr(session, ending)()
    session.commit()
    assert directory.is_dir()
    assert send(client, sae(), set_name="twin").status_code == 303


def test_a_mismatch_is_called_out_on_the_page(client: TestClient, settings: Settings) -> None:
    with db.sessions(db.connect(settings)).begin() as session:
        source = harvests.source_named(session, "tiny", "1-demo")
        found = {"verdict": "mismatch", "findings": ["Worse than <the> mean."], "corpus": "c", "n_tokens": 9_999}
        source.metrics = {**source.metrics, "validation": found}
    page = client.get("/tiny/1-demo").text
    assert "Does not fit its model." in page
    assert "Worse than &lt;the&gt; mean." in page
    assert "9,999 tokens of c" in page


def test_the_form_offers_models_and_is_linked(client: TestClient) -> None:
    page = client.get("/upload?model=tiny").text
    assert '<option value="tiny" selected>' in page
    assert 'href="/upload"' in client.get("/").text


def test_the_upload_writes_only_into_the_data_directory(client: TestClient, tmp_path: Path) -> None:
    before = set(tmp_path.rglob("*"))
    send(client, {f"../../{CONFIG}": b"{}", "..": b"x", "/etc/cfg.json.json": b"x"}, JSON)
    assert {path for path in tmp_path.rglob("*") if path.suffix == ".json"} <= before
