"""Pages as a browser without JavaScript gets them, from the real application; no worker runs."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import event, update
from starlette.testclient import TestClient

from app import db, gpu, steerings
from app.main import create_app
from app.settings import Settings
from app.tables import Job, JobMetric, Source
from tests.conftest import D_SAE, Catalog


def text(client: TestClient, path: str, **headers: str) -> str:
    answer = client.get(path, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.text


def test_home_lists_models_and_sources(client: TestClient) -> None:
    assert 'href="/tiny/1-demo"' in text(client, "/")


def test_an_empty_catalog_says_which_command_to_run(settings: Settings) -> None:
    engine = db.connect(settings)
    db.migrate(engine)
    with TestClient(create_app(settings), base_url="http://localhost") as client:
        assert "sae-atlas demo" in text(client, "/")
        assert client.get("/random").status_code == 404


def test_a_model_page_lists_its_sources(client: TestClient) -> None:
    page = text(client, "/tiny")
    assert all(f'href="/tiny/{name}"' in page for name in ("1-demo", "1-other", "2-plain"))


def test_a_source_page_explains_its_metrics_and_lists_features(client: TestClient) -> None:
    page = text(client, "/tiny/1-demo")
    assert "explained variance" in page
    assert "Predicting the mean scores 0" in page
    assert page.count('<td class="n"><a href="/tiny/1-demo/') == D_SAE


def test_the_table_is_sorted_by_the_address(client: TestClient) -> None:
    page = text(client, "/tiny/1-demo?sort=density&descending=true")
    assert re.search(r'/tiny/1-demo/(\d+)">\1</a></td>', page)[1] == "9"  # type: ignore[index]
    assert 'aria-sort="descending"' in page


def test_the_table_alone_answers_htmx(client: TestClient) -> None:
    part = text(client, "/tiny/1-demo?label=harbours", **{"HX-Request": "true"})
    assert part.lstrip().startswith('<section id="features"')
    assert "<strong>3</strong>" in part


def test_a_table_without_rows_says_so(client: TestClient) -> None:
    assert "No feature fits" in text(client, "/tiny/1-demo?label=nothing")
    assert "this is page 99" in text(client, "/tiny/1-demo?page=99")


def test_a_feature_page_shows_everything_known(client: TestClient) -> None:
    page = text(client, "/tiny/1-demo/4")
    for part in (
        "cold harbours in winter",
        "a10 peak",
        "promotes",
        "suppresses",
        "4.80 to 6.00",
        "Nearest features",
        "Active together",
    ):
        assert part in page
    assert 'rel="prev" data-previous href="/tiny/1-demo/3"' in page
    assert 'rel="next" data-next href="/tiny/1-demo/5"' in page


def test_a_feature_page_costs_two_queries(client: TestClient) -> None:
    queries: list[str] = []
    event.listen(client.app.state.engine, "before_cursor_execute", lambda *a: queries.append(a[2]))  # type: ignore[attr-defined]
    text(client, "/tiny/1-demo/4")
    assert len(queries) == 2


def test_the_first_and_last_feature_have_one_neighbour_each(client: TestClient) -> None:
    assert "data-previous" not in text(client, "/tiny/1-demo/0")
    assert "data-next" not in text(client, f"/tiny/1-demo/{D_SAE - 1}")


def test_dead_and_dense_features_say_what_it_means(client: TestClient) -> None:
    assert "Never active on the 1,000 tokens" in text(client, "/tiny/1-demo/7")
    assert "Dense features seldom" in text(client, "/tiny/1-demo/9")


def test_a_feature_without_evidence_says_how_to_gather_it(client: TestClient) -> None:
    page = text(client, "/tiny/2-plain/3")
    assert "sae-atlas harvest tiny/2-plain" in page
    assert 'href="/tiny/harvest?sources=2-plain">Gather it' in page
    assert "/tiny/harvest" not in text(client, "/tiny/2-plain/3?embed=true")


def test_widths_and_scales_are_addresses(client: TestClient) -> None:
    assert "whole context</a>" in text(client, "/tiny/1-demo/4?width=5")
    assert "whole context</a>" not in text(client, "/tiny/1-demo/4?width=all")
    part = text(client, "/tiny/1-demo/4?scale=example", **{"HX-Request": "true"})
    assert part.lstrip().startswith('<section id="examples"')


def test_a_whole_context_opens(client: TestClient) -> None:
    assert "harbour" in text(client, "/tiny/1-demo/4/context/0")
    assert client.get("/tiny/1-demo/4/context/5").status_code == 404


def test_a_bare_layer_leads_to_its_default_source(client: TestClient) -> None:
    answer = client.get("/tiny/1/4?width=5", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (302, "/tiny/1-demo/4?width=5")
    assert client.get("/tiny/1", follow_redirects=False).headers["location"] == "/tiny/1-demo"


@pytest.mark.parametrize(
    "to", ["12", "http://localhost:3000/tiny/1-demo/12", "https://www.neuronpedia.org/tiny/1-demo/12?x=1"]
)
def test_jump_takes_an_index_or_a_pasted_address(client: TestClient, to: str) -> None:
    answer = client.get("/tiny/1-demo/jump", params={"to": to}, follow_redirects=False)
    assert answer.headers["location"] == "/tiny/1-demo/12"


def test_jump_never_leaves_this_site(client: TestClient) -> None:
    for to in ("//evil.com/1/2/3", "http://evil.com//x/1-demo/3", "javascript:alert(1)"):
        answer = client.get("/tiny/1-demo/jump", params={"to": to}, follow_redirects=False)
        assert answer.status_code == 404 or not answer.headers["location"].startswith("//")


def test_random_leads_to_a_live_feature(client: TestClient) -> None:
    for path in ("/random", "/tiny/1-demo/random", "/tiny/1-demo/random?label=harbours"):
        assert client.get(path, follow_redirects=False).headers["location"].startswith("/tiny/1-demo/")


def test_a_feature_with_a_text_in_its_address_asks_for_the_answer_on_load(client: TestClient) -> None:
    assert 'hx-trigger="submit, load"' in text(client, "/tiny/1-demo/4?text=hello")


def test_while_the_worker_starts_pages_say_so_and_go_on_by_themselves(client: TestClient) -> None:
    for path, trigger in (("/tiny/1-demo/4/try", "submit, every 1s"), ("/tiny/prompt?sae=1-demo", "every 1s, submit")):
        part = client.post(path, data={"text": "hello"}, headers={"HX-Request": "true"})
        assert part.status_code == 200
        assert "Starting the gpu worker <progress" in part.text
        assert f'hx-trigger="{trigger}"' in part.text
    assert "Starting the gpu worker" in client.get("/tiny/prompt?sae=1-demo&text=hello").text
    assert "Starting the gpu worker" in client.post("/tiny/loading?source=1-demo").text


def test_without_a_worker_the_page_stays_and_the_box_says_what_happened(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "START_SECONDS", -1)
    page = client.post("/tiny/1-demo/4/try", data={"text": "hello"})
    assert page.status_code == 503
    assert "The gpu worker is not answering" in page.text
    assert "cold harbours in winter" in page.text
    part = client.post("/tiny/1-demo/4/try", data={"text": "hello"}, headers={"HX-Request": "true"})
    assert part.status_code == 200
    assert part.text.lstrip().startswith('<section id="try"')


def test_without_a_worker_the_prompt_page_keeps_the_text(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "START_SECONDS", -1)
    page = client.get("/tiny/prompt", params={"text": "hello there", "sae": "1-demo"})
    assert page.status_code == 503
    assert ">hello there</textarea>" in page.text
    assert "gpu worker" in page.text


def test_a_text_over_the_limit_is_refused_with_both_numbers(filled: Catalog, settings: Settings) -> None:
    small = settings.model_copy(update={"max_text_bytes": 10})
    with TestClient(create_app(small), base_url="http://localhost") as client:
        page = client.post(f"{filled.path}/4/try", data={"text": "much too long"}, headers={"HX-Request": "true"})
        assert "13 bytes; up to 10" in page.text


def test_the_steering_page_takes_its_state_from_the_address(client: TestClient) -> None:
    page = text(client, "/tiny/steer?source=1-demo&index=4&strength=2.5&prompt=Hello&temperature=0&seed=7")
    assert 'data-index="4" data-max="6.0"' in page
    assert 'value="2.5"' in page
    assert ">Hello</textarea>" in page


def test_the_steering_form_without_scripts_keeps_everything_when_a_feature_is_added(client: TestClient) -> None:
    rows = {"source": ["1-demo", "1-demo"], "index": ["4", "12"], "strength": ["2.5", "3"]}
    rows |= {"operation": ["clamp", "add"], "positions": ["chosen", "all"], "at": ["1, 3-4", ""], "on": ["1-demo:4"]}
    more = {"add": "1-demo/7", "prompt": "Hello", "stop": "a\r\n\\nb", "spare": "on", "controls": "random_feature"}
    answer = client.post("/tiny/steer", data={**rows, **more, "seed": "7"}, follow_redirects=False)
    page = text(client, answer.headers["location"])
    assert 'value="1-demo:4" checked' in page
    assert 'value="1-demo:12" data-on' in page  # switched off
    assert 'value="1-demo:7" checked' in page
    assert 'value="1,3,4"' in page
    assert ">a\n\\nb</textarea>" in page
    assert 'name="spare" data-spare checked' in page
    assert 'value="random_feature" checked' in page
    assert client.post("/tiny/steer", data={**rows, "at": ["x", ""], "prompt": "Hello"}).status_code == 422


def test_steering_without_a_source_takes_the_default_one_and_shows_which(client: TestClient) -> None:
    assert 'data-source="1-demo" data-index="4"' in text(client, "/tiny/steer?index=4")


def test_steering_without_a_source_asks_which_where_none_is_the_default(client: TestClient, settings: Settings) -> None:
    with db.sessions(db.connect(settings)).begin() as session:
        session.execute(update(Source).values(is_default=False))
    answer = client.get("/tiny/steer?index=4")
    assert answer.status_code == 404
    assert "Say source=, one of: 1-demo, 1-other, 2-plain." in answer.text
    assert 'href="/tiny/steer?source=2-plain&amp;index=4"' in answer.text


def test_features_to_steer_are_found_by_label_and_by_index(client: TestClient) -> None:
    assert "cold harbours in winter" in text(client, "/tiny/steer/features?q=winter")
    assert "1-demo/12" in text(client, "/tiny/steer/features?q=12")
    assert "No feature fits" in text(client, "/tiny/steer/features?q=nothing")


def test_a_saved_run_is_shown_again(client: TestClient) -> None:
    asked = {
        "prompt": "Once",
        "temperature": 0.5,
        "n_tokens": 4,
        "seed": 1,
        "freq_penalty": 0,
        "steer_method": "SIMPLE_ADDITIVE",
        "features": [{"modelId": "tiny", "layer": "1-demo", "index": "4", "strength": 3}],
    }
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        run = steerings.save(session, "tiny", asked, {"DEFAULT": " upon <i>", "STEERED": " at sea"})
        path = steerings.path(run)
    page = text(client, path)
    assert " upon &lt;i&gt;" in page
    assert " at sea" in page
    assert client.get("/tiny/steer/nothing").status_code == 404


def test_search_finds_labels_and_says_when_there_are_none(client: TestClient) -> None:
    assert 'href="/tiny/1-demo/4"' in text(client, "/search?q=winter")
    assert "No label fits" in text(client, "/search?q=nothing+such")
    assert text(client, "/search?q=winter", **{"HX-Request": "true"}).lstrip().startswith('<section id="hits"')


def add_job(client: TestClient, **columns: object) -> int:
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        job = Job(kind="train", title="Train <b>", spec={"k": 32}, result={}, workflow_id="", **columns)
        session.add(job)
        session.flush()
        session.add_all([JobMetric(job_id=job.id, step=s, values={"loss": 1.0 / s, "l0": 32.0}) for s in (1, 2)])
        return job.id


def test_jobs_poll_only_while_something_moves(client: TestClient) -> None:
    assert "No job yet" in text(client, "/jobs")
    add_job(client, state="done", done=1.0)
    assert "every 2s" not in text(client, "/jobs")
    add_job(client, state="running", done=0.5)
    assert "every 2s" in text(client, "/jobs")


def test_waiting_jobs_without_a_trainer_say_so(client: TestClient) -> None:
    add_job(client, state="queued")
    assert "no trainer is running" in text(client, "/jobs")


def test_a_job_shows_spec_error_and_curves(client: TestClient) -> None:
    number = add_job(client, state="failed", error="Disk full: <1 GB>")
    page = text(client, f"/jobs/{number}")
    for part in ("&#34;k&#34;: 32", "Disk full: &lt;1 GB&gt;", '<figure class="plot" id="plot-loss"', "Resume"):
        assert part in page


def test_a_queued_job_is_cancelled_and_resumed(client: TestClient) -> None:
    number = add_job(client, state="queued")
    assert "cancelled" in client.post(f"/jobs/{number}/cancel").text
    assert "queued" in client.post(f"/jobs/{number}/resume").text
    assert client.post(f"/jobs/{number}/resume").status_code == 409


def test_a_job_that_does_not_exist_is_a_page(client: TestClient) -> None:
    for number in ("99", "abc", "-1", str(2**63)):
        assert client.get(f"/jobs/{number}").status_code == 404


def test_the_api_is_documented_without_scripts_from_elsewhere(client: TestClient) -> None:
    page = text(client, "/docs")
    assert "/api/feature/{model}/{source}/{index}" in page
    assert "://" not in re.sub(r"http://localhost:3000", "", page)


def test_pages_name_static_files_by_their_state_and_they_may_be_kept(client: TestClient) -> None:
    found = re.search(r'href="(/static/[0-9a-f]{12}/app\.css)"', text(client, "/"))
    assert found
    assert "immutable" in client.get(found[1]).headers["cache-control"]
    assert client.get("/static/app.css").headers["cache-control"] == "no-cache"


def test_readiness_names_the_part_that_is_missing(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["parts"]["database"] == "ok"
    assert "gpu worker" in answer.json()["parts"]["worker"]
