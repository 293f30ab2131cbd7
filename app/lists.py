"""Verbs on lists of features: made, filled, ordered, annotated, shared. Takes a Session; the caller commits."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, delete, func, or_, select, true
from sqlalchemy.orm import Session

from app import catalog, visibility
from app.catalog import FeatureRow, SourceCard
from app.errors import BadInput, Conflict, Forbidden, NotFound
from app.people import Actor
from app.tables import FeatureList, ListedFeature, now
from app.visibility import Visibility

MAX_LISTS = 2000
"""Of one person."""
MAX_FEATURES = 500
MAX_NAME, MAX_TEXT, MAX_NOTE = 200, 20_000, 5_000


@dataclass(frozen=True)
class Key:
    """The address of a feature, and what is said of it."""

    model_id: str
    source: str
    index: int
    note: str = ""

    @property
    def path(self) -> str:
        return f"/{self.model_id}/{self.source}/{self.index}"


@dataclass(frozen=True)
class Listed:
    """A feature in a list with what the catalog knows of it; None where its SAE is not here (any more)."""

    key: Key
    card: SourceCard | None
    feature: FeatureRow | None


@dataclass(frozen=True)
class Summary:
    """A list as an overview shows it."""

    id: str
    name: str
    owner: str
    visibility: str
    n_features: int
    updated: str

    @property
    def path(self) -> str:
        return f"/lists/{self.id}"


def new(
    session: Session,
    who: Actor,
    name: str,
    description: str = "",
    test_text: str = "",
    visibility: Visibility = Visibility.TEAM,
    features: Sequence[Key] = (),
) -> FeatureList:
    """Make a list. Raises BadInput for words that are too long, NotFound for a feature that does not exist."""
    own = select(func.count()).where(FeatureList.owner == who.name)
    if (session.scalar(own) or 0) >= MAX_LISTS:
        raise Conflict(f"You have {MAX_LISTS:,} lists already; delete some.")
    made = FeatureList(id=secrets.token_urlsafe(12), owner=who.name, visibility=visibility)
    _write(made, name, description, test_text)
    session.add(made)
    session.flush()
    add(session, made, features)
    return made


def edit(found: FeatureList, name: str, description: str, test_text: str, visibility: Visibility) -> None:
    _write(found, name, description, test_text)
    share(found, visibility)


def share(found: FeatureList, visibility: Visibility) -> None:
    found.visibility = visibility
    found.updated_at = now()


def _write(found: FeatureList, name: str, description: str, test_text: str) -> None:
    found.name = _short("name", name.strip(), MAX_NAME) or "unnamed list"
    found.description = _short("description", description.strip(), MAX_TEXT)
    found.test_text = _short("text to try", test_text, MAX_TEXT)


def _short(what: str, text: str, most: int) -> str:
    if len(text) > most:
        raise BadInput(f"The {what} has {len(text):,} characters; it may have {most:,}.")
    return text.replace("\0", "")


def is_taken(session: Session, list_id: str) -> bool:
    """Tell whether there is a list of that id, be it in the trash."""
    with visibility.unlimited(session, trash=True):
        return session.get(FeatureList, list_id) is not None


def get(session: Session, who: Actor | None, list_id: str) -> FeatureList:
    """Return a list that somebody may see. Raises NotFound otherwise, as for one that does not exist."""
    found = session.get(FeatureList, list_id[:32])
    if found is None or not may_see(who, found):
        raise NotFound("There is no such list, or it is not shared with you.")
    return found


def shared_with(who: Actor) -> ColumnElement[bool]:
    """Return the condition that a list is somebody's own or the team's; without accounts any is."""
    if who.id is None:
        return true()
    return or_(FeatureList.owner == who.name, FeatureList.visibility == Visibility.TEAM)


def may_see(who: Actor | None, found: FeatureList) -> bool:
    if found.visibility == Visibility.LINK:
        return True
    if who is None:
        return False
    return found.visibility == Visibility.TEAM or may_change(who, found)


def may_change(who: Actor | None, found: FeatureList) -> bool:
    """Tell whether that is somebody's to change: the owner's, an admin's."""
    return visibility.may_change(who, found.owner)


def to_change(session: Session, who: Actor, list_id: str) -> FeatureList:
    """Return a list that somebody may change. Raises NotFound, or Forbidden for one they may only see."""
    found = get(session, who, list_id)
    if not may_change(who, found):
        raise Forbidden(f"This list is {found.owner}'s. Copy it to change it.")
    return found


