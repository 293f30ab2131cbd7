"""The prompt lab driven as a person drives it, on the real demo; and its numbers against the model's own logits."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from app.gpu import Worker
from app.protocol import AttributeRequest, ModelRef, PredictRequest, SaeRef, Target
from app.settings import Settings
from tests.browser.conftest import Demo, shoot

TEXT = "The harbour was quiet that morning. She counted 12 boats"
WAIT = 60_000


@pytest.fixture
def lab(page: Page, demo_server: Demo) -> Page:
    page.goto(f"/{demo_server.model}/prompt")
    page.get_by_label("Prompt", exact=True).fill(TEXT)
    page.get_by_role("button", name="Read it").click()
    expect(page.locator(".tok").first).to_be_visible(timeout=WAIT)
    return page


def test_tokens_are_walked_by_arrow_keys_and_chosen_by_enter(lab: Page) -> None:
    lab.locator(".tok", has_text="harbour").focus()
    lab.keyboard.press("ArrowRight")
    expect(lab.locator(".tok:focus")).to_have_text(" was")
    lab.keyboard.press("Enter")
    expect(lab.locator("#reading h2", has_text="was")).to_be_visible(timeout=WAIT)
    expect(lab.locator(".tok:focus")).to_have_text(" was")
    lab.keyboard.press("ArrowLeft")
    lab.keyboard.press("Enter")
    expect(lab.locator("#reading h2", has_text="harbour")).to_be_visible(timeout=WAIT)


def test_features_are_shaded_pinned_sorted_and_the_address_holds_it_all(lab: Page) -> None:
    row = lab.locator(".ranked tbody tr").first
    index = row.locator("code").nth(1).text_content()
    row.get_by_role("button", name="pin", exact=False).last.click()
    expect(lab.locator(".pinned")).to_have_count(1, timeout=WAIT)
    lab.locator(".ranked").get_by_role("button", name=re.compile("shade the prompt")).first.click()
    expect(lab.locator(".shaded-by")).to_contain_text("Shaded by feature", timeout=WAIT)
    lab.get_by_label("sort by").select_option("quantile")
    expect(lab.locator(".ranked thead")).to_contain_text("quantile", timeout=WAIT)
    address = lab.url
    assert f"pin=12-demo%3A{index}" in address
    lab.goto("about:blank")
    lab.goto(address)
    expect(lab.locator(".pinned")).to_have_count(1, timeout=WAIT)
    expect(lab.locator(".ranked thead")).to_contain_text("quantile")
    expect(lab.locator(".shaded-by")).to_contain_text("Shaded by feature")


def test_shift_click_sorts_by_the_sum_over_a_range(lab: Page) -> None:
    lab.locator(".tok", has_text="harbour").click()
    expect(lab.locator("#reading h2", has_text="harbour")).to_be_visible(timeout=WAIT)
    lab.locator(".tok", has_text="morning").click(modifiers=["Shift"])
    expect(lab.locator(".tok.picked")).to_have_count(5, timeout=WAIT)
    expect(lab.locator(".ranked thead")).to_contain_text("sum")


def test_heat_map_next_token_and_faithfulness(lab: Page) -> None:
    lab.get_by_role("button", name="Features × tokens").click()
    expect(lab.locator(".heatmap .heatmaplayer image").first).to_be_attached(timeout=WAIT)
    lab.get_by_role("button", name="Faithfulness").click()
    expect(lab.locator("#reading")).to_contain_text("loss, spliced", timeout=WAIT)
    lab.get_by_role("button", name="Next token").click()
    expect(lab.locator(".expected tbody tr").first).to_be_visible(timeout=WAIT)
    lab.locator(".expected .guess").nth(20).click()
    expect(lab.locator(".terms")).to_contain_text("all parts together", timeout=WAIT)
    lab.locator(".terms").get_by_role("button", name=re.compile("take feature")).first.click()
    expect(lab.locator("#reading .answer")).to_contain_text("true change", timeout=WAIT)
    lab.get_by_role("button", name="gradient × activation").click()
    expect(lab.locator("#reading")).to_contain_text("do not add up to the logit", timeout=WAIT)


def test_a_prompt_is_kept_under_an_address(lab: Page) -> None:
    lab.get_by_role("button", name="Keep and share").click()
    expect(lab).to_have_url(re.compile("/prompt/[A-Za-z0-9_-]{16}$"))
    expect(lab.locator(".tok").first).to_be_visible(timeout=WAIT)
    assert "".join(lab.locator(".tok").all_text_contents()) == TEXT


def test_a_chat_without_scripts(browser: Browser, demo_server: Demo) -> None:
    context = browser.new_context(java_script_enabled=False, base_url=demo_server.url)
    page = context.new_page()
    page.goto(f"/{demo_server.model}/prompt?kind=chat")
    page.get_by_label("What message 1 says").fill("What is the sea?")
    page.get_by_role("button", name="Read it").click()
    expect(page.locator(".tok", has_text="assistant").last).to_be_visible(timeout=WAIT)
    page.locator(".tok", has_text="sea").click()
    expect(page.locator("#reading h2", has_text="sea")).to_be_visible(timeout=WAIT)
    assert "kind=chat" in page.url
    context.close()


def test_the_parts_add_up_to_the_models_own_logit(lab: Page, demo_server: Demo) -> None:
    settings = Settings(data_dir=demo_server.data_dir)
    model = ModelRef(id=demo_server.model, path=str(settings.model_dir(demo_server.model)))
    [sae_dir] = (settings.data_dir / "saes").iterdir()
    sae = SaeRef(id="demo", path=str(sae_dir))

    async def ask() -> None:
        worker = Worker(settings)
        predicted = await worker.predict(PredictRequest(model=model, text=TEXT))
        for position in (1, 4, len(predicted.ids) - 1):
            expected = predicted.positions[position]
            target = Target(position=position, token=expected.ids[0])
            found = await worker.attribute(AttributeRequest(model=model, text=TEXT, sae=sae, target=target, top_k=10))
            features = sum(feature.value for feature in found.features)
            total = features + found.rest + found.bias + found.error + found.elsewhere + found.constant
            assert total == pytest.approx(expected.logits[0], abs=1e-3)
            assert len(found.features) == 10
        await worker.close()

    with ThreadPoolExecutor(1) as thread:  # playwright's own loop runs in this one
        thread.submit(asyncio.run, ask()).result()


def test_a_bulk_job_finds_what_tells_two_groups_apart(page: Page, demo_server: Demo, tmp_path: Path) -> None:
    code = [f"import numpy as np\nfor i in range({n}):\n    x.append(i)" for n in range(12)]
    prose = [f"The harbour was quiet that morning, and she counted {n} boats." for n in range(12)]
    rows = [{"text": t, "kind": k} for k, texts in (("code", code), ("prose", prose)) for t in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page.goto(f"/{demo_server.model}/bulk")
    page.get_by_label("File").set_input_files(tmp_path / "texts.jsonl")
    page.get_by_label("Column of two groups").fill("kind")
    page.get_by_role("button", name="Queue it").click()
    expect(page.locator(".state.done")).to_be_visible(timeout=120_000)
    job = page.url.rpartition("/")[2]
    page.goto(f"/{demo_server.model}/bulk/{job}")
    first = page.locator(".list tbody tr").first
    assert first.locator("td").nth(1).text_content() in ("1.000", "0.000")
    address = page.get_by_role("link", name="activations.parquet").get_attribute("href")
    assert httpx.get(f"{demo_server.url}{address}").content[:4] == b"PAR1"


@pytest.mark.parametrize(("kind", "width", "scheme"), [("wide", 1400, "light"), ("phone", 390, "dark")])
def test_its_views_fit_their_window(browser: Browser, demo_server: Demo, kind: str, width: int, scheme: str) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        base_url=demo_server.url,  # type: ignore[arg-type]
    )
    for view in ("tokens", "grid", "next", "faithful"):
        shoot(
            context, f"/{demo_server.model}/prompt?text=The+harbour+was+quiet.&at=2&view={view}", f"lab-{view}-{kind}"
        )
    context.close()
