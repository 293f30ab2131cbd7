"""Bad inputs of hazards.md that reach the web: 16, 17, 18, 20, 24, 25. None is a 500, and no text becomes markup."""

from __future__ import annotations

import html
import json
import logging
import re
from collections.abc import Iterator

import pytest
import structlog
from starlette.datastructures import Headers
from starlette.testclient import TestClient

from app import catalog, log
from app.settings import Settings
from app.web.guard import cross_site, is_loopback
from tests.conftest import D_SAE


@pytest.fixture(autouse=True, scope="module")
def plain_logs() -> Iterator[None]:
    """Log as the server does: structlog's own default draws each traceback for seconds."""
    handlers = logging.getLogger().handlers
    log.configure(Settings(log_level="ERROR"), "web")
    yield
    structlog.reset_defaults()
    logging.getLogger().handlers = handlers


SEGMENTS = [
    "..%2f..%2fetc",
    "%00",
    "a" * 5000,
    "%C3%A9%F0%9F%98%80",
    "%E2%80%AE",
    "%ff",
    "a%0d%0ab",
    "'--",
    "{{7*7}}",
]


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize(
    "shape",
    [
        "/{}",
        "/{}/1-demo",
        "/tiny/{}",
        "/{}/1-demo/1",
        "/tiny/{}/1",
        "/tiny/1-demo/{}",
        "/tiny/{}/prompt",
        "/{}/prompt",
        "/tiny/prompt/{}",
        "/{}/steer",
        "/tiny/steer/{}",
        "/jobs/{}",
        "/tiny/1-demo/1/context/{}",
        "/static/{}",
        "/api/feature/{}/1-demo/1",
        "/api/feature/tiny/{}/1",
        "/api/feature/tiny/1-demo/{}",
        "/api/model/{}",
        "/tiny/{}/random",
        "/tiny/{}/jump?to=1",
    ],
)
def test_odd_path_segments_are_not_found(client: TestClient, shape: str, segment: str) -> None:
    answer = client.get(shape.format(segment), follow_redirects=False)
    assert answer.status_code in (404, 422), answer.text[:300]


@pytest.mark.parametrize("index", ["-1", str(D_SAE), str(2**31), str(2**63), "abc", "1.5", "١", "0x1", "1e3"])
@pytest.mark.parametrize(
    "shape",
    ["/tiny/1-demo/{}", "/api/feature/tiny/1-demo/{}", "/tiny/1-demo/{}/vector.json", "/tiny/1-demo/jump?to={}"],
)
def test_indices_out_of_range_are_not_found(client: TestClient, shape: str, index: str) -> None:
    answer = client.get(shape.format(index))
    assert answer.status_code in (404, 422)
    if shape.startswith("/api"):
        assert answer.json()["error"] == answer.json()["message"]


@pytest.mark.parametrize("index", ["-1", str(2**63), "abc", None, [], 1.5, True])
def test_indices_out_of_range_in_a_body_are_refused(client: TestClient, index: object) -> None:
    answer = client.post("/api/features", json=[{"modelId": "tiny", "layer": "1-demo", "index": index}])
    assert answer.status_code in (404, 422)
    assert set(answer.json()) == {"error", "message"}


def test_an_unknown_address_suggests_what_was_meant(client: TestClient) -> None:
    page = client.get("/tiny/1-dmo/3")
    assert page.status_code == 404
    assert 'href="/tiny/1-demo/3"' in page.text
    last = client.get(f"/tiny/1-demo/{D_SAE}")
    assert f"has {D_SAE} features, 0 to {D_SAE - 1}" in last.text


@pytest.mark.parametrize(
    "query",
    [
        "?page=0",
        "?page=-1",
        "?page=99999999999",
        "?page=abc",
        "?sort=drop",
        "?min_density=nan",
        "?min_density=2",
        "?kind=x",
        "?label=" + "a" * 999,
    ],
)
def test_odd_table_parameters_are_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/tiny/1-demo{query}").status_code == 422


