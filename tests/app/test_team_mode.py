"""Accounts, roles and keys of team mode on the real application, on SQLite and Postgres (hazards 26-29)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from sqlalchemy import Engine, event, select
from starlette.testclient import TestClient

from app import audit, credentials, people, supervisor
from app.errors import BadInput
from app.main import create_app
from app.people import Role
from app.settings import Settings
from app.tables import ApiToken, Invitation, Job, Login, Person, now
from app.web.access import Rates, declared, local_path
from app.web.account import browser_name
from tests import conftest

PASSWORD = "four random words here"
PUBLIC = "http://localhost:3000"


@pytest.fixture
def team(engine: Engine, settings: Settings) -> Iterator[Team]:
    url = engine.url.render_as_string(hide_password=False)
    chosen = settings.model_copy(update={"team": True, "public_url": PUBLIC, "database_url": url})
    app = create_app(chosen)
    with TestClient(app, base_url=PUBLIC, raise_server_exceptions=False) as opened:
        with app.state.sessions.begin() as session:
            conftest.fill(session, chosen)
            for role in Role:
                people.add(session, f"a-{role}", PASSWORD, role)
        yield Team(app, opened)


class Team:
    def __init__(self, app: FastAPI, client: TestClient) -> None:
        self.app, self.client = app, client
        self.sessions = app.state.sessions

    def browser(self, name: str = "", password: str = PASSWORD) -> TestClient:
        """Return a browser of its own, signed in when a name is given."""
        opened = TestClient(self.app, base_url=PUBLIC, raise_server_exceptions=False, follow_redirects=False)
        if name:
            answer = opened.post("/login", data={"name": name, "password": password})
            assert answer.status_code == 303, answer.text
        return opened


def routes_of(owner: Any) -> Iterator[APIRoute]:
    """Walk all routes, also of routers within routers."""
    for route in owner.routes:
        if isinstance(route, APIRoute):
            yield route
        elif hasattr(route, "original_router"):
            yield from routes_of(route.original_router)


def test_every_route_declares_the_role_it_needs() -> None:
    routes = list(routes_of(create_app(Settings())))
    undeclared = [f"{r.methods} {r.path}" for r in routes if len(declared(list(r.dependencies))) != 1]
    assert len(routes) > 90
    assert undeclared == []


def test_what_changes_something_is_not_open_to_viewers_unless_listed_here() -> None:
    """A new write that anybody or any viewer may do is added here on purpose, or not at all."""
    writes = [r for r in routes_of(create_app(Settings())) if r.methods - {"GET", "HEAD"}]
    roles = {r.path: declared(list(r.dependencies))[0] for r in writes}
    assert {path for path, role in roles.items() if role is None} == {
        *("/login", "/invite/{secret}", "/test", "/{rest:path}"),
    }
    assert {path for path, role in roles.items() if role == Role.VIEWER} == {
        "/account/logins/{login_id}/end",
        "/account/password",
        "/account/tokens",
        "/account/tokens/{token_id}/revoke",
        "/activation/get",
        "/activation/new",
        "/activation/source",
        "/bookmark/add",
        "/bookmark/delete",
        "/bookmark/list",
        "/bookmarks",
        "/attribution/ablate",
        "/attribution/direct",
        "/attribution/faithfulness",
        "/attribution/gradient",
        "/attribution/predict",
        "/cossim",
        "/explanation/search",
        "/explanation/search-all",
        "/explanation/search-model",
        "/explanation/search-release",
        "/features",
        "/features-offset",
        "/list/get",
        "/list/list",
        "/logout",
        "/mentions/read",
        "/model/get",
        "/model/list",
        "/search-all",
        "/search-all/",
        "/search-topk-by-token",
        "/search-topk-by-token/",
        "/steer",
        "/steer-chat",
        "/steer-chat/",
        "/steer-load",
        "/steer-load/",
        "/steer/",
        "/steer/next",
        "/steer/score",
        "/steer/stream",
        "/tokenize",
        "/train/estimate",
        "/train/yaml",
        "/vector/get",
        "/vector/list-owned",
        "/{model}/loading",
        "/{model}/prompt",
        "/{model}/prompt/save",
        "/{model}/steer",
        "/{model}/{source}/star",
        "/{model}/{source}/{index}/try",
    }


@pytest.mark.parametrize("path", ["/", "/tiny", "/tiny/1-demo/3?width=16", "/jobs", "/search?q=cold", "/docs"])
def test_a_page_sends_a_stranger_to_sign_in_and_back(team: Team, path: str) -> None:
    answer = team.browser().get(path)
    assert answer.status_code == 303
    back = team.browser()
    login = back.get(answer.headers["location"])
    wanted = re.search(r'name="next" value="([^"]*)"', login.text)
    assert wanted is not None
    assert wanted[1].replace("&amp;", "&") == path


def test_the_api_answers_a_stranger_401_in_json(team: Team) -> None:
    answer = team.browser().get("/api/feature/tiny/1-demo/3")
    assert answer.status_code == 401
    assert answer.json()["error"] == answer.json()["message"]


def test_a_fragment_is_not_replaced_by_the_login_page(team: Team) -> None:
    answer = team.browser().get("/jobs", headers={"hx-request": "true"})
    assert (answer.status_code, answer.headers["hx-redirect"]) == (401, "/login?next=%2Fjobs")


def test_a_viewer_reads_and_may_not_write(team: Team) -> None:
    viewer = team.browser("a-viewer")
    assert viewer.get("/tiny/1-demo/3").status_code == 200
    refused = viewer.post("/tiny/1-demo/remove")
    assert refused.status_code == 403
    assert "You are a viewer here; this takes an editor" in refused.text
    assert team.browser("a-editor").get("/people").status_code == 403
    assert team.browser("a-admin").get("/people").status_code == 200


@pytest.mark.parametrize("role", Role)
def test_a_feature_page_costs_somebody_signed_in_one_query_more(team: Team, role: Role) -> None:
    """Two as without accounts, and the login, which may be revoked at any moment."""
    browser = team.browser(f"a-{role}")
    queries: list[str] = []
    event.listen(team.app.state.engine, "before_cursor_execute", lambda *a: queries.append(a[2]))
    for _ in range(2):
        queries.clear()
        assert browser.get("/tiny/1-demo/4").status_code == 200
    assert len(queries) == 3


def test_signing_out_ends_the_login_at_once(team: Team) -> None:
    browser = team.browser("a-viewer")
    cookie = dict(browser.cookies)
    assert browser.post("/logout").headers["location"] == "/login"
    thief = team.browser()
    thief.cookies.update(cookie)
    assert thief.get("/").status_code == 303


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(team: Team) -> None:
    answer = team.browser().post("/login", data={"name": "a-viewer", "password": PASSWORD})
    flags = answer.headers["set-cookie"].lower()
    assert "httponly" in flags
    assert "samesite=lax" in flags


def test_over_https_the_cookie_is_secure_and_bound_to_the_host(settings: Settings) -> None:
    chosen = settings.model_copy(update={"team": True, "public_url": "https://atlas.example.org"})
    app = create_app(chosen)
    from app import db

    engine = db.connect(chosen)
    db.migrate(engine)
    with TestClient(app, base_url="https://atlas.example.org", follow_redirects=False) as client:
        with app.state.sessions.begin() as session:
            people.add(session, "ada", PASSWORD, Role.ADMIN)
        answer = client.post("/login", data={"name": "Ada ", "password": PASSWORD})
        assert answer.headers["set-cookie"].startswith("__Host-atlas_login=")
        assert "secure" in answer.headers["set-cookie"].lower()
        assert "max-age" in answer.headers["strict-transport-security"]
        assert client.get("/", headers={"host": "evil.com"}).status_code == 400


def test_a_wrong_password_and_an_unknown_name_look_alike(team: Team) -> None:
    wrong = team.browser().post("/login", data={"name": "a-viewer", "password": "not this one"})
    unknown = team.browser().post("/login", data={"name": "nobody", "password": "not this one"})
    assert (wrong.status_code, unknown.status_code) == (401, 401)
    assert "Name or password is wrong." in wrong.text
    assert "Name or password is wrong." in unknown.text


def test_twenty_wrong_passwords_are_stopped_and_the_person_comes_in_from_elsewhere(team: Team) -> None:
    statuses = [
        team.browser().post("/login", data={"name": "a-viewer", "password": f"guess {i}"}).status_code
        for i in range(20)
    ]
    assert statuses == [401] * 10 + [429] * 10
    right = team.browser().post("/login", data={"name": "a-viewer", "password": PASSWORD})
    assert right.status_code == 429
    assert int(right.headers["retry-after"]) > 0
    with team.sessions.begin() as session:
        assert people.check_password(session, "a-viewer", PASSWORD, "192.0.2.7").name == "a-viewer"


def test_an_invitation_makes_one_account_and_signs_it_in(team: Team) -> None:
    page = team.browser("a-admin").post("/people/invite", data={"role": "editor"}).text
    link = re.search(r'value="(http://localhost:3000/invite/[^"]+)"', page)
    assert link is not None
    path = link[1].removeprefix(PUBLIC)
    guest = team.browser()
    assert "account as <strong>editor</strong>" in guest.get(path).text
    assert guest.post(path, data={"name": "Grace", "password": "short"}).status_code == 422
    assert guest.post(path, data={"name": "a-admin", "password": PASSWORD}).status_code == 409
    assert guest.post(path, data={"name": "Grace", "password": PASSWORD}).status_code == 303
    assert "editor" in guest.get("/account").text
    assert team.browser().get(path).status_code == 404


def test_an_old_invitation_is_refused(team: Team) -> None:
    with team.sessions.begin() as session:
        secret = people.invite(session, Role.VIEWER)
        session.scalars(select(Invitation)).one().expires_at = now() - timedelta(seconds=1)
    assert team.browser().get(f"/invite/{secret}").status_code == 404


def test_a_token_acts_for_its_owner_within_its_role_until_it_is_revoked(team: Team) -> None:
    browser = team.browser("a-editor")
    made = browser.post("/account/tokens", data={"name": "notebook", "role": "viewer", "days": "30"})
    secret = re.search(r"atlas_[\w-]{20,}", made.text)
    assert secret is not None
    program = team.browser()
    program.headers["X-API-KEY"] = secret[0]
    assert program.get("/api/feature/tiny/1-demo/3").status_code == 200
    assert program.post("/api/test", json={"apiKey": secret[0]}).status_code == 200
    assert program.post("/tiny/1-demo/remove").status_code == 403
    assert program.post("/account/tokens", data={"name": "another"}).status_code == 403
    assert secret[0] not in browser.get("/account").text
    with team.sessions() as session:
        token = session.scalars(select(ApiToken)).one()
    assert token.used_at is not None
    browser.post(f"/account/tokens/{token.id}/revoke")
    assert program.get("/api/feature/tiny/1-demo/3").status_code == 401
    assert program.post("/api/test", json={"apiKey": secret[0]}).status_code == 401


def test_an_expired_token_is_refused_and_a_token_of_a_demoted_person_does_less(team: Team) -> None:
    with team.sessions.begin() as session:
        person = people.named(session, "a-editor")
        secret = people.add_token(session, person, "old", Role.EDITOR, 1)
        people.set_role(session, person, Role.VIEWER)
    with team.sessions.begin() as session:
        actor = people.of_token(session, secret)
        assert actor is not None
        assert actor.role == Role.VIEWER
        session.scalars(select(ApiToken)).one().expires_at = now() - timedelta(seconds=1)
    with team.sessions() as session:
        assert people.of_token(session, secret) is None


def test_nobody_reaches_logins_or_tokens_of_somebody_else_by_their_number(team: Team) -> None:
    team.browser("a-editor")
    with team.sessions.begin() as session:
        person = people.named(session, "a-editor")
        people.add_token(session, person, "mine", Role.VIEWER, None)
        login = session.scalars(select(Login).where(Login.person_id == person.id)).one()
        token = session.scalars(select(ApiToken)).one()
    other = team.browser("a-viewer")
    assert other.post(f"/account/tokens/{token.id}/revoke").status_code == 404
    other.post(f"/account/logins/{login.id}/end")
    with team.sessions() as session:
        assert session.get(Login, login.id) is not None
        assert session.get(ApiToken, token.id) is not None


def test_a_disabled_person_is_out_at_once_and_the_last_admin_stays(team: Team) -> None:
    viewer, admin = team.browser("a-viewer"), team.browser("a-admin")
    with team.sessions() as session:
        ids = {p.name: p.id for p in session.scalars(select(Person))}
    assert admin.post(f"/people/{ids['a-viewer']}/disable").status_code == 303
    assert viewer.get("/").status_code == 303
    assert team.browser().post("/login", data={"name": "a-viewer", "password": PASSWORD}).status_code == 401
    for change in ("disable", "role"):
        refused = admin.post(f"/people/{ids['a-admin']}/{change}", data={"role": "viewer"})
        assert refused.status_code == 409
        assert "only admin" in refused.text


def test_a_new_password_signs_out_other_browsers(team: Team) -> None:
    here, elsewhere = team.browser("a-viewer"), team.browser("a-viewer")
    wrong = here.post("/account/password", data={"password": "no", "new_password": "another four words"})
    assert "The present password is wrong." in wrong.text
    done = here.post("/account/password", data={"password": PASSWORD, "new_password": "another four words"})
    assert "is changed" in done.text
    assert here.get("/account").status_code == 200
    assert elsewhere.get("/account").status_code == 303
    team.browser("a-viewer", "another four words")


@pytest.mark.parametrize(
    "address",
    ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:alert(1)", "/a\n/b", "evil", ""],
)
def test_after_signing_in_nobody_is_led_elsewhere(address: str) -> None:
    assert local_path(address) == "/"


def test_a_local_address_is_kept() -> None:
    assert local_path("/tiny/1-demo/3?width=16&text=a%20b") == "/tiny/1-demo/3?width=16&text=a%20b"


def test_without_team_mode_nothing_asks_who_you_are(client: TestClient) -> None:
    assert client.get("/", follow_redirects=False).status_code == 200
    assert client.get("/people").status_code == 404
    assert client.get("/account").status_code == 404
    assert client.post("/login", data={"name": "a", "password": "b"}).status_code == 404


def test_passwords_lie_as_argon2id_and_secrets_as_digests(team: Team) -> None:
    team.browser("a-viewer")
    with team.sessions() as session:
        assert all(p.password_hash.startswith("$argon2id$") for p in session.scalars(select(Person)))
        assert all(re.fullmatch("[0-9a-f]{64}", x.secret_hash) for x in session.scalars(select(Login)))


def test_a_hash_with_other_rubbish_fits_nothing() -> None:
    assert not credentials.fits("a", "no hash at all")
    assert not credentials.fits("x" * 100_000, None)
    assert credentials.fits("\ud800 lone surrogate", credentials.hash_password("\ud800 lone surrogate"))


def test_rates_are_bounded_by_person() -> None:
    rates = Rates(per_minute=3, most=2)
    for _ in range(3):
        rates.spend("ada")
    with pytest.raises(Exception, match="More than 3 requests a minute"):
        rates.spend("ada")
    rates.spend("grace")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"host": "0.0.0.0"}, "SAE_ATLAS_TEAM=1"),
        ({"host": "0.0.0.0", "team": True}, "SAE_ATLAS_PUBLIC_URL"),
        ({"host": "0.0.0.0", "team": True, "public_url": "http://atlas.example.org"}, "in the clear"),
        ({"team": True, "public_url": "atlas.example.org"}, "it is 'atlas.example.org'"),
    ],
)
def test_an_address_that_others_reach_needs_team_mode_and_https(given: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        supervisor.check_address(Settings.model_validate({"port": 0, **given}))


def test_a_server_that_nobody_could_sign_in_to_does_not_start(settings: Settings) -> None:
    chosen = settings.model_copy(update={"team": True, "public_url": PUBLIC, "port": 0})
    with pytest.raises(BadInput, match="user invite --role admin"):
        supervisor.serve(chosen, lambda *_: None)


def test_who_changed_what_is_written_down_and_shown_to_admins(team: Team) -> None:
    editor, admin = team.browser("a-editor"), team.browser("a-admin")
    assert editor.post("/tiny/1-other/map").status_code == 303
    assert editor.post("/tiny/1-none/remove").status_code == 404
    editor.post("/api/explanation/search-all", json={"query": "cold"})
    admin.post("/people/invite", data={"role": "viewer"})
    with team.sessions() as session:
        found = [(e.who, e.action, e.path, e.key) for e in audit.entries(session)]
    assert found == [
        ("a-admin", "POST /people/invite", "/people/invite", False),
        ("a-editor", "POST /{model}/{source}/map", "/tiny/1-other/map", False),
    ]
    page = admin.get("/audit", params={"who": "a-editor", "about": "1-other"})
    assert "/tiny/1-other/map" in page.text
    assert "/people/invite" not in page.text
    assert editor.get("/audit").status_code == 403


def test_a_job_belongs_to_the_person_who_asked_for_it(team: Team) -> None:
    team.browser("a-editor").post("/tiny/1-other/map")
    with team.sessions() as session:
        assert [job.owner for job in session.scalars(select(Job))] == ["a-editor"]


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0", "Firefox on Linux"),
        (
            "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1 Version/26.0 Safari/605.1",
            "Safari on macOS",
        ),
        ("Mozilla/5.0 (Windows NT 10.0) AppleWebKit/537 Chrome/140.0 Safari/537 Edg/140.0", "Edge on Windows"),
        ("python-httpx/0.28", "Python"),
        ("<script>" * 40, ("<script>" * 40)[:60]),
        ("", ""),
    ],
)
def test_a_login_is_listed_by_browser_and_system(said: str, name: str) -> None:
    assert browser_name(said) == name
