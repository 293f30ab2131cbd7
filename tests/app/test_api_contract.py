"""Thousands of requests made from the OpenAPI document, sensible and not: none may end as a mistake of ours.

Seeded, so that a run repeats the last one. Twice: everything on a catalog without a worker, then what computes on the
tiny model with a real worker behind it, which must survive and stop when told to.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from schemathesis.generation import GenerationMode
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings
from tests.app.conftest import fill
from tests.tiny import Tiny, WorkerProcess

SEED = 20261125
LOCAL = "http://localhost:3000"
COMPUTING = ("/api/activation/", "/api/attribution/", "/api/search", "/api/steer", "/api/tokenize", "/api/vector/")

Send = Callable[..., httpx.Response]


def operations(app: FastAPI) -> dict[str, Any]:
    """Every operation of the document by method and path."""
    schema = schemathesis.openapi.from_dict(app.openapi())
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{operation.method.upper()} {operation.path}": operation for operation in found}


OPERATIONS = operations(create_app(Settings()))
NAMES = sorted(OPERATIONS)
COMPUTED = [name for name in NAMES if name.partition(" ")[2].startswith(COMPUTING)]


def as_it_is(body: Any) -> Any:
    return body


def tried(operation: Any, send: Send, max_examples: int, aim: Callable[[Any], Any] = as_it_is) -> Counter[int]:
    """Send what the document allows and what it forbids, and return how often which status came."""
    statuses: Counter[int] = Counter()

    # Paths take any text, so that only a body or a query can break the document's rules.
    breakable = bool(operation.body) or bool(operation.query)
    for mode in (GenerationMode.POSITIVE, *([GenerationMode.NEGATIVE] if breakable else [])):

        @seed(SEED)
        @hypothesis_settings(
            max_examples=max_examples,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def attempt(case: Any) -> None:
            sent = case.as_transport_kwargs(base_url=LOCAL)
            sent.pop("cookies", None)
            if "json" in sent:
                sent["json"] = aim(sent["json"])
            if "data" in sent:
                sent["content"] = sent.pop("data")
            answer = send(**sent)
            statuses[answer.status_code] += 1
            assert answer.status_code < 500 or answer.status_code == 503, f"{sent}\n{answer.text[:500]}"
            if answer.status_code >= 400 and operation.path.startswith("/api/"):
                assert answer.json()["error"] == answer.json()["message"] != ""

        attempt()
    return statuses


@pytest.fixture(scope="module")
def opened(filled_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The real application on one filled catalog for all of them. No worker runs."""
    data_dir = tmp_path_factory.mktemp("contract") / "data"
    shutil.copytree(filled_directory, data_dir)
    settings = Settings(data_dir=data_dir, log_level="WARNING")
    with TestClient(create_app(settings), base_url=LOCAL, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("name", NAMES)
def test_no_request_of_the_document_ends_as_a_mistake_of_ours(opened: TestClient, name: str) -> None:
    assert tried(OPERATIONS[name], opened.request, 8).total() >= 1


@dataclass
class Computing:
    """The application with a worker that computes, and what it answered so far."""

    client: TestClient
    worker: WorkerProcess
    statuses: Counter[int]


@pytest.fixture(scope="module")
def computing(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Computing]:
    """A catalog of its own on a copy of the tiny world: what is made here stays out of other tests."""
    data_dir = tmp_path_factory.mktemp("computing") / "data"
    shutil.copytree(tiny.data_dir, data_dir, ignore=shutil.ignore_patterns("*.sqlite*", "run"))
    settings = Settings(data_dir=data_dir, device="cpu", threads=1, max_new_tokens=4, max_texts=4, log_level="WARNING")
    fill(settings)
    worker = WorkerProcess(settings)
    try:
        with TestClient(create_app(settings), base_url=LOCAL, raise_server_exceptions=False) as client:
            yield Computing(client, worker, Counter())
    finally:
        worker.stop()


PLACES = {
    "modelId": "tiny",
    "source": "1-topk",
    "layer": "1-topk",
    "sourceSet": "topk",
    "targetModelId": "tiny",
    "targetSourceId": "1-topk",
    "prompt": "the cat",
    "text": "the cat sat",
}
NUMBERS = {"index": 40, "n_tokens": 4, "n_samples": 1, "layerNumber": 3, "position": 2, "strength": 100}
"""What is taken of a number under that name: the remainder."""


def at_what_is_there(body: Any) -> Any:
    """Return a body with names, texts and numbers that exist, so that it gets further than the first look at it."""
    if isinstance(body, list):
        return [at_what_is_there(part) for part in body]
    if not isinstance(body, dict):
        return body
    found = {key: _there(key, value) for key, value in body.items()}
    if "messages" in found:
        found |= {"messages": None, "text": "the cat sat"}
    if "selectedLayers" in found:
        found["selectedLayers"] = []
    return found


def _there(key: str, value: Any) -> Any:
    if key == "index" and isinstance(value, str):
        return str(len(value))
    if isinstance(value, str) and key in PLACES:
        return PLACES[key]
    if isinstance(value, int | float) and not isinstance(value, bool) and key in NUMBERS:
        return int(value % NUMBERS[key]) + key.startswith("n_")
    return at_what_is_there(value)


@pytest.mark.parametrize("name", COMPUTED)
def test_nor_does_one_that_a_real_worker_computes(computing: Computing, name: str) -> None:
    statuses = tried(OPERATIONS[name], computing.client.request, 6, at_what_is_there)
    assert statuses[503] == 0, statuses
    computing.statuses += statuses


def test_the_worker_has_computed_lives_and_stops_when_told(computing: Computing) -> None:
    """Some requests were right: a test whose every request is refused at the door would prove little."""
    assert computing.statuses[200] >= len(COMPUTED), computing.statuses
    assert computing.worker.process.poll() is None
    assert computing.worker.stop() == 0


def test_the_document_is_tried_whole() -> None:
    assert len(NAMES) > 40
