"""Harvests in the browser: the form that queues one with what it will take, the list, and one harvest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, QueryParams
from starlette.responses import RedirectResponse, Response

from app import catalog, corpora, harvestplan, harvests, visibility
from app.catalog import ModelEntry, SourceCard, parse_index
from app.errors import AtlasError, BadInput, NotFound
from app.harvestplan import BadField, Estimate
from app.harvests import Gathered
from app.settings import Settings
from app.specs import HarvestSpec
from app.web import forms
from app.web.access import EDITOR, VIEWER, Who
from app.web.forms import Field
from app.web.pages import Config, Db, query, render
from app.web.problems import Problem, of

router = APIRouter()

_FIELDS = tuple(name for name in HarvestSpec.model_fields if name not in ("model", "sources"))
_LABELS = {
    "n_tokens": "tokens",
    "context_size": "context size",
    "n_top": "top examples",
    "n_per_interval": "examples of an interval",
    "n_silent": "silent contexts",
    "n_hard": "near misses",
    "n_effects": "causal effects",
    "effect_reach": "followed over",
    "keep_activations": "keep the sparse activations",
    "draw_map": "draw the map too",
}


@dataclass(frozen=True)
class Costs:
    """What a harvest will take, or why it cannot be."""

    entry: ModelEntry
    estimate: Estimate | None = None
    problem: str = ""


@dataclass(frozen=True)
class HarvestForm:
    entry: ModelEntry
    sources: tuple[SourceCard, ...]
    """Those that have weights."""
    chosen: frozenset[str]
    fields: Mapping[str, Field]
    wrong_sources: str
    costs: Costs
    problem: Problem | None = None


@dataclass(frozen=True)
class HarvestsPage:
    rows: tuple[Gathered, ...]


@dataclass(frozen=True)
class HarvestPage:
    found: Gathered
    facts: tuple[tuple[str, str], ...]
    spec: tuple[tuple[str, str], ...]
    again: str
    """The form with these settings."""
    n_kept_bytes: int
    others: int
    problem: Problem | None = None


@router.get("/{model}/harvest", dependencies=[VIEWER])
def harvest_form(request: Request, model: str, session: Db, settings: Config) -> Response:
    entry = catalog.model_entry(session, model)
    return render(request, "harvest_form.html", _form(session, settings, entry, *_given(request.query_params)))


@router.get("/{model}/harvest/estimate", dependencies=[VIEWER])
def estimate(request: Request, model: str, session: Db, settings: Config) -> Response:
    """The estimate alone, while the form is filled in."""
    entry = catalog.model_entry(session, model)
    values, chosen = _given(request.query_params)
    page = _form(session, settings, entry, values, chosen)
    return render(request, "_estimate.html", page.costs)


@router.post("/{model}/harvest", dependencies=[EDITOR])
async def queue(request: Request, model: str, session: Db, settings: Config) -> Response:
    """Queue a harvest and lead to its job; what is wrong is said where it stands."""
    given = await request.form(max_files=0, max_fields=200)

    def act() -> Response:
        entry = catalog.model_entry(session, model)
        values, chosen = _given(given)
        spec, errors = _spec(session, entry, values, chosen)
        try:
            if spec is None:
                raise BadInput("Some fields cannot be used; each says why.")
            job = harvestplan.queue(session, settings, spec)
        except AtlasError as error:
            errors = {error.name: error.message} if isinstance(error, BadField) else errors
            session.rollback()
            page = _form(session, settings, entry, values, chosen, errors, of(error))
            return render(request, "harvest_form.html", page, status=error.status)
        session.commit()
        return RedirectResponse(f"/jobs/{job.id}", 303)

    return await run_in_threadpool(act)


@router.get("/harvests", dependencies=[VIEWER])
def harvests_page(request: Request, session: Db) -> Response:
    return render(request, "harvests.html", HarvestsPage(tuple(harvests.gathered(session))))


@router.get("/harvests/{number}", dependencies=[VIEWER])
def harvest_page(request: Request, number: str, session: Db, settings: Config) -> Response:
    return render(request, "harvest.html", _page(session, settings, parse_index(number)))


@router.post("/harvests/{number}/show", dependencies=[EDITOR])
def show(number: str, who: Who, session: Db, settings: Config) -> Response:
    """Make it what its SAE's pages show unless asked otherwise."""
    found = harvests.harvest_of(session, parse_index(number))
    visibility.check_may_change(who, found.source.owner, visibility.path(found.source)[1:])
    harvests.show(session, settings, found.source, found.harvest.id)
    session.commit()
    return RedirectResponse(f"/harvests/{found.harvest.id}", 303)


@router.post("/harvests/{number}/remove", dependencies=[EDITOR])
def remove(request: Request, number: str, who: Who, session: Db, settings: Config) -> Response:
    found = harvests.harvest_of(session, parse_index(number)).source
    visibility.check_may_change(who, found.owner, visibility.path(found)[1:])
    try:
        source = harvests.remove_harvest(session, settings, parse_index(number))
        path = f"/{source.model_id}/{source.name}"
        session.commit()
    except NotFound:
        raise
    except AtlasError as error:
        session.rollback()
        page = _page(session, settings, parse_index(number), of(error))
        return render(request, "harvest.html", page, status=error.status)
    return RedirectResponse(path, 303)


