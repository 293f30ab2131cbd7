"""The real application on a real server, a real worker behind it, and the tiny world of tests.tiny in its catalog."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

from app import db
from app.main import create_app
from app.protocol import ModelCard
from app.settings import Settings
from app.tables import Feature, Model, Source
from tests import tiny as world
from tests.tiny import D_IN, D_SAE, HOOK, K, Tiny, WorkerProcess


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return world.make(tmp_path_factory.mktemp("live"), tmp_path_factory.mktemp("hf"))


@dataclass(frozen=True)
class Live:
    """A running web server and its worker."""

    url: str
    settings: Settings
    worker: WorkerProcess
    http: httpx.Client

    def post(self, path: str, body: object) -> httpx.Response:
        return self.http.post(f"/api/{path}", json=body)


@pytest.fixture(scope="session")
def live(tiny: Tiny) -> Iterator[Live]:
    settings = Settings(
        data_dir=tiny.data_dir,
        device="cpu",
        threads=1,
        request_seconds=20,
        max_texts=5,
        max_text_bytes=3000,
        max_new_tokens=200,
    )
    fill(settings)
    worker = WorkerProcess(settings)
    with listening() as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60) as http:
            yield Live(url, settings, worker, http)
        server.should_exit = True
        thread.join()
    worker.stop()


def listening() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener


def fill(settings: Settings) -> None:
    """Put the tiny model and its SAEs into the catalog; even latents are dense."""
    engine = db.connect(settings)
    db.migrate(engine)
    card = ModelCard.model_validate_json((settings.model_dir("tiny") / "card.json").read_text())
    with db.sessions(engine).begin() as session:
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        session.flush()
        for name, directory, config in (
            ("1-topk", "topk", {"k": K}),
            ("1-std", "standard", {}),
            ("1-bare", "topk", {"k": K, "metadata": {"prepend_bos": False}}),
        ):
            source = Source(
                model_id="tiny",
                name=name,
                layer=1,
                set_name=name.partition("-")[2],
                sae_hash=directory,
                architecture=directory,
                hook_name=HOOK,
                d_in=D_IN,
                d_sae=D_SAE,
                config=config,
                metrics={},
                origin={},
            )
            session.add(source)
            session.flush()
            for index in range(D_SAE):
                session.add(
                    Feature(
                        source_id=source.id,
                        index=index,
                        density=0.001 if index % 2 else 0.5,
                        max_act=100.0,
                        label=f"feature {index}",
                        top_token="",
                        top_logit="",
                    )
                )
    engine.dispose()
