"""`serve`: starts web, gpu worker and trainer, restarts what dies or hangs, and leaves nothing running however it ends.

Each child has a process group of its own, so that Ctrl-C reaches the supervisor alone and stopping is orderly. On Linux
the kernel kills the children when the supervisor dies, kill -9 included.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import IO
from urllib.parse import urlsplit

import structlog

from app import db, embeddings, lockfile, log, people, wording
from app.errors import BadInput, Conflict
from app.settings import Settings

STOP_SECONDS = 8.0
"""How long children may take after SIGTERM; then they are killed."""
_CALM_SECONDS = 60.0
"""A child that ran this long starts again without delay."""
_MAX_DELAY_SECONDS = 30.0
PROBE_SECONDS = 5.0
"""How long the gpu worker may take to say its status. Busy, it says it in milliseconds: another thread computes."""
PROBE_EVERY_SECONDS = 3.0
MAX_SILENCES = 3
"""After so many probes in a row without an answer the worker is stuck, and is killed and started again."""
_PR_SET_PDEATHSIG = 1

_logger = log.get("supervisor")


@dataclass
class Child:
    """One supervised process and when it may start again."""

    name: str
    command: list[str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    deaths: int = 0
    pulse: Pulse | None = None
    """Tells whether it is stuck, where that can be asked."""
    log: IO[bytes] | None = field(default=None, repr=False)

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Pulse:
    """Asks a process over its Unix socket whether it still answers, in a thread: no other child waits for it.

    Silence counts only once the process has answered, since importing torch and starting take their time.
    """

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path
        self._answered = False
        self._silences = 0

    @property
    def stuck(self) -> bool:
        return self._silences >= MAX_SILENCES

    def begin(self) -> None:
        """Forget what a process before this one did."""
        self._answered, self._silences = False, 0

    def watch(self) -> None:
        threading.Thread(target=self._watch, name="pulse", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(PROBE_EVERY_SECONDS)
            if _says_status(self._path):
                self._answered, self._silences = True, 0
            elif self._answered:
                self._silences += 1


def children(settings: Settings) -> list[Child]:
    """The processes of one machine, web first: it answers while the others still import torch."""
    python = sys.executable
    return [
        Child("web", [python, "-m", "app"]),
        Child("gpu", [python, "-m", "workers.gpu"], pulse=Pulse(settings.socket_path)),
        Child("trainer", [python, "-m", "workers.trainer"]),
    ]


def serve(settings: Settings, announce: Callable[[Settings, list[Child]], None], log_dir: Path | None = None) -> int:
    """Run everything until SIGINT or SIGTERM; call `announce` once the web answers. Returns the exit code.

    Raises BadInput for an address that is not loopback and Conflict for a port in use, before anything is started.
    """
    settings = check_address(settings)
    lock = hold(settings)
    engine = db.connect(settings)
    db.migrate(engine)
    with db.sessions(engine).begin() as session:
        if settings.team and not people.can_have_admin(session):
            raise BadInput("Nobody can sign in yet. Run `sae-atlas user invite --role admin` and open its link.")
        wording.fill_missing(
            session, settings, lambda name: _logger.info("gathering the tokens of features", source=name)
        )
        if embeddings.missing(session):
            embeddings.queue(session, settings)
    engine.dispose()
    supervisor = Supervisor(children(settings), environment(settings), log_dir)
    with lock, _address_written(settings), _signals(supervisor):
        return supervisor.run(lambda: announce(settings, supervisor.children), settings)


def environment(settings: Settings) -> dict[str, str]:
    """Return the environment that gives a child these settings."""
    given = {f"SAE_ATLAS_{name.upper()}": str(getattr(settings, name)) for name in settings.model_fields_set}
    return {**os.environ, **given, "PYTHONUNBUFFERED": "1"}


class Supervisor:
    """Keeps children alive. One thread starts them: the kernel ties a child's life to the thread that started it."""

    def __init__(self, children: list[Child], environment: dict[str, str], log_dir: Path | None) -> None:
        self.children = children
        self._environment = environment
        self._log_dir = log_dir
        self._stopping = 0

    def run(self, announce: Callable[[], None], settings: Settings) -> int:
        announced = False
        for child in self.children:
            if child.pulse is not None:
                child.pulse.watch()
        try:
            while not self._stopping:
                for child in self.children:
                    self._tend(child)
                if not announced and answers(settings):
                    announced = True
                    announce()
                time.sleep(0.1)
        finally:
            self._stop_all()
        return 0

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Handle a signal: once is an orderly stop, twice kills."""
        self._stopping += 1

    def _tend(self, child: Child) -> None:
        if child.alive:
            self._end_if_stuck(child)
            return
        if child.process is not None:
            self._bury(child)
        if time.monotonic() >= child.start_at:
            self._start(child)

    def _end_if_stuck(self, child: Child) -> None:
        if child.process is None or child.pulse is None or not child.pulse.stuck:
            return
        _logger.error("process does not answer; killing it", name=child.name, silences=MAX_SILENCES)
        # SIGKILL ends a stopped process too; the next round finds it dead and starts it again.
        _kill_group(child.process, signal.SIGKILL)
        child.pulse.begin()

    def _bury(self, child: Child) -> None:
        assert child.process is not None
        ran = time.monotonic() - child.started_at
        child.deaths = 0 if ran > _CALM_SECONDS else child.deaths + 1
        delay = min(0.5 * 2 ** max(child.deaths - 1, 0), _MAX_DELAY_SECONDS) if child.deaths else 0.0
        _kill_group(child.process, signal.SIGKILL)
        _logger.warning("process ended; starting it again", name=child.name, code=child.process.returncode, in_s=delay)
        child.process = None
        child.start_at = time.monotonic() + delay

    def _start(self, child: Child) -> None:
        if self._log_dir is not None and child.log is None:
            self._log_dir.mkdir(parents=True, exist_ok=True)
            child.log = _opened_log(self._log_dir / f"{child.name}.log")
        child.started_at = time.monotonic()
        if child.pulse is not None:
            child.pulse.begin()
        child.process = subprocess.Popen(
            child.command,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=child.log,
            stderr=child.log,
            start_new_session=True,
            preexec_fn=_die_with_parent(),
        )

    def _stop_all(self) -> None:
        """Ask all at once, wait for the deadline or a second signal, then kill what is left with all it started."""
        running = [child.process for child in self.children if child.process is not None]
        for process in running:
            _kill_group(process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while any(p.poll() is None for p in running) and time.monotonic() < deadline and self._stopping < 2:
            time.sleep(0.05)
        for process in running:
            _kill_group(process, signal.SIGKILL)
            process.wait()


def answers(settings: Settings) -> bool:
    """Tell whether this server's web process answers."""
    connection = http.client.HTTPConnection(_reachable(settings.host), settings.port, timeout=1)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _says_status(path: Path) -> bool:
    connection = _UnixConnection(path, PROBE_SECONDS)
    try:
        connection.request("GET", "/status")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("worker", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _reachable(host: str) -> str:
    """Return where this machine reaches a server that binds an address: one that binds all is on loopback too."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104


def url(settings: Settings) -> str:
    if settings.public_url:
        return settings.public_url.rstrip("/")
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


def check_address(settings: Settings) -> Settings:
    """Return the settings with a port that is free, port 0 replaced. Raises BadInput or Conflict with what to do."""
    if settings.team:
        _check_team(settings)
    elif not _is_loopback(settings.host):
        raise BadInput(
            f"{settings.host} is not a loopback address, and without accounts SAE Atlas serves this machine only. For "
            "a team set SAE_ATLAS_TEAM=1 and SAE_ATLAS_PUBLIC_URL, and run `sae-atlas user invite --role admin`. "
            "For you alone use 127.0.0.1, and ssh -L 3000:127.0.0.1:3000 to reach it from elsewhere."
        )
    if settings.otel_endpoint and find_spec("opentelemetry") is None:
        raise BadInput(
            "Traces need OpenTelemetry. Run: pip install 'sae-atlas[otel]', or unset SAE_ATLAS_OTEL_ENDPOINT."
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise Conflict(
                f"Port {settings.port} on {settings.host} cannot be used ({error.strerror}). "
                f"Choose another: --port {settings.port + 1}, or PORT={settings.port + 1} with make."
            ) from None
        port = probe.getsockname()[1]
    # A copy keeps model_fields_set, from which the children's environment is made.
    return settings.model_copy(update={"port": port})


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_team(settings: Settings) -> None:
    """Raise BadInput unless people can reach the server by one address, which https protects beyond this machine."""
    public = urlsplit(settings.public_url)
    if public.scheme not in ("http", "https") or not public.hostname or public.path.strip("/"):
        raise BadInput(
            f"Team mode needs SAE_ATLAS_PUBLIC_URL, the address that people open, such as https://atlas.example.org; "
            f"it is {settings.public_url[:200]!r}."
        )
    if public.scheme == "http" and not _is_loopback(public.hostname) and not _is_private(public.hostname):
        raise BadInput(
            f"{settings.public_url[:200]} would send passwords in the clear. Put a proxy with TLS in front "
            "(docker-compose.yml has one) and give its https address."
        )
    _check_sign_in(settings)


def _check_sign_in(settings: Settings) -> None:
    """Raise BadInput for a provider or a proxy header that would not work, or would let anybody in."""
    issuer = urlsplit(settings.oidc_issuer)
    if settings.oidc_issuer:
        if issuer.scheme != "https" and not (issuer.scheme == "http" and _is_loopback(issuer.hostname or "")):
            raise BadInput(f"SAE_ATLAS_OIDC_ISSUER is an https address; it is {settings.oidc_issuer[:200]!r}.")
        if not settings.oidc_client_id:
            raise BadInput("SAE_ATLAS_OIDC_ISSUER needs SAE_ATLAS_OIDC_CLIENT_ID, what the provider calls this server.")
        if find_spec("authlib") is None or find_spec("httpx2") is None:
            raise BadInput("Signing in at a provider needs Authlib. Run: pip install 'sae-atlas[oidc]'")
    if settings.proxy_user_header:
        parts = [part.strip() for part in settings.trusted_proxies.split(",")]
        for part in parts:
            try:
                ipaddress.ip_network(part, strict=False)
            except ValueError:
                raise BadInput(
                    "SAE_ATLAS_PROXY_USER_HEADER lets in whom a trusted proxy names, so SAE_ATLAS_TRUSTED_PROXIES must "
                    f"be addresses or networks; one is {part[:80]!r}."
                ) from None


def _is_private(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def served_address(settings: Settings) -> Settings:
    """Return the settings with host and port where this data directory is served now; as given when it is not."""
    try:
        with hold(settings):
            return settings
    except Conflict:
        pass
    try:
        host, port = _address_file(settings).read_text().split()
        return settings.model_copy(update={"host": host, "port": int(port)})
    except (OSError, ValueError):
        # Served by a supervisor that has not written it yet.
        return settings


def _address_file(settings: Settings) -> Path:
    return settings.data_dir / "run" / "address"


@contextlib.contextmanager
def _address_written(settings: Settings) -> Generator[None]:
    file = _address_file(settings)
    file.write_text(f"{settings.host} {settings.port}\n")
    try:
        yield
    finally:
        file.unlink(missing_ok=True)


def hold(settings: Settings) -> IO[str]:
    """Hold the data directory's supervisor lock: a second set of processes would fight over socket and slot."""
    return lockfile.hold(
        settings.data_dir / "run" / "serve.lock",
        f"SAE Atlas runs already on {settings.data_dir}. Stop it first, or set another SAE_ATLAS_DATA_DIR.",
    )


def _die_with_parent() -> Callable[[], None] | None:
    """Return what a child runs before exec so that it dies with this process; None where there is no prctl."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _kill_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _opened_log(path: Path) -> IO[bytes]:
    """Open a log to append to; one beyond 10 MB starts anew, with the old one kept beside it."""
    if path.exists() and path.stat().st_size > 10_000_000:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


@contextlib.contextmanager
def _signals(supervisor: Supervisor) -> Generator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, supervisor.stop) for number in numbers}
    structlog.contextvars.bind_contextvars(process="supervisor")
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
