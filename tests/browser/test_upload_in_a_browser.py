"""An SAE added and removed in a real browser, on a catalog of its own."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Browser, expect

from app.settings import Settings
from tests.app.test_foreign_files import sparsify
from tests.app.test_upload import sae, serving
from tests.conftest import Catalog


def test_an_sae_is_added_by_its_folder_and_removed(
    browser: Browser, filled: Catalog, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "up").mkdir()
    for name, content in sae().items():
        (tmp_path / "up" / name).write_bytes(content)
    with serving(settings) as url:
        page = browser.new_page()
        page.goto(f"{url}/upload")
        page.set_input_files("#upload-files", [tmp_path / "up" / "cfg.json"])
        page.get_by_role("button", name="Add it").click()
        expect(page.get_by_role("alert")).to_contain_text(
            "The upload holds cfg.json, but no weights; sae_weights.safetensors (SAELens)"
        )
        page.set_input_files("#upload-folder", tmp_path / "up")
        page.get_by_role("button", name="Add it").click()
        page.wait_for_url("**/tiny/1-sae")
        expect(page.locator("#check")).to_contain_text("being checked on real text")
        expect(page.locator("#memory")).to_contain_text("KiB in memory")
        page.get_by_text("Remove this SAE").click()
        page.get_by_role("button", name="Remove 1-sae").click()
        page.wait_for_url("**/tiny")
        expect(page.get_by_role("link", name="1-sae", exact=True)).to_have_count(0)
        page.close()


def test_a_folder_is_dropped_on_the_page(browser: Browser, filled: Catalog, settings: Settings, tmp_path: Path) -> None:
    """As the system drops it: sparsify says its layer in the folder's name alone, which must arrive with the files."""
    files = sparsify("layers.1")
    (tmp_path / "layers.1").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with serving(settings) as url:
        page = browser.new_page()
        page.goto(f"{url}/upload")
        page.fill("#upload-set", "dropped")
        zone = page.locator("[data-drop]")
        box = zone.bounding_box()
        assert box is not None
        place = {"x": box["x"] + box["width"] - 20, "y": box["y"] + box["height"] / 2}
        data = {"items": [], "files": [str(tmp_path / "layers.1")], "dragOperationsMask": 1}
        devtools = page.context.new_cdp_session(page)
        for kind in ("dragEnter", "dragOver"):
            devtools.send("Input.dispatchDragEvent", {"type": kind, "data": data, **place})
        expect(zone).to_have_attribute("data-over", "yes")
        devtools.send("Input.dispatchDragEvent", {"type": "drop", "data": data, **place})
        expect(page.locator("[data-chosen]")).to_contain_text("sae.safetensors")
        expect(zone).not_to_have_attribute("data-over", "yes")
        page.get_by_role("button", name="Add it").click()
        page.wait_for_url("**/tiny/1-dropped")
        page.close()
