"""Who looked at and used which SAE, in team mode: written beside the request, once for a person, an SAE and a day."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from app import cards, log
from app.cards import Visit
from app.web.access import actor_of

_logger = log.get("web")
_MOST = 100_000


class Visits:
    """Counts visits of one web process. Most cost a look into a set; a new one is written by a thread of its own."""

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._lock = threading.Lock()
        self._day = ""
        self._known: set[tuple[int, str, Visit]] = set()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="visits")

    def note(self, source_id: int, who: str, kind: Visit) -> None:
        day, key = cards.today(), _key(source_id, who, kind)
        with self._lock:
            if day != self._day or len(self._known) > _MOST:
                self._day, self._known = day, set()
            if key in self._known:
                return
            self._known.add(key)
        self._writer.submit(self._write, source_id, who, kind, day)

    def _write(self, source_id: int, who: str, kind: Visit, day: str) -> None:
        try:
            with self._sessions.begin() as session:
                cards.visit(session, source_id, who, kind, day)
        except IntegrityError:
            _logger.debug("another process counted this visit", source=source_id)
        except SQLAlchemyError:
            _logger.exception("a visit could not be counted", source=source_id)
            with self._lock:
                self._known.discard((source_id, who, kind))

    def close(self) -> None:
        """Write what is left."""
        self._writer.shutdown()


def _key(source_id: int, who: str, kind: Visit) -> tuple[int, str, Visit]:
    return source_id, who, kind


def note(request: Request, source_ids: Iterable[int], kind: Visit) -> None:
    """Count that whoever asks looks at SAEs, or uses them; not without accounts."""
    actor = actor_of(request)
    if actor is None or actor.id is None:
        return
    visits: Visits = request.app.state.visits
    for source_id in source_ids:
        visits.note(source_id, actor.name, kind)
