"""A job's page and the comparison of several: what they hold without JavaScript, and what their parts answer."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from app import curves
from app.curves import Example, FeatureNow, Histogram, Snapshot
from app.settings import Settings
from app.tables import Job, JobMetric, Source
from app.trainspecs import TrainSpec

SPEC = {
    "model": "tiny",
    "corpus": "made",
    "hook_name": "blocks.1.hook_resid_post",
    "set_name": "a",
    "d_sae": 40,
    "k": [2, 5],
    "n_tokens": 100_000,
    "batch_size": 1_000,
}
ONE = {**SPEC, "k": 3, "set_name": "b", "lr": 0.01}
GRID = ("1-a-k2", "1-a-k5")


def train(
    client: TestClient, spec: Mapping[str, Any], steps: range, values: Mapping[str, float], **columns: Any
) -> int:
    """Put a training with curves into the queue; each value falls with the step, so that lines are told apart."""
    asked = TrainSpec.model_validate(dict(spec)).model_dump(mode="json", exclude_none=True)
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        job = Job(kind="train", title="Train", spec=asked, result={}, workflow_id="", **{"state": "running", **columns})
        session.add(job)
        session.flush()
        session.add_all([point(job.id, step, values) for step in steps])
        return job.id


def point(job_id: int, step: int, values: Mapping[str, float]) -> JobMetric:
    shared = {"tokens": step * 1_000.0, "tokens_per_second": 5_000.0, "seconds_left": 120.0}
    return JobMetric(job_id=job_id, step=step, values={**{n: v + 1 / step for n, v in values.items()}, **shared})


def grid(client: TestClient, **columns: Any) -> int:
    values = {f"{source}/{name}": 0.1 for source in GRID for name in ("loss", "explained_variance", "l0", "lr")}
    return train(client, SPEC, range(10, 60, 10), values, **columns)


def page(client: TestClient, path: str) -> str:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.text


def parts(client: TestClient, path: str, seen: Mapping[str, str] = {}) -> dict[str, Any]:
    joined = " ".join(f"{name}:{version}" for name, version in seen.items())
    answer = client.get(str(httpx.URL(path).copy_merge_params({"seen": joined})))
    assert answer.status_code == 200, answer.text
    return answer.json()


def versions(html: str) -> dict[str, str]:
    found = re.findall(r'id="([\w-]+)"[^>]*data-version="(\w+)"', html)
    return dict(found)


def plot(html: str, name: str) -> dict[str, Any]:
    text = re.search(rf'id="plot-{name}".*?<script type="application/json">(.*?)</script>', html, re.S)
    assert text is not None, html
    return json.loads(text[1])


def test_a_grids_saes_are_lines_of_one_plot_and_rows_of_a_table(client: TestClient) -> None:
    html = page(client, f"/jobs/{grid(client)}")
    assert [line["name"] for line in plot(html, "loss")["lines"]] == list(GRID)
    table = re.search(r'<section id="runs".*?</section>', html, re.S)[0]  # type: ignore[index]
    assert all(f"</svg> {source}</th>" in table for source in GRID)
    assert "0.120" in table
    assert [line["name"] for line in plot(html, "tokens_per_second")["lines"]] == ["job 1"]
    assert "5,000" in html
    assert "2 min" in html
    assert f'href="/train?clone={1}"' in html


def test_every_usual_plot_is_there_before_its_first_point(client: TestClient) -> None:
    html = page(client, f"/jobs/{train(client, ONE, range(0), {}, state='queued')}")
    assert html.count(">no points yet</text>") == 8


def test_a_training_without_points_is_not_praised_and_says_what_comes_when(client: TestClient) -> None:
    number = train(client, ONE | {"harvest_tokens": 30_000}, range(0), {})
    html = page(client, f"/jobs/{number}")
    assert html.count("No points yet to judge it by.") == 2
    assert "None: dead latents" not in html
    assert "makes the dashboards from 30,000 tokens" in html
    assert "The first look at held-out text comes after step 200:" in html
    plan = client.app.state.settings.job_dir(number) / "plan.json"  # type: ignore[attr-defined]
    plan.parent.mkdir(parents=True, exist_ok=True)
    plan.write_text('{"cached": true, "n_steps": 59}')
    assert "comes after step 59:" in page(client, f"/jobs/{number}")
    ended = page(client, f"/jobs/{train(client, ONE, range(10, 60, 10), {'dead_fraction': 0.0}, state='done')}")
    assert "makes the dashboards" not in ended


def test_the_time_left_follows_the_evaluation_which_adds_no_point(client: TestClient) -> None:
    number = train(client, ONE, range(10, 60, 10), {"loss": 0.5}, done=0.9)
    seen = versions(page(client, f"/jobs/{number}"))
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        last = session.get_one(JobMetric, (number, 50))
        last.values = {**last.values, "seconds_left": 41.0}
    changed = parts(client, f"/jobs/{number}/parts", seen)["parts"]
    assert list(changed) == ["job"]
    assert "<dt>time left, with evaluation</dt><dd>41 s</dd>" in str(changed["job"])


def test_only_what_changed_is_sent_again(client: TestClient) -> None:
    number = grid(client)
    seen = versions(page(client, f"/jobs/{number}"))
    assert {"job", "runs", "plot-loss", "warnings", "looks", "log", "outcome"} <= set(seen)
    assert parts(client, f"/jobs/{number}/parts", seen) == {"moving": True, "parts": {}}
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        session.add(point(number, 60, {"1-a-k2/loss": 0.1}))
    changed = parts(client, f"/jobs/{number}/parts", seen)["parts"]
    assert {"job", "runs", "plot-loss", "plot-tokens_per_second"} <= set(changed)
    assert not {"looks", "log", "warnings", "outcome"} & set(changed)
    assert plot(changed["plot-loss"], "loss")["lines"][0]["x"][-1] == 60
    assert parts(client, f"/jobs/{number}/parts", seen | versions("".join(changed.values())))["parts"] == {}


def test_an_ended_job_says_that_nothing_moves(client: TestClient) -> None:
    number = grid(client, state="done")
    assert parts(client, f"/jobs/{number}/parts")["moving"] is False
    assert "data-moving" not in page(client, f"/jobs/{number}")


def test_how_plots_are_looked_at_stands_in_the_address(client: TestClient) -> None:
    path = f"/jobs/{grid(client)}"
    assert plot(page(client, f"{path}?x=tokens"), "loss")["lines"][0]["x"] == [1e4, 2e4, 3e4, 4e4, 5e4]
    assert plot(page(client, f"{path}?first=20&last=40"), "loss")["lines"][0]["x"] == [20, 30, 40]
    assert plot(page(client, f"{path}?x=tokens&first=20000&last=40000"), "loss")["lines"][0]["x"] == [2e4, 3e4, 4e4]
    assert plot(page(client, f"{path}?scale=log"), "loss")["log"] is True
    assert plot(page(client, f"{path}?scale=log"), "explained_variance")["log"] is False
    hidden = page(client, f"{path}?hide=1-a-k2")
    assert [line["name"] for line in plot(hidden, "loss")["lines"]] == ["1-a-k5"]
    assert plot(hidden, "loss")["lines"][0]["css"] == "s1 d0"
    assert f'data-live="{path}/parts?hide=1-a-k2"' in hidden


@pytest.mark.parametrize(
    "query",
    ["x=weeks", "first=-1", "first=abc", f"last={2**60}", "look=-1", "smooth=3", "scale=", "sae=9-nothing", "more=x"],
)
def test_a_view_that_makes_no_sense_is_refused(client: TestClient, query: str) -> None:
    number = grid(client)
    for path in (f"/jobs/{number}", f"/jobs/{number}/parts"):
        assert client.get(f"{path}?{query}").status_code == 422, query


def test_a_warning_says_what_is_wrong_and_what_to_change(client: TestClient) -> None:
    number = train(client, ONE, range(10, 110, 10), {"dead_fraction": 0.6}, done=0.5)
    html = page(client, f"/jobs/{number}")
    assert '<a href="#warnings">1 warning</a>' in html
    assert "latents have not been active in the last 200,000 tokens." in html
    assert "Raise aux_k (now 256)" in html
    assert parts(client, f"/jobs/{number}/parts", versions(html))["parts"] == {}
    fine = page(client, f"/jobs/{train(client, ONE, range(10, 110, 10), {'dead_fraction': -0.01}, done=0.5)}")
    assert "Nothing to warn about." in fine


def look_at(settings: Settings, job_id: int, source: str, step: int, token: str, value: float) -> None:
    example = Example(tokens=("the ", token, " end"), values=(0.0, value, value / 4))
    feature = FeatureNow(index=7, density=0.01 * step / 50, max_act=value, examples=(example,))
    edges, counts = tuple(-3 + 0.5 * i for i in range(5)), (0, 3, step, 1)
    one = Histogram(edges=edges, counts=counts)
    shot = Snapshot(
        step=step, tokens=step * 1000, n_probe=500, activations=one, densities=one, n_silent=3, features=(feature,)
    )
    curves.write_snapshot(settings.job_dir(job_id), source, shot)


def test_looks_at_held_out_text_are_walked_through(client: TestClient, settings: Settings) -> None:
    number = grid(client)
    for step in range(50, 550, 50):
        look_at(settings, number, GRID[0], step, f"<b>{step}</b>", 2.0)
    look_at(settings, number, GRID[1], 50, "other", 9.0)
    html = page(client, f"/jobs/{number}")
    assert "10 of 10: step 500" in html
    assert html.count("&lt;b&gt;500&lt;/b&gt;</mark>") == 2  # now, and at the end of the row of looks
    assert "<b>500</b>" not in html
    earlier = page(client, f"/jobs/{number}?look=3")
    assert "3 of 10: step 150" in earlier
    assert "follow the newest" in earlier
    assert "1 of 1: step 50" in page(client, f"/jobs/{number}?sae={GRID[1]}")
    assert "10 of 10" in page(client, f"/jobs/{number}?look=99")


def test_a_new_look_is_followed_and_an_old_one_stays(client: TestClient, settings: Settings) -> None:
    number = grid(client)
    look_at(settings, number, GRID[0], 50, "x", 1.0)
    seen = versions(page(client, f"/jobs/{number}"))
    look_at(settings, number, GRID[0], 100, "x", 1.0)
    assert "2 of 2" in parts(client, f"/jobs/{number}/parts", seen)["parts"]["looks"]
    assert "1 of 2" in parts(client, f"/jobs/{number}/parts?look=1", seen)["parts"]["looks"]


def test_what_came_of_a_training_leads_to_saes_evidence_and_corpus(client: TestClient) -> None:
    number = train(client, ONE, range(10, 60, 10), {"loss": 0.3}, state="done")
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        origin = {
            "kind": "trained",
            "job": number,
            "hours": 0.25,
            "corpus": {"name": "made", "hash": "c0"},
            "trained_with": {"torch": "2.13", "commit": "abc"},
        }
        session.add(
            Source(
                model_id="tiny",
                name="1-b",
                layer=1,
                set_name="b",
                sae_hash="dd",
                architecture="topk",
                hook_name="blocks.1.hook_resid_post",
                d_in=3,
                d_sae=40,
                config={},
                metrics={"l0": 3.0, "explained_variance": 0.75},
                origin=origin,
            )
        )
        harvest = {"model": "tiny", "sources": ["1-b"], "corpus": "made"}
        session.add(Job(kind="harvest", title="Harvest", spec=harvest, result={}, workflow_id="", state="queued"))
    html = page(client, f"/jobs/{number}")
    assert parts(client, f"/jobs/{number}/parts", versions(html))["parts"] == {}
    for text in ('href="/tiny/1-b"', "0.750", f'href="/jobs/{number + 1}"', 'href="/corpora/made"', "0.25", "abc"):
        assert text in html


def test_another_jobs_sae_of_the_same_name_is_not_its_outcome(client: TestClient) -> None:
    spec = {**ONE, "set_name": "demo"}
    assert "What came of it" not in page(client, f"/jobs/{train(client, spec, range(0), {}, state='done')}")


def test_metrics_are_a_csv_file_of_all_points(client: TestClient) -> None:
    number = train(client, ONE, range(10, 40, 10), {"loss": 0.5})
    with client.app.state.sessions.begin() as session:  # type: ignore[attr-defined]
        session.add(JobMetric(job_id=number, step=40, values={"late": 2.0}))
    answer = client.get(f"/jobs/{number}/metrics.csv")
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["step"] for row in rows] == ["10", "20", "30", "40"]
    assert float(rows[0]["loss"]) == 0.6
    assert (rows[0]["late"], rows[3]["late"], rows[3]["loss"]) == ("", "2.0", "")
    assert client.get("/jobs/99/metrics.csv").status_code == 404


def test_jobs_are_compared_curve_by_curve_and_field_by_field(client: TestClient) -> None:
    first, second = grid(client), train(client, ONE, range(10, 110, 10), {"loss": 0.5, "lr": 0.1})
    html = page(client, f"/jobs/compare?job={first}&job={second}")
    names = [f"{first} · {GRID[0]}", f"{first} · {GRID[1]}", f"{second} · 1-b"]
    assert [line["name"] for line in plot(html, "loss")["lines"]] == names
    assert [line["name"] for line in plot(html, "tokens_per_second")["lines"]] == ["job 1", "job 2"]
    table = re.search(r'<table class="list differences".*?</table>', html, re.S)[0]  # type: ignore[index]
    rows = {
        name: re.findall(r"<td>(.*?)</td>", row)
        for name, row in re.findall(r"<code>(.*?)</code></th>(.*?)</tr>", table, re.S)
    }
    assert rows["k"] == ["2", "5", "3"]
    assert rows["lr"] == ["0.001", "0.001", "0.01"]
    assert "n_tokens" not in rows
    seen = versions(html)
    assert parts(client, f"/jobs/compare/parts?job={first}&job={second}", seen)["parts"] == {}


def test_comparisons_of_nothing_of_too_much_and_of_what_is_not_there(client: TestClient) -> None:
    assert "Choose jobs" in page(client, "/jobs/compare")
    assert client.get("/jobs/compare?job=99").status_code == 404
    assert client.get("/jobs/compare?job=abc").status_code == 404
    many = [str(train(client, ONE, range(0), {})) for _ in range(13)]
    answer = client.get("/jobs/compare", params={"job": many})
    assert answer.status_code == 422
    assert "13 jobs are too many to compare; 12 can be." in answer.text


def test_the_list_of_jobs_offers_to_compare_trainings(client: TestClient) -> None:
    train(client, ONE, range(0), {})
    assert "Compare the curves" not in page(client, "/jobs")
    train(client, ONE, range(0), {})
    html = page(client, "/jobs")
    assert html.count('type="checkbox" name="job"') == 2
    assert "Compare the curves" in html


def test_a_long_training_is_a_small_page(client: TestClient) -> None:
    values = {f"{source}/loss": 0.1 for source in GRID}
    number = train(client, SPEC, range(10, 50_010, 10), values)
    html = page(client, f"/jobs/{number}")
    assert len(plot(html, "loss")["lines"][0]["x"]) <= 1300
    assert len(html) < 400_000
    zoomed = plot(page(client, f"/jobs/{number}?first=1000&last=2000"), "loss")["lines"][0]
    assert zoomed["x"] == list(range(1000, 2010, 10))


def test_plans_that_cannot_be_read_are_guessed(client: TestClient, settings: Settings) -> None:
    number = train(client, ONE, range(10, 110, 10), {"dead_fraction": 0.6}, done=0.5)
    directory: Path = settings.job_dir(number)
    directory.mkdir(parents=True)
    for text in ("", "[]", '{"cached": true}', "null"):
        (directory / "plan.json").write_text(text)
        assert "1 warning<" in page(client, f"/jobs/{number}")
