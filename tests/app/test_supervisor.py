"""`sae-atlas serve` as a real process: it starts three, restarts what dies, and leaves nothing running."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.settings import Settings
from app.supervisor import MAX_SILENCES, PROBE_EVERY_SECONDS, PROBE_SECONDS, served_address

ROLES = {"web": "-m\0app\0", "gpu": "workers.gpu", "trainer": "workers.trainer"}


def command_lines(data_dir: Path) -> dict[int, str]:
    """Every live process that was given this data directory, by pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"SAE_ATLAS_DATA_DIR={data_dir}\0".encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_text()
        except OSError:
            continue
    return found


def pid_of(role: str, data_dir: Path) -> int | None:
    return next((pid for pid, line in command_lines(data_dir).items() if ROLES[role] in line), None)


def until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(data_dir: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", "serve", *arguments],
        env={**os.environ, "SAE_ATLAS_DATA_DIR": str(data_dir), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def url_printed_by(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"SAE Atlas is at (http://127\.0\.0\.1:\d+)", line)
        if found:
            return found[1]
    raise AssertionError("serve ended without printing an address")


@pytest.fixture
def served(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start(tmp_path, "--port", "0", "--quiet")
    yield process
    process.kill()
    process.wait()
    until(lambda: not command_lines(tmp_path), 10)


def test_serve_prints_its_address_soon_restarts_the_dead_and_stops_with_nothing_left(
    served: subprocess.Popen[str], tmp_path: Path
) -> None:
    began = time.monotonic()
    url_printed_by(served)
    assert time.monotonic() - began < 15
    until(lambda: all(pid_of(role, tmp_path) for role in ROLES), 5)
    before = pid_of("trainer", tmp_path)
    assert before is not None
    os.kill(before, signal.SIGKILL)
    until(lambda: pid_of("trainer", tmp_path) not in (None, before), 10)
    began = time.monotonic()
    served.send_signal(signal.SIGINT)
    assert served.wait(timeout=15) == 0
    assert time.monotonic() - began < 10
    assert command_lines(tmp_path) == {}


def test_a_killed_supervisor_takes_its_processes_with_it(served: subprocess.Popen[str], tmp_path: Path) -> None:
    url_printed_by(served)
    assert len(command_lines(tmp_path)) == 4
    served.kill()
    served.wait()
    until(lambda: not command_lines(tmp_path), 5)


def test_a_stopped_child_is_killed_at_the_deadline(served: subprocess.Popen[str], tmp_path: Path) -> None:
    url_printed_by(served)
    stuck = pid_of("gpu", tmp_path)
    assert stuck is not None
    os.kill(stuck, signal.SIGSTOP)
    served.send_signal(signal.SIGTERM)
    assert served.wait(timeout=20) == 0
    assert command_lines(tmp_path) == {}


def test_the_doctor_finds_the_web_at_the_port_it_is_served_on(served: subprocess.Popen[str], tmp_path: Path) -> None:
    address = url_printed_by(served)
    environment = {**os.environ, "SAE_ATLAS_DATA_DIR": str(tmp_path), "COLUMNS": "200"}
    command = [sys.executable, "-m", "app.cli", "doctor"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stdout
    assert f"answers at {address}" in said
    served.send_signal(signal.SIGINT)
    served.wait(timeout=15)
    assert not (tmp_path / "run" / "address").exists()
    given = Settings(data_dir=tmp_path)
    assert served_address(given) == given


def test_a_stuck_gpu_worker_is_killed_and_started_again(served: subprocess.Popen[str], tmp_path: Path) -> None:
    url_printed_by(served)
    path = Settings(data_dir=tmp_path).socket_path
    until(path.exists, 60)
    stuck = pid_of("gpu", tmp_path)
    others = pid_of("web", tmp_path), pid_of("trainer", tmp_path)
    assert stuck is not None
    time.sleep(2 * PROBE_EVERY_SECONDS)
    os.kill(stuck, signal.SIGSTOP)
    until(
        lambda: pid_of("gpu", tmp_path) not in (None, stuck), (MAX_SILENCES + 1) * (PROBE_SECONDS + PROBE_EVERY_SECONDS)
    )
    assert (pid_of("web", tmp_path), pid_of("trainer", tmp_path)) == others
    with pytest.raises(ProcessLookupError):
        os.kill(stuck, 0)


def test_a_second_serve_on_the_same_data_directory_is_refused(served: subprocess.Popen[str], tmp_path: Path) -> None:
    url_printed_by(served)
    second = start(tmp_path, "--port", "0")
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 2
    assert f"SAE Atlas runs already on {tmp_path}. Stop it first" in output


def test_a_port_in_use_is_one_clear_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(tmp_path, "--port", str(port))
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert f"Error: Port {port} on 127.0.0.1 cannot be used (Address already in use)." in output
    assert f"--port {port + 1}" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "example.org"])
def test_an_address_that_others_can_reach_is_refused_with_the_reason(tmp_path: Path, host: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "app.cli", "serve"],
        env={**os.environ, "SAE_ATLAS_DATA_DIR": str(tmp_path), "SAE_ATLAS_HOST": host},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert result.returncode == 2
    said = " ".join(result.stderr.split())
    assert f"{host} is not a loopback address, and without accounts SAE Atlas serves this machine only" in said
    assert "SAE_ATLAS_TEAM=1" in said
