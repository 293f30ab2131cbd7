"""Files and datasets of text as documents: plain text, JSONL, parquet, directories of these, Hugging Face datasets.

Everything is read as a stream and judged as it comes: a file that unpacks without end, a line without end, a missing
field or bytes that are no text end with a sentence that names the place. No database; nothing is written.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import lzma
import re
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import zstandard

from app.errors import AtlasError, BadFile, BadInput, TooLarge

Report = Callable[[float, str], None]

MAX_LINE_BYTES = 2**26
MAX_RATIO = 1_000
"""Compressed text unpacks to some ten times its size; a bomb to thousands."""
_RATIO_FREE_BYTES = 2**26
_TEXT, _LINES, _TABLE = (".txt", ".md", ".text"), (".jsonl", ".ndjson"), (".parquet",)
_PACKED = (".xz", ".zst", ".gz")
_DATASET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ +-]{0,99}")
_BROKEN = (lzma.LZMAError, EOFError, zstandard.ZstdError, gzip.BadGzipFile, OSError)
FORMATS = "text (.txt, .md), JSONL (.jsonl) or parquet, the first two also as .xz, .zst or .gz, or a directory of such"


@dataclass(frozen=True)
class Document:
    title: str
    source: str
    text: str


@dataclass(frozen=True)
class Columns:
    """Which fields of a row are the text, its title and its source. Empty: `title` and `source` where there are any."""

    text: str = "text"
    title: str = ""
    source: str = ""


@dataclass(frozen=True)
class Limits:
    """Where reading ends (a limit of 0 is none), and how much text may be stored at most."""

    max_documents: int = 0
    max_chars: int = 0
    max_bytes: int = 64 * 2**30


@dataclass(frozen=True)
class Dataset:
    """A dataset on the Hugging Face hub; tests give a local directory, which the same loader reads."""

    repo: str
    config: str = ""
    split: str = "train"

    def checked(self) -> Dataset:
        """Return it, or raise BadInput before a socket opens."""
        if not _DATASET.fullmatch(self.repo) or ".." in self.repo:
            raise BadInput(f"{self.repo[:100]!r} is no dataset of the hub; write owner/name.")
        for value, name in ((self.config, "--config"), (self.split, "--split")):
            if value and not _NAME.fullmatch(value):
                raise BadInput(f"{value[:100]!r} cannot be {name} of a dataset.")
        return self


@dataclass
class Reading:
    """Documents with how far their source is read, for a progress bar."""

    documents: Iterator[Document]
    share: Callable[[], float] = field(default=lambda: 0.0)


def read(path: Path, columns: Columns | None = None) -> Reading:
    """Read a file, or all files of a directory in the order of their names.

    Raises BadFile for what cannot be read as text, with the place.
    """
    files = _files(path)
    total, seen = max(sum(f.stat().st_size for f in files), 1), Position()
    root = path if path.is_dir() else path.parent
    rows = (d for f in files for d in _read_file(f, f.relative_to(root).as_posix(), columns or Columns(), seen))
    return Reading(rows, lambda: min(seen.bytes / total, 1.0))


def read_dataset(wanted: Dataset, columns: Columns | None = None) -> Reading:
    """Stream a Hugging Face dataset. Raises AtlasError naming the package, BadFile for a missing column."""
    if importlib.util.find_spec("datasets") is None:
        raise AtlasError("Hugging Face datasets need a package: pip install 'sae-atlas[data]'.")
    return Reading(_dataset_rows(wanted, columns or Columns()))


def bounded(documents: Iterable[Document], limits: Limits) -> Iterator[Document]:
    """Pass documents on until a limit is reached; the last may be cut. Raises TooLarge beyond max_bytes."""
    n_chars, n_bytes = 0, 0
    for number, document in enumerate(documents, 1):
        text = document.text
        if limits.max_chars:
            text = text[: limits.max_chars - n_chars]
        n_chars += len(text)
        n_bytes += len(text.encode("utf-8", "replace"))
        if n_bytes > limits.max_bytes:
            raise TooLarge(
                f"The corpus holds more than the {limits.max_bytes:,} bytes of text that SAE_ATLAS_MAX_CORPUS_BYTES "
                "allows; give --max-chars, or raise that."
            )
        yield Document(document.title, document.source, text)
        if number == limits.max_documents or (limits.max_chars and n_chars >= limits.max_chars):
            return


def parse_lines(lines: Iterable[tuple[int, str]], name: str, columns: Columns) -> Iterator[Document]:
    """The documents of JSONL lines, each with its number. Raises BadFile naming the line."""
    for number, row in json_rows(lines, name, f'a JSON object with a "{columns.text}" field'):
        yield document_of(row, columns, f"{name}, line {number}")


def json_rows(lines: Iterable[tuple[int, str]], name: str, wanted: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSONL lines with their numbers; blank lines are passed over. Raises BadFile naming the line."""
    for number, line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise BadFile(f"{name}, line {number}: expected {wanted}.")
        yield number, cast(dict[str, Any], row)


