"""Verbs on what was deleted: it stays where it is, hidden, for 30 days, and comes back as it was. The caller commits.

A hidden row has the number of its entry in `trash_id`; visibility.narrow leaves such rows out of every statement. A
name that must be unique is freed at once, and given back by restoring unless somebody has taken it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from app import corpora, harvests, lists, log, visibility
from app.errors import AtlasError, Conflict, NotFound
from app.people import Actor, Role
from app.settings import Settings
from app.tables import Corpus, FeatureList, Source, SteeringRun, SteeringVector, Trash, now

DAYS = 30
Kind = Literal["sae", "corpus", "list", "run", "vector"]
Item = Source | Corpus | FeatureList | SteeringRun | SteeringVector
_TABLES: dict[str, type[Item]] = {
    "sae": Source,
    "corpus": Corpus,
    "list": FeatureList,
    "run": SteeringRun,
    "vector": SteeringVector,
}
_logger = log.get(__name__)


@dataclass(frozen=True)
class Entry:
    """Something in the trash."""

    id: int
    kind: str
    name: str
    owner: str
    deleted_by: str
    deleted: str
    days_left: int


def put(session: Session, who: Actor, item: Item) -> Trash:
    """Move something to the trash. Whether that person may is the caller's to check."""
    kind = next(kind for kind, table in _TABLES.items() if isinstance(item, table))
    entry = Trash(
        kind=kind,
        key=str(item.id),
        name=_name(item)[:200],
        owner=getattr(item, "owner", "") or "",
        deleted_by=who.name,
        details={},
    )
    session.add(entry)
    session.flush()
    item.trash_id = entry.id
    if isinstance(item, Source | Corpus):
        entry.details = {"name": item.name}
        item.name = f"{item.name[:180]}~{entry.id}"  # no address has a ~: the name is free
    if isinstance(item, Source) and item.is_default:
        entry.details = {**entry.details, "default_instead_of": _hand_default_on(session, item)}
    session.flush()
    return entry


def put_corpus(session: Session, who: Actor, name: str) -> Trash:
    """Move a corpus to the trash. Raises Conflict naming the SAEs whose evidence shows it, those in the trash too."""
    corpus = corpora.corpus_named(session, name)
    corpora.check_unused(session, corpus)
    return put(session, who, corpus)


def entries(session: Session, who: Actor) -> list[Entry]:
    """Return what somebody can restore, latest first: their own, what they deleted, an admin everything."""
    wanted = select(Trash).order_by(Trash.id.desc()).limit(1000)
    if who.id is not None and who.role != Role.ADMIN:
        wanted = wanted.where(or_(Trash.owner == who.name, Trash.deleted_by == who.name))
    return [
        Entry(
            t.id,
            t.kind,
            t.name,
            t.owner,
            t.deleted_by,
            f"{t.deleted_at:%Y-%m-%d %H:%M}",
            max((t.deleted_at + timedelta(days=DAYS) - now()).days, 0),
        )
        for t in session.scalars(wanted)
    ]


def restore(session: Session, who: Actor, entry_id: int) -> Item:
    """Give something back as it was. Raises NotFound, and Conflict where its name is taken by now."""
    entry = session.get(Trash, entry_id) if 0 < entry_id < 2**31 else None
    # What somebody may not restore is not named to them either: it may be private.
    if entry is None or not (who.name == entry.deleted_by or visibility.may_change(who, entry.owner)):
        raise NotFound(
            f"There is nothing {entry_id} in your trash; it was restored, is gone for good, or is another's."
        )
    with visibility.unlimited(session, trash=True):
        item = session.get_one(_TABLES[entry.kind], int(entry.key) if entry.key.isdigit() else entry.key)
        name = entry.details.get("name")
        if isinstance(item, Source | Corpus) and isinstance(name, str):
            _check_free(session, item, name)
            item.name = name
        if isinstance(item, Source) and "default_instead_of" in entry.details:
            _take_default_back(session, item, entry.details["default_instead_of"])
        item.trash_id = None
        session.flush()
        session.delete(entry)
        session.flush()
    return item


