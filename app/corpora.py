"""Corpora in the data directory: documents as they came, and their token streams. Torch-free; knows no tokenizer.

    corpora/{hash}/documents.jsonl.zst                  {"title", "source", "text"} a line
    corpora/{hash}/tokens-{tokenizer_hash}/stream.bin   token ids of all documents, uint16 or uint32, little-endian
                                          /documents.json {"starts", "titles", "sources", "dtype", "n_tokens"}

Documents follow each other with one separator token between them; no BOS inside. A context is a BOS token (where the
model has one) and the next context_size - 1 tokens of the stream, so one stream serves every context size.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import json
import lzma
import os
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import zstandard
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.errors import BadFile, Conflict, NotFound
from app.settings import Settings
from app.tables import Corpus

DOCUMENTS = "documents.jsonl.zst"
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Document:
    title: str
    source: str
    text: str


@dataclass(frozen=True)
class Stream:
    """A tokenised corpus, memory-mapped."""

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    starts: list[int]
    """Offset in tokens at which each document begins."""
    titles: list[str]
    sources: list[str]

    @classmethod
    def open(cls, directory: Path) -> Stream:
        """Map a tokens directory. Kept open, since a stream never changes."""
        return _open_stream(directory)

    def n_contexts(self, context_size: int, bos: int | None) -> int:
        return len(self.tokens) // (context_size - (bos is not None))

    def context(self, row: int, context_size: int, bos: int | None) -> list[int]:
        """The token ids of one context, [context_size]."""
        return self.contexts(np.array([row]), context_size, bos)[0].tolist()

    def contexts(self, rows: npt.NDArray[np.int64], context_size: int, bos: int | None) -> npt.NDArray[np.int64]:
        """The token ids of some contexts, [len(rows), context_size]."""
        body = context_size - (bos is not None)
        offsets = rows[:, None] * body + np.arange(body)
        ids = self.tokens[offsets].astype(np.int64)
        if bos is None:
            return ids
        return np.concatenate([np.full((len(rows), 1), bos, dtype=np.int64), ids], axis=1)

    def title(self, row: int, position: int, context_size: int, bos: int | None) -> str:
        """The title of the document that holds a position of a context."""
        has_bos = bos is not None
        offset = row * (context_size - has_bos) + max(position - has_bos, 0)
        return self.titles[max(bisect.bisect_right(self.starts, offset) - 1, 0)]


@lru_cache(maxsize=32)
def _open_stream(directory: Path) -> Stream:
    about = json.loads((directory / "documents.json").read_text())
    tokens = np.memmap(directory / "stream.bin", dtype=np.dtype(about["dtype"]).newbyteorder("<"), mode="r")
    return Stream(tokens, about["starts"], about["titles"], about["sources"])


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
    session: Session, settings: Settings, path: Path, name: str, about: str = "", report: Report | None = None
) -> Corpus:
    """Store a text, JSONL, .jsonl.xz or .jsonl.zst file as a corpus. The same content under the same name is no error.

    Raises BadFile for a file without usable text and Conflict for a name that holds other content.
    """
    corpus_hash, n_documents, n_chars = _store(settings, path, report or (lambda share, status: None))
    existing = session.scalar(select(Corpus).where(Corpus.name == name))
    if existing is not None:
        if existing.hash != corpus_hash:
            raise Conflict(f"Corpus {name!r} exists with other content; choose another name.")
        return existing
    corpus = Corpus(name=name, hash=corpus_hash, n_documents=n_documents, n_chars=n_chars, about=about)
    session.add(corpus)
    session.flush()
    return corpus


def corpora(session: Session) -> list[Corpus]:
    return list(session.scalars(select(Corpus).order_by(Corpus.name)))


def corpus_named(session: Session, name: str) -> Corpus:
    corpus = session.scalar(select(Corpus).where(Corpus.name == name))
    if corpus is None:
        known = ", ".join(c.name for c in corpora(session)) or "none yet"
        raise NotFound(f"There is no corpus {name!r}; there are: {known}. Add one with `sae-atlas corpus add FILE`.")
    return corpus


def documents(directory: Path) -> Iterator[Document]:
    """The documents of a stored corpus, in order. Raises NotFound when a bundle brought only its tokens."""
    file = directory / DOCUMENTS
    if not file.is_file():
        raise NotFound("This corpus came with its tokens only; add its text with `sae-atlas corpus add`.")
    with file.open("rb") as raw:
        yield from _parse_jsonl(_lines(zstandard.ZstdDecompressor().stream_reader(raw)), file)


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a corpus file as `add_corpus` reads it."""
    with _opened(path) as (file, _):
        yield from _read_documents(path, file)


