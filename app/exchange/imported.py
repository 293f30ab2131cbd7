"""A place in the catalog for evidence that comes without its model, weights or corpus.

Rows arrive one by one and in any order; they wait in a scratch database on disk, so that memory holds one feature and
the strings of the tokens. What is shown are the examples' own tokens: they become a corpus of their own, with a
vocabulary of their own. A model or source of that name that is there already is never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import embeddings, explanations, harvests, visibility, wording
from app.catalog import DERIVED_COUNTS, NO_WEIGHTS
from app.corpora import IMPORTED, VOCABULARY, usable_name
from app.documents import Report
from app.errors import BadFile, Conflict, TooLarge
from app.evidence import Effect, FeatureEvidence, Silent
from app.exchange.rows import (
    MAX_EXAMPLES,
    ActivationRow,
    EffectRow,
    ExplanationRow,
    FeatureRow,
    SilentRow,
    Sparse,
    effect_of,
    evidence_of,
    sparse,
)
from app.harvests import HEURISTIC, FeatureRecord
from app.models import check_id
from app.protocol import ModelCard
from app.settings import Settings
from app.tables import Corpus, Harvest, Model, Source
from app.tokens import write_vocabulary

SILENT = ("silent", "hard_negatives")
MAX_VOCABULARY = 4_000_000
_MAX_SHARED = 2_000_000
"""Contexts remembered so that a text that several features show is stored once; beyond, it is stored again."""


@dataclass(frozen=True)
class Place:
    """What an import says of itself: where in the catalog it belongs, and where it is from."""

    model_id: str
    layer: int
    set_name: str
    n_layers: int = 0
    model_name: str = ""
    hook_name: str = ""
    dataset: str = ""
    tokens_seen: int = 0
    """Tokens of the run that made the evidence; 0 where it is not said."""
    n_features: int = 0
    """Latents of the SAE; 0 where it is not said."""
    origin: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set_name}"


class Intake:
    """Collects rows on disk, then writes them into the catalog."""

    def __init__(self, scratch: Path) -> None:
        self._db = sqlite3.connect(scratch / "rows.sqlite", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("BEGIN")
        self._db.execute("CREATE TABLE features (latent INTEGER PRIMARY KEY, row TEXT)")
        self._db.execute("CREATE TABLE examples (latent INTEGER, peak REAL, token TEXT, row TEXT)")
        self._db.execute("CREATE TABLE silent (latent INTEGER, kind TEXT, context INTEGER, row TEXT)")
        self._db.execute("CREATE INDEX silent_of ON silent (latent)")
        self._db.execute("CREATE TABLE effects (latent INTEGER, context INTEGER, row TEXT)")
        self._db.execute("CREATE TABLE explanations (latent INTEGER, row TEXT)")
        self._stream = (scratch / "rows.bin").open("w+b")
        self._token_ids: dict[str, int] = {}
        self._contexts: dict[bytes, int] = {}
        self._lengths: list[int] = []
        self._titles: list[str] = []
        self.n_features = 0
        self.derived = False
        """Whether some feature's number of active tokens was not said."""

    def close(self) -> None:
        self._db.close()
        self._stream.close()

    def add_feature(self, row: FeatureRow, place: str) -> None:
        # Logits share the examples' vocabulary, which has to be whole before the first feature is written.
        for token in (*row.pos_str, *row.neg_str):
            self.token_id(token)
        self.derived = self.derived or row.counts_are_derived
        self._db.execute("DELETE FROM silent WHERE latent = ?", (row.index,))
        for kind in SILENT:
            for silent in getattr(row, kind):
                self._add_silent(row.index, kind, silent, place)
        bare = row.model_copy(update={kind: [] for kind in SILENT})
        self._db.execute("INSERT OR REPLACE INTO features VALUES (?, ?)", (row.index, bare.model_dump_json()))
        self.n_features = max(self.n_features, row.index + 1)

    def add_example(self, index: int, row: ActivationRow, place: str) -> None:
        found = sparse(row, place)
        self.n_features = max(self.n_features, index + 1)
        if found is None:
            return
        context = self._context(row.tokens, row.title)
        if row.effect is not None and found.is_top:
            for token, _ in (*row.effect.up, *row.effect.down):
                self.token_id(token)
            if row.effect.position >= len(row.tokens):
                raise BadFile(f"{place}: the effect is at {row.effect.position} of {len(row.tokens)} tokens.")
            self._db.execute("INSERT INTO effects VALUES (?, ?, ?)", (index, context, row.effect.model_dump_json()))
        peak = max(found.values)
        token = row.tokens[found.positions[found.values.index(peak)]]
        line = json.dumps({**found.__dict__, "context": context})
        self._db.execute("INSERT INTO examples VALUES (?, ?, ?, ?)", (index, peak, token, line))

    def _add_silent(self, index: int, kind: str, row: SilentRow, place: str) -> None:
        if row.position >= len(row.tokens):
            raise BadFile(f"{place}: {kind} looks at {row.position} of {len(row.tokens)} tokens.")
        context = self._context(row.tokens, row.title)
        line = json.dumps({"position": row.position, "neighbour": row.neighbour})
        self._db.execute("INSERT INTO silent VALUES (?, ?, ?, ?)", (index, kind, context, line))

    def add_explanation(self, row: ExplanationRow) -> None:
        self._db.execute("INSERT INTO explanations VALUES (?, ?)", (row.index, row.model_dump_json()))

    def token_id(self, token: str) -> int:
        found = self._token_ids.setdefault(token, len(self._token_ids))
        if found >= MAX_VOCABULARY:
            raise TooLarge(f"The import holds more than {MAX_VOCABULARY:,} different tokens.")
        return found

    def features(self, d_sae: int, tokens_seen: int) -> Iterator[FeatureRecord]:
        """Every latent below d_sae in order, with its examples; one that the import says nothing of is silent."""
        self._db.execute("CREATE INDEX IF NOT EXISTS examples_latent ON examples (latent)")
        self._db.execute("CREATE INDEX IF NOT EXISTS effects_latent ON effects (latent)")
        self._db.execute("CREATE INDEX IF NOT EXISTS explanations_latent ON explanations (latent)")
        for index in range(d_sae):
            yield self._record(index, d_sae, tokens_seen)

    def explanations(self) -> Iterator[ExplanationRow]:
        for (line,) in self._db.execute("SELECT row FROM explanations ORDER BY latent, rowid"):
            yield ExplanationRow.model_validate_json(line)

    def write_stream(self, directory: Path) -> str:
        """Write the examples' tokens and vocabulary under `directory`/{hash}, and return the hash."""
        size = max(self._lengths, default=1)
        dtype = np.dtype("<u2" if len(self._token_ids) <= 65536 else "<u4")
        directory.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        self._stream.flush()
        with tempfile.TemporaryDirectory(dir=directory, prefix=".new-") as scratch:
            fresh = Path(scratch) / "tokens"
            fresh.mkdir()
            self._stream.seek(0)
            with (fresh / "stream.bin").open("wb") as out:
                for length in self._lengths or [0]:  # an empty file cannot be mapped
                    padded = np.zeros(size, dtype=dtype)
                    padded[:length] = np.frombuffer(self._stream.read(4 * length), "<u4")
                    digest.update(padded.tobytes())
                    out.write(padded.tobytes())
            words = [token.encode("utf-8", "replace") for token in self._token_ids]
            write_vocabulary(fresh / VOCABULARY, words)
            digest.update((fresh / VOCABULARY).read_bytes())
            about = {
                "starts": [size * row for row in range(len(self._lengths))] or [0],
                "titles": self._titles or [""],
                "sources": [""] * max(len(self._titles), 1),
                "lengths": self._lengths,
                "dtype": dtype.name,
                "n_tokens": size * len(self._lengths),
            }
            (fresh / "documents.json").write_text(json.dumps(about))
            digest.update((fresh / "documents.json").read_bytes())
            name = digest.hexdigest()[:16]
            target = directory / name / f"tokens-{IMPORTED}"
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(fresh, target)
        return name

    @property
    def context_size(self) -> int:
        return max(self._lengths, default=1)

    @property
    def n_contexts(self) -> int:
        return len(self._lengths)

    def _context(self, tokens: list[str], title: str | None) -> int:
        ids: npt.NDArray[np.uint32] = np.array([self.token_id(token) for token in tokens], dtype="<u4")
        # A context that runs over several documents is titled by where its feature peaks.
        title = (title or "")[:500]
        key = hashlib.blake2b(ids.tobytes() + title.encode(), digest_size=12).digest()
        there = self._contexts.get(key)
        if there is not None:
            return there
        number = len(self._lengths)
        if number < _MAX_SHARED:
            self._contexts[key] = number
        self._stream.write(ids.tobytes())
        self._lengths.append(len(ids))
        self._titles.append(title)
        return number

    def _record(self, index: int, d_sae: int, tokens_seen: int) -> FeatureRecord:
        line = self._db.execute("SELECT row FROM features WHERE latent = ?", (index,)).fetchone()
        row = (
            FeatureRow.model_validate_json(line[0], by_name=True)
            if line
            else FeatureRow.model_validate({"index": index})
        )
        lines = self._db.execute(
            "SELECT row FROM examples WHERE latent = ? ORDER BY rowid LIMIT ?", (index, MAX_EXAMPLES)
        )
        found = [Sparse(**json.loads(text)) for (text,) in lines]
        best = self._db.execute(
            "SELECT token FROM examples WHERE latent = ? ORDER BY peak DESC, rowid LIMIT 1", (index,)
        ).fetchone()
        made = evidence_of(row, found, self.token_id, d_sae, tokens_seen)
        return FeatureRecord(
            index=index,
            evidence=replace(made, **{kind: self._silent(index, kind) for kind in SILENT}),
            effects=self._effects(index, made),
            label=self._automatic_label(index),
            top_token=best[0] if best else "",
            top_logit=row.pos_str[0] if row.pos_str else "",
        )

    def _silent(self, index: int, kind: str) -> tuple[Silent, ...]:
        lines = self._db.execute(
            "SELECT context, row FROM silent WHERE latent = ? AND kind = ? ORDER BY rowid", (index, kind)
        )
        return tuple(Silent(context=context, **json.loads(line)) for context, line in lines)

    def _effects(self, index: int, made: FeatureEvidence) -> tuple[Effect, ...] | None:
        """In the order of the top examples; None where the import has none for this feature."""
        lines = self._db.execute("SELECT context, row FROM effects WHERE latent = ?", (index,))
        rows = {context: EffectRow.model_validate_json(line) for context, line in lines}
        if not rows:
            return None
        known = (e.context for e in made.top if e.context in rows)
        return tuple(effect_of(rows[context], context, self.token_id) for context in known)

    def _automatic_label(self, index: int) -> str:
        for (line,) in self._db.execute("SELECT row FROM explanations WHERE latent = ? ORDER BY rowid", (index,)):
            row = ExplanationRow.model_validate_json(line)
            if row.typeName == HEURISTIC:
                return row.description
        return ""


