"""Token ids become text exactly, whatever bytes a tokenizer cut them into."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from app.tokens import Vocabulary, vocabulary, write_vocabulary

BYTES = Vocabulary([bytes([b]) for b in range(256)])


def test_the_strings_of_tokens_join_to_their_text() -> None:
    words = Vocabulary([b"The", b" cat", b"\n"])
    assert words.strings([0, 1, 2]) == ["The", " cat", "\n"]
    assert words.text([0, 1]) == "The cat"
    assert len(words) == 3


def test_a_character_cut_across_tokens_belongs_to_the_last_of_them() -> None:
    assert BYTES.strings("né".encode()) == ["n", "", "é"]
    assert BYTES.strings("🧶".encode()) == ["", "", "", "🧶"]


def test_bytes_that_are_no_text_show_as_replacement_characters() -> None:
    assert BYTES.strings([0xFF, ord("a")]) == ["\ufffd", "a"]
    assert BYTES.strings([ord("a"), 0xC3]) == ["a", "\ufffd"]
    assert BYTES.string(0xC3) == "\ufffd"


def test_a_token_beyond_the_vocabulary_is_shown_by_its_number() -> None:
    assert BYTES.strings([256, -1]) == ["<256>", "<-1>"]


@given(st.text())
def test_any_text_comes_back_from_its_bytes(text: str) -> None:
    encoded = text.encode("utf-8", "replace")
    strings = BYTES.strings(encoded)
    assert len(strings) == len(encoded)
    assert "".join(strings) == encoded.decode() == BYTES.text(encoded)


@given(st.binary())
def test_any_bytes_make_as_many_strings_as_tokens_that_join_to_the_text(raw: bytes) -> None:
    strings = BYTES.strings(raw)
    assert len(strings) == len(raw)
    assert "".join(strings) == BYTES.text(raw)


def test_a_vocabulary_file_keeps_every_byte(tmp_path: Path) -> None:
    tokens = [bytes([b, 255 - b]) for b in range(256)] + [b"", b'"\\', "é".encode()]
    write_vocabulary(tmp_path / "vocabulary.json", tokens)
    assert vocabulary(tmp_path / "vocabulary.json")._tokens == tokens
