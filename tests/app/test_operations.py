"""Metrics, readiness and the admin's page: true figures, bounded labels, and nothing for strangers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from app import db, jobs
from app.main import create_app
from app.settings import Settings
from app.tables import Beat, JobState, now
from app.web.measures import allowed
from tests.app.conftest import Live
from tests.conftest import Catalog


@pytest.fixture
def busy(filled: Catalog, settings: Settings) -> Iterator[TestClient]:
    """Two queued jobs, a failed one, a live trainer and a silent one."""
    engine = db.connect(settings)
    with db.sessions(engine).begin() as session:
        jobs.submit(session, settings, "harvest", "first", {})
        jobs.submit(session, settings, "train", "second", {})
        broken = jobs.submit(session, settings, "train", "third", {})
        broken.state, broken.error = JobState.FAILED, "<script>alert(1)</script> was the reason"
        session.add(Beat(executor="gpu-box-0", host="gpu-box", pid=41, at=now(), job_id=1))
        session.add(Beat(executor="gpu-box-1", host="gpu-box", pid=42, at=now().replace(year=2020), job_id=None))
    engine.dispose()
    logs = settings.data_dir / "logs"
    logs.mkdir()
    (logs / "web.log").write_text(
        "2026-11-25T15:00:00.1Z [info     ] request path=/fine\n"
        "2026-11-25T15:00:01.1Z [error    ] failed path=/<b>bold</b> request_id=r-1\n"
        '{"event": "sweep failed", "level": "warning", "timestamp": "2026-11-25T15:00:02.1Z", "process": "trainer", '
        '"exception": "Traceback\\n  File\\nOperationalError: locked"}\n'
        '{"event": "request", "level": "info", "timestamp": "2026-11-25T15:00:03.1Z"}\n{"broken\n{"level": []}\n'
    )
    with TestClient(create_app(settings), base_url="http://localhost:3000", client=("127.0.0.1", 5)) as opened:
        yield opened


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Every sample by name and label values."""
    families = text_string_to_metric_families(text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_metrics_say_what_was_asked_and_what_waits(busy: TestClient) -> None:
    for path in ("/tiny/1-demo/3", "/tiny/1-demo/4", "/tiny/1-demo/99", "/no/such", "/api/feature/tiny/1-demo/3"):
        busy.get(path)
    busy.get("/static/app.css")
    busy.get("/", headers={"host": "evil.example"})
    answer = busy.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.text)
    route = "/{model}/{source}/{index}"
    assert found["sae_atlas_requests_total", "GET", route, "200"] == 2
    assert found["sae_atlas_requests_total", "GET", route, "404"] == 1
    assert found["sae_atlas_request_seconds_count", "GET", route] == 3
    assert found["sae_atlas_requests_total", "GET", "/api/feature/{model}/{source}/{index}", "200"] == 1
    assert found["sae_atlas_requests_total", "GET", "/static", "200"] == 1
    assert found["sae_atlas_requests_total", "GET", "none", "400"] == 1
    assert found["sae_atlas_jobs", "queued"] == 2
    assert found["sae_atlas_jobs", "failed"] == 1
    assert found["sae_atlas_jobs", "paused"] == 0
    assert found["sae_atlas_jobs_waiting", "harvest"] == 1
    assert found[("sae_atlas_trainers_alive",)] == 1
    assert found["sae_atlas_trainer_silent_seconds", "gpu-box-1"] > 1e6
    assert found["sae_atlas_disk_bytes", "SAEs"] > 100
    assert found[("sae_atlas_worker_up",)] == 0


def test_labels_stay_bounded_however_many_addresses_are_tried(busy: TestClient) -> None:
    for index in range(30):
        busy.get(f"/tiny/1-demo/{index}")
        busy.get(f"/nothing/{index}/{index}/{index}/{index}")
        busy.request(f"VERB{index}", "/")
    labels = {name[1:] for name in samples(busy.get("/metrics").text) if name[0] == "sae_atlas_requests_total"}
    assert len(labels) < 8


