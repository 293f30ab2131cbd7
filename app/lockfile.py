"""Locks that processes hold by an open file: given back by the system when their holder ends, however it ends."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from app.errors import Conflict


def hold(path: Path, taken: str) -> IO[str]:
    """Lock a file until it is closed. Raises Conflict with the sentence `taken` when another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise Conflict(taken) from None
    return lock