def address(spec: Mapping[str, Any]) -> str:
    """Return the address of the form filled in as a job's spec."""
    given = {name: spec[name] for name in _FIELDS if name in spec}
    pairs = {name: str(value).lower() if isinstance(value, bool) else value for name, value in given.items()}
    sources = [str(name) for name in spec.get("sources", ())]
    return f"/{spec.get('model', '')}/harvest{query({**pairs, 'sources': sources})}"


def _given(parameters: QueryParams | FormData) -> tuple[dict[str, str], list[str]]:
    """The last value of each field, and the SAEs."""
    values = {name: value for name, value in parameters.multi_items() if isinstance(value, str) and name in _FIELDS}
    chosen = [value for value in parameters.getlist("sources") if isinstance(value, str) and value]
    return values, list(dict.fromkeys(chosen))[:200]


def _spec(
    session: Session, entry: ModelEntry, values: Mapping[str, str], chosen: list[str]
) -> tuple[HarvestSpec | None, dict[str, str]]:
    return forms.read(HarvestSpec, {**values, "model": entry.card.id, "sources": chosen})


def _form(
    session: Session,
    settings: Settings,
    entry: ModelEntry,
    values: dict[str, str],
    chosen: list[str],
    errors: Mapping[str, str] | None = None,
    problem: Problem | None = None,
) -> HarvestForm:
    usable = tuple(source for source in entry.sources if source.has_weights)
    cards = [source for source in usable if source.name in chosen]
    readable = [c.name for c in corpora.corpora(session) if corpora.can_be_read(settings, c, entry.card.tokenizer_hash)]
    values = {"corpus": readable[0] if readable else ""} | values
    if "context_size" not in values:
        try:
            values["context_size"] = str(harvestplan.usual_context_size(cards, entry.card.n_ctx))
        except BadField:
            values["context_size"] = "128"
    if values["corpus"] and values["corpus"] not in readable:
        readable.append(values["corpus"])
    made = forms.fields(
        HarvestSpec,
        _FIELDS,
        values,
        errors,
        labels=_LABELS,
        options={"corpus": [(name, name) for name in readable] or [("", "none yet")]},
    )
    return HarvestForm(
        entry=entry,
        sources=usable,
        chosen=frozenset(chosen),
        fields=made,
        wrong_sources=(errors or {}).get("sources", ""),
        costs=_costs(session, settings, entry, values, chosen),
        problem=problem,
    )


def _costs(
    session: Session, settings: Settings, entry: ModelEntry, values: Mapping[str, str], chosen: list[str]
) -> Costs:
    if not chosen:
        return Costs(entry, problem="Choose at least one SAE to see what it will take.")
    spec, errors = _spec(session, entry, values, chosen)
    if spec is None:
        said = [f"{_LABELS.get(name, name)}: {sentence}" for name, sentence in errors.items()]
        return Costs(entry, problem=" ".join(said))
    try:
        return Costs(entry, harvestplan.estimate(session, settings, spec))
    except AtlasError as error:
        return Costs(entry, problem=error.message)


def _page(session: Session, settings: Settings, number: int, problem: Problem | None = None) -> HarvestPage:
    found = harvests.harvest_of(session, number)
    harvest, summary = found.harvest, found.harvest.summary
    kept = settings.activations_dir(harvest.activations) if harvest.activations else None
    n_kept = sum(f.stat().st_size for f in kept.glob("*")) if kept and kept.is_dir() else 0
    spec = found.job.spec if found.job is not None and found.job.kind == "harvest" else {}
    facts = [
        ("tokens", f"{harvest.n_tokens:,}, first positions left out"),
        ("context size", f"{harvest.context_size:,} tokens"),
        ("first token", "none" if harvest.bos_token_id is None else f"id {harvest.bos_token_id} before every context"),
        ("gathered", harvest.created_at.strftime("%Y-%m-%d %H:%M UTC")),
        ("dead features", f"{summary['n_dead']:,}" if "n_dead" in summary else ""),
        ("seed", str(summary.get("seed", ""))),
        ("model", str(summary.get("model_hash", ""))),
        ("SAE", str(summary.get("sae_hash", "") or found.source.sae_hash)),
        ("tokenizer", harvest.tokenizer_hash),
        ("corpus", found.corpus.hash),
    ]
    others = len(harvests.gathered(session, source_id=found.source.id)) - 1
    return HarvestPage(
        found=found,
        facts=tuple((name, value) for name, value in facts if value),
        spec=tuple((k, v if isinstance(v, str) else json.dumps(v)) for k, v in spec.items()),
        again=address(spec) if spec else "",
        n_kept_bytes=n_kept,
        others=others,
        problem=problem,
    )
