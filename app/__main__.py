"""`python -m app`: the web server alone. `sae-atlas serve` starts it with the gpu worker and the trainer."""

from __future__ import annotations

import sys

import uvicorn

from app import log, supervisor
from app.errors import AtlasError
from app.main import create_app
from app.settings import Settings


def main() -> None:
    try:
        settings = supervisor.check_address(Settings())
    except AtlasError as error:
        sys.exit(error.message)
    log.configure(settings, "web")
    # Streams (steering, progress) last as long as their client; stopping must not wait for them.
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=3,
        # app.web.proxy reads them, and keeps who really connected.
        proxy_headers=False,
    )


if __name__ == "__main__":
    main()
