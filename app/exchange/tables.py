"""Evidence as parquet tables, for pandas, polars or DuckDB. Each column says in the file what it is.

features.parquet      one row a latent
examples.parquet      one row an example, with its tokens and the activation on each
silent.parquet        one row a context without an activation, drawn at random or near the positives
effects.parquet       one row a top example whose causal effect was measured
logits.parquet        one row an output token that a feature promotes or suppresses
explanations.parquet  one row an explanation
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from app.documents import Report
from app.errors import AtlasError
from app.evidence import Effect, FeatureEvidence
from app.exchange.exported import Exported
from app.exchange.rows import dense, examples_of
from app.settings import Settings

COLUMNS: dict[str, dict[str, tuple[str, str]]] = {
    "features": {
        "index": ("int32", "latent"),
        "label": ("string", "best explanation; empty where there is none"),
        "density": ("double", "fraction of tokens it is active on: n_active / n_tokens"),
        "n_active": ("int64", "tokens it is active on"),
        "n_tokens": ("int64", "tokens seen, first positions left out"),
        "max_act": ("float", "highest activation"),
        "mean_act": ("float", "mean over active tokens"),
        "histogram": ("list<int64>", "active tokens in equal bins over (0, max_act]"),
        "logits_low": ("float", "lowest effect on an output token's logit"),
        "logits_high": ("float", "highest effect"),
        "logits_histogram": ("list<int64>", "output tokens in equal bins over [logits_low, logits_high]"),
        "neighbours": ("list<int64>", "latents nearest by cosine of decoder rows"),
        "cosines": ("list<float>", "those cosines"),
        "correlated": ("list<int64>", "latents whose activations correlate most"),
        "pearson": ("list<float>", "those correlations"),
    },
    "examples": {
        "index": ("int32", "latent"),
        "group": ("string", "`top`, or `interval` for a sample of a band of activation"),
        "rank": ("int32", "place in its group"),
        "bin_min": ("float", "band: lower bound; null in the top group"),
        "bin_max": ("float", "band: upper bound; null in the top group"),
        "bin_share": ("double", "share of active tokens that lie in the band; null in the top group"),
        "context": ("int64", "number of the context in the corpus"),
        "title": ("string", "document it comes from"),
        "peak": ("int32", "position of the highest activation in tokens"),
        "max": ("float", "highest activation"),
        "tokens": ("list<string>", "the whole context; joined, its text"),
        "values": ("list<float>", "activation on each token"),
    },
    "silent": {
        "index": ("int32", "latent"),
        "kind": ("string", "`random`, drawn from all contexts without an activation, or `hard` near the positives"),
        "rank": ("int32", "place in its kind"),
        "context": ("int64", "number of the context in the corpus"),
        "title": ("string", "document it comes from"),
        "position": ("int32", "in tokens: where one might have expected an activation; the middle for `random`"),
        "neighbour": ("int32", "latent with a similar decoder row that peaks there; null for a token it peaks on"),
        "tokens": ("list<string>", "the whole context; joined, its text"),
    },
    "effects": {
        "index": ("int32", "latent"),
        "rank": ("int32", "place of the example in the group `top`"),
        "context": ("int64", "number of the context in the corpus"),
        "position": ("int32", "in the example's tokens: where the latent was ablated"),
        "loss_change": ("double", "ln p(next) - ln q(next) in nats, q with the ablation; null at the corpus' end"),
        "kl": ("double", "KL(p || q) in nats"),
        "up_tokens": ("list<string>", "tokens it votes up, largest first"),
        "up_shares": ("list<float>", "p - q of these"),
        "down_tokens": ("list<string>", "tokens it votes down, most first"),
        "down_shares": ("list<float>", "p - q of these"),
    },
    "logits": {
        "index": ("int32", "latent"),
        "sign": ("string", "`promotes` or `suppresses`"),
        "rank": ("int32", "0 is the strongest"),
        "token": ("string", "output token"),
        "value": ("float", "effect on its logit through W_dec and the unembedding, final norm folded"),
    },
    "explanations": {
        "index": ("int32", "latent"),
        "text": ("string", "what was written"),
        "method": ("string", "`heuristic` for automatic labels, a method's name or `human`"),
        "author": ("string", "who or which model wrote it"),
        "created_at": ("string", "ISO 8601, UTC"),
    },
}
ROWS_PER_GROUP = 5_000


def write(session: Session, settings: Settings, model_id: str, name: str, out: Path, report: Report) -> Iterator[Path]:
    """Write the tables and yield their files. Raises AtlasError naming the package that is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise AtlasError("Parquet needs a package: pip install 'sae-atlas[data]'.")
    return _written(Exported.open(session, settings, model_id, name), out, report)


