"""The feature page's tools in a real browser: choosing, walking on, sending examples, palette, themes, embedding."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Demo


def test_choices_stay_in_the_address_and_go_along_to_the_next_feature(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/24")
    page.keyboard.press("b")
    expect(page).to_have_url(re.compile("breaks=real"))
    expect(page.locator("#examples")).to_have_class(re.compile("real-breaks"))
    expect(page.locator(".examples .br").first).to_have_css("display", "inline")
    page.keyboard.press("s")
    expect(page).to_have_url(re.compile("scale=example"))
    page.reload()
    page.keyboard.press("j")
    expect(page).to_have_url(f"{demo_server.path}/25?scale=example&breaks=real")
    page.locator("#jump").fill("24")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{demo_server.path}/24?scale=example&breaks=real")


def test_the_next_feature_is_there_before_it_is_asked_for(page: Page, demo_server: Demo) -> None:
    with page.expect_response(lambda r: r.url.endswith("/31")):
        page.goto(f"{demo_server.path}/30", wait_until="networkidle")
    page.keyboard.press("j")
    expect(page).to_have_url(f"{demo_server.path}/31")
    how = page.evaluate("performance.getEntriesByType('navigation')[0].deliveryType")
    assert how == "navigational-prefetch"


def test_an_example_is_copied_and_sent_to_the_prompt_and_steering_pages(browser: Browser, demo_server: Demo) -> None:
    context = browser.new_context(base_url=demo_server.url, permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(f"{demo_server.path}/24")
    example = page.locator(".example").first
    example.hover()
    example.get_by_role("button", name="copy").click()
    expect(example.get_by_role("button", name="copied")).to_be_visible()
    text = page.evaluate("navigator.clipboard.readText()").strip()
    assert len(text) > 40
    assert "…" not in text
    assert "↵" not in text
    example.get_by_role("link", name="prompt").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(text)
    page.go_back()
    example.hover()
    example.get_by_role("link", name="steer").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(text)
    expect(page.locator(".steered")).to_have_count(1)
    context.close()


def test_more_examples_of_a_dense_feature_follow_when_they_are_scrolled_to(page: Page, demo_server: Demo) -> None:
    page.goto(demo_server.path + "?sort=density&descending=true")
    page.locator("#features td a").first.click()
    expect(page.get_by_text("Dense features seldom")).to_be_visible()
    before = page.locator(".example").count()
    page.locator("#rest").scroll_into_view_if_needed()
    expect(page.locator("#rest a", has_text="More examples")).to_have_count(0)
    assert page.locator(".example").count() > before


def test_the_palette_leads_to_features_labels_and_pages(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/17")
    page.keyboard.press("Control+k")
    field = page.get_by_role("combobox", name="Go to a page")
    expect(field).to_be_focused()
    expect(page.locator("#palette-options [aria-selected=true]")).to_have_count(1)
    field.fill("42")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{demo_server.path}/42")
    page.keyboard.press("Control+k")
    field.fill("burial")
    expect(page.locator("#palette-options .kind", has_text="label").first).to_be_visible()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{demo_server.path}/24")
    page.locator("[data-palette]").click()
    field.fill("zzzznothing")
    expect(page.locator(".palette").get_by_text("Nothing fits")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".palette")).to_be_hidden()


def test_colours_follow_the_system_until_they_are_chosen(browser: Browser, demo_server: Demo) -> None:
    context = browser.new_context(base_url=demo_server.url, color_scheme="dark")
    page = context.new_page()
    page.goto("/")
    paper = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(paper)
    page.locator("[data-theme-switch]").click()
    expect(page.locator("[data-theme-switch]")).to_have_attribute("aria-label", "Colours: light")
    light = page.evaluate(paper)
    assert light != dark
    page.goto(f"{demo_server.path}/17")
    assert page.evaluate(paper) == light
    page.keyboard.press("d")
    assert page.evaluate(paper) == dark
    context.close()


def test_the_selector_leads_to_another_index_and_keeps_to_what_exists(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/17")
    expect(page.get_by_label("Model and SAE")).to_have_value(demo_server.source)
    page.locator("[data-jump]").fill(f"https://www.neuronpedia.org/{demo_server.model}/{demo_server.source}/5?x=1")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{demo_server.path}/5")


def test_printing_leaves_the_controls_out_and_keeps_the_evidence(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/24")
    page.emulate_media(media="print")
    for gone in (".bar", ".steps", ".try", ".switches", ".actions"):
        expect(page.locator(gone).first).to_be_hidden()
    for kept in ("h1", ".chart", ".logits", ".examples mark", ".near"):
        expect(page.locator(kept).first).to_be_visible()


class Blog(http.server.BaseHTTPRequestHandler):
    """Somebody else's site that frames whatever address its query holds."""

    def do_GET(self) -> None:
        address = json.dumps(self.path.partition("?")[2])
        body = f"<!doctype html><title>blog</title><iframe src={address} width=540 height=600></iframe>".encode()
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def blog() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Blog)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_another_site_frames_a_feature_that_answers_there(browser: Browser, demo_server: Demo, blog: str) -> None:
    page = browser.new_context().new_page()
    page.goto(f"{blog}/?{demo_server.path}/24?embed=true&embedplots=false&defaulttesttext=She+was+buried+there.")
    frame = page.frame_locator("iframe")
    expect(frame.locator("#try .answer mark").first).to_be_visible(timeout=60_000)
    expect(frame.locator(".chart")).to_have_count(0)
    frame.locator("[data-width]", has_text="±5").click()
    expect(frame.locator("[data-width][aria-current]")).to_have_text("±5")
    expect(frame.locator(".bar")).to_have_count(0)
    page.context.close()


def test_another_site_may_not_frame_any_other_page(browser: Browser, demo_server: Demo, blog: str) -> None:
    page = browser.new_context().new_page()
    for path in (f"{demo_server.path}/24", f"{demo_server.path}/24/embed", f"{demo_server.url}/jobs"):
        page.goto(f"{blog}/?{path}", wait_until="networkidle")
        expect(page.frame_locator("iframe").locator("#main")).to_have_count(0)
    page.context.close()


def test_the_builder_shows_the_frame_that_its_code_makes(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/24/embed")
    preview = page.frame_locator("#embedding iframe")
    expect(preview.locator(".chart").first).to_be_visible()
    page.get_by_label("histograms and logits").uncheck()
    page.get_by_label("steering").uncheck()
    page.get_by_label("height").fill("300")
    code = page.get_by_label("Code")
    expect(code).to_have_value(re.compile('height="300"'))
    expect(code).to_have_value(
        re.compile(re.escape(f'src="{demo_server.path}/24?embed=true&amp;embedplots=false&amp;embedsteer=false"'))
    )
    expect(preview.locator(".chart")).to_have_count(0)
    expect(preview.locator(".embed-steer")).to_have_count(0)
    expect(page).to_have_url(re.compile("height=300"))
