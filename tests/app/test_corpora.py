"""Corpora: what is read and refused, and contexts cut from a token stream."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import zstandard
from sqlalchemy.orm import Session

from app import corpora
from app.corpora import Stream, write_stream
from app.documents import Columns, Dataset, Document, Limits, read, read_dataset
from app.errors import BadFile, BadInput, Conflict, NotFound, TooLarge
from app.settings import Settings
from app.tables import Corpus

ROWS = [{"title": "One", "source": "s", "text": "naïve 猫"}, {"title": "Two", "text": "second\nline"}]


def jsonl() -> bytes:
    return "\n".join(json.dumps(row) for row in ROWS).encode()


def add(session: Session, settings: Settings, path: Path, name: str, columns: Columns | None = None) -> Corpus:
    return corpora.add_corpus(session, settings, read(path, columns), name)


def stored(settings: Settings, corpus: Corpus) -> list[Document]:
    return list(corpora.documents(settings.corpus_dir(corpus.hash)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.jsonl", jsonl()),
        ("c.jsonl.gz", gzip.compress(jsonl())),
        ("c.jsonl.xz", lzma.compress(jsonl())),
        ("c.jsonl.zst", zstandard.ZstdCompressor().compress(jsonl())),
    ],
)
def test_jsonl_is_read_plain_and_compressed(
    session: Session, settings: Settings, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    corpus = add(session, settings, tmp_path / name, "mine")
    read = list(corpora.documents(settings.corpus_dir(corpus.hash)))
    assert [d.text for d in read] == [row["text"] for row in ROWS]
    assert (corpus.n_documents, corpus.n_chars) == (2, sum(len(row["text"]) for row in ROWS))


def test_plain_text_is_cut_at_blank_lines_and_nothing_is_lost(
    session: Session, settings: Settings, tmp_path: Path
) -> None:
    text = "".join(f"paragraph {i} {'word ' * 40}\n\n" for i in range(200))
    (tmp_path / "book.txt").write_text(text)
    corpus = add(session, settings, tmp_path / "book.txt", "book")
    read = list(corpora.documents(settings.corpus_dir(corpus.hash)))
    assert len(read) > 3
    assert "".join(d.text for d in read) == text


def test_the_same_corpus_twice_is_one_and_other_content_conflicts(
    session: Session, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    first = add(session, settings, tmp_path / "a.txt", "mine")
    assert add(session, settings, tmp_path / "a.txt", "mine").id == first.id
    assert add(session, settings, tmp_path / "a.txt", "under another name").id == first.id
    (tmp_path / "a.txt").write_text("other text")
    with pytest.raises(Conflict, match="mine"):
        add(session, settings, tmp_path / "a.txt", "mine")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": 1}', "line 1"),
        ("a.jsonl", b'{"title": "x"}', "text"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.jsonl", b'{"text": ""}', "no text"),
        ("a.jsonl.xz", b"not xz at all", "read"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.txt", b"good\nbad \x00 line", "line 2 holds NUL"),
        ("a.txt", b"", "no text"),
        ("a.jsonl", b'{"text": "good"}\n\n{"text": ', "line 3"),
        ("a.jsonl", b'{"body": "good"}', 'no field "text"; there are: body'),
        ("a.jsonl.xz", lzma.compress((b'{"text": "' + b"x" * 2**20 + b'"}\n') * 100, preset=1), "bomb"),
        ("a.parquet", b"PAR1 but no more", "parquet"),
        ("a.pdf", b"x", ".jsonl"),
    ],
)
def test_a_bad_corpus_is_refused_and_leaves_nothing(
    session: Session, settings: Settings, tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    before = sorted(settings.data_dir.rglob("*"))
    with pytest.raises(BadFile, match=says):
        add(session, settings, tmp_path / name, "bad")
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
    for bos in (None, 99):
        assert [stream.token(1, p, 4, bos) for p in range(4)] == stream.context(1, 4, bos)
        assert stream.contexts(np.array([1]), 4, bos).tolist() == [stream.context(1, 4, bos)]
    assert [stream.title(1, position, 4, bos=8) for position in range(4)] == ["A", "A", "B", "B"]


def parquet(path: Path) -> Path:
    """Three rows whose columns are not called as ours are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"body": ["eins", "zwei", "drei"], "name": ["A", "B", "C"], "url": ["u1", "u2", None], "n": [1, 2, 3]}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