def document_of(row: dict[str, Any], columns: Columns, place: str) -> Document:
    """Make one row a document. Raises BadFile for a missing field, naming those there are."""
    for name in filter(None, (columns.text, columns.title, columns.source)):
        if name not in row:
            there = ", ".join(map(str, list(row)[:12])) or "none"
            raise BadFile(f'{place}: there is no field "{name}"; there are: {there}.')
    text = row[columns.text]
    if not isinstance(text, str):
        raise BadFile(f'{place}: "{columns.text}" is {type(text).__name__}, not a string.')
    title, source = (row.get(name) for name in (columns.title or "title", columns.source or "source"))
    return Document(_short(title), _short(source), text.encode("utf-8", "replace").decode())


@dataclass
class Position:
    """Bytes of the files read so far, as they lie on disk."""

    bytes: int = 0


def numbered_lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """The lines of a file. Raises BadFile for bytes that are no text, and for a line without end."""
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(MAX_LINE_BYTES + 1)
        except _BROKEN as error:
            raise BadFile(f"{name} cannot be read: {error}.") from error
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise BadFile(f"{name}, line {number} is longer than {MAX_LINE_BYTES:,} bytes.")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise BadFile(f"{name}, line {number} cannot be read as UTF-8 text: {error.reason}.") from None
        if "\0" in text:
            raise BadFile(f"{name}, line {number} holds NUL bytes: this is a binary file, not text.")
        yield number, text


@contextmanager
def unpacked(path: Path, seen: Position | None = None) -> Generator[IO[bytes]]:
    """Open a file by its suffix, decompressed and guarded against bombs."""
    seen = seen or Position()
    with path.open("rb") as raw:
        guarded = _Guarded(_decompressed(path, raw), raw, path.name, seen)
        yield io.BufferedReader(guarded, 2**18)
        seen.bytes = guarded.base + path.stat().st_size


class _Guarded(io.RawIOBase):
    """A decompressed stream that stops a bomb and tells how much of the file was read."""

    def __init__(self, inner: IO[bytes], raw: IO[bytes], name: str, seen: Position) -> None:
        self._inner, self._raw, self._name, self._seen = inner, raw, name, seen
        self.base, self._n = seen.bytes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._inner.read(len(buffer))
        buffer[: len(block)] = block
        self._n += len(block)
        position = self._raw.tell()
        self._seen.bytes = self.base + position
        if self._n > _RATIO_FREE_BYTES and self._n > MAX_RATIO * max(position, 1):
            raise BadFile(f"{self._name} unpacks to over {MAX_RATIO:,} times its size; it is refused as a bomb.")
        return len(block)


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    match path.suffix:
        case ".xz":
            return cast(IO[bytes], lzma.open(raw))
        case ".gz":
            return cast(IO[bytes], gzip.open(raw))
        case ".zst":
            # Frames follow each other in files that were written in parallel or appended to.
            made = zstandard.ZstdDecompressor(max_window_size=2**27)
            return cast(IO[bytes], made.stream_reader(raw, read_across_frames=True, closefd=False))
        case _:
            return raw


