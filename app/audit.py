"""Verbs on the audit log: who changed what, newest first. Takes a Session; the caller commits."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.tables import AuditEntry

PAGE = 100


def record(session: Session, who: str, key: bool, action: str, path: str, address: str) -> None:
    """Write down a change that was made."""
    entry = AuditEntry(who=who, key=key, action=action[:200], path=path[:500], address=address[:64])
    session.add(entry)


def entries(session: Session, who: str = "", about: str = "", before: int | None = None) -> Sequence[AuditEntry]:
    """Return changes, newest first: of one person, or whose address holds some words; those before an entry."""
    wanted = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(PAGE)
    if who:
        wanted = wanted.where(AuditEntry.who == who.strip().lower())
    if about:
        wanted = wanted.where(AuditEntry.path.contains(about.replace("\0", ""), autoescape=True))
    if before is not None:
        wanted = wanted.where(AuditEntry.id < before)
    return session.scalars(wanted).all()
