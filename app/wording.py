"""The tokens a feature fires on and promotes, as text that tables filter by. Reads evidence, knows no HTTP.

Feature.tokens holds the tokens that its top examples are active on, the strongest first, Feature.logits its promoted
output tokens: in lower case, each between separators, so that SQL finds a part of a token as well as a whole one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from sqlalchemy import bindparam, select, update
from sqlalchemy.orm import Session

from app import evidence as blobs
from app.corpora import Stream, tokens_dir
from app.evidence import FeatureEvidence
from app.settings import Settings
from app.tables import Corpus, Evidence, Feature, Harvest, Source
from app.tokens import Vocabulary, vocabulary

SEPARATOR = "\x1f"
MAX_TOKENS = 64
"""Of one feature; beyond these its top examples are active on many tokens, and weakly."""
_CHUNK = 1_000


def fill_missing(session: Session, settings: Settings, report: Callable[[str], None] = lambda name: None) -> int:
    """Gather the words of every source that has evidence but not these; return how many features got theirs."""
    waiting = select(Feature.source_id).where(Feature.tokens.is_(None)).distinct()
    sources = session.scalars(select(Source).where(Source.harvest_id.is_not(None), Source.id.in_(waiting))).all()
    n = 0
    for source in sources:
        report(f"{source.model_id}/{source.name}")
        n += fill(session, settings, source)
    return n


def fill(session: Session, settings: Settings, source: Source) -> int:
    """Write the words of a source's features from the evidence it shows; the caller commits."""
    row = session.execute(
        select(Harvest, Corpus.hash).join(Corpus, Corpus.id == Harvest.corpus_id).where(Harvest.id == source.harvest_id)
    ).first()
    if row is None:
        return 0
    harvest: Harvest = row[0]
    words = vocabulary(settings.model_dir(source.model_id) / "vocabulary.json")
    directory = tokens_dir(settings, row[1], harvest.tokenizer_hash)
    stream = Stream.open(directory) if (directory / "stream.bin").is_file() else None
    statement = (
        update(Feature)
        .where(Feature.source_id == source.id, Feature.index == bindparam("latent_"))
        .values(tokens=bindparam("tokens_"), logits=bindparam("logits_"))
        .execution_options(synchronize_session=None)
    )
    n = 0
    for part in _chunks(session, harvest.id):
        rows: list[dict[str, object]] = []
        for index, blob in part:
            found = blobs.unpack(blob)
            tokens = _tokens(found, stream, words, harvest) if stream else []
            logits = [words.string(int(token)) for token in found.top_logit_ids]
            rows.append({"latent_": index, "tokens_": joined(tokens), "logits_": joined(logits)})
        # On the connection: the ORM's own bulk update wants primary keys and nothing else.
        session.connection().execute(statement, rows)
        n += len(rows)
    return n


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
