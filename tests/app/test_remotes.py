"""Remote catalogs: bundles of a folder and of a real web server, imported by the page's button; what is refused."""

from __future__ import annotations

import ipaddress
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from sqlalchemy import Engine, select
from sqlalchemy.orm import Session, sessionmaker
from starlette.testclient import TestClient
from typer.testing import CliRunner

from app import bundles, cli, db, harvests, remotes, uploads, webfiles
from app.errors import AtlasError, BadFile, BadInput, Conflict, Forbidden, NotFound, TooLarge, Unavailable
from app.main import create_app
from app.people import Role
from app.settings import Settings
from app.tables import Feature, Job, Source, now
from app.web.access import declared
from app.weights import check_sae
from tests import conftest
from tests.app.test_import_export_pages import run
from tests.app.test_team_mode import routes_of
from tests.conftest import D_IN, D_SAE
from tests.tiny import save_sae


def quiet(_share: float, _status: str) -> None:
    pass


@pytest.fixture(scope="module")
def published(filled_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one bundle, `saes/one`, beside what is none."""
    home = tmp_path_factory.mktemp("publisher")
    settings = Settings(data_dir=home / "data")
    shutil.copytree(filled_directory, settings.data_dir)
    config = {"architecture": "topk", "k": 2, "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    config |= {"metadata": {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny"}}
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    save_sae(home / "sae", config, {name: torch.ones(shape) for name, shape in shapes.items()})
    facts = check_sae(home / "sae", D_IN, settings)
    engine = db.connect(settings)
    with db.sessions(engine)() as session:
        harvests.source_named(session, "tiny", "1-demo").sae_hash = facts.hash
        harvests.catalogue_sae(session, settings, facts, model_id="tiny", set_name="demo", metrics={}, origin={})
        session.commit()
        (home / "shelf" / "saes").mkdir(parents=True)
        bundles.export_bundle(session, settings, "tiny", "1-demo", home / "shelf" / "saes" / "one", quiet)
    engine.dispose()
    (home / "shelf" / "notes").mkdir()
    (home / "shelf" / "notes" / "manifest.json").write_text('{"format": "something else"}')
    return home / "shelf"


@pytest.fixture
def shelf(published: Path, tmp_path: Path) -> Path:
    shutil.copytree(published, tmp_path / "shelf")
    return tmp_path / "shelf"


@dataclass
class Web:
    """A web server of a folder, which can be told to misbehave."""

    root: Path
    url: str = ""
    asked: list[str] = field(default_factory=list[str])
    redirect: str = ""
    lie: dict[str, bytes] = field(default_factory=dict[str, bytes])
    """What comes under a path instead of the file there."""
    endless: str = ""


@pytest.fixture
def web(shelf: Path) -> Iterator[Web]:
    served = Web(shelf)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            served.asked.append(self.path)
            if served.redirect:
                self.send_response(302)
                self.send_header("location", served.redirect)
                self.send_header("content-length", "0")
                self.end_headers()
                return
            if self.path == served.endless:
                self.send_response(200)
                self.send_header("connection", "close")
                self.end_headers()
                try:
                    for _ in range(10_000):
                        self.wfile.write(b" " * 100_000)
                except OSError:
                    pass
                return
            file = served.root / self.path.lstrip("/")
            body = served.lie.get(self.path, file.read_bytes() if file.is_file() else None)
            self.send_response(404 if body is None else 200)
            self.send_header("content-length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    remotes.write_index(shelf)
    yield served
    server.shutdown()
    server.server_close()


@pytest.fixture
def here(settings: Settings) -> Settings:
    """An empty catalog that may ask this machine's web servers."""
    chosen = settings.changed(remote_networks="127.0.0.0/8")
    engine = db.connect(chosen)
    db.migrate(engine)
    engine.dispose()
    return chosen


@pytest.fixture
def sessions(here: Settings) -> Iterator[sessionmaker[Session]]:
    engine: Engine = db.connect(here)
    yield db.sessions(engine)
    engine.dispose()


@pytest.fixture
def browser(here: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(here), base_url="http://localhost:3000", follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize("kind", ["folder", "web"])
def test_a_bundle_is_subscribed_to_and_imported_with_one_click(
    browser: TestClient, here: Settings, sessions: sessionmaker[Session], web: Web, kind: str
) -> None:
    place = web.url if kind == "web" else str(web.root)
    assert browser.post("/remotes/add", data={"name": "Lab", "place": place}).status_code == 303
    page = browser.get("/remotes").text
    assert "tiny/1-demo" in page
    assert 'value="saes/one"' in page
    asked = browser.post("/remotes/lab/import", data={"path": "saes/one"})
    assert (asked.status_code, asked.headers["location"]) == (303, "/jobs/1")
    assert run(here)["url"] == "/tiny/1-demo"
    with sessions() as session:
        assert session.scalars(select(Source)).one().d_sae == D_SAE
        assert session.get_one(Feature, (1, 3)).label == "harbours"
        assert [offer.imported for offer in remotes.offers(session, remotes.named(session, "lab"))] == [True]
    assert browser.get("/tiny/1-demo/3").status_code == 200
    assert "Import again" in browser.get("/remotes").text
    assert (web.root / "saes" / "one" / "manifest.json").is_file(), "a folder of somebody's is left as it is"
    assert list(uploads.home(here).glob("*")) == []


def test_a_newer_version_is_seen_when_it_is_listed_again(
    browser: TestClient, here: Settings, sessions: sessionmaker[Session], shelf: Path
) -> None:
    browser.post("/remotes/add", data={"name": "lab", "place": str(shelf)})
    browser.post("/remotes/lab/import", data={"path": "saes/one"})
    run(here)
    manifest = shelf / "saes" / "one" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"metrics": {"l0": 2.0}}))
    assert browser.post("/remotes/lab/refresh").status_code == 303
    assert "one of that name" in browser.get("/remotes").text
    browser.post("/remotes/lab/import", data={"path": "saes/one"})
    run(here)
    assert "Import again" in browser.get("/remotes").text


