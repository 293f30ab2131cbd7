"""The numbers of the running demo: against transformers, against sae-lens, and evidence against live activations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from sae_lens import SAE
from sqlalchemy.orm import Session
from transformers import AutoModelForCausalLM, AutoTokenizer

from app import catalog, db, evidence
from app.corpora import Stream, tokens_dir
from app.settings import Settings
from app.tables import Corpus, Evidence, Harvest, Source
from tests.browser.conftest import Demo
from workers.language_model import LanguageModel

README = Path(__file__).resolve().parent.parent.parent / "README.md"
TEXT = "On Monday morning the committee met in Paris. for i in range(10): print(i)\nThe Lord said unto Moses,"


@pytest.fixture(scope="module")
def settings(demo_server: Demo) -> Settings:
    return Settings(data_dir=demo_server.data_dir)


@pytest.fixture(scope="module")
def model(demo_server: Demo, settings: Settings) -> LanguageModel:
    return LanguageModel.load(settings.model_dir(demo_server.model))


@pytest.fixture
def api(demo_server: Demo) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_server.url, timeout=120) as client:
        yield client


def test_logits_equal_those_of_transformers(demo_server: Demo, settings: Settings, model: LanguageModel) -> None:
    directory = settings.model_dir(demo_server.model)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(directory)(TEXT).input_ids])
    with torch.no_grad():
        torch.testing.assert_close(model.hf(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.to_ids(TEXT)[0] == model.card.bos_token_id == 0


def test_live_activations_equal_sae_lens_on_the_activations_of_transformers(
    demo_server: Demo, settings: Settings, api: httpx.Client
) -> None:
    directory = settings.model_dir(demo_server.model)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([[0, *AutoTokenizer.from_pretrained(directory)(TEXT, add_special_tokens=False).input_ids]])
    with db.sessions(db.connect(settings))() as session:
        sae = SAE.load_from_disk(catalog.sae_ref(settings, _source(session, demo_server)).path)
    with torch.no_grad():
        acts = sae.encode(theirs(ids, output_hidden_states=True).hidden_states[13])[0].float().numpy()
    asked = {"modelId": demo_server.model, "source": demo_server.source, "text": TEXT, "numResults": 32}
    for token in api.post("/api/search-topk-by-token", json=asked).json()["results"]:
        for found in token["topFeatures"]:
            expected = acts[token["position"], int(found["featureIndex"])]
            assert found["activationValue"] == pytest.approx(float(expected), abs=2e-3 * max(1.0, float(expected)))


def test_stored_evidence_equals_what_is_computed_now(
    demo_server: Demo, settings: Settings, model: LanguageModel
) -> None:
    engine = db.connect(settings)
    rng = np.random.default_rng(0)
    with db.sessions(engine)() as session:
        source = _source(session, demo_server)
        harvest = session.get_one(Harvest, session.get_one(Source, source.id).harvest_id)
        corpus = session.get_one(Corpus, harvest.corpus_id)
        stream = Stream.open(tokens_dir(settings, corpus.hash, harvest.tokenizer_hash))
        latents = rng.choice(source.d_sae, 12, replace=False).tolist()
        blobs = {latent: session.get_one(Evidence, (harvest.id, latent)).blob for latent in latents}
        sae = SAE.load_from_disk(catalog.sae_ref(settings, source).path)
    for latent, blob in blobs.items():
        for example in evidence.unpack(blob).top[:3]:
            ids = torch.tensor([stream.context(example.context, harvest.context_size, harvest.bos_token_id)])
            x = model.read(ids, [source.hook_name])[source.hook_name]
            now = sae.encode(x)[0, :, latent].detach().float().numpy()
            dense = np.zeros(len(now))
            dense[example.positions] = example.values
            np.testing.assert_allclose(dense[1:], now[1:], rtol=2e-3, atol=5e-2)
    engine.dispose()


def test_steering_changes_the_text_and_strength_zero_does_not(demo_server: Demo, api: httpx.Client) -> None:
    feature = {"modelId": demo_server.model, "layer": demo_server.source, "index": "0"}
    asked = {"prompt": "The sea", "modelId": demo_server.model, "temperature": 0, "n_tokens": 12, "freq_penalty": 0}
    asked |= {"seed": 1, "strength_multiplier": 1}
    same = api.post("/api/steer", json=asked | {"features": [feature | {"strength": 0}]}).json()
    other = api.post("/api/steer", json=asked | {"features": [feature | {"strength": 200}]}).json()
    assert same["STEERED"] == same["DEFAULT"] == other["DEFAULT"]
    assert other["STEERED"] != other["DEFAULT"]


def _source(session: Session, demo: Demo) -> catalog.SourceCard:
    return catalog.source_card(session, demo.model, demo.source)


def test_the_readme_example_of_the_official_client_runs_to_the_letter(demo_server: Demo, tmp_path: Path) -> None:
    code = README.read_text().split("python - <<'PY'\n")[1].split("\nPY\n")[0]
    # The client knows one port only; everything else is the README's.
    there = f"from neuronpedia.requests import base_request as b; b.NPRequest.BASE_URL = '{demo_server.url}/api'"
    patched = f"{there}\n{code}"
    environment = os.environ | {"USE_LOCALHOST": "true", "NEURONPEDIA_API_KEY": "anything"}
    command = [sys.executable, "-c", patched]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fires on" in done.stdout


def test_a_feature_named_in_the_readme_shows_what_was_written_about_it(demo_server: Demo, api: httpx.Client) -> None:
    html = api.get(f"/{demo_server.model}/{demo_server.source}/24").text
    assert "burial: graves, being buried, the dead laid to rest" in html
    found = api.get(f"/api/feature/{demo_server.model}/{demo_server.source}/24").json()
    assert {e["typeName"] for e in found["explanations"]} == {"heuristic", "manual"}
