"""Verbs on what people say of an SAE: tags, description, newer version, stars, and who looked. The caller commits.

A look and a use are counted once for a person, an SAE and a day.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from app import catalog, visibility
from app.catalog import SourceCard, like
from app.errors import BadInput
from app.people import Actor
from app.tables import Source, SourceStar, SourceTag, SourceVisit

MAX_TAGS, MAX_DESCRIPTION, MAX_WORDS = 20, 20_000, 12
_TAG = re.compile(r"[a-z0-9][a-z0-9._+-]{0,39}")
Visit = Literal["view", "use"]


@dataclass(frozen=True)
class Note:
    """What a table of SAEs shows of one beside its numbers."""

    tags: tuple[str, ...] = ()
    n_stars: int = 0
    starred: bool = False
    """By whoever looks."""


@dataclass(frozen=True)
class Card:
    """What people say of an SAE, and how many looked at and used it."""

    note: Note
    replaces: tuple[SourceCard, ...]
    """Earlier versions."""
    replaced_by: SourceCard | None
    n_viewers: int
    n_users: int


@dataclass(frozen=True)
class Chosen:
    """Which SAEs a table shows."""

    tag: str = ""
    owner: str = ""
    starred: bool = False

    @property
    def any(self) -> bool:
        return bool(self.tag or self.owner or self.starred)


@dataclass(frozen=True)
class Shelf:
    """SAEs with what is said of them, and what they can be chosen by."""

    notes: Mapping[int, Note] = field(default_factory=dict[int, Note])
    tags: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    chosen: Chosen = Chosen()

    def note(self, source: SourceCard) -> Note:
        return self.notes.get(source.id, _NONE)

    def shows(self, source: SourceCard) -> bool:
        note, chosen = self.note(source), self.chosen
        return (
            (not chosen.tag or chosen.tag in note.tags)
            and (not chosen.owner or chosen.owner == source.owner)
            and (not chosen.starred or note.starred)
        )


_NONE = Note()


def shelf(session: Session, who: Actor | None, sources: Sequence[SourceCard], chosen: Chosen) -> Shelf:
    """Return what is said of SAEs, in two queries."""
    found = notes(session, who, [source.id for source in sources])
    tags = sorted({tag for note in found.values() for tag in note.tags})
    owners = sorted({source.owner for source in sources if source.owner})
    return Shelf(found, tuple(tags), tuple(owners), chosen)


def notes(session: Session, who: Actor | None, ids: Collection[int]) -> dict[int, Note]:
    """Return tags and stars of SAEs; those without any are left out."""
    tags: dict[int, list[str]] = {}
    tagged = select(SourceTag.source_id, SourceTag.tag).where(SourceTag.source_id.in_(ids)).order_by(SourceTag.tag)
    for source_id, tag in session.execute(tagged):
        tags.setdefault(source_id, []).append(tag)
    stars: dict[int, set[str]] = {}
    for source_id, name in session.execute(
        select(SourceStar.source_id, SourceStar.who).where(SourceStar.source_id.in_(ids))
    ):
        stars.setdefault(source_id, set()).add(name)
    mine = who.name if who is not None else ""
    return {
        key: Note(tuple(tags.get(key, ())), len(stars.get(key, ())), mine in stars.get(key, ()))
        for key in {*tags, *stars}
    }


def card(session: Session, who: Actor | None, source: SourceCard) -> Card:
    counted = select(SourceVisit.kind, func.count(func.distinct(SourceVisit.who))).where(
        SourceVisit.source_id == source.id
    )
    visits = {row[0]: int(row[1]) for row in session.execute(counted.group_by(SourceVisit.kind))}
    versions = session.scalars(
        select(Source).where(
            Source.model_id == source.model_id,
            or_(Source.replaced_by == source.name, Source.name == (source.replaced_by or None)),
        )
    ).all()
    others = {version.name: catalog.card_of(version) for version in versions}
    return Card(
        note=notes(session, who, [source.id]).get(source.id, _NONE),
        replaces=tuple(other for name, other in sorted(others.items()) if name != source.replaced_by),
        replaced_by=others.get(source.replaced_by),
        n_viewers=visits.get("view", 0),
        n_users=visits.get("use", 0),
    )


def edit(session: Session, who: Actor, model_id: str, name: str, tags: str, description: str, replaced_by: str) -> None:
    """Say what an SAE is. Raises BadInput for what is too long or no tag, Forbidden for another's."""
    found = catalog.source_card(session, model_id, name)
    visibility.check_may_change(who, found.owner, f"{model_id}/{name}")
    if len(description) > MAX_DESCRIPTION:
        raise BadInput(f"The description has {len(description):,} characters; it may have {MAX_DESCRIPTION:,}.")
    source = session.get_one(Source, found.id)
    wanted = read_tags(tags)
    source.description = description.replace("\0", "").replace("\r\n", "\n").strip()
    source.replaced_by = _newer(session, found, replaced_by.strip())
    session.execute(delete(SourceTag).where(SourceTag.source_id == found.id))
    session.add_all(SourceTag(source_id=found.id, tag=tag) for tag in wanted)
    session.flush()


