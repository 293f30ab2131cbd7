"""The tokens a feature fires on and promotes, as text that tables filter by. Reads evidence, knows no HTTP.

FeatureWords holds the tokens that a feature's top examples are active on, the strongest first, and its promoted output
tokens: in lower case, each between separators, so that SQL finds a part of a token as well as a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from sqlalchemy import ColumnElement, Exists, delete, exists, insert, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from app import evidence as blobs
from app.corpora import IMPORTED, VOCABULARY, Stream, tokens_dir
from app.evidence import FeatureEvidence
from app.settings import Settings
from app.tables import Corpus, Evidence, FeatureWords, Harvest, Source, WordKind
from app.tokens import Vocabulary, vocabulary

SEPARATOR = "\x1f"
MAX_TOKENS = 64
"""Of one feature; beyond these its top examples are active on many tokens, and weakly."""
_CHUNK = 1_000


def fill_missing(session: Session, settings: Settings, report: Callable[[str], None] = lambda name: None) -> int:
    """Gather the words of every source that has evidence but not these; return how many features got theirs."""
    waiting = select(Source).where(Source.harvest_id.is_not(None), ~gathered(Source.id))
    n = 0
    for source in session.scalars(waiting).all():
        report(f"{source.model_id}/{source.name}")
        n += fill(session, settings, source)
    return n


def gathered(source_id: ColumnElement[int] | InstrumentedAttribute[int] | int) -> Exists:
    """Return a condition: the words of this source's features are there."""
    return exists().where(FeatureWords.source_id == source_id)


def fill(session: Session, settings: Settings, source: Source) -> int:
    """Write the words of a source's features from the evidence it shows; the caller commits.

    Without the vocabulary nothing is written: tables are filtered by what their rows show then.
    """
    forget(session, source.id)
    row = session.execute(
        select(Harvest, Corpus.hash).join(Corpus, Corpus.id == Harvest.corpus_id).where(Harvest.id == source.harvest_id)
    ).first()
    if row is None:
        return 0
    harvest: Harvest = row[0]
    directory = tokens_dir(settings, row[1], harvest.tokenizer_hash)
    own = directory / VOCABULARY if harvest.tokenizer_hash == IMPORTED else None
    path = own or settings.model_dir(source.model_id) / "vocabulary.json"
    if not path.is_file():
        return 0
    words = vocabulary(path)
    stream = Stream.open(directory) if (directory / "stream.bin").is_file() else None
    n = 0
    for part in _chunks(session, harvest.id):
        rows: list[dict[str, object]] = []
        for index, blob in part:
            found = blobs.unpack(blob)
            tokens = _tokens(found, stream, words, harvest) if stream else []
            logits = [words.string(int(token)) for token in found.top_logit_ids]
            for kind, strings in ((WordKind.TOKENS, tokens), (WordKind.LOGITS, logits)):
                rows.append({"source_id": source.id, "kind": kind, "index": index, "text": joined(strings)})
        session.execute(insert(FeatureWords), rows)
        n += len(part)
    return n


def forget(session: Session, source_id: int) -> None:
    """Delete the words of a source's features."""
    session.execute(delete(FeatureWords).where(FeatureWords.source_id == source_id))


def joined(tokens: list[str]) -> str:
    """Return tokens as the searchable columns hold them, each once."""
    clean = dict.fromkeys(_plain(token) for token in tokens)
    return SEPARATOR + "".join(token + SEPARATOR for token in clean if token)


def wanted(text: str) -> str:
    """Return what a column must hold to fit a filter: a part of a token, or a whole one when it stands in quotes."""
    text = _plain(text)
    if len(text) > 2 and text[0] == text[-1] == '"':
        return SEPARATOR + text[1:-1] + SEPARATOR
    return text


def _plain(text: str) -> str:
    return text.lower().replace("\0", "").replace(SEPARATOR, "")


def _tokens(found: FeatureEvidence, stream: Stream, words: Vocabulary, harvest: Harvest) -> list[str]:
    if not found.top:
        return []
    rows = np.array([example.context for example in found.top], dtype=np.int64)
    ids = stream.contexts(rows, harvest.context_size, harvest.bos_token_id)
    active = np.concatenate([ids[i, example.positions] for i, example in enumerate(found.top)])
    strength = np.concatenate([example.values for example in found.top])
    ordered = active[np.argsort(-strength, kind="stable")].tolist()
    return [words.string(token) for token in list(dict.fromkeys(ordered))[:MAX_TOKENS]]


def _chunks(session: Session, harvest_id: int) -> Iterator[list[tuple[int, bytes]]]:
    last = -1
    while True:
        query = select(Evidence.index, Evidence.blob).where(Evidence.harvest_id == harvest_id, Evidence.index > last)
        part = [(row[0], row[1]) for row in session.execute(query.order_by(Evidence.index).limit(_CHUNK))]
        if not part:
            return
        yield part
        last = part[-1][0]
