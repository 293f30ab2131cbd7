"""/api/jobs: what programs see of the queue, and change in it."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from app import jobs
from app.settings import Settings
from app.tables import Job, JobLine, JobMetric, JobState


def submit(client: TestClient, owner: str = "ada", state: str = JobState.QUEUED, kind: str = "train") -> int:
    settings = Settings(owner=owner)
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        job = jobs.submit(session, settings, kind, f"{kind} something", {"k": 3})
        job.state = state
        return job.id


def ok(client: TestClient, path: str, **body: Any) -> dict[str, Any]:
    answer = client.post(f"/api/jobs/{path}", json=body) if body else client.get(f"/api/jobs/{path}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_jobs_are_listed_newest_first_with_their_places_and_by_state_kind_and_owner(client: TestClient) -> None:
    done, first = submit(client, state="done"), submit(client)
    other = submit(client, owner="bo", kind="harvest")
    everything = client.get("/api/jobs").json()
    assert [(job["id"], job["place"]) for job in everything["jobs"]] == [(other, 2), (first, 1), (done, None)]
    assert everything["trainers"] == []
    for query, ids in (
        ("state=done", [done]),
        ("kind=harvest", [other]),
        ("owner=ada", [first, done]),
        ("limit=1", [other]),
    ):
        assert [job["id"] for job in client.get(f"/api/jobs?{query}").json()["jobs"]] == ids


def test_a_job_is_paused_resumed_cancelled_and_moved(client: TestClient) -> None:
    first, second = submit(client), submit(client)
    assert client.post(f"/api/jobs/{first}/pause").json()["state"] == "paused"
    assert client.post(f"/api/jobs/{first}/resume").json()["state"] == "queued"
    assert ok(client, f"{second}/priority", priority=3)["place"] == 1
    moved = ok(client, f"{first}/priority", next=True)
    assert (moved["place"], moved["runNext"]) == (1, True)
    assert client.post(f"/api/jobs/{first}/cancel").json()["state"] == "cancelled"
    refused = client.post(f"/api/jobs/{first}/priority", json={"next": True})
    assert (refused.status_code, refused.json()["error"]) == (
        409,
        f"Job {first} is cancelled; only the place of a job that waits can be changed.",
    )


def test_a_log_is_read_on_from_its_last_line(client: TestClient) -> None:
    number = submit(client, state="running")
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        jobs.write_lines(session, [JobLine(job_id=number, level="info", text=f"line {n}") for n in range(3)])
        session.add(JobMetric(job_id=number, step=4, values={"loss": 0.5}))
    read = ok(client, f"{number}/logs")
    assert [line["text"] for line in read["lines"]] == ["line 0", "line 1", "line 2"]
    assert ok(client, f"{number}/logs?after={read['last']}") == {"lines": [], "last": read["last"], "ended": False}
    assert ok(client, f"{number}/metrics") == {"points": [{"step": 4, "loss": 0.5}]}


def test_curves_are_thinned_on_request_and_keep_their_spikes(client: TestClient) -> None:
    number = submit(client, state="running")
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        for step in range(1_000):
            values = {"loss": 9.0 if step == 503 else 1.0} | ({"score": step / 7} if step % 100 == 0 else {})
            session.add(JobMetric(job_id=number, step=step, values=values))
    assert len(ok(client, f"{number}/metrics")["points"]) == 1_000
    points = ok(client, f"{number}/metrics?points=20")["points"]
    steps = [point["step"] for point in points]
    assert steps == sorted(set(steps))
    assert {0, 503, 999} <= {point["step"] for point in points if "loss" in point}
    assert sum("loss" in point for point in points) <= 23
    assert [point["score"] for point in points if "score" in point] == [step / 7 for step in range(0, 1_000, 100)]
    assert client.get(f"/api/jobs/{number}/metrics?points=3").status_code == 422


@pytest.mark.parametrize("number", ["0", "-1", "99", "abc", str(2**63), "1e3", "..%2f", "%00"])
@pytest.mark.parametrize("rest", ["", "/logs", "/metrics"])
def test_a_job_that_does_not_exist_is_not_found(client: TestClient, number: str, rest: str) -> None:
    answer = client.get(f"/api/jobs/{number}{rest}")
    assert answer.status_code == 404
    assert set(answer.json()) == {"error", "message"}


@pytest.mark.parametrize(
    "body", [{}, {"priority": 101}, {"priority": "high"}, {"priority": None}, {"priority": 1, "x": 2}, [], None]
)
def test_a_place_that_makes_no_sense_is_refused(client: TestClient, body: Any) -> None:
    number = submit(client)
    answer = client.post(f"/api/jobs/{number}/priority", json=body)
    assert answer.status_code == 422
    assert set(answer.json()) == {"error", "message"}


@pytest.mark.parametrize("query", ["limit=0", "limit=1e9", "state=asleep", "offset=-1", f"after={2**70}"])
def test_a_query_that_makes_no_sense_is_refused(client: TestClient, query: str) -> None:
    path = f"/api/jobs/{submit(client)}/logs" if "after" in query else "/api/jobs"
    assert client.get(f"{path}?{query}").status_code == 422


def test_the_page_orders_a_waiting_job_and_shows_its_log(client: TestClient) -> None:
    first, second = submit(client), submit(client)
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        session.get(Job, first).status = "waits"
        jobs.write_lines(session, [JobLine(job_id=second, level="warning", text="<b>odd</b> line")])
    page = client.get(f"/jobs/{second}").text
    assert "place 2" in page
    assert "&lt;b&gt;odd&lt;/b&gt; line" in page
    assert "place 1" in client.post(f"/jobs/{second}/priority", data={"next": "1"}).text
    assert client.post(f"/jobs/{second}/priority", data={"priority": "7"}).status_code == 200
    assert ok(client, str(second))["priority"] == 7
    for bad in ({"priority": "x"}, {"priority": "1000"}, {}):
        assert client.post(f"/jobs/{second}/priority", data=bad).status_code == 422
    log = client.get(f"/jobs/{second}/log.txt")
    assert log.headers["content-type"].startswith("text/plain")
    assert "WARNING <b>odd</b> line" in log.text