def _store(settings: Settings, path: Path, report: Report) -> tuple[str, int, int]:
    root = settings.data_dir / "corpora"
    root.mkdir(parents=True, exist_ok=True)
    digest, n_documents, n_chars = hashlib.sha256(), 0, 0
    total = max(path.stat().st_size, 1) if path.is_file() else 1
    with tempfile.TemporaryDirectory(dir=root, prefix=".new-") as scratch:
        with (
            (Path(scratch) / DOCUMENTS).open("wb") as raw,
            zstandard.ZstdCompressor(level=6).stream_writer(raw) as out,
            _opened(path) as (file, raw_in),
        ):
            for document in _read_documents(path, file):
                line = json.dumps(document.__dict__, ensure_ascii=False).encode() + b"\n"
                digest.update(line)
                out.write(line)
                n_documents += 1
                n_chars += len(document.text)
                report(min(raw_in.tell() / total, 1.0), f"{n_documents:,} documents, {n_chars:,} characters")
        if n_chars == 0:
            raise BadFile(f"{path.name} holds no text.")
        corpus_hash = digest.hexdigest()[:16]
        target = settings.corpus_dir(corpus_hash)
        if not (target / DOCUMENTS).exists():
            target.mkdir(parents=True, exist_ok=True)
            os.replace(Path(scratch) / DOCUMENTS, target / DOCUMENTS)
    return corpus_hash, n_documents, n_chars


@contextmanager
def _opened(path: Path) -> Generator[tuple[IO[bytes], IO[bytes]]]:
    """The decompressed file, and the raw one whose position tells progress."""
    if not path.is_file():
        raise BadFile(f"{path} is not a file.")
    with path.open("rb") as raw:
        match path.suffix:
            case ".xz":
                yield lzma.open(raw), raw  # type: ignore[misc]  # noqa: SIM115 - closed with raw
            case ".zst":
                yield zstandard.ZstdDecompressor().stream_reader(raw), raw  # type: ignore[misc]
            case _:
                yield raw, raw


def _read_documents(path: Path, file: IO[bytes]) -> Iterator[Document]:
    kind = path.name.removesuffix(".xz").removesuffix(".zst").rpartition(".")[2]
    match kind:
        case "jsonl":
            yield from _parse_jsonl(_lines(file), path)
        case "txt" | "md":
            yield from _paragraph_documents(path, _lines(file))
        case _:
            raise BadFile(f"{path.name}: a corpus is a .txt or .jsonl file, plain or as .xz or .zst.")


def _lines(file: Any) -> Iterator[str]:
    text = io.TextIOWrapper(io.BufferedReader(file), encoding="utf-8", newline="\n")
    try:
        yield from text
    except (UnicodeDecodeError, lzma.LZMAError, EOFError, zstandard.ZstdError) as error:
        raise BadFile(f"The corpus cannot be read as UTF-8 text: {error}.") from error
    finally:
        # A wrapper closes its file when it is collected, while the file's position is still asked for.
        with suppress(ValueError):  # closed already, where reading was broken off
            text.detach().detach()


def _parse_jsonl(lines: Iterable[str], path: Path) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadFile(f'{path.name}, line {number}: expected a JSON object with a "text" field.') from None
        if not isinstance(text, str):
            raise BadFile(f'{path.name}, line {number}: "text" is {type(text).__name__}, not a string.')
        clean = text.encode("utf-8", "replace").decode()
        yield Document(str(row.get("title") or ""), str(row.get("source") or ""), clean)


def _paragraph_documents(path: Path, lines: Iterable[str], size: int = 10_000) -> Iterator[Document]:
    """Cut a plain text at blank lines into documents of about `size` characters."""
    part: list[str] = []
    number, length = 0, 0
    for line in lines:
        part.append(line)
        length += len(line)
        if length >= size and not line.strip():
            number += 1
            yield Document(f"{path.stem} ({number})", path.stem, "".join(part))
            part, length = [], 0
    if part:
        yield Document(f"{path.stem} ({number + 1})", path.stem, "".join(part))
