"""Features over JSON, in Neuronpedia's shape: one, several, their examples; and the lists of models."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from pydantic import AliasChoices, BaseModel, Field
from starlette.responses import Response

from app import catalog, comments, evidence, surroundings, vectors
from app.api.inputs import FeatureKey, ModelId, SourceId
from app.catalog import ExplanationRow, FeatureRecord, FeatureRow, SourceCard
from app.comments import Said
from app.corpora import Stream, tokens_dir
from app.errors import BadFile
from app.evidence import Example, FeatureEvidence
from app.people import Actor
from app.settings import Settings
from app.tokens import Vocabulary
from app.web.access import GUEST, VIEWER, Who, actor_of
from app.web.pages import Config, Db

router = APIRouter(tags=["features"])

MAX_FEATURES = 200
_OFFSET_PAGE = 25


class WantedFeature(FeatureKey):
    maxActsToReturn: int | None = Field(None, ge=0, le=1000)


class Offset(BaseModel):
    modelId: ModelId
    layer: SourceId = Field(validation_alias=AliasChoices("layer", "source"))
    offset: int = Field(0, ge=0, lt=2**31)


class Json(Response):
    """A JSON response written by orjson, with NaN as null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


@router.get("/feature/{model}/{source}/{index}", dependencies=[GUEST])
def get_feature(request: Request, model: str, source: str, index: str, session: Db, settings: Config) -> Response:
    """One feature with its vector, evidence and explanations. 404 when it does not exist."""
    return Json(feature(session, settings, actor_of(request), model, source, catalog.parse_index(index)))


@router.post("/features", dependencies=[VIEWER])
def get_features(
    wanted: Annotated[list[WantedFeature], Field(max_length=MAX_FEATURES)], who: Who, session: Db, settings: Config
) -> Response:
    """Several features, in the order asked for."""
    return Json(
        [
            feature(
                session, settings, who, key.modelId, key.source, catalog.parse_index(key.index), key.maxActsToReturn
            )
            for key in wanted
        ]
    )


@router.post("/features-offset", dependencies=[VIEWER])
def get_features_offset(wanted: Offset, who: Who, session: Db, settings: Config) -> Response:
    """The features from an offset on, 25 at a time."""
    source = catalog.source_card(session, wanted.modelId, wanted.layer)
    last = min(wanted.offset + _OFFSET_PAGE, source.d_sae)
    return Json(
        [feature(session, settings, who, wanted.modelId, wanted.layer, index) for index in range(wanted.offset, last)]
    )


@router.post("/activation/get", dependencies=[VIEWER])
def get_activations(wanted: WantedFeature, session: Db, settings: Config) -> Response:
    """A feature's stored examples, strongest first."""
    record = catalog.feature_record(session, wanted.modelId, wanted.source, catalog.parse_index(wanted.index))
    unpacked = evidence.unpack(record.blob) if record.blob is not None else None
    return Json(activations(settings, record, unpacked, wanted.maxActsToReturn))


@router.get("/models", dependencies=[VIEWER])
@router.post("/model/list", dependencies=[VIEWER])
def list_models(session: Db) -> Response:
    """The models of the catalog with the ids of their sources."""
    return Json(
        [{**_model(entry.card), "sources": [s.name for s in entry.sources]} for entry in catalog.entries(session)]
    )


@router.get("/model/{model}", dependencies=[VIEWER])
def get_model(model: str, session: Db) -> Response:
    """One model with its sources."""
    entry = catalog.model_entry(session, model)
    return Json({**_model(entry.card), "sources": [source_json(s) for s in entry.sources]})


