"""Remote catalogs: folders or web addresses where bundles lie, subscribed to and imported from. Takes a Session.

A folder is looked through for bundles. A web address needs an `index.json` beside them, which `write_index` makes:
{"format": "sae-atlas-remote", "version": 1, "bundles": [{"path", "sha256" (of its manifest), "model", "source", ...}]}.
The manifest's hash stands for the whole bundle, since the manifest holds the hash of every file. What was listed when
somebody chose it is what is imported: another manifest in its place is refused.
"""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from app import bundles, jobs, uploads, webfiles
from app.bundles import MANIFEST, Manifest
from app.documents import Report
from app.errors import AtlasError, BadFile, BadInput, Conflict, NotFound, TooLarge
from app.settings import Settings
from app.specs import ImportSpec
from app.tables import Job, Remote, Source, now

FORMAT, VERSION = "sae-atlas-remote", 1
INDEX = "index.json"
MAX_BUNDLES = 5_000
MAX_INDEX_BYTES = 2**23
MAX_REMOTES = 100
OLD_MINUTES = 55
"""After so long a trainer lists a remote again, at its hourly round."""
_MAX_MANIFEST_BYTES = 2**24
_DEPTH = 3
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_PATH = re.compile(r"(?!.*(^|/)\.)[A-Za-z0-9._-]{1,100}(/[A-Za-z0-9._-]{1,100}){0,2}|\.")
_LAYER = re.compile(r"blocks\.(\d{1,4})\.")


class Entry(BaseModel):
    """One bundle of a remote catalog, as it is listed."""

    model_config = ConfigDict(frozen=True)

    path: str = Field(max_length=320)
    """Below the remote's place."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of its manifest."""
    model: str = Field(max_length=200)
    source: str = Field(max_length=200)
    n_features: int = Field(ge=0)
    corpus: str = Field("", max_length=200)
    created_at: str = Field("", max_length=40)


class Index(BaseModel):
    format: str
    version: int
    bundles: list[Entry] = Field(max_length=MAX_BUNDLES)


class Offer(BaseModel):
    """A bundle, and how it stands to the catalog here."""

    entry: Entry
    here: bool
    """There is a source of that name here."""
    imported: bool
    """This very bundle was imported."""

    @property
    def renews(self) -> bool:
        return self.here and not self.imported


def add(session: Session, settings: Settings, name: str, place: str, who: str = "") -> Remote:
    """Subscribe to a folder or web address and list what it holds.

    Raises BadInput, Forbidden, NotFound or Unavailable for a place that cannot be read, Conflict for a taken name.
    """
    label = name.strip().lower()
    if not _NAME.fullmatch(label):
        raise BadInput(f"A remote's name has 1 to 64 of a-z, 0-9, dot, underscore and dash; not {name[:80]!r}.")
    if session.scalar(select(Remote.id).where(Remote.name == label)) is not None:
        raise Conflict(f"There is a remote called {label}; choose another name.")
    if len(everything(session)) >= MAX_REMOTES:
        raise Conflict(f"There are {MAX_REMOTES} remotes; remove one first.")
    remote = Remote(name=label, place=check_place(place), added_by=who)
    remote.listing = [entry.model_dump() for entry in listed(settings, remote.place)]
    remote.checked_at = now()
    session.add(remote)
    session.flush()
    return remote


def check_place(place: str) -> str:
    place = place.strip()
    if "://" in place:
        return webfiles.check_url(place)
    if "\0" in place or not Path(place).is_absolute():
        raise BadInput(f"{place[:200]!r} is neither a web address nor the absolute path of a folder.")
    return str(Path(place))


def refresh(session: Session, settings: Settings, remote: Remote) -> None:
    """List a remote again. One that cannot be read keeps its old list, with the reason."""
    _keep(remote, *_asked(settings, remote.place))
    session.flush()


