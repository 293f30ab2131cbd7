"""Traces reach a collector over HTTP, with routes' templates and without what addresses hold; rates per person."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from starlette.testclient import TestClient

from app import db, people, supervisor
from app.errors import BadInput
from app.main import create_app
from app.people import Role
from app.settings import Settings
from tests.conftest import Catalog

PASSWORD = "four random words here"


@dataclass
class Collector:
    url: str = ""
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)

    @property
    def spans(self) -> dict[str, dict[str, object]]:
        found = [s for r in self.requests for rs in r.resource_spans for ss in rs.scope_spans for s in ss.spans]
        return {
            s.name: {a.key: a.value.string_value or a.value.int_value for a in s.attributes}
            | {"trace": s.trace_id.hex(), "parent": s.parent_span_id.hex()}
            for s in found
        }


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            made.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield made
    server.shutdown()
    server.server_close()


def test_each_request_becomes_a_span_that_tells_no_secret(
    filled: Catalog, settings: Settings, collector: Collector
) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    app = create_app(settings.changed(otel_endpoint=collector.url))
    with TestClient(app, base_url="http://localhost:3000", raise_server_exceptions=False) as client:
        headers = {"traceparent": f"00-{trace}-{parent}-01", "x-request-id": "mine"}
        assert client.get("/tiny/1-demo/3?text=what+people+write", headers=headers).status_code == 200
        assert client.get("/invite/a-secret-in-a-link").status_code == 404
        client.get("/open?link=another-secret")
        client.get("/healthz")
    # Leaving the application has sent the rest.
    assert set(collector.spans) == {"GET /{model}/{source}/{index}", "GET /invite/{secret}", "GET /open", "GET /"}
    page = collector.spans["GET /{model}/{source}/{index}"]
    assert (page["trace"], page["parent"]) == (trace, parent)
    assert page["http.response.status_code"] == 200
    assert page["sae_atlas.request_id"] == "mine"
    assert collector.spans["GET /invite/{secret}"]["http.response.status_code"] == 404
    sent = b"".join(request.SerializeToString() for request in collector.requests)
    for secret in (b"a-secret-in-a-link", b"another-secret", b"what+people", b"what people"):
        assert secret not in sent


def test_a_collector_that_is_gone_disturbs_nobody(filled: Catalog, settings: Settings) -> None:
    app = create_app(settings.changed(otel_endpoint="http://127.0.0.1:9"))
    with TestClient(app, base_url="http://localhost:3000", raise_server_exceptions=False) as client:
        assert client.get("/tiny/1-demo/3").status_code == 200


def test_without_the_extra_the_server_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "find_spec", lambda _name: None)
    with pytest.raises(BadInput, match=r"sae-atlas\[otel\]"):
        supervisor.check_address(Settings(port=0, otel_endpoint="http://127.0.0.1:4318"))


def test_the_rate_is_one_persons_and_one_addresses(settings: Settings) -> None:
    """Whoever asks too often is told to wait; others, and the same address signed in, are not."""
    chosen = settings.changed(team=True, public_url="http://localhost:3000", requests_per_minute=5)
    engine = db.connect(chosen)
    db.migrate(engine)
    with db.sessions(engine).begin() as session:
        keys = []
        for name in ("ada", "grace"):
            person = people.add(session, name, PASSWORD, Role.VIEWER)
            keys.append(people.add_token(session, person, "k", Role.VIEWER, None))
    engine.dispose()
    app = create_app(chosen)
    with TestClient(app, base_url="http://localhost:3000", client=("203.0.113.5", 1)) as here:
        asked = [here.get("/api/models", headers={"x-api-key": keys[0]}) for _ in range(7)]
        assert [answer.status_code for answer in asked[:5]] == [200] * 5
        assert asked[6].status_code == 429
        assert int(asked[6].headers["retry-after"]) >= 1
        assert here.get("/api/models", headers={"x-api-key": keys[1]}).status_code == 200
        strangers = [here.get("/api/models").status_code for _ in range(7)]
        assert strangers[:5] == [401] * 5
        assert strangers[6] == 429
        elsewhere = TestClient(app, base_url="http://localhost:3000", client=("203.0.113.6", 1))
        assert elsewhere.get("/api/models").status_code == 401
        spoofing = {"x-forwarded-for": "198.51.100.9"}
        assert here.get("/api/models", headers=spoofing).status_code == 429, "only a trusted proxy names addresses"
