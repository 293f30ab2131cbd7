"""Archives in and out: zip and tar unpacked without harm, and a zip written as it is sent.

Only plain files are unpacked, only below the directory, only as many bytes as are allowed; no name leads anywhere else.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from app.documents import unpacked
from app.errors import BadFile, TooLarge

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tar.xz", ".tar.zst")
MAX_FILES = 100_000
_BLOCK = 2**20
_MAX_DEPTH = 12


def is_archive(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


@dataclass
class _Budget:
    """What may still be unpacked."""

    max_bytes: int
    name: str
    n_bytes: int = 0
    n_files: int = 0

    def spend(self, n_bytes: int) -> None:
        self.n_bytes += n_bytes
        if self.n_bytes > self.max_bytes:
            raise TooLarge(f"{self.name} unpacks to more than {self.max_bytes:,} bytes; nothing was kept.")

    def count(self) -> None:
        self.n_files += 1
        if self.n_files > MAX_FILES:
            raise TooLarge(f"{self.name} holds more than {MAX_FILES:,} files; nothing was kept.")


def unpack(archive: Path, directory: Path, max_bytes: int) -> None:
    """Unpack into a directory. Raises BadFile for links and names that lead out, TooLarge for a bomb."""
    budget = _Budget(max_bytes, archive.name.partition("-")[2] or archive.name)
    try:
        if archive.name.lower().endswith(".zip"):
            _unzip(archive, directory, budget)
        else:
            _untar(archive, directory, budget)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError, RuntimeError) as error:
        raise BadFile(f"{budget.name} cannot be unpacked: {str(error)[:200] or type(error).__name__}.") from error


def _unzip(archive: Path, directory: Path, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as opened:
        for entry in opened.infolist():
            if entry.is_dir():
                continue
            if (entry.external_attr >> 16) & 0o170000 == 0o120000:
                raise BadFile(f"{budget.name} holds a link, {entry.filename[:100]!r}; only plain files are read.")
            with opened.open(entry) as source:
                _put(source, place(directory, entry.filename, budget.name), budget)


def _untar(archive: Path, directory: Path, budget: _Budget) -> None:
    with unpacked(archive) as raw, tarfile.open(fileobj=raw, mode="r|") as opened:
        for entry in opened:
            if entry.isdir():
                continue
            if not entry.isfile():
                raise BadFile(f"{budget.name} holds a link, {entry.name[:100]!r}; only plain files are read.")
            source = opened.extractfile(entry)
            assert source is not None
            _put(source, place(directory, entry.name, budget.name), budget)


def place(directory: Path, name: str, archive: str) -> Path:
    """Return where a file of that name goes. Raises BadFile for a name that leads out of the directory."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    bad = any(part in ("..", "/") or "\0" in part or len(part.encode("utf-8", "replace")) > 200 for part in parts)
    if not parts or bad or len(parts) > _MAX_DEPTH or ":" in parts[0]:
        raise BadFile(f"{archive} holds {name[:100]!r}, which is no place below its own directory.")
    return directory.joinpath(*(part.encode("utf-8", "replace").decode() for part in parts))


def _put(source: IO[bytes], target: Path, budget: _Budget) -> None:
    budget.count()
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise BadFile(f"{budget.name} holds {target.name!r} twice.")
    with target.open("wb") as out:
        while block := source.read(_BLOCK):
            budget.spend(len(block))
            out.write(block)


class _Sink:
    """A file that is only written; what was written is taken away to be sent."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []

    def write(self, block: bytes) -> int:
        self._blocks.append(bytes(block))
        return len(block)

    def flush(self) -> None:
        pass

    def taken(self) -> bytes:
        joined = b"".join(self._blocks)
        self._blocks.clear()
        return joined


def zipped(root: str, files: Iterable[tuple[str, Path]]) -> Iterator[bytes]:
    """Yield a zip of files below one directory as they come; memory does not grow with them."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:  # type: ignore[arg-type]
        for name, path in files:
            entry = zipfile.ZipInfo.from_file(path, f"{root}/{name}", strict_timestamps=False)
            packed = path.suffix in (".gz", ".zst", ".parquet", ".safetensors")
            entry.compress_type = zipfile.ZIP_STORED if packed else zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as out, path.open("rb") as source:
                while block := source.read(_BLOCK):
                    out.write(block)
                    yield sink.taken()
            yield sink.taken()
    yield sink.taken()
