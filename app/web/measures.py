"""Prometheus metrics: requests as this process saw them, and the state of queue, trainers, worker and disk at a scrape.

Each web process counts its own requests: scrape each of them. Labels are route templates, never addresses.
"""

from __future__ import annotations

import hmac
import time

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import operations
from app.protocol import WorkerStatus
from app.web.guard import is_loopback

_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Measures:
    """The counters of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names = ["method", "route"]
        self.requests = Counter("sae_atlas_requests", "Requests answered.", [*names, "status"], registry=self.registry)
        self.seconds = Histogram(
            "sae_atlas_request_seconds",
            "Seconds until the answer began; streams go on after that.",
            names,
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.running = Gauge("sae_atlas_requests_running", "Requests being answered.", registry=self.registry)
        ProcessCollector(registry=self.registry)


class Measured:
    """Counts each request under its route's template. Plain ASGI, outermost, so that refusals count too."""

    def __init__(self, app: ASGIApp, measures: Measures) -> None:
        self.app = app
        self.measures = measures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        first: list[tuple[int, float]] = []

        async def timed(message: Message) -> None:
            if message["type"] == "http.response.start":
                first.append((message["status"], time.perf_counter() - began))
            await send(message)

        with self.measures.running.track_inprogress():
            try:
                await self.app(scope, receive, timed)
            finally:
                status, seconds = first[0] if first else (500, time.perf_counter() - began)
                method = scope["method"] if scope["method"] in _METHODS else "other"
                route = template(scope)
                self.measures.requests.labels(method, route, str(status)).inc()
                self.measures.seconds.labels(method, route).observe(seconds)


def template(scope: Scope) -> str:
    """Return a request's route as it is written, such as /{model}/{source}; a request that has none is `none`."""
    path = str(scope.get("path", ""))
    if path.startswith("/static/"):
        return "/static"
    written = str(getattr(scope.get("route"), "path_format", ""))
    if not written:
        return "none"
    return f"/api{written}" if path.startswith("/api/") and not written.startswith("/api/") else written


def state(
    queue: operations.Queue,
    trainers: list[operations.Trainer],
    parts: tuple[operations.Part, ...],
    free: int,
    worker: WorkerStatus | None,
) -> bytes:
    """Return what is true now as Prometheus text."""
    registry = CollectorRegistry()

    def gauge(name: str, help: str, values: dict[tuple[str, ...], float], labels: tuple[str, ...] = ()) -> None:
        made = Gauge(f"sae_atlas_{name}", help, labels, registry=registry)
        for key, value in values.items():
            (made.labels(*key) if labels else made).set(value)

    gauge("jobs", "Jobs by state.", {(s,): n for s, n in queue.states.items()}, ("state",))
    gauge("jobs_waiting", "Queued jobs by kind.", {(k,): n for k, n in queue.waiting.items()}, ("kind",))
    gauge("jobs_oldest_wait_seconds", "How long the oldest queued job has waited.", {(): queue.oldest_seconds})
    gauge("trainers_alive", "Trainers with a recent sign of life.", {(): sum(t.alive for t in trainers)})
    beats: dict[tuple[str, ...], float] = {(t.executor,): t.silent_seconds for t in trainers}
    gauge("trainer_silent_seconds", "Seconds since a trainer's last sign of life.", beats, ("executor",))
    gauge("disk_free_bytes", "Free bytes under the data directory.", {(): free})
    gauge("disk_bytes", "Bytes on disk by kind of thing.", {(p.name,): p.n_bytes for p in parts}, ("kind",))
    gauge("worker_up", "Whether the gpu worker answers.", {(): worker is not None})
    if worker is not None:
        gauge("worker_memory_bytes", "Byte budget of resident models and SAEs.", {(): worker.memory_bytes})
        gauge("worker_used_bytes", "Bytes that residents take.", {(): worker.used_bytes})
        gauge("worker_waiting", "Requests waiting for the gpu worker or in it.", {(): worker.waiting})
        gauge("worker_loading", "Models and SAEs being loaded.", {(): len(worker.loading)})
        kinds: dict[tuple[str, ...], float] = {
            (kind,): sum(r.kind == kind for r in worker.residents) for kind in ("model", "sae")
        }
        gauge("worker_residents", "Resident models and SAEs.", kinds, ("kind",))
    return generate_latest(registry)


def text(measures: Measures, now: bytes) -> bytes:
    """Return one process's whole scrape."""
    return generate_latest(measures.registry) + now


def allowed(headers: Headers, client: str, token: str) -> bool:
    """Tell whether somebody may scrape: whoever has the token, or without one a program on this machine.

    A proxy on this machine forwards strangers: what says that it was forwarded needs the token.
    """
    if token:
        return hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {token}".encode())
    return is_loopback(client) and "x-forwarded-for" not in headers and "forwarded" not in headers
