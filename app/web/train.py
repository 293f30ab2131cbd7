"""Training in the browser: the form with what it will take, the same spec as YAML beside it, and the queueing.

The state of the form is its address. A form and a YAML text make each other; a spec that no form can hold, of SAEs
that differ freely, is edited as YAML on the same page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, cast

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, QueryParams, UploadFile
from starlette.responses import RedirectResponse, Response

from app import catalog, corpora, jobs, trainforms, trainings, yamlspec
from app.catalog import ModelEntry, parse_index
from app.errors import AtlasError, BadInput, NotFound
from app.settings import Settings
from app.trainforms import Preset
from app.trainings import BadSpec, Fault, Outlook
from app.trainspecs import Architecture, SaeSpec, TrainSpec
from app.visibility import Visibility
from app.web import forms
from app.web.access import EDITOR, VIEWER
from app.web.forms import Field
from app.web.pages import Config, Db, query, render
from app.web.problems import Problem, of
from app.web.sharing import WORDS

router = APIRouter()

PATH = "/train"
USUAL_HARVEST = 1_000_000
_LABELS = {
    "d_sae": "width (d_sae)",
    "set_name": "name of the set",
    "architecture": "architecture",
    "layer": "layer",
    "hook_name": "where it reads",
    "hook_name_out": "what it predicts",
    "hook": "where it reads",
    "hook_out": "what it predicts",
    "lr": "learning rate",
    "warmup_steps": "learning rate warm-up, steps",
    "decay_share": "decay, share of the steps",
    "adam_beta1": "Adam's β1",
    "adam_beta2": "Adam's β2",
    "max_grad_norm": "gradient clipping",
    "dead_after_tokens": "dead after, tokens",
    "dead_latents": "dead latents",
    "k": "k, active latents",
    "aux_k": "AuxK latents",
    "aux_coefficient": "AuxK coefficient",
    "threshold_lr": "threshold's rate",
    "matryoshka_widths": "nested widths",
    "l1_coefficient": "L1 coefficient",
    "l1_warmup_steps": "L1 warm-up, steps",
    "resample_every_steps": "resample every, steps",
    "l0_coefficient": "L0 coefficient",
    "l0_warmup_steps": "L0 warm-up, steps",
    "tanh_scale": "tanh's scale",
    "pre_act_coefficient": "pre-activation loss",
    "n_tokens": "tokens",
    "batch_size": "batch size",
    "context_size": "context size",
    "data_seed": "seed of the order",
    "max_norm_ratio": "norm limit",
    "held_out": "held out",
    "buffer_tokens": "buffer, tokens",
    "processes": "processes",
    "text_column": "column of the text",
    "split": "split",
    "steps_per_checkpoint": "checkpoint every, steps",
    "evaluate_every_steps": "look every, steps",
    "n_eval_tokens": "evaluation, tokens",
    "weights_dtype": "weights on disk",
    "harvest_tokens": "dashboards from, tokens",
    "visibility": "seen by",
}
_OF = {
    name: " ".join(str(a) for a in Architecture if name in a.fields)
    for name in ("hook_out", *SaeSpec.model_fields)
    if name not in ("lr", "dead_latents")
} | {"hook_out": " ".join(str(a) for a in Architecture if a.is_transcoder)}
"""Architectures that have a field; empty where all do."""
_OPTIONS: dict[str, list[tuple[str, str]]] = {
    "architecture": [(str(a), a.label) for a in Architecture],
    "dead_latents": [
        ("", "as is usual for the architecture"),
        *((name, name) for name in ("aux_k", "resample", "pre_act", "none", "ghost_grads")),
    ],
    "penalty": [("", "tanh"), ("step", "step")],
    "visibility": [("team", WORDS[Visibility.TEAM]), ("private", WORDS[Visibility.PRIVATE])],
    "hook": list(trainforms.HOOKS.items()),
    "hook_out": [(kind, trainforms.HOOKS[kind]) for kind in trainforms.HOOKS_OUT],
}


@dataclass(frozen=True)
class Forecast:
    """What a spec will take, or why it cannot be; and its YAML."""

    outlook: Outlook | None
    faults: tuple[tuple[str, str], ...]
    """(label of the field, what is wrong)."""
    yaml: str
    """Empty where the fields make no spec yet."""
    download: str


@dataclass(frozen=True)
class TrainPage:
    models: tuple[ModelEntry, ...]
    """Those that have weights."""
    entry: ModelEntry | None
    corpora: tuple[str, ...]
    """Those that the model can read."""
    fields: Mapping[str, Field]
    of: Mapping[str, str]
    order: str
    presets: tuple[tuple[Preset, str], ...]
    """With their addresses."""
    forecast: Forecast
    text: str | None
    """The YAML that is edited in place of the form."""
    cloned: str
    """What it repeats, in words."""
    trainers: int
    shared: bool
    """There are others here, who may see what it makes or not."""
    problem: Problem | None = None


@router.get(PATH, dependencies=[VIEWER])
def train_form(
    request: Request,
    session: Db,
    settings: Config,
    preset: Annotated[str, Query(max_length=40)] = "",
    clone: Annotated[str, Query(max_length=40)] = "",
    like: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    if clone:
        job = jobs.get(session, parse_index(clone))
        if job.kind != trainings.KIND:
            raise NotFound(f"Job {job.id} is a {job.kind}, not a training.")
        return _again(request, session, settings, job.spec, f"job {job.id}")
    if like:
        source = catalog.source_card(session, *_parts(like))
        spec: Any = source.origin.get("spec")
        if not isinstance(spec, Mapping):
            raise NotFound(f"{like} was not trained by SAE Atlas, so its settings are not known.")
        # The spec of an SAE leaves out what happened to it afterwards.
        seen_by = "private" if source.visibility == Visibility.PRIVATE else "team"
        asked = {"harvest_tokens": USUAL_HARVEST, "visibility": seen_by, **cast(Mapping[str, Any], spec)}
        return _again(request, session, settings, asked, source.name)
    return _render(request, _page(session, settings, _given(request.query_params), preset=preset))


@router.get(f"{PATH}/outlook", dependencies=[VIEWER])
def outlook(request: Request, session: Db, settings: Config) -> Response:
    """What it will take, and the YAML, while the form is filled in."""
    forecast, _ = _forecast(session, settings, trainforms.from_form(_given(request.query_params)))
    return render(request, "_outlook.html", dataclasses.replace(forecast, download=_download(request.query_params)))


@router.get(f"{PATH}/spec.yaml", dependencies=[VIEWER])
def spec_file(request: Request) -> Response:
    """The form as a YAML file. Raises BadSpec for fields that make no spec."""
    spec = trainings.read(trainforms.from_form(_given(request.query_params)))
    name = f"{spec.saes[0].source}.yaml"
    text = yamlspec.dump(trainforms.short(spec))
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return Response(text.encode("utf-8", "replace"), media_type="application/yaml", headers=headers)


@router.post(PATH, dependencies=[EDITOR])
async def queue(request: Request, session: Db, settings: Config) -> Response:
    """Queue a training and lead to its job; what is wrong is said where it stands."""
    text, values = await _sent(request)

    def act() -> Response:
        try:
            fields = yamlspec.load(text) if text is not None else trainforms.from_form(values)
            job = trainings.queue(session, settings, trainings.read(fields))
        except AtlasError as error:
            session.rollback()
            faults = error.faults if isinstance(error, BadSpec) else ()
            problem = of(BadInput("Some fields cannot be used; each says why:") if faults else error)
            if text is None:
                boxes = {_box(fault): _label(fault) for fault in faults if fault.field}
                problem = dataclasses.replace(problem, suggestions=tuple((f"#field-{b}", w) for b, w in boxes.items()))
            page = _page(session, settings, values, text=text, faults=faults, problem=problem)
            return _render(request, page, error.status)
        session.commit()
        return RedirectResponse(f"/jobs/{job.id}", 303)

    return await run_in_threadpool(act)


@router.post(f"{PATH}/yaml", dependencies=[VIEWER])
async def from_yaml(request: Request, session: Db, settings: Config) -> Response:
    """Fill the form in from YAML that was pasted or uploaded; or show that to be edited, with what is wrong."""
    text, _ = await _sent(request)

    def act() -> Response:
        return _opened(request, session, settings, text or "")

    return await run_in_threadpool(act)


@router.get("/{model}/train", dependencies=[VIEWER])
def train_model(request: Request, model: str) -> Response:
    given = [(name, value) for name, value in request.query_params.multi_items() if name != "model"]
    return RedirectResponse(f"{PATH}{query({'model': model, **dict(given)})}", 303)


def _parts(source: str) -> tuple[str, str]:
    model, slash, name = source.partition("/")
    if not slash:
        raise BadInput(f"{source[:60]!r} names no SAE; write model/source.")
    return model, name


def _again(request: Request, session: Session, settings: Settings, asked: Mapping[str, Any], what: str) -> Response:
    """The form as something was asked for before."""
    fields = dict(asked)
    try:
        fields = trainforms.short(trainings.read(asked))
        values = trainforms.to_form(fields)
    except BadSpec:
        values = None  # of another version: what does not fit is said beside it
    if values is None:
        page = _page(session, settings, {}, text=yamlspec.dump(fields), cloned=what)
    else:
        page = _page(session, settings, values, cloned=what)
    return _render(request, page)


def _opened(request: Request, session: Session, settings: Settings, text: str) -> Response:
    try:
        spec = trainings.read(yamlspec.load(text))
    except BadSpec as error:
        return _render(request, _page(session, settings, {}, text=text, faults=error.faults), error.status)
    except BadInput as error:
        return _render(request, _page(session, settings, {}, text=text, problem=of(error)), error.status)
    values = trainforms.to_form(trainforms.short(spec))
    if values is None:
        return _render(request, _page(session, settings, {}, text=text))
    return RedirectResponse(f"{PATH}{query(dict(values))}", 303)


async def _sent(request: Request) -> tuple[str | None, dict[str, str]]:
    """The YAML of a body, from its box or its file, or nothing; and the fields of the form."""
    given = await request.form(max_files=1, max_fields=200)
    file = given.get("file")
    if isinstance(file, UploadFile) and file.filename:
        raw = await file.read(yamlspec.MAX_BYTES + 1)
        return raw.decode("utf-8", "replace"), {}
    text = given.get("yaml")
    # A browser sends line ends as CR LF.
    return (text.replace("\r\n", "\n") if isinstance(text, str) else None), _given(given)


def _given(parameters: QueryParams | FormData) -> dict[str, str]:
    """The last value of each field of the form."""
    pairs = parameters.multi_items()
    return {n: v[:2_000] for n, v in pairs if isinstance(v, str) and n in trainforms.NAMES}


def _render(request: Request, page: TrainPage, status: int = 200) -> Response:
    return render(request, "train.html", page, status=status)


def _page(
    session: Session,
    settings: Settings,
    values: dict[str, str],
    *,
    text: str | None = None,
    preset: str = "",
    cloned: str = "",
    faults: tuple[Fault, ...] = (),
    problem: Problem | None = None,
) -> TrainPage:
    models = tuple(e for e in catalog.entries(session) if catalog.has_model_weights(settings, e.card.id))
    entry = _entry(session, models, values.get("model", ""))
    readable: tuple[str, ...] = ()
    presets: tuple[Preset, ...] = ()
    if entry is not None:
        readable = _readable(session, settings, entry)
        presets = trainforms.presets(entry.card)
        values = _started(values, presets, preset) | {"model": entry.card.id}
        if not faults:  # an empty box that is complained of stays empty
            values["corpus"] = values.get("corpus", "") or next(iter(readable), "")
    forecast, found = _forecast(session, settings, trainforms.from_form(values), text, faults)
    kept = {name: values.get(name, "") for name in ("model", "corpus")}
    return TrainPage(
        models=models,
        entry=entry,
        corpora=readable,
        fields=_fields(entry, values, {} if text is not None else _errors(found)),
        of=_OF,
        order=values.get(trainforms.ORDER, ""),
        presets=tuple((p, f"{PATH}{query({**kept, 'preset': p.key})}") for p in presets),
        forecast=dataclasses.replace(forecast, download="" if text is not None else _download(values)),
        text=text,
        cloned=cloned,
        trainers=len(jobs.trainers(session, settings)),
        shared=settings.team,
        problem=problem,
    )


def _entry(session: Session, models: tuple[ModelEntry, ...], model_id: str) -> ModelEntry | None:
    """The model asked for, or the first. Raises NotFound for one that is not in the catalog."""
    found = next((entry for entry in models if entry.card.id == model_id), None)
    if found is None and model_id:
        catalog.model_entry(session, model_id)
    return found or next(iter(models), None)


def _readable(session: Session, settings: Settings, entry: ModelEntry) -> tuple[str, ...]:
    """Corpora that a model can read, the largest first."""
    found = [c for c in corpora.corpora(session) if corpora.can_be_read(settings, c, entry.card.tokenizer_hash)]
    return tuple(c.name for c in sorted(found, key=lambda c: -c.n_chars))


def _started(values: dict[str, str], presets: tuple[Preset, ...], key: str) -> dict[str, str]:
    """The values of a preset under those given; the first preset where nothing else is asked for."""
    if not key and set(values) - {"model", "corpus"}:
        return dict(values)
    chosen = next((p for p in presets if p.key == key), presets[0])
    return {**chosen.values, **{name: value for name, value in values.items() if value}}


def _forecast(
    session: Session,
    settings: Settings,
    fields: dict[str, Any],
    text: str | None = None,
    faults: tuple[Fault, ...] = (),
) -> tuple[Forecast, tuple[Fault, ...]]:
    """What a spec will take and what is wrong with it; faults that were found already stay where it finds none."""
    spec: TrainSpec | None = None
    found: Outlook | None = None
    try:
        spec = trainings.read(yamlspec.load(text) if text is not None else fields)
        found = trainings.outlook(session, settings, spec)
    except BadSpec as error:
        faults = error.faults
    except BadInput as error:
        faults = (Fault("", error.message),)
    yaml = yamlspec.dump(trainforms.short(spec)) if spec is not None else ""
    said = tuple((fault.field if text is not None else _label(fault), fault.text) for fault in faults)
    return Forecast(found, () if found else said, yaml, ""), faults


def _label(fault: Fault) -> str:
    """What the form calls the field that a fault is about."""
    box = _box(fault)
    return _LABELS.get(box, box.replace("_", " "))


def _box(fault: Fault) -> str:
    """The box of the form where a fault is said: a hook is made of two."""
    if fault.field == "hook_name":
        return "hook" if "side by side" in fault.text else "layer"
    return "hook_out" if fault.field == "hook_name_out" else fault.field


def _download(parameters: Mapping[str, str]) -> str:
    return f"{PATH}/spec.yaml{query({n: v for n, v in parameters.items() if n in trainforms.NAMES})}"


def _errors(faults: tuple[Fault, ...]) -> dict[str, str]:
    """What is wrong by field of the form."""
    found: dict[str, str] = {}
    for fault in faults:
        name = _box(fault)
        found[name] = " ".join(part for part in (found.get(name, ""), fault.text) if part)
    return found


def _fields(entry: ModelEntry | None, values: Mapping[str, str], errors: Mapping[str, str]) -> dict[str, Field]:
    made: dict[str, Field] = {}
    for spec in (TrainSpec, SaeSpec):
        names = [name for name in spec.model_fields if name in trainforms.FIELDS]
        made |= forms.fields(spec, names, values, errors, labels=_LABELS, options=_OPTIONS)
    made = {name: _typed(field, values) for name, field in made.items()}
    for name in trainforms.PLACES:
        kind = "text" if name == "layer" else "choice"
        made[name] = Field(
            name=name,
            label=_LABELS[name],
            kind=kind,
            value=values.get(name, ""),
            about=_place_about(name, entry),
            error=errors.get(name, ""),
            options=tuple(_OPTIONS.get(name, ())),
        )
    if entry is not None:
        d = entry.card.d_model
        said = f" d_model is {d:,}: {4 * d:,} to {16 * d:,}. Several with commas make one SAE each."
        made["d_sae"] = dataclasses.replace(made["d_sae"], about=made["d_sae"].about + said)
    return made


def _typed(field: Field, values: Mapping[str, str]) -> Field:
    """A field as text: it may hold several numbers, and those of hidden architectures must not stop the form."""
    if field.kind != "number" and field.options == () and field.name in ("model", "corpus", "set_name"):
        return field
    if field.kind == "choice":
        return field
    # Where the default is the architecture's, the box is empty and shows it.
    hint = trainforms.usual(field.name)
    value = values.get(field.name, "") if hint else field.value
    about = field.about
    if field.name in trainforms.GRID and field.name != "d_sae":
        about += " Several with commas make one SAE each."
    return dataclasses.replace(field, kind="text", value=value, hint=hint, about=about, required=False)


def _place_about(name: str, entry: ModelEntry | None) -> str:
    if name == "hook":
        return "The residual stream after a layer is usual; MLP and attention outputs show what one part writes."
    if name == "hook_out":
        return "In the same layer. What the MLP writes is usual, with what the MLP reads on the other side."
    last = entry.card.n_layers - 1 if entry is not None else 0
    return f"0 to {last}. The middle shows concepts, early layers words, late ones the next token. Several with commas."