def seen_by(session: Session, who: Actor, owned: bool = False) -> list[Summary]:
    """Return the lists somebody sees, newest change first; or only their own."""
    wanted = select(FeatureList, func.count(ListedFeature.list_id)).outerjoin(
        ListedFeature, ListedFeature.list_id == FeatureList.id
    )
    wanted = wanted.group_by(FeatureList.id).order_by(FeatureList.updated_at.desc(), FeatureList.id)
    wanted = wanted.where(FeatureList.owner == who.name if owned else shared_with(who))
    return [
        Summary(f.id, f.name, f.owner, f.visibility, n, f"{f.updated_at:%Y-%m-%d}")
        for f, n in session.execute(wanted.limit(MAX_LISTS))
    ]


def remove(session: Session, found: FeatureList) -> None:
    session.execute(delete(ListedFeature).where(ListedFeature.list_id == found.id))
    session.delete(found)


# What is in a list -------------------------------------------------------------------------------------------------


def add(session: Session, found: FeatureList, features: Sequence[Key]) -> list[Key]:
    """Put features at the end; one that is there already keeps its place and takes a new note. Return what was added.

    Raises NotFound for one that does not exist, BadInput when the list would grow beyond its limit.
    """
    there = {(item.model_id, item.source, item.index): item for item in items(session, found)}
    cards = {place: catalog.source_card(session, *place) for place in {(k.model_id, k.source) for k in features}}
    added: list[Key] = []
    for key in features:
        card = cards[key.model_id, key.source]
        if key.index >= card.d_sae:
            raise catalog.past_the_end(card, key.index)
        note = _short("note", key.note.strip(), MAX_NOTE)
        held = there.get((key.model_id, key.source, key.index))
        if held is not None:
            held.note = note or held.note
            continue
        item = ListedFeature(
            list_id=found.id,
            model_id=key.model_id,
            source=key.source,
            index=key.index,
            position=1 + max((i.position for i in there.values()), default=-1),
            note=note,
        )
        there[key.model_id, key.source, key.index] = item
        session.add(item)
        added.append(key)
    if len(there) > MAX_FEATURES:
        raise BadInput(f"The list would hold {len(there)} features; it may hold {MAX_FEATURES}.")
    found.updated_at = now()
    session.flush()
    return added


def items(session: Session, found: FeatureList) -> list[ListedFeature]:
    """Return the features of a list, in its order."""
    wanted = select(ListedFeature).where(ListedFeature.list_id == found.id)
    return list(session.scalars(wanted.order_by(ListedFeature.position)))


def item(session: Session, found: FeatureList, model_id: str, source: str, index: int) -> ListedFeature:
    held = session.get(ListedFeature, (found.id, model_id[:200], source[:200], index)) if index < 2**31 else None
    if held is None:
        raise NotFound(f"The list does not hold {model_id[:60]}/{source[:60]}/{index}.")
    return held


def annotate(found: FeatureList, held: ListedFeature, note: str) -> None:
    held.note = _short("note", note.strip(), MAX_NOTE)
    found.updated_at = now()


def drop(session: Session, found: FeatureList, held: ListedFeature) -> None:
    session.delete(held)
    found.updated_at = now()
    session.flush()


def move(session: Session, found: FeatureList, held: ListedFeature, to: int) -> None:
    """Put a feature at a place, counted from 0; the others close up."""
    others = [i for i in items(session, found) if i is not held]
    others.insert(min(max(to, 0), len(others)), held)
    for place, each in enumerate(others):
        each.position = place
    found.updated_at = now()
    session.flush()


def keys(held: Sequence[ListedFeature]) -> list[Key]:
    return [Key(i.model_id, i.source, i.index, i.note) for i in held]


def described(session: Session, wanted: Sequence[Key]) -> list[Listed]:
    """Return features with their labels and figures, in two queries for each SAE they come from."""
    cards: dict[tuple[str, str], SourceCard | None] = {}
    rows: dict[tuple[str, str], dict[int, FeatureRow]] = {}
    for place in {(key.model_id, key.source) for key in wanted}:
        try:
            card = cards[place] = catalog.source_card(session, *place)
        except NotFound:
            cards[place], rows[place] = None, {}
            continue
        indices = {key.index for key in wanted if (key.model_id, key.source) == place}
        rows[place] = catalog.rows(session, card, indices)
    return [
        Listed(key, cards[key.model_id, key.source], rows[key.model_id, key.source].get(key.index)) for key in wanted
    ]
