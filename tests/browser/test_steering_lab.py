"""The steering lab on the real demo: sliders, streams, shades, chats, sweeps, presets, vectors; without JavaScript."""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser.conftest import Demo, shoot

LONG = 60_000
"""Milliseconds until a slow machine has read a prompt or made a text."""


def lab(page: Page, demo: Demo, more: str = "&temperature=0&n_tokens=10") -> None:
    page.goto(f"/{demo.model}/steer?feature={demo.source}:24:120&text=At+the+end+of+the+road+stood+a{more}")
    expect(page.locator("[data-steer][data-mounted]")).to_have_count(1)


def generated(page: Page) -> None:
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("[data-share]")).to_be_visible(timeout=LONG)


def test_tokens_are_shaded_and_show_their_alternatives_in_both_runs(page: Page, demo_server: Demo) -> None:
    lab(page, demo_server)
    page.get_by_label("a random direction of the same norm").check()
    generated(page)
    expect(page.locator("[data-shade-status]")).to_contain_text("Point at a token", timeout=LONG)
    expect(page.locator('[data-extra="random_direction"] .tok')).to_have_count(10)
    page.get_by_label("shade tokens by").select_option("change")
    expect(page.locator("[data-steered] .tok[class*=' a']").first).to_be_visible()
    page.locator("[data-steered] .tok").nth(1).hover()
    tip = page.locator(".alternatives")
    expect(tip).to_contain_text("default:")
    expect(tip).to_contain_text("steered:")
    assert tip.locator("tr").count() == 10


def test_the_address_of_a_run_shows_the_same_again(page: Page, demo_server: Demo) -> None:
    lab(page, demo_server)
    generated(page)
    steered = page.locator("[data-steered]").inner_text()
    address = page.locator("[data-share] a").get_attribute("href")
    assert address
    page.goto(address)
    expect(page.locator("[data-steered]")).to_have_text(steered)
    expect(page.locator("[data-steered] .tok")).to_have_count(10)
    expect(page.locator("[data-share]")).to_contain_text("float32, seed 16")
    expect(page.locator("[data-strength]")).to_have_value("120.0")


def test_the_slider_is_exponential_and_the_next_token_follows_it(page: Page, demo_server: Demo) -> None:
    lab(page, demo_server)
    page.get_by_text("Next token, as the strength moves").click()
    rows = page.locator("[data-next-rows] tr")
    expect(rows.first).to_be_visible(timeout=LONG)
    before = rows.first.inner_text()
    slider, exact = page.locator("[data-range]"), page.locator("[data-strength]")
    reach = float(slider.get_attribute("data-reach") or 0)
    slider.fill("500")
    assert 0 < float(exact.input_value()) < reach / 6
    slider.fill("1000")
    assert float(exact.input_value()) == pytest.approx(reach, rel=0.01)
    expect(rows.first).not_to_have_text(before, timeout=LONG)
    page.locator("[data-on]").uncheck()
    expect(page.locator("[data-next-rows]")).to_contain_text("+0.00", timeout=LONG)


def test_a_conversation_has_two_histories_and_any_turn_can_be_edited(page: Page, demo_server: Demo) -> None:
    lab(page, demo_server, "&temperature=0&n_tokens=6")
    page.get_by_role("button", name="Conversation").click()
    page.get_by_label("Message").fill("Where do you live?")
    page.get_by_label("Message").press("Enter")
    expect(page.locator("[data-share]")).to_be_visible(timeout=LONG)
    expect(page.locator('[data-column="steered"] .turn')).to_have_count(1)
    first = page.locator("[data-steered]").inner_text()
    page.get_by_label("Message").fill("And why?")
    generated(page)
    turns = page.locator('[data-column="steered"] .turn')
    expect(turns).to_have_count(3)
    expect(turns.nth(1)).to_contain_text(first)
    turns.first.get_by_role("button", name="edit").click()
    page.get_by_label("Edit this turn").fill("Who are you?")
    page.get_by_label("Edit this turn").press("Enter")
    expect(page.locator("[data-share]")).to_be_visible(timeout=LONG)
    expect(turns).to_have_count(1)
    expect(turns.first).to_contain_text("Who are you?")
    expect(page.locator('[data-column="default"] .turn').first).to_contain_text("Where do you live?")


