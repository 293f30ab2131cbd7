"""A team in real browsers: two people and a stranger look at, share, star and replace the same SAEs."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import uvicorn
from playwright.sync_api import Browser, BrowserContext, Page, expect

from app import people
from app.main import create_app
from app.people import Role
from app.settings import Settings
from tests.app.conftest import listening
from tests.app.test_sign_in_elsewhere import issuer
from tests.browser.conftest import shoot
from tests.conftest import Catalog
from tests.oidc_provider import CLIENT_ID, CLIENT_SECRET

__all__ = ["issuer"]
PASSWORD = "four random words here"
SAE, NEWER = "/tiny/1-demo", "/tiny/2-plain"


@dataclass
class Team:
    """A server in team mode, and a browser for each person."""

    url: str
    browser: Browser
    secret: str
    """Of an invitation that nobody used yet."""
    complaints: list[str] = field(default_factory=list[str])

    def context(self, width: int = 1280, scheme: str = "light") -> BrowserContext:
        return self.browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,  # type: ignore[arg-type]
            base_url=self.url,
        )

    def page(self, context: BrowserContext) -> Page:
        opened = context.new_page()
        opened.on("pageerror", lambda error: self.complaints.append(str(error)))
        opened.on("console", lambda m: self.complaints.append(m.text) if "Content Security Policy" in m.text else None)
        return opened

    def sign_in(self, name: str, context: BrowserContext | None = None) -> Page:
        opened = self.page(context or self.context())
        opened.goto("/login")
        opened.get_by_label("Name").fill(name)
        opened.get_by_label("Password").fill(PASSWORD)
        opened.get_by_role("button", name="Sign in", exact=True).click()
        opened.wait_for_url(f"{self.url}/")
        return opened


@pytest.fixture
def team(browser: Browser, filled: Catalog, settings: Settings, issuer: str) -> Iterator[Team]:
    with listening() as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        chosen = settings.model_copy(
            update={
                "team": True,
                "public_url": url,
                "oidc_issuer": issuer,
                "oidc_client_id": CLIENT_ID,
                "oidc_client_secret": CLIENT_SECRET,
                "oidc_name": "Example Lab",
                "oidc_domains": "lab.example",
            }
        )
        app = create_app(chosen)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        with app.state.sessions.begin() as session:
            for name, role in (("ada", Role.EDITOR), ("vic", Role.VIEWER), ("root", Role.ADMIN)):
                people.add(session, name, PASSWORD, role)
            secret = people.invite(session, Role.EDITOR)
        made = Team(url, browser, secret)
        yield made
        for context in browser.contexts:
            context.close()
        server.should_exit = True
        thread.join()
    assert made.complaints == []


def seen_by(page: Page, path: str, words: str) -> None:
    """Say on its page who sees something."""
    page.goto(path)
    page.get_by_label("Seen by").select_option(label=words)
    page.locator("#sharing").get_by_role("button", name="Save").click()
    expect(page.get_by_label("Seen by").locator("option:checked")).to_have_text(words)


def test_an_sae_is_private_then_the_teams_then_on_a_public_link(team: Team) -> None:
    ada, vic, stranger = team.sign_in("ada"), team.sign_in("vic"), team.page(team.context())
    seen_by(ada, SAE, "only you")
    for path in (SAE, f"{SAE}/3", f"{SAE}/map"):
        answer = vic.goto(path)
        assert answer is not None
        assert answer.status == 404, path
    vic.goto("/")
    expect(vic.locator(f'main a[href="{SAE}"]')).to_have_count(0)
    seen_by(ada, SAE, "everybody here")
    vic.goto(SAE)
    expect(vic.locator("#sharing")).to_contain_text("by ada, seen by everybody here")
    expect(vic.get_by_label("Seen by")).to_have_count(0)
    stranger.goto(SAE)
    expect(stranger.get_by_role("heading", name="Sign in")).to_be_visible()

    seen_by(ada, SAE, "everybody here, and whoever has the link")
    link = ada.get_by_label("Public link").input_value()
    assert link.startswith(f"{team.url}/shared/")
    stranger.goto(link)
    expect(stranger).to_have_url(f"{team.url}{SAE}")
    expect(stranger.get_by_role("note")).to_contain_text("You look at this by a public link")
    expect(stranger.get_by_role("navigation", name="Site").get_by_role("link")).to_have_text(["Sign in"])
    stranger.goto(f"{SAE}/3")
    expect(stranger.get_by_role("heading", level=1)).to_be_visible()
    other = stranger.goto(NEWER)
    assert other is not None
    assert other.status == 404
    for width, scheme in ((1280, "light"), (390, "dark")):
        context = team.context(width, scheme)
        team.page(context).goto(link)
        shoot(context, SAE, f"team-link-{width}-{scheme}")
    seen_by(ada, SAE, "everybody here")
    gone = stranger.goto(f"{SAE}/3")
    assert gone is not None
    assert gone.status == 404


def test_a_card_a_star_and_a_newer_version_are_seen_by_the_other_person(team: Team) -> None:
    ada, vic = team.sign_in("ada"), team.sign_in("vic")
    ada.goto(SAE)
    ada.get_by_role("link", name="Say what it is").click()
    ada.get_by_label("Tags").fill("baseline, Paper Figure 3")
    ada.get_by_label("Description").fill("## Made for\n\n*harbours* <script>alert(1)</script> [x](javascript:alert(1))")
    ada.get_by_label("Replaced by").select_option("2-plain")
    ada.get_by_role("button", name="Save").click()
    vic.goto(SAE)
    expect(vic.get_by_role("heading", name="Made for")).to_be_visible()
    expect(vic.locator("em", has_text="harbours")).to_be_visible()
    expect(vic.locator('main a[href^="javascript"]')).to_have_count(0)
    expect(vic.get_by_role("link", name="Change its card")).to_have_count(0)
    expect(vic.locator(".notice", has_text="There is a newer version")).to_contain_text("2-plain replaces this one")
    vic.locator("#star button").click()
    expect(vic.locator("#star button")).to_have_attribute("aria-pressed", "true")
    ada.goto(SAE)
    expect(ada.locator("#star button")).to_have_attribute("aria-pressed", "false")
    expect(ada.locator("#star button")).to_contain_text("1")
    vic.goto("/?starred=1")
    expect(vic.locator(f'main a[href="{SAE}"]').first).to_be_visible()
    ada.locator(".tags a", has_text="baseline").click()
    expect(ada.locator(f'main a[href="{SAE}"]').first).to_be_visible()
    expect(ada.locator(f'table.list:not(.grid) a[href="{NEWER}"]')).to_have_count(0)
    vic.goto(SAE)
    vic.locator(".notice").get_by_role("link", name="2-plain").click()
    expect(vic).to_have_url(f"{team.url}{NEWER}")
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
        context = team.context(width, scheme)
        team.sign_in("ada", context)
        for name, path in {"sae": SAE, "card": f"{SAE}/card", "home": "/", "activity": "/activity"}.items():
            shoot(context, path, f"team-{name}-{width}-{scheme}")


def test_a_list_a_comment_and_a_mention_go_between_two_people(team: Team) -> None:
    ada, vic, stranger = team.sign_in("ada"), team.sign_in("vic"), team.page(team.context())
    ada.goto("/lists")
    ada.get_by_label("Name").fill("harbours")
    ada.get_by_role("button", name="Make it").click()
    address = re.sub(r"\?.*", "", ada.url)
    ada.goto(f"{address}?edit=1")
    for index in (3, 4):
        ada.get_by_label("Put in").fill(f"tiny/1-demo/{index}")
        ada.get_by_role("button", name="add", exact=True).click()
        ada.goto(f"{address}?edit=1")
    ada.get_by_label("Note").first.fill("the coldest")
    ada.get_by_role("button", name="save", exact=True).first.click()
    ada.goto(f"{address}?edit=1")
    ada.get_by_label("Seen by").select_option(label="only you")
    ada.get_by_role("button", name="Save", exact=True).click()
    hidden = vic.goto(address)
    assert hidden is not None
    assert hidden.status == 404
    ada.goto(f"{address}?edit=1")
    ada.get_by_label("Seen by").select_option(label="whoever has the address")
    ada.get_by_role("button", name="Save", exact=True).click()
    ada.goto(address)
    ada.locator("#comments textarea").fill("@vic look at the first")
    ada.locator("#comments").get_by_role("button").last.click()
    vic.goto("/mentions")
    expect(vic.locator("main")).to_contain_text("look at the first")
    vic.goto(address)
    expect(vic.locator("main")).to_contain_text("the coldest")
    expect(vic.get_by_role("link", name="Edit")).to_have_count(0)
    stranger.goto(address)
    expect(stranger.locator("h1")).to_have_text("harbours")
    for width, scheme in ((1280, "light"), (390, "dark")):
        context = team.context(width, scheme)
        team.sign_in("ada", context)
        shoot(context, address, f"team-list-{width}-{scheme}")


def test_somebody_signs_in_at_the_provider_and_pages_at_the_door_look_right(team: Team) -> None:
    context = team.context()
    page = team.page(context)
    page.goto("/login?next=/tiny/1-demo")
    start = page.get_by_role("link", name="Sign in with Example Lab").get_attribute("href")
    assert start is not None
    sent = context.request.get(start, max_redirects=0)
    page.goto(f"{sent.headers['location']}&as=ada")
    expect(page).to_have_url(f"{team.url}/tiny/1-demo")
    page.goto("/account")
    expect(page.get_by_role("link", name="Connect with Example Lab")).to_be_visible()
    page.locator('form[action="/account/tokens"] input[name=name]').fill("notebook")
    page.get_by_role("button", name="Make a token").click()
    expect(page.get_by_label("The new token")).to_have_value(re.compile("^atlas_"))
    admin = team.sign_in("root")
    admin.goto("/people")
    admin.get_by_role("button", name="link").first.click()
    for width, scheme in ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")):
        door, inside = team.context(width, scheme), team.context(width, scheme)
        shoot(door, "/login", f"team-login-{width}-{scheme}")
        shoot(door, f"/invite/{team.secret}", f"team-invite-{width}-{scheme}")
        team.sign_in("root", inside)
        for name in ("account", "people", "audit", "admin", "trash", "remotes"):
            shoot(inside, f"/{name}", f"team-{name}-{width}-{scheme}")
