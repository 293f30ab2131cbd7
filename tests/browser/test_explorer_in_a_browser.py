"""The SAE's table, its map, comparing and searching in a real browser, on the running demo."""

from __future__ import annotations

import re

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from app import db, maps, vectors
from app.maps import Cluster
from app.settings import Settings
from app.tables import Source
from tests.browser.conftest import Demo


@pytest.fixture(scope="module", autouse=True)
def mapped(demo_server: Demo) -> None:
    """The demo with a map: where its bundle brings none, the two strongest directions of its decoder are one."""
    settings = Settings(data_dir=demo_server.data_dir)
    engine = db.connect(settings)
    with db.sessions(engine).begin() as session:
        source = session.query(Source).filter_by(name=demo_server.source).one()
        if maps.map_of(session, source.id) is None:
            rows = vectors.decoder_rows(settings, source.sae_hash, list(range(source.d_sae)))
            _, directions = np.linalg.eigh(rows.T @ rows)
            places = rows @ directions[:, -2:]
            places = places / np.abs(places).max()
            side = (places[:, 0] > 0).astype(int)
            named = [
                Cluster(name, x, 0.0, int((side == i).sum())) for i, (name, x) in enumerate([("w", -0.5), ("e", 0.5)])
            ]
            maps.record(session, source, places, side, named, {"method": "principal directions"})
    engine.dispose()


def test_filters_narrow_the_count_as_one_types_and_the_address_keeps_them(page: Page, demo_server: Demo) -> None:
    page.goto(demo_server.path)
    expect(page.locator("#features .count strong")).to_have_text("4,096")
    page.get_by_label("fires on").fill("buried")
    expect(page.locator("#features .count strong")).not_to_have_text("4,096")
    found = page.locator("#features .count strong").inner_text()
    assert 1 <= int(found) < 200
    expect(page).to_have_url(re.compile("token=buried"))
    page.reload()
    expect(page.locator("#features .count strong")).to_have_text(found)
    expect(page.locator("#features tbody").first).to_contain_text("burial")


def test_rows_come_as_one_scrolls(page: Page, demo_server: Demo) -> None:
    page.goto(demo_server.path)
    rows = page.locator("#features tbody tr:not(.more tr)")
    expect(rows).to_have_count(50)
    page.locator("#features tbody.more").scroll_into_view_if_needed()
    expect(page.locator('#features a[href$="/12-demo/75"]').first).to_be_attached()
    assert len(set(page.locator("#features tbody td:first-child a").all_inner_texts())) >= 100


def test_without_javascript_the_next_page_is_a_link(browser, demo_server: Demo) -> None:  # type: ignore[no-untyped-def]
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(demo_server.path)
    plain.get_by_role("link", name="next page").click()
    expect(plain.locator("#features tbody td").first).to_have_text("50")
    context.close()


def test_the_map_says_what_a_point_is_highlights_and_lists_what_is_drawn_around(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/map?q=burial")
    box = page.locator("[data-map]")
    expect(box).to_have_attribute("data-ready", "yes")
    expect(page.locator("[data-found]")).to_have_text(re.compile("found"))
    area = box.bounding_box()
    assert area is not None
    x, y = area["x"] + area["width"] / 2, area["y"] + area["height"] / 2
    for step in range(60):
        page.mouse.move(x + 3 * step, y + step)
        if page.locator("[data-point]").is_visible():
            break
        page.wait_for_timeout(80)
    expect(page.locator("[data-point]")).to_contain_text("density")
    page.get_by_role("button", name="Draw around features").click()
    page.mouse.move(x - 200, y - 200)
    page.mouse.down()
    for dx, dy in ((200, -200), (200, 200), (-200, 200), (-200, -200)):
        page.mouse.move(x + dx, y + dy, steps=4)
    page.mouse.up()
    expect(page.locator("[data-chosen]")).to_contain_text("chosen")
    page.get_by_role("link", name="density", exact=True).click()
    expect(page).to_have_url(re.compile("color=density"))


def test_search_forgives_a_typing_mistake_and_shows_the_top_example(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.url}/search")
    page.get_by_label("Search labels").last.fill("burail graves")
    expect(page.locator("#hits li").first).to_contain_text("burial: graves, being buried")
    expect(page.locator("#hits li").first.locator("mark").first).to_be_attached()


def test_two_features_of_the_demo_are_compared(page: Page, demo_server: Demo) -> None:
    here = f"{demo_server.model}/{demo_server.source}"
    page.goto(f"{demo_server.url}/compare?a={here}/24&b={here}/127")
    expect(page.locator(".versus section")).to_have_count(2)
    expect(page.locator(".versus section").first).to_contain_text("burial")
    expect(page.locator(".versus section").last).to_contain_text("calm")


def test_home_answers_while_one_types(page: Page, demo_server: Demo) -> None:
    page.goto(demo_server.url)
    expect(page.locator(".samples mark").first).to_be_attached()
    page.locator("#q").fill("burail graves")
    expect(page.locator("#hits li").first).to_contain_text("burial: graves, being buried")
    page.locator("#q").fill(demo_server.model[:8])
    expect(page.locator("#hits .named")).to_contain_text(demo_server.source)
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/search\?q="))
