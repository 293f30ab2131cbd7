"""A pasted prompt: a token by its strongest feature, a token's features, a feature's tokens; the address says all."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from fastapi import APIRouter, Form, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from app import catalog, present
from app.api.inputs import check_text
from app.catalog import FeatureRow, SourceCard
from app.errors import AtlasError
from app.gpu import Worker
from app.protocol import EncodeRequest, Loading, ModelCard, SaeActs, SaeQuery, TextActs
from app.settings import Settings
from app.web.pages import Config, Db, Gpu, partial, query, render
from app.web.problems import Problem, of

router = APIRouter()

TOP_K = 16
N_RANKED = 40
MAX_ADDRESS = 3000
EXAMPLE = "The harbour was quiet that morning. She counted 12 boats, opened her notebook and wrote: import numpy as np"

_AT = re.compile(r"([0-9]{1,6})?(?:\.([0-9]{1,9}))?", re.ASCII)


@dataclass(frozen=True)
class Strength:
    """A feature's activation on a token."""

    feature: FeatureRow
    value: float
    level: int


@dataclass(frozen=True)
class PromptToken:
    position: int
    text: str
    special: bool
    level: int
    tip: str
    chosen: bool


@dataclass(frozen=True)
class Ranked:
    """A feature of the prompt: where it is strongest and on how many tokens it is among the strongest."""

    feature: FeatureRow
    value: float
    level: int
    token: str
    n_tokens: int


@dataclass(frozen=True)
class Reading:
    """A prompt with what was found in it."""

    tokens: tuple[PromptToken, ...]
    token: PromptToken | None
    """The chosen token, and the features active on it."""
    strengths: tuple[Strength, ...]
    feature: FeatureRow | None
    """The chosen feature, by which the tokens are shaded; without one they are shaded by their strongest."""
    ranked: tuple[Ranked, ...]
    max: float


@dataclass(frozen=True)
class PromptPage:
    card: ModelCard
    source: SourceCard
    text: str
    below: str
    at: str
    reading: Reading | None = None
    problem: Problem | None = None
    loading: tuple[Loading, ...] = ()
    """What the worker loads before it can answer; the page asks again."""
    example: str = EXAMPLE

    @property
    def path(self) -> str:
        return f"{self.source.path}/prompt"

    @property
    def address(self) -> str:
        return self.path + query({"text": self.text, "below": self.below, "at": self.at})

    def to(self, token: int | None, feature: int | None) -> str:
        """Return the value of `at` that chooses a token and a feature."""
        return f"{'' if token is None else token}{'' if feature is None else f'.{feature}'}"


@router.get("/{model}/{source}/prompt")
async def prompt_from_address(
    request: Request,
    model: str,
    source: str,
    session: Db,
    settings: Config,
    worker: Gpu,
    text: Annotated[str, Query(max_length=50_000)] = "",
    at: Annotated[str, Query(max_length=20)] = "",
    below: Annotated[str, Query(max_length=10)] = "",
) -> Response:
    return await _prompt(request, model, source, session, settings, worker, text, at, below)


@router.post("/{model}/{source}/prompt")
async def prompt(
    request: Request,
    model: str,
    source: str,
    session: Db,
    settings: Config,
    worker: Gpu,
    text: Annotated[str, Form()] = "",
    at: Annotated[str, Form(max_length=20)] = "",
    below: Annotated[str, Form(max_length=10)] = "",
) -> Response:
    return await _prompt(request, model, source, session, settings, worker, text, at, below)


async def _prompt(
    request: Request,
    model: str,
    source: str,
    session: Session,
    settings: Settings,
    worker: Worker,
    text: str,
    at: str,
    below: str,
) -> Response:
    card, found, _ = await run_in_threadpool(catalog.source_page, session, model, source)
    below = below if below in ("0.1", "0.01") else ""
    page = PromptPage(card, found, text.replace("\r\n", "\n"), below, at)
    if text.strip():
        page = await _read(page, session, settings, worker)
    status = page.problem.status if page.problem else 200
    if not partial(request):
        return render(request, "prompt.html", page, status=status)
    headers = {"hx-push-url": page.address} if len(page.address) <= MAX_ADDRESS and status == 200 else {}
    return render(request, "_reading.html", page, headers=headers)


