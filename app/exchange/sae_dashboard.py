"""sae_dashboard's batches: `batch-N.json` files, one object each with a list of features; read and written.

A batch is read feature by feature: what waits in memory is one feature, however large the file. sae_dashboard writes
NaN, which is no JSON, where a correlation was divided by zero; it is read as 0.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from sqlalchemy.orm import Session

from app.documents import Report, unpacked
from app.errors import BadFile
from app.evidence import Effect
from app.exchange.exported import Exported
from app.exchange.imported import Intake, Place, catalogue, check_place, intake
from app.exchange.rows import ActivationRow, FeatureRow, dense, examples_of, judged
from app.settings import Settings
from app.tables import Source

BATCH = 128
MAX_FEATURE_CHARS = 2**26
_LIST = re.compile(r'"features"\s*:\s*\[')
_GAP = re.compile(r"[\s,]*")
_NAME = re.compile(r"[^a-z0-9_-]+")


def write(session: Session, settings: Settings, model_id: str, name: str, out: Path, report: Report) -> Iterator[Path]:
    """Write a source's evidence as batches of 128 features, and yield their files."""
    return _written(Exported.open(session, settings, model_id, name), out, report)


def _written(found: Exported, out: Path, report: Report) -> Iterator[Path]:
    head = {
        "model_id": found.card.id,
        "layer": found.source.layer,
        "sae_set": found.source.set_name,
        "sae_id_suffix": None,
    }
    batch: list[dict[str, Any]] = []
    number = 0
    for index, evidence, effects in found.features():
        batch.append(_feature(found, index, evidence, effects))
        if len(batch) == BATCH:
            yield _write(out, number, head, batch)
            batch, number = [], number + 1
        report(index / found.source.d_sae, f"Writing feature {index:,} of {found.source.d_sae:,}")
    if batch:
        yield _write(out, number, head, batch)


def batches(path: Path) -> list[Path]:
    """The batch files of a directory, or the file itself."""
    if path.is_file():
        return [path] if path.name.endswith((".json", ".json.gz")) else []
    found = [p for p in path.glob("batch-*.json*") if p.name.endswith((".json", ".json.gz"))]
    return sorted(found, key=lambda p: (len(p.name), p.name))


def import_(
    session: Session, settings: Settings, path: Path, report: Report, rename: Callable[[Place], Place]
) -> list[Source]:
    """Read all batches of one SAE. Raises BadFile naming the file, the feature and the field of what is wrong."""
    files = batches(path)
    if not files:
        raise BadFile(f"{path} holds no batch-N.json, as sae_dashboard writes them.")
    tokens_seen = 0
    with intake(settings) as rows:
        for number, file in enumerate(files):
            report(0.5 * number / len(files), f"Reading {file.name}")
            with unpacked(file) as opened:
                batch = Batch(opened, file.name)
                for row in batch.features():
                    tokens_seen = max(tokens_seen, _take(rows, row, file.name, settings))
        place = rename(_place(batch.head, tokens_seen))  # pyright: ignore[reportPossiblyUnboundVariable]
        check_place(session, place)
        return [catalogue(session, settings, place, rows, report)]


