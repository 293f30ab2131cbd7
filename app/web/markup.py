"""Model text as markup: tokens, windows of tokens, examples, labels; escaped, with what would not be seen made visible.

In Python where a page has so many of them that templates would take longer than all the rest of it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from functools import lru_cache

from markupsafe import Markup

from app import present
from app.catalog import FeatureRow
from app.comments import MENTION

_SIGNS = {"\t": "⇥", "\r": "␍"}
_PART = Markup('<i class="part" title="{}">⋯</i>').format(present.PART)
_CUT = '<i class="cut">…</i>'
_UNNAMED = Markup('<span class="muted">no label</span>')
_TICKED = re.compile(r"`([^`]+)`")


class _Marks(dict[int, str]):
    """A translation table that names what would not be seen, filled as characters occur."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character == "\n":
            mark = '<i class="nl">↵</i><i class="br">\n</i>'
        elif character in _SIGNS:
            mark = f'<i class="nl">{_SIGNS[character]}</i>'
        elif present.hidden(character):
            mark = f'<i class="nl">U+{code:04X}</i>'
        else:
            mark = character
        self[code] = mark
        return mark


_MARKS = _Marks()


def shown(text: str) -> Markup:
    """Return model text as markup: escaped, line breaks and tabs marked, characters that would not be seen named.

    A line break is followed by an element that a style sheet may turn into a real one.
    """
    return Markup(_shown(text))  # noqa: S704 - escaped, and the marks are ours


def _shown(text: str) -> str:
    # A page has a thousand such pieces, and text that knows it is markup takes as long to make as all of this.
    escaped = _escape(text)
    return escaped if text.isprintable() else escaped.translate(_MARKS)


def _escape(text: str) -> str:
    return html.escape(text, quote=False).replace('"', "&#34;").replace("'", "&#39;")


def token(text: str) -> Markup:
    """Return one token of a text as markup: as `shown`, and visible where it ends inside a character."""
    return shown(text) if text else _PART


def _token(text: str) -> str:
    return _shown(text) if text else str(_PART)


def window(shown_window: present.Window) -> Markup:
    """Return a window of tokens as markup."""
    return Markup(_window(shown_window))  # noqa: S704 - every part is escaped or ours


def _window(w: present.Window) -> str:
    parts = ['<span class="window">', _CUT if w.cut_before else ""]
    for text, level, tip, peak, special in w.pieces:
        if level:
            kind = f"a{level} peak" if peak else f"a{level}"
            parts.append(f'<mark class="{kind}" title="{_escape(tip)}">{_token(text)}</mark>')
        elif special:
            parts.append(f'<i class="special">{_shown(text)}</i>')
        elif peak:
            parts.append(f'<span class="looked" title="{_escape(tip)}">{_token(text)}</span>')
        else:
            parts.append(_shown(text))
    parts += [_CUT if w.cut_after else "", "</span>"]
    return "".join(parts)


def example(shown: present.Shown, path: str, kept: str) -> Markup:
    """Return an example as an item of a list: its window, what leaving the feature out does, the ones like it.

    Whole contexts have addresses under the feature's path; `kept` is their query.
    """
    w, more, effect = shown
    alike = ""
    if more:
        items = (f'<li><span class="value">{present.amount(m.max)}</span> {_window(m)}</li>' for m in more)
        alike = (
            f'<details class="more"><summary>{len(more)} more like this</summary><ul>{"".join(items)}</ul></details>'
        )
    return _item(w, _tools(w, path, kept) + (_effect(effect) if effect else "") + alike)


def quiet(shown: present.Quiet, path: str, kept: str) -> Markup:
    """Return a context without an activation as an item of a list, as `example`."""
    why = ""
    if shown.neighbour is not None:
        place, index = _escape(path.rpartition("/")[0]), shown.neighbour.index
        link = f'<a href="{place}/{index}">{index}</a>'
        why = f'<p class="effect"><span class="muted">where its neighbour</span> {link} {named(shown.neighbour)} '
        why += '<span class="muted">peaks</span></p>'
    return _item(shown.window, _tools(shown.window, path, kept) + why)


def _item(w: present.Window, rest: str) -> Markup:
    value = present.amount(w.max)
    text = f'<li class="example"><span class="value">{value}</span><div class="what">{_window(w)}{rest}</div></li>\n'
    return Markup(text)  # noqa: S704 - every part is escaped or ours


def _tools(w: present.Window, path: str, kept: str) -> str:
    title = f"<cite>{_shown(w.title)}</cite>" if w.title else ""
    whole = f"{_escape(path)}/context/{w.context}{_escape(kept)}"
    link = f'<a href="{whole}" data-context>whole context</a>' if w.cut_before or w.cut_after else ""
    return f'<span class="tools">{title}{link}</span>'


def _effect(e: present.EffectView) -> str:
    parts = ['<p class="effect"><span class="muted">without it</span> ']
    if e.loss_change is not None:
        parts.append(f"loss {present.signed(e.loss_change)} nats ")
    parts.append(f'<span class="muted">KL {present.amount(e.kl)}</span>')
    parts += [f" · votes for {_votes(e.up)}" if e.up else "", f" · against {_votes(e.down)}" if e.down else ""]
    if e.n_later:
        later = "" if e.later_loss_change is None else f"loss {present.signed(e.later_loss_change)} "
        tokens = f"{e.n_later} tokens" if e.n_later > 1 else "token"
        parts.append(f' <span class="muted">· next {tokens}: {later}KL {present.amount(e.later_kl)}</span>')
    return "".join([*parts, "</p>"])


def _votes(votes: Sequence[present.Vote]) -> str:
    return "".join(
        f'<code class="chip">{chip(vote.token)}</code> {present.signed(vote.change * 100)} ' for vote in votes[:3]
    )


def label(text: str) -> Markup:
    """Return an explanation as markup: what stands in backticks are tokens."""
    parts = [
        f'<code class="chip">{chip(part)}</code>' if i % 2 else _shown(part)
        for i, part in enumerate(_TICKED.split(text))
    ]
    return Markup("".join(parts))  # noqa: S704 - every part is escaped


def named(feature: FeatureRow) -> Markup:
    """Return a feature's label as markup, or that it has none."""
    return label(feature.label) if feature.label else _UNNAMED


def said(text: str) -> Markup:
    """Return what a person wrote as markup: as `label`, and people's names stand out."""
    parts: list[Markup] = []
    end = 0
    for match in MENTION.finditer(text):
        parts += [label(text[end : match.start()]), Markup('<b class="mention">{}</b>').format(match[0])]
        end = match.end()
    return Markup().join([*parts, label(text[end:])])


def chip(text: str) -> Markup:
    """Return one token for a list: as `shown`, with spaces at its ends visible and counted when there are many."""
    return _chip(text) if len(text) <= _LONG_TOKEN else _chip.__wrapped__(text)


_LONG_TOKEN = 64


@lru_cache(maxsize=20_000)
def _chip(text: str) -> Markup:
    body = text.strip(" ")
    if not body:
        return Markup('<i class="nl">{}</i>').format(_spaces(len(text), "␣") or "∅")
    before, after = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    dots = Markup('<i class="ws">{}</i>')
    return Markup().join(
        [
            dots.format(_spaces(before, "·")) if before else "",
            shown(body),
            dots.format(_spaces(after, "·")) if after else "",
        ]
    )


def token_chip(text: str) -> Markup:
    """Return one token of a text for a list: as `chip`, and a mark where it ends inside a character."""
    return chip(text) if text else _PART


def _spaces(n: int, sign: str) -> str:
    return sign * n if n <= 3 else f"{sign}×{n}"
