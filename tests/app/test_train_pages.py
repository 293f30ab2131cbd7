"""Training in the browser: the form, its YAML both ways, what it will take, what is wrong, and the queue."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html import escape, unescape
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
import yaml
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import db, jobs, trainforms, trainings
from app.settings import Settings
from app.tables import Job, Source
from app.trainspecs import Architecture, SaeSpec, TrainSpec
from tests import conftest

FORM = {
    "model": "tiny",
    "corpus": "made",
    "architecture": "topk",
    "hook": "hook_resid_post",
    "layer": "1",
    "set_name": "mine",
    "d_sae": "32",
    "k": "4",
    "context_size": "16",
    "batch_size": "8",
    "n_tokens": "2,000",
}
FREE = """model: tiny
corpus: made
context_size: 16
batch_size: 8
hook_name: blocks.1.hook_resid_post
saes:
- {set_name: a, k: 4, d_sae: 32}
- {set_name: b, architecture: gated, d_sae: 64}
"""


@pytest.fixture
def catalog_session(client: TestClient, settings: Settings) -> Iterator[Session]:
    with db.sessions(db.connect(settings))() as opened:
        yield opened


def text(page: str) -> str:
    return unescape(page)


def yaml_on(page: str) -> dict[str, Any]:
    found = re.search(r'<textarea id="spec-yaml"[^>]*>(.*?)</textarea>', page, re.S)
    assert found, page
    return yaml.safe_load(text(found[1]))


def values_on(page: str) -> dict[str, str]:
    """What a browser would send of the form."""
    start = page.index('class="train"')
    form = page[start : page.index("</form>", start)]
    boxes = dict(re.findall(r'<input [^>]*?name="([a-z0-9_]+)"[^>]*? value="([^"]*)"', form))
    boxes |= dict(re.findall(r'<input type="hidden" name="([a-z0-9_]+)" value="([^"]*)"', form))
    for name, options in re.findall(r'<select [^>]*?name="([a-z0-9_]+)"[^>]*>(.*?)</select>', form, re.S):
        picked = re.search(r'<option value="([^"]*)" selected', options) or re.search(r'value="([^"]*)"', options)
        boxes[name] = picked[1] if picked else ""
    assert {"model", "architecture", "hook", "cache"} < set(boxes)
    return {name: text(value) for name, value in boxes.items()}


def n_jobs(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Job)) or 0


def test_a_second_training_of_the_same_name_is_told_of_the_first(client: TestClient) -> None:
    first = client.post("/train", data=FORM, follow_redirects=False).headers["location"]
    number = first.rsplit("/", 1)[1]
    told = f"Job {number}, queued, makes 1-mine too: whichever ends last stays."
    assert told in text(client.get("/train/outlook", params=FORM).text)
    assert told not in text(client.get("/train/outlook", params=FORM | {"set_name": "other"}).text)
    client.post(f"{first}/cancel")
    assert told not in text(client.get("/train/outlook", params=FORM).text)


def test_the_form_queues_a_training(client: TestClient, catalog_session: Session) -> None:
    answer = client.post("/train", data=FORM, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/jobs/1")
    job = catalog_session.scalars(select(Job)).one()
    assert TrainSpec.model_validate(job.spec) == trainings.read(trainforms.from_form(FORM))
    assert job.title == "Train tiny/1-mine: TopK k=4, d_sae=32"


def test_several_values_make_several_saes_of_one_job(client: TestClient, catalog_session: Session) -> None:
    client.post("/train", data=FORM | {"k": "2, 4", "layer": "0,1", "seed": "0"})
    spec = TrainSpec.model_validate(catalog_session.scalars(select(Job)).one().spec)
    assert sorted(sae.source for sae in spec.saes) == ["0-mine-k2", "0-mine-k4", "1-mine-k2", "1-mine-k4"]


def test_every_field_is_on_the_form_and_explained_and_shown_where_its_architecture_is(client: TestClient) -> None:
    page = text(client.get("/train").text)
    shown = re.findall(r'<div data-of="([^"]*)"><div class="field.*?name="([a-z0-9_]+)"', page, re.S)
    of = {name: set(architectures.split()) for architectures, name in shown}
    for spec in (TrainSpec, SaeSpec):
        for name, field in spec.model_fields.items():
            if name in ("saes", "hook_name", "hook_name_out", "model", "visibility"):
                continue  # visibility: on servers with accounts, tests.app.test_visibility
            assert f'name="{name}"' in page, name
            assert (field.description or "").split(".")[0].split("`")[0] in page, name
            owners = {str(a) for a in Architecture if name in a.fields}
            assert of.get(name, set()) == (owners if name not in ("lr", "dead_latents") else set()), name
    assert of["hook_out"] == {"transcoder", "skip_transcoder"}
    assert 'placeholder="3 or 5"' in page  # L1 coefficients by architecture


def test_the_style_sheet_shows_the_fields_of_every_architecture(client: TestClient) -> None:
    path = re.search(r'href="(/static/[^"]*app.css)"', client.get("/train").text)
    assert path
    style = client.get(path[1]).text
    for architecture in Architecture:
        assert f'option[value="{architecture}"]:checked) [data-of~="{architecture}"]' in style


def test_a_page_filled_in_by_its_address_sends_what_it_was_given(client: TestClient) -> None:
    page = client.get("/train", params=FORM).text
    assert trainings.read(trainforms.from_form(values_on(page))) == trainings.read(trainforms.from_form(FORM))
    assert trainings.read(yaml_on(page)) == trainings.read(trainforms.from_form(FORM))


@pytest.mark.parametrize("key", [preset.key for preset in trainforms.presets(conftest.card())])
def test_a_preset_fills_the_form_in_and_its_yaml_is_the_same(client: TestClient, key: str) -> None:
    page = client.get(f"/train?model=tiny&preset={key}&context_size=16&batch_size=8").text
    sent = trainings.read(trainforms.from_form(values_on(page)))
    assert trainings.read(yaml_on(page)) == sent
    assert text(page).count("It cannot start as it is") == 0


def test_yaml_fills_the_form_in_pasted_or_uploaded(client: TestClient) -> None:
    spec = trainings.read(trainforms.from_form(FORM | {"k": "4,8", "seed": "1,0", "lr": "3e-4"}))
    told = client.get("/train", params=FORM | {"k": "4,8", "seed": "1,0", "lr": "3e-4"}).text
    download = re.search(r'href="(/train/spec\.yaml[^"]*)"', told)
    assert download
    file = client.get(text(download[1]))
    assert "attachment" in file.headers["content-disposition"]
    assert yaml.safe_load(file.text) == yaml_on(told)
    ways: list[dict[str, Any]] = [
        {"data": {"yaml": file.text.replace("\n", "\r\n")}},
        {"files": {"file": ("spec.yaml", file.content)}},
    ]
    for way in ways:
        led = client.post("/train/yaml", follow_redirects=False, **way)
        assert led.status_code == 303, led.text
        page = client.get(led.headers["location"]).text
        assert trainings.read(trainforms.from_form(values_on(page))) == spec
        assert yaml_on(page) == yaml.safe_load(file.text)


def test_a_spec_that_no_form_holds_is_edited_and_started_as_yaml(client: TestClient, catalog_session: Session) -> None:
    page = client.post("/train/yaml", data={"yaml": FREE})
    assert page.status_code == 200
    assert "differ in more than a form can say" in page.text
    assert re.search(r"<code>1-a</code>\s*<code>1-b</code>", page.text)
    assert text(page.text).count("gated, d_sae: 64") == 1
    assert client.post("/train", data={"yaml": FREE}, follow_redirects=False).headers["location"] == "/jobs/1"
    cloned = client.get("/train?clone=1").text
    assert "Train again, as job 1" in cloned
    box = re.search(r'<textarea id="yaml"[^>]*>(.*?)</textarea>', cloned, re.S)
    assert box
    assert trainings.read(yaml.safe_load(text(box[1]))) == trainings.read(yaml.safe_load(FREE))


BAD_YAML = {
    "a bomb": ("a: &a [x]\nb: [*a, *a]", "references are not read"),
    "no YAML": ("a: [1", "This is no YAML"),
    "nothing": ("", "this YAML is a blank"),
    "a wrong field": (FREE.replace("k: 4", "k: 40"), "k is 40 and d_sae 32"),
    "an unknown corpus": (FREE.replace("made", "none"), "There is no corpus 'none'"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_yaml_that_cannot_be_used_is_shown_with_what_is_wrong(
    client: TestClient, catalog_session: Session, case: str
) -> None:
    given, words = BAD_YAML[case]
    for path in ("/train", "/train/yaml"):
        page = client.post(path, data={"yaml": given})
        assert page.status_code == (200 if case == "an unknown corpus" and path == "/train/yaml" else 422)
        assert words in text(page.text)
        assert given.strip() in text(page.text).replace("\r", "")
    assert n_jobs(catalog_session) == 0


WRONG: dict[str, tuple[dict[str, str], str, str]] = {
    "a text": ({"n_tokens": "many"}, "n_tokens", "It is 'many'; it must be a whole number, in digits."),
    "too few": ({"n_tokens": "3"}, "n_tokens", "It is 3; it must be at least 2,000."),
    "a layer too many": ({"layer": "1,3"}, "layer", "blocks.3.hook_resid_post is in layer 3; tiny has layers 0 to 2."),
    "no layer": ({"layer": ""}, "layer", "It is missing."),
    "a layer that is no number": ({"layer": "x"}, "layer", "it must be such as blocks.12.hook_resid_post"),
    "no output": (
        {"architecture": "transcoder", "hook": "hook_mlp_out"},
        "hook_out",
        "hook_name_out is hook_name itself",
    ),
    "no corpus": ({"corpus": ""}, "corpus", "It is missing."),
    "an unknown corpus": ({"corpus": "none"}, "corpus", "There is no corpus 'none'; there are: made"),
    "k too large": ({"k": "32"}, "k", "k is 32 and d_sae 32; k must be smaller"),
    "NaN": ({"lr": "nan"}, "lr", "It is 'nan'; it must be a finite number."),
    "a context too long": ({"context_size": "65"}, "context_size", "65 tokens; tiny reads 64"),
    "a batch too large": ({"batch_size": "16"}, "batch_size", "16 tokens; the corpus gives 15"),
    "a name that is none": ({"set_name": "../x"}, "set_name", "it must be small letters, digits"),
    "a grid too large": ({"seed": ",".join(map(str, range(65)))}, "", "65 SAEs; a job trains at most 64"),
    "an architecture": ({"architecture": "<script>"}, "architecture", "it is '<script>'"),
    "half a character": ({"corpus": "\ud800"}, "corpus", "There is no corpus"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_at_its_field_and_nothing_is_queued(
    client: TestClient, catalog_session: Session, case: str
) -> None:
    changes, name, words = WRONG[case]
    body = urlencode(FORM | {"warmup_steps": "77"} | changes, errors="surrogatepass")
    answer = client.post("/train", content=body, headers={"content-type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 422
    place = rf'id="field-{name}-error" role="alert">([^<]*)' if name else r"([^<]*)"
    assert any(words in text(said) for said in re.findall(place, answer.text)), answer.text
    assert 'name="warmup_steps" value="77"' in answer.text, "what was typed stays"
    for field, value in changes.items():
        if field not in ("hook", "architecture") and value.isascii():
            assert re.search(rf'name="{field}"[^>]* value="{re.escape(escape(value))}"', answer.text), "so does this"
    assert not name or f'<a href="#field-{name}">' in answer.text
    asked_again = client.get(f"/train?{body}").text
    assert not name or name == "corpus" or f'id="field-{name}-error"' in asked_again, "an estimate says it there too"
    assert n_jobs(catalog_session) == 0
    live = client.get(f"/train/outlook?{body}")
    assert live.status_code == 200
    assert "It cannot start as it is" in live.text
    assert words in text(live.text)


def test_the_outlook_follows_the_form_as_a_part_of_the_page(client: TestClient) -> None:
    part = client.get("/train/outlook", params=FORM | {"harvest_tokens": "1000"}).text
    assert "<html" not in part
    for words in ("4 steps of 8", "of 37 in the corpus", "<code>1-mine</code>", "fewer than the 2,000 asked for"):
        assert words in part
    assert trainings.read(yaml_on(part)).saes[0].k == 4
    assert (
        "the end of this training replaces it" in client.get("/train/outlook", params=FORM | {"set_name": "demo"}).text
    )


def test_fields_of_architectures_that_are_not_chosen_do_not_stop_it(
    client: TestClient, catalog_session: Session
) -> None:
    left = {"l1_coefficient": "lots", "penalty": "tanh", "hook_out": "hook_mlp_out", "matryoshka_widths": "x"}
    assert client.post("/train", data=FORM | left, follow_redirects=False).status_code == 303
    assert TrainSpec.model_validate(catalog_session.scalars(select(Job)).one().spec).saes[0].l1_coefficient is None


def test_a_job_is_cloned_into_the_same_form(client: TestClient, catalog_session: Session) -> None:
    client.post("/train", data=FORM | {"k": "2,4", "decay_share": "0.1"})
    assert 'href="/train?clone=1"' in client.get("/jobs/1").text
    page = client.get("/train?clone=1").text
    job = catalog_session.scalars(select(Job)).one()
    assert trainings.read(trainforms.from_form(values_on(page))) == TrainSpec.model_validate(job.spec)
    assert client.get("/train?clone=9").status_code == 404
    assert client.get("/train?clone=x").status_code == 404


def test_a_harvest_is_not_cloned_into_a_training_and_an_old_spec_shows_what_does_not_fit(
    client: TestClient, catalog_session: Session, settings: Settings
) -> None:
    jobs.submit(catalog_session, settings, "harvest", "Harvest", {})
    jobs.submit(catalog_session, settings, "train", "Train", {"model": "tiny", "old_field": 3})
    catalog_session.commit()
    assert client.get("/train?clone=1").status_code == 404
    assert "There is no field of this name" in client.get("/train?clone=2").text


def test_other_pages_lead_to_it(client: TestClient) -> None:
    for path, link in (
        ("/", "/train"),
        ("/jobs", "/train"),
        ("/tiny", "/train?model=tiny"),
        ("/corpora/made", "/train?model=tiny&corpus=made"),
    ):
        assert f'href="{link}"' in text(client.get(path).text), path
    led = client.get("/tiny/train?set_name=x", follow_redirects=False)
    assert (led.status_code, parse_qs(urlsplit(led.headers["location"]).query)["model"]) == (303, ["tiny"])
    assert client.get("/nobody/train").status_code == 404


def test_what_is_missing_is_said_with_what_to_do(
    client: TestClient, catalog_session: Session, settings: Settings
) -> None:
    assert "No trainer is running: a job waits until" in client.get("/train").text
    assert "No trainer is running: the job waits until" in client.get("/train", params=FORM).text
    shutil.rmtree(settings.corpus_dir("c0"))
    assert "There is no corpus that tiny can read yet" in client.get("/train").text
    shutil.rmtree(settings.model_dir("tiny"))
    page = client.get("/train").text
    assert "There is no model to train on" in page
    assert client.post("/train", data=FORM).status_code == 422
    assert n_jobs(catalog_session) == 0


def test_addresses_that_make_no_sense_are_answered(client: TestClient) -> None:
    for query in ("model=nobody", "preset=none", "k=" + "1," * 900, "layer=" + "9" * 1_900, "d_sae=%00", "%ff=1"):
        assert client.get(f"/train?{query}").status_code in (200, 404), query
    assert client.get("/train/spec.yaml").status_code == 422
    assert client.get("/train/spec.yaml?model=%0d%0aset-cookie:x&set_name=%0d%0a").status_code == 422


def test_an_sae_that_was_trained_here_names_its_job_and_can_be_trained_again(
    client: TestClient, catalog_session: Session
) -> None:
    client.post("/train", data=FORM | {"k": "4", "harvest_tokens": "5000"})
    job = catalog_session.scalars(select(Job)).one()
    spec = TrainSpec.model_validate(job.spec).model_dump(mode="json", exclude={"harvest_tokens"}, exclude_none=True)
    source = catalog_session.scalars(select(Source).where(Source.name == "1-other")).one()
    source.name, source.set_name, source.origin = "1-mine", "mine", {"kind": "trained", "job": 1, "spec": spec}
    catalog_session.commit()
    page = text(client.get("/tiny/1-mine").text)
    assert 'href="/jobs/1">Its training, job 1</a>' in page
    assert "<dt>k</dt><dd>4</dd>" in page
    again = client.get("/train?like=tiny/1-mine").text
    assert trainings.read(yaml_on(again)) == trainings.read({**spec, "harvest_tokens": 1_000_000})
    source.name, source.set_name = "1-moved", "moved"  # as a bundle brings it, with the number of a job of elsewhere
    catalog_session.commit()
    page = text(client.get("/tiny/1-moved").text)
    assert "/jobs/1" not in page
    assert "/train?like=tiny/1-moved" in page
    assert client.get("/train?like=tiny/2-plain").status_code == 404
    assert client.get("/train?like=tiny").status_code == 422
