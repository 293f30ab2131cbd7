"""axe-core on every page, wide and on a phone, light and dark; keyboard order; motion; activation without colour."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Demo, pages

GRAVE = ("serious", "critical")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")])
def test_axe_finds_nothing_serious_on_any_page(browser: Browser, demo_server: Demo, width: int, scheme: str) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, base_url=demo_server.url
    )  # type: ignore[arg-type]
    page = context.new_page()
    found: list[str] = []
    for name, path in pages(demo_server).items():
        page.goto(path, wait_until="networkidle")
        if name == "palette":
            page.keyboard.press("Control+k")
            expect(page.locator("#palette-options [role=option]").first).to_be_visible()
        for violation in Axe().run(page).response["violations"]:
            if violation["impact"] in GRAVE:
                found += [f"{name}: {violation['id']}: {node['html'][:160]}" for node in violation["nodes"][:3]]
    context.close()
    assert not found, "\n".join(found)


def test_the_first_tab_skips_to_the_content_and_focus_is_seen(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/17")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    expect(page.get_by_role("link", name="Skip to content")).to_be_in_viewport()
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate("""() => {
            const e = document.activeElement, style = getComputedStyle(e);
            return [e.closest("header, .steps, .feature-head, #try, #examples")?.className ?? "", style.outlineStyle];
        }""")
        )
    places = [place for place, _ in order]
    wanted = ["bar", "steps", "head feature-head", "try", "examples"]
    assert sorted(set(places) & set(wanted), key=places.index) == wanted
    assert all(outline != "none" for _, outline in order)


def test_activation_is_told_without_colour(page: Page, demo_server: Demo) -> None:
    """By the line below a token, which grows with it, and by the value that is read out."""
    page.goto(f"{demo_server.path}/17?scale=example")
    lines = page.locator(".examples mark").evaluate_all(
        "marks => marks.map(m => [+m.className.match(/a(\\d+)/)[1], parseFloat(getComputedStyle(m).borderBottomWidth)])"
    )
    assert all(width >= 1 for _, width in lines)
    weak = max((width for level, width in lines if level <= 2), default=0)
    assert weak < min(width for level, width in lines if level >= 9)


def test_tokens_are_read_with_the_arrow_keys(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/17")
    window = page.locator(".examples .window[tabindex]").first
    window.focus()
    expect(page.locator(".tip")).to_have_text(re.compile(r"^[\d.,]+ · position \d+ · token \d+$"))
    spoken = page.locator("[role=status].unseen")
    expect(spoken).to_contain_text("position")
    page.keyboard.press("Home")
    for _ in range(40):
        page.keyboard.press("ArrowLeft")
    first = window.locator("mark").first
    expect(first).to_have_class(re.compile(r"\bat\b"))
    expect(page).to_have_url(f"{demo_server.path}/17")
    page.locator("h1").click()
    expect(page.locator(".tip")).to_have_count(0)


def test_nothing_moves_for_those_who_want_no_motion(browser: Browser, demo_server: Demo) -> None:
    context = browser.new_context(reduced_motion="reduce", base_url=demo_server.url)
    page = context.new_page()
    for path in (f"{demo_server.path}/17", f"/{demo_server.model}/steer", "/jobs", "/"):
        page.goto(path)
        moving = page.evaluate("""() => [...document.querySelectorAll("*")].filter(e => {
            const s = getComputedStyle(e);
            return s.animationName !== "none" || parseFloat(s.transitionDuration) > 0;
        }).map(e => e.outerHTML.slice(0, 100))""")
        assert moving == []
    context.close()
