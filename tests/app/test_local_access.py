"""A server without accounts: its own user comes in, others on the machine do not, a link lets one browser in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

from app import localkey, peers
from app.main import create_app
from app.settings import Settings
from app.web.access import declared
from tests.app.conftest import listening
from tests.app.test_team_mode import routes_of
from tests.conftest import Catalog

FEATURE = "/api/feature/tiny/1-demo/3"


@pytest.fixture
def closed(filled: Catalog, settings: Settings) -> Iterator[TestClient]:
    """A server that lets in by its link alone, and a browser that it does not know."""
    chosen = settings.model_copy(update={"local_access": "link"})
    with TestClient(
        create_app(chosen), base_url="http://localhost:3000", raise_server_exceptions=False, follow_redirects=False
    ) as client:
        yield client


@pytest.fixture(scope="module")
def served(filled_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real server on a real socket, as it is by default."""
    settings = Settings(data_dir=filled_directory, local_access="user", log_level="WARNING")
    with listening() as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning", proxy_headers=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_programs_of_the_user_who_runs_the_server_need_nothing(served: str) -> None:
    assert httpx.get(f"{served}/").status_code == 200
    assert httpx.get(f"{served}{FEATURE}", headers={"x-api-key": "any value"}).status_code == 200


def test_a_process_of_another_user_is_shown_how_to_open_it(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is really asked; it is this server that takes itself for somebody else's."""
    monkeypatch.setattr(peers.os, "geteuid", lambda: os.getuid() + 4321)
    page = httpx.get(f"{served}/tiny/1-demo/3")
    assert page.status_code == 401
    assert "sae-atlas url" in page.text
    assert "label number" not in page.text
    assert httpx.get(f"{served}{FEATURE}", headers={"x-api-key": "any value"}).status_code == 401
    assert httpx.get(f"{served}/healthz").status_code == 200


def test_a_connection_that_is_none_of_this_machine_is_nobodys() -> None:
    for client in [("192.0.2.7", 4000), ("testclient", 50000), ("127.0.0.1", 70_000), ("::1", 1), ("127.0.0.1", 1)]:
        assert not peers.of_this_user(client, ("127.0.0.1", 3000))


def test_a_stranger_gets_nothing_from_any_route_that_declares_a_role(closed: TestClient) -> None:
    tried = 0
    for route in routes_of(closed.app):
        if declared(list(route.dependencies)) == [None]:
            continue
        path = re.sub(r"\{[^}]+\}", "1", route.path)
        method = next(iter(route.methods - {"HEAD"}))
        prefixes = ("", "/api") if "/" not in path.strip("/") or route.include_in_schema else ("",)
        for prefix in prefixes:
            answer = closed.request(method, prefix + path)
            assert answer.status_code in (307, 401, 404, 405), f"{method} {prefix + path}: {answer.status_code}"
            tried += answer.status_code == 401
    assert tried > 90


def test_a_link_opens_one_browser_once(closed: TestClient) -> None:
    link = localkey.new_link(closed.app.state.settings)  # type: ignore[attr-defined]
    opened = closed.get("/open", params={"link": link})
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    flags = opened.headers["set-cookie"].lower()
    assert "httponly" in flags
    assert "samesite=lax" in flags
    assert closed.get("/tiny/1-demo/3").status_code == 200
    other = TestClient(closed.app, base_url="http://localhost:3000", follow_redirects=False)
    again = other.get("/open", params={"link": link})
    assert again.status_code == 401
    assert "unknown, used, or older" in again.text
    assert "set-cookie" not in again.headers


def test_a_whole_link_can_be_pasted_and_an_old_or_invented_one_opens_nothing(closed: TestClient) -> None:
    settings: Settings = closed.app.state.settings  # type: ignore[attr-defined]
    old = localkey.new_link(settings)
    [file] = (settings.data_dir / "run" / "links").iterdir()
    long_ago = time.time() - localkey.LINK_HOURS * 3600 - 1
    os.utime(file, (long_ago, long_ago))
    for secret in (old, "", "../../local.key", "x" * 5000, "\x00"):
        assert closed.get("/open", params={"link": secret}).status_code == 401
    pasted = f"http://127.0.0.1:3000/open?link={localkey.new_link(settings)} "
    assert closed.get("/open", params={"link": pasted}).status_code == 303


def test_a_program_sends_the_token_until_it_is_renewed(closed: TestClient) -> None:
    settings: Settings = closed.app.state.settings  # type: ignore[attr-defined]
    token = localkey.api_token(settings)
    for headers in ({"X-API-KEY": token}, {"authorization": f"Bearer {token}"}):
        assert closed.get(FEATURE, headers=headers).status_code == 200
    assert closed.get(FEATURE, headers={"x-api-key": token[:-1] + "_"}).status_code == 401
    assert closed.get(FEATURE, headers={"x-api-key": localkey.cookie(settings)}).status_code == 401
    closed.get("/open", params={"link": localkey.new_link(settings)})
    assert closed.get(FEATURE).status_code == 200
    localkey.renew(settings)
    assert closed.get(FEATURE).status_code == 401
    assert closed.get(FEATURE, headers={"x-api-key": token}).status_code == 401


def test_two_processes_that_need_the_key_first_end_up_with_one(settings: Settings) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(localkey.api_token(settings))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_nobody_else_can_read_the_key_or_the_links(settings: Settings) -> None:
    localkey.api_token(settings)
    localkey.new_link(settings)
    run = settings.data_dir / "run"
    assert (run / "local.key").stat().st_mode & 0o077 == 0
    assert (run / "links").stat().st_mode & 0o077 == 0
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


def test_the_commands_print_what_opens_it(settings: Settings) -> None:
    environment = os.environ | {"SAE_ATLAS_DATA_DIR": str(settings.data_dir)}

    def said(*words: str, **more: str) -> str:
        command = [sys.executable, "-m", "app.cli", *words]
        done = subprocess.run(command, env=environment | more, capture_output=True, text=True, timeout=120)
        return (done.stdout + done.stderr).strip()

    found = re.fullmatch(r"http://127\.0\.0\.1:3000/open\?link=(\S+)", said("url"))
    assert found is not None
    assert localkey.use_link(settings, found[1])
    assert said("token") == localkey.api_token(settings)
    before = localkey.api_token(settings)
    assert said("token", "--renew") == localkey.api_token(settings) != before
    assert "/account" in said("token", SAE_ATLAS_TEAM="1")


def test_anyone_on_the_machine_may_be_let_in_on_purpose(client: TestClient) -> None:
    assert client.app.state.settings.local_access == "anyone"  # type: ignore[attr-defined]
    assert client.get("/").status_code == 200
