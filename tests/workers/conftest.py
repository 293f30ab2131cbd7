"""The tiny world of tests.tiny as fixtures, in this process and behind a real worker process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app import db
from app.settings import Settings
from app.tables import Model, Source
from tests import tiny as world
from tests.tiny import D_IN, D_SAE, HOOK, K, Tiny, WorkerProcess
from workers.checkpoints import load_sae
from workers.language_model import LanguageModel
from workers.sae.coders import Coder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return world.make(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def language(tiny: Tiny) -> LanguageModel:
    return LanguageModel.load(Path(tiny.model.path))


@pytest.fixture(scope="session")
def topk(tiny: Tiny) -> Coder:
    return load_sae(Path(tiny.topk.path))


@pytest.fixture(scope="session")
def standard(tiny: Tiny) -> Coder:
    return load_sae(Path(tiny.standard.path))


@pytest.fixture
def settings(tiny: Tiny, tmp_path: Path) -> Settings:
    """A data directory whose catalog holds the tiny model and one SAE of it."""
    made = Settings(data_dir=tmp_path / "data", device="cpu", threads=1)
    made.data_dir.mkdir()
    for name in ("models", "saes"):
        (made.data_dir / name).symlink_to(tiny.data_dir / name)
    engine = db.connect(made)
    db.migrate(engine)
    card = LanguageModel.load(Path(tiny.model.path)).card
    shared: dict[str, Any] = {"set_name": "topk", "sae_hash": "topk", "architecture": "topk", "config": {"k": K}}
    shared |= {"layer": 1, "hook_name": HOOK, "d_in": D_IN, "d_sae": D_SAE, "metrics": {}, "origin": {}}
    with db.sessions(engine).begin() as session:
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        session.flush()
        session.add(Source(model_id="tiny", name="1-topk", **shared))
    return made


@pytest.fixture(scope="session")
def worker_settings(tiny: Tiny) -> Settings:
    return Settings(data_dir=tiny.data_dir, device="cpu", threads=1, request_seconds=20)


@pytest.fixture(scope="session")
def worker_process(worker_settings: Settings) -> Iterator[WorkerProcess]:
    process = WorkerProcess(worker_settings)
    yield process
    process.stop()
