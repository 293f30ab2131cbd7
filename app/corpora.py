"""Corpora in the data directory: documents as they came, and their token streams. Torch-free; knows no tokenizer.

    corpora/{hash}/documents.jsonl.zst                  {"title", "source", "text"} a line
    corpora/{hash}/tokens-{tokenizer_hash}/stream.bin   token ids of all documents, uint16 or uint32, little-endian
                                          /documents.json {"starts", "titles", "sources", "dtype", "n_tokens"}

Documents follow each other with one separator token between them; no BOS inside. A context is a BOS token (where the
model has one) and the next context_size - 1 tokens of the stream, so one stream serves every context size.

Evidence that was imported without its corpus has a stream of its own: a context an example, padded to one size, with
"lengths" in documents.json and its own vocabulary.json, since its tokens are known as strings only.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.documents import Columns, Document, Limits, Reading, Report, bounded, numbered_lines, parse_lines
from app.errors import BadFile, BadInput, Conflict, NotFound
from app.settings import Settings
from app.tables import Corpus, Harvest, Source

DOCUMENTS = "documents.jsonl.zst"
VOCABULARY = "vocabulary.json"
IMPORTED = "imported"
"""The tokenizer of evidence that came without its model: tokens are strings with a vocabulary of their own."""
_CORPUS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,99}")


@dataclass(frozen=True)
class Stream:
    """A tokenised corpus, memory-mapped."""

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    starts: list[int]
    """Offset in tokens at which each document begins."""
    titles: list[str]
    sources: list[str]
    lengths: list[int] = field(default_factory=list[int])
    """Tokens of each context before its padding; empty where contexts are cut from running text."""

    @classmethod
    def open(cls, directory: Path) -> Stream:
        """Map a tokens directory. Kept open, since a stream never changes."""
        return _open_stream(directory)

    def n_contexts(self, context_size: int, bos: int | None) -> int:
        return len(self.tokens) // (context_size - (bos is not None))

    def context(self, row: int, context_size: int, bos: int | None) -> list[int]:
        """The token ids of one context, [context_size]."""
        body = context_size - (bos is not None)
        ids = self.tokens[row * body : (row + 1) * body].tolist()
        if bos is not None:
            ids = [bos, *ids]
        return ids[: self.lengths[row]] if self.lengths else ids

    def token(self, row: int, position: int, context_size: int, bos: int | None) -> int:
        """One token of `context`, without reading the others."""
        if bos is not None and position == 0:
            return bos
        has_bos = bos is not None
        return int(self.tokens[row * (context_size - has_bos) + position - has_bos])

    def contexts(self, rows: npt.NDArray[np.int64], context_size: int, bos: int | None) -> npt.NDArray[np.int64]:
        """The token ids of some contexts, [len(rows), context_size]."""
        body = context_size - (bos is not None)
        offsets = rows[:, None] * body + np.arange(body)
        ids = self.tokens[offsets].astype(np.int64)
        if bos is None:
            return ids
        return np.concatenate([np.full((len(rows), 1), bos, dtype=np.int64), ids], axis=1)

    def title(self, row: int, position: int, context_size: int, bos: int | None) -> str:
        """Title and source of the document that holds a position of a context."""
        has_bos = bos is not None
        offset = row * (context_size - has_bos) + max(position - has_bos, 0)
        number = max(bisect.bisect_right(self.starts, offset) - 1, 0)
        title, source = self.titles[number], self.sources[number]
        return title if source in title else f"{title} · {source}" if title else source


@lru_cache(maxsize=32)
def _open_stream(directory: Path) -> Stream:
    about = json.loads((directory / "documents.json").read_text())
    tokens = np.memmap(directory / "stream.bin", dtype=np.dtype(about["dtype"]).newbyteorder("<"), mode="r")
    return Stream(tokens.view(np.ndarray), about["starts"], about["titles"], about["sources"], about.get("lengths", []))


def write_stream(
    directory: Path, token_rows: Iterable[tuple[Document, list[int]]], separator: int, d_vocab: int
) -> None:
    """Write a tokens directory, whole or not at all. Rows come in the order of the documents."""
    dtype = np.dtype("<u2" if d_vocab <= 65536 else "<u4")
    directory.parent.mkdir(parents=True, exist_ok=True)
    starts: list[int] = []
    titles: list[str] = []
    sources: list[str] = []
    n_tokens = 0
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".new-") as scratch:
        with (Path(scratch) / "stream.bin").open("wb") as out:
            for document, ids in token_rows:
                starts.append(n_tokens)
                titles.append(document.title)
                sources.append(document.source)
                out.write(np.array([*ids, separator], dtype=dtype).tobytes())
                n_tokens += len(ids) + 1
        about = {"starts": starts, "titles": titles, "sources": sources, "dtype": dtype.name, "n_tokens": n_tokens}
        (Path(scratch) / "documents.json").write_text(json.dumps(about))
        if not directory.exists():
            os.rename(scratch, directory)
            Path(scratch).mkdir()


def tokens_dir(settings: Settings, corpus_hash: str, tokenizer_hash: str) -> Path:
    return settings.corpus_dir(corpus_hash) / f"tokens-{tokenizer_hash}"


def add_corpus(
    session: Session,
    settings: Settings,
    reading: Reading,
    name: str,
    *,
    about: str = "",
    licence: str = "",
    origin: dict[str, Any] | None = None,
    limits: Limits | None = None,
    report: Report | None = None,
) -> Corpus:
    """Store documents as a corpus. Text that the catalog holds already, under whatever name, is that corpus.

    Raises BadFile for what holds no usable text and Conflict for a name that holds other content; nothing stays.
    """
    check_name(name)
    limits = limits or Limits(max_bytes=settings.max_corpus_bytes)
    corpus_hash, n_documents, n_chars = _store(settings, reading, limits, report or (lambda share, status: None))
    existing = session.scalar(select(Corpus).where(Corpus.hash == corpus_hash))
    if existing is not None:
        return existing
    if session.scalar(select(Corpus.id).where(Corpus.name == name)) is not None:
        shutil.rmtree(settings.corpus_dir(corpus_hash))
        raise Conflict(f"Corpus {name!r} exists with other content; choose another name.")
    corpus = Corpus(
        name=name,
        hash=corpus_hash,
        n_documents=n_documents,
        n_chars=n_chars,
        about=about,
        licence=licence,
        origin=origin or {},
    )
    session.add(corpus)
    session.flush()
    return corpus


def check_name(name: str) -> str:
    """Return a usable name. Raises BadInput: it is part of addresses."""
    if not _CORPUS_NAME.fullmatch(name):
        raise BadInput(f"{name[:100]!r} cannot be a corpus name: use letters, digits, - _ . and spaces, at most 100.")
    return name


def corpora(session: Session) -> list[Corpus]:
    return list(session.scalars(select(Corpus).order_by(Corpus.name)))


def corpus_named(session: Session, name: str) -> Corpus:
    corpus = session.scalar(select(Corpus).where(Corpus.name == name.replace("\0", "")))
    if corpus is None:
        known = ", ".join(c.name for c in corpora(session)) or "none yet"
        raise NotFound(f"There is no corpus {name[:100]!r}; there are: {known}. Add one with `sae-atlas corpus add`.")
    return corpus


def used_by(session: Session, corpus: Corpus) -> list[str]:
    """The sources, as `model/source`, whose evidence shows this corpus's tokens."""
    query = select(Source.model_id, Source.name).join(Harvest, Harvest.source_id == Source.id)
    rows = session.execute(
        query.where(Harvest.corpus_id == corpus.id).distinct().order_by(Source.model_id, Source.name)
    )
    return [f"{model_id}/{name}" for model_id, name in rows]


