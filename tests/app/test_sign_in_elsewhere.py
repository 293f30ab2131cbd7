"""Signing in at a real OpenID Connect provider, a process of its own, and by a proxy in front (issue 9)."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import structlog
from fastapi import FastAPI
from sqlalchemy import Engine, select
from starlette.testclient import TestClient

from app import identities, log, people, supervisor
from app.errors import BadInput
from app.main import create_app
from app.people import Role
from app.settings import Settings
from app.tables import Identity, Person, SignIn, now
from app.web.proxy import trusted
from tests.app.conftest import listening
from tests.oidc_provider import CLIENT_ID, CLIENT_SECRET

PASSWORD = "four random words here"
PUBLIC = "http://localhost:3000"


@pytest.fixture(scope="module")
def issuer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with listening() as listener:
        port = listener.getsockname()[1]
    log = tmp_path_factory.mktemp("provider") / "stderr"
    with log.open("wb") as errors:
        process = subprocess.Popen([sys.executable, "-m", "tests.oidc_provider", str(port)], stderr=errors)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            try:
                if httpx.get(f"{url}/jwks").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
        process.terminate()
        process.wait(timeout=60)


class Atlas:
    """The application in team mode, with an admin who has a password, and browsers."""

    def __init__(self, app: FastAPI, opened: TestClient) -> None:
        self.app, self.opened = app, opened
        self.sessions = app.state.sessions

    def browser(self, name: str = "", peer: str = "127.0.0.1") -> TestClient:
        opened = TestClient(
            self.app, base_url=PUBLIC, raise_server_exceptions=False, follow_redirects=False, client=(peer, 40_000)
        )
        if name:
            assert opened.post("/login", data={"name": name, "password": PASSWORD}).status_code == 303
        return opened

    def people(self) -> dict[str, str]:
        with self.sessions() as session:
            return {p.name: p.role for p in session.scalars(select(Person))}

    def people_at(self, issuer: str) -> dict[str, str]:
        with self.sessions() as session:
            held = select(Identity.subject, Person.name).join(Person, Person.id == Identity.person_id)
            return {row[0]: row[1] for row in session.execute(held.where(Identity.issuer == issuer))}


def served(settings: Settings, engine: Engine, **more: object) -> Iterator[Atlas]:
    url = engine.url.render_as_string(hide_password=False)
    app = create_app(settings.changed(team=True, public_url=PUBLIC, database_url=url, **more))
    with TestClient(app, base_url=PUBLIC) as opened:
        with app.state.sessions.begin() as session:
            people.add(session, "a-admin", PASSWORD, Role.ADMIN)
        yield Atlas(app, opened)


@pytest.fixture
def atlas(engine: Engine, settings: Settings, issuer: str) -> Iterator[Atlas]:
    yield from served(
        settings,
        engine,
        oidc_issuer=issuer,
        oidc_client_id=CLIENT_ID,
        oidc_client_secret=CLIENT_SECRET,
        oidc_name="The Lab",
        oidc_domains="lab.example, other.example",
    )


def go(browser: TestClient, who: str, fault: str = "", **begin: str) -> httpx.Response:
    """Begin a sign-in, let the person choose themselves at the provider, and come back."""
    return browser.get(provider_sends(browser, who, fault, **begin))  # type: ignore[return-value]


def provider_sends(browser: TestClient, who: str, fault: str = "", **begin: str) -> str:
    """Return the address by which the provider sends the browser back."""
    begun = browser.get("/oidc/start", params=begin)
    assert begun.status_code == 303, begun.text
    answer = httpx.get(
        begun.headers["location"], params={"as": who, "fault": fault} | _query(begun.headers["location"])
    )
    assert answer.status_code == 302, answer.text
    return answer.headers["location"].removeprefix(PUBLIC)


def _query(url: str) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlsplit(url).query).items()}


def test_somebody_of_an_allowed_domain_comes_in_as_a_viewer_and_is_the_same_the_next_time(atlas: Atlas) -> None:
    browser = atlas.browser()
    assert "Sign in with The Lab" in browser.get("/login").text
    back = go(browser, "ada", next="/jobs")
    assert (back.status_code, back.headers["location"]) == (303, "/jobs")
    assert "ada" in browser.get("/account").text
    assert go(atlas.browser(), "ada").status_code == 303
    assert atlas.people() == {"a-admin": "admin", "ada": "viewer"}


def test_an_identity_token_without_an_address_is_completed_from_userinfo(atlas: Atlas) -> None:
    assert go(atlas.browser(), "ada", "sparse").status_code == 303
    assert "ada" in atlas.people()


def test_who_is_of_no_allowed_domain_needs_an_invitation(atlas: Atlas) -> None:
    refused = go(atlas.browser(), "grace")
    assert refused.status_code == 403
    assert "grace@elsewhere.example was not invited" in refused.text
    with atlas.sessions.begin() as session:
        secret = people.invite(session, Role.EDITOR)
    browser = atlas.browser()
    assert "Make it with The Lab" in browser.get(f"/invite/{secret}").text
    assert go(browser, "grace", invitation=secret).status_code == 303
    assert atlas.people() == {"a-admin": "admin", "grace": "editor"}
    assert go(atlas.browser(), "mallory", invitation=secret).status_code == 404


def test_an_address_that_is_not_verified_lets_nobody_in(atlas: Atlas) -> None:
    assert go(atlas.browser(), "mallory").status_code == 403
    assert atlas.people() == {"a-admin": "admin"}


def test_a_name_or_an_address_is_never_enough_to_become_somebody(atlas: Atlas, issuer: str) -> None:
    """Somebody whom the provider calls a-admin gets another account than the a-admin who is here."""
    browser = atlas.browser()
    assert go(browser, "namesake").status_code == 303
    assert atlas.people() == {"a-admin": "admin", "a-admin-2": "viewer"}
    assert browser.get("/people").status_code == 403
    assert atlas.people_at(issuer) == {"u-4": "a-admin-2"}


def test_a_person_with_a_password_connects_the_provider_once_and_signs_in_there(atlas: Atlas) -> None:
    admin = atlas.browser("a-admin")
    assert go(admin, "grace", connect="true", next="/account").status_code == 303
    assert "grace@elsewhere.example" in admin.get("/account").text
    other = atlas.browser()
    assert go(other, "grace").status_code == 303
    assert other.get("/people").status_code == 200
    assert go(atlas.browser(), "ada").status_code == 303
    with atlas.sessions.begin() as session:
        people.add(session, "hedy", PASSWORD, Role.VIEWER)
    assert go(atlas.browser("hedy"), "ada", connect="true").status_code == 409
    assert "/login" in atlas.browser().get("/oidc/start", params={"connect": "true"}).headers["location"]


def test_who_is_disabled_here_does_not_come_in_by_the_provider(atlas: Atlas) -> None:
    browser = atlas.browser()
    go(browser, "ada")
    with atlas.sessions.begin() as session:
        people.disable(session, people.named(session, "ada"))
    assert browser.get("/").status_code == 303
    refused = go(atlas.browser(), "ada")
    assert refused.status_code == 403
    assert "is disabled" in refused.text


@pytest.mark.parametrize("fault", ["issuer", "audience", "expired", "nonce", "key"])
def test_an_identity_token_that_does_not_hold_good_signs_nobody_in(atlas: Atlas, fault: str) -> None:
    browser = atlas.browser()
    answer = go(browser, "ada", fault)
    assert answer.status_code == 401
    assert "does not hold good" in answer.text
    assert browser.get("/account").status_code == 303
    assert atlas.people() == {"a-admin": "admin"}


def test_what_the_person_refused_there_is_said(atlas: Atlas) -> None:
    answer = go(atlas.browser(), "ada", "denied")
    assert answer.status_code == 401
    assert "Not today" in answer.text


def test_a_sign_in_counts_once_and_in_the_browser_that_began_it(atlas: Atlas) -> None:
    mine, thief = atlas.browser(), atlas.browser()
    address = provider_sends(mine, "ada")
    assert thief.get(address).status_code == 401
    address = provider_sends(mine, "ada")
    thief.get("/oidc/start")
    assert thief.get(address).status_code == 401, "a cookie of another sign-in does not count"
    address = provider_sends(mine, "ada")
    assert mine.get(address).status_code == 303
    assert mine.get(address).status_code == 401
    for invented in ("", "state=x&code=y", "code=y", "state=" + "x" * 5000):
        assert mine.get(f"/oidc/callback?{invented}").status_code in (401, 422)


def test_a_sign_in_that_took_too_long_is_refused(atlas: Atlas) -> None:
    browser = atlas.browser()
    address = provider_sends(browser, "ada")
    with atlas.sessions.begin() as session:
        session.scalars(select(SignIn)).one().expires_at = now()
    assert browser.get(address).status_code == 401


def test_after_signing_in_nobody_is_led_to_another_site(atlas: Atlas) -> None:
    assert go(atlas.browser(), "ada", next="//evil.example/x").headers["location"] == "/"


def test_a_provider_that_is_gone_is_said_and_passwords_still_work(settings: Settings, engine: Engine) -> None:
    with listening() as nobody:
        gone = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    for atlas in served(settings, engine, oidc_issuer=gone, oidc_client_id=CLIENT_ID):
        assert atlas.browser().get("/oidc/start").status_code == 503
        assert atlas.browser("a-admin").get("/account").status_code == 200


def test_without_a_provider_there_is_no_such_way_in(settings: Settings, engine: Engine) -> None:
    for atlas in served(settings, engine):
        assert atlas.browser().get("/oidc/start").status_code == 404
        assert "Sign in with" not in atlas.browser().get("/login").text


# A proxy that signs people in ---------------------------------------------------------------------------------------

HEADER = "x-forwarded-user"
PROXY, STRANGER = "10.9.8.7", "203.0.113.5"


@pytest.fixture
def behind_proxy(engine: Engine, settings: Settings) -> Iterator[Atlas]:
    yield from served(settings, engine, proxy_user_header=HEADER, trusted_proxies="10.9.0.0/16, ::1")


def test_whom_a_trusted_proxy_names_is_signed_in_and_an_admin_may_raise_them(behind_proxy: Atlas) -> None:
    browser = behind_proxy.browser(peer=PROXY)
    assert "ada" in browser.get("/account", headers={HEADER: "Ada@lab.example"}).text
    assert behind_proxy.people() == {"a-admin": "admin", "ada": "viewer"}
    with behind_proxy.sessions.begin() as session:
        people.set_role(session, people.named(session, "ada"), Role.ADMIN)
    assert browser.get("/people", headers={HEADER: "Ada@lab.example"}).status_code == 200
    made = browser.post("/account/tokens", headers={HEADER: "Ada@lab.example"}, data={"name": "notebook"})
    assert "shown this once" in made.text


@pytest.mark.parametrize("forwarded", [{}, {"x-forwarded-for": PROXY}, {"x-forwarded-for": "127.0.0.1"}])
def test_anybody_else_who_sends_that_header_is_a_stranger(behind_proxy: Atlas, forwarded: dict[str, str]) -> None:
    browser = behind_proxy.browser(peer=STRANGER)
    answer = browser.get("/account", headers={HEADER: "a-admin", **forwarded})
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login")
    assert behind_proxy.people() == {"a-admin": "admin"}


def test_a_proxy_whose_clients_come_from_elsewhere_is_still_believed_by_its_own_address(behind_proxy: Atlas) -> None:
    browser = behind_proxy.browser(peer=PROXY)
    page = browser.get("/account", headers={HEADER: "ada", "x-forwarded-for": STRANGER})
    assert page.status_code == 200


def test_a_header_that_comes_twice_is_refused(behind_proxy: Atlas) -> None:
    """A proxy that adds its own behind what a browser sent would let anybody choose who they are."""
    browser = behind_proxy.browser(peer=PROXY)
    answer = browser.get("/api/models", headers=[(HEADER, "a-admin"), (HEADER, "ada")])
    assert answer.status_code == 401
    assert "came twice" in answer.json()["error"]


def test_the_name_of_an_account_is_not_enough_until_an_admin_connects_it(behind_proxy: Atlas) -> None:
    browser = behind_proxy.browser(peer=PROXY)
    assert browser.get("/people", headers={HEADER: "a-admin"}).status_code == 403
    with behind_proxy.sessions.begin() as session:
        identities.connect_proxy(session, people.named(session, "a-admin"), "root@lab.example")
    assert browser.get("/people", headers={HEADER: "root@lab.example"}).status_code == 200


def test_without_the_setting_the_header_is_nothing(settings: Settings, engine: Engine) -> None:
    for atlas in served(settings, engine, trusted_proxies="10.9.0.0/16"):
        assert atlas.browser(peer=PROXY).get("/account", headers={HEADER: "ada"}).status_code == 303


def test_addresses_are_matched_as_addresses() -> None:
    assert trusted("10.9.8.7", "192.0.2.1, 10.9.0.0/16")
    assert trusted("::1", "::1")
    assert not trusted("10.90.8.7", "10.9.0.0/16")
    assert not trusted("", "10.9.0.0/16")
    assert not trusted("10.9.8.7", "*")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"oidc_issuer": "http://idp.example"}, "https address"),
        ({"oidc_issuer": "https://idp.example"}, "SAE_ATLAS_OIDC_CLIENT_ID"),
        ({"proxy_user_header": HEADER, "trusted_proxies": "*"}, "addresses or networks"),
    ],
)
def test_a_way_in_that_would_not_be_safe_is_refused_at_the_start(given: dict[str, object], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        supervisor.check_address(Settings.model_validate({"port": 0, "team": True, "public_url": PUBLIC, **given}))


@pytest.fixture
def talkative() -> Iterator[None]:
    """Log as the server does, everything."""
    handlers, level = logging.getLogger().handlers, logging.getLogger().level
    log.configure(Settings(log_level="DEBUG", log_format="json"), "web")
    yield
    structlog.reset_defaults()
    logging.getLogger().handlers = handlers
    logging.getLogger().setLevel(level)


def test_no_secret_is_logged(
    settings: Settings, engine: Engine, issuer: str, capfd: pytest.CaptureFixture[str], talkative: None
) -> None:
    """After signing in in every way, the log at its most talkative holds none of the secrets."""
    secrets = [PASSWORD, CLIENT_SECRET, "a wrong password, typed"]
    for atlas in served(
        settings,
        engine,
        log_level="DEBUG",
        oidc_issuer=issuer,
        oidc_client_id=CLIENT_ID,
        oidc_client_secret=CLIENT_SECRET,
        oidc_domains="lab.example",
    ):
        browser = atlas.browser("a-admin")
        atlas.browser().post("/login", data={"name": "a-admin", "password": "a wrong password, typed"})
        made = browser.post("/account/tokens", data={"name": "notebook"}).text
        token = made[made.index("atlas_") :].partition('"')[0]
        atlas.browser().get("/api/models", headers={"x-api-key": token})
        atlas.browser().get("/api/models", headers={"authorization": f"Bearer {token}x"})
        invited = browser.post("/people/invite", data={"role": "viewer"}).text
        invitation = invited[invited.index("/invite/") + 8 :].partition('"')[0]
        atlas.browser().get(f"/invite/{invitation}")
        atlas.browser().get(f"/invite/{invitation}x")
        somebody = atlas.browser()
        address = provider_sends(somebody, "ada")
        somebody.get(address)
        somebody.get(address)
        go(atlas.browser(), "ada", "key")
        secrets += [token, invitation, *_query(address).values()]
        secrets += [cookie for b in (browser, somebody) for cookie in b.cookies.values()]
    said = "".join(capfd.readouterr())
    assert "/oidc/callback" in said, "the requests were logged"
    assert len(secrets) >= 8
    for secret in secrets:
        assert len(secret) > 8
        assert secret not in said
