"""Verbs on comments: what people say to each other about a feature or a list. Takes a Session; the caller commits.

A comment stands under the address of what it is about, so it outlives an SAE that is removed and comes back with it.
`@name` mentions a person, who finds it under /mentions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from app import catalog, lists
from app.errors import BadInput, Conflict, Forbidden, NotFound
from app.lists import Key
from app.people import Actor, Role
from app.tables import Comment, Mention, Person, now

MAX_TEXT = 5_000
MAX_OF_A_SUBJECT = 1_000
MAX_MENTIONS = 20
"""People told of one comment."""
PAGE = 100
MENTION = re.compile(r"(?<![\w@./-])@([a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?)", re.IGNORECASE)


@dataclass(frozen=True)
class Said:
    """A comment as shown."""

    id: int
    subject: str
    author: str
    text: str
    created_at: datetime
    may_delete: bool
    unread: bool = False
    """As a mention of who looks."""

    @property
    def when(self) -> str:
        return f"{self.created_at:%Y-%m-%d %H:%M}"

    @property
    def anchor(self) -> str:
        """The address of the page that shows it."""
        return f"{page_of(self.subject)}#comment-{self.id}"


def of_feature(model_id: str, source: str, index: int) -> str:
    """Return the subject that a feature is."""
    return Key(model_id, source, index).path


def of_list(list_id: str) -> str:
    return f"/lists/{list_id}"


def page_of(subject: str) -> str:
    """Return the address of the page that shows a subject's comments."""
    return subject if subject.startswith("/lists/") else f"{subject}/explanations"


def check_subject(session: Session, who: Actor | None, subject: str) -> str:
    """Return a subject somebody may see. Raises NotFound for what is not there or not theirs to see."""
    parts = subject.split("/")
    if len(parts) == 3 and parts[:2] == ["", "lists"]:
        return of_list(lists.get(session, who, parts[2]).id)
    if len(parts) != 4 or parts[0]:
        raise NotFound(
            f"{subject[:80]!r} is no feature and no list; comments are about /model/source/index or /lists/id."
        )
    card = catalog.source_card(session, parts[1], parts[2])
    index = catalog.parse_index(parts[3])
    if index >= card.d_sae:
        raise catalog.past_the_end(card, index)
    return of_feature(card.model_id, card.name, index)


def write(session: Session, who: Actor, subject: str, text: str) -> Comment:
    """Say something. Raises NotFound for a subject nobody sees, BadInput for a text that cannot be used."""
    about = check_subject(session, who, subject)
    said = text.replace("\r\n", "\n").replace("\0", "").strip()
    if not 1 <= len(said) <= MAX_TEXT:
        raise BadInput(f"A comment has 1 to {MAX_TEXT:,} characters; this one has {len(said):,}.")
    there = session.scalar(select(func.count()).where(Comment.subject == about)) or 0
    if there >= MAX_OF_A_SUBJECT:
        raise Conflict(f"There are {there:,} comments here already; delete some.")
    made = Comment(subject=about, author=who.name, text=said)
    session.add(made)
    session.flush()
    session.add_all(Mention(comment_id=made.id, who=name) for name in _mentioned(session, who, said))
    session.flush()
    return made


def _mentioned(session: Session, who: Actor, text: str) -> Sequence[str]:
    named = {match[1].lower() for match in MENTION.finditer(text)} - {who.name}
    if not named:
        return ()
    known = select(Person.name).where(Person.name.in_(sorted(named)[:MAX_MENTIONS]), Person.disabled_at.is_(None))
    return session.scalars(known).all()


def get(session: Session, comment_id: int) -> Comment:
    found = session.get(Comment, comment_id) if 0 < comment_id < 2**31 else None
    if found is None:
        raise NotFound(f"There is no comment {comment_id}.")
    return found


def remove(session: Session, who: Actor, comment_id: int) -> str:
    """Delete one's own comment, an admin any; return what it was about."""
    found = get(session, comment_id)
    subject = check_subject(session, who, found.subject)
    if not _may_delete(who, found.author):
        raise Forbidden(f"This comment is {found.author}'s; only they or an admin delete it.")
    session.execute(delete(Mention).where(Mention.comment_id == found.id))
    session.delete(found)
    return subject


def about(session: Session, who: Actor | None, subject: str) -> list[Said]:
    """Return the comments on a subject, oldest first. The caller has seen to it that `who` may see the subject."""
    wanted = select(Comment).where(Comment.subject == subject).order_by(Comment.id)
    return [_said(who, comment) for comment in session.scalars(wanted)]


def mentions(session: Session, who: Actor, before: int = 2**31 - 1) -> tuple[list[Said], int | None]:
    """Return a page of the comments that name somebody, latest first, and where the next page begins.

    What they may no longer see is left out.
    """
    wanted = select(Comment, Mention.seen_at).join(Mention, Mention.comment_id == Comment.id)
    wanted = wanted.where(Mention.who == who.name, Comment.id < before).order_by(Comment.id.desc()).limit(PAGE)
    rows = session.execute(wanted).all()
    found: list[Said] = []
    for comment, seen_at in rows:
        try:
            check_subject(session, who, comment.subject)
        except NotFound:
            continue
        found.append(_said(who, comment, unread=seen_at is None))
    return found, rows[-1][0].id if len(rows) == PAGE else None


def unread(session: Session, who: Actor) -> int:
    """Count the mentions somebody has not looked at."""
    return session.scalar(select(func.count()).where(Mention.who == who.name, Mention.seen_at.is_(None))) or 0


def mark_read(session: Session, who: Actor) -> None:
    session.execute(update(Mention).where(Mention.who == who.name, Mention.seen_at.is_(None)).values(seen_at=now()))


def _may_delete(who: Actor | None, author: str) -> bool:
    return who is not None and (who.id is None or author == who.name or who.role == Role.ADMIN)


def _said(who: Actor | None, comment: Comment, *, unread: bool = False) -> Said:
    may_delete = _may_delete(who, comment.author)
    return Said(comment.id, comment.subject, comment.author, comment.text, comment.created_at, may_delete, unread)
