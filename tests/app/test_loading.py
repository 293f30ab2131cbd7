"""A cold worker: pages say what is loading and go on by themselves; the SAE's page says where its weights are."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests import tiny as world
from tests.app.conftest import fill
from tests.tiny import WorkerProcess

HTMX = {"hx-request": "true"}


@pytest.fixture
def cold(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The application with a worker that has loaded nothing yet: importing torch's models alone takes it seconds."""
    made = world.make(tmp_path_factory.mktemp("cold"), tmp_path_factory.mktemp("hf"))
    # Without patience the first answer shows the loading, however fast the machine.
    settings = Settings(
        data_dir=made.data_dir, device="cpu", threads=1, request_seconds=20, loading_seconds=0, log_level="WARNING"
    )
    fill(settings)
    worker = WorkerProcess(settings)
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        client.app_state["worker"] = worker  # pyright: ignore[reportIndexIssue]
        yield client
    worker.stop()


def until(client: TestClient, path: str, sign: str, **data: str) -> str:
    """Ask as the page does by itself until a sign appears."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        text = client.post(path, data=data, headers=HTMX).text
        if sign in text:
            return text
        assert "Loading" in text, text
        time.sleep(0.2)
    raise TimeoutError(sign)


@pytest.mark.parametrize(
    ("path", "sign", "trigger"),
    [
        ("/tiny/prompt?sae=1-topk", 'class="window tokens"', "every 1s, submit"),
        ("/tiny/1-topk/3/try", 'class="answer"', "submit, every 1s"),
    ],
)
def test_a_page_says_what_is_loading_and_goes_on(cold: TestClient, path: str, sign: str, trigger: str) -> None:
    assert "not loaded; the gpu worker loads it when it is first asked" in cold.get("/tiny/1-topk/memory").text
    first = cold.post(path, data={"text": "the cat sat"}, headers=HTMX).text
    assert re.search(r'Loading <strong>tiny</strong> <progress max="\d+" value="\d+"', first), first
    assert "of 121.0 KiB" in first
    assert f'hx-trigger="{trigger}"' in first
    began = time.monotonic()
    assert cold.get("/tiny/1-topk/memory").status_code == 200
    assert time.monotonic() - began < 2, "loading must not stall other requests"
    assert trigger not in until(cold, path, sign, text="the cat sat")
    assert re.search(r"[\d.]+ KiB in memory; loaded in the gpu worker on cpu", cold.get("/tiny/1-topk/memory").text)


def test_a_page_asked_for_before_the_worker_listens_goes_on(cold: TestClient) -> None:
    worker: WorkerProcess = cold.app_state["worker"]  # pyright: ignore[reportIndexIssue]
    worker.stop()
    asked = {"data": {"text": "the cat sat"}, "headers": HTMX}
    assert "Starting the gpu worker" in cold.post("/tiny/prompt?sae=1-topk", **asked).text  # pyright: ignore
    successor = WorkerProcess(worker.settings)
    try:
        until(cold, "/tiny/prompt?sae=1-topk", 'class="window tokens"', text="the cat sat")
    finally:
        successor.stop()


def test_a_page_that_streams_asks_what_is_loading_until_nothing_is(cold: TestClient) -> None:
    asked = "/tiny/loading?source=1-topk&source=1-std"
    first = cold.post(asked, headers=HTMX)
    assert first.status_code == 200
    assert first.text.count("<progress") == 3
    deadline = time.monotonic() + 60
    while cold.post(asked, headers=HTMX).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert cold.post(asked, headers=HTMX).status_code == 204
    assert cold.post("/tiny/loading?source=9-none", headers=HTMX).status_code == 404
    assert cold.post("/none/loading").status_code == 404


def test_the_api_waits_for_the_loading_instead(cold: TestClient) -> None:
    body = {"feature": {"modelId": "tiny", "source": "1-topk", "index": 3}, "customText": "the cat"}
    assert cold.post("/api/activation/new", json=body).json()["tokens"]


def test_without_a_worker_the_page_says_so_and_the_size_is_still_known(cold: TestClient) -> None:
    cold.app_state["worker"].stop()  # pyright: ignore[reportIndexIssue]
    text = cold.get("/tiny/1-topk/memory").text
    assert re.search(r"[\d.]+ KiB in memory; the gpu worker does not answer", text)
    assert cold.get("/tiny/1-topk").status_code == 200