def refresh_old(sessions: sessionmaker[Session], settings: Settings) -> int:
    """List again what was last listed long ago; return how many. No transaction waits for a web server."""
    with sessions() as session:
        old = (Remote.checked_at.is_(None)) | (Remote.checked_at < now() - timedelta(minutes=OLD_MINUTES))
        due = session.execute(select(Remote.id, Remote.place).where(old).order_by(Remote.checked_at)).all()
    for number, place in due:
        answer = _asked(settings, place)
        with sessions.begin() as session:
            remote = session.get(Remote, number)
            if remote is not None:
                _keep(remote, *answer)
    return len(due)


def _asked(settings: Settings, place: str) -> tuple[list[dict[str, Any]] | None, str]:
    """Return what lies at a place, or None and why it cannot be read."""
    try:
        return [entry.model_dump() for entry in listed(settings, place)], ""
    except AtlasError as error:
        return None, error.message[:500]


def _keep(remote: Remote, listing: list[dict[str, Any]] | None, problem: str) -> None:
    remote.problem = problem
    if listing is not None:
        remote.listing, remote.checked_at = listing, now()


def everything(session: Session) -> list[Remote]:
    return list(session.scalars(select(Remote).order_by(Remote.name)))


def named(session: Session, name: str) -> Remote:
    remote = session.scalar(select(Remote).where(Remote.name == name.strip().lower()))
    if remote is None:
        known = ", ".join(remote.name for remote in everything(session)) or "none yet"
        raise NotFound(f"No remote is called {name[:64]!r}; there are: {known}.")
    return remote


def remove(session: Session, name: str) -> None:
    session.delete(named(session, name))
    session.flush()


def offers(session: Session, remote: Remote) -> list[Offer]:
    """Return a remote's bundles, and how each stands to the catalog."""
    entries = [Entry(**entry) for entry in remote.listing]
    names = {(row[0], row[1]) for row in session.execute(select(Source.model_id, Source.name))}
    return [
        Offer(
            entry=entry,
            here=(entry.model, entry.source) in names,
            imported=(entry.model, entry.source) in names and remote.imported.get(entry.path) == entry.sha256,
        )
        for entry in entries
    ]


def queue_import(session: Session, settings: Settings, remote: Remote, path: str) -> Job:
    """Queue the import of one bundle, as it was listed."""
    entry = next((Entry(**e) for e in remote.listing if e["path"] == path), None)
    if entry is None:
        raise NotFound(f"{remote.name} lists no {path[:200]!r}; list it again.")
    root = uploads.fresh(settings, "remote")
    on_web = "://" in remote.place
    spec = ImportSpec(
        path=str(root / "bundle") if on_web else str(_below(Path(remote.place), path)),
        root=str(root),
        uploaded_as=f"{entry.model}/{entry.source} from {remote.name}"[:200],
        url=_url(remote.place, path) if on_web else "",
        manifest_sha256=entry.sha256,
        model="",
        set_name="",
    )
    uploads.sweep(session, settings)
    job = jobs.submit(session, settings, "import", f"Import {spec.uploaded_as}", spec.model_dump(mode="json"))
    remote.imported = {**remote.imported, path: entry.sha256}
    session.flush()
    return job


def fetch(settings: Settings, spec: ImportSpec, report: Report) -> None:
    """Bring a bundle of a web address to the spec's path; files that are whole there already are not fetched again."""
    directory = Path(spec.path)
    webfiles.save(settings, f"{spec.url}/{MANIFEST}", directory / MANIFEST, _MAX_MANIFEST_BYTES)
    manifest = check_manifest(directory, spec.manifest_sha256)
    left = settings.max_import_bytes
    for number, (file, digest) in enumerate(sorted(manifest.files.items())):
        report(number / len(manifest.files), f"Fetching {file}")
        if file not in (*bundles.FILES, bundles.MAP_FILE):
            raise BadFile(f"The manifest names {file[:100]!r}, which is no part of a bundle.")
        target = directory / file
        if target.is_file() and bundles.sha256_of(target) == digest:
            left -= target.stat().st_size
            continue
        try:
            left -= webfiles.save(settings, f"{spec.url}/{file}", target, left)
        except TooLarge as error:
            limit = f"{settings.max_import_bytes:,} bytes (SAE_ATLAS_MAX_IMPORT_BYTES)"
            raise TooLarge(f"{error.message} A bundle may have {limit}.") from None