def purge(session: Session, settings: Settings, older_than: timedelta = timedelta(days=DAYS)) -> int:
    """Delete for good what has lain in the trash for longer, each in a transaction of its own; return how many."""
    due = session.scalars(select(Trash.id).where(Trash.deleted_at <= now() - older_than).order_by(Trash.id)).all()
    session.rollback()
    gone = 0
    for entry_id in due:
        try:
            with visibility.unlimited(session, trash=True):
                after = _delete(session, settings, entry_id)
                session.commit()
            after()
            gone += 1
        except AtlasError as error:  # the next time round may have more luck
            session.rollback()
            _logger.warning("something stays in the trash", entry=entry_id, why=error.message)
    return gone


def _delete(session: Session, settings: Settings, entry_id: int) -> Callable[[], Any]:
    """Delete an entry with what it names; return what is to be done after the commit."""
    entry = session.get(Trash, entry_id)
    if entry is None:  # another process was here
        return lambda: None
    kind, key = entry.kind, entry.key
    item = session.get(_TABLES[kind], int(key) if key.isdigit() else key)
    after: Callable[[], Any] = lambda: None  # noqa: E731
    if isinstance(item, Source):
        harvests.remove_source(session, settings, item.model_id, item.name)
    elif isinstance(item, Corpus):
        left = corpora.remove_corpus(session, settings, item.name)
        after = lambda: corpora.delete_files(left)  # noqa: E731
    elif isinstance(item, FeatureList):
        lists.remove(session, item)
    elif item is not None:
        session.delete(item)
    session.flush()
    if (entry := session.get(Trash, entry_id)) is not None:  # removing an SAE begins a transaction of its own
        session.delete(entry)
    session.flush()
    return after


def path(item: Item) -> str:
    """Return where something is shown once it is back."""
    if isinstance(item, Corpus):
        return f"/corpora/{item.name}"
    if isinstance(item, FeatureList):
        return f"/lists/{item.id}"
    return visibility.path(item)


def _name(item: Item) -> str:
    if isinstance(item, Source):
        return f"{item.model_id}/{item.name}"
    if isinstance(item, SteeringRun):
        return f"run of {item.model_id}: {str(item.request.get('prompt') or 'a conversation')[:80]}"
    if isinstance(item, SteeringVector):
        return item.label
    return item.name


def _hand_default_on(session: Session, source: Source) -> int | None:
    """Let another SAE of the layer be where its address leads; return which."""
    source.is_default = False
    session.flush()
    with visibility.unlimited(session):
        there = select(Source).where(Source.model_id == source.model_id, Source.layer == source.layer)
        heir = session.scalars(there.where(Source.id != source.id).order_by(Source.id).limit(1)).first()
    if heir is None or heir.is_default:
        return None
    heir.is_default = True
    return heir.id


def _take_default_back(session: Session, source: Source, heir_id: int | None) -> None:
    heir = session.get(Source, heir_id) if heir_id is not None else None
    there = select(Source.id).where(
        Source.model_id == source.model_id, Source.layer == source.layer, Source.is_default, Source.trash_id.is_(None)
    )
    if heir is not None and heir.is_default and heir.trash_id is None:
        heir.is_default = False
        source.is_default = True
    elif session.scalar(there.limit(1)) is None:
        source.is_default = True


def _check_free(session: Session, item: Source | Corpus, name: str) -> None:
    if isinstance(item, Source):
        taken = select(Source.id).where(Source.model_id == item.model_id, Source.name == name)
        shown = f"{item.model_id}/{name}"
    else:
        taken, shown = select(Corpus.id).where(Corpus.name == name), name
    if session.scalar(taken.limit(1)) is not None:
        raise Conflict(
            f"Another is called {shown} by now. Delete that first: it goes to the trash, and this comes back."
        )
