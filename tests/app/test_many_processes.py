"""Two web processes, two trainers, one Postgres: a team's logins, tokens, jobs and live pages are the same on each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from app import db, jobqueue, people
from app.people import Role
from app.settings import Settings
from app.tables import Job
from tests import conftest
from tests.app.conftest import listening
from tests.workers.waiting_trainer import STEPS

PASSWORD = "four random words here"
REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Fleet:
    settings: Settings
    scratch: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])
    logs: list[Path] = field(default_factory=list[Path])

    def start(self, name: str, module: str, **more: str) -> None:
        log = self.scratch / f"{name}.log"
        given = {f"SAE_ATLAS_{k.upper()}": str(v) for k, v in self.settings.model_dump(exclude_unset=True).items()}
        environment = os.environ | given | more
        with log.open("ab") as out:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module], cwd=REPOSITORY, env=environment, stdout=out, stderr=out
                )
            )
        self.logs.append(log)

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 180) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for process, log in zip(self.processes, self.logs, strict=True):
                assert process.poll() is None, f"{log.name} ended:\n{log.read_text()[-3000:]}"
            if found := condition():
                return found
            time.sleep(0.1)
        said = "\n".join(f"== {log.name}\n{log.read_text()[-2000:]}" for log in self.logs)
        raise AssertionError(f"not within {seconds:g} s: {what}\n{said}")

    def stop(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass
class Team:
    """The addresses of both web processes, and the trainers' leash."""

    fleet: Fleet
    first: str
    second: str

    def browser(self, at: str) -> httpx.Client:
        """A browser on one of the web processes; `moved` takes its cookies to the other."""
        return httpx.Client(base_url=at, timeout=60)

    def moved(self, browser: httpx.Client, to: str) -> httpx.Client:
        return httpx.Client(base_url=to, cookies={c.name: c.value or "" for c in browser.cookies.jar}, timeout=60)

    def let_go(self, job: int, step: int) -> None:
        (self.fleet.settings.data_dir / f"go-{job}-step-{step}").touch()


@pytest.fixture(scope="module")
def team(postgres_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    url = sa.engine.make_url(postgres_server).set(drivername="postgresql+psycopg")
    with sa.create_engine(url, isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(sa.text("DROP DATABASE IF EXISTS fleet"))
        connection.execute(sa.text("CREATE DATABASE fleet"))
    scratch: Path = tmp_path_factory.mktemp("fleet")
    settings = Settings(
        data_dir=scratch / "data",
        database_url=url.set(database="fleet").render_as_string(hide_password=False),
        team=True,
        public_url="http://localhost:3000",
        beat_seconds=0.5,
    )
    engine = db.connect(settings)
    db.migrate(engine)
    jobqueue.prepare(settings)
    with db.sessions(engine).begin() as session:
        conftest.fill(session, settings)
        for role in Role:
            people.add(session, f"a-{role}", PASSWORD, role)
    # The second SAE gets weights too, so that its map can be asked for.
    conftest.write_weights(settings.sae_dir("cc") / "sae_weights.safetensors")
    engine.dispose()
    fleet = Fleet(settings, scratch)
    ports = []
    for _ in range(2):
        with listening() as listener:
            ports.append(listener.getsockname()[1])
    try:
        for number, port in enumerate(ports):
            fleet.start(f"web-{number}", "app", SAE_ATLAS_PORT=str(port))
            fleet.start(f"trainer-{number}", "tests.workers.waiting_trainer", SAE_ATLAS_SLOT=str(number))
        addresses = [f"http://127.0.0.1:{port}" for port in ports]
        for address in addresses:
            fleet.until(lambda address=address: answers(address), f"{address} answers")
        yield Team(fleet, *addresses)
    finally:
        fleet.stop()


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def signed_in(team: Team, at: str, name: str) -> httpx.Client:
    browser = team.browser(at)
    assert browser.post("/login", data={"name": name, "password": PASSWORD}).status_code == 303
    return browser


def test_a_login_on_one_holds_on_the_other_until_it_is_ended_on_either(team: Team) -> None:
    here = signed_in(team, team.first, "a-editor")
    there = team.moved(here, team.second)
    assert "a-editor" in there.get("/account").text
    assert there.post("/logout").status_code == 303
    for browser in (here, there, team.moved(here, team.second)):
        assert browser.get("/account").status_code == 303


def test_a_token_made_on_one_counts_on_the_other_until_it_is_revoked(team: Team) -> None:
    here = signed_in(team, team.first, "a-editor")
    made = here.post("/account/tokens", data={"name": "notebook", "role": "editor", "days": "1"}).text
    key = re.search(r"atlas_[\w-]{20,}", made)
    assert key is not None

    def asked() -> int:
        return httpx.get(f"{team.second}/api/models", headers={"x-api-key": key[0]}).status_code

    assert asked() == 200
    number = re.search(r"/account/tokens/(\d+)/revoke", made)
    assert number is not None
    assert here.post(number[0]).status_code == 303
    assert asked() == 401


def test_a_disabled_person_is_out_everywhere(team: Team) -> None:
    viewer = signed_in(team, team.second, "a-viewer")
    admin = signed_in(team, team.first, "a-admin")
    row = re.search(r'a-viewer.*?action="(/people/\d+/disable)"', admin.get("/people").text, re.DOTALL)
    assert row is not None
    assert admin.post(row[1]).status_code == 303
    assert viewer.get("/account").status_code == 303
    assert team.browser(team.second).post("/login", data={"name": "a-viewer", "password": PASSWORD}).status_code == 401
    assert admin.post(row[1].replace("disable", "enable")).status_code == 303


def test_jobs_asked_for_on_one_are_shared_by_both_trainers_and_seen_moving_on_the_other(team: Team) -> None:
    here = signed_in(team, team.first, "a-editor")
    there = team.moved(here, team.second)
    jobs = []
    for source in ("1-demo", "1-other"):
        asked = here.post(f"/tiny/{source}/map")
        assert asked.status_code == 303, asked.text
        jobs.append(int(asked.headers["location"].rpartition("/")[2]))

    def state(job: int) -> dict[str, Any]:
        return there.get(f"/api/jobs/{job}").json()

    until = team.fleet.until
    until(lambda: all(state(job)["state"] == "running" for job in jobs), "both jobs run at once, one on each trainer")
    fragment = {"hx-request": "true"}
    for job in jobs:
        page = there.get(f"/jobs/{job}", headers=fragment).text
        assert " data-moving" in page, "the page goes on asking while the job runs"
    for step in range(STEPS - 1):
        for job in jobs:
            team.let_go(job, step)
        share = f"{round(100 * (step + 1) / STEPS)}"
        for job in jobs:
            until(
                lambda job=job, share=share: re.search(
                    rf"\b{share}\s?%", there.get(f"/jobs/{job}", headers=fragment).text
                ),
                f"job {job} shows {share} % on the other process",
            )
    assert there.post(f"/api/jobs/{jobs[0]}/cancel").status_code == 200
    team.let_go(jobs[1], STEPS - 1)
    until(lambda: [state(job)["state"] for job in jobs] == ["cancelled", "done"], "one cancelled, one done")
    ended = here.get(f"/jobs/{jobs[1]}", headers=fragment).text
    assert " data-moving" not in ended, "a job that ended is asked for no more"
    with db.sessions(db.connect(team.fleet.settings))() as session:
        executors = {session.get_one(Job, job).executor for job in jobs}
        owners = {session.get_one(Job, job).owner for job in jobs}
    assert len(executors) == 2
    assert owners == {"a-editor"}