@dataclass
class Batch:
    """One batch file, read in pieces."""

    file: IO[bytes]
    name: str
    head: dict[str, Any] = field(default_factory=dict[str, Any])
    """What it says beside its features; whole once they are read."""
    _text: str = ""
    _ended: bool = False

    def features(self) -> Iterator[dict[str, Any]]:
        """Yield the features one by one. Raises BadFile when the text is no batch."""
        decoder = codecs.getincrementaldecoder("utf-8")("strict")
        start = None
        while (start := _LIST.search(self._text)) is None:
            if len(self._text) > 2**20 or not self._more(decoder):
                raise BadFile(f'{self.name} holds no list of "features"; is it a batch of sae_dashboard?')
        before, self._text = self._text[: start.start()], self._text[start.end() :]
        number = 0
        while True:
            self._text = self._text[cast("re.Match[str]", _GAP.match(self._text)).end() :]
            if self._text.startswith("]"):
                break
            yield self._next(decoder, number)
            number += 1
        while len(self._text) < MAX_FEATURE_CHARS and self._more(decoder):
            pass
        self.head = self._object(f'{before}"features": []{self._text[1:]}')

    def _next(self, decoder: codecs.IncrementalDecoder, number: int) -> dict[str, Any]:
        while True:
            try:
                row, end = json.JSONDecoder().raw_decode(self._text)
            except RecursionError:
                raise BadFile(f"{self.name}, feature {number} of the batch is nested too deeply.") from None
            except ValueError as error:
                if len(self._text) > MAX_FEATURE_CHARS or not self._more(decoder, max(len(self._text), 2**20)):
                    raise BadFile(f"{self.name}, feature {number} of the batch is no JSON: {error}.") from None
                continue
            if not isinstance(row, dict):
                raise BadFile(f"{self.name}, feature {number} of the batch is no object.")
            self._text = self._text[end:]
            return cast(dict[str, Any], row)

    def _more(self, decoder: codecs.IncrementalDecoder, size: int = 2**20) -> bool:
        if self._ended:
            return False
        try:
            block = self.file.read(size)
            self._ended = not block
            self._text += decoder.decode(block, final=not block)
        except (UnicodeDecodeError, OSError, EOFError) as error:
            raise BadFile(f"{self.name} cannot be read: {error}.") from error
        return not self._ended

    def _object(self, text: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            raise BadFile(f"{self.name} is cut off or no JSON behind its features.") from None
        return cast(dict[str, Any], found)


def _take(rows: Intake, row: dict[str, Any], name: str, settings: Settings) -> int:
    """Collect one feature; return how many tokens it says that were seen."""
    index = row.get("feature_index")
    if not isinstance(index, int) or not 0 <= index < settings.max_d_sae:
        raise BadFile(
            f"{name}: feature_index {str(index)[:40]!r} is no feature; SAE_ATLAS_MAX_D_SAE is {settings.max_d_sae:,}."
        )
    where = f"{name}, feature {index}"
    rows.add_feature(judged(FeatureRow, {**row, "index": index}, where), where)
    examples = row.get("activations")
    if not isinstance(examples, list):
        raise BadFile(f"{where} has no list of activations.")
    for number, example in enumerate(cast(list[Any], examples)):
        place = f"{where}, activation {number}"
        rows.add_example(index, judged(ActivationRow, example, place), place)
    seen = [row.get(key) for key in ("n_prompts_total", "n_tokens_in_prompt")]
    return seen[0] * seen[1] if all(isinstance(n, int) and 0 < n < 2**31 for n in seen) else 0  # type: ignore[operator]


def _place(head: dict[str, Any], tokens_seen: int) -> Place:
    layer = head.get("layer")
    suffix = head.get("sae_id_suffix")
    parts = [str(part) for part in (head.get("sae_set"), suffix) if part]
    return Place(
        model_id=str(head.get("model_id") or "")[:200],
        layer=layer if isinstance(layer, int) and 0 <= layer < 10_000 else 0,
        set_name=_NAME.sub("-", "__".join(parts).lower()).strip("-_")[:64] or "dashboard",
        tokens_seen=tokens_seen,
        origin={"imported_from": "batches of sae_dashboard"},
    )


def _feature(found: Exported, index: int, evidence: Any, effects: tuple[Effect, ...]) -> dict[str, Any]:
    row = found.feature_row(evidence, index)
    del row["index"]
    activations: list[dict[str, Any]] = []
    for example, (low, high, share) in examples_of(evidence):
        tokens = found.tokens(example)
        activations.append(
            {
                "bin_min": low,
                "bin_max": high,
                "bin_contains": share,
                "tokens": tokens,
                "values": dense(example, len(tokens), found.skipped),
                "qualifying_token_index": example.peak - found.skipped,
                "dataTitle": found.title(example),
                **found.effect_of(example, (low, high, share), effects),
            }
        )
    return {"feature_index": index, **row, "decoder_weights_dist": [], "activations": activations}


def _write(directory: Path, number: int, head: dict[str, Any], features: list[dict[str, Any]]) -> Path:
    text = json.dumps({**head, "features": features}, ensure_ascii=False)
    path = directory / f"batch-{number}.json"
    path.write_bytes(text.encode("utf-8", "replace"))
    return path
