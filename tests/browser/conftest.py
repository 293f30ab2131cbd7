"""A real browser against real processes: `sae-atlas demo` in a data directory of its own, on a free port.

SAE_ATLAS_TEST_DEMO_DIR names a directory whose demo is kept from run to run, so that the model is converted once;
SAE_ATLAS_TEST_URL names a server that runs already, for work on the pages.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, Playwright, expect, sync_playwright

from app.settings import Settings

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PICTURES = os.environ.get("SAE_ATLAS_TEST_PICTURES", "")
"""Where smaller pictures of all pages go besides: `docs/screenshots` when the look has changed."""
SCREENSHOTS = Path(__file__).resolve().parent.parent / "screenshots"
START_SECONDS = 300


@dataclass(frozen=True)
class Demo:
    """The running demo."""

    url: str
    data_dir: Path
    model: str = "smollm2-135m-instruct"
    source: str = "12-demo"

    @property
    def path(self) -> str:
        return f"{self.url}/{self.model}/{self.source}"


def pages(demo: Demo) -> dict[str, str]:
    """An address of every page, by the name of its picture."""
    model, source = f"/{demo.model}", f"/{demo.model}/{demo.source}"
    return {
        "map": f"{demo.path.removeprefix(demo.url)}/map",
        "choose": "/compare",
        "compare": f"/compare?a={demo.model}/{demo.source}/24&b={demo.model}/{demo.source}/127",
        "compare-saes": f"/compare?a={demo.model}/{demo.source}&b={demo.model}/{demo.source}",
        "set": f"/{demo.model}?set=demo",
        "found": "/search?q=cemetery",
        "home": "/",
        "model": model,
        "source": source,
        "feature": f"{source}/24",
        "embed": f"{source}/24/embed",
        "embedded": f"{source}/24?embed=true",
        "palette": f"{source}/24?width=5",
        "prompt": f"{model}/prompt?{ASKED}&sae={demo.source}&at=11",
        "prompt-grid": f"{model}/prompt?{ASKED}&sae={demo.source}&view=grid",
        "prompt-next": f"{model}/prompt?{ASKED}&sae={demo.source}&view=next&at=11",
        "prompt-faithful": f"{model}/prompt?{ASKED}&sae={demo.source}&view=faithful",
        "bulk": f"{model}/bulk",
        "steer": f"{model}/steer?source={demo.source}&index=24",
        "search": "/search?q=fires",
        "explanations": f"{source}/24/explanations",
        "card": f"{source}/card",
        "lists": "/lists",
        "bookmarks": "/bookmarks",
        "mentions": "/mentions",
        "activity": "/activity",
        "vectors": "/vectors",
        "remotes": "/remotes",
        "trash": "/trash",
        "jobs": "/jobs",
        "job": f"/jobs/{newest_job(demo)}",
        "compare-jobs": "/jobs/compare",
        "admin": "/admin",
        "train": f"/train?model={demo.model}&corpus=demo",
        "harvest-form": f"{model}/harvest?sources={demo.source}&corpus=demo",
        "harvests": "/harvests",
        "harvest": "/harvests/1",
        "corpora": "/corpora",
        "corpus": "/corpora/demo",
        "document": "/corpora/demo/3",
        "upload": "/upload",
        "import": "/import",
        "docs": "/docs",
        "not-found": f"{source}/999999",
    }


ASKED = "text=The+harbour+was+quiet+and+she+was+dead+and+buried."


def newest_job(demo: Demo) -> int:
    """The demo's job that computes the meaning of labels, or what was queued on a kept demo since."""
    return max(int(number) for number in re.findall(r'href="/jobs/(\d+)"', httpx.get(f"{demo.url}/jobs").text))


@pytest.fixture(scope="package")
def demo_server() -> Iterator[Demo]:
    """The demo as a person starts it. Its processes end with the run."""
    if "SAE_ATLAS_TEST_URL" in os.environ:
        yield Demo(os.environ["SAE_ATLAS_TEST_URL"], Settings().data_dir)
        return
    kept = os.environ.get("SAE_ATLAS_TEST_DEMO_DIR")
    with tempfile.TemporaryDirectory(prefix="sae-atlas-demo-") as fresh:
        port = _free_port()
        environment = os.environ | {"SAE_ATLAS_DATA_DIR": kept or fresh, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", "from app.cli import main; main()", "demo", "--port", str(port)]
        with open(Path(fresh) / "server.log", "wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            demo = Demo(f"http://127.0.0.1:{port}", Path(kept or fresh))
            _wait(demo, process, Path(fresh) / "server.log")
            yield demo
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


@pytest.fixture(scope="package")
def playwright() -> Iterator[Playwright]:
    """Ends with this package: its event loop runs in the main thread, where other tests start their own."""
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="package")
def browser(playwright: Playwright) -> Iterator[Browser]:
    launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
    yield launched
    launched.close()


@pytest.fixture
def page(browser: Browser, demo_server: Demo) -> Iterator[Page]:
    """A page that fails its test for anything the browser complains of."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, base_url=demo_server.url)
    opened = context.new_page()
    complaints: list[str] = []
    # The software renderer's remark on its own speed, wherever WebGL is drawn and looked at.
    harmless = "GPU stall due to ReadPixels"
    bad = ("error", "warning")
    opened.on("console", lambda m: complaints.append(m.text) if m.type in bad and harmless not in m.text else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    yield opened
    context.close()
    assert complaints == []


def shoot(context: BrowserContext, path: str, name: str) -> None:
    """Keep a picture of a page for people to look at, after everything on it has settled."""
    SCREENSHOTS.mkdir(exist_ok=True)
    opened = context.new_page()
    opened.goto(path, wait_until="networkidle")
    if name.startswith("palette"):
        opened.keyboard.press("Control+k")
        opened.locator("#palette-options").wait_for()
    if name.startswith("steer"):
        opened.get_by_role("button", name="Generate").click()
        expect(opened.locator("[data-status]")).to_contain_text("tokens in", timeout=60_000)
        expect(opened.get_by_role("button", name="Stop")).to_be_hidden(timeout=60_000)
    # A page that asks again until the model is loaded is busy all the while.
    expect(opened.locator(".loading:visible, .htmx-request:visible")).to_have_count(0, timeout=120_000)
    opened.wait_for_load_state("networkidle")
    opened.screenshot(path=SCREENSHOTS / f"{name}.png")
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        with Image.open(SCREENSHOTS / f"{name}.png") as picture:
            smaller = picture.convert("RGB").resize((round(picture.width * 0.8), round(picture.height * 0.8)))
            smaller.save(Path(PICTURES) / f"{name}.webp", quality=40, method=6)
    width = opened.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    opened.close()
    assert width[0] <= width[1], f"{name} is {width[0]} px wide in a window of {width[1]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(demo: Demo, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the demo ended at once:\n{log.read_text()[-3000:]}"
        try:
            if httpx.get(f"{demo.url}/readyz", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"the demo was not ready within {START_SECONDS} s:\n{log.read_text()[-3000:]}")
