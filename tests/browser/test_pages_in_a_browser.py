"""Each page of the foundation, driven in a real browser on the real demo."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser.conftest import Demo, pages, shoot

KEPT = Path(__file__).resolve().parents[2] / "docs" / "screenshots"
PROMPT = "The harbour was quiet that morning. She counted 12 boats."


def test_home_leads_to_a_source_and_to_a_random_feature(page: Page, demo_server: Demo) -> None:
    page.goto("/")
    page.get_by_role("link", name=demo_server.source, exact=True).click()
    expect(page).to_have_url(demo_server.path)
    page.goto("/")
    page.get_by_role("link", name="Random feature").click()
    expect(page).to_have_url(re.compile(rf"{demo_server.path}/\d+$"))


def test_the_feature_table_sorts_filters_and_pages_in_place(page: Page, demo_server: Demo) -> None:
    page.goto(demo_server.path)
    page.get_by_role("columnheader", name="max activation").get_by_role("link").click()
    expect(page.get_by_role("columnheader", name="max activation")).to_have_attribute("aria-sort", "descending")
    expect(page).to_have_url(re.compile("sort=max&descending=true"))
    total = page.locator(".count strong").inner_text()
    page.get_by_role("searchbox", name="label", exact=True).fill("zzzznothing")
    expect(page.get_by_text("No feature fits.")).to_be_visible()
    page.get_by_role("searchbox", name="label", exact=True).fill("")
    expect(page.locator(".count strong")).to_have_text(total)
    page.locator("[data-next]").click()
    expect(page.locator(".pager")).to_contain_text("page 2 of")
    page.go_back()
    expect(page.locator(".pager")).to_contain_text("page 1 of")


def test_a_feature_page_is_walked_by_keyboard(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/17")
    page.keyboard.press("j")
    expect(page).to_have_url(f"{demo_server.path}/18")
    page.keyboard.press("ArrowLeft")
    expect(page).to_have_url(f"{demo_server.path}/17")
    page.keyboard.press("g")
    page.keyboard.type("42")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{demo_server.path}/42")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_a_token_tells_its_value(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/17")
    page.locator(".examples mark").first.hover()
    expect(page.locator(".tip")).to_have_text(re.compile(r"^[\d.,]+ · position \d+ · token \d+$"))


def test_examples_change_width_in_place_and_a_context_opens(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/17")
    before = page.locator(".examples .window").first.inner_text()
    page.locator("[data-width]", has_text="±5").click()
    expect(page).to_have_url(re.compile("width=5"))
    expect(page.locator(".examples .window").first).not_to_have_text(before)
    example = page.locator(".example").first
    example.hover()
    narrow = len(example.locator(".window").inner_text())
    example.get_by_role("link", name="whole context").click()
    expect(example.get_by_role("link", name="whole context")).to_have_count(0)
    assert len(example.locator(".window").inner_text()) > narrow
    example.get_by_role("button", name="less").click()
    expect(example.get_by_role("link", name="whole context")).to_be_visible()
    assert len(example.locator(".window").inner_text()) == narrow


def test_ones_own_text_is_answered_in_place_and_kept_in_the_address(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/17")
    page.get_by_label("Your own text", exact=True).fill(PROMPT)
    page.keyboard.press("Enter")
    expect(page.locator("#try .answer")).to_be_visible(timeout=60_000)
    expect(page).to_have_url(re.compile(r"\?text=The\+harbour"))
    page.reload()
    expect(page.locator("#try .answer")).to_be_visible(timeout=60_000)


def test_an_old_answer_is_dimmed_while_a_new_text_is_read(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/17?text=The+harbour")
    expect(page.locator("#try .answer")).to_have_css("opacity", "1", timeout=60_000)
    held: list[Route] = []
    page.route("**/17/try", lambda route: held.append(route))
    page.get_by_label("Your own text", exact=True).fill(PROMPT)
    page.keyboard.press("Enter")
    expect(page.locator("#try .answer")).to_have_css("opacity", "0.45")
    held[0].continue_()
    expect(page.locator("#try .answer")).to_contain_text("boats", timeout=60_000)
    expect(page.locator("#try .answer")).to_have_css("opacity", "1")


def test_an_example_sent_to_the_box_activates_the_feature_as_it_did_in_the_corpus(
    page: Page, demo_server: Demo
) -> None:
    page.goto(f"{demo_server.path}/17?width=all")
    example = page.locator(".example").first
    example.hover()
    example.get_by_role("button", name="try").click()
    expect(page.locator("#try .answer mark").first).to_be_visible(timeout=60_000)


def test_every_token_of_a_cut_character_is_seen_and_can_be_chosen(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/prompt")
    page.get_by_label("Prompt", exact=True).fill("他被埋葬了 👩‍👩‍👧")
    page.get_by_role("button", name="Read it").click()
    expect(page.locator(".tok .part").first).to_be_visible(timeout=60_000)
    for i in range(page.locator(".tok").count()):
        box = page.locator(".tok").nth(i).bounding_box()
        assert box is not None
        assert box["width"] >= 4
        page.locator(".tok").nth(i).click()
        expect(page.locator(".tok").nth(i)).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#reading h2 .chip").first).not_to_be_empty()
        expect(page.locator("#reading h2 .chip").first).not_to_have_text("∅")


def test_on_a_phone_labels_have_room_and_statistics_come_before_the_examples(page: Page, demo_server: Demo) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{demo_server.path}/prompt?text=The+harbour+was+quiet.&at=2")
    label = page.locator(".hits.ranked td.label").first
    expect(label).to_be_visible(timeout=60_000)
    room = label.bounding_box()
    assert room is not None
    assert room["width"] > 300
    page.goto(f"{demo_server.path}/17")
    tops = [page.locator(found).first.bounding_box() for found in ("#try", ".chart", ".logits", "#examples", ".near")]
    heights = [box["y"] for box in tops if box is not None]
    assert len(heights) == len(tops)
    assert heights == sorted(heights)


def test_a_prompt_is_read_token_by_token(page: Page, demo_server: Demo) -> None:
    page.goto(f"{demo_server.path}/prompt")
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Read it").click()
    expect(page.locator(".tok").first).to_be_visible(timeout=60_000)
    assert "".join(page.locator(".tok").all_text_contents()) == PROMPT
    page.locator(".tok", has_text="harbour").click()
    expect(page.locator("#reading h2", has_text="harbour")).to_be_visible()
    page.locator(".hits").first.get_by_role("button", name=re.compile("shade the prompt")).first.click()
    expect(page.locator(".shaded-by")).to_contain_text("Shaded by feature")
    address = page.url
    page.goto("about:blank")
    page.goto(address)
    expect(page.locator(".shaded-by")).to_contain_text("Shaded by feature")
    expect(page.locator('.tok[aria-pressed="true"]')).to_have_text(" harbour")


def test_steering_streams_two_texts_and_the_run_can_be_seen_again(page: Page, demo_server: Demo) -> None:
    page.goto(f"/{demo_server.model}/steer?source={demo_server.source}&index=17&temperature=0&n_tokens=12")
    page.get_by_label("Exact strength of feature 17").fill("60")
    page.get_by_role("button", name="Generate").click()
    saved = page.locator("[data-share] a")
    expect(saved).to_be_visible(timeout=90_000)
    default, steered = page.locator("[data-default]").inner_text(), page.locator("[data-steered]").inner_text()
    assert default != steered
    assert f"{demo_server.source}:17:60:" in unquote(page.url)
    saved.click()
    expect(page.locator("[data-default]")).to_have_text(default)
    expect(page.locator("[data-steered]")).to_have_text(steered)


def test_the_slider_and_the_exact_field_follow_each_other(page: Page, demo_server: Demo) -> None:
    page.goto(f"/{demo_server.model}/steer?source={demo_server.source}&index=17")
    expect(page.locator("[data-steer][data-mounted]")).to_have_count(1)
    slider, exact = (page.get_by_label(f"{kind} of feature 17", exact=True) for kind in ("Strength", "Exact strength"))
    slider.focus()
    page.keyboard.press("End")
    reach = float(exact.input_value())
    assert reach > 0
    exact.fill(str(reach / 2))
    assert 0 < float(slider.input_value()) < float(slider.get_attribute("max") or 0)
    exact.fill(str(reach * 2))
    assert slider.input_value() == slider.get_attribute("max")
    slider.focus()
    page.keyboard.press("Home")
    assert float(exact.input_value()) == pytest.approx(-2 * reach, rel=1e-2)


def test_a_feature_to_steer_is_found_by_its_index_and_removed(page: Page, demo_server: Demo) -> None:
    page.goto(f"/{demo_server.model}/steer")
    page.get_by_label("Add a feature by label or index").press_sequentially("23")
    page.locator(".choice:visible").first.click()
    expect(page.locator(".steered")).to_have_count(1)
    page.get_by_role("button", name="Remove feature 23").click()
    expect(page.locator(".steered")).to_have_count(0)


def test_a_run_is_stopped_in_the_middle(page: Page, demo_server: Demo) -> None:
    page.goto(f"/{demo_server.model}/steer?source={demo_server.source}&index=17&n_tokens=400")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("[data-status]")).to_contain_text("tokens in", timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("[data-status]")).to_contain_text("Stopped after")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def test_jobs_are_listed(page: Page) -> None:
    page.goto("/jobs")
    expect(page.get_by_role("heading", name="Jobs")).to_be_visible()


def test_search_answers_while_one_types_and_takes_pasted_addresses(page: Page, demo_server: Demo) -> None:
    page.goto("/search")
    page.locator("#q").press_sequentially("fires")
    expect(page.locator("#hits .count strong")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type(f"https://www.neuronpedia.org/{demo_server.model}/{demo_server.source}/5")
    page.keyboard.press("Enter")
    expect(page).to_have_url(f"{demo_server.path}/5")


def test_pages_read_without_javascript(browser: Browser, demo_server: Demo) -> None:
    context = browser.new_context(java_script_enabled=False, base_url=demo_server.url)
    page = context.new_page()
    page.goto(f"{demo_server.path}/17")
    expect(page.locator(".examples mark").first).to_be_visible()
    page.get_by_label("Your own text", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Test").click()
    expect(page.locator("#try .answer")).to_be_visible(timeout=60_000)
    page.goto(f"{demo_server.path}/prompt?text=The+harbour")
    page.locator(".tok", has_text="harbour").click()
    expect(page.locator("#reading h2", has_text="harbour")).to_be_visible(timeout=60_000)
    context.close()


@pytest.mark.parametrize(
    ("kind", "width", "scheme"), [("wide", 1280, "light"), ("phone", 390, "light"), ("dark", 1280, "dark")]
)
def test_every_page_fits_its_window_and_is_pictured(
    browser: Browser, demo_server: Demo, kind: str, width: int, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,  # pyright: ignore[reportArgumentType]
        base_url=demo_server.url,
    )
    for name, path in pages(demo_server).items():
        shoot(context, path, f"{name}-{kind}")
    context.close()


def test_the_overview_of_pictures_shows_every_page_wide_on_a_phone_and_dark(demo_server: Demo) -> None:
    wanted = {f"{name}-{kind}.webp" for name in pages(demo_server) for kind in ("wide", "phone", "dark")}
    shown = re.findall(r"\]\((\S+\.webp)\)", (KEPT / "README.md").read_text())
    assert set(shown) == wanted
    assert {path.name for path in KEPT.glob("*.webp")} == wanted
    assert sum(path.stat().st_size for path in KEPT.glob("*.webp")) < 4_000_000