def read_tags(text: str) -> list[str]:
    """Return tags as they are kept: lower case, each once. Raises BadInput."""
    said = dict.fromkeys(part.strip().lower().replace(" ", "-") for part in text.replace("\n", ",").split(","))
    tags = [tag for tag in said if tag]
    if len(tags) > MAX_TAGS:
        raise BadInput(f"There are {len(tags):,} tags; an SAE has up to {MAX_TAGS}.")
    for tag in tags:
        if not _TAG.fullmatch(tag):
            raise BadInput(f"{tag[:60]!r} is no tag: it has 1 to 40 of a-z, 0-9, dot, dash, plus and underscore.")
    return tags


def tags_of(session: Session, source_id: int) -> list[str]:
    return list(session.scalars(select(SourceTag.tag).where(SourceTag.source_id == source_id).order_by(SourceTag.tag)))


def fill(session: Session, source: Source, description: str, tags: Sequence[str]) -> None:
    """Say of an SAE what a bundle says of it, where nobody has said anything yet."""
    source.description = source.description or description
    if not tags_of(session, source.id):
        session.add_all(SourceTag(source_id=source.id, tag=tag) for tag in read_tags(", ".join(tags)))
    session.flush()


def _newer(session: Session, source: SourceCard, name: str) -> str:
    """Return the name of the version that replaces an SAE. Raises BadInput where that leads back to it."""
    seen, at = {source.name}, name
    while at:
        if at in seen:
            raise BadInput(f"{name[:60]} cannot replace {source.name}: it is replaced by it already.")
        seen.add(at)
        at = catalog.source_card(session, source.model_id, at).replaced_by
    return name


def star(session: Session, who: Actor, source: SourceCard, on: bool) -> None:
    """Mark an SAE as one's own favourite, or no longer; twice is once."""
    held = session.get(SourceStar, (source.id, who.name))
    if on and held is None:
        session.add(SourceStar(source_id=source.id, who=who.name))
    elif not on and held is not None:
        session.delete(held)


def starred(session: Session, who: Actor, limit: int = 12) -> list[SourceCard]:
    """Return what somebody starred, latest first."""
    mine = select(Source).join(SourceStar, SourceStar.source_id == Source.id).where(SourceStar.who == who.name)
    return [catalog.card_of(s) for s in session.scalars(mine.order_by(SourceStar.created_at.desc()).limit(limit))]


def recent(session: Session, who: Actor, limit: int = 8) -> list[SourceCard]:
    """Return the SAEs that somebody looked at on the latest days."""
    latest = func.max(SourceVisit.day)
    mine = select(Source).join(SourceVisit, SourceVisit.source_id == Source.id).where(SourceVisit.who == who.name)
    ids = select(SourceVisit.source_id).join(Source, Source.id == SourceVisit.source_id)
    ids = ids.where(SourceVisit.who == who.name).group_by(SourceVisit.source_id)
    order = session.scalars(ids.order_by(latest.desc(), SourceVisit.source_id.desc()).limit(limit)).all()
    found = {s.id: catalog.card_of(s) for s in session.scalars(mine.where(Source.id.in_(order)))}
    return [found[key] for key in order if key in found]


def find(session: Session, query: str, limit: int = 20) -> list[SourceCard]:
    """Return SAEs whose name, tags or description hold every word, by name."""
    words = query.replace("\0", " ").split()[:MAX_WORDS]
    if not words:
        return []
    wanted = select(Source)
    for word in words:
        tagged = select(SourceTag.source_id).where(like(SourceTag.tag, word))
        wanted = wanted.where(or_(like(Source.name, word), like(Source.description, word), Source.id.in_(tagged)))
    return [catalog.card_of(s) for s in session.scalars(wanted.order_by(Source.model_id, Source.name).limit(limit))]


def today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"


def visit(session: Session, source_id: int, who: str, kind: Visit, day: str) -> None:
    """Count somebody's look at an SAE, or use of it, on a day; again on that day changes nothing."""
    if session.get(SourceVisit, (source_id, who, day, kind)) is None:
        session.add(SourceVisit(source_id=source_id, who=who, day=day, kind=kind))


def forget(session: Session, source_id: int) -> None:
    """Delete what was said of an SAE and who looked at it."""
    for table in (SourceTag, SourceStar, SourceVisit):
        session.execute(delete(table).where(table.source_id == source_id))
