"""`python -m workers.gpu`: the gpu worker on its Unix socket, until SIGTERM or SIGINT."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType

import uvicorn

from app import log
from app.settings import Settings
from workers.gpu.lane import Lane
from workers.gpu.service import create_app, create_lane
from workers.memory import keep_freed_memory

STOP_SECONDS = 5
"""How long requests in progress may take after SIGTERM."""
MOST_STOP_SECONDS = 20
"""How long stopping may take altogether: a turn of the device is not interrupted."""


def main() -> None:
    keep_freed_memory()
    settings = Settings()
    log.configure(settings, "gpu")
    listener = listen(settings.socket_path)
    lane = create_lane(settings)
    config = uvicorn.Config(
        create_app(settings, lane), log_config=None, access_log=False, timeout_graceful_shutdown=STOP_SECONDS
    )
    server = uvicorn.Server(config)

    def stop(_number: int, _frame: FrameType | None) -> None:
        server.should_exit = True
        # Should anything hold the end up, all threads' stacks go to the log and the process ends all the same.
        faulthandler.dump_traceback_later(MOST_STOP_SECONDS, exit=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    serving = threading.Thread(target=_serve, args=(server, listener, lane), name="http")
    serving.start()
    try:
        lane.run()
        serving.join()
    finally:
        settings.socket_path.unlink(missing_ok=True)


def _serve(server: uvicorn.Server, listener: socket.socket, lane: Lane) -> None:
    try:
        server.run(sockets=[listener])
    finally:
        lane.stop()  # once more where the app never started


def listen(path: Path) -> socket.socket:
    """Bind the socket for its owner alone, in place of one that nobody answers any more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_socket():
        if _answers(path):
            sys.exit(f"A gpu worker is already answering on {path}. Stop it first.")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


if __name__ == "__main__":
    main()
