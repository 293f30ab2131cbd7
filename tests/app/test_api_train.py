"""/api/train and `sae-atlas train` refuse the same specs in the same words, with both numbers, and queue nothing."""

from __future__ import annotations

import json
import os
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app import cli, db, trainings
from app.settings import Settings
from app.tables import Corpus, Job, JobState, Model, Source
from app.trainspecs import TrainSpec
from tests import conftest
from tests.app.test_train_pages import FORM

SPEC: dict[str, Any] = {
    "model": "tiny",
    "corpus": "made",
    "hook_name": "blocks.1.hook_resid_post",
    "set_name": "mine",
    "d_sae": 32,
    "k": 4,
    "context_size": 16,
    "batch_size": 8,
    "n_tokens": 2_000,
}


@pytest.fixture
def catalog_session(client: TestClient, settings: Settings) -> Iterator[Session]:
    with db.sessions(db.connect(settings))() as opened:
        yield opened


def n_jobs(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Job)) or 0


def test_json_and_yaml_queue_the_same_training(client: TestClient, catalog_session: Session) -> None:
    text = yaml.safe_dump(SPEC)
    answers = [
        client.post("/api/train", json=SPEC),
        client.post("/api/train", json={"yaml": text}),
        client.post("/api/train", content=text, headers={"content-type": "application/yaml"}),
    ]
    assert [answer.status_code for answer in answers] == [201] * 3, answers[-1].text
    queued = [answer.json() for answer in answers]
    assert [job["id"] for job in queued] == [1, 2, 3]
    assert queued[0]["title"] == "Train tiny/1-mine: TopK k=4, d_sae=32"
    assert (queued[0]["state"], queued[0]["url"], queued[2]["place"]) == ("queued", "/jobs/1", 3)
    specs = [TrainSpec.model_validate(job.spec) for job in catalog_session.scalars(select(Job))]
    assert specs == [trainings.read(SPEC)] * 3


def test_the_estimate_queues_nothing_and_says_what_it_takes(client: TestClient, catalog_session: Session) -> None:
    answer = client.post("/api/train/estimate", json=SPEC | {"k": [2, 4], "harvest_tokens": 1000})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert told["sources"] == ["1-mine-k2", "1-mine-k4"]
    assert (told["availableTokens"], told["counted"], told["measured"]) == (37, True, False)
    assert (told["tokens"], told["tokensSeen"], told["steps"]) == (15, 32, 4)
    assert told["memoryBytes"] > 0 < told["diskBytes"] < told["freeDiskBytes"]
    assert trainings.read(yaml.safe_load(told["yaml"])) == trainings.read(SPEC | {"k": [2, 4], "harvest_tokens": 1000})
    assert told["notes"] == [
        "The corpus gives 15 tokens to train on, fewer than the 2,000 asked for: all are read.",
        "No trainer is running: the job waits until `sae-atlas serve` starts one.",
        "warmup_steps is 100 of 4 steps: the learning rate only rises. A twentieth would be 1.",
    ]
    assert n_jobs(catalog_session) == 0


def test_schedules_longer_than_the_training_are_told_before_it_starts(client: TestClient) -> None:
    dense = {"architecture": "standard", "k": None, "harvest_tokens": 0}
    notes = client.post("/api/train/estimate", json=SPEC | dense).json()["notes"]
    assert "l1_warmup_steps is 500 of 4 steps: the penalty only rises. A twentieth would be 1." in notes
    assert any(note.startswith("resample_every_steps is 2,500 of 4 steps") for note in notes)
    short = {"l1_warmup_steps": 1, "warmup_steps": 4, "dead_latents": "none"}
    notes = client.post("/api/train/estimate", json=SPEC | dense | short).json()["notes"]
    assert "warmup_steps is 4 of 4 steps: the learning rate only rises. A twentieth would be 1." in notes
    assert not any("l1_warmup" in note or "resample" in note for note in notes)