@pytest.mark.parametrize("query", ["?label=%00", "?label=%25", "?token=%ff", "?min_density=", "?label=%E2%80%AE"])
def test_odd_filters_are_texts(client: TestClient, query: str) -> None:
    assert client.get(f"/tiny/1-demo{query}").status_code == 200


@pytest.mark.parametrize("q", ["%00", "%ff", "%25%27", "' OR 1=1", "%F0%9F%98%80", "<script>"])
def test_odd_searches_are_answered(client: TestClient, q: str) -> None:
    answer = client.get(f"/search?q={q}")
    assert answer.status_code == 200
    assert "<script>" not in answer.text.replace("<script src", "")


@pytest.mark.parametrize("path", ["/tiny/1-demo/4/try", "/tiny/prompt"])
@pytest.mark.parametrize(
    ("text", "status"),
    [("", 200), ("   ", 200), ("\0", 200), ("<|endoftext|>", 200), ("x" * 1_000_000, 422), ("\u202e", 200)],
)
def test_odd_texts_are_answered_without_a_worker(client: TestClient, path: str, text: str, status: int) -> None:
    assert client.post(path, data={"text": text}).status_code == status


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
@pytest.mark.parametrize("rest", ["nothing", "nothing/at/all"])
def test_an_unknown_api_address_is_json_and_names_the_docs(client: TestClient, method: str, rest: str) -> None:
    answer = client.request(method, f"/api/{rest}")
    assert answer.status_code == 404
    assert answer.json()["error"] == f"No API endpoint {method} /api/{rest}; see /docs."


def test_any_key_is_good(client: TestClient) -> None:
    assert client.post("/api/test", json={"apiKey": "sk-whatever"}).status_code == 200


