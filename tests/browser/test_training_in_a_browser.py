"""A training's page while a real trainer trains: it grows without a reload, survives one, warns, and is compared."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from app import corpora, db, documents, jobs
from app.protocol import ModelCard
from app.settings import Settings
from app.tables import Job, Model
from app.trainspecs import TrainSpec
from tests import tiny as world
from tests.browser.test_accessibility import GRAVE
from tests.tiny import TEXT

SECONDS = 180
LONG: dict[str, Any] = {
    "model": "tiny",
    "corpus": "c",
    "hook_name": "blocks.1.hook_resid_post",
    "set_name": "long",
    "d_sae": 48,
    "k": [3, 6],
    "context_size": 16,
    "n_tokens": 6_000,
    "epochs": 100,
    "batch_size": 32,
    "lr": 1e-3,
    "aux_k": 8,
    "dead_after_tokens": 2_000,
    "evaluate_every_steps": 500,
    "n_eval_tokens": 1_000,
    "held_out": 0.2,
    "harvest_tokens": 0,
}
BAD: dict[str, Any] = {
    **{name: value for name, value in LONG.items() if name not in ("k", "aux_k")},
    "set_name": "bad",
    "architecture": "standard",
    "l1_coefficient": 5_000.0,
    "l1_warmup_steps": 0,
    "epochs": 2,
    "evaluate_every_steps": 100,
}


@dataclass(frozen=True)
class Atlas:
    """A web server and a trainer of their own, on the tiny model."""

    url: str
    settings: Settings
    logs: Path

    def submit(self, spec: dict[str, Any]) -> int:
        asked = TrainSpec.model_validate(spec)
        with db.sessions(db.connect(self.settings)).begin() as session:
            dumped = asked.model_dump(mode="json", exclude_none=True)
            return jobs.submit(session, self.settings, "train", asked.title, dumped).id

    def ended(self, job_id: int) -> bool:
        with db.sessions(db.connect(self.settings))() as session:
            job = session.get_one(Job, job_id)
            assert job.state != "failed", job.error
            return job.state == "done"

    def said(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in self.logs.glob("*.log"))


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Atlas]:
    root = tmp_path_factory.mktemp("training")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = Settings(data_dir=root / "data", device="cpu", threads=1, port=port, database_url="", worker_socket="")
    world.make(settings.data_dir, root / "hf")
    engine = db.connect(settings)
    db.migrate(engine)
    card = ModelCard.model_validate_json((settings.model_dir("tiny") / "card.json").read_text())
    (root / "c.txt").write_text(" ".join(np.random.default_rng(0).choice(TEXT.split(), 4_000)))
    with db.sessions(engine).begin() as session:
        session.add(Model(id="tiny", name="Tiny", hash=card.hash, card=card.model_dump()))
        corpora.add_corpus(session, settings, documents.read(root / "c.txt"), "c")
    engine.dispose()
    values = {"DATA_DIR": str(settings.data_dir), "PORT": str(port), "DEVICE": "cpu", "THREADS": "1"}
    environment = os.environ | {f"SAE_ATLAS_{name}": value for name, value in values.items()} | {"OMP_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[bytes]] = []
    for module in ("app", "workers.trainer"):
        with open(root / f"{module}.log", "wb") as log:
            command = [sys.executable, "-m", module]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    found = Atlas(f"http://127.0.0.1:{port}", settings, root)
    try:
        until(found, lambda: answers(found.url))
        yield found
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def until(atlas: Atlas, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, atlas.said()
        time.sleep(0.2)


@pytest.fixture
def page(browser: Browser, atlas: Atlas) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, base_url=atlas.url)
    opened = context.new_page()
    opened.set_default_timeout(SECONDS * 1000)
    complaints: list[str] = []
    opened.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    context.close()
    assert complaints == []


def points(page: Page, plot: str = "plot-loss") -> list[list[float]]:
    """The steps of each line of a plot."""
    return [line["x"] for line in json.loads(page.locator(f"#{plot} script").text_content() or "")["lines"]]


GROWN = """([id, after]) => {
    const lines = JSON.parse(document.querySelector(`#${id} script`).textContent).lines;
    return lines.length > 0 && lines.every((line) => line.x.at(-1) > after);
}"""


def test_a_trainings_page_grows_survives_a_reload_and_obeys(page: Page, atlas: Atlas) -> None:
    number = atlas.submit(LONG)
    page.add_init_script(
        "window.shifted = 0; new PerformanceObserver((list) => { for (const e of list.getEntries()) "
        "if (!e.hadRecentInput) window.shifted += e.value; }).observe({type: 'layout-shift', buffered: true});"
    )
    page.goto(f"/jobs/{number}")
    page.evaluate("window.same = true")
    page.wait_for_function(GROWN, arg=["plot-loss", 0], timeout=SECONDS * 1000)
    first = points(page)[0][-1]
    page.wait_for_function(GROWN, arg=["plot-loss", first], timeout=SECONDS * 1000)
    page.wait_for_function(GROWN, arg=["plot-ce_loss_score", 0], timeout=SECONDS * 1000)
    assert len(points(page)) == 2
    expect(page.locator("#runs tbody tr").first).not_to_contain_text("–")
    expect(page.locator("#looks .forming").first).to_be_visible()
    assert page.evaluate("window.same") is True
    assert page.evaluate("window.shifted") < 0.1
    seen = points(page)[0][-1]
    page.reload()
    assert points(page)[0][-1] >= seen
    assert points(page)[0][0] <= first
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#job .state")).to_have_text("paused", timeout=SECONDS * 1000)
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#job .state")).to_have_text("running", timeout=SECONDS * 1000)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job .state")).to_have_text("cancelled", timeout=SECONDS * 1000)


def test_a_bad_training_warns_and_two_are_drawn_over_each_other(page: Page, atlas: Atlas) -> None:
    bad, good = atlas.submit(BAD), atlas.submit({**LONG, "set_name": "short", "k": 4, "epochs": 2})
    page.goto(f"/jobs/{bad}")
    expect(page.locator("#job .alert a")).to_contain_text("warning", timeout=SECONDS * 1000)
    expect(page.locator("#warnings .advice").first).to_contain_text(
        re.compile("lower|raise", re.I), timeout=SECONDS * 1000
    )
    until(atlas, lambda: atlas.ended(bad) and atlas.ended(good))
    expect(page.locator("#outcome")).to_contain_text("1-bad", timeout=SECONDS * 1000)
    expect(page.locator("#runs tbody a").first).to_have_attribute("href", "/tiny/1-bad")
    page.goto("/jobs")
    for number in (bad, good):
        page.get_by_role("checkbox", name=f"Compare job {number}", exact=True).check()
    page.get_by_role("button", name="Compare the curves").click()
    page.wait_for_url("**/jobs/compare?job=*&job=*")
    assert len(points(page)) == 2
    expect(page.locator(".differences")).to_contain_text("l1_coefficient")
    page.locator("#plot-loss svg").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#plot-loss .readout p")).to_have_count(3)
    expect(page.locator(".cross")).not_to_have_count(1)
    page.get_by_role("link", name=f"Hide {bad} · 1-bad").click()
    page.wait_for_function("location.search.includes('hide=')")
    expect(page.get_by_role("link", name=f"Show {bad} · 1-bad")).to_be_visible()
    assert len(points(page)) == 1
    page.reload()
    assert len(points(page)) == 1


LOOKS = [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")]


def complaints_of(browser: Browser, atlas: Atlas, path: str) -> list[str]:
    """What axe finds serious, and what is wider than the window, on a page in every look."""
    found: list[str] = []
    for width, scheme in LOOKS:
        with browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,  # type: ignore[arg-type]
            base_url=atlas.url,
        ) as context:
            page = context.new_page()
            page.goto(path, wait_until="load")
            page.locator("#runs tbody tr").first.wait_for()
            page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            found += [f"{path} is {wide} px too wide at {width}"] if wide > 0 else []
            for violation in Axe().run(page).response["violations"]:
                if violation["impact"] in GRAVE:
                    nodes = [node["html"][:160] for node in violation["nodes"][:3]]
                    found += [f"{path} at {width}, {scheme}: {violation['id']}: {html}" for html in nodes]
    return found


def test_axe_finds_nothing_serious_on_trainings_that_run_warn_and_ended_nor_on_their_comparison(
    browser: Browser, page: Page, atlas: Atlas
) -> None:
    ended = atlas.submit({**BAD, "set_name": "ended"})
    until(atlas, lambda: atlas.ended(ended))
    number = atlas.submit({**LONG, "set_name": "axed", "epochs": 100})
    waits = atlas.submit({**LONG, "set_name": "waits"})
    page.goto(f"/jobs/{number}")
    page.wait_for_function(GROWN, arg=["plot-ce_loss_score", 0], timeout=SECONDS * 1000)
    expect(page.locator("#looks .forming").first).to_be_visible()
    page.get_by_role("button", name="Pause").click()  # else it may end before it was looked at
    expect(page.locator("#job .state")).to_have_text(re.compile("pausing|paused"), timeout=SECONDS * 1000)
    paths = [f"/jobs/{job}" for job in (number, ended, waits)]
    paths += [f"/jobs/compare?job={number}&job={ended}", f"/jobs/{number}?scale=log&x=tokens&more=true&look=1"]
    found = [text for path in paths for text in complaints_of(browser, atlas, path)]
    for job in (number, waits):
        page.request.post(f"/jobs/{job}/cancel", headers={"origin": atlas.url})
    assert not found, "\n".join(found)


def test_a_plot_is_looked_at_closer_by_dragging(page: Page, atlas: Atlas) -> None:
    number = atlas.submit({**LONG, "set_name": "drag", "k": 4, "epochs": 4})
    until(atlas, lambda: atlas.ended(number))
    page.goto(f"/jobs/{number}")
    before = points(page)[0]
    box = page.locator("#plot-loss svg").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + 60, steps=5)
    page.mouse.up()
    page.wait_for_function("location.search.includes('first=')")
    expect(page.locator(".zoomed")).to_contain_text("all of it")
    after = points(page)[0]
    assert before[0] < after[0] < after[-1] < before[-1]
    page.get_by_role("link", name="all of it").click()
    expect(page.locator(".zoomed")).to_contain_text("drag across")
    assert points(page)[0] == before
