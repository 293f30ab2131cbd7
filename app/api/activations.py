"""Which features fire on a text, and where: /api/activation/*, /api/search-all, /api/search-topk-by-token, /api/cossim.

Field names and shapes are Neuronpedia's. Answers are plain dictionaries through orjson: a thousand validated objects
would cost more than the model does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import orjson
from fastapi import APIRouter, Request
from pydantic import AliasChoices, BaseModel, Field
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import catalog, vectors
from app.api.inputs import FeatureKey, Index, ModelId, SourceId, find_feature, latent_of, texts_of
from app.catalog import FeatureRow, ModelEntry, SourceCard
from app.errors import BadInput
from app.gpu import Worker
from app.protocol import EncodeRequest, ModelCard, SaeActs, SaeQuery, TextActs
from app.settings import Settings
from app.tokens import Vocabulary
from app.web import visits
from app.web.access import VIEWER
from app.web.pages import Config, Db, Gpu, read

router = APIRouter(tags=["activations"])

MAX_RESULTS = 1000
MAX_SOURCES = 64


class NewActivation(BaseModel):
    feature: FeatureKey = Field(validation_alias=AliasChoices("feature", "neuron"))
    customText: str | list[str]
    ignoreBos: bool = False


class SourceActivations(BaseModel):
    modelId: ModelId
    source: SourceId
    customText: str | list[str]


class TopKByToken(BaseModel):
    modelId: ModelId
    source: SourceId
    text: str | list[str]
    numResults: Annotated[int, Field(ge=1, le=MAX_RESULTS)] = 10
    ignoreBos: bool = True
    densityThreshold: Annotated[float, Field(le=1, allow_inf_nan=False)] = -1
    """Features active on a larger fraction of tokens are left out; 0 or less leaves all in."""


class SearchAll(BaseModel):
    modelId: ModelId
    sourceSet: SourceId
    text: str | list[str]
    selectedLayers: Annotated[list[SourceId], Field(max_length=MAX_SOURCES)] = Field(default_factory=list[str])
    sortIndexes: Annotated[list[int], Field(max_length=10_000)] = Field(default_factory=list[int])
    ignoreBos: bool = True
    densityThreshold: Annotated[float, Field(le=1, allow_inf_nan=False)] = -1
    numResults: Annotated[int, Field(ge=1, le=MAX_RESULTS)] = 50


class Cossim(BaseModel):
    modelId: ModelId
    source: SourceId
    index: Index
    targetModelId: ModelId
    targetSourceId: SourceId
    numResults: Annotated[int, Field(ge=1, le=MAX_RESULTS)] = 10


@dataclass(frozen=True)
class _Model:
    """What turns a model's ids into an answer."""

    bos: int | None
    special: frozenset[int]
    words: Vocabulary

    def starts_with_bos(self, ids: Sequence[int]) -> bool:
        return self.bos is not None and bool(ids) and ids[0] == self.bos


@router.post("/activation/new", dependencies=[VIEWER])
async def new_activation(request: Request, body: NewActivation, session: Db, settings: Config, worker: Gpu) -> Response:
    """One feature on one text, or on each of many; tokens and values without the beginning-of-text token."""
    texts = texts_of(settings, body.customText)
    model, source = await read(session, _find, session, settings, body.feature.modelId, body.feature.source)
    latent = latent_of(source, body.feature.index)
    visits.note(request, [source.id], "use")
    query = SaeQuery(sae=catalog.sae_ref(settings, source), latents=[latent])
    answers = [
        _activation(source, latent, text, model) for text in await _encode(settings, worker, [source], texts, [query])
    ]
    return _json(answers[0] if isinstance(body.customText, str) else answers)