def feature(
    session: Db,
    settings: Settings,
    who: Actor | None,
    model: str,
    source: str,
    index: int,
    max_activations: int | None = None,
) -> dict[str, Any]:
    """Return a feature as Neuronpedia writes it, in two queries, in three when people talked about it.

    A stranger who came by a public link is not told what the team says.
    """
    record = catalog.feature_record(session, model, source, index)
    unpacked = evidence.unpack(record.blob) if record.blob is not None else None
    others = [*unpacked.neighbours.tolist(), *unpacked.correlated.tolist()] if unpacked else []
    around = surroundings.related(session, record.source, index, others, who)
    people, rows = around.people, around.rows
    talked = people is not None and people.n_comments > 0
    talk = comments.about(session, who, comments.of_feature(model, source, index)) if talked else []
    return {
        "modelId": record.card.id,
        "layer": record.source.name,
        "index": str(index),
        "sourceSetName": record.source.set_name,
        "createdAt": record.harvest.created_at if record.harvest else record.source.created_at,
        "creatorId": "local",
        "creator": {"name": "local"},
        "maxActApprox": record.feature.max_act,
        "hookName": record.source.hook_name,
        **_vector(settings, record, unpacked),
        **_statistics(settings, record, unpacked),
        "model": _model(record.card),
        "source": source_json(record.source),
        "sourceSet": {
            "modelId": record.card.id,
            "name": record.source.set_name,
            "type": record.source.architecture,
            "creatorName": "local",
        },
        "lists": [{"id": list_id, "name": name} for list_id, name in (people.lists if people else ())],
        "comments": [comment_json(model, source, index, said) for said in talk],
        "explanations": [explanation_json(record.source, index, e) for e in around.explanations],
        "activations": activations(settings, record, unpacked, max_activations),
        "label": record.feature.label,
        "neighbours": [_other(rows.get(int(i)), int(i)) for i in unpacked.neighbours] if unpacked else [],
    }


def activations(
    settings: Settings, record: FeatureRecord, unpacked: FeatureEvidence | None, limit: int | None = None
) -> list[dict[str, Any]]:
    """Return all stored examples, highest first; none when the corpus's tokens are not on this machine."""
    harvest = record.harvest
    if unpacked is None or harvest is None:
        return []
    directory = tokens_dir(settings, harvest.corpus_hash, harvest.tokenizer_hash)
    if not (directory / "stream.bin").is_file():
        return []
    stream, words = Stream.open(directory), catalog.words_of(settings, record.card.id, harvest)
    top = [(example, (-1, -1, None)) for example in unpacked.top]
    banded = [
        (example, (band.low, band.high, band.count / max(unpacked.n_active, 1)))
        for band in unpacked.intervals
        for example in band.examples
    ]
    ordered = sorted(top + banded, key=lambda pair: -pair[0].max)[:limit]
    return [_activation(record, stream, words, number, *pair) for number, pair in enumerate(ordered)]


def explanation_json(source: SourceCard, index: int, row: ExplanationRow) -> dict[str, Any]:
    return {
        "id": str(row.id),
        "modelId": source.model_id,
        "source": source.name,
        "layer": source.name,
        "index": str(index),
        "description": row.text,
        "explanationModelName": row.author,
        "typeName": row.method,
        "authorName": row.author,
        "scores": [],
        "triggeredByUser": None,
    }


def comment_json(model: str, source: str, index: int | str, said: Said) -> dict[str, Any]:
    return {
        "id": str(said.id),
        "modelId": model,
        "layer": source,
        "index": str(index),
        "text": said.text,
        "userId": said.author,
        "user": {"name": said.author},
        "createdAt": said.created_at,
    }


def source_json(source: SourceCard) -> dict[str, Any]:
    return {
        "id": source.name,
        "modelId": source.model_id,
        "setName": source.set_name,
        "layer": source.layer,
        "hookName": source.hook_name,
        "architecture": source.architecture,
        "d_in": source.d_in,
        "d_sae": source.d_sae,
        "saeHash": source.sae_hash,
        "metrics": source.metrics,
        "visibility": "PRIVATE",
    }


def _activation(
    record: FeatureRecord,
    stream: Stream,
    words: Vocabulary,
    number: int,
    example: Example,
    band: tuple[float, float, float | None],
) -> dict[str, Any]:
    harvest = record.harvest
    assert harvest is not None
    size, bos = harvest.context_size, harvest.bos_token_id
    skipped = 0 if bos is None else 1
    ids = stream.context(example.context, size, bos)[skipped:]
    values = np.zeros(len(ids), dtype=np.float64)
    values[example.positions.astype(np.int64) - skipped] = example.values.astype(np.float64)
    return {
        "id": f"{harvest.id}-{record.feature.index}-{number}",
        "tokens": words.strings(ids),
        "values": [round(value, 4) for value in values.tolist()],
        "modelId": record.card.id,
        "layer": record.source.name,
        "source": record.source.name,
        "index": str(record.feature.index),
        "dataIndex": str(example.context),
        "dataSource": harvest.corpus,
        "dataTitle": stream.title(example.context, example.peak, size, bos),
        "maxValue": example.max,
        "maxValueTokenIndex": example.peak - skipped,
        "minValue": float(values.min()) if len(ids) else 0.0,
        "binMin": band[0],
        "binMax": band[1],
        "binContains": band[2],
        "qualifyingTokenIndex": example.peak - skipped,
        "dfaValues": None,
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": None,
        "logitContributions": None,
        "createdAt": harvest.created_at,
    }


