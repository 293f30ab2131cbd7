"""Verbs on bookmarks: features somebody wants to find again. Takes a Session; the caller commits."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import CompoundSelect, bindparam, delete, func, literal, or_, select, union_all
from sqlalchemy.orm import Session

from app import catalog, lists, visibility
from app.errors import Conflict
from app.lists import Key, Listed
from app.people import Actor
from app.tables import Bookmark, Comment, FeatureList, ListedFeature
from app.visibility import Visibility

MAX_BOOKMARKS = 5_000
"""Of one person."""
MAX_LISTS_SHOWN = 8


def add(session: Session, who: Actor, model_id: str, source: str, index: int) -> None:
    """Keep a feature; twice is once. Raises NotFound for one that does not exist."""
    card = catalog.source_card(session, model_id, source)
    if index >= card.d_sae:
        raise catalog.past_the_end(card, index)
    key = (who.name, card.model_id, card.name, index)
    if session.get(Bookmark, key) is not None:
        return
    kept = session.scalar(select(func.count()).where(Bookmark.who == who.name)) or 0
    if kept >= MAX_BOOKMARKS:
        raise Conflict(f"You have {kept:,} bookmarks already; take some away, or put features into lists.")
    session.add(Bookmark(who=who.name, model_id=card.model_id, source=card.name, index=index))
    session.flush()


def drop(session: Session, who: Actor, model_id: str, source: str, index: int) -> None:
    """Take a bookmark away; one that is not there is no mistake."""
    session.execute(
        delete(Bookmark).where(
            Bookmark.who == who.name,
            Bookmark.model_id == model_id,
            Bookmark.source == source,
            Bookmark.index == index,
        )
    )


def of(session: Session, who: Actor) -> list[Listed]:
    """Return somebody's bookmarks, latest first, with what the catalog knows of them."""
    wanted = select(Bookmark).where(Bookmark.who == who.name).order_by(Bookmark.created_at.desc(), Bookmark.index)
    return lists.described(session, [Key(b.model_id, b.source, b.index) for b in session.scalars(wanted)])


@dataclass(frozen=True)
class Around:
    """What people did with a feature: whether who looks kept it, how many comments it has, lists that hold it."""

    path: str
    kept: bool
    n_comments: int
    lists: tuple[tuple[str, str], ...]
    """(id, name) of lists that who looks may see."""


NOTHING = Around("", False, 0, ())


def _around(of_team: bool) -> CompoundSelect[str, str, int]:
    """One query for all: put together once, as a feature's page has ten milliseconds."""
    who, model, source, index, path = map(bindparam, ("who", "model", "source", "latent", "path"))
    kept = select(literal("kept"), literal(""), func.count()).where(
        Bookmark.who == who, Bookmark.model_id == model, Bookmark.source == source, Bookmark.index == index
    )
    said = select(literal("said"), literal(""), func.count()).where(Comment.subject == path)
    holding = (
        select(FeatureList.name, FeatureList.id, literal(0))
        .join(ListedFeature, ListedFeature.list_id == FeatureList.id)
        .where(ListedFeature.model_id == model, ListedFeature.source == source, ListedFeature.index == index)
    )
    if of_team:
        holding = holding.where(or_(FeatureList.owner == who, FeatureList.visibility == Visibility.TEAM))
    held = holding.order_by(FeatureList.updated_at.desc()).limit(MAX_LISTS_SHOWN).subquery()
    return union_all(kept, said, select(*held.c)).execution_options(**{visibility.NARROWED: True})


_AROUND = {of_team: _around(of_team) for of_team in (False, True)}


def around(session: Session, who: Actor, model_id: str, source: str, index: int) -> Around:
    """Return what people did with a feature, in one query."""
    path = Key(model_id, source, index).path
    given = {"who": who.name, "model": model_id, "source": source, "latent": index, "path": path}
    found = session.execute(_AROUND[who.id is not None], given).all()
    counts = {word: n for word, list_id, n in found if not list_id}
    named = tuple((list_id, name) for name, list_id, _ in found if list_id)
    return Around(path, counts["kept"] > 0, counts["said"], named)
