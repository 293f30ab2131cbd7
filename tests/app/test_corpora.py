"""Corpora: what is read and refused, and contexts cut from a token stream."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import zstandard
from sqlalchemy.orm import Session

from app import corpora
from app.corpora import Document, Stream, write_stream
from app.errors import BadFile, Conflict, NotFound
from app.settings import Settings

ROWS = [{"title": "One", "source": "s", "text": "naïve 猫"}, {"title": "Two", "text": "second\nline"}]


def jsonl() -> bytes:
    return "\n".join(json.dumps(row) for row in ROWS).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.jsonl", jsonl()),
        ("c.jsonl.xz", lzma.compress(jsonl())),
        ("c.jsonl.zst", zstandard.ZstdCompressor().compress(jsonl())),
    ],
)
def test_jsonl_is_read_plain_and_compressed(
    session: Session, settings: Settings, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    corpus = corpora.add_corpus(session, settings, tmp_path / name, "mine")
    read = list(corpora.documents(settings.corpus_dir(corpus.hash)))
    assert [d.text for d in read] == [row["text"] for row in ROWS]
    assert (corpus.n_documents, corpus.n_chars) == (2, sum(len(row["text"]) for row in ROWS))


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(
    session: Session, settings: Settings, tmp_path: Path
) -> None:
    text = "".join(f"paragraph {i} {'word ' * 40}\n\n" for i in range(200))
    (tmp_path / "book.txt").write_text(text)
    corpus = corpora.add_corpus(session, settings, tmp_path / "book.txt", "book")
    read = list(corpora.documents(settings.corpus_dir(corpus.hash)))
    assert len(read) > 3
    assert "".join(d.text for d in read) == text


def test_the_same_corpus_twice_is_one_and_other_content_conflicts(
    session: Session, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    first = corpora.add_corpus(session, settings, tmp_path / "a.txt", "mine")
    assert corpora.add_corpus(session, settings, tmp_path / "a.txt", "mine").id == first.id
    (tmp_path / "a.txt").write_text("other text")
    with pytest.raises(Conflict, match="mine"):
        corpora.add_corpus(session, settings, tmp_path / "a.txt", "mine")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": 1}', "line 1"),
        ("a.jsonl", b'{"title": "x"}', "text"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"text": ""}', "no text"),
        ("a.jsonl.xz", b"not xz at all", "read"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.pdf", b"x", ".jsonl"),
    ],
)
def test_a_bad_corpus_is_refused_and_leaves_nothing(
    session: Session, settings: Settings, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    before = sorted(settings.data_dir.rglob("*"))
    with pytest.raises(BadFile, match=says):
        corpora.add_corpus(session, settings, tmp_path / name, "bad")
    assert sorted(settings.data_dir.rglob("*")) == before


def test_an_unknown_corpus_is_answered_with_the_known_ones(session: Session) -> None:
    with pytest.raises(NotFound, match="made"):
        corpora.corpus_named(session, "nothing")


def test_contexts_are_the_stream_behind_a_bos_token(tmp_path: Path) -> None:
    write_stream(tmp_path / "t", [(Document("A", "", ""), [1, 2, 3]), (Document("B", "", ""), [4, 5, 6, 7])], 9, 10)
    stream = Stream.open(tmp_path / "t")
    assert stream.n_contexts(4, bos=8) == 3
    assert stream.contexts(np.array([0, 1]), 4, bos=8).tolist() == [[8, 1, 2, 3], [8, 9, 4, 5]]
    assert stream.context(1, 4, bos=None) == [4, 5, 6, 7]
    assert [stream.title(1, position, 4, bos=8) for position in range(4)] == ["A", "A", "B", "B"]
