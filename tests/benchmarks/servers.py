"""The demo behind a real web server and a real gpu worker, for benchmarks."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import torch
from sqlalchemy import select

from app import db
from app.demo import prepare
from app.settings import Settings
from app.supervisor import environment
from app.tables import Source


@dataclass(frozen=True)
class Servers:
    settings: Settings
    http: httpx.Client
    """Keeps one connection to the web server, as a browser does."""
    model: str
    source: str
    d_sae: int
    model_dir: Path
    sae_dir: Path


@contextmanager
def demo() -> Iterator[Servers]:
    """Serve the data directory of SAE_ATLAS_DATA_DIR, or a fresh import of the demo where that is not set."""
    with tempfile.TemporaryDirectory(prefix="sae-atlas-bench-") as scratch:
        given = Settings()
        data_dir = given.data_dir if "data_dir" in given.model_fields_set else Path(scratch) / "data"
        settings = Settings(
            data_dir=data_dir,
            port=_free_port(),
            worker_socket=str(Path(scratch) / "worker.sock"),
            request_seconds=600,
            log_level="WARNING",
        )
        if settings.threads:
            torch.set_num_threads(settings.threads)  # what is compared has as many as the worker
        source = installed(settings)
        processes = [
            subprocess.Popen([sys.executable, "-m", module], env=environment(settings))
            for module in ("workers.gpu", "app")
        ]
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{settings.port}", timeout=600) as http:
                _wait(http)
                yield Servers(
                    settings,
                    http,
                    source.model_id,
                    source.name,
                    source.d_sae,
                    settings.model_dir(source.model_id),
                    settings.sae_dir(source.sae_hash),
                )
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(timeout=30)


def interleaved(sides: dict[str, Callable[[], float]], rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Call each side in turn, so that what else the machine does falls on all of them; a side returns its figure."""
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for n in range(warm_up + rounds):
        for name, side in sides.items():
            figure = side()
            if n >= warm_up:
                figures[name].append(figure)
    return figures


def medians(figures: dict[str, list[float]]) -> dict[str, float]:
    return {name: median(values) for name, values in figures.items()}


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Most memory of this process since the last reset, in bytes; what it read through memory maps counts too."""
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def installed(settings: Settings) -> Source:
    engine = db.connect(settings)
    db.migrate(engine)
    with db.sessions(engine)() as session:
        if session.execute(select(Source)).first() is None:
            prepare.install_model(session, settings, lambda _share, _status: None)
            prepare.import_bundle(session, settings, lambda _share, _status: None)
            session.commit()
        found = session.execute(select(Source).where(Source.model_id == prepare.MODEL_ID)).scalars().first()
    engine.dispose()
    if found is None:
        sys.exit(f"{settings.data_dir} holds no SAE of {prepare.MODEL_ID}; run `sae-atlas demo` on it first.")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(http: httpx.Client) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    sys.exit("The servers did not start within 120 s.")
