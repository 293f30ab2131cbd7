"""An SAE trained by a person in a browser: the form, the queue, the result with its lineage and its dashboards."""

from __future__ import annotations

import re
import time
from typing import Any

import httpx
import yaml
from playwright.sync_api import Page, expect

from app import trainforms, trainings
from tests.browser.conftest import Demo

SOON = 180_000
DONE = 600_000
SET = "browser"


def wait_for_job(demo: Demo, kind: str, title: str) -> dict[str, Any]:
    """The newest job of a kind once it has ended."""
    deadline = time.monotonic() + DONE / 1000
    while time.monotonic() < deadline:
        found = httpx.get(f"{demo.url}/api/jobs?kind={kind}", timeout=60).json()["jobs"]
        job = next((job for job in found if title in job["title"]), None)
        if job is not None and job["state"] not in ("queued", "running"):
            return job
        time.sleep(0.5)
    raise AssertionError(f"no {kind} of {title} ended; {found[:3]}")


def outlook_yaml(page: Page) -> dict[str, Any]:
    return yaml.safe_load(page.locator("#spec-yaml").input_value())


def test_a_person_trains_an_sae_and_looks_at_its_features(page: Page, demo_server: Demo) -> None:
    page.set_default_timeout(SOON)
    page.goto("/")
    page.get_by_role("main").get_by_role("link", name="Train an SAE").click()
    expect(page.get_by_role("heading", name="Train an SAE")).to_be_visible()
    fill_the_form(page)
    a_wrong_layer_is_said_live_and_at_its_field(page)
    page.get_by_role("button", name="Start it").click()
    page.wait_for_url(re.compile(r"/jobs/\d+$"), timeout=SOON)
    number = page.url.rpartition("/")[2]
    page.goto("/jobs")
    expect(page.locator(f'a[href="/jobs/{number}"]').first).to_be_visible()
    page.locator(f'a[href="/jobs/{number}"]').first.click()
    expect(page.locator("#job .state.done")).to_be_visible(timeout=DONE)
    the_sae_tells_its_lineage(page, number)
    harvest = wait_for_job(demo_server, "harvest", f"1-{SET}")
    assert harvest["state"] == "done", harvest
    its_features_have_examples(page, demo_server)
    the_same_form_comes_back(page, number)
    page.goto(f"/{demo_server.model}/1-{SET}")
    page.get_by_text("Remove this SAE").click()
    page.get_by_role("button", name=f"Remove 1-{SET} for good").click()
    page.wait_for_url(f"**/{demo_server.model}", timeout=SOON)


def fill_the_form(page: Page) -> None:
    """Fields follow the architecture, and what it will take follows the fields."""
    page.get_by_role("link", name="Quick try").click()
    page.get_by_label("k, active latents").wait_for()
    page.get_by_label("architecture").select_option("standard")
    expect(page.get_by_label("k, active latents")).to_be_hidden()
    expect(page.get_by_label("L1 coefficient")).to_be_visible()
    page.get_by_label("architecture").select_option("topk")
    for name, value in (
        ("layer", "1"),
        ("name of the set", SET),
        ("width (d_sae)", "64"),
        ("k, active latents", "8"),
        ("epochs", "1"),
        ("dashboards from, tokens", "2000"),
    ):
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_label("tokens", exact=True).fill("20,000")
    page.get_by_text("Data, precision, evaluation").click()
    for name, value in (
        ("context size", "32"),
        ("batch size", "512"),
        ("held out", "0.001"),
        ("evaluation, tokens", "1000"),
    ):
        page.get_by_label(name, exact=True).fill(value)
    expect(page.locator("#spec-yaml")).to_have_value(re.compile("n_eval_tokens: 1000"), timeout=SOON)
    expect(page.locator("#outlook")).to_contain_text("39 steps of 512", timeout=SOON)
    assert outlook_yaml(page)["hook_name"] == "blocks.1.hook_resid_post"


def a_wrong_layer_is_said_live_and_at_its_field(page: Page) -> None:
    layer = page.get_by_label("layer", exact=True)
    layer.fill("77")
    expect(page.locator("#outlook")).to_contain_text("has layers 0 to 29", timeout=SOON)
    # A refusal is an answer of 422, of which the browser's console speaks: asked for apart.
    values = page.locator("form.train").evaluate("form => new URLSearchParams(new FormData(form)).toString()")
    refused = page.request.post(
        "/train", data=values, headers={"content-type": "application/x-www-form-urlencoded"}, max_redirects=0
    )
    assert refused.status == 422
    assert 'id="field-layer-error"' in refused.text()
    layer.fill("1")
    expect(page.locator("#spec-yaml")).to_have_value(re.compile("blocks.1.hook_resid_post"), timeout=SOON)


def the_sae_tells_its_lineage(page: Page, number: str) -> None:
    page.get_by_role("link", name="Open the result").click()
    expect(page.get_by_role("heading", name=f"1-{SET}", exact=True)).to_be_visible(timeout=SOON)
    lineage = page.locator("section[aria-labelledby=provenance]")
    for name in ("trained", "hours", "corpus hash", "trained with", "commit"):
        expect(lineage).to_contain_text(name)
    page.get_by_text("How it was trained").click()
    expect(lineage.get_by_text("blocks.1.hook_resid_post").first).to_be_visible()
    expect(lineage.get_by_role("link", name=f"Its training, job {number}")).to_be_visible()
    expect(page.get_by_text("explained variance").first).to_be_visible()


def its_features_have_examples(page: Page, demo: Demo) -> None:
    page.goto(f"/{demo.model}/1-{SET}?kind=live")
    page.locator("#features tbody a").first.click()
    page.wait_for_url(re.compile(rf"/1-{SET}/\d+"), timeout=SOON)
    expect(page.locator(".window").first).to_be_visible(timeout=SOON)


def the_same_form_comes_back(page: Page, number: str) -> None:
    page.goto(f"/jobs/{number}")
    spec = page.request.get(f"/api/jobs/{number}").json()["spec"]
    page.get_by_role("link", name="Clone this job").click()
    page.locator("#spec-yaml").wait_for()
    assert trainings.read(outlook_yaml(page)) == trainings.read(spec)
    page.goto(f"/train?like={spec['model']}/1-{SET}")
    assert {**outlook_yaml(page), "harvest_tokens": 2000} == trainings_yaml(spec)
    page.get_by_text("Paste or upload a spec in YAML").click()
    page.locator("#yaml").fill(yaml.safe_dump({**outlook_yaml(page), "k": [4, 8]}))
    page.get_by_role("button", name="Fill the form in").click()
    expect(page.get_by_label("k, active latents")).to_have_value("4,8", timeout=SOON)


def trainings_yaml(spec: dict[str, Any]) -> dict[str, Any]:
    return trainforms.short(trainings.read(spec))
