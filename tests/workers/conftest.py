"""The tiny world of tests.tiny as fixtures, in this process and behind a real worker process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.settings import Settings
from tests import tiny as world
from tests.tiny import Tiny, WorkerProcess
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


@pytest.fixture(scope="session")
def worker_settings(tiny: Tiny) -> Settings:
    return Settings(data_dir=tiny.data_dir, device="cpu", threads=1, request_seconds=20)


@pytest.fixture(scope="session")
def worker_process(worker_settings: Settings) -> Iterator[WorkerProcess]:
    process = WorkerProcess(worker_settings)
    yield process
    process.stop()
