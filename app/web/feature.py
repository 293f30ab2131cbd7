"""A feature's page, the whole context of one of its examples, and its activation on somebody's own text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

import numpy as np
from fastapi import APIRouter, Form, Query, Request
from pydantic import Field
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.responses import JSONResponse, RedirectResponse, Response

from app import catalog, evidence, present, surroundings
from app.api.inputs import check_text
from app.catalog import ExplanationRow, FeatureRecord, FeatureRow, HarvestCard, SourceCard
from app.corpora import Stream, tokens_dir
from app.errors import AtlasError
from app.evidence import FeatureEvidence
from app.gpu import Worker
from app.people import Actor
from app.present import FeatureView, ShadedToken, Width
from app.protocol import EncodeRequest, Loading, SaeQuery
from app.settings import Settings
from app.surroundings import Around
from app.vectors import decoder_row
from app.web import visits
from app.web.access import GUEST, VIEWER, actor_of
from app.web.embed import SWITCHES, Embedded, embedded
from app.web.pages import Config, Db, Gpu, ahead, base_of, of_query, partial, query, read, render
from app.web.problems import Problem, of

router = APIRouter()
first = APIRouter()
"""The pages of features by their usual addresses, before all other routes: two hundred patterns to try take a tenth of
the time that such a page takes."""

MAX_TEXT_IN_ADDRESS = 2000
MAX_CHOICES = 60
"""Sources offered by the page's selector."""
MAX_WEIGHT = 33_500
"""Bytes of examples on a page as it is first sent, which keeps it below 60 kB."""
KEPT = frozenset({"width", "scale", "breaks", "evidence", "bands", *SWITCHES})
"""What stays in the address when a text is tried."""

Scale = Literal["feature", "example"]
Breaks = Literal["shown", "real"]
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
    weightless: bool = False
    """Nothing can be computed: the evidence was imported without model or SAE."""
    evidence: int | None = None
    """Which harvest's highest activation the shades are of; None is the one shown by default."""

    @property
    def action(self) -> str:
        return f"{self.path}/try{query({'evidence': self.evidence})}"

    @property
    def answered(self) -> bool:
        return bool(self.tokens) or self.problem is not None

    @property
    def best(self) -> ShadedToken | None:
        return max(self.tokens, key=lambda token: token.value, default=None)


@dataclass(frozen=True)
class Choices:
    """How the page is to be shown. All of it stands in the address, and goes along to the next feature."""

    width: Width = "16"
    scale: Scale = "feature"
    breaks: Breaks = "shown"
    evidence: Annotated[int | None, Field(ge=0, lt=2**31)] = None
    """Which harvest's evidence; None is the one the source shows by default."""
    bands: Literal["", "all"] = ""
    """`all` shows every band of activation at once, however long the page gets."""

    def fields(self, **changes: Any) -> dict[str, Any]:
        """Return what differs from the usual, by the names in addresses."""
        usual, wanted = vars(_USUAL), vars(self) | changes
        return {k: v for k, v in wanted.items() if v != usual[k]}

    def query(self, **changes: Any) -> str:
        return query(self.fields(**changes))


_USUAL = Choices()


Chosen = Annotated[Choices, of_query(Choices)]


@dataclass(frozen=True)
class Examples:
    """The examples' part of the page, as chosen."""

    path: str
    view: FeatureView | None
    harvest: HarvestCard | None
    choices: Choices
    others: Mapping[str, str] = field(default_factory=dict[str, str])
    """What else stands in the address and stays there: the switches of an embedded page."""

    def link(self, **changes: Any) -> str:
        return self.path + query({**self.choices.fields(**changes), **self.others})

    @cached_property
    def first(self) -> tuple[int, int]:
        """How many of the highest examples and how many bands are on the page as it is first sent.

        The others follow when they are scrolled to: a dense feature shades so many tokens that all of them together
        would be several times as long as any other page.
        """
        if self.view is None:
            return 0, 0
        left = MAX_WEIGHT - present.weight((*self.view.hard_negatives, *self.view.silent))
        for i, example in enumerate(self.view.top):
            left -= present.weight([example])
            if left < 0:
                return max(i, 1), 0
        for i, group in enumerate(self.view.groups):
            left -= present.weight(group.shown)
            if left < 0:
                return len(self.view.top), i
        return len(self.view.top), len(self.view.groups)

    @property
    def kept(self) -> str:
        """The query of a whole context's address: which evidence it is from."""
        return query({"evidence": self.choices.evidence})

    @property
    def rest(self) -> Literal["none", "later", "now"]:
        """Whether there is more than that, and whether it is shown."""
        if self.view is None or self.first == (len(self.view.top), len(self.view.groups)):
            return "none"
        return "now" if self.choices.bands == "all" else "later"


