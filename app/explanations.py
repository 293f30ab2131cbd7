"""Verbs on explanations that people write: written, agreed with, taken back, brought back. The caller commits.

The label of a feature is the text of its best explanation: people's and models' before automatic ones, then the one
that most agree with, then the newest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.orm import Session

from app import catalog
from app.errors import BadInput, Conflict, Forbidden, NotFound
from app.people import Actor, Role
from app.tables import Explanation, ExplanationVote, Feature, RetiredExplanation, Source, now

HUMAN, HEURISTIC = "human", "heuristic"
MAX_TEXT = 1000
MAX_OF_A_FEATURE = 50


@dataclass(frozen=True)
class Entry:
    """An explanation in the history of a feature."""

    id: int
    text: str
    method: str
    author: str
    when: str
    n_votes: int
    mine: bool
    """Whether the person who looks agrees with it."""
    may_retire: bool
    retired: str = ""
    """When and by whom it was taken back; empty while it stands."""


def write(session: Session, who: Actor, model_id: str, source: str, index: int, text: str) -> Explanation:
    """Add an explanation. Raises NotFound for a feature that is not there, BadInput for a text that cannot be used."""
    card = catalog.source_card(session, model_id, source)
    if index >= card.d_sae:
        raise catalog.past_the_end(card, index)
    said = " ".join(text.replace("\0", " ").split())
    if not 1 <= len(said) <= MAX_TEXT:
        raise BadInput(f"An explanation has 1 to {MAX_TEXT:,} characters; this one has {len(said):,}.")
    there = select(Explanation).where(Explanation.source_id == card.id, Explanation.index == index)
    others = session.scalars(there).all()
    if len(others) >= MAX_OF_A_FEATURE:
        raise Conflict(f"The feature has {len(others)} explanations already; agree with one, or take one back.")
    if any(other.text == said for other in others):
        raise Conflict("The feature has this explanation already; agree with it.")
    made = Explanation(source_id=card.id, index=index, text=said, method=HUMAN, author=who.name)
    session.add(made)
    session.flush()
    _relabel(session, card.id, index)
    return made


def add(session: Session, source_id: int, brought: Iterable[Mapping[str, Any]]) -> None:
    """Add explanations that come with evidence, columns of the table by name, and label their features.

    What a feature is said to be already is not said twice, and what somebody took back here does not return.
    """
    there = select(Explanation.index, Explanation.text).where(Explanation.method != HEURISTIC)
    gone = select(RetiredExplanation.index, RetiredExplanation.text)
    known = {tuple(row) for row in session.execute(there.where(Explanation.source_id == source_id))}
    known |= {tuple(row) for row in session.execute(gone.where(RetiredExplanation.source_id == source_id))}
    fresh: list[dict[str, Any]] = []
    for said in brought:
        if (key := (said["index"], said["text"])) not in known:
            known.add(key)
            fresh.append({"source_id": source_id, **said})
    if fresh:
        session.execute(insert(Explanation), fresh)
        labels = written_labels(session, source_id)
        shown = session.execute(select(Feature.index, Feature.label).where(Feature.source_id == source_id)).all()
        other = [(index, labels[index]) for index, label in shown if labels.get(index, label) != label]
        changed = [{"source_id": source_id, "index": index, "label": label} for index, label in other]
        if changed:
            session.execute(update(Feature), changed)


def written_labels(session: Session, source_id: int) -> dict[int, str]:
    """Return the label of every feature of a source that has one by people or models."""
    rows = session.execute(
        select(Explanation.index, Explanation.text)
        .where(Explanation.source_id == source_id, Explanation.method != HEURISTIC)
        .order_by(Explanation.n_votes, Explanation.id)  # of several the last stays: the one that _rank puts first
    )
    return {index: text for index, text in rows}  # noqa: C416 - rows are no mapping for pyright


def get(session: Session, explanation_id: int) -> Explanation:
    found = session.get(Explanation, explanation_id) if 0 < explanation_id < 2**31 else None
    if found is None or session.get(Source, found.source_id) is None:  # whose SAE may not be seen is not there
        raise NotFound(f"There is no explanation {explanation_id}.")
    return found


def vote(session: Session, who: Actor, explanation_id: int, agree: bool) -> Explanation:
    """Agree with an explanation, or no longer; twice is once."""
    found = get(session, explanation_id)
    session.execute(
        delete(ExplanationVote).where(ExplanationVote.explanation_id == found.id, ExplanationVote.who == who.name)
    )
    if agree:
        session.add(ExplanationVote(explanation_id=found.id, who=who.name))
        session.flush()
    votes = select(func.count()).where(ExplanationVote.explanation_id == found.id).scalar_subquery()
    session.execute(update(Explanation).where(Explanation.id == found.id).values(n_votes=votes))
    session.refresh(found)
    _relabel(session, found.source_id, found.index)
    return found


def may_retire(who: Actor, method: str, author: str) -> bool:
    """Tell whether somebody may take an explanation back: their own, an admin any. Automatic ones are made again."""
    return method != HEURISTIC and (who.id is None or author == who.name or who.role == Role.ADMIN)


def retire(session: Session, who: Actor, explanation_id: int) -> RetiredExplanation:
    """Take an explanation back; it stays in the history."""
    found = get(session, explanation_id)
    if not may_retire(who, found.method, found.author):
        raise Forbidden(f"This explanation is {found.author}'s; write a better one, or ask an admin.")
    votes = session.scalars(select(ExplanationVote).where(ExplanationVote.explanation_id == found.id))
    agreed = sorted([vote.who, vote.created_at.isoformat()] for vote in votes)
    kept = RetiredExplanation(**_said(found), retired_by=who.name, was_id=found.id, votes=agreed)
    session.add(kept)
    session.execute(delete(ExplanationVote).where(ExplanationVote.explanation_id == found.id))
    session.delete(found)
    session.flush()
    _relabel(session, kept.source_id, kept.index)
    return kept


def restore(session: Session, who: Actor, retired_id: int) -> Explanation:
    """Bring back an explanation that was taken back, with its id and votes."""
    kept = session.get(RetiredExplanation, retired_id) if 0 < retired_id < 2**31 else None
    if kept is None or session.get(Source, kept.source_id) is None:
        raise NotFound(f"There is no explanation {retired_id} to bring back.")
    if not may_retire(who, kept.method, kept.author):
        raise Forbidden(f"This explanation was {kept.author}'s; only they or an admin bring it back.")
    back = Explanation(**_said(kept), n_votes=len(kept.votes))
    if kept.was_id is not None and session.get(Explanation, kept.was_id) is None:
        back.id = kept.was_id
    session.add(back)
    session.flush()
    for name, since in kept.votes:
        at = datetime.fromisoformat(since)
        session.add(ExplanationVote(explanation_id=back.id, who=name, created_at=at))
    session.delete(kept)
    session.flush()
    _relabel(session, back.source_id, back.index)
    return back


@dataclass(frozen=True)
class Retired:
    """An explanation that was taken back lately."""

    id: int
    text: str
    author: str
    when: str
    path: str
    """Of its feature."""


def retired(session: Session, who: Actor, days: int) -> list[Retired]:
    """Return what somebody may bring back of the last days, latest first."""
    wanted = select(RetiredExplanation, Source).join(Source, Source.id == RetiredExplanation.source_id)
    wanted = wanted.where(RetiredExplanation.retired_at > now() - timedelta(days=days))
    if who.id is not None and who.role != Role.ADMIN:
        wanted = wanted.where(RetiredExplanation.author == who.name)
    return [
        Retired(e.id, e.text, e.author, f"{e.retired_at:%Y-%m-%d}", f"/{s.model_id}/{s.name}/{e.index}")
        for e, s in session.execute(wanted.order_by(RetiredExplanation.id.desc()).limit(200))
    ]


def _said(entry: Explanation | RetiredExplanation) -> dict[str, Any]:
    """What was said of which feature by whom, whether it stands or was taken back."""
    names = ("source_id", "index", "text", "method", "author", "created_at")
    return {name: getattr(entry, name) for name in names}


def history(session: Session, who: Actor, source_id: int, index: int) -> tuple[list[Entry], list[Entry]]:
    """Return the explanations of a feature, the label first, and those that were taken back, latest first."""
    mine = select(ExplanationVote.explanation_id).where(ExplanationVote.who == who.name)
    standing = select(Explanation).where(Explanation.source_id == source_id, Explanation.index == index)
    agreed = set(session.scalars(mine.join(Explanation).where(Explanation.source_id == source_id)))
    now = [
        Entry(
            e.id,
            e.text,
            e.method,
            e.author,
            f"{e.created_at:%Y-%m-%d}",
            e.n_votes,
            e.id in agreed,
            may_retire(who, e.method, e.author),
        )
        for e in sorted(session.scalars(standing), key=_rank)
    ]
    gone = select(RetiredExplanation).where(
        RetiredExplanation.source_id == source_id, RetiredExplanation.index == index
    )
    before = [
        Entry(
            e.id,
            e.text,
            e.method,
            e.author,
            f"{e.created_at:%Y-%m-%d}",
            0,
            False,
            may_retire(who, e.method, e.author),
            f"{e.retired_at:%Y-%m-%d} by {e.retired_by}",
        )
        for e in session.scalars(gone.order_by(RetiredExplanation.id.desc()))
    ]
    return now, before


def forget(session: Session, source_id: int) -> None:
    """Delete all explanations of a source with their votes and history."""
    own = select(Explanation.id).where(Explanation.source_id == source_id)
    session.execute(delete(ExplanationVote).where(ExplanationVote.explanation_id.in_(own)))
    session.execute(delete(RetiredExplanation).where(RetiredExplanation.source_id == source_id))
    session.execute(delete(Explanation).where(Explanation.source_id == source_id))


def forget_automatic(session: Session, source_id: int) -> None:
    """Delete the automatic explanations of a source, which a harvest makes anew, with their votes."""
    own = select(Explanation.id).where(Explanation.source_id == source_id, Explanation.method == HEURISTIC)
    session.execute(delete(ExplanationVote).where(ExplanationVote.explanation_id.in_(own)))
    session.execute(delete(Explanation).where(Explanation.source_id == source_id, Explanation.method == HEURISTIC))


def _rank(explanation: Explanation) -> tuple[bool, int, int]:
    return explanation.method == HEURISTIC, -explanation.n_votes, -explanation.id


def _relabel(session: Session, source_id: int, index: int) -> None:
    there = select(Explanation).where(Explanation.source_id == source_id, Explanation.index == index)
    best = min(session.scalars(there), key=_rank, default=None)
    label = best.text if best is not None else ""
    session.execute(update(Feature).where(Feature.source_id == source_id, Feature.index == index).values(label=label))
