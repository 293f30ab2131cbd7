"""Corpora in the data directory: documents as they came, and their token streams. Torch-free; knows no tokenizer.

    corpora/{hash}/documents.jsonl.zst                  {"title", "source", "text"} a line, a zstd frame each few MiB
    corpora/{hash}/documents.index.json                 {"first", "offsets"}: number and place of each frame's first one
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
import itertools
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import trainspecs, visibility
from app.documents import (
    Columns,
    Dataset,
    Document,
    Limits,
    Reading,
    Report,
    bounded,
    numbered_lines,
    parse_lines,
    plain_name,
    read,
    read_dataset,
)
from app.errors import BadFile, BadInput, Conflict, NotFound
from app.settings import Settings
from app.specs import CorpusSpec
from app.tables import Corpus, Harvest, Source
from app.tokens import Vocabulary, vocabulary
from app.trainspecs import TrainSpec

DOCUMENTS = "documents.jsonl.zst"
INDEX = "documents.index.json"
VOCABULARY = "vocabulary.json"
DATASET = trainspecs.HUB
"""Before the id of a dataset of the hub, where a training names one in place of a corpus."""
_CHARS_PER_TOKEN = 5
"""More than English has, so that the text suffices."""
IMPORTED = "imported"
"""The tokenizer of evidence that came without its model: tokens are strings with a vocabulary of their own."""
_FRAME_BYTES = 2**22
"""Text of one zstd frame: where reading can begin."""
_N_TOKENS = re.compile(r'"n_tokens": (\d+)}$')
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


def add(session: Session, settings: Settings, spec: CorpusSpec, report: Report | None = None) -> Corpus:
    """Store what a spec asks for. Raises as add_corpus does, BadInput for a spec that is no whole one."""
    reading, usual, origin = _asked(spec)
    origin |= {"text_field": spec.text_column, "max_documents": spec.max_documents, "max_chars": spec.max_chars}
    return add_corpus(
        session,
        settings,
        reading,
        spec.name or usual,
        about=spec.about,
        licence=spec.licence,
        origin={key: value for key, value in origin.items() if value},
        limits=Limits(spec.max_documents, spec.max_chars, settings.max_corpus_bytes),
        report=report,
    )


def dataset_asked(spec: TrainSpec) -> CorpusSpec | None:
    """Return what to store where a training names `hf:OWNER/NAME` or `hf:OWNER/NAME:CONFIG`; None for a corpus' name.

    As much text as gives the tokens with some to spare. Raises BadInput for what is no dataset's id.
    """
    if not spec.corpus.startswith(DATASET):
        return None
    repo, _, config = spec.corpus.removeprefix(DATASET).partition(":")
    Dataset(repo, config, spec.split).checked()
    n_chars = math.ceil(spec.n_tokens / (1 - spec.held_out)) * _CHARS_PER_TOKEN
    unusual = [spec.split if spec.split != "train" else "", spec.text_column if spec.text_column != "text" else ""]
    called = usable_name("-".join(filter(None, [repo, config, *unusual, f"{math.ceil(n_chars / 10**6)}M"])))
    asked = {"dataset": repo, "config": config, "split": spec.split, "text_column": spec.text_column}
    return CorpusSpec.model_validate({"name": called, "max_chars": n_chars, **asked})


def of_dataset(session: Session, wanted: CorpusSpec) -> Corpus | None:
    """Return a stored corpus of that dataset with as much text, or all there is of it."""
    for corpus in corpora(session):
        origin = corpus.origin
        same = (origin.get("hf_dataset"), origin.get("config") or "") == (wanted.dataset, wanted.config)
        same &= (origin.get("text_field") or "text") == wanted.text_column
        enough = max(corpus.n_chars, int(origin.get("max_chars") or 0)) >= wanted.max_chars
        if same and enough and origin.get("split") == wanted.split and corpus.n_chars:
            return corpus
    return None


def check(spec: CorpusSpec) -> None:
    """Read the first document of what a spec asks for, where that needs no network. Raises as `add` does."""
    if spec.name:
        check_name(spec.name)
    reading, usual, _ = _asked(spec)
    check_name(spec.name or usual)
    if spec.path and next(reading.documents, None) is None:
        raise BadFile("There is no text in it: an empty file, or rows whose text is empty.")


def title_of(spec: CorpusSpec) -> str:
    return f"Store {spec.dataset or 'uploaded text'} as corpus {spec.name}"


def _asked(spec: CorpusSpec) -> tuple[Reading, str, dict[str, Any]]:
    """Return the documents, the usual name and the origin."""
    if bool(spec.path) == bool(spec.dataset):
        raise BadInput("Give a file or directory, or a dataset of the hub: one of the two.")
    columns = Columns(spec.text_column, spec.title_column, spec.source_column)
    if spec.path:
        path = Path(spec.path)
        origin = {"uploaded_as": spec.uploaded_as} if spec.uploaded_as else {"added_from": path.resolve().name}
        return read(path, columns), plain_name(path.resolve()), origin
    wanted = Dataset(spec.dataset, spec.config, spec.split).checked()
    if not (spec.max_documents or spec.max_chars):
        raise BadInput("A dataset of the hub may be terabytes: limit its documents or characters.")
    origin = {"hf_dataset": spec.dataset, "config": spec.config, "split": spec.split}
    return read_dataset(wanted, columns), spec.dataset.rpartition("/")[2], origin


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
        owner=visibility.maker(session)[0],
    )
    session.add(corpus)
    session.flush()
    return corpus


def check_name(name: str) -> str:
    """Return a usable name. Raises BadInput: it is part of addresses."""
    if not _CORPUS_NAME.fullmatch(name):
        raise BadInput(f"{name[:100]!r} cannot be a corpus name: use letters, digits, - _ . and spaces, at most 100.")
    return name


def usable_name(text: str) -> str:
    """Return a name that can be part of addresses, as near as possible to what a bundle or an import says."""
    plain = re.sub(r"[^A-Za-z0-9._ -]+", "-", text).lstrip("._ -")[:100].strip()
    return plain or "corpus"


def corpora(session: Session) -> list[Corpus]:
    return list(session.scalars(select(Corpus).order_by(Corpus.name)))


def corpus_named(session: Session, name: str) -> Corpus:
    corpus = session.scalar(select(Corpus).where(Corpus.name == name.replace("\0", "")))
    if corpus is None:
        known = ", ".join(c.name for c in corpora(session)) or "none yet"
        raise NotFound(f"There is no corpus {name[:100]!r}; there are: {known}. Add one with `sae-atlas corpus add`.")
    return corpus


@dataclass(frozen=True)
class Use:
    """A harvest that shows a corpus' tokens."""

    harvest_id: int
    source: str
    """`model/source`"""
    n_tokens: int
    state: str


