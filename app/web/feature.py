"""A feature's page, the whole context of one of its examples, and its activation on somebody's own text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Form, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, RedirectResponse, Response

from app import catalog, evidence, present
from app.api.inputs import check_text
from app.catalog import ExplanationRow, FeatureRecord, FeatureRow, HarvestCard, SourceCard
from app.corpora import Stream, tokens_dir
from app.errors import AtlasError
from app.evidence import FeatureEvidence
from app.gpu import Worker
from app.present import FeatureView, ShadedToken, Width
from app.protocol import EncodeRequest, Loading, SaeQuery
from app.settings import Settings
from app.vectors import decoder_row
from app.web.pages import Config, Db, Gpu, partial, query, render
from app.web.problems import Problem, of

router = APIRouter()

MAX_TEXT_IN_ADDRESS = 2000
_ADDRESS = re.compile(r"https?://[^/\s]+/([\w.-]{1,200})/([\w.-]{1,200})/([0-9]{1,9})(?:[?#].*)?", re.ASCII)


@dataclass(frozen=True)
class Try:
    """The box for one's own text: what was asked, and the answer or what went wrong."""

    path: str
    text: str = ""
    tokens: tuple[ShadedToken, ...] = ()
    max: float = 0.0
    full: float = 0.0
    """The activation of the darkest shade: the feature's highest in the corpus, or this text's if that is higher."""
    problem: Problem | None = None
    pending: bool = False
    """The text stands in the address; the page asks for the answer once it is shown."""
    loading: tuple[Loading, ...] = ()
    """What the worker loads before it can answer; the box asks again."""

    @property
    def answered(self) -> bool:
        return bool(self.tokens) or self.problem is not None

    @property
    def best(self) -> ShadedToken | None:
        return max(self.tokens, key=lambda token: token.value, default=None)


@dataclass(frozen=True)
class Examples:
    """The examples' part of the page, at one width and one scale."""

    path: str
    view: FeatureView | None
    harvest: HarvestCard | None
    width: Width
    scale: Literal["feature", "example"]

    def link(self, **changes: str) -> str:
        usual = {"width": "16", "scale": "feature"}
        wanted = {"width": self.width, "scale": self.scale} | changes
        return self.path + query({k: v for k, v in wanted.items() if v != usual[k]})


@dataclass(frozen=True)
class FeaturePage:
    record: FeatureRecord
    explanations: tuple[ExplanationRow, ...]
    view: FeatureView | None
    """None when no harvest has looked at this feature."""
    examples: Examples
    attempt: Try
    last: int

    @property
    def source(self) -> SourceCard:
        return self.record.source

    @property
    def feature(self) -> FeatureRow:
        return self.record.feature

    @property
    def label(self) -> str:
        return self.record.feature.label

    def sibling(self, step: int) -> str | None:
        index = self.record.feature.index + step
        return f"{self.source.path}/{index}" if 0 <= index <= self.last else None


@dataclass(frozen=True)
class ContextPage:
    path: str
    index: int
    window: present.Window
    title: str


@router.get("/{model}/{source}/jump")
def jump(model: str, source: str, session: Db, to: Annotated[str, Query(max_length=500)] = "") -> Response:
    """Go to an index of this source, or to a feature's address pasted from here or from Neuronpedia."""
    pasted = _ADDRESS.fullmatch(to.strip())
    if pasted:
        return RedirectResponse(f"/{pasted[1]}/{pasted[2]}/{pasted[3]}", 302)
    found = catalog.source_card(session, model, source)
    return RedirectResponse(f"{found.path}/{catalog.parse_index(to.strip())}", 302)


@router.get("/{model}/{source}/{index}/vector.json")
def vector(model: str, source: str, index: str, session: Db, settings: Config) -> Response:
    """The feature's row of W_dec, for notebooks."""
    record = catalog.feature_record(session, model, source, catalog.parse_index(index))
    row = decoder_row(settings, record.source.sae_hash, record.feature.index)
    body = {
        "modelId": record.card.id,
        "source": record.source.name,
        "index": record.feature.index,
        "hookName": record.source.hook_name,
        "label": record.feature.label,
        "values": row.tolist(),
    }
    name = f"{record.card.id}-{record.source.name}-{record.feature.index}.json"
    return JSONResponse(body, headers={"content-disposition": f'attachment; filename="{name}"'})


@router.get("/{model}/{source}/{index}")
def feature_page(
    request: Request,
    model: str,
    source: str,
    index: str,
    session: Db,
    settings: Config,
    text: Annotated[str, Query(max_length=50_000)] = "",
    width: Width = "16",
    scale: Literal["feature", "example"] = "feature",
) -> Response:
    number = catalog.parse_index(index)
    if source.isascii() and source.isdigit() and len(source) < 6:
        found = catalog.default_source(session, model, int(source))
        return RedirectResponse(f"{found.path}/{number}{query(dict(request.query_params))}", 302)
    page = load(session, settings, model, source, number, text, width, scale)
    if partial(request):
        return render(request, "_examples.html", page.examples)
    return render(request, "feature.html", page)


