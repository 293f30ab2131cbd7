"""Bundles: one SAE with everything needed to look at it, as a directory that another SAE Atlas imports. Torch-free.

    manifest.json                    format, version, what is described below, sha256 of every file
    sae/cfg.json, sae/sae_weights.safetensors
    model/card.json, model/vocabulary.json.zst     the model's description; its weights are not part of a bundle
    corpus/stream.bin.zst, corpus/documents.json.zst   token stream of the corpus (app.corpora)
    evidence/features.jsonl.zst      {"index", "label" (the automatic one), "top_token", "top_logit", "blob" and
                                     "effects" (base64; effects null where they were not measured)}
    evidence/explanations.jsonl.zst  explanations by people and models
    evidence/map.json.zst            the 2-D map of its features (app.maps), where there is one
    evidence/lists.jsonl.zst         lists that hold one of its features and are shared, where there are any

Nothing is taken from a bundle but these files, and each only when its hash is the manifest's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import zstandard
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import false, or_, select
from sqlalchemy.orm import Session

from app import cards, embeddings, evidence, explanations, harvests, lists, maps, visibility, weights, wording
from app.corpora import Report, tokens_dir, usable_name
from app.errors import BadFile, Conflict, NotFound
from app.harvests import FeatureRecord
from app.people import LOCAL
from app.protocol import ModelCard
from app.settings import Settings
from app.tables import (
    Corpus,
    Evidence,
    Explanation,
    Feature,
    FeatureList,
    Harvest,
    HarvestState,
    ListedFeature,
    Model,
    Source,
)
from app.visibility import Visibility

FORMAT, VERSION = "sae-atlas-bundle", 1
MANIFEST = "manifest.json"
SAE_FILES = ("sae/cfg.json", "sae/sae_weights.safetensors")
FILES = (
    *SAE_FILES,
    "model/card.json",
    "model/vocabulary.json.zst",
    "corpus/stream.bin.zst",
    "corpus/documents.json.zst",
    "evidence/features.jsonl.zst",
    "evidence/explanations.jsonl.zst",
)
MAP_FILE = "evidence/map.json.zst"
LISTS_FILE = "evidence/lists.jsonl.zst"
OPTIONAL = (MAP_FILE, LISTS_FILE)
MAX_LISTS = 10_000
MAX_UNPACKED_BYTES = 4 * 2**30
"""Of one file: no bundle file may unpack to more."""


class CorpusEntry(BaseModel):
    name: str
    hash: str
    n_documents: int
    n_chars: int
    about: str


class HarvestEntry(BaseModel):
    tokenizer_hash: str
    context_size: int
    bos_token_id: int | None
    n_tokens: int
    summary: dict[str, Any]
    state: str = HarvestState.COMPLETE


class ListedEntry(BaseModel):
    """A feature in a list: of this SAE or of another."""

    model_id: Annotated[str, Field(max_length=200)]
    source: Annotated[str, Field(max_length=200)]
    index: Annotated[int, Field(ge=0, lt=2**31)]
    note: Annotated[str, Field(max_length=lists.MAX_NOTE)]


class ListEntry(BaseModel):
    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{8,32}$")]
    name: Annotated[str, Field(max_length=lists.MAX_NAME)]
    description: Annotated[str, Field(max_length=lists.MAX_TEXT)]
    test_text: Annotated[str, Field(max_length=lists.MAX_TEXT)]
    visibility: Visibility
    created_at: datetime
    updated_at: datetime
    features: Annotated[list[ListedEntry], Field(max_length=lists.MAX_FEATURES)]


class Manifest(BaseModel):
    model_config = ConfigDict(frozen=True)

    format: str
    version: int
    created_at: datetime
    model: ModelCard
    set_name: str
    metrics: dict[str, Any]
    origin: dict[str, Any]
    corpus: CorpusEntry
    harvest: HarvestEntry
    n_features: int
    description: Annotated[str, Field(max_length=cards.MAX_DESCRIPTION)] = ""
    tags: Annotated[list[str], Field(max_length=cards.MAX_TAGS)] = Field(default_factory=list[str])
    files: dict[str, str]
    """Relative path -> sha256."""


def export_bundle(
    session: Session, settings: Settings, model_id: str, name: str, out: Path, report: Report
) -> Manifest:
    """Write a source with its evidence to a new directory. Raises NotFound without evidence, Conflict if out exists."""
    if out.exists():
        raise Conflict(f"{out} exists already; choose a new directory.")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=".new-"))
    try:
        for _ in write(session, settings, model_id, name, scratch, report):
            pass
        scratch.chmod(0o755)
        os.rename(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return read_manifest(out)


def write(session: Session, settings: Settings, model_id: str, name: str, out: Path, report: Report) -> Iterator[Path]:
    """Write a source with its evidence into a directory, and yield its files, the manifest last.

    Raises NotFound without evidence, weights or tokens.
    """
    source = harvests.source_named(session, model_id, name)
    harvest = session.get(Harvest, source.harvest_id) if source.harvest_id else None
    if harvest is None:
        raise NotFound(f"{model_id}/{name} has no evidence yet. Run `sae-atlas harvest {model_id}/{name}` first.")
    corpus = session.get_one(Corpus, harvest.corpus_id)
    if not all((settings.sae_dir(source.sae_hash) / Path(file).name).is_file() for file in SAE_FILES):
        raise NotFound(f"{model_id}/{name} has no weights here, and a bundle holds them; choose another format.")
    if not (tokens_dir(settings, corpus.hash, harvest.tokenizer_hash) / "stream.bin").is_file():
        raise NotFound(f"The tokens of corpus {corpus.name} are not on this machine; nothing can be exported.")
    return _written(session, settings, source, harvest, corpus, out, report)


def _written(
    session: Session, settings: Settings, source: Source, harvest: Harvest, corpus: Corpus, out: Path, report: Report
) -> Iterator[Path]:
    _write_files(session, settings, source, harvest, corpus, out, report)
    manifest = _manifest(session, source, harvest, corpus, out)
    (out / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    for file in (*manifest.files, MANIFEST):
        yield out / file


def import_bundle(session: Session, settings: Settings, path: Path, report: Report) -> Source:
    """Read a bundle into the catalog and return its source. Importing again changes nothing.

    Raises BadFile for what is no bundle or was changed, and Conflict when the source's name holds another SAE.
    """
    manifest = read_manifest(path)
    listed = (*FILES, *(file for file in OPTIONAL if file in manifest.files))
    for number, file in enumerate(listed):
        report(0.2 * number / len(listed), f"Checking {file}")
        _check_file(path, file, manifest)
    facts = weights.check_sae(path / "sae", manifest.model.d_model, settings)
    harvests.held(session, manifest.model.id, facts, manifest.set_name)
    _ensure_model(session, settings, path, manifest)
    corpus = _ensure_corpus(session, settings, path, manifest)
    report(0.4, "Reading the evidence")
    source = harvests.catalogue_sae(
        session,
        settings,
        facts,
        model_id=manifest.model.id,
        set_name=manifest.set_name,
        metrics=manifest.metrics,
        origin=manifest.origin,
    )
    harvest = Harvest(corpus_id=corpus.id, **manifest.harvest.model_dump())
    harvests.record(session, source, harvest, _features(path, manifest, report))
    wording.fill(session, settings, source)
    explanations.add(session, source.id, _explanations_in(path))
    embeddings.queue(session, settings)
    if MAP_FILE in listed:
        _import_map(session, source, path)
    if LISTS_FILE in listed:
        _import_lists(session, path)
    cards.fill(session, source, manifest.description, manifest.tags)
    report(1.0, f"Imported {manifest.n_features:,} features")
    return source


def _write_files(
    session: Session, settings: Settings, source: Source, harvest: Harvest, corpus: Corpus, out: Path, report: Report
) -> None:
    for part in ("sae", "model", "corpus", "evidence"):
        (out / part).mkdir()
    for file in SAE_FILES:
        shutil.copyfile(settings.sae_dir(source.sae_hash) / Path(file).name, out / file)
    model_dir = settings.model_dir(source.model_id)
    card = session.get_one(Model, source.model_id).card
    (out / "model/card.json").write_text(ModelCard(**card).model_dump_json(indent=2))
    _pack(out / "model/vocabulary.json.zst", [(model_dir / "vocabulary.json").read_bytes()])
    tokens = tokens_dir(settings, corpus.hash, harvest.tokenizer_hash)
    report(0.1, "Packing the corpus' tokens")
    _pack(out / "corpus/stream.bin.zst", _blocks(tokens / "stream.bin"))
    _pack(out / "corpus/documents.json.zst", [(tokens / "documents.json").read_bytes()])
    _pack(out / "evidence/features.jsonl.zst", _feature_lines(session, source, harvest, report))
    _pack(out / "evidence/explanations.jsonl.zst", _explanation_lines(session, source))
    drawn = maps.map_of(session, source.id)
    if drawn is not None:
        _pack(out / MAP_FILE, [_map_line(drawn)])
    shared = list(_list_lines(session, source))
    if shared:
        _pack(out / LISTS_FILE, shared)


def _manifest(session: Session, source: Source, harvest: Harvest, corpus: Corpus, out: Path) -> Manifest:
    entry = CorpusEntry.model_validate(corpus, from_attributes=True)
    return Manifest(
        format=FORMAT,
        version=VERSION,
        created_at=datetime.now(UTC),
        model=ModelCard(**session.get_one(Model, source.model_id).card),
        set_name=source.set_name,
        metrics=source.metrics,
        origin=source.origin,
        corpus=entry,
        harvest=HarvestEntry.model_validate(harvest, from_attributes=True),
        n_features=source.d_sae,
        description=source.description,
        tags=cards.tags_of(session, source.id),
        files={file: sha256_of(out / file) for file in (*FILES, *OPTIONAL) if (out / file).exists()},
    )


def _feature_lines(session: Session, source: Source, harvest: Harvest, report: Report) -> Iterator[bytes]:
    automatic = select(Explanation.index, Explanation.text).where(
        Explanation.source_id == source.id, Explanation.method == harvests.HEURISTIC
    )
    labels = {index: text for index, text in session.execute(automatic)}  # noqa: C416 - rows are no mapping
    query = (
        select(Feature.index, Feature.top_token, Feature.top_logit, Evidence.blob, Evidence.effects)
        .join(Evidence, (Evidence.index == Feature.index) & (Evidence.harvest_id == harvest.id))
        .where(Feature.source_id == source.id)
        .order_by(Feature.index)
    )
    for index, top_token, top_logit, blob, effects in session.execute(query.execution_options(yield_per=500)):
        report(0.2 + 0.8 * index / source.d_sae, f"Packing feature {index:,} of {source.d_sae:,}")
        line: dict[str, Any] = {
            "index": index,
            "label": labels.get(index, ""),
            "top_token": top_token,
            "top_logit": top_logit,
        }
        line["blob"] = base64.b64encode(blob).decode()
        line["effects"] = None if effects is None else base64.b64encode(effects).decode()
        yield json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _explanation_lines(session: Session, source: Source) -> Iterator[bytes]:
    query = select(Explanation).where(Explanation.source_id == source.id, Explanation.method != harvests.HEURISTIC)
    for e in session.scalars(query.order_by(Explanation.id)):
        line = {"index": e.index, "text": e.text, "method": e.method, "author": e.author}
        yield json.dumps({**line, "created_at": e.created_at.isoformat()}, ensure_ascii=False).encode() + b"\n"


def read_manifest(path: Path) -> Manifest:
    """Return what a bundle says of itself. Raises BadFile for what is no bundle, or of another version."""
    file = path / MANIFEST
    if not file.is_file() or file.stat().st_size > 2**24:
        raise BadFile(f"{path} is no bundle: it holds no {MANIFEST}.")
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except (ValidationError, RecursionError) as error:
        raise BadFile(f"{file} is not a bundle's manifest: {str(error).splitlines()[0]}.") from None
    if (manifest.format, manifest.version) != (FORMAT, VERSION):
        raise BadFile(
            f"{file} says {manifest.format} version {manifest.version}; this version reads {FORMAT} version {VERSION}."
        )
    for name in (manifest.corpus.hash, manifest.harvest.tokenizer_hash, manifest.model.id):
        if not name or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
            raise BadFile(f"{file} names {name[:80]!r}, which cannot be a directory of the catalog.")
    return manifest


def _check_file(path: Path, file: str, manifest: Manifest) -> None:
    if not (path / file).is_file() or (path / file).is_symlink():
        raise BadFile(f"The bundle lacks {file}.")
    expected, found = manifest.files.get(file, "nothing"), sha256_of(path / file)
    if expected != found:
        raise BadFile(f"{file} was changed: its sha256 is {found[:16]}…, the manifest says {expected[:16]}….")


def _ensure_model(session: Session, settings: Settings, path: Path, manifest: Manifest) -> None:
    """Describe the model where it is not installed: pages then show its tokens, only computing needs the weights."""
    directory = settings.model_dir(manifest.model.id)
    if not (directory / "vocabulary.json").exists():
        directory.mkdir(parents=True, exist_ok=True)
        _unpack(path / "model/vocabulary.json.zst", directory / "vocabulary.json")
    if session.get(Model, manifest.model.id) is None:
        card = manifest.model
        session.add(Model(id=card.id, name=card.name, hash=card.hash, card=card.model_dump()))
        session.flush()


def _ensure_corpus(session: Session, settings: Settings, path: Path, manifest: Manifest) -> Corpus:
    entry = manifest.corpus
    target = tokens_dir(settings, entry.hash, manifest.harvest.tokenizer_hash)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as scratch:
            fresh = Path(scratch) / target.name
            fresh.mkdir()
            _unpack(path / "corpus/stream.bin.zst", fresh / "stream.bin")
            _unpack(path / "corpus/documents.json.zst", fresh / "documents.json")
            os.rename(fresh, target)
    corpus = session.scalar(select(Corpus).where(Corpus.hash == entry.hash))
    if corpus is None:
        name = usable_name(entry.name)
        if session.scalar(select(Corpus).where(Corpus.name == name)) is not None:
            name = f"{name[:90]}-{entry.hash[:6]}"
        corpus = Corpus(**{**entry.model_dump(), "name": name, "owner": visibility.maker(session)[0]})
        session.add(corpus)
        session.flush()
    return corpus


def _features(path: Path, manifest: Manifest, report: Report) -> Iterator[FeatureRecord]:
    for row in _json_lines(path / "evidence/features.jsonl.zst"):
        index = row["index"]
        if not isinstance(index, int) or not 0 <= index < manifest.n_features:
            raise BadFile(f"The bundle holds feature {index!r}; the SAE has {manifest.n_features:,}.")
        report(0.4 + 0.6 * index / manifest.n_features, f"Importing feature {index:,} of {manifest.n_features:,}")
        try:
            found = evidence.unpack(base64.b64decode(row.pop("blob")))
            packed = row.pop("effects", None)
            effects = None if packed is None else evidence.unpack_effects(base64.b64decode(packed))
        except Exception as error:
            raise BadFile(f"The evidence of feature {index} cannot be read: {error}.") from error
        yield FeatureRecord(evidence=found, effects=effects, **row)


def _explanations_in(path: Path) -> Iterator[dict[str, Any]]:
    for row in _json_lines(path / "evidence/explanations.jsonl.zst"):
        yield row | {"created_at": datetime.fromisoformat(row["created_at"])}


def _list_lines(session: Session, source: Source) -> Iterator[bytes]:
    held = select(ListedFeature.list_id).where(
        ListedFeature.model_id == source.model_id, ListedFeature.source == source.name
    )
    shared = FeatureList.visibility.in_((Visibility.TEAM, Visibility.LINK))
    if (who := visibility.reader(session)) is not None:
        # The id of a list is its link, which is its owner's to hand on.
        own = (FeatureList.visibility == Visibility.LINK) & (FeatureList.owner == who.name)
        shared = or_(FeatureList.visibility == Visibility.TEAM, own) if who.name else false()
    wanted = select(FeatureList).where(FeatureList.id.in_(held), shared)
    for found in session.scalars(wanted.order_by(FeatureList.id).limit(MAX_LISTS)).all():
        keys = lists.keys(lists.items(session, found))
        entry = ListEntry(
            id=found.id,
            name=found.name,
            description=found.description,
            test_text=found.test_text,
            visibility=Visibility(found.visibility),
            created_at=found.created_at,
            updated_at=found.updated_at,
            features=[ListedEntry(model_id=k.model_id, source=k.source, index=k.index, note=k.note) for k in keys],
        )
        yield entry.model_dump_json().encode() + b"\n"


def _import_lists(session: Session, path: Path) -> None:
    """Add the lists that are not here yet, as those of whoever imports; one that is here stays as it is."""
    owner, _ = visibility.maker(session)
    for number, line in enumerate(_json_lines(path / LISTS_FILE)):
        try:
            entry = ListEntry.model_validate(line)
        except ValidationError as error:
            raise BadFile(f"List {number} of the bundle cannot be read: {str(error).splitlines()[0]}.") from None
        if number >= MAX_LISTS:
            raise BadFile(f"The bundle holds more than {MAX_LISTS:,} lists.")
        if lists.is_taken(session, entry.id):
            continue
        about = entry.model_dump(exclude={"features"})
        session.add(FeatureList(owner=owner or LOCAL.name, **about))
        session.flush()
        held = {(f.model_id, f.source, f.index): f for f in entry.features}
        session.add_all(
            ListedFeature(list_id=entry.id, position=place, **feature.model_dump())
            for place, feature in enumerate(held.values())
        )
        session.flush()


def _map_line(drawn: maps.Map) -> bytes:
    line = {
        "coordinates": base64.b64encode(drawn.coordinates.astype("<f4").tobytes()).decode(),
        "cluster": base64.b64encode(drawn.cluster.astype("<u2").tobytes()).decode(),
        "clusters": [vars(cluster) for cluster in drawn.clusters],
        "about": dict(drawn.about),
    }
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _import_map(session: Session, source: Source, path: Path) -> None:
    for line in _json_lines(path / MAP_FILE):
        try:
            coordinates = np.frombuffer(base64.b64decode(line["coordinates"]), "<f4").reshape(source.d_sae, 2)
            cluster = np.frombuffer(base64.b64decode(line["cluster"]), "<u2").reshape(source.d_sae)
            clusters = [maps.Cluster(**c) for c in line["clusters"]]
            about = dict(line["about"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadFile(f"The bundle's map cannot be read: {error}.") from error
        maps.record(session, source, coordinates, cluster, clusters, about)


def _pack(path: Path, blocks: Iterable[bytes]) -> None:
    with path.open("wb") as raw, zstandard.ZstdCompressor(level=19).stream_writer(raw) as out:
        for block in blocks:
            out.write(block)


def _unpack(source: Path, target: Path) -> None:
    done = 0
    with source.open("rb") as raw, target.open("wb") as out:
        for block in zstandard.ZstdDecompressor().read_to_iter(raw):
            done += len(block)
            if done > MAX_UNPACKED_BYTES:
                raise BadFile(f"{source.name} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes.")
            out.write(block)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    rest, done = b"", 0
    with path.open("rb") as raw:
        for block in zstandard.ZstdDecompressor().read_to_iter(raw):
            done += len(block)
            if done > MAX_UNPACKED_BYTES:
                raise BadFile(f"{path.name} unpacks to more than {MAX_UNPACKED_BYTES:,} bytes.")
            *lines, rest = (rest + block).split(b"\n")
            yield from map(json.loads, lines)
    if rest:
        yield json.loads(rest)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            yield block


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()