def test_a_body_that_is_no_json_is_refused_in_a_sentence(client: TestClient) -> None:
    answer = client.post("/api/features", content=b"{not json", headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["error"].startswith("The body is not valid JSON: ")


def test_a_lone_surrogate_in_json_is_refused(client: TestClient) -> None:
    body = b'{"modelId": "tiny", "query": "\\ud800"}'
    answer = client.post("/api/explanation/search-model", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 422


def test_a_body_over_the_limit_is_refused(client: TestClient) -> None:
    answer = client.post(
        "/api/features", content=b"[" + b" " * 2**25 + b"]", headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413
    assert set(answer.json()) == {"error", "message"}


def test_a_body_in_chunks_over_the_limit_is_refused(client: TestClient) -> None:
    chunks = (b" " * 2**20 for _ in range(33))
    answer = client.post("/api/features", content=chunks, headers={"content-type": "application/json"})
    assert answer.status_code == 413


PAGES = [
    "/",
    "/tiny",
    "/tiny/1-demo",
    "/tiny/1-demo/1",
    "/tiny/1-demo/2",
    "/tiny/1-demo/1?width=all",
    "/search?q=script",
    "/search?q=7",
    "/tiny/steer?source=1-demo&index=1",
    "/tiny/steer/features?q=script",
    "/tiny/1-demo/1/context/2",
    "/tiny/1-demo?label=script",
    "/tiny/1-demo/1?text=%3Cscript%3Ealert(1)%3C/script%3E",
    "/%3Cscript%3E/x/1",
]


@pytest.mark.parametrize("path", PAGES)
def test_tokens_and_labels_are_shown_as_text(client: TestClient, path: str) -> None:
    page = client.get(path).text
    scripts = re.findall(r"<script\b[^>]*>", page)
    # Data for scripts is no script: its type is not run, and nothing in it can end it.
    assert all('src="/static/' in script or 'type="application/json"' in script for script in scripts)
    assert "<img" not in page
    assert "<b>model" not in page
    assert "\u202e" not in page
    assert "\0" not in page
    assert ">49<" not in page


def test_a_token_that_is_a_script_reads_as_one(client: TestClient) -> None:
    page = client.get("/tiny/1-demo/1").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    assert "{{7*7}}" in page


def test_no_page_needs_inline_scripts_or_styles(client: TestClient) -> None:
    for path in PAGES:
        answer = client.get(path)
        assert " style=" not in answer.text
        assert not re.search(r"\son\w+=", answer.text.replace("onerror=alert", ""))
        policy = answer.headers["content-security-policy"]
        assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://evil.com"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:3001"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"origin": "http://localhost:3000"}, 200),
        ({}, 200),
    ],
)
def test_only_this_site_and_programs_may_post(client: TestClient, headers: dict[str, str], status: int) -> None:
    body = {"modelId": "tiny", "query": "harbours"}
    assert client.post("/api/explanation/search-model", json=body, headers=headers).status_code == status


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE"])
def test_no_method_that_changes_things_crosses_sites(client: TestClient, method: str) -> None:
    assert client.request(method, "/jobs/1/cancel", headers={"sec-fetch-site": "cross-site"}).status_code == 403


def test_reading_from_a_link_on_another_site_is_allowed(client: TestClient) -> None:
    assert client.get("/tiny/1-demo/1", headers={"sec-fetch-site": "cross-site"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.com", "evil.com:3000", "localhost.evil.com", "127.0.0.1.evil.com", "10.0.0.1", "", "[::2]"]
)
def test_foreign_hosts_are_refused_on_loopback(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "localhost:3000", "127.0.0.1:9", "127.0.0.2", "[::1]:3000", "LOCALHOST"])
def test_this_machines_names_are_served(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 200


def test_addresses_of_other_machines_are_not_loopback() -> None:
    assert is_loopback("127.0.0.1")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("192.168.1.2")


def test_origin_counts_only_where_fetch_metadata_is_missing() -> None:
    headers = {"origin": "http://evil.com", "host": "localhost", "sec-fetch-site": "same-origin"}
    assert not cross_site(Headers(headers))


def test_errors_under_api_are_json_and_elsewhere_pages_or_fragments(client: TestClient) -> None:
    assert client.get("/api/nothing").json()["error"]
    assert client.get("/api/feature/nope/1-demo/1").headers["content-type"] == "application/json"
    assert client.get("/nope").text.startswith("<!doctype html>")
    assert client.get("/nope", headers={"HX-Request": "true"}).text.startswith('<div class="problem"')


def test_every_answer_has_a_request_id_and_a_given_one_is_kept(client: TestClient) -> None:
    assert client.get("/", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    odd = client.get("/nope", headers={"x-request-id": "a b<script>"}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", odd)


def test_an_answer_says_how_long_the_server_took(client: TestClient) -> None:
    said = client.get("/").headers["server-timing"]
    assert re.fullmatch(r"app;dur=\d+\.\d", said)
    assert 0 < float(said.partition("=")[2]) < 60_000


def test_a_mistake_of_ours_is_a_designed_page_that_names_the_request(client: TestClient) -> None:
    client.app.state.sessions = None  # type: ignore[attr-defined]
    page = client.get("/")
    assert page.status_code == 500
    assert "made a mistake" in page.text
    assert "Traceback" not in page.text
    assert client.get("/api/models").json()["error"]


def test_a_database_that_is_gone_is_a_503_with_retry_after(client: TestClient) -> None:
    engine = client.app.state.engine  # type: ignore[attr-defined]
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE models RENAME TO models_gone")
    for path in ("/tiny/1-demo/1", "/api/feature/tiny/1-demo/1"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.headers["retry-after"]


def test_reserved_words_cover_every_first_segment_that_is_taken(client: TestClient) -> None:
    firsts = {route.path.split("/")[1] for route in client.app.routes if hasattr(route, "path")}  # type: ignore[attr-defined]
    assert {first for first in firsts if first and not first.startswith("{")} <= catalog.RESERVED


def test_data_elements_cannot_be_closed_by_what_they_hold(client: TestClient) -> None:
    page = client.get("/tiny/steer/features?q=script").text
    found = re.search(r'data-add="([^"]+)"', page)
    assert found
    assert json.loads(html.unescape(found[1]))["label"] == "<script>alert('label')</script>"
