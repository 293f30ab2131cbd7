"""The job that encodes many texts: sparse activations as parquet, and the features that tell two groups apart.

Texts are cut into chunks, each a durable step that writes a part; the last steps join the parts and compare the groups.
Disk is bounded by cache_bytes. A beginning-of-text token is read but never counted.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata

from app import bulk, harvests, uploads
from app.bulk import Row, Separating
from app.errors import AtlasError, BadFile, BadInput, TooLarge
from app.specs import BulkSpec
from workers.language_model import LanguageModel
from workers.sae.coders import Coder
from workers.trainer import loaded
from workers.trainer.kinds import JobContext, JobKind

TEXTS_PER_STEP = 256
PADDED_TOKENS = 4096
PRE_ACTS_BYTES = 256 * 2**20
MIN_GROUP = 4
"""Texts of a group, at least: half of them are needed to measure a spread."""
_COLUMNS = {"row": np.int64, "position": np.int32, "token": np.int32, "latent": np.int32, "value": np.float32}
_MAXIMA = ("row", "latent", "value")

Table = dict[str, npt.NDArray[Any]]


class Bulk(JobKind):
    name = "bulk"

    def title(self, spec: dict[str, Any]) -> str:
        asked = BulkSpec(**spec)
        return f"Encode {Path(asked.path).name} with {asked.model}/{asked.source}"

    def plan(self, context: JobContext) -> list[str]:
        """Copy the texts into the job's directory: the file may change or go while the job waits."""
        spec = BulkSpec(**context.spec)
        try:
            return self._plan(context, spec)
        except AtlasError:
            uploads.forget(context.settings, spec.path)  # it would be refused again
            raise

    def _plan(self, context: JobContext, spec: BulkSpec) -> list[str]:
        rows = bulk.rows_of(Path(spec.path), spec.text_column, spec.label_column)
        groups: Counter[str] = Counter()
        written = 0
        for n in itertools.count():
            part = list(itertools.islice(rows, TEXTS_PER_STEP))
            if not part:
                break
            groups.update(row.label for row in part)
            content = json.dumps([[row.text, row.label] for row in part])
            written += len(content)
            _check_disk(context, written)
            _put(context.directory / f"texts-{n}.json", content.encode())
            context.check()
        if not groups:
            raise BadFile(f"{Path(spec.path).name} holds no row.")
        if spec.label_column:
            _check_groups(spec, groups)
        n_parts = -(-sum(groups.values()) // TEXTS_PER_STEP)
        steps = [f"encode {n + 1}/{n_parts}" for n in range(n_parts)]
        return [*steps, "join", *(["separate"] if spec.label_column else [])]

    def run(self, context: JobContext, step: str) -> None:
        spec = BulkSpec(**context.spec)
        verb, _, place = step.partition(" ")
        # The plan is recorded once a step runs: its copy of the texts is all that is read from now on.
        uploads.forget(context.settings, spec.path)
        if verb == "encode":
            number, total = (int(n) for n in place.split("/"))
            encode_part(context, spec, number - 1, total)
        elif verb == "join":
            _join(context, spec)
        else:
            _separate(context, spec)

    def finish(self, context: JobContext) -> dict[str, Any]:
        spec = BulkSpec(**context.spec)
        done = context.directory / loaded.RESULT
        if done.exists():
            return json.loads(done.read_text())
        notes = [json.loads(path.read_text()) for path in context.directory.glob("note-*.json")]
        result = {
            "url": f"/{spec.model}/bulk/{context.job_id}",
            "texts": sum(note["texts"] for note in notes),
            "tokens": sum(note["tokens"] for note in notes),
            "cut_texts": sum(note["cut"] for note in notes),
            "activations": sum(note["activations"] for note in notes),
        }
        if spec.label_column:
            groups = json.loads((context.directory / "separating.json").read_text())["groups"]
            result["groups"] = " and ".join(f"{name} ({n:,})" for name, n in groups)
        _put(done, json.dumps(result).encode())
        for path in context.directory.iterdir():
            if path.name not in (loaded.RESULT, *bulk.RESULT_FILES):
                path.unlink(missing_ok=True)
        return result


def _check_groups(spec: BulkSpec, groups: Counter[str]) -> None:
    named = ", ".join(f"{name!r} ({n:,})" for name, n in groups.most_common(6))
    if len(groups) != 2:
        raise BadInput(f"{spec.label_column!r} names {len(groups)} groups, two are compared: {named}.")
    if min(groups.values()) < MIN_GROUP:
        raise BadInput(f"A group has {min(groups.values())} texts; {MIN_GROUP} are the least: {named}.")


def _check_disk(context: JobContext, nbytes: int) -> None:
    most = context.settings.cache_bytes
    if nbytes > most:
        raise TooLarge(
            f"The job has written {nbytes:,} bytes; SAE_ATLAS_CACHE_BYTES allows {most:,}. Ask for maxima, or for "
            "fewer texts."
        )


def encode_part(context: JobContext, spec: BulkSpec, number: int, total: int) -> None:
    note = context.directory / f"note-{number}.json"
    if note.exists():
        return
    with context.sessions() as session:
        sae_hash = harvests.source_named(session, spec.model, spec.source).sae_hash
    model, coder = loaded.model(context, spec.model), loaded.coder(context, sae_hash)
    texts = [Row(*row) for row in json.loads((context.directory / f"texts-{number}.json").read_text())]
    bos = model.bos_for(coder.config)
    most = min(context.settings.max_text_tokens, model.card.n_ctx)
    full = [model.to_ids(row.text, bos is not None) for row in texts]
    rows = [ids[:most] for ids in full]
    parts: list[Table] = []
    for members in _batches(rows):
        parts += list(_activations(model, coder, rows, members, bos is not None, number * TEXTS_PER_STEP))
        context.report(len(parts) / len(rows), f"part {number + 1} of {total}: {len(parts)} of {len(rows)} texts")
    table = _ordered(parts)
    top = _maxima(table)
    if spec.label_column or spec.output == "maxima":
        _write_arrays(context.directory / f"maxima-{number}.npz", top)
    if spec.output == "activations":
        _write_arrays(context.directory / f"activations-{number}.npz", table)
    _check_disk(context, sum(path.stat().st_size for path in context.directory.iterdir()))
    counted = {
        "texts": len(rows),
        "tokens": sum(max(0, len(ids) - (bos is not None)) for ids in rows),
        "cut": sum(len(ids) > most for ids in full),
        "activations": len(table["value"]),
    }
    _put(note, json.dumps(counted).encode())


def _batches(rows: list[list[int]]) -> Iterator[list[int]]:
    """Numbers of texts of near lengths, within a bound of padded tokens; texts without a token are in none."""
    batch: list[int] = []
    for number in sorted((n for n, ids in enumerate(rows) if ids), key=lambda n: len(rows[n])):
        if batch and len(rows[number]) * (len(batch) + 1) > PADDED_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@torch.inference_mode()
def _activations(
    model: LanguageModel, coder: Coder, rows: list[list[int]], members: list[int], bos: bool, first_row: int
) -> Iterator[Table]:
    """Yield each text's non-zero activations."""
    ids, _ = model.pad([rows[n] for n in members])
    x = model.read(ids, [coder.hook_name])[coder.hook_name]
    chunk = max(1, PRE_ACTS_BYTES // (4 * coder.d_sae))
    for place, number in enumerate(members):
        own, tokens = x[place, : len(rows[number])], np.array(rows[number])
        found: list[Table] = []
        for start in range(int(bos), len(own), chunk):
            active = coder.encode_sparse(own[start : start + chunk])
            kept = active.values > 0
            positions = active.rows[kept].cpu().numpy() + start
            found.append(
                {
                    "row": np.full(len(positions), first_row + number),
                    "position": positions,
                    "token": tokens[positions],
                    "latent": active.latents[kept].cpu().numpy(),
                    "value": active.values[kept].float().cpu().numpy(),
                }
            )
        yield _joined(found)


def _joined(parts: list[Table]) -> Table:
    none = np.zeros(0)
    return {
        name: np.concatenate([part[name] for part in parts] or [none]).astype(dtype) for name, dtype in _COLUMNS.items()
    }


def _ordered(parts: list[Table]) -> Table:
    table = _joined(parts)
    order = np.lexsort((-table["value"], table["position"], table["row"]))
    return {name: column[order] for name, column in table.items()}


def _maxima(table: Table) -> Table:
    """The largest value of every (row, latent)."""
    order = np.lexsort((-table["value"], table["latent"], table["row"]))
    row, latent = table["row"][order], table["latent"][order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (row[1:] != row[:-1]) | (latent[1:] != latent[:-1])
    return {"row": row[first], "latent": latent[first], "value": table["value"][order][first]}


def _join(context: JobContext, spec: BulkSpec) -> None:
    """Write the parts as one parquet file, a row group each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = _MAXIMA if spec.output == "maxima" else tuple(_COLUMNS)
    schema = pa.schema([(name, pa.from_numpy_dtype(_COLUMNS[name])) for name in names])
    target = context.directory / f"{spec.output}.parquet"
    scratch = target.with_suffix(".new")
    paths = _parts(context, spec.output)
    with pq.ParquetWriter(scratch, schema, compression="zstd") as writer:
        for n, path in enumerate(paths):
            with np.load(path) as part:
                writer.write_table(pa.table({name: part[name] for name in names}, schema=schema))
            context.report(n / len(paths), f"writes {target.name}")
    os.replace(scratch, target)


def _parts(context: JobContext, kind: str) -> list[Path]:
    found = context.directory.glob(f"{kind}-*.npz")
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))


def _separate(context: JobContext, spec: BulkSpec) -> None:
    """Rank features by effect size on a training share of the texts, and score the best on the others."""
    with context.sessions() as session:
        sae_hash = harvests.source_named(session, spec.model, spec.source).sae_hash
    labels: list[str] = []
    for n in range(len(list(context.directory.glob("texts-*.json")))):
        labels += [label for _, label in json.loads((context.directory / f"texts-{n}.json").read_text())]
    names = sorted(set(labels))
    second = np.array([label == names[1] for label in labels])
    held_out = split(second, spec.held_out, spec.seed)
    paths, d_sae = _parts(context, "maxima"), loaded.coder(context, sae_hash).d_sae
    features = separating(lambda: map(_read_arrays, paths), second, held_out, d_sae, spec.n_features)
    content = {
        "groups": [[name, labels.count(name)] for name in names],
        "n_train": int((~held_out).sum()),
        "n_held_out": int(held_out.sum()),
        "features": [feature.__dict__ for feature in features],
    }
    _put(context.directory / "separating.json", json.dumps(content).encode())


def split(second: npt.NDArray[np.bool_], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return which texts are held out: the share of each group, at least one and leaving at least two."""
    held_out = np.zeros(len(second), dtype=bool)
    random = np.random.default_rng(seed)
    for group in (False, True):
        members = random.permutation(np.flatnonzero(second == group))
        n = min(max(1, round(share * len(members))), len(members) - 2)
        held_out[members[:n]] = True
    return held_out


def separating(
    parts: Callable[[], Iterable[Table]],
    second: npt.NDArray[np.bool_],
    held_out: npt.NDArray[np.bool_],
    d_sae: int,
    n_features: int,
) -> list[Separating]:
    """Return features by the size of Cohen's d between the groups' maxima, with the AUC on the texts held out.

    `parts` is called twice and yields tables of maxima one after another, so that they need not fit into memory.
    """
    d = effect_sizes(parts(), second, ~held_out, d_sae)
    best = [latent for latent in np.argsort(-np.abs(d), kind="stable")[:n_features].tolist() if d[latent] != 0]
    values = np.zeros((len(best), len(second)))
    place = np.full(d_sae, -1)
    place[best] = np.arange(len(best))
    for part in parts():
        kept = place[part["latent"]] >= 0
        values[place[part["latent"][kept]], part["row"][kept]] = part["value"][kept]
    found: list[Separating] = []
    for latent, row in zip(best, values, strict=True):
        groups = row[~second], row[second]
        found.append(
            Separating(
                latent,
                float(d[latent]),
                auc(row[held_out & ~second], row[held_out & second]),
                (float(groups[0].mean()), float(groups[1].mean())),
                (float((groups[0] > 0).mean()), float((groups[1] > 0).mean())),
            )
        )
    return found


def effect_sizes(
    parts: Iterable[Table], second: npt.NDArray[np.bool_], chosen: npt.NDArray[np.bool_], d_sae: int
) -> npt.NDArray[np.float64]:
    """Return Cohen's d of every latent over the chosen texts: difference of means over the pooled deviation.

    0 where a latent is active on none of them; texts without an entry have the value 0.
    """
    sizes = np.array([int((chosen & ~second).sum()), int((chosen & second).sum())])[:, None]
    sums, squares = np.zeros((2, d_sae)), np.zeros((2, d_sae))
    for part in parts:
        for group in (0, 1):
            kept = (chosen & (second == bool(group)))[part["row"]]
            latents, values = part["latent"][kept], part["value"][kept].astype(np.float64)
            sums[group] += np.bincount(latents, values, d_sae)
            squares[group] += np.bincount(latents, values**2, d_sae)
    means = sums / sizes
    pooled = np.sqrt(np.maximum((squares - sizes * means**2).sum(axis=0), 0) / (sizes.sum() - 2))
    difference = means[1] - means[0]
    # A feature that is constant within both groups has no deviation to compare with; a tiny one keeps it finite.
    floor = 1e-6 * np.abs(means).max(axis=0)
    return np.divide(difference, np.maximum(pooled, floor), out=np.zeros(d_sae), where=difference != 0)


def auc(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """Return the chance that a text of the second group has the larger value, ties counting half."""
    ranks = rankdata(np.concatenate([first, second]))[len(first) :]
    return float((ranks.sum() - len(second) * (len(second) + 1) / 2) / (len(first) * len(second)))


def _read_arrays(path: Path) -> Table:
    with np.load(path) as part:
        return dict(part)


def _write_arrays(path: Path, arrays: Table) -> None:
    scratch = path.with_suffix(".new")
    with scratch.open("wb") as out:
        np.savez(out, **arrays)
    os.replace(scratch, path)


def _put(path: Path, content: bytes) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_bytes(content)
    os.replace(scratch, path)
