"""What all export formats read: a source with its evidence, feature by feature, and the tokens of its examples."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from app import catalog, evidence
from app.catalog import HarvestCard, SourceCard
from app.corpora import Stream, tokens_dir
from app.errors import Conflict, NotFound
from app.evidence import Effect, Example, FeatureEvidence, Silent
from app.exchange import rows
from app.protocol import ModelCard
from app.settings import Settings
from app.tables import Evidence, Explanation, Feature
from app.tokens import Vocabulary


@dataclass(frozen=True)
class Exported:
    """A source that has evidence."""

    session: Session
    card: ModelCard
    source: SourceCard
    harvest: HarvestCard
    stream: Stream
    words: Vocabulary

    @classmethod
    def open(cls, session: Session, settings: Settings, model_id: str, name: str) -> Exported:
        """Raises NotFound when there is no evidence, or its tokens are not on this machine."""
        card, source, harvest = catalog.source_page(session, model_id, name)
        if harvest is None:
            raise NotFound(f"{model_id}/{name} has no evidence yet. Run `sae-atlas harvest {model_id}/{name}` first.")
        directory = tokens_dir(settings, harvest.corpus_hash, harvest.tokenizer_hash)
        if not (directory / "stream.bin").is_file():
            raise NotFound(f"The tokens of corpus {harvest.corpus} are not on this machine; nothing can be exported.")
        words = catalog.words_of(settings, model_id, harvest)
        return cls(session, card, source, harvest, Stream.open(directory), words)

    def features(self) -> Iterator[tuple[int, FeatureEvidence, tuple[Effect, ...]]]:
        """Every feature with its evidence and the causal effects of its top examples."""
        query = select(Evidence.index, Evidence.blob, Evidence.effects).where(Evidence.harvest_id == self.harvest.id)
        stored = self.session.execute(query.order_by(Evidence.index).execution_options(yield_per=500))
        for index, blob, effects in stored:
            yield index, evidence.unpack(blob), () if effects is None else evidence.unpack_effects(effects)

    def labels(self) -> dict[int, str]:
        query = select(Feature.index, Feature.label).where(Feature.source_id == self.source.id)
        return {index: label for index, label in self.session.execute(query)}  # noqa: C416 - rows are no mapping

    def feature_row(self, found: FeatureEvidence, index: int) -> dict[str, Any]:
        """A feature's statistics, with the contexts it is silent in, which no other program's format has."""
        row = rows.feature_row(found, index, self.words.string)
        for name in ("silent", "hard_negatives"):
            group: tuple[Silent, ...] = getattr(found, name)
            row[name] = [
                {
                    "tokens": self.tokens_of(silent.context),
                    "position": max(silent.position - self.skipped, 0),
                    "neighbour": silent.neighbour,
                    "title": self.title_at(silent.context, silent.position),
                }
                for silent in group
            ]
        return row

    def effect_of(
        self, example: Example, bounds: tuple[float, float, float], effects: Sequence[Effect]
    ) -> dict[str, Any]:
        """The causal effect of a top example as a field of its row; nothing where none was measured."""
        if bounds[2] != -1:
            return {}
        for effect in effects:
            if effect.context == example.context:
                return {"effect": rows.effect_row(effect, self.skipped, self.words.string)}
        return {}

    def explanations(self) -> Iterator[dict[str, Any]]:
        query = select(Explanation).where(Explanation.source_id == self.source.id)
        for row in self.session.scalars(query.order_by(Explanation.index, Explanation.id)):
            yield {
                "id": str(row.id),
                "modelId": self.card.id,
                "layer": self.source.name,
                "index": str(row.index),
                "description": row.text,
                "authorName": row.author,
                "explanationModelName": row.author,
                "typeName": row.method,
                "createdAt": row.created_at.isoformat(),
            }

    @property
    def skipped(self) -> int:
        """Tokens before the text: 1 where a context begins with the beginning-of-text token, which no format keeps."""
        return 0 if self.harvest.bos_token_id is None else 1

    def tokens(self, example: Example) -> list[str]:
        return self.tokens_of(example.context)

    def tokens_of(self, context: int) -> list[str]:
        ids = self.stream.context(context, self.harvest.context_size, self.harvest.bos_token_id)
        return self.words.strings(ids[self.skipped :])

    def title(self, example: Example) -> str:
        return self.title_at(example.context, example.peak)

    def title_at(self, context: int, position: int) -> str:
        return self.stream.title(context, position, self.harvest.context_size, self.harvest.bos_token_id)


@contextmanager
def fresh_directory(out: Path) -> Generator[Path]:
    """A directory that becomes `out` when all went well. Raises Conflict if that exists."""
    if out.exists():
        raise Conflict(f"{out} exists already; choose a new directory.")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=".new-"))
    try:
        yield scratch
        scratch.chmod(0o755)
        os.rename(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
