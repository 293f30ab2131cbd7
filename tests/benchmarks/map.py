"""A map of 65,536 features in the browser: pointer handlers and frames, at the median (software rendering)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright

from tests.browser import test_map_at_scale as scale
from tests.browser.conftest import ARGUMENTS, CHROMIUM

ROUNDS = 5


def main() -> dict[str, Any]:
    with (
        tempfile.TemporaryDirectory() as directory,
        scale.served(Path(directory) / "data") as url,
        sync_playwright() as p,
    ):
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        with scale.opened(browser, url) as page:
            hovers = [scale.hovered(page) for _ in range(ROUNDS)]
            moves = [scale.moved(page) for _ in range(ROUNDS)]
            scale.times(page)
            scale.draw_around(page, 200)
            line = scale.times(page)
        browser.close()
    return {
        "hover, ms a move": _median(hovers, "pointermove"),
        "drag, ms a move": _median(moves, "pointermove"),
        "zoom, ms a turn": _median(moves, "wheel"),
        "frame while moved, ms": _median(moves, "frame"),
        "line around features, ms at its end": round(line["pointerup"], 1),
        "wanted": "handlers under 8, frames under 50, line under 250",
    }


def _median(tries: list[dict[str, float]], kind: str) -> float:
    return round(float(np.median([found[kind] for found in tries])), 1)


if __name__ == "__main__":
    from tests.benchmarks.__main__ import show

    show("map", main())
