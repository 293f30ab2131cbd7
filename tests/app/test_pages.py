"""Pages as a browser without JavaScript gets them."""

from __future__ import annotations

from starlette.testclient import TestClient


def test_the_home_page_lists_models_and_sources(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert 'href="/tiny/1-demo"' in page.text


def test_a_feature_page_shows_label_examples_and_logits(client: TestClient) -> None:
    page = client.get("/tiny/1-demo/0")
    assert page.status_code == 200
    assert "harbours and ships" in page.text
    assert '<mark class="a10 peak"' in page.text
