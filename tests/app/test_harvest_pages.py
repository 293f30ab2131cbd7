"""Harvests in the browser and on the command line: asked for, priced, listed, shown, removed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app import cli, db, harvestplan, harvests, jobs, trash
from app.corpora import tokens_dir
from app.errors import Conflict
from app.harvestplan import BadField
from app.harvests import FeatureRecord
from app.settings import Settings
from app.specs import HarvestSpec
from app.tables import Corpus, Evidence, Feature, Harvest, Job, JobState, Model, Source, now
from tests.conftest import live_evidence

FORM = "/tiny/harvest"


@pytest.fixture
def catalog_session(client: TestClient, settings: Settings) -> Iterator[Session]:
    with db.sessions(db.connect(settings))() as opened:
        yield opened


def ask(client: TestClient, **fields: Any) -> Any:
    given = {"sources": ["1-demo", "2-plain"], "corpus": "made", "n_tokens": "2,000", "context_size": "16"}
    return client.post(FORM, data=given | fields, follow_redirects=False)


def second_harvest(session: Session, settings: Settings, source: str = "1-demo", kept: str = "") -> int:
    """Evidence of another corpus, not shown by default."""
    corpus = session.scalar(select(Corpus).where(Corpus.name == "second"))
    if corpus is None:
        corpus = Corpus(name="second", hash="c1", n_documents=1, n_chars=9, about="")
        session.add(corpus)
        session.flush()
        tokens = tokens_dir(settings, "c1", "tok")
        tokens.mkdir(parents=True)
        for file in tokens_dir(settings, "c0", "tok").iterdir():
            (tokens / file.name).write_bytes(file.read_bytes())
    row = Harvest(
        corpus_id=corpus.id,
        tokenizer_hash="tok",
        context_size=8,
        bos_token_id=0,
        n_tokens=500,
        summary={"seed": 3},
        activations=kept,
    )
    made = harvests.record(
        session,
        harvests.source_named(session, "tiny", source),
        row,
        [FeatureRecord(i, live_evidence(i + 1), f"from second {i}", " a", " b") for i in range(40)],
    )
    session.commit()
    return made.id


def test_the_form_queues_one_job_for_several_layers(client: TestClient, catalog_session: Session) -> None:
    answer = ask(client, keep_activations=["false", "true"], n_effects="7")
    assert (answer.status_code, answer.headers["location"]) == (303, "/jobs/1")
    job = catalog_session.scalars(select(Job)).one()
    spec = HarvestSpec(**job.spec)
    assert (spec.sources, spec.n_tokens, spec.context_size) == (("1-demo", "2-plain"), 2000, 16)
    assert (spec.keep_activations, spec.n_effects, spec.draw_map) == (True, 7, True)
    assert job.title == "Harvest tiny/1-demo, tiny/2-plain from made"


def test_every_field_of_the_spec_is_on_the_form_and_explained(client: TestClient) -> None:
    page = client.get(f"{FORM}?sources=1-demo").text
    for name, field in HarvestSpec.model_fields.items():
        if name not in ("model", "sources"):
            assert f'name="{name}"' in page
            assert field.description is not None
            assert field.description.split(",")[0].split(";")[0] in page.replace("&#39;", "'")
    assert re.search(r'value="1-demo" checked', page)
    assert re.search(r'value="2-plain">', page)


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no SAE": ({"sources": []}, "sources", "at least 1 item"),
    "an unknown SAE": ({"sources": ["1-demo", "9-gone"]}, "sources", "no SAE called"),
    "too few tokens": ({"n_tokens": "3"}, "n_tokens", "greater than or equal to 1000"),
    "a text": ({"n_tokens": "many"}, "n_tokens", "valid integer"),
    "a context longer than the model's": ({"context_size": "65"}, "context_size", "65 tokens; tiny reads 64"),
    "an unknown corpus": ({"corpus": "nothing"}, "corpus", "There is no corpus"),
    "infinity": ({"seed": "1e999"}, "seed", "valid integer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_at_its_field_and_nothing_is_queued(
    client: TestClient, catalog_session: Session, case: str
) -> None:
    changes, name, words = WRONG[case]
    answer = ask(client, **({"n_top": "33"} | changes))
    assert answer.status_code in (404, 422)
    place = r'class="saes wrong".*?role="alert">' if name == "sources" else rf'id="field-{name}-error" role="alert">'
    said = re.search(place + "([^<]*)", answer.text, re.S)
    assert said, answer.text
    assert words in said[1].replace("&#39;", "'")
    assert 'value="33"' in answer.text, "what was typed stays"
    assert catalog_session.scalar(select(func.count()).select_from(Job)) == 0


def test_saes_that_begin_texts_differently_are_refused_before_they_start(
    client: TestClient, catalog_session: Session
) -> None:
    other = harvests.source_named(catalog_session, "tiny", "2-plain")
    other.config = {"k": 2, "metadata": {"prepend_bos": False}}
    catalog_session.commit()
    assert "do not all read texts with the model&#39;s first token" in ask(client).text


def test_the_estimate_counts_tokens_bytes_and_what_the_machine_did_before(
    client: TestClient, catalog_session: Session, settings: Settings
) -> None:
    spec = HarvestSpec.model_validate(
        {"model": "tiny", "sources": ["1-demo"], "corpus": "made", "n_tokens": 1000, "context_size": 8, "n_effects": 0}
    )
    first = harvestplan.estimate(catalog_session, settings, spec)
    assert (first.n_tokens, first.available, first.counted, first.measured) == (37, 37, True, 0)
    assert first.working_disk_bytes == 37 * 2 * 8, "l0 of 2, eight bytes each"
    assert first.kept_disk_bytes == 40 * 1500
    job = Job(kind="harvest", title="", spec=spec.model_dump(mode="json"), result={"n_tokens": 37}, workflow_id="")
    job.state, job.started_at = JobState.DONE, now()
    job.ended_at = job.started_at + timedelta(seconds=10 * first.seconds)
    catalog_session.add(job)
    catalog_session.commit()
    again = harvestplan.estimate(catalog_session, settings, spec)
    assert again.measured == 1
    assert again.seconds == pytest.approx(10 * first.seconds, rel=1e-3)
    page = client.get(f"{FORM}/estimate?sources=1-demo&corpus=made&n_tokens=1000&context_size=8").text
    assert "as fast as the latest harvest here" in page
    assert "<html" not in page
    assert "greater than or equal" in client.get(f"{FORM}/estimate?sources=1-demo&n_tokens=1").text


def test_a_job_can_be_cloned_and_leads_to_its_partial_evidence(
    client: TestClient, catalog_session: Session, settings: Settings
) -> None:
    ask(client, keep_activations="true", n_top="33")
    harvest = catalog_session.get_one(Harvest, 1)
    harvest.job_id, harvest.state, harvest.summary = 1, "partial", {"progress": {"done": 2, "total": 9}}
    catalog_session.commit()
    page = client.get("/jobs/1").text
    assert "Partial evidence of 1-demo" in page
    link = re.search(r'href="([^"]*/harvest\?[^"]*)"', page)
    assert link
    form = client.get(link[1].replace("&amp;", "&")).text
    assert 'name="n_top" value="33"' in form
    assert re.search(r'name="keep_activations" value="true" checked', form)
    assert re.search(r'value="2-plain" checked', form)
    assert "2 of 9 parts" in client.get("/harvests/1").text


def test_harvests_are_listed_and_shown_in_the_browser_and_on_the_command_line(
    client: TestClient, catalog_session: Session, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = second_harvest(catalog_session, settings)
    monkeypatch.setenv("SAE_ATLAS_DATA_DIR", str(settings.data_dir))
    run = CliRunner().invoke
    listed = run(cli.app, ["harvest", "list"]).output
    for text in (listed, client.get("/harvests").text, client.get("/tiny/1-demo").text):
        assert "second" in text
        assert "500" in text
    shown = run(cli.app, ["harvest", "show", str(number)]).output
    assert "second (c1)" in shown
    assert "on request" in shown
    assert "Show it by default" in client.get(f"/harvests/{number}").text
    assert run(cli.app, ["harvest", "show", "99"]).exit_code != 0
    assert client.get("/harvests/99").status_code == 404
    begun = run(cli.app, ["harvest", "tiny/1-demo", "--corpus", "made", "--tokens", "2000", "--context-size", "16"])
    assert "Job 1 queued: Harvest tiny/1-demo from made" in begun.output
    assert "of memory" in begun.output


def test_another_corpus_becomes_the_default_and_the_first_goes(
    client: TestClient, catalog_session: Session, settings: Settings
) -> None:
    number = second_harvest(catalog_session, settings)
    assert client.post("/harvests/1/remove", follow_redirects=False).headers["location"] == "/tiny/1-demo"
    catalog_session.expire_all()
    source = harvests.source_named(catalog_session, "tiny", "1-demo")
    assert source.harvest_id == number, "what is left is shown"
    left = catalog_session.scalars(select(Evidence.harvest_id).distinct()).all()
    assert left == [number]
    assert client.get("/tiny/1-demo/3").status_code == 200
    assert client.post(f"/harvests/{number}/remove", follow_redirects=False).status_code == 303
    catalog_session.expire_all()
    assert source.harvest_id is None
    assert catalog_session.scalar(select(func.count()).where(Feature.source_id == source.id)) == 0
    assert client.get("/tiny/1-demo").status_code == 200
    assert client.get("/tiny/1-demo/3").status_code == 200


def test_evidence_that_a_job_is_gathering_is_not_removed(
    client: TestClient, catalog_session: Session, settings: Settings
) -> None:
    ask(client)
    catalog_session.get_one(Harvest, 1).job_id = 1
    catalog_session.commit()
    answer = client.post("/harvests/1/remove", follow_redirects=False)
    assert answer.status_code == 409
    assert "Job 1 is gathering it; cancel that first" in answer.text
    jobs.cancel(catalog_session, 1)
    catalog_session.commit()
    assert client.post("/harvests/1/remove", follow_redirects=False).status_code == 303


def keep(settings: Settings, key: str) -> Path:
    directory = settings.activations_dir(key)
    directory.mkdir(parents=True)
    (directory / "00000000-00000512.bin").write_bytes(b"x" * 100)
    return directory


def test_kept_activations_go_with_the_last_evidence_that_uses_them(
    client: TestClient, catalog_session: Session, settings: Settings
) -> None:
    shared, own = keep(settings, "shared"), keep(settings, "own")
    second_harvest(catalog_session, settings, "1-demo", "shared")
    second_harvest(catalog_session, settings, "2-plain", "shared")
    catalog_session.get_one(Harvest, 1).activations = "own"
    catalog_session.commit()
    client.post("/tiny/1-demo/remove")
    assert (shared.exists(), own.exists()) == (True, True)
    assert trash.purge(catalog_session, settings, timedelta(0)) == 1
    assert (shared.exists(), own.exists()) == (True, False)
    client.post("/tiny/2-plain/remove")
    assert trash.purge(catalog_session, settings, timedelta(0)) == 1
    assert not shared.exists()


def test_kept_activations_stay_when_the_removal_is_not_committed_or_a_harvest_waits(
    catalog_session: Session, settings: Settings
) -> None:
    kept = keep(settings, "own")
    catalog_session.get_one(Harvest, 1).activations = "own"
    catalog_session.commit()
    harvests.remove_harvest(catalog_session, settings, 1)
    catalog_session.rollback()
    catalog_session.commit()
    assert kept.exists()
    spec = {"model": "tiny", "sources": ["2-plain"], "corpus": "made", "keep_activations": True}
    jobs.submit(catalog_session, settings, "harvest", "", spec)
    harvests.remove_harvest(catalog_session, settings, 1)
    catalog_session.commit()
    assert kept.exists(), "the waiting job may read on from them"


def test_a_source_without_weights_is_refused(catalog_session: Session, settings: Settings) -> None:
    harvests.source_named(catalog_session, "tiny", "2-plain").sae_hash = "none-1"
    spec = HarvestSpec.model_validate({"model": "tiny", "source": "2-plain", "corpus": "made"})
    with pytest.raises(BadField, match="browsing only"):
        harvestplan.queue(catalog_session, settings, spec)


def test_nobody_can_remove_what_is_not_there(catalog_session: Session, settings: Settings) -> None:
    assert catalog_session.get(Model, "tiny")
    assert catalog_session.scalar(select(func.count()).select_from(Source)) == 3
    with pytest.raises(Exception, match="no harvest 77"):
        harvests.remove_harvest(catalog_session, settings, 77)
    assert Conflict.status == 409