@dataclass(frozen=True)
class FeaturePage:
    record: FeatureRecord
    around: Around
    view: FeatureView | None
    """None when no harvest has looked at this feature."""
    examples: Examples
    attempt: Try
    choices: Choices
    base: str = ""
    """Scheme and host that the page was asked under, for addresses that others follow."""

    @property
    def source(self) -> SourceCard:
        return self.record.source

    @property
    def feature(self) -> FeatureRow:
        return self.record.feature

    @property
    def explanations(self) -> tuple[ExplanationRow, ...]:
        return self.around.explanations

    @property
    def label(self) -> str:
        return self.record.feature.label

    @property
    def summary(self) -> str:
        """What a link to the page says of it: how often it is active, and its strongest example."""
        if self.view is None:
            return "No evidence yet."
        often = f"Active on {present.percent(self.view.density)} of tokens, up to {present.amount(self.view.max_act)}."
        best = " ".join(self.view.top[0].window.text.split()) if self.view.top else ""
        return f"{often} “{best[:240]}”" if best else often

    def sibling(self, step: int) -> str | None:
        index = self.record.feature.index + step
        return self.at(index) if 0 <= index < self.source.d_sae else None

    def at(self, index: int) -> str:
        """Return the address of another feature of this source, shown as this one is."""
        return f"{self.source.path}/{index}{self.choices.query(bands='')}"

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the model's sources to choose from: those nearest to this one, where there are very many."""
        names = self.around.sources
        here = names.index(self.source.name)
        start = max(0, min(here - MAX_CHOICES // 2, len(names) - MAX_CHOICES))
        return names[start : start + MAX_CHOICES]

    @property
    def config(self) -> tuple[tuple[str, str], ...]:
        """The SAE's cfg.json in short; its page has all of it."""
        plain = [(k, v) for k, v in self.source.config.items() if isinstance(v, str | int | float) and k != "metadata"]
        return tuple((name, str(value)) for name, value in plain if str(value))[:16]


@dataclass(frozen=True)
class ContextPage:
    path: str
    index: int
    window: present.Window
    title: str


@router.get("/{model}/{source}/jump", dependencies=[GUEST])
def jump(
    model: str,
    source: str,
    session: Db,
    chosen: Chosen,
    to: Annotated[str, Query(max_length=500)] = "",
    at: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """Go to an index of this source or of another one, or to an address pasted from here or from Neuronpedia.

    `at` is a source of this model; `/` and a name is another model. Without an index one gets to their page.
    """
    pasted = _ADDRESS.fullmatch(to.strip())
    if pasted:
        return RedirectResponse(f"/{pasted[1]}/{pasted[2]}/{pasted[3]}", 302)
    if at.startswith("/"):
        return RedirectResponse(catalog.model_entry(session, at[1:]).path, 302)
    moved = at not in ("", source)
    found = catalog.source_card(session, model, at or source)
    if moved and (not to.strip() or not catalog.parse_index(to.strip()) < found.d_sae):
        return RedirectResponse(found.path, 302)
    # Evidence is a source's own.
    kept = chosen.query(evidence=None) if moved else chosen.query()
    return RedirectResponse(f"{found.path}/{catalog.parse_index(to.strip())}{kept}", 302)


@router.get("/{model}/{source}/{index}/vector.json", dependencies=[GUEST])
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
    return JSONResponse(body, headers=_download(record, "json"))


@router.get("/{model}/{source}/{index}/vector.npy", dependencies=[GUEST])
def vector_as_array(model: str, source: str, index: str, session: Db, settings: Config) -> Response:
    """The feature's row of W_dec as numpy.load reads it: float32 [d_in]."""
    record = catalog.feature_record(session, model, source, catalog.parse_index(index))
    body = io.BytesIO()
    np.save(body, decoder_row(settings, record.source.sae_hash, record.feature.index))
    return Response(body.getvalue(), media_type="application/octet-stream", headers=_download(record, "npy"))


def _download(record: FeatureRecord, kind: str) -> dict[str, str]:
    name = f"{record.card.id}-{record.source.name}-{record.feature.index}.{kind}"
    return {"content-disposition": f'attachment; filename="{name}"'}


class _Model(StringConvertor):
    regex = rf"(?!(?:{'|'.join(map(re.escape, sorted(catalog.RESERVED)))})/)[^/]+"


class _Source(StringConvertor):
    regex = r"(?!(?:bulk|prompt|steer)/)[^/]+"


class _Index(StringConvertor):
    regex = r"[0-9]{1,9}"


for _convertor in (_Model, _Source, _Index):
    register_url_convertor(_convertor.__name__[1:].lower(), _convertor())


@first.get("/{model:model}/{source:source}/{index:index}", dependencies=[GUEST])
@router.get("/{model}/{source}/{index}", dependencies=[GUEST])
def feature_page(
    request: Request,
    model: str,
    source: str,
    index: str,
    session: Db,
    settings: Config,
    chosen: Chosen,
    switches: Embedded,
    text: Annotated[str, Query(max_length=50_000)] = "",
) -> Response:
    number = catalog.parse_index(index)
    if source.isascii() and source.isdigit() and len(source) < 6:
        found = catalog.default_source(session, model, int(source))
        return RedirectResponse(f"{found.path}/{number}{query(dict(request.query_params))}", 302)
    who = actor_of(request)
    if who is None:  # who looks by a public link may read, and compute nothing
        text, switches = "", replace(switches, embedtest=False, embedsteer=False, defaulttesttext="")
    asks = None if switches.embed or partial(request) else who
    page = load(session, settings, model, source, number, chosen, text or switches.defaulttesttext, who=asks)
    page = replace(page, base=base_of(request))
    visits.note(request, [page.source.id], "view")
    if switches.embed:
        page = replace(page, examples=replace(page.examples, others=switches.fields))
        if not partial(request):
            return embedded(request, page, switches)
    if partial(request):
        return render(request, "_examples.html", page.examples)
    return render(request, "feature.html", page, headers=ahead(request))


@router.get("/{model}/{source}/{index}/context/{context}", dependencies=[GUEST])
def context_page(
    request: Request, model: str, source: str, index: str, context: str, session: Db, settings: Config, chosen: Chosen
) -> Response:
    record = catalog.feature_record(session, model, source, catalog.parse_index(index), chosen.evidence)
    unpacked = _evidence(record)
    wanted = catalog.parse_index(context)
    reader = _reader(settings, record)
    window = _whole(settings, record, unpacked, reader, wanted) if unpacked and reader else None
    if window is None:
        raise catalog.NotInCatalog(f"Context {wanted} is no example of this feature.", [(record.path, "The feature")])
    page = ContextPage(record.path, record.feature.index, window, window.title)
    return render(request, "_context.html" if partial(request) else "context.html", page)


def _whole(
    settings: Settings, record: FeatureRecord, unpacked: FeatureEvidence, reader: Stream, wanted: int
) -> present.Window | None:
    """Return a context from end to end, or None when it is no example, active or not, of the feature."""
    assert record.harvest is not None
    size, bos = record.harvest.context_size, record.harvest.bos_token_id
    words, special = catalog.words_of(settings, record.card.id, record.harvest), record.special_token_ids
    whole = present.WIDTHS["all"]
    active = [*unpacked.top, *(e for i in unpacked.intervals for e in i.examples)]
    example = next((e for e in active if e.context == wanted), None)
    if example is not None:
        ids, title = reader.context(wanted, size, bos), reader.title(wanted, example.peak, size, bos)
        return present.window_of(example, ids, words, whole, unpacked.max_act, bos, special, title)
    silent = next((s for s in (*unpacked.silent, *unpacked.hard_negatives) if s.context == wanted), None)
    if silent is None:
        return None
    ids, title = reader.context(wanted, size, bos), reader.title(wanted, silent.position, size, bos)
    return present.silent_window(silent, ids, words, whole, bos, special, title)


@router.get("/{model}/{source}/{index}/try", dependencies=[VIEWER])
async def try_from_address(
    request: Request,
    model: str,
    source: str,
    index: str,
    session: Db,
    settings: Config,
    worker: Gpu,
    chosen: Chosen,
    text: Annotated[str, Query(max_length=50_000)] = "",
) -> Response:
    return await _try(request, model, source, index, session, settings, worker, chosen, text)


@router.post("/{model}/{source}/{index}/try", dependencies=[VIEWER])
async def try_text(
    request: Request,
    model: str,
    source: str,
    index: str,
    session: Db,
    settings: Config,
    worker: Gpu,
    chosen: Chosen,
    text: Annotated[str, Form()] = "",
) -> Response:
    return await _try(request, model, source, index, session, settings, worker, chosen, text)


async def _try(
    request: Request,
    model: str,
    source: str,
    index: str,
    session: Session,
    settings: Settings,
    worker: Worker,
    chosen: Choices,
    text: str,
) -> Response:
    number = catalog.parse_index(index)
    record = await read(session, catalog.feature_record, session, model, source, number, chosen.evidence)
    text = text.replace("\r\n", "\n")
    if text.strip():
        visits.note(request, [record.source.id], "use")
    attempt = replace(await attempt_text(settings, worker, record, text), evidence=chosen.evidence)
    headers = {}
    if partial(request):
        if text and len(text) <= MAX_TEXT_IN_ADDRESS and attempt.problem is None:
            headers["hx-replace-url"] = record.path + query({**_shown_with(request), "text": text})
        return render(request, "_try.html", attempt, headers=headers)
    page = await run_in_threadpool(load, session, settings, model, source, number, chosen, "", attempt)
    return render(request, "feature.html", page, status=attempt.problem.status if attempt.problem else 200)


def _shown_with(request: Request) -> dict[str, str]:
    """Return what stands in the address of the page that asks, but for the text."""
    asked = dict(parse_qsl(urlsplit(request.headers.get("hx-current-url", "")).query))
    return {k: v for k, v in asked.items() if k in KEPT}


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
    shown = evidence.unpack(record.blob).max_act if record.blob is not None else record.feature.max_act
    full = max(shown, highest)
    words = catalog.vocabulary_of(settings, record.card.id)
    tokens = present.shaded(reply.ids, values, words, frozenset(record.card.special_token_ids), full)
    return Try(record.path, text, tokens, highest, full)


def load(
    session: Session,
    settings: Settings,
    model: str,
    source: str,
    index: int,
    chosen: Choices,
    text: str = "",
    attempt: Try | None = None,
    who: Actor | None = None,
) -> FeaturePage:
    """Return what the page shows of the feature to somebody, in two queries."""
    record = catalog.feature_record(session, model, source, index, chosen.evidence)
    unpacked = _evidence(record)
    around = surroundings.around(session, record.source, index, _others(unpacked), who)
    view = _view(settings, record, unpacked, around.rows, chosen) if unpacked else None
    return FeaturePage(
        record=record,
        around=around,
        view=view,
        examples=Examples(record.path, view, record.harvest, chosen),
        attempt=attempt or replace(_untried(settings, record, text), evidence=chosen.evidence),
        choices=chosen,
    )


def _others(unpacked: FeatureEvidence | None) -> list[int]:
    """Return the features that a feature's evidence names."""
    if unpacked is None:
        return []
    named = [silent.neighbour for silent in unpacked.hard_negatives if silent.neighbour is not None]
    return [*unpacked.neighbours.tolist(), *unpacked.correlated.tolist(), *named]


def _untried(settings: Settings, record: FeatureRecord, text: str) -> Try:
    weightless = not (record.source.has_weights and catalog.has_model_weights(settings, record.card.id))
    return Try(record.path, text, pending=bool(text.strip()) and not weightless, weightless=weightless)


def _evidence(record: FeatureRecord) -> FeatureEvidence | None:
    return evidence.unpack(record.blob) if record.blob is not None else None


def _view(
    settings: Settings,
    record: FeatureRecord,
    unpacked: FeatureEvidence,
    rows: Mapping[int, FeatureRow],
    chosen: Choices,
) -> FeatureView:
    harvest, reader = record.harvest, _reader(settings, record)
    size, bos = (harvest.context_size, harvest.bos_token_id) if harvest else (0, None)
    return present.feature_view(
        unpacked,
        catalog.words_of(settings, record.card.id, record.harvest),
        rows,
        (lambda row: reader.context(row, size, bos)) if reader else None,
        (lambda row, position: reader.title(row, position, size, bos)) if reader else None,
        bos=bos,
        special=record.special_token_ids,
        width=chosen.width,
        per_example=chosen.scale == "example",
        effects=evidence.unpack_effects(record.effects) if record.effects is not None else (),
        counts_derived=record.harvest is not None and record.harvest.derived_counts,
    )


def _reader(settings: Settings, record: FeatureRecord) -> Stream | None:
    """Return the corpus's tokens, or None when only its evidence is on this machine."""
    if record.harvest is None:
        return None
    directory: Path = tokens_dir(settings, record.harvest.corpus_hash, record.harvest.tokenizer_hash)
    return Stream.open(directory) if (directory / "stream.bin").is_file() else None
