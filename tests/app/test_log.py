"""Log lines carry the process, and the request or job they belong to."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from app import db, people
from app.people import Role
from app.settings import Settings
from tests.conftest import Catalog

CODE = """
import logging, structlog
from app import log
from app.settings import Settings
log.configure(Settings(), "trainer")
with structlog.contextvars.bound_contextvars(request_id="r-1", job=7):
    log.get("x").info("step done", seconds=2)
    logging.getLogger("some.library").warning("careful")
    try:
        1 / 0
    except ZeroDivisionError:
        log.get("x").error("failed", exc_info=True)
log.get("x").debug("too much")
"""


def lines(**variables: str) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return result.stderr.splitlines()


def test_as_json_every_line_is_an_object_with_process_request_and_job() -> None:
    rows = [json.loads(line) for line in lines(SAE_ATLAS_LOG_FORMAT="json")]
    assert [row["event"] for row in rows] == ["step done", "careful", "failed"]
    assert all((row["process"], row["request_id"], row["job"]) == ("trainer", "r-1", 7) for row in rows)
    assert rows[0]["seconds"] == 2
    assert "ZeroDivisionError" in rows[2]["exception"]


def test_for_people_a_line_has_the_same_on_one_line() -> None:
    first = lines(SAE_ATLAS_LOG_FORMAT="console")[0]
    assert "step done" in first
    assert "request_id=r-1" in first
    assert "job=7" in first


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_a_teams_secrets_are_in_no_log_line(filled: Catalog, settings: Settings, tmp_path: Path, level: str) -> None:
    """Passwords, an invitation, a key, cookies, queries and texts go through a real server that logs all it does."""
    engine = db.connect(settings)
    with db.sessions(engine).begin() as session:
        people.add(session, "ada", "correct horse battery", Role.ADMIN)
        invitation = people.invite(session, Role.VIEWER)
    engine.dispose()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"DATA_DIR": settings.data_dir, "PORT": port, "TEAM": "1", "PUBLIC_URL": f"http://localhost:{port}"}
    given |= {"LOG_FORMAT": "json", "LOG_LEVEL": level, "METRICS_TOKEN": "scrape-word"}
    environment = os.environ | {f"SAE_ATLAS_{name}": str(value) for name, value in given.items()}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "app"], env=environment, stderr=log)
    secrets = ["correct horse battery", "wrong horse battery", invitation, "scrape-word", "word-of-the-query"]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            _until_up(http)
            http.post("/login", data={"name": "ada", "password": "wrong horse battery"})
            assert http.post("/login", data={"name": "ada", "password": "correct horse battery"}).status_code == 303
            secrets += list(http.cookies.values())
            made = http.post("/account/tokens", data={"name": "n", "role": "viewer", "days": "30"})
            key = re.search(r"atlas_[\w-]{20,}", made.text)
            assert key is not None
            secrets.append(key[0])
            assert http.get("/api/feature/tiny/1-demo/3", headers={"x-api-key": key[0]}).status_code == 200
            http.get(f"/invite/{invitation}")
            http.get("/search?q=word-of-the-query")
            assert http.get("/metrics", headers={"authorization": "Bearer scrape-word"}).status_code == 200
            http.post("/api/activation/new", json={"customText": "word-of-the-query"}, headers={"x-api-key": key[0]})
    finally:
        server.kill()
        server.wait()
    said = (tmp_path / "log").read_text()
    assert "/search" in said
    assert all(json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert [secret for secret in secrets if secret in said] == []


def _until_up(http: httpx.Client) -> None:
    for _ in range(600):
        try:
            if http.get("/healthz").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise AssertionError("the server did not start")