@contextmanager
def intake(settings: Settings) -> Generator[Intake]:
    """A scratch place for one import, gone at its end."""
    home = settings.data_dir / "cache"
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="import-") as scratch:
        made = Intake(Path(scratch))
        try:
            yield made
        finally:
            made.close()


def check_place(session: Session, place: Place) -> None:
    """Raise BadInput for names that cannot be addresses, Conflict where an SAE with weights or other origin is."""
    check_id(place.model_id)
    harvests.check_set_name(place.set_name)
    there = session.scalar(select(Source).where(Source.model_id == place.model_id, Source.name == place.source))
    if there is not None and not there.sae_hash.startswith(NO_WEIGHTS):
        raise Conflict(
            f"{place.model_id}/{place.source} is an SAE with weights here; its evidence is not replaced. "
            "Give --model or --set to import under another name."
        )


def catalogue(session: Session, settings: Settings, place: Place, rows: Intake, report: Report) -> Source:
    """Write what was collected; a source of that name that was imported before is renewed."""
    check_place(session, place)
    d_sae = max(place.n_features, rows.n_features)
    if d_sae == 0:
        raise BadFile("The import holds no features.")
    if d_sae > settings.max_d_sae:
        raise TooLarge(f"The import names {d_sae:,} features; SAE_ATLAS_MAX_D_SAE allows {settings.max_d_sae:,}.")
    ensure_model(session, place.model_id, place.model_name, max(place.n_layers, place.layer + 1))
    source = _source(session, place, d_sae)
    corpus = _corpus(session, place, rows.write_stream(settings.data_dir / "corpora"), rows)
    harvest = Harvest(
        corpus_id=corpus.id,
        tokenizer_hash=IMPORTED,
        context_size=rows.context_size,
        bos_token_id=None,
        n_tokens=place.tokens_seen,
        summary={},
    )
    densities, seen = np.zeros(d_sae), np.zeros(d_sae, dtype=np.int64)
    records = _measured(rows, place, densities, seen, report)
    made = harvests.record(session, source, harvest, records, show=True)
    made.summary = _summary(densities) | ({DERIVED_COUNTS: True} if rows.derived else {})
    made.n_tokens = place.tokens_seen or int(seen.max())
    explanations.add(session, source.id, _explained(rows, d_sae))
    session.flush()
    session.refresh(source)
    wording.fill(session, settings, source)
    embeddings.queue(session, settings)
    return source


