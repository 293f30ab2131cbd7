"""Log lines carry the process, and the request or job they belong to."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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