def remove_corpus(session: Session, settings: Settings, name: str) -> Path:
    """Delete a corpus that no evidence shows, and return its directory: delete it after the commit.

    Raises Conflict naming the sources that need it.
    """
    corpus = corpus_named(session, name)
    users = used_by(session, corpus)
    if users:
        raise Conflict(f"Corpus {corpus.name!r} is shown by {', '.join(users)}; remove that evidence first.")
    session.delete(corpus)
    session.flush()
    return settings.corpus_dir(corpus.hash)


def delete_files(directory: Path) -> None:
    """Delete what remove_corpus left; a reader never sees half of it."""
    if directory.is_dir():
        gone = directory.with_name(f".gone-{directory.name}")
        directory.replace(gone)
        shutil.rmtree(gone)


def has_text(settings: Settings, corpus: Corpus) -> bool:
    """Whether a model can read it: a bundle or an import brings tokens only."""
    return (settings.corpus_dir(corpus.hash) / DOCUMENTS).is_file()


def n_bytes(settings: Settings, corpus: Corpus) -> int:
    """What it takes on disk, token streams included."""
    return sum(f.stat().st_size for f in settings.corpus_dir(corpus.hash).rglob("*") if f.is_file())


def documents(directory: Path) -> Iterator[Document]:
    """The documents of a stored corpus, in order. Raises NotFound when a bundle brought only its tokens."""
    file = directory / DOCUMENTS
    if not file.is_file():
        raise NotFound("This corpus came with its tokens only; add its text with `sae-atlas corpus add`.")
    # Stored text is not judged as a bomb again: some repetitive corpora do compress by a thousand.
    with file.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
        yield from parse_lines(numbered_lines(io.BufferedReader(stream, 2**18), file.name), file.name, Columns())  # type: ignore[arg-type]


def _store(settings: Settings, reading: Reading, limits: Limits, report: Report) -> tuple[str, int, int]:
    root = settings.data_dir / "corpora"
    root.mkdir(parents=True, exist_ok=True)
    digest, n_documents, n_chars = hashlib.sha256(), 0, 0
    with tempfile.TemporaryDirectory(dir=root, prefix=".new-") as scratch:
        with (
            (Path(scratch) / DOCUMENTS).open("wb") as raw,
            zstandard.ZstdCompressor(level=6).stream_writer(raw) as out,
        ):
            for document in bounded(reading.documents, limits):
                line = json.dumps(document.__dict__, ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                out.write(line)
                n_documents += 1
                n_chars += len(document.text)
                if n_documents % 64 == 1:
                    report(reading.share(), f"{n_documents:,} documents, {n_chars:,} characters")
        if n_chars == 0:
            raise BadFile("There is no text in it: an empty file, or rows whose text is empty.")
        corpus_hash = digest.hexdigest()[:16]
        target = settings.corpus_dir(corpus_hash)
        if not (target / DOCUMENTS).exists():
            target.mkdir(parents=True, exist_ok=True)
            os.replace(Path(scratch) / DOCUMENTS, target / DOCUMENTS)
    return corpus_hash, n_documents, n_chars