def _written(found: Exported, out: Path, report: Report) -> Iterator[Path]:
    writers = {table: _Writer(out / f"{table}.parquet", columns) for table, columns in COLUMNS.items()}
    labels = found.labels()
    for index, evidence, effects in found.features():
        writers["features"].add(_feature(index, labels.get(index, ""), evidence))
        for table, rows in (
            ("examples", _examples(found, index, evidence)),
            ("silent", _silent(found, index, evidence)),
            ("effects", _effects(found, index, evidence, effects)),
            ("logits", _logits(found, index, evidence)),
        ):
            for row in rows:
                writers[table].add(row)
        report(index / found.source.d_sae, f"Writing feature {index:,} of {found.source.d_sae:,}")
    for row in found.explanations():
        renamed = {"text": row["description"], "method": row["typeName"], "author": row["authorName"]}
        writers["explanations"].add({"index": int(row["index"]), **renamed, "created_at": row["createdAt"]})
    for table, writer in writers.items():
        writer.close()
        yield out / f"{table}.parquet"


class _Writer:
    """One table, written some thousand rows at a time."""

    def __init__(self, path: Path, columns: dict[str, tuple[str, str]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema(
            [pa.field(name, _type(kind), metadata={"description": about}) for name, (kind, about) in columns.items()]
        )
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []


def _type(kind: str) -> Any:
    import pyarrow as pa

    if kind.startswith("list<"):
        return pa.list_(_type(kind[5:-1]))
    return {"int32": pa.int32(), "int64": pa.int64(), "float": pa.float32(), "double": pa.float64()}.get(
        kind, pa.string()
    )


def _feature(index: int, label: str, evidence: FeatureEvidence) -> dict[str, Any]:
    row: dict[str, Any] = {"index": index, "label": label, "density": evidence.density}
    for name in COLUMNS["features"]:
        if name not in row:
            value = getattr(evidence, name)
            row[name] = value.tolist() if hasattr(value, "tolist") else value
    return row


def _examples(found: Exported, index: int, evidence: FeatureEvidence) -> Iterator[dict[str, Any]]:
    ranks: dict[float, int] = {}
    for example, (low, high, share) in examples_of(evidence):
        tokens, top = found.tokens(example), share == -1
        ranks[low] = ranks.get(low, -1) + 1
        yield {
            "index": index,
            "group": "top" if top else "interval",
            "rank": ranks[low],
            "bin_min": None if top else low,
            "bin_max": None if top else high,
            "bin_share": None if top else share,
            "context": example.context,
            "title": found.title(example),
            "peak": example.peak - found.skipped,
            "max": example.max,
            "tokens": tokens,
            "values": dense(example, len(tokens), found.skipped),
        }


def _silent(found: Exported, index: int, evidence: FeatureEvidence) -> Iterator[dict[str, Any]]:
    for kind, group in (("random", evidence.silent), ("hard", evidence.hard_negatives)):
        for rank, silent in enumerate(group):
            yield {
                "index": index,
                "kind": kind,
                "rank": rank,
                "context": silent.context,
                "title": found.title_at(silent.context, silent.position),
                "position": silent.position - found.skipped,
                "neighbour": silent.neighbour,
                "tokens": found.tokens_of(silent.context),
            }


def _effects(
    found: Exported, index: int, evidence: FeatureEvidence, effects: Iterable[Effect]
) -> Iterator[dict[str, Any]]:
    ranks = {example.context: rank for rank, example in enumerate(evidence.top)}
    for effect in effects:
        yield {
            "index": index,
            "rank": ranks.get(effect.context),
            "context": effect.context,
            "position": effect.position - found.skipped,
            "loss_change": effect.loss_change if math.isfinite(effect.loss_change) else None,
            "kl": effect.kl,
            "up_tokens": [found.words.string(token) for token, _ in effect.up],
            "up_shares": [share for _, share in effect.up],
            "down_tokens": [found.words.string(token) for token, _ in effect.down],
            "down_shares": [share for _, share in effect.down],
        }


def _logits(found: Exported, index: int, evidence: FeatureEvidence) -> Iterator[dict[str, Any]]:
    sides: Iterable[tuple[str, Any, Any]] = (
        ("promotes", evidence.top_logit_ids, evidence.top_logits),
        ("suppresses", evidence.bottom_logit_ids, evidence.bottom_logits),
    )
    for sign, ids, values in sides:
        for rank, (token, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True)):
            yield {"index": index, "sign": sign, "rank": rank, "token": found.words.string(token), "value": value}
