"""`python -m workers.trainer`: run durable jobs until told to stop. One process per GPU, numbered by SAE_ATLAS_SLOT."""

from __future__ import annotations

import os
import signal
import sys
from threading import Event

from app import log
from app.errors import AtlasError
from app.settings import Settings
from workers.memory import keep_freed_memory
from workers.trainer import executor


def main() -> None:
    """Serve, then leave at once.

    A step may be in the middle of its work in a dbos thread; waiting for it could take half a minute, and the next
    trainer repeats it anyway.
    """
    code = _serve()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> int:
    keep_freed_memory()
    settings = Settings()
    log.configure(settings, "trainer")
    stop = Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda _number, _frame: stop.set())
    try:
        executor.serve(settings, stop)
    except AtlasError as error:
        print(error.message, file=sys.stderr)  # noqa: T201 - the one sentence for whoever started this by hand
        return 2
    return 0


if __name__ == "__main__":
    main()
