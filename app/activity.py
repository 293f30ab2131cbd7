"""What people did lately: only what the reader of the session may see, with where it leads.

What somebody made is read from its own table, which holds its owner and is narrowed like any other statement; changes
to what was there are read from the audit log, deletions from the trash.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import Select, select, tuple_
from sqlalchemy.orm import Session

from app import lists, visibility
from app.people import Actor
from app.tables import AuditEntry, Corpus, FeatureList, Job, Source, SteeringRun, SteeringVector, Trash

Wanted = TypeVar("Wanted", bound=Select[*tuple[Any, ...]])
PAGE = 50
_LOOKED_AT = 1_000
"""Entries of the log and of the trash that one page looks at for PAGE that it may show."""

_WORDS: dict[str, tuple[str, str]] = {
    "POST /{model}/{source}/card": ("SAE", "said what it is:"),
    "POST /{model}/{source}/{index}/explanations": ("explanation", "explained"),
    "POST /{model}/{source}/{index}/explanations/{number}/{act}": ("explanation", "judged an explanation of"),
    "POST /jobs/{job_id}/cancel": ("job", "cancelled"),
    "POST /jobs/{job_id}/pause": ("job", "paused"),
    "POST /jobs/{job_id}/resume": ("job", "resumed"),
    "POST /lists/{list_id}/edit": ("list", "changed"),
    "POST /lists/{list_id}/features": ("list", "added to"),
    "POST /lists/{list_id}/change": ("list", "changed"),
    "POST /comments": ("comment", "commented on"),
    "POST /comment/new": ("comment", "commented on"),
    "POST /explanation/new": ("explanation", "explained"),
    "POST /list/add-features": ("list", "added to"),
}
"""Kind and words by the log's action; what is not here is an admin's to read at /audit."""
_JOBS = {"train": "training", "harvest": "harvest", "import": "import"}
"""Kinds by the kind of a job; others are jobs."""
KINDS = ("SAE", "training", "harvest", "import", "text", "vector", "list", "explanation", "comment", "job", "deletion")


@dataclass(frozen=True)
class Done:
    """Something that somebody did."""

    when: datetime
    who: str
    kind: str
    words: str
    what: str
    href: str
    """Empty for what is gone."""

    @property
    def at(self) -> str:
        return f"{self.when:%Y-%m-%d %H:%M}"


@dataclass(frozen=True)
class Asked:
    """Which part of the past a page shows."""

    by: str = ""
    kind: str = ""
    before: datetime | None = None

    def of(self, *kinds: str) -> bool:
        return self.kind in ("", *kinds)

    def narrow(self, wanted: Wanted, who: Any, at: Any) -> Wanted:
        if self.by:
            wanted = wanted.where(who == self.by)
        return wanted.where(at < self.before) if self.before is not None else wanted


def done(
    session: Session, who: Actor, by: str = "", kind: str = "", before: int | None = None
) -> tuple[list[Done], int]:
    """Return what people did, latest first, and the microsecond to go on before; 0 at the end."""
    start = datetime(1970, 1, 1, tzinfo=UTC)
    asked = Asked(by.strip().lower(), kind, start + timedelta(microseconds=before) if before is not None else None)
    found: list[Done] = []
    reached: list[datetime] = []
    """How far back each kind was looked at, where there is more."""
    for read in (_changed, _deleted, _jobs, _sources, _corpora, _vectors, _lists):
        entries, until = read(session, who, asked)
        found += entries
        reached += [until] if until is not None else []
    # Before the latest of these something may be missing that another page shows in its place.
    oldest = max(reached, default=None)
    shown = sorted((d for d in found if oldest is None or d.when >= oldest), key=lambda d: d.when, reverse=True)
    if len(shown) > PAGE:
        shown, oldest = shown[:PAGE], shown[PAGE - 1].when
    return shown, (oldest - start) // timedelta(microseconds=1) if oldest is not None else 0


Part = tuple[list[Done], datetime | None]
"""What was found, and the time of the last entry looked at where there may be earlier ones."""


def _changed(session: Session, who: Actor, asked: Asked) -> Part:
    actions = [action for action, (of, _) in _WORDS.items() if asked.of(of)]
    wanted = select(AuditEntry).where(AuditEntry.action.in_(actions)).order_by(AuditEntry.id.desc()).limit(_LOOKED_AT)
    entries = session.scalars(asked.narrow(wanted, AuditEntry.who, AuditEntry.at)).all()
    seen = _seen(session, who, entries)
    found: list[Done] = []
    for entry in entries:
        target = _target(entry.path, seen)
        if target is not None:
            found.append(Done(entry.at, entry.who, *_WORDS[entry.action], *target))
    return found, entries[-1].at if len(entries) == _LOOKED_AT else None


def _deleted(session: Session, who: Actor, asked: Asked) -> Part:
    if not asked.of("deletion"):
        return [], None
    wanted = select(Trash).order_by(Trash.id.desc()).limit(_LOOKED_AT)
    entries = session.scalars(asked.narrow(wanted, Trash.deleted_by, Trash.deleted_at)).all()
    ids = [entry.id for entry in entries]
    shown: set[int | None] = set()
    with visibility.with_trash(session):
        for table in (Source, Corpus, SteeringRun, SteeringVector):
            shown.update(session.scalars(select(table.trash_id).where(table.trash_id.in_(ids))))
        of_lists = select(FeatureList.trash_id).where(FeatureList.trash_id.in_(ids), lists.shared_with(who))
        shown.update(session.scalars(of_lists))
    found = [
        Done(t.deleted_at, t.deleted_by, "deletion", f"deleted the {_TRASHED.get(t.kind, t.kind)}", t.name, "")
        for t in entries
        if t.id in shown
    ]
    return found, entries[-1].deleted_at if len(entries) == _LOOKED_AT else None


_TRASHED = {"sae": "SAE", "run": "steering run"}


def _jobs(session: Session, who: Actor, asked: Asked) -> Part:
    if not asked.of("job", *_JOBS.values()):
        return [], None
    wanted = select(Job.created_at, Job.owner, Job.kind, Job.title, Job.id).order_by(Job.id.desc())
    if asked.kind == "job":
        wanted = wanted.where(Job.kind.not_in(_JOBS))
    elif asked.kind:
        wanted = wanted.where(Job.kind.in_([kind for kind, words in _JOBS.items() if words == asked.kind]))
    wanted = asked.narrow(wanted, Job.owner, Job.created_at).limit(PAGE)
    return _page(
        Done(at, owner, _JOBS.get(kind, "job"), "queued", title, f"/jobs/{number}")
        for at, owner, kind, title, number in session.execute(wanted)
    )


def _sources(session: Session, who: Actor, asked: Asked) -> Part:
    if not asked.of("SAE"):
        return [], None
    wanted = select(Source.created_at, Source.owner, Source.model_id + "/" + Source.name).order_by(
        Source.created_at.desc()
    )
    wanted = asked.narrow(wanted, Source.owner, Source.created_at).limit(PAGE)
    return _page(Done(at, owner, "SAE", "added", place, f"/{place}") for at, owner, place in session.execute(wanted))


def _corpora(session: Session, who: Actor, asked: Asked) -> Part:
    if not asked.of("text"):
        return [], None
    wanted = select(Corpus.created_at, Corpus.owner, Corpus.name).order_by(Corpus.created_at.desc())
    wanted = asked.narrow(wanted, Corpus.owner, Corpus.created_at).limit(PAGE)
    return _page(
        Done(at, owner, "text", "added the corpus", name, f"/corpora/{quote(name)}")
        for at, owner, name in session.execute(wanted)
    )


def _vectors(session: Session, who: Actor, asked: Asked) -> Part:
    if not asked.of("vector"):
        return [], None
    wanted = select(SteeringVector.created_at, SteeringVector.owner, SteeringVector.label, SteeringVector.id)
    wanted = asked.narrow(wanted, SteeringVector.owner, SteeringVector.created_at)
    return _page(
        Done(at, owner, "vector", "made the vector", label, f"/vectors/{number}")
        for at, owner, label, number in session.execute(wanted.order_by(SteeringVector.id.desc()).limit(PAGE))
    )


def _lists(session: Session, who: Actor, asked: Asked) -> Part:
    if not asked.of("list"):
        return [], None
    wanted = select(FeatureList.created_at, FeatureList.owner, FeatureList.name, FeatureList.id)
    wanted = asked.narrow(wanted.where(lists.shared_with(who)), FeatureList.owner, FeatureList.created_at)
    return _page(
        Done(at, owner, "list", "made the list", name, f"/lists/{key}")
        for at, owner, name, key in session.execute(wanted.order_by(FeatureList.created_at.desc()).limit(PAGE))
    )


def _page(found: Iterable[Done]) -> Part:
    entries = list(found)
    return entries, entries[-1].when if len(entries) == PAGE else None


@dataclass(frozen=True)
class Seen:
    """What of the entries at hand the reader may see."""

    sources: frozenset[tuple[str, str]]
    jobs: dict[int, str]
    lists: dict[str, str]


def _seen(session: Session, who: Actor, entries: Sequence[AuditEntry]) -> Seen:
    parts = [entry.path.strip("/").split("/") for entry in entries]
    numbers = {int(p[1]) for p in parts if p[0] == "jobs" and re.fullmatch(r"[0-9]{1,9}", p[1])}
    ids = {p[1][:32] for p in parts if p[0] == "lists"}
    places = {(p[0], p[1]) for p in parts if p[0] not in ("jobs", "lists")}
    sources = select(Source.model_id, Source.name).where(tuple_(Source.model_id, Source.name).in_(places))
    shown = select(FeatureList.id, FeatureList.name).where(FeatureList.id.in_(ids), lists.shared_with(who))
    return Seen(
        frozenset((row[0], row[1]) for row in session.execute(sources)),
        {row[0]: row[1] for row in session.execute(select(Job.id, Job.title).where(Job.id.in_(numbers)))},
        {row[0]: row[1] for row in session.execute(shown)},
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
    whole = "/".join(parts[:3] if len(parts) > 2 and parts[2].isdigit() else parts[:2])
    return whole, f"/{whole}"