@pytest.mark.parametrize("file", ["sae/sae_weights.safetensors", "evidence/features.jsonl.zst", "manifest.json"])
@pytest.mark.parametrize("kind", ["folder", "web"])
def test_what_was_changed_after_it_was_listed_is_refused_by_name(
    browser: TestClient, here: Settings, sessions: sessionmaker[Session], web: Web, kind: str, file: str
) -> None:
    place = web.url if kind == "web" else str(web.root)
    browser.post("/remotes/add", data={"name": "lab", "place": place})
    browser.post("/remotes/lab/import", data={"path": "saes/one"})
    target = web.root / "saes" / "one" / file
    target.write_bytes(target.read_bytes().replace(b'"l0"', b'"l1"') + b" ")
    with pytest.raises(BadFile, match=rf"{file} was changed"):
        run(here)
    with sessions() as session:
        assert session.scalars(select(Source)).all() == []


def test_a_name_that_another_sae_has_is_explained_and_both_stay(
    browser: TestClient, here: Settings, sessions: sessionmaker[Session], shelf: Path, filled_directory: Path
) -> None:
    engine = db.connect(here)
    with db.sessions(engine).begin() as session:
        shutil.rmtree(here.data_dir / "models", ignore_errors=True)
        conftest.fill(session, here)
    engine.dispose()
    browser.post("/remotes/add", data={"name": "lab", "place": str(shelf)})
    assert "one of that name" in browser.get("/remotes").text
    browser.post("/remotes/lab/import", data={"path": "saes/one"})
    with pytest.raises(Conflict, match=r"tiny/1-demo holds another SAE already \(aa; this one is \w+\)"):
        run(here)
    with sessions() as session:
        assert harvests.source_named(session, "tiny", "1-demo").sae_hash == "aa"


def test_only_an_admin_subscribes_and_only_an_editor_imports() -> None:
    roles = {r.path: declared(list(r.dependencies)) for r in routes_of(create_app(Settings())) if "/remotes" in r.path}
    assert roles == {
        "/remotes": [Role.VIEWER],
        "/remotes/add": [Role.ADMIN],
        "/remotes/{name}/remove": [Role.ADMIN],
        "/remotes/{name}/refresh": [Role.EDITOR],
        "/remotes/{name}/import": [Role.EDITOR],
    }


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("http://169.254.169.254/latest/meta-data", Forbidden),
        ("http://[fe80::1]/", Forbidden),
        ("http://[::ffff:169.254.169.254]/", Forbidden),
        ("http://[64:ff9b::a9fe:a9fe]/", Forbidden),
        ("http://10.0.0.7/", Forbidden),
        ("http://[::1]:9/", Forbidden),
        ("http://0.0.0.0/", Forbidden),
        ("file:///etc", BadInput),
        ("ftp://example.org/", BadInput),
        ("http://user:pass@example.org/", BadInput),
        ("http://example.org:0/", BadInput),
        ("http://example.org:99999/", BadInput),
        ("http://a b/", BadInput),
        ("http://" + "x" * 80 + ".invalid/", Unavailable),
        ("relative/folder", BadInput),
        ("/no/such/folder", NotFound),
        ("", BadInput),
    ],
)
def test_a_place_that_must_not_or_cannot_be_asked_is_refused_in_words(
    browser: TestClient, here: Settings, place: str, error: type[AtlasError]
) -> None:
    answer = browser.post("/remotes/add", data={"name": "lab", "place": place})
    assert answer.status_code == error.status
    assert 'class="problem"' in answer.text


def test_this_machine_is_asked_only_where_its_network_is_named(here: Settings, web: Web) -> None:
    with pytest.raises(Forbidden, match="SAE_ATLAS_REMOTE_NETWORKS"):
        remotes.listed(here.changed(remote_networks="10.0.0.0/8"), web.url)
    assert web.asked == []
    link_local = ipaddress.ip_address("169.254.1.1")
    with pytest.raises(Forbidden, match="never asked"):
        webfiles.check_address(here.changed(remote_networks="0.0.0.0/0"), "x", link_local)


