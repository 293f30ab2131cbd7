"""What people say about features and lists: writing and deleting it, and the comments that name who looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Form, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse, RedirectResponse, Response

from app import comments
from app.comments import Said
from app.errors import BadInput
from app.people import Actor, Role
from app.web import audit
from app.web.access import EDITOR, VIEWER, Who
from app.web.pages import Db, render
from app.web.problems import Problem, of

router = APIRouter()
Subject = Annotated[str, Form(max_length=500)]


@dataclass(frozen=True)
class Talk:
    """The comments' part of a page."""

    subject: str
    said: tuple[Said, ...]
    may_write: bool
    team: bool
    """Whether there are others to mention."""
    text: str = ""
    most: int = comments.MAX_TEXT
    problem: Problem | None = None


@dataclass(frozen=True)
class TalkPage:
    """A page with nothing but a comment that could not be written, so that its words are not lost."""

    talk: Talk

    @property
    def back(self) -> str:
        return comments.page_of(self.talk.subject)


@dataclass(frozen=True)
class MentionsPage:
    said: tuple[Said, ...]
    older: int | None
    """Where the next page begins."""

    @property
    def n_unread(self) -> int:
        return sum(each.unread for each in self.said)


def talk(session: Session, who: Actor | None, subject: str, text: str = "", problem: Problem | None = None) -> Talk:
    """Return what a page shows of the comments on a subject that `who` may see."""
    may_write = who is not None and who.role.covers(Role.EDITOR)
    said = tuple(comments.about(session, who, subject))
    return Talk(subject, said, may_write, who is not None and who.id is not None, text, problem=problem)


@router.post("/comments", dependencies=[EDITOR])
def write(
    request: Request, who: Who, session: Db, subject: Subject = "", text: str = Form("", max_length=40_000)
) -> Response:
    try:
        made = comments.write(session, who, subject, text)
    except BadInput as error:
        session.rollback()
        about = comments.check_subject(session, who, subject)
        page = TalkPage(talk(session, who, about, text, of(error)))
        return render(request, "comment.html", page, status=error.status)
    session.commit()
    audit.about(request, made.subject)
    return RedirectResponse(f"{quote(comments.page_of(made.subject))}#comment-{made.id}", 303)


@router.post("/comments/{comment_id}/delete", dependencies=[EDITOR])
def delete(comment_id: int, who: Who, session: Db) -> Response:
    subject = comments.remove(session, who, comment_id)
    session.commit()
    return RedirectResponse(f"{quote(comments.page_of(subject))}#comments", 303)


@router.get("/mentions", dependencies=[VIEWER])
def mentions_page(
    request: Request, who: Who, session: Db, before: Annotated[int, Query(ge=1, lt=2**31)] = 2**31 - 1
) -> Response:
    said, older = comments.mentions(session, who, before)
    return render(request, "mentions.html", MentionsPage(tuple(said), older))


@router.post("/mentions/read", dependencies=[VIEWER])
def read(who: Who, session: Db) -> Response:
    comments.mark_read(session, who)
    session.commit()
    return RedirectResponse("/mentions", 303)


@router.get("/mentions/unread", dependencies=[VIEWER])
def unread(who: Who, session: Db) -> Response:
    """The number beside a person's name on every page; asked for once the page is shown, so that none waits for it."""
    n = comments.unread(session, who)
    return HTMLResponse(f'<span class="count" title="comments that name you">{n}</span>' if n else "")
