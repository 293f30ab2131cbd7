"""What a team deploys: the compose file says what matters, and the web image's steps give a server without torch."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from compose_spec import PyCompose
from starlette.types import Receive, Scope, Send

from app import db
from app.settings import Settings
from app.web.proxy import Proxied
from tests.conftest import Catalog

REPOSITORY = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {"migrate", "web", "worker", "trainer", "worker-gpu", "trainer-gpu"}
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
STAGES: dict[str, list[str]] = {
    match[2]: [match[1], *match[3].replace("\\\n", " ").splitlines()]
    for match in re.finditer(r"^FROM (\S+) AS (\w+)\n(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)
}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service.get("network_mode") is None
    if name == "proxy":
        assert service["cap_add"] == ["NET_BIND_SERVICE"]
    else:
        assert int(service["user"].split(":")[0]) > 0
        assert "ports" not in service, "only the proxy is reached from outside"
    if name != "migrate":
        limits = service["deploy"]["resources"]["limits"]
        assert limits["cpus"]
        assert limits["memory"]
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"


def test_the_services_are_those_of_a_team_and_the_gpu_is_a_profile() -> None:
    assert set(SERVICES) == OURS | {"db", "proxy"}
    for name in ("worker", "trainer"):
        assert SERVICES[name]["profiles"] == ["cpu"]
        assert SERVICES[f"{name}-gpu"]["profiles"] == ["gpu"]
        devices = SERVICES[f"{name}-gpu"]["deploy"]["resources"]["reservations"]["devices"]
        assert devices[0]["capabilities"] == ["gpu"]
        assert "reservations" not in SERVICES[name]["deploy"]["resources"]


@pytest.mark.parametrize("name", sorted(OURS))
def test_settings_images_and_commands_are_real(name: str) -> None:
    service = SERVICES[name]
    ours = {k.removeprefix("SAE_ATLAS_").lower(): v for k, v in service["environment"].items() if "ATLAS" in k}
    assert set(ours) <= set(Settings.model_fields)
    assert service["build"]["target"] in STAGES
    assert service["image"] == f"sae-atlas-{service['build']['target']}"
    command = service.get("command") or ["python", "-m", "app"]
    assert command[0] == "sae-atlas" or find_spec(command[2]) is not None
    assert set(service["networks"]) <= set(COMPOSE["networks"])
    assert {volume.split(":")[0] for volume in service["volumes"]} <= set(COMPOSE["volumes"])
    assert "socket:/run/atlas" in service["volumes"]
    assert ours["worker_socket"].startswith("/run/atlas/")
    assert "POSTGRES_PASSWORD:?" in ours["database_url"], "no default password"
    for needed in service.get("depends_on", {}):
        assert needed in SERVICES
    probe = service.get("healthcheck", {}).get("test", [])
    if probe:
        ast.parse(probe[-1])


def test_the_web_image_has_no_torch_and_nothing_runs_as_root() -> None:
    assert STAGES["web"][0] == STAGES["worker"][0] == "base"
    assert any(line.strip() == "RUN pip install --no-cache-dir --editable .[oidc]" for line in STAGES["web"])
    for stage in ("web", "worker"):
        users = [line.split()[1] for line in STAGES[stage] if line.startswith("USER")]
        assert users == ["10001:10001"]


def test_all_steps_are_shell_and_install_what_the_project_offers() -> None:
    offered = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for lines in STAGES.values():
        for step in (line.removeprefix("RUN ") for line in lines if line.startswith("RUN ")):
            subprocess.run(["bash", "-n", "-c", step], check=True)
            for program in re.findall(r"(?:^|&& )(\w+)", step):
                assert shutil.which(program), program
            for extras in re.findall(r"\.\[([\w,]+)\]", step):
                assert set(extras.split(",")) <= set(offered)


def interpolated(text: str, given: dict[str, str]) -> str:
    """Put in what .env says, as Compose does; `:?` without a value is an error there."""

    def value(found: re.Match[str]) -> str:
        name, kind, default = found[1], found[2], found[3] or ""
        if name not in given and kind == ":?":
            raise KeyError(name)
        return given.get(name, default)

    return re.sub(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}", value, text)


@pytest.mark.parametrize("more", [{}, {"WORKER_CPUS": "4", "WORKER_MEMORY": "16g", "METRICS_TOKEN": "t"}])
def test_the_file_keeps_to_the_compose_specification(more: dict[str, str]) -> None:
    given = {"ATLAS_HOST": "atlas.example.org", "POSTGRES_PASSWORD": "x", **more}
    merged = yaml.safe_load(interpolated((REPOSITORY / "docker-compose.yml").read_text(), given))
    read = PyCompose.from_yaml(yaml.safe_dump(merged))
    read.validate()
    assert set(read.service_names()) == set(SERVICES)


@pytest.mark.parametrize("name", ["ATLAS_HOST", "POSTGRES_PASSWORD"])
def test_there_is_no_default_host_nor_password(name: str) -> None:
    given = {"ATLAS_HOST": "atlas.example.org", "POSTGRES_PASSWORD": "x"}
    del given[name]
    with pytest.raises(KeyError, match=name):
        interpolated((REPOSITORY / "docker-compose.yml").read_text(), given)


@pytest.mark.parametrize(
    "change", [("restart:", "restrat:"), ("- socket:/run", "- sockt:/run"), ("interval: 15s", "interval: soon")]
)
def test_a_mistake_in_the_file_would_be_seen(change: tuple[str, str]) -> None:
    text = (REPOSITORY / "docker-compose.yml").read_text().replace(*change)
    merged = yaml.safe_load(interpolated(text, {"ATLAS_HOST": "a.example.org", "POSTGRES_PASSWORD": "x"}))
    with pytest.raises(ValueError):  # noqa: PT011 - its sentences are the library's
        PyCompose.from_yaml(yaml.safe_dump(merged)).validate()


def test_the_web_service_learns_from_the_proxy_where_requests_come_from() -> None:
    """Else all people have the proxy's address, and a stranger's wrong passwords keep everybody out."""
    said = SERVICES["web"]["environment"]["SAE_ATLAS_TRUSTED_PROXIES"]
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["client"][0])

    async def nothing(*_: Any) -> Any: ...

    for peer in ("172.18.0.5", "192.168.16.3", "203.0.113.9"):
        headers = [(b"x-forwarded-for", b"198.51.100.7"), (b"x-forwarded-proto", b"https")]
        scope = {"type": "http", "client": (peer, 4000), "scheme": "http", "headers": headers}
        asyncio.run(Proxied(app, said)(scope, nothing, nothing))
    assert seen == ["198.51.100.7", "198.51.100.7", "203.0.113.9"]


if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:

    @pytest.mark.parametrize("profile", ["cpu", "gpu"])
    def test_docker_compose_reads_the_file(profile: str) -> None:
        given = os.environ | {"ATLAS_HOST": "atlas.example.org", "POSTGRES_PASSWORD": "x"}
        command = ["docker", "compose", "--profile", profile, "config", "--quiet"]
        subprocess.run(command, cwd=REPOSITORY, env=given, check=True)


def test_the_steps_of_the_web_image_give_a_server_that_answers_without_torch(
    filled: Catalog, settings: Settings, tmp_path: Path
) -> None:
    """COPY and RUN of the Dockerfile, done by hand: a new environment, and no file that the image lacks."""
    image = tmp_path / "image"
    image.mkdir()
    for line in STAGES["base"]:
        if line.startswith("COPY"):
            *sources, target = line.split()[1:]
            for source in sources:
                copy(REPOSITORY / source, image / (target if target != "./" else source))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = next(line for line in STAGES["web"] if line.startswith("RUN pip")).removeprefix("RUN pip ").split()
    subprocess.run([python, "-m", "pip", "--quiet", *install], cwd=image, check=True, timeout=500)
    code = "import importlib.util as u; print([m for m in ('torch', 'transformers', 'safetensors') if u.find_spec(m)])"
    assert subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "SAE_ATLAS", "VIRTUAL"))}
    given = plain | {"SAE_ATLAS_DATA_DIR": str(settings.data_dir), "SAE_ATLAS_PORT": str(port)}
    command = [tmp_path / "venv" / "bin" / "sae-atlas", "migrate"]
    assert "schema" in subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout
    server = subprocess.Popen([python, "-m", "app"], cwd=tmp_path, env=given)
    try:
        page = _answer(f"http://127.0.0.1:{port}/tiny/1-demo/3")
        assert "harbour" in page.text
        assert httpx.get(f"http://127.0.0.1:{port}/static/app.css").status_code == 200
    finally:
        server.kill()
        server.wait()
    db.check_schema(db.connect(settings))


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _answer(url: str) -> httpx.Response:
    for _ in range(300):
        try:
            return httpx.get(url)
        except httpx.HTTPError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")
