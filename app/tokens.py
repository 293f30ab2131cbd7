"""Token ids into text, exactly and without a tokenizer. No torch, no network.

A model's directory holds vocabulary.json: one string a token whose characters U+0000..U+00FF are the token's bytes.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import cast


class Vocabulary:
    """The bytes of every token of one tokenizer."""

    def __init__(self, tokens: list[bytes]) -> None:
        self._tokens = tokens
        self._whole = [_text(token) for token in tokens]
        """None where a token holds parts of characters."""

    def __len__(self) -> int:
        return len(self._tokens)

    def strings(self, ids: Iterable[int]) -> list[str]:
        """One string per token; joined they are the text.

        A character cut across tokens belongs to the last of them and the ones before are empty. Bytes that are no
        UTF-8 become U+FFFD.
        """
        ids = list(ids)
        if ids and min(ids) >= 0 and max(ids) < len(self._whole):
            whole = [self._whole[i] for i in ids]
            if None not in whole:
                return cast(list[str], whole)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        strings = [decoder.decode(self._bytes(token)) for token in ids]
        tail = decoder.decode(b"", final=True)
        if tail and strings:
            strings[-1] += tail
        return strings

    def reader(self) -> Reader:
        """Return something that turns ids into text as they come."""
        return Reader(self._bytes)

    def text(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes(token) for token in ids).decode("utf-8", "replace")

    def string(self, token: int) -> str:
        return self._bytes(token).decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        return self._tokens[token] if 0 <= token < len(self._tokens) else f"<{token}>".encode()


def _text(token: bytes) -> str | None:
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return None


class Reader:
    """Tokens one by one: what each adds to the text, as `Vocabulary.strings` would say of all but the last."""

    def __init__(self, to_bytes: Callable[[int], bytes]) -> None:
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def read(self, token: int) -> str:
        return self._decoder.decode(self._to_bytes(token))

    def rest(self) -> str:
        """What is left of a character that was never completed."""
        return self._decoder.decode(b"", final=True)


def write_vocabulary(path: Path, tokens: list[bytes]) -> None:
    path.write_text(json.dumps([token.decode("latin-1") for token in tokens]), encoding="ascii")


@lru_cache(maxsize=16)
def vocabulary(path: Path) -> Vocabulary:
    """Read a vocabulary.json; kept in memory, since a model's directory never changes."""
    return Vocabulary([token.encode("latin-1") for token in json.loads(path.read_text(encoding="ascii"))])