@router.post("/activation/source", dependencies=[VIEWER])
async def source_activations(
    request: Request, body: SourceActivations, session: Db, settings: Config, worker: Gpu
) -> Response:
    """Every active feature of a source on each text, sparse; the beginning-of-text token is counted but has none."""
    texts = texts_of(settings, body.customText)
    model, source = await read(session, _find, session, settings, body.modelId, body.source)
    visits.note(request, [source.id], "use")
    answers = await _encode(settings, worker, [source], texts, [_all_active(settings, source)])
    results = [
        {
            "tokens": model.words.strings(text.ids),
            "activeFeatures": {
                str(k): v for k, v in _sparse(text.saes[0], int(model.starts_with_bos(text.ids))).items()
            },
        }
        for text in answers
    ]
    return _json({"results": results})


@router.post("/search-topk-by-token", dependencies=[VIEWER])
@router.post("/search-topk-by-token/", include_in_schema=False, dependencies=[VIEWER])
async def topk_by_token(request: Request, body: TopKByToken, session: Db, settings: Config, worker: Gpu) -> Response:
    """The strongest features of each token. With ignoreBos, special tokens are left out; positions still count them."""
    texts = texts_of(settings, body.text)
    model, source = await read(session, _find, session, settings, body.modelId, body.source)
    visits.note(request, [source.id], "use")
    sparse = 0 < body.densityThreshold < 1
    wanted = SaeQuery(sae=catalog.sae_ref(settings, source), top_k=min(source.d_sae, body.numResults))
    if sparse:  # any number of the strongest may be dense
        wanted = _all_active(settings, source)
    answers = await _encode(settings, worker, [source], texts, [wanted])
    rows: dict[int, FeatureRow] | None = None
    if sparse:
        indices = {index for text in answers for top in text.saes[0].top_indices for index in top}
        rows = await read(session, catalog.rows, session, source, indices)
    results = [{"source": source.name, "results": _by_token(text, model, body, rows)} for text in answers]
    return _json(results[0] if isinstance(body.text, str) else {"results": results})


@router.post("/search-all", dependencies=[VIEWER])
@router.post("/search-all/", include_in_schema=False, dependencies=[VIEWER])
async def search_all(request: Request, body: SearchAll, session: Db, settings: Config, worker: Gpu) -> Response:
    """The strongest features of a whole text in some or all sources of a set, with their values on every token."""
    texts = texts_of(settings, body.text)
    model, sources = await read(session, _find_all, session, settings, body)
    visits.note(request, [source.id for source in sources], "use")
    queries = [_all_active(settings, source) for source in sources]
    answers = await _encode(settings, worker, sources, texts, queries)
    results = [await read(session, _found, session, text, sources, model, body) for text in answers]
    return _json(results[0] if isinstance(body.text, str) else {"results": results})


@router.post("/cossim", dependencies=[VIEWER])
def cossim(body: Cossim, session: Db, settings: Config) -> Response:
    """The features of another source (or the same) whose decoder rows point most nearly the same way."""
    source, latent = find_feature(session, FeatureKey(modelId=body.modelId, source=body.source, index=body.index))
    target = catalog.source_card(session, body.targetModelId, body.targetSourceId)
    if source.d_in != target.d_in:
        raise BadInput(f"Decoder rows of {source.d_in} and of {target.d_in} numbers cannot be compared.")
    row = vectors.decoder_row(settings, source.sae_hash, latent)
    cosines = vectors.cosines(row, vectors.decoder_rows(settings, target.sae_hash, list(range(target.d_sae))))
    best = np.argsort(-cosines, kind="stable")[: body.numResults].tolist()
    return _json(
        {
            "feature": _address(source, latent),
            "topkDecoderCossimFeatures": [
                {"feature": _address(target, index), "cosineSimilarity": float(cosines[index])} for index in best
            ],
        }
    )


def _find(session: Session, settings: Settings, model_id: str, name: str) -> tuple[_Model, SourceCard]:
    """In one query: a second feature of a text that the worker keeps takes less than ten milliseconds in all."""
    card, source, _ = catalog.source_page(session, model_id, name)
    return _model(settings, card), source