def _vector(settings: Settings, record: FeatureRecord, unpacked: FeatureEvidence | None) -> dict[str, Any]:
    """The decoder row and what follows from it; without weights on this machine, nothing of it."""
    correlated = unpacked.correlated.astype(np.int64).tolist() if unpacked else []
    neurons = unpacked.neurons.astype(np.int64) if unpacked else np.zeros(0, dtype=np.int64)
    try:
        rows = vectors.decoder_rows(settings, record.source.sae_hash, [record.feature.index, *correlated])
    except BadFile:
        return {"hasVector": False, "vector": [], "neuron_alignment_l1": [], "correlated_features_l1": []}
    row = rows[0]
    length = float(np.abs(row).sum()) or 1.0
    return {
        "hasVector": True,
        "vector": row.tolist(),
        "vectorLabel": record.feature.label or None,
        "vectorDefaultSteerStrength": record.feature.max_act or None,
        "neuron_alignment_l1": (np.abs(row[neurons]) / length).tolist(),
        # sae_dashboard's third column of this table is the cosine of the two features, under the name l1.
        "correlated_features_l1": vectors.cosines(row, rows[1:]).tolist() if correlated else [],
    }


def _statistics(settings: Settings, record: FeatureRecord, unpacked: FeatureEvidence | None) -> dict[str, Any]:
    found = unpacked or _NOTHING
    words = catalog.words_of(settings, record.card.id, record.harvest)
    return {
        "frac_nonzero": record.feature.density,
        "n_active": found.n_active,
        "n_tokens": found.n_tokens,
        "topkCosSimIndices": found.neighbours.tolist(),
        "topkCosSimValues": found.cosines.tolist(),
        "neuron_alignment_indices": found.neurons.tolist(),
        "neuron_alignment_values": found.neuron_weights.tolist(),
        "correlated_neurons_indices": [],
        "correlated_neurons_pearson": [],
        "correlated_neurons_l1": [],
        "correlated_features_indices": found.correlated.tolist(),
        "correlated_features_pearson": found.pearson.tolist(),
        "neg_str": [words.string(int(token)) for token in found.bottom_logit_ids],
        "neg_values": found.bottom_logits.tolist(),
        "pos_str": [words.string(int(token)) for token in found.top_logit_ids],
        "pos_values": found.top_logits.tolist(),
        "freq_hist_data_bar_heights": found.histogram.tolist(),
        "freq_hist_data_bar_values": _centres(0.0, found.max_act, found.histogram.size),
        "logits_hist_data_bar_heights": found.logits_histogram.tolist(),
        "logits_hist_data_bar_values": _centres(found.logits_low, found.logits_high, found.logits_histogram.size),
        "decoder_weights_dist": [],
    }


def _centres(low: float, high: float, n: int) -> list[float]:
    return (low + (np.arange(n) + 0.5) * (high - low) / max(n, 1)).tolist()


def _model(card: catalog.ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "displayName": card.name,
        "displayNameShort": card.name,
        "layers": card.n_layers,
        "neuronsPerLayer": card.d_mlp,
        "dimension": card.d_model,
        "owner": card.origin,
        "hash": card.hash,
    }


def _other(row: FeatureRow | None, index: int) -> dict[str, Any]:
    return {"index": str(index), "label": row.label if row else "", "density": row.density if row else None}


_NO_INTS = np.zeros(0, dtype=np.uint32)
_NO_FLOATS = np.zeros(0, dtype=np.float32)
_NOTHING = FeatureEvidence(
    n_active=0,
    n_tokens=0,
    max_act=0.0,
    mean_act=0.0,
    histogram=_NO_INTS,
    top=(),
    intervals=(),
    top_logit_ids=_NO_INTS,
    top_logits=_NO_FLOATS,
    bottom_logit_ids=_NO_INTS,
    bottom_logits=_NO_FLOATS,
    logits_low=0.0,
    logits_high=0.0,
    logits_histogram=_NO_INTS,
    neighbours=_NO_INTS,
    cosines=_NO_FLOATS,
    correlated=_NO_INTS,
    pearson=_NO_FLOATS,
)
