"""What a person waits for: a budget for the first paint, and nothing that moves while a page is filled.

Times are the best of several loads, as a busy machine only ever makes them worse.
"""

from __future__ import annotations

import httpx
import pytest
from playwright.sync_api import Browser, Page

from tests.browser.conftest import Demo

FIRST_PAINT_MS = 300
TRIES = 12
WATCH = """
    window.shift = 0;
    new PerformanceObserver(list => list.getEntries().forEach(e => { window.shift += e.value; }))
        .observe({ type: "layout-shift", buffered: true });
"""


def first_paint(page: Page, path: str) -> float:
    page.goto(path, wait_until="networkidle")
    return page.evaluate("""() => new Promise(found => {
        const seen = () => performance.getEntriesByName("first-contentful-paint")[0];
        if (seen()) return found(seen().startTime);
        new PerformanceObserver((_, observer) => {
            if (seen()) { observer.disconnect(); found(seen().startTime); }
        }).observe({ type: "paint", buffered: true });
    })""")


def explorer_pages(demo: Demo) -> dict[str, str]:
    source = f"{demo.model}/{demo.source}"
    return {
        "feature": f"/{source}/24",
        "source": f"/{source}",
        "home": "/",
        "model": f"/{demo.model}",
        "search": "/search?q=burial",
        "features compared": f"/compare?a={source}/24&b={source}/127",
        "SAEs compared": f"/compare?a={source}&b={source}",
        "map": f"/{source}/map",
    }


def test_every_page_is_painted_within_its_budget(browser: Browser, demo_server: Demo) -> None:
    context = browser.new_context(base_url=demo_server.url)
    page = context.new_page()
    best = dict.fromkeys(explorer_pages(demo_server), float("inf"))
    for name, path in explorer_pages(demo_server).items():
        for _ in range(TRIES):
            best[name] = min(best[name], first_paint(page, path))
            if best[name] < FIRST_PAINT_MS:
                break
    context.close()
    assert max(best.values()) < FIRST_PAINT_MS, best


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_moves_while_a_page_is_filled(browser: Browser, demo_server: Demo, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, base_url=demo_server.url)
    context.add_init_script(WATCH)
    page = context.new_page()
    moved: dict[str, float] = {}
    for path in (*explorer_pages(demo_server).values(), f"{demo_server.path}/24?embed=true", "/jobs"):
        page.goto(path, wait_until="networkidle")
        # Charts and the map mount after the page is there: seen to its end, as somebody reads it.
        page.evaluate("scrollTo({ top: document.documentElement.scrollHeight, behavior: 'instant' })")
        page.wait_for_load_state("networkidle")
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        moved[path] = page.evaluate("window.shift")
    context.close()
    # Where the network cuts the header in two, its links settle by a hair: 0.0007 was seen. What people see is 0.01.
    assert all(shift < 0.002 for shift in moved.values()), moved


def test_no_feature_page_of_the_demo_is_over_60_kB(demo_server: Demo) -> None:
    with httpx.Client() as http:
        sizes = {
            i: len(http.get(f"{demo_server.path}/{i}").content) for i in (24, 787, 1680, 4020, *range(0, 4096, 128))
        }
    assert max(sizes.values()) <= 60_000, sizes
