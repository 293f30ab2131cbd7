"""Who sees what: SAEs, jobs, steering runs and vectors are their owner's alone, the team's, or on a public link.

One place: every statement of a session is narrowed to what its reader may see, so that pages, API, search, exports and
requests to the worker find nothing else. Sessions without a reader, as trainers and commands have them, see everything.
Knows no HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, false, or_, select
from sqlalchemy.orm import ORMExecuteState, Session, with_loader_criteria
from sqlalchemy.sql.base import ExecutableOption

from app.errors import BadInput, Conflict, Forbidden, NotFound
from app.people import Actor, Role
from app.tables import Corpus, FeatureList, Job, Model, Source, SteeringRun, SteeringVector, Trash

_READER, _TRASH = "reader", "trash"
_BINNED = (Source, Corpus, FeatureList, SteeringRun, SteeringVector)
NARROWED = "narrowed"
"""Execution option of a statement that says by itself what its reader may see (`seen`)."""
ONCE = "once"
"""Execution option of a statement that is put together once and kept."""

Owned = Source | Job | SteeringRun | SteeringVector
KINDS: dict[str, type[Owned]] = {"sae": Source, "job": Job, "run": SteeringRun, "vector": SteeringVector}
"""What has an owner, by the name in addresses."""


class Visibility(StrEnum):
    """Who sees something besides its owner and the admins."""

    PRIVATE = "private"
    TEAM = "team"
    LINK = "link"
    """The team, and whoever has its link, signed in or not."""


@dataclass(frozen=True)
class Reader:
    """For whom a session reads."""

    name: str = ""
    """Somebody signed in; empty for a stranger."""
    links: frozenset[str] = frozenset()
    """Secrets of public links that a stranger came by."""


def reader_of(who: Actor | None, links: frozenset[str] = frozenset()) -> Reader | None:
    """Return as whom somebody reads; None for those who see everything: admins, and the one person without accounts."""
    if who is not None and (who.id is None or who.role == Role.ADMIN):
        return None
    return Reader(who.name) if who is not None else Reader(links=links)


def read_as(session: Session, reader: Reader | None) -> Session:
    """Narrow what a session reads from now on."""
    session.info[_READER] = reader
    return session


def reader(session: Session) -> Reader | None:
    return session.info.get(_READER)


def hides_saes(session: Session) -> bool:
    """Tell whether the session may see fewer SAEs than there are."""
    if reader(session) is not None:
        return True
    return session.scalar(select(Trash.id).where(Trash.kind == "sae").limit(1)) is not None


@contextmanager
def unlimited(session: Session, *, trash: bool = False) -> Generator[None]:
    """See everything for a moment: what others use must be counted, and names are taken by what is hidden too.

    `trash` shows what was deleted besides.
    """
    before = {name: session.info.get(name) for name in (_READER, _TRASH)}
    session.info[_READER] = None
    session.info[_TRASH] = trash or before[_TRASH]
    try:
        yield
    finally:
        session.info.update(before)


@contextmanager
def with_trash(session: Session) -> Generator[None]:
    """See also what was deleted, as far as the reader saw it before."""
    before = session.info.get(_TRASH)
    session.info[_TRASH] = True
    try:
        yield
    finally:
        session.info[_TRASH] = before


_MAKER = "maker"


def make_for(session: Session, owner: str, visibility: str = Visibility.TEAM) -> None:
    """Say whose the SAEs are that a session puts into the catalog, and who sees them."""
    session.info[_MAKER] = (owner, visibility)


def make_for_job(session: Session, job_id: int) -> None:
    """What a job makes is its owner's, and seen by whoever sees the job; a link of its own it does not have."""
    job = session.get(Job, job_id)
    if job is not None:
        private = job.visibility == Visibility.PRIVATE
        make_for(session, job.owner, Visibility.PRIVATE if private else Visibility.TEAM)


def maker(session: Session) -> tuple[str, str]:
    return session.info.get(_MAKER, ("", Visibility.TEAM))


def claim(session: Session, source: Source) -> None:
    """Give an SAE that is put into the catalog to whom the session works for. Raises Conflict where it is another's."""
    owner, visibility = maker(session)
    if source.id is None:  # pyright: ignore[reportUnnecessaryComparison] - it is new
        source.owner, source.visibility = owner, visibility
    elif owner and source.owner not in (owner, ""):
        raise Conflict(
            f"{source.model_id}/{source.name} is {source.owner}'s already. Choose another set name, or ask them."
        )


