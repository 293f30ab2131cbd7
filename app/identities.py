"""Verbs on identities: who a person is at an OpenID Connect provider, or to a proxy that signs people in.

An identity is a provider and the provider's own unchanging name for somebody. An e-mail address only decides whether
somebody new may come in; it never finds an account, since addresses are given to others again. Takes a Session; the
caller commits.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app import credentials, people
from app.errors import Conflict, Forbidden, Unauthorized
from app.people import Actor, Role
from app.tables import Identity, Person, SignIn, now

PROXY = "proxy"
"""Stands for the provider where a proxy says who asks."""
ATTEMPT_MINUTES = 10
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True)
class Claim:
    """What a provider says of somebody who has signed in there."""

    issuer: str
    subject: str
    email: str
    """Empty unless the provider has verified it."""
    name: str
    """How they would like to be called."""


@dataclass(frozen=True)
class Attempt:
    """A sign-in that was begun here and comes back from the provider."""

    data: dict[str, Any]
    """Of the protocol: nonce, code_verifier, redirect_uri."""
    next: str
    invitation: str
    person_id: int | None
    """Who wants to add this identity to their account."""


def begin(session: Session, state: str, browser: str, attempt: Attempt) -> None:
    """Remember a sign-in until it comes back. `browser` is a secret in the cookie of the one that began it."""
    session.execute(delete(SignIn).where(SignIn.expires_at < now()))
    session.add(
        SignIn(
            state_hash=credentials.digest(state),
            browser_hash=credentials.digest(browser),
            data=attempt.data,
            next=attempt.next,
            invitation=attempt.invitation,
            person_id=attempt.person_id,
            expires_at=now() + timedelta(minutes=ATTEMPT_MINUTES),
        )
    )
    session.flush()


def finish(session: Session, state: str, browser: str) -> Attempt:
    """Take up a sign-in that comes back; it counts once, and only in the browser that began it."""
    row = session.get(SignIn, credentials.digest(state))
    taken = row is not None and session.execute(delete(SignIn).where(SignIn.state_hash == row.state_hash))
    mine = row is not None and hmac.compare_digest(row.browser_hash, credentials.digest(browser))
    if row is None or getattr(taken, "rowcount", 0) != 1 or not mine or row.expires_at < now():
        raise Unauthorized(
            f"This sign-in is not from this browser, or older than {ATTEMPT_MINUTES} minutes. Try again."
        )
    return Attempt(dict(row.data), row.next, row.invitation, row.person_id)


def sign_in(session: Session, claim: Claim, attempt: Attempt, domains: list[str]) -> Person:
    """Return whose account it is, made or connected where that is allowed.

    Raises Forbidden for somebody who was not invited, Conflict for an identity of somebody else's.
    """
    known = _of(session, claim)
    if attempt.person_id is not None:
        person = people.numbered(session, attempt.person_id)
        if known is not None and known.id != person.id:
            raise Conflict(f"This sign-in belongs to {known.name} already.")
        if known is None:
            _connect(session, person, claim)
        return _able(person)
    if known is not None:
        return _able(known)
    if attempt.invitation:
        person = people.accept(session, attempt.invitation, free_name(session, claim.name), None)
    elif claim.email and claim.email.rpartition("@")[2].lower() in domains:
        person = people.add_without_password(session, free_name(session, claim.name), Role.VIEWER)
    else:
        who = claim.email or "Whoever has no verified e-mail address"
        raise Forbidden(f"{who} was not invited. Ask an admin for a link, and open it first.")
    _connect(session, person, claim)
    return person


def by_proxy(session: Session, said: str) -> Actor:
    """Return for whom a trusted proxy asks, with an account made at the first time.

    An account of that name that came in another way stays another's until an admin connects the two: the proxy may give
    a name to somebody else than we did. Raises Forbidden for a disabled account.
    """
    claim = Claim(PROXY, said[:200], "", said.partition("@")[0])
    person = _of(session, claim)
    if person is None:
        name = free_name(session, claim.name)
        person = people.add_without_password(session, name, Role.VIEWER)
        _connect(session, person, claim)
    _able(person)
    return Actor(person.name, Role(person.role), person.id)


def of_person(session: Session, person_id: int) -> list[Identity]:
    return list(session.scalars(select(Identity).where(Identity.person_id == person_id).order_by(Identity.id)))


def connect_proxy(session: Session, person: Person, said: str) -> None:
    """Let whom a proxy calls so be that person. Raises Conflict when it is somebody else."""
    claim = Claim(PROXY, said[:200], "", said)
    known = _of(session, claim)
    if known is not None and known.id != person.id:
        raise Conflict(f"{said[:200]} is {known.name} already.")
    if known is None:
        _connect(session, person, claim)


def free_name(session: Session, wanted: str) -> str:
    """Return a name that can be used and is not taken, like the one wanted."""
    plain = _NOT_IN_NAMES.sub("-", wanted.strip().lower()).strip("-._")[:56] or "somebody"
    taken = set(session.scalars(select(Person.name).where(Person.name.startswith(plain, autoescape=True))))
    return next(name for name in (plain, *(f"{plain}-{n}" for n in range(2, len(taken) + 3))) if name not in taken)


def _of(session: Session, claim: Claim) -> Person | None:
    held = select(Person).join(Identity, Identity.person_id == Person.id)
    return session.scalar(held.where(Identity.issuer == claim.issuer, Identity.subject == claim.subject))


def _connect(session: Session, person: Person, claim: Claim) -> None:
    session.add(Identity(person_id=person.id, issuer=claim.issuer, subject=claim.subject, email=claim.email[:320]))
    session.flush()


def _able(person: Person) -> Person:
    if person.disabled_at is not None:
        raise Forbidden(f"The account {person.name} is disabled. Ask an admin.")
    return person