def test_a_handful_of_strengths_is_swept_on_the_page_and_more_as_a_job(page: Page, demo_server: Demo) -> None:
    lab(page, demo_server, "&temperature=0&n_tokens=8")
    page.get_by_text("Sweep a strength").click()
    page.locator('[data-sweep-form] [name="steps"]').fill("3")
    page.locator('[data-sweep-form] [name="to"]').fill("200")
    page.get_by_role("button", name="Sweep", exact=True).click()
    expect(page.locator("[data-sweep-result] tbody tr")).to_have_count(4, timeout=LONG)
    expect(page.locator("svg.tradeoff circle")).to_have_count(4)
    page.locator('[data-sweep-form] [name="steps"]').fill("10")
    page.get_by_role("button", name="Sweep", exact=True).click()
    page.wait_for_url("**/steer/sweep/*", timeout=LONG)
    expect(page.locator(".sweep-table tbody tr")).to_have_count(11, timeout=2 * LONG)
    expect(page.locator("svg.tradeoff")).to_be_visible()


def test_a_preset_and_a_vector_are_kept_and_come_back(page: Page, demo_server: Demo) -> None:
    lab(page, demo_server)
    page.get_by_text("Custom vectors").click()
    page.get_by_label("texts with it").fill("I love this\nwhat a delight")
    page.get_by_label("texts without it").fill("I hate this\nwhat a horror")
    page.get_by_role("button", name="Compute").click()
    expect(page.locator(".steered")).to_have_count(2, timeout=LONG)
    presets = page.locator("details.presets")
    if presets.get_attribute("open") is None:
        presets.locator("summary").click()
    page.get_by_label("save as").fill("joy at the grave")
    page.get_by_role("button", name="Save").click()
    kept = presets.get_by_role("link", name="joy at the grave")
    expect(kept).to_be_visible()
    kept.click()
    expect(page.locator(".steered")).to_have_count(2)
    expect(page.locator("[data-prompt]")).to_have_value("At the end of the road stood a")
    page.get_by_role("button", name="Delete preset joy at the grave").click()
    expect(kept).to_have_count(0)


def test_the_address_holds_every_setting_and_what_is_switched_off(page: Page, demo_server: Demo) -> None:
    features = f"&feature={demo_server.source}:158:3.5:clamp:chosen:1,3:off"
    lab(page, demo_server, f"&temperature=0&n_tokens=6{features}&stop=zz&stop=%0Ay&top_k=7&spare=yes&multiplier=0.5")
    page.get_by_label("a random other feature").check()
    generated(page)
    steered = page.locator("[data-steered]").inner_text()
    for address in (page.url, page.locator("[data-share] a").get_attribute("href") or ""):
        page.goto(address)
        form = page.locator("[data-form]")
        expect(form.locator("[name=stop]")).to_have_value("zz\n\\ny")
        expect(form.locator("[name=top_k]")).to_have_value("7")
        expect(form.locator("[name=spare]")).to_be_checked()
        expect(page.get_by_label("a random other feature")).to_be_checked()
        expect(page.locator("[data-multiplier]")).to_have_value("0.5")
        off = page.locator('[data-feature][data-index="158"]')
        expect(off.locator("[data-on]")).not_to_be_checked()
        expect(off.locator("[data-at]")).to_be_visible()
        expect(off.locator("[data-at]")).to_have_value(re.compile("^1, ?3$"))
        expect(page.locator('[data-feature][data-index="24"] [data-at]')).to_be_hidden()
    expect(page.locator("[data-steered]")).to_have_text(steered)


def test_seeds_samples_stop_strings_and_stopping(page: Page, demo_server: Demo) -> None:
    lab(page, demo_server, "&temperature=1&n_tokens=8&n_samples=2")
    steered = page.locator('[data-column="steered"] .stream')
    generated(page)
    expect(steered).to_have_count(2)
    first = steered.all_inner_texts()
    assert first[0] != first[1]
    generated(page)
    assert steered.all_inner_texts() == first  # the same seed
    page.get_by_role("button", name="New seed").click()
    expect(page.locator("[data-form] [name=seed]")).not_to_have_value("16")
    expect(page.locator("[data-share]")).to_be_visible(timeout=LONG)
    assert steered.all_inner_texts() != first
    page.get_by_text("More", exact=True).click()
    default = page.locator("[data-default]")
    prompt, whole = page.locator("[data-prompt]").input_value(), default.inner_text()
    stop = whole.removeprefix(prompt).split()[1][:2]
    page.get_by_label("stop at").fill(stop)
    generated(page)
    expect(default).to_have_text(prompt + whole.removeprefix(prompt).split(stop)[0])
    page.get_by_label("stop at").fill("")
    page.get_by_label("tokens", exact=True).fill("200")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator("[data-steered] .tok").nth(1)).to_be_visible(timeout=LONG)
    page.keyboard.press("Escape")
    expect(page.locator("[data-status]")).to_contain_text("Stopped after")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    assert page.locator("[data-steered] .tok").count() < 200


