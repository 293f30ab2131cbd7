"""What a team deploys: the compose file says what matters, and the web image's steps give a server without torch."""

from __future__ import annotations

import ast
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app import db
from app.settings import Settings
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