def test_the_estimate_tells_evaluation_and_dashboards_apart(client: TestClient, settings: Settings) -> None:
    told = client.post("/api/train/estimate", json=SPEC | {"k": [2, 4], "harvest_tokens": 1000}).json()
    after = told["harvest"]
    assert (after["tokens"], after["measured"]) == (37, False)
    # 32 + 32 latents of 1,500 bytes; 2 and 4 of them on each of 37 tokens, 8 bytes each.
    assert (after["keptDiskBytes"], after["workingDiskBytes"]) == (64 * 1_500, 37 * 6 * 8)
    assert told["evaluationSeconds"] > 0 < after["seconds"]
    assert told["wholeSeconds"] == pytest.approx(told["seconds"] + told["evaluationSeconds"] + after["seconds"])
    none = client.post("/api/train/estimate", json=SPEC | {"harvest_tokens": 0}).json()
    assert none["harvest"] is None
    assert none["wholeSeconds"] == pytest.approx(none["seconds"] + none["evaluationSeconds"])
    page = client.get("/train/outlook", params={**FORM, "k": "2,4", "harvest_tokens": "1000"}).text
    assert "of evaluation" in page
    assert "for the dashboards" in page


def test_dashboards_that_would_not_fit_are_told_and_stop_no_training(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    told = client.post("/api/train/estimate", json=SPEC).json()
    room = told["diskBytes"] + told["saeBytes"]
    needs = told["harvest"]["workingDiskBytes"] + told["harvest"]["keptDiskBytes"] + told["saeBytes"]
    assert needs > room
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(room, 0, room))
    notes = client.post("/api/train/estimate", json=SPEC).json()["notes"]
    assert any(note.startswith("The dashboards would take") and "harvest_tokens" in note for note in notes)


def test_a_finished_training_s_speed_is_the_next_one_s(client: TestClient, catalog_session: Session) -> None:
    def finish(**changes: Any) -> None:
        speed = {"forward": 1e13, "step": 1e13}
        job = Job(kind="train", title="", spec=SPEC | changes, result={"speed": speed}, workflow_id="")
        job.state = JobState.DONE
        catalog_session.add(job)
        catalog_session.commit()

    slow = client.post("/api/train/estimate", json=SPEC).json()
    finish()
    finish(model="gone", d_sae=2**20, batch_size=4096)
    finish(nonsense=1)
    tiny = client.post("/api/train/estimate", json=SPEC).json()
    assert (tiny["measured"], tiny["seconds"]) == (False, slow["seconds"]), "what tiny SAEs took says little"
    finish(d_sae=2**20, batch_size=4096)
    fast = client.post("/api/train/estimate", json=SPEC).json()
    assert fast["measured"]
    assert fast["seconds"] < slow["seconds"] / 20


