"""Passwords and secrets: argon2id hashes, random tokens and what is kept of them. No database. No HTTP."""

from __future__ import annotations

import hashlib
import secrets
import threading

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from app.errors import BadInput, Busy

MIN_PASSWORD, MAX_PASSWORD = 10, 1000
_hasher = PasswordHasher(time_cost=3, memory_cost=65_536, parallelism=4)
_room = threading.BoundedSemaphore(4)
"""A hash takes 64 MiB and a tenth of a second: a crowd of logins must not take the machine."""
_WAIT_SECONDS = 10.0
_NOBODY = _hasher.hash(secrets.token_hex(16))


def hash_password(password: str) -> str:
    """Return the argon2id hash of a new password. Raises BadInput when it is too short or too long."""
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise BadInput(
            f"A password has {MIN_PASSWORD} to {MAX_PASSWORD:,} characters; this one has {len(password):,}. "
            "Four random words are a good one."
        )
    with _Slot():
        return _hasher.hash(_encodable(password))


def fits(password: str, password_hash: str | None) -> bool:
    """Tell whether a password is right. Takes as long for a person who does not exist (None)."""
    if len(password) > MAX_PASSWORD:
        return False
    with _Slot():
        try:
            return _hasher.verify(password_hash or _NOBODY, _encodable(password)) and password_hash is not None
        except (VerificationError, InvalidHashError):
            return False


def new_secret(prefix: str = "") -> str:
    """Return 256 random bits for a link, cookie or key."""
    return prefix + secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """Return what is stored of a secret. No salt and no cost: it has 256 random bits."""
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def _encodable(password: str) -> bytes:
    return password.encode("utf-8", "surrogatepass")


class _Slot:
    def __enter__(self) -> None:
        if not _room.acquire(timeout=_WAIT_SECONDS):
            raise Busy("Many people sign in at this moment. Try again.", retry_after=5)

    def __exit__(self, *_: object) -> None:
        _room.release()