def _find_all(session: Session, settings: Settings, body: SearchAll) -> tuple[_Model, list[SourceCard]]:
    entry = catalog.model_entry(session, body.modelId)
    return _model(settings, entry.card), _sources_of(entry, body)


def _model(settings: Settings, card: ModelCard) -> _Model:
    return _Model(card.bos_token_id, frozenset(card.special_token_ids), catalog.vocabulary_of(settings, card.id))


async def _encode(
    settings: Settings, worker: Worker, sources: list[SourceCard], texts: list[str], queries: list[SaeQuery]
) -> list[TextActs]:
    """Read texts with sources of one model, as they were trained to: all with a beginning-of-text token or none."""
    without = [source.name for source in sources if not source.prepend_bos]
    if without and len(without) < len(sources):
        raise BadInput(
            f"{', '.join(without)[:200]} read texts without the model's first token, the other "
            f"{len(sources) - len(without)} sources with it; select layers of one kind."
        )
    model = catalog.model_ref(settings, sources[0].model_id)
    request = EncodeRequest(model=model, texts=texts, queries=queries, prepend_bos=not without)
    return (await worker.encode(request)).texts


def _all_active(settings: Settings, source: SourceCard) -> SaeQuery:
    """A query for every active latent: only positive activations are sent, and a TopK SAE has no more than k."""
    k = source.config.get("k")
    most = min(int(k), source.d_sae) if source.architecture == "topk" and k else source.d_sae
    return SaeQuery(sae=catalog.sae_ref(settings, source), top_k=most)


def _activation(source: SourceCard, latent: int, text: TextActs, model: _Model) -> dict[str, Any]:
    start = int(model.starts_with_bos(text.ids))
    values = text.saes[0].latents[0][start:]
    peak = max(range(len(values)), key=values.__getitem__, default=0)
    return {
        "tokens": model.words.strings(text.ids[start:]),
        "values": values,
        "maxValue": max(values, default=0.0),
        "minValue": min(values, default=0.0),
        "maxValueTokenIndex": peak,
        "modelId": source.model_id,
        "layer": source.name,
        "index": str(latent),
        "dataIndex": None,
        "dataSource": "custom text",
        "createdAt": datetime.now(UTC).isoformat(),
    }


def _sparse(acts: SaeActs, first: int) -> dict[int, list[tuple[int, float]]]:
    """latent -> [(position, value)], positions before `first` left out."""
    active: dict[int, list[tuple[int, float]]] = {}
    for position, (indices, values) in enumerate(zip(acts.top_indices, acts.top_values, strict=True)):
        if position >= first:
            for index, value in zip(indices, values, strict=True):
                active.setdefault(index, []).append((position, value))
    return active


def _by_token(
    text: TextActs, model: _Model, body: TopKByToken, rows: dict[int, FeatureRow] | None
) -> list[dict[str, Any]]:
    strings = model.words.strings(text.ids)
    found: list[dict[str, Any]] = []
    for position, token in enumerate(text.ids):
        special = token in model.special
        if body.ignoreBos and special:
            continue
        acts = text.saes[0]
        top = zip(acts.top_indices[position], acts.top_values[position], strict=True)
        features = (
            [{"activationValue": value, "featureIndex": index} for index, value in top]
            if rows is None
            else _not_dense(top, rows, body)
        )
        found.append({"position": position, "token": strings[position], "isSpecial": special, "topFeatures": features})
    return found


def _not_dense(top: Any, rows: dict[int, FeatureRow], body: TopKByToken) -> list[dict[str, Any]]:
    kept = [
        {"activationValue": value, "featureIndex": index, "feature": _feature(body.modelId, body.source, rows[index])}
        for index, value in top
        if index in rows and rows[index].density <= body.densityThreshold
    ]
    return kept[: body.numResults]