def uses(session: Session, *corpus_ids: int) -> dict[int, list[Use]]:
    """The harvests from some corpora, by corpus, in one query."""
    query = (
        select(Harvest.corpus_id, Harvest.id, Source.model_id, Source.name, Harvest.n_tokens, Harvest.state)
        .join(Source, Harvest.source_id == Source.id)
        .where(Harvest.corpus_id.in_(corpus_ids))
        .order_by(Source.model_id, Source.layer, Source.name)
    )
    found: dict[int, list[Use]] = {number: [] for number in corpus_ids}
    for corpus_id, number, model_id, name, n_tokens, state in session.execute(query):
        found[corpus_id].append(Use(number, f"{model_id}/{name}", n_tokens, state))
    return found


def used_by(session: Session, corpus: Corpus) -> list[str]:
    """The sources, as `model/source`, whose evidence shows this corpus's tokens."""
    return list(dict.fromkeys(use.source for use in uses(session, corpus.id)[corpus.id]))


@dataclass(frozen=True)
class Tokens:
    """A corpus as one tokenizer reads it."""

    tokenizer_hash: str
    n_tokens: int
    n_bytes: int


def tokens_of(settings: Settings, corpus: Corpus) -> list[Tokens]:
    """What each tokenizer made of a corpus so far."""
    found = sorted(settings.corpus_dir(corpus.hash).glob("tokens-*/documents.json"))
    return [
        Tokens(about.parent.name.removeprefix("tokens-"), _n_tokens(about), _size(about.parent))
        for about in found
        if (about.parent / "stream.bin").is_file()
    ]


def readable_tokens(
    settings: Settings, corpus: Corpus, models: Mapping[str, Sequence[str]]
) -> tuple[Stream, Vocabulary] | None:
    """A token stream with its vocabulary, for a corpus without text. `models` are those of each tokenizer's hash."""
    for tokens in tokens_of(settings, corpus):
        directory = tokens_dir(settings, corpus.hash, tokens.tokenizer_hash)
        places = [directory, *(settings.model_dir(name) for name in models.get(tokens.tokenizer_hash, ()))]
        for place in places:
            if (place / VOCABULARY).is_file():
                return Stream.open(directory), vocabulary(place / VOCABULARY)
    return None


def _n_tokens(about: Path) -> int:
    # It is the last thing the file says, behind every title of the corpus.
    with about.open("rb") as file:
        file.seek(max(about.stat().st_size - 64, 0))
        match = _N_TOKENS.search(file.read().decode("utf-8", "replace"))
    return int(match[1]) if match else len(Stream.open(about.parent).tokens)


def _size(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())


def remove_corpus(session: Session, settings: Settings, name: str) -> Path | None:
    """Delete a corpus that no evidence shows, and return its directory: delete it after the commit.

    Raises Conflict naming the sources that need it.
    """
    corpus = corpus_named(session, name)
    check_unused(session, corpus)
    with visibility.unlimited(session, trash=True):  # the same text may have been added again
        twin = select(Corpus.id).where(Corpus.hash == corpus.hash, Corpus.id != corpus.id)
        shared = session.scalar(twin.limit(1)) is not None
    session.delete(corpus)
    session.flush()
    return None if shared else settings.corpus_dir(corpus.hash)


