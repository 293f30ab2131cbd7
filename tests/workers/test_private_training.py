"""A private training from its form to its dashboards, with a real trainer: what it makes is nobody else's to see."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fastapi import FastAPI
from sqlalchemy import select
from starlette.testclient import TestClient

from app import people
from app.main import create_app
from app.people import Role
from app.settings import Settings
from app.tables import Harvest, Job, JobState, Source
from app.visibility import Visibility
from tests.app.test_team_mode import routes_of
from tests.workers import test_train

PUBLIC = "http://localhost:3000"
settings = test_train.settings
TRAINING = {
    **{"model": "tiny", "corpus": "c", "hook": "hook_resid_post", "layer": "1", "set_name": "okapi", "k": "4"},
    **{"d_sae": "48", "context_size": "16", "batch_size": "256", "n_tokens": "6000", "n_eval_tokens": "1000"},
    **{"harvest_tokens": "2000", "visibility": "private"},
}


@dataclass
class Team:
    app: FastAPI
    keys: dict[str, str]

    def as_(self, name: str) -> TestClient:
        client = TestClient(self.app, base_url=PUBLIC, raise_server_exceptions=False, follow_redirects=False)
        client.headers["x-api-key"] = self.keys[name]
        return client

    def until_all_ended(self, seconds: float = 300) -> list[Job]:
        """Return all jobs, whosever they are, once the training's harvest and what that queued are through."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self.app.state.sessions() as session:
                jobs = list(session.scalars(select(Job).order_by(Job.id)))
            if {job.kind for job in jobs} >= {"train", "harvest"} and all(JobState(job.state).ended for job in jobs):
                return jobs
            assert not any(job.state == JobState.FAILED for job in jobs), [job.error for job in jobs]
            time.sleep(0.1)
        raise AssertionError("the jobs did not end in time")


@pytest.fixture
def team(settings: Settings) -> Iterator[Team]:
    app = create_app(settings.model_copy(update={"team": True, "public_url": PUBLIC}))
    with TestClient(app, base_url=PUBLIC):
        with app.state.sessions.begin() as session:
            keys: dict[str, str] = {}
            for name, role in (("ada", Role.EDITOR), ("bob", Role.EDITOR), ("vic", Role.VIEWER)):
                person = people.add(session, name, "four random words here", role)
                keys[name] = people.add_token(session, person, "test", role, None)
        yield Team(app, keys)


def test_a_private_training_its_sae_and_its_harvest_are_seen_by_their_owner_alone(
    team: Team, settings: Settings
) -> None:
    ada = team.as_("ada")
    queued = ada.post("/train", data=TRAINING)
    assert queued.status_code == 303, queued.text
    trainer = test_train.start(settings)
    try:
        made = team.until_all_ended()
    finally:
        trainer.terminate()
        trainer.wait(60)
    assert [job.state for job in made] == [JobState.DONE] * len(made), [job.error for job in made]
    # Labels are nobody's in particular: what learns their meaning names none.
    told, shared = [job for job in made if job.kind != "embed"], [job for job in made if job.kind == "embed"]
    assert [job.kind for job in told] == ["train", "harvest", "map"]
    assert {(job.owner, job.visibility) for job in told} == {("ada", Visibility.PRIVATE)}
    with team.app.state.sessions() as session:
        source = session.scalars(select(Source)).one()
        harvest = session.scalars(select(Harvest)).one()
    assert (source.name, source.owner, source.visibility) == ("1-okapi", "ada", Visibility.PRIVATE)
    numbers = {"job_id": made[0].id, "number": harvest.id}
    assert "1-okapi" in ada.get("/tiny").text
    assert "1-okapi" in ada.get(queued.headers["location"]).text
    assert ada.get("/tiny/1-okapi/0").status_code == 200
    for name, refused in (("bob", {404}), ("vic", {403, 404})):
        other = team.as_(name)
        _sees_nothing(team.app, other, ada, numbers, refused)
        for job in told:
            assert other.get(f"/jobs/{job.id}").status_code == 404, job.title
            assert other.get(f"/api/jobs/{job.id}").status_code == 404, job.title
        assert [job["id"] for job in other.get("/api/jobs").json()["jobs"]] == [job.id for job in shared]
    link = ada.post("/api/share", json={"kind": "sae", "id": str(source.id), "visibility": "team"})
    assert link.status_code == 200, link.text
    assert team.as_("bob").get("/tiny/1-okapi/0").status_code == 200, "once it is shared, the same address opens"


def _sees_nothing(app: FastAPI, other: TestClient, ada: TestClient, numbers: dict[str, int], refused: set[int]) -> None:
    """Ask every page and read of the API for it, and the searches."""
    key = {"model": "tiny", "source": "1-okapi", "index": "0", "modelId": "tiny", "layer": "1-okapi", **numbers}
    hidden, opened = 0, 0
    for route in routes_of(app):
        if "GET" not in (route.methods or ()) or route.path in ("/readyz", "/metrics", "/events"):
            continue
        path = re.sub(r"\{(\w+)(?::\w+)?\}", lambda found: str(key.get(found[1], "unknown")), route.path)
        if path.startswith("/vectors"):
            continue  # their numbers are not the harvest's
        answer = other.get(path)
        assert answer.status_code < 500, f"{path}: {answer.status_code}"
        if any(part in route.path_format for part in ("{source}", "{job_id}", "{number}")) and "unknown" not in path:
            hidden += 1
            # 403: a viewer may not ask for this of any SAE.
            assert answer.status_code in refused, f"{path}: {answer.status_code}"
            opened += ada.get(path).status_code < 400
        elif "{source}" not in route.path_format:  # a page that is not there says what was asked
            assert "okapi" not in answer.text, path
    assert hidden > 20
    assert opened > 10, "its owner opens what others cannot, or this asks for nothing"
    for path in ("/search?q=okap", "/palette?q=okap", "/jobs?q=okap", "/train?model=tiny", "/tiny?set=okap", "/"):
        assert "1-okapi" not in other.get(path).text, path
    one = {"modelId": "tiny", "layer": "1-okapi", "source": "1-okapi", "index": "0"}
    for path, body in (
        ("/api/features", [one]),
        ("/api/activation/get", one),
        ("/api/explanation/search", {"modelId": "tiny", "layers": ["1-okapi"], "query": "okapi"}),
        ("/api/explanation/search-all", {"query": "okapi"}),
        ("/api/model/list", {}),
    ):
        missing = other.post(path, json=json.loads(json.dumps(body).replace("okapi", "okopi")))
        assert other.post(path, json=body).text.replace("okapi", "okopi") == missing.text, path
