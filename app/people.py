"""Verbs on people in team mode: accounts, invitations, logins, API tokens. Takes a Session; the caller commits.

Secrets are returned once, where they are made; the database holds their sha256.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from app import credentials
from app.errors import BadInput, Busy, Conflict, Forbidden, NotFound, Unauthorized
from app.tables import ApiToken, FailedLogins, Invitation, Login, Person, now

LOGIN_DAYS = 30
INVITATION_DAYS = 7
MAX_TOKENS = 50
KEY_PREFIX = "atlas_"
_NO_PASSWORD = "none"  # noqa: S105 - is no argon2 hash, so nothing fits it
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_SEEN_EVERY = timedelta(minutes=5)
_WINDOW = timedelta(minutes=15)
_MAX_FAILURES = {"pair": 10, "address": 40, "name": 100}
"""Wrong passwords in a window: by one name from one address, from one address, for one name."""


class Role(StrEnum):
    """What a person may do; each includes those before it."""

    VIEWER = "viewer"
    EDITOR = "editor"
    ADMIN = "admin"

    def covers(self, other: Role) -> bool:
        order = list(Role)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True)
class Actor:
    """Who asks: somebody signed in, a program with a token, or the one person of a server on loopback."""

    name: str
    role: Role
    id: int | None = None
    """None for the one person of a server on loopback, who needs no account."""
    login_id: int | None = None
    """The login by which a browser asks; None for tokens and where a proxy says who asks."""
    by_key: bool = False
    """A program asks, with an API token."""


LOCAL = Actor("you", Role.ADMIN)
"""Who asks on a server without accounts."""


@dataclass(frozen=True)
class PersonRow:
    """A person as the admin sees them."""

    id: int
    name: str
    role: str
    created_at: datetime
    seen_at: datetime | None
    n_tokens: int
    disabled: bool


def check_name(name: str) -> str:
    """Return a name in its stored form. Raises BadInput when it cannot be one."""
    folded = name.strip().lower()
    if not _NAME.fullmatch(folded):
        raise BadInput(
            f"A name has 1 to 64 of a-z, 0-9, dot, underscore and dash, and begins with a letter or digit; "
            f"not {name[:80]!r}."
        )
    return folded


def check_role(role: str) -> Role:
    try:
        return Role(role)
    except ValueError:
        raise BadInput(f"A role is {', '.join(Role)}; not {role[:40]!r}.") from None


# Accounts ----------------------------------------------------------------------------------------------------------


def add(session: Session, name: str, password: str, role: Role) -> Person:
    """Make an account. Raises Conflict when the name is taken, BadInput for a name or password that cannot be used."""
    folded = check_name(name)
    if session.scalar(select(Person.id).where(Person.name == folded)) is not None:
        raise Conflict(f"The name {folded} is taken; choose another.")
    person = Person(name=folded, password_hash=credentials.hash_password(password), role=role)
    session.add(person)
    session.flush()
    return person


def add_without_password(session: Session, name: str, role: Role) -> Person:
    """Make an account for somebody who signs in elsewhere; no password fits until one is set."""
    person = Person(name=check_name(name), password_hash=_NO_PASSWORD, role=role)
    session.add(person)
    session.flush()
    return person


def named(session: Session, name: str) -> Person:
    person = session.scalar(select(Person).where(Person.name == name.strip().lower()))
    if person is None:
        raise NotFound(f"Nobody is called {name[:64]!r}.")
    return person


def numbered(session: Session, person_id: int) -> Person:
    person = session.get(Person, person_id) if 0 < person_id < 2**31 else None
    if person is None:
        raise NotFound(f"No person {person_id}.")
    return person


def everybody(session: Session) -> list[PersonRow]:
    """Return all accounts by name, with when they were last seen."""
    seen = select(func.max(Login.seen_at)).where(Login.person_id == Person.id).scalar_subquery()
    tokens = select(func.count()).where(ApiToken.person_id == Person.id).scalar_subquery()
    rows = session.execute(select(Person, seen, tokens).order_by(Person.name))
    return [PersonRow(p.id, p.name, p.role, p.created_at, at, n or 0, p.disabled_at is not None) for p, at, n in rows]


def has_admin(session: Session) -> bool:
    """Tell whether somebody can sign in who may let others in."""
    able = select(Person.id).where(Person.role == Role.ADMIN, Person.disabled_at.is_(None)).limit(1)
    return session.scalar(able) is not None


def can_have_admin(session: Session) -> bool:
    """Tell whether there is an admin, or an invitation by which one may still come."""
    return has_admin(session) or any(i.role == Role.ADMIN for i in open_invitations(session))


def set_role(session: Session, person: Person, role: Role) -> None:
    """Change what a person may do. Raises Conflict when no admin would be left."""
    if role != Role.ADMIN:
        _leave_an_admin(session, person)
    person.role = role


def disable(session: Session, person: Person) -> None:
    """End a person's logins and tokens; the account stays, since things belong to it."""
    _leave_an_admin(session, person)
    person.disabled_at = now()
    session.execute(delete(Login).where(Login.person_id == person.id))
    session.execute(delete(ApiToken).where(ApiToken.person_id == person.id))