def test_a_name_that_stands_for_a_private_address_is_refused_before_it_is_asked(
    here: Settings, web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One good address beside a private one does not help: the connection might go to either."""
    both = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("10.0.0.7", 80))]
    monkeypatch.setattr(webfiles.socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(Forbidden, match=r"10\.0\.0\.7"):
        remotes.listed(here, "http://rebinding.example")


def test_a_redirect_is_not_followed(here: Settings, web: Web) -> None:
    web.redirect = "http://169.254.169.254/"
    with pytest.raises(Unavailable, match=r"302 to 'http://169\.254\.169\.254/'"):
        remotes.listed(here, web.url)
    assert web.asked == ["/index.json"]


@pytest.mark.parametrize(
    "index",
    [
        b"<html>",
        b"[]",
        b"{" * 5000,
        json.dumps({"format": "sae-atlas-remote", "version": 9, "bundles": []}).encode(),
        *(
            json.dumps(
                {
                    "format": "sae-atlas-remote",
                    "version": 1,
                    "bundles": [{"path": path, "sha256": "0" * 64, "model": "m", "source": "1-x", "n_features": 1}],
                }
            ).encode()
            for path in ("../one", "/etc", "a/../b", "a//b", "a/b/c/d", ".hidden", "a\n", "http://x/", "")
        ),
    ],
)
def test_an_index_that_is_none_is_refused(here: Settings, web: Web, index: bytes) -> None:
    web.lie["/index.json"] = index
    with pytest.raises(BadFile, match=r"index\.json"):
        remotes.listed(here, web.url)


def test_an_answer_without_end_is_cut_off(here: Settings, web: Web) -> None:
    web.endless = "/index.json"
    with pytest.raises(TooLarge, match=f"{remotes.MAX_INDEX_BYTES:,}"):
        remotes.listed(here, web.url)


def test_a_bundle_that_is_larger_than_imports_may_be_is_given_up(
    browser: TestClient, here: Settings, sessions: sessionmaker[Session], web: Web
) -> None:
    browser.post("/remotes/add", data={"name": "lab", "place": web.url})
    browser.post("/remotes/lab/import", data={"path": "saes/one"})
    with pytest.raises(TooLarge, match="SAE_ATLAS_MAX_IMPORT_BYTES"):
        run(here.changed(max_import_bytes=1000))


def test_a_remote_that_is_gone_keeps_its_list_and_says_why(
    browser: TestClient, sessions: sessionmaker[Session], shelf: Path
) -> None:
    browser.post("/remotes/add", data={"name": "lab", "place": str(shelf)})
    shutil.rmtree(shelf)
    browser.post("/remotes/lab/refresh")
    page = browser.get("/remotes").text
    assert "tiny/1-demo" in page
    assert "There is no folder" in page
    assert browser.post("/remotes/lab/import", data={"path": "saes/two"}).status_code == 404
    assert browser.post("/remotes/add", data={"name": "lab", "place": str(shelf.parent)}).status_code == 409
    assert browser.post("/remotes/lab/remove").status_code == 303
    assert "No remote yet" in browser.get("/remotes").text


def test_the_same_from_the_command_line(here: Settings, sessions: sessionmaker[Session], web: Web) -> None:
    given = {"SAE_ATLAS_DATA_DIR": str(here.data_dir), "SAE_ATLAS_REMOTE_NETWORKS": "127.0.0.0/8"}

    def said(*words: str) -> str:
        done = CliRunner().invoke(cli.app, ["remote", *words], env=given, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    assert "lists 1 bundles" in said("index", str(web.root))
    assert "offers 1 bundles" in said("add", "lab", web.url)
    assert web.url in said("list")
    assert "saes/one" in said("list", "lab")
    said("import", "lab", "saes/one")
    with sessions() as session:
        assert session.scalars(select(Job)).one().title == "Import tiny/1-demo from lab"
    said("remove", "lab")


def test_a_trainer_lists_again_what_was_listed_long_ago_and_says_when(
    browser: TestClient, here: Settings, sessions: sessionmaker[Session], shelf: Path, tmp_path: Path
) -> None:
    browser.post("/remotes/add", data={"name": "lab", "place": str(shelf)})
    gone = tmp_path / "gone"
    gone.mkdir()
    browser.post("/remotes/add", data={"name": "gone", "place": str(gone)})
    gone.rmdir()
    assert remotes.refresh_old(sessions, here) == 0
    with sessions.begin() as session:
        for remote in remotes.everything(session):
            remote.checked_at = now() - timedelta(hours=3)
    (shelf / "saes" / "one").rename(shelf / "saes" / "uno")
    assert browser.get("/remotes").text.count(" UTC, 3 h ago") == 2
    assert remotes.refresh_old(sessions, here) == 2
    page = browser.get("/remotes").text
    assert (page.count(" UTC, 0 min ago"), page.count(" UTC, 3 h ago")) == (1, 1)
    assert "There is no folder" in page
    with sessions() as session:
        assert "saes/uno" in {entry["path"] for entry in remotes.named(session, "lab").listing}
