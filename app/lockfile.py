"""Locks that processes hold by an open file: given back by the system when their holder ends, however it ends."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

from app.errors import Conflict

_PAUSE_SECONDS = 0.02


def hold(path: Path, taken: str, seconds: float = 0) -> IO[str]:
    """Lock a file until it is closed, waiting some seconds for it.

    Raises Conflict with the sentence `taken` when another holder keeps it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w")
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() >= deadline:
                lock.close()
                raise Conflict(taken) from None
            time.sleep(_PAUSE_SECONDS)