def check_manifest(directory: Path, sha256: str) -> Manifest:
    """Return a bundle's manifest. Raises BadFile when it is another than the one that was listed."""
    manifest = bundles.read_manifest(directory)
    found = bundles.sha256_of(directory / MANIFEST)
    if sha256 and found != sha256:
        raise BadFile(
            f"{MANIFEST} was changed since it was listed: its sha256 is {found[:16]}…, the list said {sha256[:16]}…. "
            "List the remote again and look at what it offers."
        )
    return manifest


def write_index(folder: Path) -> list[Entry]:
    """Write the index of a folder's bundles, so that any web server can offer them."""
    entries = _in_folder(folder)
    index = Index(format=FORMAT, version=VERSION, bundles=entries)
    scratch = folder / f".{INDEX}.new"
    scratch.write_text(index.model_dump_json(indent=1) + "\n")
    scratch.replace(folder / INDEX)
    return entries


def listed(settings: Settings, place: str) -> list[Entry]:
    """Return the bundles that lie at a place now."""
    if "://" not in place:
        return _in_folder(Path(place))
    raw = webfiles.text(settings, f"{place}/{INDEX}", MAX_INDEX_BYTES)
    try:
        index = Index.model_validate_json(raw)
    except (ValidationError, RecursionError) as error:
        first = str(error).splitlines()[0][:200]
        raise BadFile(
            f"{place}/{INDEX} is no index of bundles: {first}. `sae-atlas remote index` writes one."
        ) from None
    if (index.format, index.version) != (FORMAT, VERSION):
        raise BadFile(f"{place}/{INDEX} says {index.format[:40]!r} version {index.version}, not {FORMAT} {VERSION}.")
    wrong = [entry.path for entry in index.bundles if not _PATH.fullmatch(entry.path)]
    if wrong:
        raise BadFile(f"{place}/{INDEX} names {wrong[0][:100]!r}, which is no place below it.")
    return index.bundles


def _in_folder(folder: Path) -> list[Entry]:
    if not folder.is_dir():
        raise NotFound(f"There is no folder {str(folder)[:300]} on this machine.")
    found: list[Entry] = []
    level = [folder]
    for _ in range(_DEPTH + 1):
        deeper: list[Path] = []
        for directory in level:
            if (directory / MANIFEST).is_file():
                if len(found) >= MAX_BUNDLES:
                    raise TooLarge(f"{folder} holds more than {MAX_BUNDLES:,} bundles.")
                found += _entry(folder, directory)
            else:
                inside = (path for path in directory.iterdir() if path.is_dir() and not path.is_symlink())
                deeper += sorted(path for path in inside if not path.name.startswith("."))
        level = deeper
    return found


def _entry(folder: Path, directory: Path) -> list[Entry]:
    """Return the entry of a bundle, or none for a directory whose manifest is of something else."""
    path = directory.relative_to(folder).as_posix()
    try:
        manifest = bundles.read_manifest(directory)
    except BadFile:
        return []
    if not _PATH.fullmatch(path):
        raise BadFile(f"The folder {path[:100]!r} has a name that no address can have; use letters, digits, . _ and -.")
    return [
        Entry(
            path=path,
            sha256=bundles.sha256_of(directory / MANIFEST),
            model=manifest.model.id,
            source=f"{_layer(directory)}-{manifest.set_name}",
            n_features=manifest.n_features,
            corpus=manifest.corpus.name[:200],
            created_at=f"{manifest.created_at:%Y-%m-%d %H:%M}",
        )
    ]


def _layer(directory: Path) -> str:
    try:
        with (directory / bundles.SAE_FILES[0]).open("rb") as file:
            config = json.loads(file.read(2**20))
        hook = config.get("metadata", {}).get("hook_name") or config.get("hook_name") or ""
        found = _LAYER.search(str(hook))
    except (OSError, ValueError, AttributeError):
        found = None
    return found[1] if found else "?"


def _below(folder: Path, path: str) -> Path:
    return folder if path == "." else folder / path


def _url(place: str, path: str) -> str:
    return place if path == "." else f"{place}/{path}"