def _measured(
    rows: Intake,
    place: Place,
    densities: npt.NDArray[np.float64],
    seen: npt.NDArray[np.int64],
    report: Report,
) -> Iterator[FeatureRecord]:
    """Pass records on, and keep what the harvest as a whole says of them."""
    d_sae = len(densities)
    for record in rows.features(d_sae, place.tokens_seen):
        densities[record.index], seen[record.index] = record.evidence.density, record.evidence.n_tokens
        if record.index % 100 == 0:
            report(0.5 + 0.5 * record.index / d_sae, f"Importing feature {record.index:,} of {d_sae:,}")
        yield record


def ensure_model(session: Session, model_id: str, name: str, n_layers: int) -> Model:
    """Return a model of the catalog; one that is not there is added, known by name alone."""
    there = session.get(Model, model_id)
    if there is not None:
        return there
    card = ModelCard(
        id=check_id(model_id),
        name=(name or model_id)[:200],
        hash="",
        architecture="",
        n_layers=n_layers,
        d_model=0,
        n_heads=0,
        d_head=0,
        d_mlp=0,
        d_vocab=0,
        n_ctx=0,
        bos_token_id=None,
        special_token_ids=[],
        tokenizer_hash="",
        has_chat_template=False,
        n_params=0,
        origin="known from imported evidence; no weights here",
    )
    made = Model(id=card.id, name=card.name, hash="", card=card.model_dump())
    session.add(made)
    session.flush()
    return made


