"""What opens a server without accounts to its one person: links that work once, a browser's cookie, an API token.

All lies in the data directory, readable by its owner alone. No database: `sae-atlas url` works whatever its state.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import time
from pathlib import Path

from app.settings import Settings

LINK_HOURS = 24
KEY_PREFIX = "atlas_"


def new_link(settings: Settings) -> str:
    """Return the secret of a link that opens the server in one browser, within a day."""
    directory = _links(settings)
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    for old in directory.iterdir():
        if old.stat().st_mtime < time.time() - LINK_HOURS * 3600:
            old.unlink(missing_ok=True)
    secret = secrets.token_urlsafe(32)
    (directory / _digest(secret)).touch(mode=0o600)
    return secret


def use_link(settings: Settings, secret: str) -> bool:
    """Tell whether a link opens the server; no second time. Of two at the same moment one deletes the file."""
    file = _links(settings) / _digest(secret)
    try:
        fresh = file.stat().st_mtime >= time.time() - LINK_HOURS * 3600
        file.unlink()
    except FileNotFoundError:
        return False
    return fresh


def api_token(settings: Settings) -> str:
    """Return what programs send in the header x-api-key. The same until `renew`."""
    return KEY_PREFIX + _derived(settings, b"api")


def cookie(settings: Settings) -> str:
    """Return what a browser keeps that opened a link."""
    return _derived(settings, b"browser")


def fits(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


def renew(settings: Settings) -> None:
    """End the API token, all browsers' cookies and all links there are."""
    _key_file(settings).unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        for link in _links(settings).iterdir():
            link.unlink(missing_ok=True)


def _derived(settings: Settings, purpose: bytes) -> str:
    return hmac.new(_key(settings), purpose, hashlib.sha256).hexdigest()


def _key(settings: Settings) -> bytes:
    file = _key_file(settings)
    try:
        return file.read_bytes()
    except FileNotFoundError:
        pass
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_name(f".{file.name}-{secrets.token_hex(8)}")
    with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(secrets.token_bytes(32))
    try:
        # A link fails where the name exists, so that two processes at once end up with one key, whole.
        with contextlib.suppress(FileExistsError):
            os.link(scratch, file)
    finally:
        scratch.unlink()
    return file.read_bytes()


def _key_file(settings: Settings) -> Path:
    return settings.data_dir / "run" / "local.key"


def _links(settings: Settings) -> Path:
    return settings.data_dir / "run" / "links"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()