def check_unused(session: Session, corpus: Corpus) -> None:
    """Raise Conflict naming the sources whose evidence shows a corpus; those in the trash need it too."""
    users = used_by(session, corpus)
    with visibility.unlimited(session, trash=True):
        hidden = len(used_by(session, corpus)) - len(users)
    if hidden:
        users.append(f"{hidden} in the trash or not shown to you")
    if users:
        raise Conflict(f"Corpus {corpus.name!r} is shown by {', '.join(users)}; remove that evidence first.")


def delete_files(directory: Path | None) -> None:
    """Delete what remove_corpus left; a reader never sees half of it."""
    if directory is not None and directory.is_dir():
        gone = directory.with_name(f".gone-{directory.name}")
        directory.replace(gone)
        shutil.rmtree(gone)


def has_text(settings: Settings, corpus: Corpus) -> bool:
    """Whether a model can read it: a bundle or an import brings tokens only."""
    return (settings.corpus_dir(corpus.hash) / DOCUMENTS).is_file()


def n_bytes(settings: Settings, corpus: Corpus) -> int:
    """What it takes on disk, token streams included."""
    return _size(settings.corpus_dir(corpus.hash))


def documents(directory: Path, first: int = 0) -> Iterator[Document]:
    """The documents of a stored corpus from one on, in order. Raises NotFound when a bundle brought only its tokens."""
    file = directory / DOCUMENTS
    if not file.is_file():
        raise NotFound("This corpus came with its tokens only; add its text with `sae-atlas corpus add`.")
    # Stored text is not judged as a bomb again: some repetitive corpora do compress by a thousand.
    before, offset = _frame(directory, first)
    with file.open("rb") as raw:
        raw.seek(offset)
        with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as stream:
            lines = numbered_lines(io.BufferedReader(stream, 2**18), file.name)  # type: ignore[arg-type]
            yield from itertools.islice(parse_lines(lines, file.name, Columns()), first - before, None)


def decoded(stream: Stream, words: Vocabulary, first: int = 0) -> Iterator[Document]:
    """The documents of a token stream from one on; exact where the tokenizer keeps every byte."""
    ends = [*stream.starts[1:], len(stream.tokens)]
    for number in range(first, len(stream.starts)):
        start = stream.starts[number]
        end = start + stream.lengths[number] if stream.lengths else ends[number] - 1  # a separator follows each
        ids = np.asarray(stream.tokens[start:end]).tolist()
        yield Document(stream.titles[number], stream.sources[number], words.text(ids))


def can_be_read(settings: Settings, corpus: Corpus, tokenizer_hash: str) -> bool:
    """Tell whether a model with that tokenizer can read it: there is text, or it was tokenised elsewhere."""
    return has_text(settings, corpus) or (tokens_dir(settings, corpus.hash, tokenizer_hash) / "stream.bin").is_file()


def _frame(directory: Path, number: int) -> tuple[int, int]:
    """Where to begin to read a document: number of the first one there, and its offset. Old corpora have no index."""
    try:
        index = json.loads((directory / INDEX).read_text())
    except FileNotFoundError:
        return 0, 0
    place = max(bisect.bisect_right(index["first"], number) - 1, 0)
    return index["first"][place], index["offsets"][place]


def _store(settings: Settings, reading: Reading, limits: Limits, report: Report) -> tuple[str, int, int]:
    root = settings.data_dir / "corpora"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".new-") as scratch:
        corpus_hash, n_documents, n_chars = _write_documents(Path(scratch), reading, limits, report)
        if n_chars == 0:
            raise BadFile("There is no text in it: an empty file, or rows whose text is empty.")
        target = settings.corpus_dir(corpus_hash)
        if not (target / DOCUMENTS).exists():
            target.mkdir(parents=True, exist_ok=True)
            for name in (INDEX, DOCUMENTS):
                os.replace(Path(scratch) / name, target / name)
    return corpus_hash, n_documents, n_chars


def _write_documents(directory: Path, reading: Reading, limits: Limits, report: Report) -> tuple[str, int, int]:
    digest, n_documents, n_chars, n_bytes = hashlib.sha256(), 0, 0, 0
    first, offsets = [0], [0]
    with (
        (directory / DOCUMENTS).open("wb") as raw,
        zstandard.ZstdCompressor(level=6).stream_writer(raw) as out,
    ):
        for document in bounded(reading.documents, limits):
            if n_bytes >= _FRAME_BYTES:
                out.flush(zstandard.FLUSH_FRAME)
                first.append(n_documents)
                offsets.append(raw.tell())
                n_bytes = 0
            line = json.dumps(document.__dict__, ensure_ascii=False).encode() + b"\n"
            digest.update(line)
            out.write(line)
            n_bytes += len(line)
            n_documents += 1
            n_chars += len(document.text)
            if n_documents % 64 == 1:
                report(reading.share(), f"{n_documents:,} documents, {n_chars:,} characters")
    (directory / INDEX).write_text(json.dumps({"first": first, "offsets": offsets}))
    return digest.hexdigest()[:16], n_documents, n_chars
