"""What people did lately, from the audit log: only what the reader of the session may see, with where it leads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from app import lists
from app.people import Actor
from app.tables import AuditEntry, FeatureList, Job, Source

PAGE = 50
_LOOKED_AT = 1_000
"""Entries of the log that one page looks at for PAGE that it may show."""

_WORDS: dict[str, tuple[str, str]] = {
    "POST /{model}/{source}/card": ("SAE", "said what it is:"),
    "POST /{model}/{source}/map": ("SAE", "had a map drawn of"),
    "POST /{model}/{source}/validate": ("SAE", "had a check made of"),
    "POST /{model}/{source}/{index}/explanations": ("explanation", "explained"),
    "POST /{model}/{source}/{index}/explanations/{number}/{act}": ("explanation", "judged an explanation of"),
    "POST /{model}/{source}/{index}/comments": ("comment", "commented on"),
    "POST /jobs/{job_id}/cancel": ("job", "cancelled"),
    "POST /jobs/{job_id}/pause": ("job", "paused"),
    "POST /jobs/{job_id}/resume": ("job", "resumed"),
    "POST /lists/{list_id}/edit": ("list", "changed"),
    "POST /lists/{list_id}/features": ("list", "added to"),
    "POST /lists/{list_id}/change": ("list", "changed"),
}
"""Kind and words by the log's action; what is not here is an admin's to read at /audit."""
KINDS = tuple(dict.fromkeys(kind for kind, _ in _WORDS.values()))


@dataclass(frozen=True)
class Done:
    """Something that somebody did."""

    at: str
    who: str
    kind: str
    words: str
    what: str
    href: str


@dataclass(frozen=True)
class Seen:
    """What of the entries at hand the reader may see."""

    sources: frozenset[tuple[str, str]]
    jobs: dict[int, str]
    lists: dict[str, str]


def done(
    session: Session, who: Actor, by: str = "", kind: str = "", before: int | None = None
) -> tuple[list[Done], int]:
    """Return what people did, latest first, and the number to go on before; 0 at the end."""
    actions = [action for action, (of, _) in _WORDS.items() if kind in ("", of)]
    wanted = select(AuditEntry).where(AuditEntry.action.in_(actions)).order_by(AuditEntry.id.desc()).limit(_LOOKED_AT)
    if by:
        wanted = wanted.where(AuditEntry.who == by.strip().lower())
    if before is not None:
        wanted = wanted.where(AuditEntry.id < before)
    entries = session.scalars(wanted).all()
    seen = _seen(session, who, entries)
    found: list[Done] = []
    for entry in entries:
        target = _target(entry.path, seen)
        if target is None:
            continue
        of, words = _WORDS[entry.action]
        found.append(Done(f"{entry.at:%Y-%m-%d %H:%M}", entry.who, of, words, *target))
        if len(found) == PAGE:
            return found, entry.id
    return found, entries[-1].id if len(entries) == _LOOKED_AT else 0


def _seen(session: Session, who: Actor, entries: Sequence[AuditEntry]) -> Seen:
    parts = [entry.path.strip("/").split("/") for entry in entries]
    numbers = {int(p[1]) for p in parts if p[0] == "jobs" and re.fullmatch(r"[0-9]{1,9}", p[1])}
    ids = {p[1][:32] for p in parts if p[0] == "lists"}
    places = {(p[0], p[1]) for p in parts if p[0] not in ("jobs", "lists")}
    sources = select(Source.model_id, Source.name).where(tuple_(Source.model_id, Source.name).in_(places))
    shown = session.scalars(select(FeatureList).where(FeatureList.id.in_(ids)))
    return Seen(
        frozenset((row[0], row[1]) for row in session.execute(sources)),
        {row[0]: row[1] for row in session.execute(select(Job.id, Job.title).where(Job.id.in_(numbers)))},
        {
            found.id: found.name
            for found in shown
            if found.visibility == lists.Visibility.TEAM or lists.may_change(who, found)
        },
    )


def _target(path: str, seen: Seen) -> tuple[str, str] | None:
    """Return the words for what was changed and its address; None for what the reader may not see."""
    parts = path.strip("/").split("/")
    if parts[0] == "jobs":
        title = seen.jobs.get(int(parts[1])) if parts[1].isdigit() else None
        return (title, f"/jobs/{parts[1]}") if title is not None else None
    if parts[0] == "lists":
        name = seen.lists.get(parts[1])
        return (name, f"/lists/{parts[1]}") if name is not None else None
    if (parts[0], parts[1]) not in seen.sources:
        return None
    whole = "/".join(parts[:3] if len(parts) > 3 else parts[:2])
    return whole, f"/{whole}"