def _source(session: Session, place: Place, d_sae: int) -> Source:
    with visibility.unlimited(session):  # a name is taken by what the one who imports may not see, too
        source = session.scalar(select(Source).where(Source.model_id == place.model_id, Source.name == place.source))
    if source is None:
        here = select(Source.id).where(Source.model_id == place.model_id, Source.layer == place.layer)
        first = session.scalar(here) is None
        digest = hashlib.sha256(f"{place.model_id}/{place.source}".encode()).hexdigest()[:12]
        source = Source(
            model_id=place.model_id,
            name=place.source,
            layer=place.layer,
            set_name=place.set_name,
            is_default=first,
            sae_hash=NO_WEIGHTS + digest,
            architecture="",
            config={},
            metrics={},
        )
        visibility.claim(session, source)
        session.add(source)
    else:
        visibility.claim(session, source)
    source.hook_name, source.d_in, source.d_sae, source.origin = place.hook_name, 0, d_sae, place.origin
    session.flush()
    return source


def _corpus(session: Session, place: Place, corpus_hash: str, rows: Intake) -> Corpus:
    corpus = session.scalar(select(Corpus).where(Corpus.hash == corpus_hash))
    if corpus is None:
        name = f"{place.model_id} {place.source} examples {corpus_hash[:6]}"
        corpus = Corpus(
            name=usable_name(name[-100:]),
            hash=corpus_hash,
            n_documents=rows.n_contexts,
            n_chars=0,
            about=f"Examples that came with imported evidence{f', from {place.dataset}' if place.dataset else ''}.",
            origin={**place.origin, "dataset": place.dataset},
            owner=visibility.maker(session)[0],
        )
        session.add(corpus)
        session.flush()
    return corpus


def _summary(densities: npt.NDArray[np.float64]) -> dict[str, Any]:
    live = densities[densities > 0]
    counts, edges = np.histogram(np.log10(live), bins=40) if len(live) else (np.zeros(0), np.zeros(0))
    return {
        "density_histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
        "n_dead": int((densities == 0).sum()),
        "n_dense": int((densities > 0.1).sum()),
        "l0": float(densities.sum()),
    }


def _explained(rows: Intake, d_sae: int) -> Iterator[dict[str, Any]]:
    for row in rows.explanations():
        if row.index < d_sae and row.typeName != HEURISTIC:
            author = row.explanationModelName or row.authorName or "unknown"
            method = row.typeName or "imported"
            yield {
                "index": row.index,
                "text": row.description,
                "method": method[:200],
                "author": author[:200],
            }