def test_parquet_is_read_by_the_columns_that_were_named(session: Session, settings: Settings, tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet")
    corpus = add(session, settings, path, "p", Columns("body", "name", "url"))
    assert stored(settings, corpus) == [
        Document("A", "u1", "eins"),
        Document("B", "u2", "zwei"),
        Document("C", "", "drei"),
    ]
    with pytest.raises(BadFile, match='no column "text"; there are: body, name, url, n'):
        add(session, settings, path, "q")
    with pytest.raises(BadFile, match='"n" is int, not a string'):
        add(session, settings, path, "q", Columns("n"))


def test_a_dataset_streams_through_the_loader_that_reads_the_hub(
    session: Session, settings: Settings, tmp_path: Path
) -> None:
    parquet(tmp_path / "set" / "train.parquet")
    reading = read_dataset(Dataset(str(tmp_path / "set")), Columns("body", "name"))
    corpus = corpora.add_corpus(session, settings, reading, "set", limits=Limits(max_documents=2))
    assert [(d.title, d.text) for d in stored(settings, corpus)] == [("A", "eins"), ("B", "zwei")]
    with pytest.raises(BadFile, match='no field "text"'):
        corpora.add_corpus(session, settings, read_dataset(Dataset(str(tmp_path / "set"))), "other")
    with pytest.raises(BadFile, match="cannot be opened"):
        corpora.add_corpus(session, settings, read_dataset(Dataset(str(tmp_path / "nowhere"))), "other")


@pytest.mark.parametrize("name", ["../../etc", "http://169.254.169.254/x", "file:///etc", "a/b/c", "", "-x/y", "a/..b"])
def test_a_dataset_id_that_is_none_is_refused_before_a_socket_opens(name: str) -> None:
    with pytest.raises(BadInput, match="dataset of the hub"):
        Dataset(name).checked()


def test_a_directory_is_read_in_the_order_of_its_names(session: Session, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "d" / "b").mkdir(parents=True)
    (tmp_path / "d" / "b" / "2.jsonl").write_bytes(jsonl())
    (tmp_path / "d" / "1.txt").write_text("first")
    (tmp_path / "d" / "ignored.pdf").write_bytes(b"\x00")
    corpus = add(session, settings, tmp_path / "d", "d")
    assert [d.text for d in stored(settings, corpus)] == ["first", "naïve 猫", "second\nline"]
    (tmp_path / "d" / "b" / "2.jsonl").write_text("{")
    with pytest.raises(BadFile, match=r"b/2\.jsonl, line 1"):
        add(session, settings, tmp_path / "d", "e")


def test_limits_end_a_corpus_or_refuse_it(session: Session, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(jsonl())
    cut = corpora.add_corpus(session, settings, read(tmp_path / "c.jsonl"), "cut", limits=Limits(max_chars=9))
    assert [d.text for d in stored(settings, cut)] == ["naïve 猫", "se"]
    before = sorted(settings.data_dir.rglob("*"))
    with pytest.raises(TooLarge, match="more than the 12 bytes"):
        corpora.add_corpus(session, settings, read(tmp_path / "c.jsonl"), "big", limits=Limits(max_bytes=12))
    assert sorted(settings.data_dir.rglob("*")) == before


def test_a_corpus_is_removed_unless_some_evidence_shows_it(
    session: Session, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    corpus = add(session, settings, tmp_path / "a.txt", "mine")
    left = corpora.remove_corpus(session, settings, "mine")
    corpora.delete_files(left)
    assert corpus.hash not in [p.name for p in (settings.data_dir / "corpora").iterdir()]
    with pytest.raises(Conflict, match="tiny/1-demo"):
        corpora.remove_corpus(session, settings, "made")


def test_progress_reaches_the_end_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl.xz").write_bytes(lzma.compress(jsonl()))
    reading = read(tmp_path / "c.jsonl.xz")
    assert reading.share() == 0
    assert len(list(reading.documents)) == 2
    assert reading.share() == 1
