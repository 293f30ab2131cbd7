"""The picture of a feature that chat programs show under a link: its label, its strongest example, how often it fires.

Drawn with Pillow and the typeface inside it, which has plain Latin letters. Words of other scripts are drawn in a
typeface of this machine where one has them; else their script is named, since empty boxes would say nothing.
"""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import Any

from fastapi import APIRouter
from PIL import Image, ImageDraw, ImageFont
from starlette.responses import Response

from app import catalog, present
from app.present import Window
from app.web.access import GUEST
from app.web.feature import Choices, FeaturePage, load
from app.web.pages import Config, Db

router = APIRouter()

WIDTH, HEIGHT, MARGIN = 1200, 630, 70
PAPER, INK, MUTED, HEAT = (251, 250, 246), (34, 33, 31), (102, 98, 90), (211, 96, 20)
TYPEFACES = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "msyh.ttc")
"""Looked for on this machine, in this order, for words that Pillow's own cannot draw."""
_Run = tuple[str, int]
"""A word, with the spaces in front of it, and its shade."""


@router.get("/{model}/{source}/{index}/preview.png", dependencies=[GUEST])
def preview(model: str, source: str, index: str, session: Db, settings: Config) -> Response:
    page = load(session, settings, model, source, catalog.parse_index(index), Choices())
    return Response(draw(page), media_type="image/png", headers={"cache-control": "public, max-age=3600"})


def draw(page: FeaturePage) -> bytes:
    """Return the picture as PNG, 1200 x 630 as the Open Graph's readers want it."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, 14, HEIGHT), fill=HEAT)
    place = f"{page.source.model_id}  /  {page.source.name}  /  {page.feature.index}"
    canvas.text((MARGIN, 56), place, MUTED, _fonts(30)[0])
    label = page.label.replace("`", "") or "No label yet"
    y = _flow(canvas, [(word, 0) for word in _words(label)], 110, 58, n_lines=3) + 24
    if page.view and page.view.top:
        _flow(canvas, list(_runs(page.view.top[0].window)), y, 36, n_lines=5)
    if page.view:
        view = page.view
        figures = f"active on {present.percent(view.density)} of tokens, up to {present.amount(view.max_act)}"
        canvas.text((MARGIN, HEIGHT - 84), figures, MUTED, _fonts(30)[0])
    canvas.text((WIDTH - MARGIN, HEIGHT - 84), "SAE Atlas", INK, _fonts(30)[0], anchor="ra")
    body = io.BytesIO()
    image.quantize(64).save(body, "PNG", optimize=True)
    return body.getvalue()


@lru_cache(maxsize=8)
def _fonts(size: int) -> list[Any]:
    """Pillow's own typeface, then those of TYPEFACES that are on this machine."""
    found: list[Any] = [ImageFont.load_default(size)]
    for name in TYPEFACES:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return found


def typeset(word: str, fonts: list[Any]) -> tuple[str, Any]:
    """Return a word with the first typeface that has all its characters; without one, with its scripts named."""
    for font in fonts:
        if all(_has(font, character) for character in word):
            return word, font
    own = fonts[0]
    # A letter without its accent reads better than the name of its script.
    plain = unicodedata.normalize("NFKD", word)
    word = "".join(c for c in plain if not unicodedata.combining(c)) if _latin(word) else word
    parts = [
        "".join(characters) if drawn else f"[{_script(''.join(characters))}]"
        for drawn, characters in groupby(word, lambda character: _has(own, character))
    ]
    return "".join(parts), own


def _latin(word: str) -> bool:
    return all(not c.isalpha() or "LATIN" in unicodedata.name(c, "") for c in word)


@lru_cache(maxsize=20_000)
def _has(font: Any, character: str) -> bool:
    """Tell whether a typeface draws a character as something else than it draws what no typeface has."""
    mask, missing = font.getmask(character), font.getmask("\uffff")
    return character.isspace() or (mask.size, bytes(mask)) != (missing.size, bytes(missing))


def _script(text: str) -> str:
    """Return what the characters are in a word, such as Cyrillic or CJK."""
    first = unicodedata.name(text[0], "symbol").split()[0].split("-")[0]
    return first if first == "CJK" else first.capitalize()


def _runs(window: Window) -> Iterator[_Run]:
    for piece in window.pieces:
        if not piece.special:
            yield from ((word, piece.level) for word in _words(piece.text))


def _words(text: str) -> list[str]:
    """Cut a text into words, each with the space in front of it; what is not to be seen is left out."""
    plain = "".join(" " if c.isspace() else "" if present.hidden(c) else c for c in text)
    parts = plain.split(" ")
    return [word for i, part in enumerate(parts) if (word := part if i == 0 else f" {part}")]


def _flow(canvas: Any, runs: list[_Run], y: float, size: int, n_lines: int) -> float:
    """Write words in lines from height y down, shaded ones on their colour; return the height below them."""
    x, line_height, line = float(MARGIN), size * 1.35, 1
    for written, level in runs:
        word, font = typeset(written, _fonts(size))
        width = canvas.textlength(word, font=font)
        if x + width > WIDTH - MARGIN and x > MARGIN:
            if line == n_lines:
                canvas.text((x, y), "…", MUTED, font)
                break
            x, y, line = float(MARGIN), y + line_height, line + 1
            word = word.lstrip(" ")
            width = canvas.textlength(word, font=font)
        if level:
            share = 0.1 + 0.6 * level / present.LEVELS
            shade = tuple(round(p + (h - p) * share) for p, h in zip(PAPER, HEAT, strict=True))
            bottom = y + size * 1.2
            canvas.rectangle((x, y, x + width, bottom), fill=shade)
            canvas.rectangle((x, bottom - 1 - level // 3, x + width, bottom), fill=HEAT)
        canvas.text((x, y), word, INK, font)
        x += width
    return y + line_height
