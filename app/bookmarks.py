"""Verbs on bookmarks: features somebody wants to find again. Takes a Session; the caller commits."""

from __future__ import annotations

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from app import catalog, lists
from app.errors import Conflict
from app.lists import Key, Listed
from app.people import Actor
from app.tables import Bookmark

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
