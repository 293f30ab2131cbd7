"""What is asked of a text that somebody pasted before it goes to the worker."""

from __future__ import annotations

from app.errors import BadInput, TooLarge
from app.settings import Settings


def check_text(settings: Settings, text: str) -> None:
    """Raise TooLarge or BadInput, with both numbers, for a text that the worker need not see."""
    size = len(text.encode("utf-8", "replace"))
    if size > settings.max_text_bytes:
        raise TooLarge(f"The text is {size:,} bytes; up to {settings.max_text_bytes:,} are read. Shorten it.")
    if not text.strip():
        raise BadInput("The text is empty; write a few words.")