def test_presets_and_the_schema_tell_what_can_be_asked(client: TestClient) -> None:
    presets = client.get("/api/train/presets?model=tiny").json()
    assert {"quick", "standard", "wide"} < {preset["key"] for preset in presets}
    for preset in presets:
        assert trainings.read({"corpus": "made", **preset["spec"]}).model == "tiny"
    assert client.get("/api/train/presets?model=nobody").status_code == 404
    schema = client.get("/api/train/schema").json()
    for name in ("k", "l1_coefficient", "n_tokens", "harvest_tokens", "saes"):
        assert schema["properties"][name]["description"]


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "an unknown model": ({"model": "nobody"}, "model", "nobody"),
    "an unknown corpus": ({"corpus": "none"}, "corpus", "There is no corpus 'none'; there are: made"),
    "NUL in a name": ({"corpus": "made\0x"}, "corpus", "a text in one line"),
    "no dataset's id": ({"corpus": "hf:../../etc"}, "corpus", "is no dataset of the hub; write owner/name"),
    "an address for a dataset": ({"corpus": "hf:http://169.254.169.254/"}, "corpus", "'//169.254.169.254/' cannot be"),
    "a dataset too large": (
        {"corpus": "hf:a/b", "n_tokens": 10**11},
        "n_tokens",
        "about 490.2 GiB; a corpus may have 64.0 GiB (SAE_ATLAS_MAX_CORPUS_BYTES)",
    ),
    "half a character": ({"model": "\ud800"}, "model", ""),
    "a layer that is not there": ({"hook_name": "blocks.3.hook_resid_post"}, "hook_name", "tiny has layers 0 to 2"),
    "a layer far away": (
        {"hook_name": "blocks.9999.hook_z"},
        "hook_name",
        "it must be such as blocks.12.hook_resid_post",
    ),
    "an output that is not there": (
        {
            "architecture": "transcoder",
            "k": None,
            "hook_name": "blocks.1.mlp.hook_in",
            "hook_name_out": "blocks.7.hook_mlp_out",
        },
        "hook_name_out",
        "blocks.7.hook_mlp_out is in layer 7; tiny has layers 0 to 2",
    ),
    "a context the model cannot read": ({"context_size": 65}, "context_size", "65 tokens; tiny reads 64"),
    "a batch larger than the corpus": ({"batch_size": 16}, "batch_size", "16 tokens; the corpus gives 15"),
    "too wide": ({"d_sae": 2**20 + 1}, "d_sae", "1,048,577; it must be at most 1,048,576"),
    "too narrow": ({"d_sae": 1}, "d_sae", "1; it must be at least 8"),
    "k of nothing": ({"k": 0}, "k", "0; it must be at least 1"),
    "k too large": ({"k": 32}, "k", "k is 32 and d_sae 32"),
    "k of a billion": ({"k": 10**9}, "k", "1,000,000,000; it must be at most 1,048,576"),
    "not a number": ({"lr": float("nan")}, "lr", "finite number"),
    "infinity": ({"max_grad_norm": float("inf")}, "max_grad_norm", "finite number"),
    "a rate over one": ({"lr": 1.5}, "lr", "1.5; it must be at most 1"),
    "tokens without end": ({"n_tokens": 10**30}, "n_tokens", "it must be at most 100,000,000,000"),
    "a number of many digits": ({"seed": 10**4000}, "seed", "a number of 13,288 bits; it must be less than"),
    "a text for a number": ({"n_tokens": "many"}, "n_tokens", "It is 'many'; it must be a whole number"),
    "a huge grid": (
        {"k": list(range(1, 20)), "seed": list(range(99))},
        "",
        "This makes 1,881 SAEs; a job trains at most 64",
    ),
    "a grid of a billion": ({n: list(range(1000)) for n in ("k", "seed", "lr")}, "", "1,000,000,000 SAEs"),
    "an empty grid": ({"k": []}, "k", "a list"),
    "no SAE": ({"saes": []}, "saes", "at least 1 item"),
    "SAEs that are none": ({"saes": "many"}, "saes", "tuple"),
    "a foreign field": ({"l1_coefficient": 3}, "l1_coefficient", "is a field of standard, gated"),
    "an unknown field": ({"nonsense": 1}, "nonsense", "no field of this name"),
    "an unknown architecture": ({"architecture": "magic"}, "architecture", "batchtopk"),
    "a path for a name": ({"set_name": "../x"}, "set_name", "it must be small letters, digits"),
    "a dictionary for a number": ({"k": {"a": 1}}, "k", "It is a mapping"),
    "no hook": ({"hook_name": None}, "hook_name", "missing"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_refused_by_field_with_both_numbers_and_nothing_is_queued(
    client: TestClient, catalog_session: Session, case: str
) -> None:
    changes, field, words = WRONG[case]
    body = json.dumps({k: v for k, v in (SPEC | changes).items() if v is not None})
    for path in ("/api/train", "/api/train/estimate"):
        answer = client.post(path, content=body, headers={"content-type": "application/json"})
        assert answer.status_code == 422, answer.text
        told = answer.json()
        assert told["error"] == told["message"]
        assert any(f["field"] == field and words in f["text"] for f in told["faults"]), told
    assert n_jobs(catalog_session) == 0


def test_two_faults_are_both_told_and_a_fault_of_every_sae_once(client: TestClient) -> None:
    told = client.post("/api/train", json=SPEC | {"d_sae": 1, "k": [1, 2, 3], "lr": 7, "model": "nobody"}).json()
    assert [fault["field"] for fault in told["faults"]] == ["d_sae", "lr"]
    free = {"saes": [{}, {"set_name": "b", "lr": -1}]}
    assert "SAE 2: It is -1; it must be more than 0." in client.post("/api/train", json=SPEC | free).text


BODIES: dict[str, tuple[str | bytes, str, str]] = {
    "a YAML bomb": ("a: &a [x, x]\nb: [*a, *a]\n", "application/yaml", "references are not read"),
    "deep JSON": ("[" * 100_000, "application/json", "nested too deeply"),
    "no JSON": ("{", "application/json", "no JSON"),
    "a JSON list": ("[]", "application/json", "A spec is a JSON object"),
    "a number of too many digits": ('{"k": ' + "9" * 5000 + "}", "application/json", "no JSON"),
    "bytes": (b"\xff\xfe", "application/yaml", "byte 0"),
    "nothing": ("", "application/json", "no JSON"),
    "a hexadecimal monster": (f"k: 0x{'f' * 9000}\nmodel: tiny\n", "application/yaml", "corpus"),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_no_spec_are_refused_in_words(client: TestClient, catalog_session: Session, case: str) -> None:
    body, kind, words = BODIES[case]
    answer = client.post("/api/train", content=body, headers={"content-type": kind})
    assert answer.status_code == 422
    assert words in answer.json()["error"]
    assert n_jobs(catalog_session) == 0


def test_a_spec_of_megabytes_is_refused_before_it_is_read(client: TestClient) -> None:
    answer = client.post("/api/train", content=b"#" * 300_000, headers={"content-type": "application/yaml"})
    assert (answer.status_code, "262,144 bytes" in answer.json()["error"]) == (413, True)


def test_a_disk_or_memory_that_is_too_small_is_named_with_both_sizes(
    client: TestClient, catalog_session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(trainings.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 7 * 1024))
    told = client.post("/api/train", json=SPEC | {"cache": "disk"}).json()["faults"]
    assert [fault["field"] for fault in told] == ["n_tokens"]
    assert "of disk; 7.0 KiB are free: lower n_tokens, or set cache to buffer." in told[0]["text"]
    monkeypatch.undo()
    monkeypatch.setattr(trainings, "_GPU", ())
    monkeypatch.setattr(trainings, "machine_bytes", lambda: 2**26)
    told = client.post("/api/train", json=SPEC | {"d_sae": 2**20}).json()["faults"]
    assert [fault["field"] for fault in told] == ["d_sae"]
    assert "of memory; this machine has 64.0 MiB: lower d_sae" in told[0]["text"]
    assert n_jobs(catalog_session) == 0


def test_a_trainer_elsewhere_or_on_a_gpu_is_not_judged_by_this_machine_s_memory(
    client: TestClient, catalog_session: Session, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(trainings, "_GPU", ())
    assert trainings.memory_limit(catalog_session, settings) == trainings.machine_bytes() > 0
    assert trainings.memory_limit(catalog_session, settings.model_copy(update={"device": "cuda"})) == 0
    monkeypatch.setattr(trainings, "_GPU", (tmp_path,))
    assert trainings.memory_limit(catalog_session, settings) == 0
    assert trainings.memory_limit(catalog_session, settings.model_copy(update={"device": "cpu"})) > 0


def test_models_that_lack_a_hook_or_weights_are_named(client: TestClient, catalog_session: Session) -> None:
    neox = conftest.card().model_copy(update={"id": "neox", "architecture": "GPTNeoXForCausalLM"})
    catalog_session.add(Model(id="neox", name="NeoX", hash="a" * 64, card=neox.model_dump()))
    catalog_session.commit()
    mid = SPEC | {"model": "neox", "hook_name": "blocks.1.hook_resid_mid"}
    assert "No weights here" in client.post("/api/train", json=mid).json()["error"]
    settings: Settings = client.app.state.settings  # type: ignore[attr-defined]
    os.symlink(settings.model_dir("tiny"), settings.model_dir("neox"))
    assert "side by side" in client.post("/api/train", json=mid).json()["error"]


def test_an_sae_of_somebody_else_s_is_not_replaced_and_one_s_own_is(
    client: TestClient, catalog_session: Session, settings: Settings
) -> None:
    source = catalog_session.scalars(select(Source).where(Source.name == "1-demo")).one()
    source.owner, source.visibility = "ada", "private"
    catalog_session.commit()
    told = client.post("/api/train", json=SPEC | {"set_name": "demo"}).json()["faults"]
    assert told == [{"field": "set_name", "text": "tiny/1-demo is ada's already. Choose another, or ask them."}]
    assert n_jobs(catalog_session) == 0
    source.owner = settings.owner_name
    catalog_session.commit()
    answer = client.post("/api/train/estimate", json=SPEC | {"set_name": "demo"})
    assert "1-demo is in the catalog already: the end of this training replaces it." in answer.json()["notes"]


def test_a_dataset_of_the_hub_is_estimated_before_it_is_here_and_found_when_it_is(
    client: TestClient, catalog_session: Session
) -> None:
    asked = SPEC | {"corpus": "hf:some/texts:en", "held_out": 0.2}
    told = client.post("/api/train/estimate", json=asked).json()
    assert (told["availableTokens"], told["counted"]) == (3125, False)
    assert told["notes"][0] == (
        "some/texts is streamed from the hub first, 12,500 characters into a corpus some-texts-en-1M."
    )
    corpus = catalog_session.scalars(select(Corpus)).one()
    corpus.origin = {"hf_dataset": "some/texts", "config": "en", "split": "train", "max_chars": 12_000}
    catalog_session.commit()
    assert "streamed" in client.post("/api/train/estimate", json=asked).json()["notes"][0], "it has too little"
    corpus.origin = {**corpus.origin, "max_chars": 20_000}
    catalog_session.commit()
    told = client.post("/api/train/estimate", json=asked).json()
    assert (told["availableTokens"], told["counted"]) == (37, True)
    assert told["notes"][0] == "hf:some/texts:en is here as made."
    other = client.post("/api/train/estimate", json=asked | {"corpus": "hf:some/texts"}).json()
    assert "streamed" in other["notes"][0], "another configuration"


def test_a_corpus_of_another_tokenizer_s_tokens_is_refused(client: TestClient, catalog_session: Session) -> None:
    catalog_session.add(Corpus(name="foreign", hash="ff", n_documents=1, n_chars=9, about=""))
    catalog_session.commit()
    told = client.post("/api/train", json=SPEC | {"corpus": "foreign"}).json()["faults"]
    assert told[0]["field"] == "corpus"
    assert "foreign came as tokens of another tokenizer" in told[0]["text"]


def test_the_largest_training_is_estimated_in_no_time(client: TestClient, catalog_session: Session) -> None:
    corpus = catalog_session.scalars(select(Corpus)).one()
    settings: Settings = client.app.state.settings  # type: ignore[attr-defined]
    (settings.corpus_dir(corpus.hash) / "documents.jsonl.zst").touch()
    corpus.hash, corpus.n_chars = "huge", 10**15
    settings.corpus_dir("c0").rename(settings.corpus_dir("huge"))
    (settings.corpus_dir("huge") / "tokens-tok").rename(settings.corpus_dir("huge") / "tokens-other")
    catalog_session.commit()
    huge = SPEC | {"n_tokens": 10**11, "epochs": 100, "cache": "buffer", "seed": list(range(64))}
    began = time.monotonic()
    answer = client.post("/api/train/estimate", json=huge)
    assert answer.status_code == 200, answer.text
    assert answer.json()["steps"] == pytest.approx(100 * 10**11 / 8, rel=1e-3)
    assert time.monotonic() - began < 20, "it made every part of the plan"


def test_the_command_line_says_what_the_api_says(client: TestClient, settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    environment = {"SAE_ATLAS_DATA_DIR": str(settings.data_dir), "COLUMNS": "200"}

    def says(spec: dict[str, Any], *more: str) -> tuple[str, str]:
        file.write_text(yaml.safe_dump(spec))
        found = CliRunner().invoke(cli.app, ["train", str(file), *more], env=environment)
        return found.output, str(found.exception or "")

    _, refused = says(SPEC | {"context_size": 65})
    assert refused == client.post("/api/train", json=SPEC | {"context_size": 65}).json()["error"]
    estimated, _ = says(SPEC, "--estimate")
    assert "30 tokens" not in estimated
    assert "32 tokens in 4 steps, 15 of them distinct, of 37 in the corpus." in estimated.replace("\n", " ")
    assert "SAEs: 1-mine" in estimated
    assert client.get("/api/jobs").json()["jobs"] == []
    queued, _ = says(SPEC)
    assert "Job 1 queued: Train tiny/1-mine" in queued
    assert "No trainer runs" in queued
    read = CliRunner().invoke(cli.app, ["train", "-"], input=yaml.safe_dump(SPEC), env=environment)
    assert "Job 2 queued" in read.output