@router.get("/{model}/{source}/{index}/context/{context}")
def context_page(
    request: Request, model: str, source: str, index: str, context: str, session: Db, settings: Config
) -> Response:
    record = catalog.feature_record(session, model, source, catalog.parse_index(index))
    unpacked = _evidence(record)
    wanted = catalog.parse_index(context)
    examples = [*unpacked.top, *(e for i in unpacked.intervals for e in i.examples)] if unpacked else []
    example = next((e for e in examples if e.context == wanted), None)
    reader = _reader(settings, record)
    if example is None or reader is None or unpacked is None or record.harvest is None:
        raise catalog.NotInCatalog(f"Context {wanted} is no example of this feature.", [(record.path, "The feature")])
    harvest = record.harvest
    window = present.window_of(
        example,
        reader.context(wanted, harvest.context_size, harvest.bos_token_id),
        catalog.vocabulary_of(settings, model),
        present.WIDTHS["all"],
        unpacked.max_act,
        harvest.bos_token_id,
        frozenset(record.card.special_token_ids),
        reader.title(wanted, example.peak, harvest.context_size, harvest.bos_token_id),
    )
    page = ContextPage(record.path, record.feature.index, window, window.title)
    return render(request, "_context.html" if partial(request) else "context.html", page)


@router.get("/{model}/{source}/{index}/try")
async def try_from_address(
    request: Request,
    model: str,
    source: str,
    index: str,
    session: Db,
    settings: Config,
    worker: Gpu,
    text: Annotated[str, Query(max_length=50_000)] = "",
) -> Response:
    return await _try(request, model, source, index, session, settings, worker, text)


@router.post("/{model}/{source}/{index}/try")
async def try_text(
    request: Request,
    model: str,
    source: str,
    index: str,
    session: Db,
    settings: Config,
    worker: Gpu,
    text: Annotated[str, Form()] = "",
) -> Response:
    return await _try(request, model, source, index, session, settings, worker, text)


async def _try(
    request: Request,
    model: str,
    source: str,
    index: str,
    session: Session,
    settings: Settings,
    worker: Worker,
    text: str,
) -> Response:
    number = catalog.parse_index(index)
    record = await run_in_threadpool(catalog.feature_record, session, model, source, number)
    text = text.replace("\r\n", "\n")
    attempt = await attempt_text(settings, worker, record, text)
    headers = {}
    if partial(request):
        if text and len(text) <= MAX_TEXT_IN_ADDRESS and attempt.problem is None:
            headers["hx-replace-url"] = record.path + query({"text": text})
        return render(request, "_try.html", attempt, headers=headers)
    page = await run_in_threadpool(load, session, settings, model, source, number, "", "16", "feature", attempt)
    return render(request, "feature.html", page, status=attempt.problem.status if attempt.problem else 200)


async def attempt_text(settings: Settings, worker: Worker, record: FeatureRecord, text: str) -> Try:
    """Return a feature's activation on every token of a text; a failure becomes part of the answer."""
    if not text.strip():
        return Try(record.path, text)
    try:
        check_text(settings, text)
        request = EncodeRequest(
            model=catalog.model_ref(settings, record.card.id),
            texts=[text],
            queries=[SaeQuery(sae=catalog.sae_ref(settings, record.source), top_k=0, latents=[record.feature.index])],
            prepend_bos=record.source.prepend_bos,
        )
        waiting = await worker.loading(request.model, [request.queries[0].sae])
        if waiting:
            return Try(record.path, text, loading=tuple(waiting))
        reply = (await worker.encode(request)).texts[0]
    except AtlasError as error:
        return Try(record.path, text, problem=of(error))
    values = reply.saes[0].latents[0]
    highest = max(values, default=0.0)
    full = max(record.feature.max_act, highest)
    words = catalog.vocabulary_of(settings, record.card.id)
    tokens = present.shaded(reply.ids, values, words, frozenset(record.card.special_token_ids), full)
    return Try(record.path, text, tokens, highest, full)


def load(
    session: Session,
    settings: Settings,
    model: str,
    source: str,
    index: int,
    text: str,
    width: Width,
    scale: Literal["feature", "example"],
    attempt: Try | None = None,
) -> FeaturePage:
    """Return everything the page shows, in two queries."""
    record = catalog.feature_record(session, model, source, index)
    unpacked = _evidence(record)
    others = [*unpacked.neighbours.tolist(), *unpacked.correlated.tolist()] if unpacked else []
    explanations, rows = catalog.related(session, record.source, index, others)
    view = _view(settings, record, unpacked, rows, width, scale == "example") if unpacked else None
    return FeaturePage(
        record=record,
        explanations=explanations,
        view=view,
        examples=Examples(record.path, view, record.harvest, width, scale),
        attempt=attempt or Try(record.path, text, pending=bool(text.strip())),
        last=record.source.d_sae - 1,
    )


def _evidence(record: FeatureRecord) -> FeatureEvidence | None:
    return evidence.unpack(record.blob) if record.blob is not None else None


def _view(
    settings: Settings,
    record: FeatureRecord,
    unpacked: FeatureEvidence,
    rows: dict[int, FeatureRow],
    width: Width,
    per_example: bool,
) -> FeatureView:
    harvest, reader = record.harvest, _reader(settings, record)
    size, bos = (harvest.context_size, harvest.bos_token_id) if harvest else (0, None)
    return present.feature_view(
        unpacked,
        catalog.vocabulary_of(settings, record.card.id),
        rows,
        (lambda row: reader.context(row, size, bos)) if reader else None,
        (lambda row, position: reader.title(row, position, size, bos)) if reader else None,
        bos=bos,
        special=frozenset(record.card.special_token_ids),
        width=width,
        per_example=per_example,
    )


def _reader(settings: Settings, record: FeatureRecord) -> Stream | None:
    """Return the corpus's tokens, or None when only its evidence is on this machine."""
    if record.harvest is None:
        return None
    directory: Path = tokens_dir(settings, record.harvest.corpus_hash, record.harvest.tokenizer_hash)
    return Stream.open(directory) if (directory / "stream.bin").is_file() else None