def test_metrics_of_a_real_worker(live: Live) -> None:
    live.post("activation/new", {"feature": {"modelId": "tiny", "source": "1-topk", "index": "3"}, "customText": "tin"})
    found = samples(live.http.get("/metrics").text)
    assert found[("sae_atlas_worker_up",)] == 1
    assert found["sae_atlas_worker_residents", "model"] >= 1
    assert 0 < found[("sae_atlas_worker_used_bytes",)] < found[("sae_atlas_worker_memory_bytes",)]
    assert "tiny" in live.http.get("/admin").text


@pytest.mark.parametrize(
    ("client", "headers", "token", "may"),
    [
        ("127.0.0.1", {}, "", True),
        ("::1", {}, "", True),
        ("10.0.0.7", {}, "", False),
        ("127.0.0.1", {"x-forwarded-for": "10.0.0.7"}, "", False),
        ("127.0.0.1", {"forwarded": "for=10.0.0.7"}, "", False),
        ("", {}, "", False),
        ("127.0.0.1", {}, "word", False),
        ("10.0.0.7", {"authorization": "Bearer word"}, "word", True),
        ("10.0.0.7", {"authorization": "Bearer wörd"}, "word", False),
        ("10.0.0.7", {"authorization": "Bearer "}, "word", False),
        ("10.0.0.7", {"authorization": "Bearer "}, "", False),
    ],
)
def test_strangers_may_not_scrape(client: str, headers: dict[str, str], token: str, may: bool) -> None:
    from starlette.datastructures import Headers

    assert allowed(Headers(headers), client, token) is may


def test_a_scraper_with_the_token_needs_no_host_of_ours(filled: Catalog, settings: Settings) -> None:
    app = create_app(settings.changed(metrics_token="a-long-word"))
    with TestClient(app, base_url="http://web-2:3000", client=("10.0.0.7", 5)) as scraper:
        assert scraper.get("/metrics", headers={"authorization": "Bearer a-long-word"}).status_code == 200
        assert scraper.get("/metrics", headers={"authorization": "Bearer other"}).status_code == 403
        assert scraper.get("/metrics").status_code == 400
        assert scraper.get("/", headers={"authorization": "Bearer a-long-word"}).status_code == 400
    assert "a-long-word" not in repr(settings.changed(metrics_token="a-long-word"))


def test_readiness_names_all_parts(busy: TestClient) -> None:
    answer = busy.get("/readyz")
    parts = answer.json()["parts"]
    assert answer.status_code == 503
    assert list(parts) == ["database", "schema", "worker", "trainer", "disk"]
    assert (parts["database"], parts["schema"], parts["trainer"], parts["disk"]) == ("ok", "ok", "ok", "ok")


def test_readiness_of_a_real_worker_does_not_wait_for_a_trainer(live: Live) -> None:
    answer = live.http.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["parts"]["trainer"] == "none runs: jobs wait"


def test_readiness_sees_a_schema_that_is_not_the_codes(busy: TestClient, settings: Settings) -> None:
    engine = db.connect(settings)
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    answer = busy.get("/readyz")
    assert answer.status_code == 503
    assert "newer than this code" in answer.json()["parts"]["schema"]


def test_the_admins_page_shows_processes_queue_disk_and_errors_as_text(busy: TestClient) -> None:
    page = busy.get("/admin").text
    for shown in ("trainer gpu-box-0", "silent", "2 queued", "1 failed", "1 harvest, 1 train", "SAEs", "/metrics"):
        assert shown in page, shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt; was the reason" in page
    assert "sweep failed OperationalError: locked" in page
    assert "path=/&lt;b&gt;bold&lt;/b&gt;" in page
    assert "path=/fine" not in page
    order = [page.index(words) for words in ("OperationalError: locked", "request_id=r-1")]
    assert order == sorted(order), "newest first"
    fragment = busy.get("/admin", headers={"hx-request": "true"}).text
    assert fragment.startswith('<div id="admin"')


def test_the_database_address_shows_no_password(filled: Catalog, settings: Settings) -> None:
    from app.web import admin

    asked = settings.changed(database_url="postgresql+psycopg://atlas:secret-word@db/atlas")
    assert "secret-word" not in str(admin.make_url(asked.catalog_url).render_as_string())


def test_metrics_and_admin_are_reserved_for_these_pages(busy: TestClient) -> None:
    assert busy.get("/admin/1-demo").status_code == 404
    assert re.search("no model|no page|No model", busy.get("/metrics/1-demo").text)