def enable(session: Session, person: Person) -> None:
    person.disabled_at = None


def change_password(session: Session, person: Person, password: str, keep_login: int | None = None) -> None:
    """Set a new password and end the person's other logins."""
    person.password_hash = credentials.hash_password(password)
    others = delete(Login).where(Login.person_id == person.id)
    session.execute(others.where(Login.id != keep_login) if keep_login is not None else others)


def _leave_an_admin(session: Session, person: Person) -> None:
    if person.role != Role.ADMIN or person.disabled_at is not None:
        return
    able = select(func.count()).where(Person.role == Role.ADMIN, Person.disabled_at.is_(None))
    # Rows are locked where the database can, so that two admins cannot disable each other at once.
    session.execute(select(Person.id).where(Person.role == Role.ADMIN).with_for_update())
    if (session.scalar(able) or 0) <= 1:
        raise Conflict(f"{person.name} is the only admin; make somebody else one first.")


# Invitations -------------------------------------------------------------------------------------------------------


def invite(session: Session, role: Role, by: str = "") -> str:
    """Return the secret of a new invitation; `/invite/{secret}` is its link."""
    secret = credentials.new_secret()
    expires = now() + timedelta(days=INVITATION_DAYS)
    session.add(Invitation(secret_hash=credentials.digest(secret), role=role, invited_by=by, expires_at=expires))
    session.flush()
    return secret


def invitation(session: Session, secret: str) -> Invitation:
    """Return an invitation that can be used. Raises NotFound, which does not say which of the reasons it is."""
    wanted = select(Invitation).where(
        Invitation.secret_hash == credentials.digest(secret),
        Invitation.used_by.is_(None),
        Invitation.expires_at > now(),
    )
    found = session.scalar(wanted)
    if found is None:
        raise NotFound(
            f"This invitation is unknown, used, or older than {INVITATION_DAYS} days. Ask an admin for a new one."
        )
    return found


def open_invitations(session: Session) -> list[Invitation]:
    fresh = select(Invitation).where(Invitation.used_by.is_(None), Invitation.expires_at > now())
    return list(session.scalars(fresh.order_by(Invitation.id)))


def withdraw(session: Session, invitation_id: int) -> None:
    session.execute(delete(Invitation).where(Invitation.id == invitation_id, Invitation.used_by.is_(None)))


def accept(session: Session, secret: str, name: str, password: str | None) -> Person:
    """Make the account an invitation is for. It can be used once, also by two at the same moment.

    The password is None for somebody who signs in elsewhere.
    """
    found = invitation(session, secret)
    role = Role(found.role)
    person = add_without_password(session, name, role) if password is None else add(session, name, password, role)
    mine = update(Invitation).where(Invitation.id == found.id, Invitation.used_by.is_(None))
    if getattr(session.execute(mine.values(used_by=person.id)), "rowcount", 0) != 1:
        raise Conflict("Somebody has just used this invitation.")
    return person


# Logins ------------------------------------------------------------------------------------------------------------


def check_password(session: Session, name: str, password: str, address: str) -> Person:
    """Return who that is. Raises Busy after too many wrong passwords, Unauthorized for a wrong one.

    The caller commits in each case: wrong ones are counted.
    """
    folded = name.strip().lower()[:64]
    keys = {"pair": f"{folded} {address}"[:160], "address": f"address {address}"[:160], "name": f"name {folded}"}
    _refuse_guessing(session, keys)
    person = session.scalar(select(Person).where(Person.name == folded, Person.disabled_at.is_(None)))
    if credentials.fits(password, person.password_hash if person else None) and person is not None:
        session.execute(delete(FailedLogins).where(FailedLogins.key == keys["pair"]))
        return person
    for key in keys.values():
        _count_failure(session, key)
    raise Unauthorized("Name or password is wrong.")


def _refuse_guessing(session: Session, keys: dict[str, str]) -> None:
    fresh = select(FailedLogins).where(FailedLogins.key.in_(keys.values()), FailedLogins.since > now() - _WINDOW)
    failed = {row.key: row for row in session.scalars(fresh)}
    for kind, key in keys.items():
        row = failed.get(key)
        if row is not None and row.n >= _MAX_FAILURES[kind]:
            wait = max(int((row.since + _WINDOW - now()).total_seconds()), 1)
            raise Busy(f"{row.n} wrong passwords; try again in {-(-wait // 60)} minutes.", retry_after=wait)