def _sources_of(entry: ModelEntry, body: SearchAll) -> list[SourceCard]:
    in_set = [s for s in entry.sources if s.set_name == body.sourceSet]
    unknown = set(body.selectedLayers) - {s.name for s in in_set}
    if not in_set or unknown:
        names = ", ".join(s.name for s in in_set) or "none"
        asked = ", ".join(sorted(unknown)) or body.sourceSet
        raise BadInput(
            f"Set {body.sourceSet[:60]!r} of {body.modelId} has no {asked[:200]}; its sources: {names[:500]}."
        )
    if len(in_set) > MAX_SOURCES and not body.selectedLayers:
        raise BadInput(f"The set has {len(in_set)} sources; select up to {MAX_SOURCES} of them.")
    return [s for s in in_set if not body.selectedLayers or s.name in body.selectedLayers]


@dataclass(frozen=True)
class _Hit:
    source: SourceCard
    latent: int
    values: npt.NDArray[np.float64]
    """[pos], zero where a beginning-of-text token stands."""
    rank: float


def _found(
    session: Session, text: TextActs, sources: list[SourceCard], model: _Model, body: SearchAll
) -> dict[str, Any]:
    """The answer for one text."""
    n = len(text.ids)
    if any(not 0 <= place < n for place in body.sortIndexes):
        raise BadInput(f"sortIndexes must lie in 0 to {n - 1}: the text is {n} tokens with its first one.")
    hits = [
        hit for source, acts in zip(sources, text.saes, strict=True) for hit in _hits(source, acts, text, model, body)
    ]
    if 0 <= body.densityThreshold < 1:
        hits = _sparse_hits(session, hits, body.densityThreshold)
    hits = sorted(hits, key=lambda hit: -hit.rank)[: body.numResults]
    rows = {s.id: catalog.rows(session, s, {h.latent for h in hits if h.source is s}) for s in sources}
    return {
        "tokens": model.words.strings(text.ids),
        "result": [_result(hit, rows[hit.source.id].get(hit.latent)) for hit in hits],
        "sortIndexes": body.sortIndexes,
    }


def _hits(source: SourceCard, acts: SaeActs, text: TextActs, model: _Model, body: SearchAll) -> list[_Hit]:
    first = int(body.ignoreBos and model.starts_with_bos(text.ids))
    hits: list[_Hit] = []
    for latent, places in _sparse(acts, first).items():
        values = np.zeros(len(text.ids))
        for position, value in places:
            values[position] = value
        rank = float(values[body.sortIndexes].sum()) if body.sortIndexes else float(values.max())
        if rank > 0:
            hits.append(_Hit(source, latent, values, rank))
    return hits


def _sparse_hits(session: Session, hits: list[_Hit], threshold: float) -> list[_Hit]:
    kept: list[_Hit] = []
    for source in {hit.source.id: hit.source for hit in hits}.values():
        own = [hit for hit in hits if hit.source is source]
        rows = catalog.rows(session, source, {hit.latent for hit in own})
        kept += [hit for hit in own if hit.latent in rows and rows[hit.latent].density <= threshold]
    return kept


def _result(hit: _Hit, row: FeatureRow | None) -> dict[str, Any]:
    address = {"modelId": hit.source.model_id, "layer": hit.source.name, "index": str(hit.latent)}
    return address | {
        "maxValue": float(hit.values.max()),
        "maxValueIndex": int(hit.values.argmax()),
        "values": hit.values.tolist(),
        "neuron": _feature(hit.source.model_id, hit.source.name, row) if row else address,
    }


def _feature(model_id: str, source: str, row: FeatureRow) -> dict[str, Any]:
    """A feature in short, in the words of Neuronpedia's `neuron`."""
    return {
        "modelId": model_id,
        "layer": source,
        "index": str(row.index),
        "maxActApprox": row.max_act,
        "frac_nonzero": row.density,
        "explanations": [{"description": row.label}] if row.label else [],
    }


def _address(source: SourceCard, index: int) -> dict[str, Any]:
    return {"model": source.model_id, "source": source.name, "index": index}


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