def narrow(state: ORMExecuteState) -> None:
    """Add to a statement what its session's reader may see; db.sessions has every session call it."""
    if state.is_column_load or state.is_relationship_load or not (state.is_orm_statement or state.is_select):
        return
    who = state.session.info.get(_READER)
    options = () if state.session.info.get(_TRASH) else _standing()
    if who is not None:
        options += _criteria(who)
    if not options:
        return
    if isinstance(state.statement, CompoundSelect):
        # SQLAlchemy applies criteria to selects alone: a union has to say them itself.
        if not state.execution_options.get(NARROWED):
            raise RuntimeError("A union must be narrowed by visibility.seen and say so.")
        return
    if state.execution_options.get(ONCE):
        state.statement = _narrowed(state.statement, options)
    else:
        state.statement = state.statement.options(*options)


@lru_cache(maxsize=1024)
def _narrowed(statement: Any, options: tuple[ExecutableOption, ...]) -> Any:
    """A statement that is narrowed once is compiled once: half as long for a feature's page as each time anew."""
    return statement.options(*options)


@lru_cache(maxsize=1)
def _standing() -> tuple[ExecutableOption, ...]:
    return tuple(with_loader_criteria(table, table.trash_id.is_(None), include_aliases=True) for table in _BINNED)


@lru_cache(maxsize=1024)
def _criteria(who: Reader) -> tuple[ExecutableOption, ...]:
    tables: tuple[type[Any], ...] = (*KINDS.values(), Model)
    return tuple(
        with_loader_criteria(table, seen(who, table), include_aliases=True) for table in tables if _limited(who, table)
    )


def _limited(who: Reader, table: type[Any]) -> bool:
    return table is not Model or not who.name


def seen(who: Reader | None, table: type[Any]) -> ColumnElement[bool]:
    """Return the condition that a row of a table may be seen by a reader."""
    if who is None or not _limited(who, table):
        return ~false()
    if table is Model:  # a stranger knows those of what was shown to them
        shown = [select(t.model_id).where(seen(who, t)) for t in (Source, SteeringRun, SteeringVector)]
        return or_(*(Model.id.in_(ids) for ids in shown))
    if not who.name:
        return (table.visibility == Visibility.LINK) & table.link.in_(sorted(who.links))
    return or_(table.visibility != Visibility.PRIVATE, table.owner == who.name)


def may_change(who: Actor | None, owner: str) -> bool:
    """Tell whether something is somebody's to change: their own, nobody's, an admin's any; without accounts all is."""
    return who is not None and (who.id is None or owner in (who.name, "") or who.role == Role.ADMIN)


def check_may_change(who: Actor, owner: str, what: str) -> None:
    if not may_change(who, owner):
        raise Forbidden(f"{what} is {owner}'s; only they or an admin change it.")


def check(text: str) -> Visibility:
    try:
        return Visibility(text)
    except ValueError:
        raise BadInput(f"Something is seen by {', '.join(Visibility)}; not {text[:40]!r}.") from None


def find(session: Session, kind: str, key: str) -> Owned:
    """Return something with an owner by its kind and key. Raises NotFound, also where the reader may not see it."""
    table = KINDS.get(kind)
    number: int | str = key
    if table is not SteeringRun:
        number = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
    found = session.get(table, number) if table is not None and len(key) <= 32 and "\0" not in key else None
    if found is None:
        raise NotFound(f"There is no {kind[:20]} {key[:40]!r}, or it is not shared with you.")
    return found


def share(who: Actor, found: Owned, visibility: Visibility) -> None:
    """Say who sees something. A link is new each time that one is made. Raises Forbidden for what is another's."""
    check_may_change(who, found.owner, "It")
    if visibility == Visibility.LINK and found.visibility != Visibility.LINK:
        found.link = secrets.token_urlsafe(18)
    elif visibility != Visibility.LINK:
        found.link = ""
    found.visibility = visibility
    if not found.owner:
        found.owner = who.name  # else nobody would see what is private from now on


def of_link(session: Session, secret: str) -> Owned:
    """Return what a public link leads to. Raises NotFound."""
    if 20 <= len(secret) <= 32 and secret.isascii() and "\0" not in secret:
        with unlimited(session):
            for table in KINDS.values():
                wanted = select(table).where(table.link == secret, table.visibility == Visibility.LINK)
                found = session.scalars(wanted).first()
                if found is not None:
                    return found
    raise NotFound("This link leads nowhere: it was withdrawn, or is not complete.")


def path(found: Owned) -> str:
    """Return where something is shown."""
    if isinstance(found, Source):
        return f"/{found.model_id}/{found.name}"
    if isinstance(found, Job):
        return f"/jobs/{found.id}"
    if isinstance(found, SteeringRun):
        return f"/{found.model_id}/steer/{found.id}"
    return f"/vectors/{found.id}"
