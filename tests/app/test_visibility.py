"""Who sees what, on the real application with SQLite and Postgres: private is 404 everywhere, a link opens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import pytest
from fastapi import FastAPI
from sqlalchemy import Engine, select, union_all, update
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from app import jobs, people, steering_vectors, steerings, uploads, visibility
from app.errors import Conflict
from app.main import create_app
from app.people import Actor, Role
from app.settings import Settings
from app.tables import Explanation, Feature, Harvest, Job, Source, SteeringRun, SteeringVector
from app.visibility import Reader, Visibility
from tests import conftest
from tests.app.test_team_mode import routes_of
from tests.app.test_upload import JSON, sae, send

PUBLIC = "http://localhost:3000"
ADA, BOB = Actor("ada", Role.EDITOR, 1), Actor("bob", Role.EDITOR, 2)


@dataclass
class Lab:
    """Ada's private SAE, and what was made with it; Bob is an editor too."""

    app: FastAPI
    settings: Settings
    keys: dict[str, str]
    ids: dict[str, Any]

    def as_(self, name: str = "") -> TestClient:
        client = TestClient(self.app, base_url=PUBLIC, raise_server_exceptions=False, follow_redirects=False)
        if name:
            client.headers["x-api-key"] = self.keys[name]
        return client

    def share(self, seen_by: str, kind: str = "sae") -> str:
        """Have Ada say who sees it; return the path of its public link."""
        done = self.as_("ada").post(f"/share/{kind}/{self.ids[kind]}", data={"visibility": seen_by})
        assert done.status_code == 303, done.text
        with self.app.state.sessions() as session:
            return f"/shared/{visibility.find(session, kind, str(self.ids[kind])).link}"


@pytest.fixture
def lab(engine: Engine, settings: Settings) -> Iterator[Lab]:
    url = engine.url.render_as_string(hide_password=False)
    chosen = settings.model_copy(update={"team": True, "public_url": PUBLIC, "database_url": url})
    app = create_app(chosen)
    with TestClient(app, base_url=PUBLIC):
        with app.state.sessions.begin() as session:
            conftest.fill(session, chosen)
            keys: dict[str, str] = {}
            for name, role in (("ada", Role.EDITOR), ("bob", Role.EDITOR), ("root", Role.ADMIN)):
                person = people.add(session, name, "four random words here", role)
                keys[name] = people.add_token(session, person, "test", role, None)
            ids = _zebra(session, chosen)
        yield Lab(app, chosen, keys, ids)


def _zebra(session: Session, settings: Settings) -> dict[str, Any]:
    """Make the SAE with evidence Ada's own, under a name and with labels that nothing else holds."""
    source = session.scalars(select(Source).where(Source.name == "1-demo")).one()
    source.name, source.set_name, source.owner, source.visibility = "1-zebra", "zebra", "ada", Visibility.PRIVATE
    session.execute(update(Feature).where(Feature.source_id == source.id).values(label="quagga"))
    session.execute(update(Explanation).where(Explanation.source_id == source.id).values(text="quagga"))
    session.flush()
    visibility.read_as(session, Reader("ada"))
    visibility.make_for(session, "ada")
    mine = settings.model_copy(update={"owner": "ada"})
    spec = {"model": "tiny", "sources": ["1-zebra"]}
    job = jobs.submit(session, mine, "harvest", "Harvest tiny/1-zebra from made", spec)
    asked = {"features": [{"layer": "1-zebra", "index": "3", "strength": 4.0}], "prompt": "quagga"}
    run = steerings.save(session, "tiny", asked, {"STEERED": "quagga", "DEFAULT": "x"})
    vector = steering_vectors.add(session, "tiny", "blocks.1.hook_resid_post", "quagga", [1.0, 2.0, 3.0], 5.0, "made")
    vector.visibility = Visibility.PRIVATE
    harvest = session.scalars(select(Harvest.id).where(Harvest.source_id == source.id)).one()
    session.flush()
    visibility.read_as(session, None)
    return {"sae": source.id, "job": job.id, "run": run.id, "vector": vector.id, "harvest": harvest}


def _filled(path: str, ids: dict[str, Any]) -> str:
    values = {
        **{"model": "tiny", "source": "1-zebra", "index": "3", "context": "0", "run_id": ids["run"]},
        **{"job_id": ids["job"], "number": ids["harvest"], "kind": "json", "form": "neuronpedia", "key": ids["sae"]},
    }
    if path.startswith("/vectors"):
        values["number"] = ids["vector"]
    return re.sub(r"\{(\w+)(?::\w+)?\}", lambda found: str(values.get(found[1], "unknown")), path)