def _count_failure(session: Session, key: str) -> None:
    row = session.get(FailedLogins, key, with_for_update=True)
    if row is None:
        session.add(FailedLogins(key=key, n=1, since=now()))
        session.flush()
    elif row.since < now() - _WINDOW:
        row.n, row.since = 1, now()
    else:
        row.n += 1


def sign_in(session: Session, person: Person, browser: str, address: str) -> str:
    """Return the secret of a new login, for the cookie."""
    secret = credentials.new_secret()
    session.execute(delete(Login).where(Login.expires_at < now()))
    login = Login(
        person_id=person.id,
        secret_hash=credentials.digest(secret),
        browser=browser[:200],
        address=address[:64],
        expires_at=now() + timedelta(days=LOGIN_DAYS),
    )
    session.add(login)
    session.flush()
    return secret


def sign_out(session: Session, person_id: int, login_id: int) -> None:
    session.execute(delete(Login).where(Login.id == login_id, Login.person_id == person_id))


def logins(session: Session, person_id: int) -> Sequence[Login]:
    mine = select(Login).where(Login.person_id == person_id, Login.expires_at > now())
    return session.scalars(mine.order_by(Login.seen_at.desc())).all()


def of_login(session: Session, secret: str) -> Actor | None:
    """Return who is signed in by a cookie, or None. Notes every few minutes that they were seen."""
    held = select(Login, Person).join(Person, Person.id == Login.person_id)
    row = session.execute(
        held.where(
            Login.secret_hash == credentials.digest(secret), Login.expires_at > now(), Person.disabled_at.is_(None)
        )
    ).one_or_none()
    if row is None:
        return None
    login, person = row
    if login.seen_at < now() - _SEEN_EVERY:
        login.seen_at = now()
        login.expires_at = now() + timedelta(days=LOGIN_DAYS)
    return Actor(person.name, Role(person.role), person.id, login.id)


# API tokens --------------------------------------------------------------------------------------------------------


def add_token(session: Session, person: Person, name: str, role: Role, days: int | None) -> str:
    """Return a new key; it is shown this once. `days` until it expires, None for never."""
    label = name.strip()
    if not 1 <= len(label) <= 100:
        raise BadInput(f"A token's name has 1 to 100 characters; this one has {len(label):,}.")
    if days is not None and not 1 <= days <= 3650:
        raise BadInput(f"A token lives 1 to 3650 days, or for ever; not {days:,}.")
    if not Role(person.role).covers(role):
        raise Forbidden(f"You are {person.role}; a token of yours cannot be {role}.")
    if (session.scalar(select(func.count()).where(ApiToken.person_id == person.id)) or 0) >= MAX_TOKENS:
        raise Conflict(f"You have {MAX_TOKENS} tokens already; revoke some.")
    secret = credentials.new_secret(KEY_PREFIX)
    expires = now() + timedelta(days=days) if days is not None else None
    session.add(
        ApiToken(
            person_id=person.id,
            name=label,
            secret_hash=credentials.digest(secret),
            start=secret[:12],
            role=role,
            expires_at=expires,
        )
    )
    session.flush()
    return secret


def tokens(session: Session, person_id: int) -> Sequence[ApiToken]:
    return session.scalars(select(ApiToken).where(ApiToken.person_id == person_id).order_by(ApiToken.id)).all()


def revoke(session: Session, person_id: int, token_id: int) -> None:
    gone = delete(ApiToken).where(ApiToken.id == token_id, ApiToken.person_id == person_id)
    if getattr(session.execute(gone), "rowcount", 0) != 1:
        raise NotFound(f"You have no token {token_id}.")


def of_token(session: Session, secret: str) -> Actor | None:
    """Return for whom a program asks, with the lesser of both roles; None for a key that does not count (any more)."""
    held = select(ApiToken, Person).join(Person, Person.id == ApiToken.person_id)
    fresh = or_(ApiToken.expires_at.is_(None), ApiToken.expires_at > now())
    row = session.execute(
        held.where(ApiToken.secret_hash == credentials.digest(secret), fresh, Person.disabled_at.is_(None))
    ).one_or_none()
    if row is None:
        return None
    token, person = row
    if token.used_at is None or token.used_at < now() - _SEEN_EVERY:
        token.used_at = now()
    role, most = Role(person.role), Role(token.role)
    return Actor(person.name, most if role.covers(most) else role, person.id, by_key=True)