def kind_of(name: str) -> str:
    """The suffix that tells a file's format, without compression; empty when it is none of ours."""
    suffixes = Path(name).suffixes
    packed = bool(suffixes) and suffixes[-1] in _PACKED
    last = (suffixes[-2:-1] or [""])[0] if packed else (suffixes[-1:] or [""])[0]
    return last if last in (*_TEXT, *_LINES) or (last in _TABLE and not packed) else ""


def plain_name(path: Path) -> str:
    """A file's name without its suffixes of format and compression."""
    name = path.name
    while Path(name).suffix in (*_PACKED, *_TEXT, *_LINES, *_TABLE):
        name = Path(name).stem
    return name


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(
            f for f in path.rglob("*") if f.is_file() and not f.is_symlink() and kind_of(f.name) and f.name[0] != "."
        )
        if not found:
            raise BadFile(f"{path} holds no corpus file; a corpus is {FORMATS}.")
        return found
    if not path.is_file():
        raise BadFile(f"There is no file {path}.")
    if not kind_of(path.name):
        raise BadFile(f"{path.name}: a corpus is {FORMATS}.")
    return [path]


def _read_file(path: Path, name: str, columns: Columns, seen: Position) -> Iterator[Document]:
    kind = kind_of(path.name)
    if kind in _TABLE:
        yield from _table_rows(path, name, columns, seen)
        return
    with unpacked(path, seen) as file:
        lines = numbered_lines(file, name)
        if kind in _LINES:
            yield from parse_lines(lines, name, columns)
        else:
            yield from _paragraphs(plain_name(path), lines)


def _table_rows(path: Path, name: str, columns: Columns, seen: Position) -> Iterator[Document]:
    """Only the columns asked for are read, some thousand rows at a time."""
    if importlib.util.find_spec("pyarrow") is None:
        raise AtlasError("Parquet files need a package: pip install 'sae-atlas[data]'.")
    import pyarrow as pa
    import pyarrow.parquet as pq

    base, size = seen.bytes, path.stat().st_size
    try:
        with pq.ParquetFile(path) as file:
            there = list(file.schema_arrow.names)
            asked = [columns.text, columns.title or "title", columns.source or "source"]
            total, number = max(file.metadata.num_rows, 1), 0
            kept = [c for c in asked if c in there]
            if columns.text not in there:
                raise BadFile(f'{name}: there is no column "{columns.text}"; there are: {", ".join(there[:12])}.')
            for batch in file.iter_batches(1024, columns=kept):
                for row in batch.to_pylist():
                    number += 1
                    seen.bytes = base + size * number // total
                    yield document_of(row, columns, f"{name}, row {number}")
    except (pa.ArrowException, OSError) as error:
        raise BadFile(f"{name} cannot be read as parquet: {str(error).splitlines()[0]}.") from error
    seen.bytes = base + size


def _dataset_rows(wanted: Dataset, columns: Columns) -> Iterator[Document]:
    import datasets

    try:
        rows = datasets.load_dataset(wanted.repo, wanted.config or None, split=wanted.split, streaming=True)
        iterator = iter(rows)
    except Exception as error:  # the library raises what its dozen dependencies raise
        raise BadFile(f"{wanted.repo} cannot be opened: {_first_line(error)}") from error
    number = 0
    while True:
        number += 1
        try:
            row = next(iterator, None)
        except Exception as error:
            raise BadFile(f"{wanted.repo}, row {number} cannot be read: {_first_line(error)}") from error
        if row is None:
            return
        yield document_of(cast(dict[str, Any], row), columns, f"{wanted.repo}, row {number}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".") + "."


def _short(value: Any) -> str:
    return "" if value is None else str(value).encode("utf-8", "replace").decode()[:500]


def _paragraphs(name: str, lines: Iterable[tuple[int, str]], size: int = 10_000) -> Iterator[Document]:
    """Cut a plain text at blank lines into documents of about `size` characters."""
    part: list[str] = []
    number, length = 0, 0
    for _, line in lines:
        part.append(line)
        length += len(line)
        if length >= size and not line.strip():
            number += 1
            yield Document(f"{name} ({number})", name, "".join(part))
            part, length = [], 0
    if part:
        yield Document(f"{name} ({number + 1})", name, "".join(part))