async def _read(page: PromptPage, session: Session, settings: Settings, worker: Worker) -> PromptPage:
    """Return the page with its reading, or with what went wrong."""
    token, feature = _chosen(page.at, page.source)
    wanted = SaeQuery(
        sae=catalog.sae_ref(settings, page.source), top_k=TOP_K, latents=[] if feature is None else [feature]
    )
    try:
        check_text(settings, page.text)
        model = catalog.model_ref(settings, page.card.id)
        asked = EncodeRequest(model=model, texts=[page.text], queries=[wanted], prepend_bos=page.source.prepend_bos)
        waiting = await worker.loading(model, [wanted.sae])
        if waiting:
            return replace(page, loading=tuple(waiting))
        reply = await worker.encode(asked)
    except AtlasError as error:
        return _with(page, problem=of(error))
    acts = reply.texts[0].saes[0]
    seen = {index for row in acts.top_indices for index in row} | ({feature} if feature is not None else set())
    rows = await run_in_threadpool(catalog.rows, session, page.source, seen)
    rows |= {index: FeatureRow(index, "", 0.0, 0.0, "", "") for index in seen - rows.keys()}
    strings = catalog.vocabulary_of(settings, page.card.id).strings(reply.texts[0].ids)
    limit = float(page.below) if page.below else 1.0
    return _with(page, reading=reading(page.card, reply.texts[0], strings, rows, token, feature, limit))


def reading(
    card: ModelCard,
    text: TextActs,
    strings: list[str],
    rows: Mapping[int, FeatureRow],
    token: int | None,
    feature: int | None,
    limit: float,
) -> Reading:
    """Return a prompt's tokens, shaded by one feature or by each token's strongest; `limit` leaves denser ones out."""
    acts = text.saes[0]
    hidden = [
        position == 0 and bool(text.ids) and text.ids[0] == card.bos_token_id for position in range(len(text.ids))
    ]
    per_token = [() if hidden[p] else _strongest(acts, p, rows, limit) for p in range(len(text.ids))]
    full = max((row[0][1] for row in per_token if row), default=0.0)
    chosen = rows.get(feature) if feature is not None else None
    if chosen is not None:
        values = [0.0 if hidden[p] else value for p, value in enumerate(acts.latents[0])]
        own = max(chosen.max_act, *values)
        shades = [(present.level(v, own), f"{present.amount(v)} · position {p}") for p, v in enumerate(values)]
    else:
        shades = [
            (present.level(row[0][1], full), f"{present.amount(row[0][1])} · {_name(row[0][0])}") if row else (0, "")
            for row in per_token
        ]
    tokens = tuple(
        PromptToken(p, string, hidden[p], shades[p][0], shades[p][1] if shades[p][0] else "", p == token)
        for p, string in enumerate(strings)
    )
    at = tokens[token] if token is not None and token < len(tokens) else None
    strengths = per_token[at.position] if at else ()
    return Reading(
        tokens=tokens,
        token=at,
        strengths=tuple(Strength(f, value, present.level(value, full)) for f, value in strengths),
        feature=chosen,
        ranked=_ranked(per_token, strings, full),
        max=full,
    )


_Active = tuple[FeatureRow, float]


def _strongest(acts: SaeActs, position: int, rows: Mapping[int, FeatureRow], limit: float) -> tuple[_Active, ...]:
    pairs = zip(acts.top_indices[position], acts.top_values[position], strict=True)
    return tuple((rows[index], value) for index, value in pairs if rows[index].density <= limit)


def _ranked(per_token: list[tuple[_Active, ...]], strings: list[str], full: float) -> tuple[Ranked, ...]:
    best: dict[int, tuple[FeatureRow, float, int, int]] = {}
    for position, row in enumerate(per_token):
        for feature, value in row:
            _, highest, where, n = best.get(feature.index, (feature, 0.0, position, 0))
            best[feature.index] = (feature, max(value, highest), position if value > highest else where, n + 1)
    ordered = sorted(best.values(), key=lambda found: -found[1])[:N_RANKED]
    return tuple(Ranked(f, value, present.level(value, full), strings[where], n) for f, value, where, n in ordered)


def _name(feature: FeatureRow) -> str:
    return f"{feature.index} {feature.label}" if feature.label else str(feature.index)


def _chosen(at: str, source: SourceCard) -> tuple[int | None, int | None]:
    found = _AT.fullmatch(at)
    if found is None:
        return None, None
    token = int(found[1]) if found[1] else None
    feature = int(found[2]) if found[2] else None
    return token, feature if feature is not None and feature < source.d_sae else None


def _with(page: PromptPage, reading: Reading | None = None, problem: Problem | None = None) -> PromptPage:
    return PromptPage(page.card, page.source, page.text, page.below, page.at, reading, problem)
