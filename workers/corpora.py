"""Tokenise a corpus once per tokenizer into a packed stream (layout in app.corpora)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from app.corpora import Stream, documents, write_stream
from app.documents import Document, Report
from workers.language_model import LanguageModel


def tokenised(model: LanguageModel, corpus_dir: Path, report: Report) -> Stream:
    """Return the corpus' stream under the model's tokenizer, made now if this is the first use."""
    directory = corpus_dir / f"tokens-{model.card.tokenizer_hash}"
    if not directory.exists():
        write_stream(directory, _token_rows(model, corpus_dir, report), separator(model), model.card.d_vocab)
    return Stream.open(directory)


def _token_rows(model: LanguageModel, corpus_dir: Path, report: Report) -> Iterator[tuple[Document, list[int]]]:
    n_tokens = 0
    for batch in _batches(documents(corpus_dir), 256):
        rows = model.tokenizer([d.text for d in batch], add_special_tokens=False, verbose=False).input_ids
        n_tokens += sum(map(len, rows))
        report(0.0, f"tokenised {n_tokens:,} tokens")
        yield from zip(batch, rows, strict=True)


def _batches(source: Iterator[Document], size: int) -> Iterator[tuple[Document, ...]]:
    while batch := tuple(itertools.islice(source, size)):
        yield batch


def separator(model: LanguageModel) -> int:
    """The token between documents: end of text where the tokenizer has one, else its BOS, else token 0."""
    ids = (
        model.tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        model.tokenizer.eos_token_id,
        model.card.bos_token_id,
    )
    return next((i for i in ids if i is not None and i != model.tokenizer.unk_token_id), 0)