_ASKED_OF = {
    "/compare": "a=tiny/1-zebra&b=tiny/1-other",
    "/compare/features": "f=tiny/1-zebra/3&f=tiny/1-other/3",
    "/lists/add": "feature=tiny/1-other/3",
    "/quick-list/": 'name=x&features=[{"modelId":"tiny","layer":"1-zebra","index":"3"}]',
    "/search": "q=quag",
    "/palette": "q=quag",
    "/{model}/steer/features": "q=quag",
    "/{model}/harvest": "sources=1-other",
}
"""Parameters that lead to it where the address does not name it."""


def test_a_private_sae_of_somebody_else_is_404_on_every_route_that_names_it_and_shows_on_none(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    named, elsewhere, opened = 0, 0, 0
    for route in routes_of(lab.app):
        if "GET" not in (route.methods or ()) or route.path in ("/readyz", "/metrics", "/events"):
            continue
        path = _filled(route.path, lab.ids)
        asked = path + (f"?{_ASKED_OF[route.path]}" if route.path in _ASKED_OF else "")
        answer = bob.get(asked)
        assert answer.status_code < 500, f"{asked}: {answer.status_code}"
        assert "quagga" not in answer.text, asked
        hidden = {"{source}", "{run_id}", "{job_id}", "{number}", "{kind}/{key}"}
        if any(part in route.path_format for part in hidden) and "unknown" not in path:
            named += 1
            assert answer.status_code == 404, f"{asked}: {answer.status_code}"
            opened += ada.get(asked).status_code < 400
        elif route.path not in ("/compare", "/compare/features", "/quick-list/"):  # they say what was asked of them
            elsewhere += 1
            assert "zebra" not in answer.text, asked
    assert named > 30
    assert elsewhere > 30
    assert opened > 20, "its owner opens what others cannot, or this test asks for nothing"


def test_quick_lists_and_compare_say_of_a_private_sae_what_they_say_of_none(lab: Lab) -> None:
    bob = lab.as_("bob")
    for path, asked in _ASKED_OF.items():
        if "zebra" in asked:
            missing = bob.get(f"{path}?{asked.replace('zebra', 'zobra')}")
            hidden = bob.get(f"{path}?{asked}")
            assert hidden.status_code == missing.status_code
            assert hidden.text.replace("zebra", "zobra") == missing.text, path


_KEY = {"modelId": "tiny", "source": "1-zebra", "layer": "1-zebra", "index": "3"}


_BODIES: tuple[tuple[str, Any], ...] = (
    ("/api/features", [_KEY]),
    ("/api/features-offset", {"modelId": "tiny", "layer": "1-zebra", "offset": 0}),
    ("/api/activation/get", _KEY),
    ("/api/activation/new", {"feature": _KEY, "customText": "a"}),
    ("/api/activation/source", {"modelId": "tiny", "source": "1-zebra", "customText": ["a"]}),
    ("/api/search-all", {"modelId": "tiny", "sourceSet": "zebra", "selectedLayers": ["1-zebra"], "text": "a"}),
    ("/api/search-topk-by-token", {"modelId": "tiny", "source": "1-zebra", "text": "a"}),
    ("/api/vector/get", _KEY),
    ("/api/steer", {"modelId": "tiny", "prompt": "a", "features": [{**_KEY, "strength": 1}], "n_tokens": 1}),
    ("/api/steer/stream", {"modelId": "tiny", "prompt": "a", "features": [{**_KEY, "strength": 1}], "n_tokens": 1}),
    ("/api/list/new-with-features", {"name": "x", "features": [_KEY]}),
)

_READ = {"/api/features", "/api/features-offset", "/api/activation/get", "/api/list/new-with-features"}


def test_the_api_and_the_worker_are_asked_for_no_private_sae(lab: Lab) -> None:
    for path, body in _BODIES:
        answer = lab.as_("bob").post(path, json=body)
        missing = lab.as_("bob").post(path, json=orjson.loads(orjson.dumps(body).replace(b"zebra", b"zobra")))
        assert 400 <= answer.status_code < 500, f"{path}: {answer.text}"
        assert answer.text.replace("zebra", "zobra") == missing.text, path
        if path in _READ:  # the others would wait for a worker
            assert lab.as_("ada").post(path, json=body).text != answer.text, path


def test_searches_models_and_jobs_over_the_api_do_not_know_it(lab: Lab) -> None:
    bob = lab.as_("bob")
    for path, body in (
        ("/api/explanation/search-all", {"query": "quagga"}),
        ("/api/explanation/search-model", {"modelId": "tiny", "query": "quagga"}),
        ("/api/explanation/search", {"modelId": "tiny", "layers": [], "query": "quagga"}),
        ("/api/model/list", {}),
        ("/api/vector/list-owned", {}),
    ):
        assert "quagga" in lab.as_("ada").post(path, json=body).text.lower() or "model/list" in path
        said = bob.post(path, json=body).text
        assert '"text":"quagga"' not in said, path
        assert "1-zebra" not in said, path
        assert "vectorLabel" not in said, path
    assert bob.get("/api/jobs").json()["jobs"] == []
    assert len(lab.as_("ada").get("/api/jobs").json()["jobs"]) == 1


def test_writes_to_what_is_hidden_are_404_and_to_what_is_anothers_403(lab: Lab) -> None:
    bob, ids = lab.as_("bob"), lab.ids
    writes = ["/tiny/1-zebra/remove", f"/jobs/{ids['job']}/cancel", f"/api/jobs/{ids['job']}/cancel"]
    writes += [f"/harvests/{ids['harvest']}/remove", f"/vectors/{ids['vector']}/delete", f"/share/sae/{ids['sae']}"]
    for path in writes:
        assert bob.post(path, data={"visibility": "team"}).status_code == 404, path
    for kind in ("sae", "job", "vector", "run"):
        lab.share("team", kind)
    for path in writes:
        assert bob.post(path, data={"visibility": "private"}).status_code == 403, path
    assert bob.get("/tiny/1-zebra").status_code == 200
    assert "/remove" not in bob.get("/tiny/1-zebra").text
    assert lab.as_("root").post(f"/share/sae/{ids['sae']}", data={"visibility": "private"}).status_code == 303
    assert bob.get("/tiny/1-zebra").status_code == 404


def test_a_public_link_shows_an_sae_to_strangers_until_it_is_withdrawn(lab: Lab) -> None:
    stranger = lab.as_()
    assert stranger.get("/tiny/1-zebra").status_code == 303
    link = lab.share("link")
    answer = stranger.get(link)
    assert (answer.status_code, answer.headers["location"]) == (303, "/tiny/1-zebra")
    for path in ("/tiny/1-zebra", "/tiny/1-zebra/3", "/tiny/1-zebra/features.json", "/api/feature/tiny/1-zebra/3"):
        assert "quagga" in stranger.get(path).text, path
    assert stranger.get("/tiny/1-zebra/3/embed").status_code == 303, "what makes or computes something takes an account"
    assert stranger.get("/tiny/2-plain").status_code == 404
    assert "2-plain" not in stranger.get("/tiny/1-zebra/3").text
    assert stranger.get("/").status_code == 303
    assert lab.as_().get(f"/api/feature/tiny/1-zebra/3?link={link.removeprefix('/shared/')}").status_code == 200
    lab.share("team")
    assert stranger.get("/tiny/1-zebra").status_code == 404
    assert lab.as_().get(link).status_code == 404
    assert lab.share("link") != link


def test_jobs_runs_and_vectors_are_shown_by_link_too(lab: Lab) -> None:
    for kind in ("job", "run", "vector"):
        stranger = lab.as_()
        answer = stranger.get(lab.share("link", kind))
        page = stranger.get(answer.headers["location"])
        assert page.status_code == 200, page.text
        assert "You look at this by a public link" in page.text
        assert stranger.get("/jobs").status_code == 303


def test_a_made_up_link_leads_nowhere(lab: Lab) -> None:
    for secret in ("x", "a" * 24, "a" * 5000, "%00" * 24, "é" * 24):
        assert lab.as_().get(f"/shared/{secret}").status_code == 404
        assert lab.as_().get("/tiny/1-zebra", params={"link": secret}).status_code in (303, 404)


def test_what_is_made_of_something_private_is_private(lab: Lab) -> None:
    with lab.app.state.sessions() as session:
        assert session.get_one(Job, lab.ids["job"]).visibility == Visibility.PRIVATE
        assert session.get_one(SteeringRun, lab.ids["run"]).visibility == Visibility.PRIVATE
        assert session.get_one(SteeringVector, lab.ids["vector"]).owner == "ada"


def test_what_was_made_of_an_sae_becomes_private_with_it(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    for kind in ("sae", "job", "run", "vector"):
        lab.share("team", kind)
    with lab.app.state.sessions.begin() as session:
        made = Job(kind="train", title="Train zebra", spec={"model": "tiny"}, workflow_id="", owner="bob")
        made.result = {"url": "/tiny/1-zebra"}
        other = Job(kind="map", title="Map of another", spec={"model": "tiny", "source": "2-plain"}, workflow_id="")
        other.result = {}
        session.add_all([made, other])
    assert bob.get("/jobs").text.count("zebra") > 1
    assert bob.get(f"/tiny/steer/{lab.ids['run']}").status_code == 200
    lab.share("private")
    assert bob.get(f"/jobs/{lab.ids['job']}").status_code == 404
    assert bob.get(f"/tiny/steer/{lab.ids['run']}").status_code == 404
    with lab.app.state.sessions() as session:
        seen = {job.title: job.visibility for job in session.scalars(select(Job))}
    assert (seen["Train zebra"], seen["Map of another"]) == ("private", "team")
    assert ada.get(f"/jobs/{lab.ids['job']}").status_code == 200
    assert "Train zebra" in bob.get("/jobs").text, "it is his own"


TRAINING = {
    **{"model": "tiny", "corpus": "made", "hook": "hook_resid_post", "layer": "1", "set_name": "okapi", "k": "4"},
    **{"d_sae": "32", "context_size": "16", "batch_size": "8", "n_tokens": "2,000"},
}


def _train_form(page: str) -> str:
    return page[page.index('class="train"') : page.index("</form>", page.index('class="train"'))]


def test_a_training_is_private_from_the_start_where_its_form_says_so(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    form = _train_form(ada.get("/train", params=TRAINING | {"visibility": "private"}).text)
    assert '<option value="private" selected>only you' in form
    assert '<option value="team" selected>everybody here' in _train_form(ada.get("/train").text)
    path = ada.post("/train", data=TRAINING | {"visibility": "private"}).headers["location"]
    assert bob.get(path).status_code == 404
    assert "okapi" not in bob.get("/jobs").text
    assert "okapi" in ada.get("/jobs").text
    assert '<option value="private" selected>' in _train_form(ada.get("/train", params={"clone": path[6:]}).text)
    shared = ada.post("/train", data=TRAINING).headers["location"]
    assert bob.get(shared).status_code == 200
    refused = ada.post("/train", data=TRAINING | {"visibility": "everybody"})
    assert refused.status_code == 422
    assert "team" in refused.text


def test_what_a_private_training_makes_and_its_harvest_are_private_too(lab: Lab) -> None:
    spec = {n: v for n, v in TRAINING.items() if n not in ("layer", "hook", "n_tokens")}
    spec |= {"hook_name": "blocks.1.hook_resid_post", "n_tokens": "2000", "visibility": "private"}
    answer = lab.as_("ada").post("/api/train", json=spec)
    assert answer.status_code == 201, answer.text
    with lab.app.state.sessions.begin() as session:
        visibility.make_for_job(session, answer.json()["id"])
        assert visibility.maker(session) == ("ada", Visibility.PRIVATE)


def test_a_training_in_place_of_a_private_sae_is_as_private(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    path = ada.post("/train", data=TRAINING | {"set_name": "zebra"}).headers["location"]
    assert bob.get(path).status_code == 404
    lab.share("team")
    told = ada.get("/train/outlook", params=TRAINING | {"set_name": "zebra", "visibility": "private"}).text
    assert "seen by others already" in told


def test_an_upload_is_private_from_the_start_and_its_check_too(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    assert 'name="visibility"' in ada.get("/upload").text
    refused = send(ada, sae(), JSON, set_name="okapi", visibility="link")
    assert (refused.status_code, "team or private" in refused.text) == (422, True)
    path = send(ada, sae(), JSON, set_name="okapi", visibility="private").json()["url"]
    assert (ada.get(path).status_code, bob.get(path).status_code) == (200, 404)
    assert "okapi" in ada.get("/jobs").text
    assert "okapi" not in bob.get("/jobs").text


def test_a_name_that_is_taken_unseen_is_refused_and_nothing_is_overwritten(lab: Lab) -> None:
    with lab.app.state.sessions() as session:
        taken = session.get_one(Source, lab.ids["sae"])
        visibility.make_for(session, "bob")
        with pytest.raises(Conflict, match="1-zebra is ada's already"):
            visibility.claim(session, taken)


def test_a_union_that_is_not_narrowed_is_refused(lab: Lab) -> None:
    with lab.app.state.sessions() as session:
        visibility.read_as(session, Reader("bob"))
        with pytest.raises(RuntimeError, match="must be narrowed"):
            session.execute(union_all(select(Source.id), select(Job.id)))


def test_places_in_the_queue_count_hidden_jobs(lab: Lab) -> None:
    with lab.app.state.sessions() as session:
        visibility.read_as(session, Reader("bob"))
        assert list(jobs.in_order(session, lab.settings)) == [lab.ids["job"]]


def test_a_server_without_accounts_shows_nothing_of_owners(client: TestClient) -> None:
    page = client.get("/tiny/1-demo").text
    assert "Seen by" not in page
    assert client.get("/vectors").status_code == 200


def test_a_corpus_that_only_a_hidden_sae_needs_stays(lab: Lab) -> None:
    refused = lab.as_("bob").post("/corpora/made/remove")
    assert refused.status_code == 409
    assert "shown by 1 in the trash or not shown to you" in refused.text


def test_uploads_that_a_hidden_job_waits_for_stay(lab: Lab) -> None:
    path = uploads.fresh(lab.settings, "x")
    path.write_text("x")
    with lab.app.state.sessions.begin() as session:
        session.get_one(Job, lab.ids["job"]).kind = "import"
        session.get_one(Job, lab.ids["job"]).spec = {"path": str(path)}
        session.flush()
        visibility.read_as(session, Reader("bob"))
        uploads.sweep(session, lab.settings, older_than=-1)
    assert path.exists()


def test_a_private_list_is_404_for_others_on_every_route_and_shows_on_none(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    asked = {"name": "okapi", "visibility": "private", "features": [{**_KEY, "source": "2-plain", "layer": "2-plain"}]}
    key = ada.post("/api/list/new-with-features", json=asked).json()["id"]
    named = 0
    for route in routes_of(lab.app):
        method = "POST" if "POST" in (route.methods or ()) else "GET"
        if "{list_id}" in route.path:
            named += 1
            answer = bob.request(method, route.path.replace("{list_id}", key), data={"feature": "tiny/2-plain/3"})
            assert answer.status_code == 404, route.path
        elif method == "GET" and route.path not in ("/readyz", "/metrics", "/events"):
            assert "okapi" not in bob.get(_filled(route.path, lab.ids)).text, route.path
    for action in ("get", "add-features", "edit-feature", "remove", "delete"):
        body = {"listId": key, "modelId": "tiny", "layer": "2-plain", "index": "3", "featuresToAdd": []}
        assert bob.post(f"/api/list/{action}", json=body).status_code == 404, action
    assert named > 4
    assert "okapi" in ada.get(f"/lists/{key}").text
    assert "okapi" in lab.as_("root").get(f"/lists/{key}").text


def test_all_five_are_shared_over_the_api_by_their_owner_alone(lab: Lab) -> None:
    ada, bob = lab.as_("ada"), lab.as_("bob")
    made = ada.post("/api/list/new", json={"name": "okapi", "visibility": "private"}).json()["id"]
    asked: dict[str, dict[str, Any]] = {kind: {"kind": kind, "id": lab.ids[kind]} for kind in ("job", "run", "vector")}
    asked["sae"] = {"kind": "sae", "modelId": "tiny", "source": "1-zebra"}
    asked["list"] = {"kind": "list", "id": made}
    for kind, body in asked.items():
        assert ada.post("/api/share", json=body).json()["visibility"] == "private", kind
        for seen_by in (None, "team", "link"):
            assert bob.post("/api/share", json={**body, "visibility": seen_by}).status_code == 404, kind
        shared = ada.post("/api/share", json={**body, "visibility": "link"}).json()
        assert (shared["visibility"], shared["owner"]) == ("link", "ada"), kind
        stranger = lab.as_()
        opened = stranger.get(shared["url"])
        while opened.status_code == 303:
            opened = stranger.get(opened.headers["location"])
        assert opened.status_code == 200, kind
        assert "Sign in" in opened.text, kind
        assert ada.post("/api/share", json={**body, "visibility": "team"}).json()["url"] == "", kind
        assert bob.post("/api/share", json={**body, "visibility": "private"}).status_code == 403, kind
        again = lab.as_().get(shared["url"])
        assert again.status_code in (303, 404), kind
        assert "/login" in again.headers.get("location", "/login"), kind
    assert ada.post("/api/share", json={"kind": "sae", "id": "x" * 5000}).status_code == 404
    assert ada.post("/api/share", json={"kind": "person", "id": "1"}).status_code == 422