def test_a_vector_file_and_a_grid_of_two(page: Page, demo_server: Demo) -> None:
    lab(page, demo_server, "&temperature=0&n_tokens=5")
    page.get_by_text("Custom vectors").click()
    form = page.locator("[data-upload-vector]")
    form.get_by_label("name").fill("one way")
    file = json.dumps([1.0, *([0.0] * 575)]).encode()
    form.locator("[type=file]").set_input_files({"name": "v.json", "mimeType": "application/json", "buffer": file})
    form.get_by_role("button", name="Add").click()
    expect(page.locator(".steered")).to_have_count(2, timeout=LONG)
    page.get_by_text("Sweep a strength").click()
    sweep = page.locator("[data-sweep-form]")
    expect(sweep.locator("[name=from2]")).to_be_hidden()
    sweep.locator("[name=second]").select_option("1")
    for name in ("steps", "steps2"):
        sweep.locator(f"[name={name}]").fill("2")
    page.get_by_role("button", name="Sweep", exact=True).click()
    table = page.locator("[data-sweep-result] tbody tr")
    expect(table).to_have_count(5, timeout=LONG)
    expect(table.nth(4).locator("td").nth(1)).to_have_text("20")


def test_the_last_answer_can_be_made_again_and_a_saved_conversation_goes_on(page: Page, demo_server: Demo) -> None:
    lab(page, demo_server, "&temperature=0&n_tokens=6")
    page.get_by_role("button", name="Conversation").click()
    page.get_by_label("Message").fill("Where do you live?")
    page.get_by_role("button", name="Send").click()
    again = page.locator('[data-column="steered"] [data-last]').get_by_role("button", name="regenerate")
    expect(again).to_be_visible(timeout=LONG)
    answer = page.locator("[data-steered]").inner_text()
    again.click()
    expect(page.locator('[data-column="steered"] .turn')).to_have_count(1)
    expect(page.locator("[data-share]")).to_be_visible(timeout=LONG)
    expect(page.locator("[data-steered]")).to_have_text(answer)
    page.goto(page.locator("[data-share] a").get_attribute("href") or "")
    expect(page.locator("[data-steered]")).to_have_text(answer)
    page.get_by_label("Message").fill("And why?")
    generated(page)
    turns = page.locator('[data-column="steered"] .turn')
    expect(turns).to_have_count(3)
    expect(turns.nth(1)).to_contain_text(answer)


def test_the_prompt_lab_leads_here_with_its_text(page: Page, demo_server: Demo) -> None:
    page.goto(f"/{demo_server.model}/prompt?text=They+dug+a+grave&sae={demo_server.source}")
    page.get_by_role("link", name="steer with feature").first.click(timeout=LONG)
    expect(page.locator("[data-prompt]")).to_have_value("They dug a grave")
    expect(page.locator(".steered")).to_have_count(1)


def test_the_form_works_without_javascript(browser: Browser, demo_server: Demo) -> None:
    context = browser.new_context(java_script_enabled=False, base_url=demo_server.url)
    page = context.new_page()
    page.goto(f"/{demo_server.model}/steer?temperature=0&n_tokens=6&text=The+sea")
    page.locator("[name=add]").fill(f"{demo_server.source}/24")
    page.get_by_role("button", name="Add or generate").click()
    expect(page.locator(".steered")).to_have_count(1)
    page.get_by_role("spinbutton", name="Exact strength").fill("150")
    page.get_by_role("button", name="Add or generate").click()
    expect(page).to_have_url(re.compile("/steer/[^?]+$"))
    assert page.locator("[data-default]").inner_text() != page.locator("[data-steered]").inner_text()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_pictures(browser: Browser, demo_server: Demo, scheme: str, width: int) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 1100},
        color_scheme=scheme,
        base_url=demo_server.url,  # pyright: ignore[reportArgumentType]
    )
    page = context.new_page()
    lab(page, demo_server, "&temperature=0&n_tokens=30")
    page.get_by_label("a random direction of the same norm").check()
    generated(page)
    expect(page.locator("[data-shade-status]")).to_contain_text("Point at a token", timeout=LONG)
    address = page.locator("[data-share] a").get_attribute("href") or ""
    shoot(context, address, f"steering-lab-{width}-{scheme}")
    context.close()
