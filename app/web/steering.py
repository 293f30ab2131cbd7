"""The steering page: features with strengths, a prompt or a conversation, and texts side by side.

The state is in the address. With JavaScript the JSON API generates and streams; without it the form does, and shows the
finished run under its own address.
"""

from __future__ import annotations

import re
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from app import catalog, jobs, search, steering_vectors, steerings, visibility
from app.api import steer as api
from app.api.inputs import check_text
from app.catalog import FeatureRow, ModelEntry, NotInCatalog, SourceCard
from app.errors import BadInput, NotFound
from app.people import Actor, Role
from app.protocol import Operation, Positions, SteerMethod
from app.steering import Completion, Control
from app.sweeps import Point, Suggestion
from app.web.access import GUEST, VIEWER, actor_of
from app.web.pages import Config, Db, Gpu, query, read, render
from app.web.sharing import Sharing, sharing_of

router = APIRouter()

PROMPT = "The most important thing to know about the sea is"
REACH = 4
"""The slider goes to this many times a feature's highest activation, both ways."""

OPERATIONS = {
    Operation.ADD: "add",
    Operation.CLAMP: "clamp to",
    Operation.SCALE: "scale by",
    Operation.ABLATE: "ablate",
    Operation.ORTHOGONAL: "replace share by",
    Operation.CAP: "cap at",
}
POSITIONS = {
    Positions.ALL: "all tokens",
    Positions.GENERATED: "generated tokens",
    Positions.PROMPT: "the prompt",
    Positions.CHOSEN: "chosen tokens",
}
_METHOD_OF = {
    SteerMethod.ADDITIVE: Operation.ADD,
    SteerMethod.ORTHOGONAL: Operation.ORTHOGONAL,
    SteerMethod.CAP: Operation.CAP,
}


@dataclass(frozen=True)
class Steered:
    """A feature chosen for steering, or a custom vector: then its label is its own and no page shows it."""

    source: str
    feature: FeatureRow
    strength: float
    operation: Operation = Operation.ADD
    positions: Positions = Positions.ALL
    at: str = ""
    on: bool = True
    is_vector: bool = False

    @property
    def reach(self) -> float:
        """The slider's end: wide enough for the strength at hand and for the feature's own activations."""
        usual = REACH * self.feature.max_act if self.feature.max_act > 0 else 20.0
        return round(max(usual, abs(self.strength)), 2)

    @property
    def added(self) -> dict[str, Any]:
        """What the page needs to add it to its list."""
        return {
            "source": self.source,
            "index": self.feature.index,
            "label": self.feature.label,
            "strength": self.strength,
            "reach": self.reach,
            "max": self.feature.max_act,
            "vector": self.is_vector,
        }


@dataclass(frozen=True)
class SteerPage:
    entry: ModelEntry
    features: tuple[Steered, ...]
    source: str
    asked: dict[str, Any]
    """The form's fields by their names in the API."""
    max_tokens: int
    vectors: tuple[Steered, ...] = ()
    presets: tuple[tuple[str, str], ...] = ()
    run: dict[str, Any] = field(default_factory=dict[str, Any])
    """A saved run's result."""
    run_id: str = ""
    warnings: tuple[str, ...] = ()
    problem: str = ""
    sharing: Sharing | None = None
    may_delete: bool = False
    operations: tuple[tuple[str, str], ...] = tuple((o.value, words) for o, words in OPERATIONS.items())
    places: tuple[tuple[str, str], ...] = tuple((p.value, words) for p, words in POSITIONS.items())

    @property
    def prompt(self) -> str:
        return self.asked.get("prompt") or ""

    @property
    def blank(self) -> Steered:
        """What a row is before a feature is in it."""
        return Steered("", FeatureRow(0, "", 0.0, 0.0, "", ""), 0.0)

    @property
    def unusual(self) -> bool:
        """Whether a setting that is folded away is not the usual one."""
        names = ("top_p", "top_k", "min_p", "repetition_penalty", "freq_penalty", "stop")
        return any(self.asked[name] != _DEFAULTS[name] for name in names)

    @property
    def stops(self) -> str:
        """Stop strings, one a line."""
        return "\n".join(map(_escaped, self.asked["stop"]))

    @property
    def chat(self) -> bool:
        return bool(self.asked.get("steeredChatMessages"))


@dataclass(frozen=True)
class Choices:
    """Features to choose from, for a label or an index that was typed."""

    path: str
    q: str
    found: tuple[Steered, ...]


_DEFAULTS: dict[str, Any] = {
    "prompt": PROMPT,
    "temperature": 0.5,
    "n_tokens": 64,
    "seed": 16,
    "freq_penalty": 0.0,
    "repetition_penalty": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "n_samples": 1,
    "strength_multiplier": 1.0,
    "steer_special_tokens": True,
    "stop": [],
    "controls": [],
    "off": [],
}


@router.get("/{model}/steer", dependencies=[VIEWER])
def steer_page(
    request: Request,
    model: str,
    session: Db,
    settings: Config,
    feature: Annotated[list[str], Query(max_length=32)] = [],  # noqa: B006 - FastAPI copies it
    source: Annotated[list[str], Query(max_length=32)] = [],  # noqa: B006
    index: Annotated[list[str], Query(max_length=32)] = [],  # noqa: B006
    strength: Annotated[list[float], Query(max_length=32)] = [],  # noqa: B006
    prompt: Annotated[str | None, Query(max_length=20_000)] = None,
    text: Annotated[str | None, Query(max_length=20_000)] = None,
    temperature: Annotated[float, Query(ge=0, le=100)] = 0.5,
    n_tokens: Annotated[int, Query(ge=1)] = 64,
    seed: Annotated[int, Query(ge=-(2**63), lt=2**63)] = 16,
    freq_penalty: Annotated[float, Query(ge=-100, le=100)] = 0,
    repetition_penalty: Annotated[float, Query(gt=0, le=100)] = 1,
    top_p: Annotated[float, Query(gt=0, le=1)] = 1,
    top_k: Annotated[int, Query(ge=0, lt=2**31)] = 0,
    min_p: Annotated[float, Query(ge=0, le=1)] = 0,
    n_samples: Annotated[int, Query(ge=1, le=16)] = 1,
    multiplier: Annotated[float, Query(ge=-100, le=100)] = 1,
    stop: Annotated[list[str], Query(max_length=8)] = [],  # noqa: B006
    controls: Annotated[list[Control], Query(max_length=2)] = [],  # noqa: B006
    spare: bool = False,
    method: SteerMethod = SteerMethod.ADDITIVE,
    preset: Annotated[str, Query(max_length=40)] = "",
) -> Response:
    """Show the page.

    `feature` is source:index[:strength[:operation[:positions[:at[:off]]]]]; source, index, strength still do.
    """
    entry = catalog.model_entry(session, model)
    asked = _DEFAULTS | {
        "prompt": next((p for p in (text, prompt) if p is not None), PROMPT),
        "temperature": temperature,
        "n_tokens": min(n_tokens, settings.max_new_tokens),
        "seed": seed,
        "freq_penalty": freq_penalty,
        "repetition_penalty": repetition_penalty,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "n_samples": n_samples,
        "strength_multiplier": multiplier,
        "stop": [one[:200] for one in stop if one],
        "controls": controls,
        "steer_special_tokens": not spare,
    }
    if preset:
        kept = _DEFAULTS | {"features": []} | steerings.preset(session, model, preset).settings
        return render(request, "steer.html", _page(session, settings, entry, kept))
    chosen = [
        _steered(
            session,
            entry,
            source[min(i, len(source) - 1)] if source else "",
            index[i],
            _at(strength, i),
            _METHOD_OF[method],
        )
        for i in range(len(index))
    ]
    chosen += [_named(session, entry, one) for one in feature]
    page = _page(session, settings, entry, asked, tuple(chosen), source=source[0] if source else "")
    return render(request, "steer.html", page)


def _page(
    session: Session,
    settings: Config,
    entry: ModelEntry,
    asked: dict[str, Any],
    chosen: tuple[Steered, ...] = (),
    **more: Any,
) -> SteerPage:
    chosen += tuple(_recorded(session, entry, f) for f in asked.get("features", []))
    chosen += tuple(replace(_recorded(session, entry, f), on=False) for f in asked["off"])
    vectors = tuple(_vector(v, None) for v in steering_vectors.owned(session, entry.card.id))
    presets = tuple((p.id, p.name) for p in steerings.presets(session, entry.card.id))
    more = {"source": ""} | more
    return SteerPage(
        entry, chosen, asked=asked, max_tokens=settings.max_new_tokens, vectors=vectors, presets=presets, **more
    )


@router.post("/{model}/steer", dependencies=[VIEWER])
async def steer_form(request: Request, model: str, session: Db, settings: Config, worker: Gpu) -> Response:
    """Run the form of a browser without JavaScript and go to the run's address."""
    fields = parse_qs((await request.body()).decode("utf-8", "replace"), keep_blank_values=True)
    entry = await read(session, catalog.model_entry, session, model)
    body = _form(model, fields)
    if fields.get("add", [""])[0].strip():
        return RedirectResponse(_address(entry, body, fields["add"][0].strip().replace("/", ":")), 303)
    check_text(settings, body.prompt)
    run = await api.begin(request, body, session, settings, worker)
    run.texts.start(run.asked, run.start)
    async with aclosing(run.events):
        async for event in run.events:
            api.take(run.texts, event)
    saved = await run_in_threadpool(api.save, run, api.completion(run.texts))
    return RedirectResponse(saved["shareUrl"], 303)


def _form(model: str, fields: dict[str, list[str]]) -> Completion:
    """The form's fields as a request. Raises BadInput for what is no number where one belongs."""
    names = ("source", "index", "strength", "operation", "positions", "at")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(fields.get(name, []) for name in names), strict=False)]
    on, off = [], []
    for row in rows:
        switched_on = f"{row['source']}:{row['index']}" in fields.get("on", [])
        (on if switched_on else off).append({**row, "modelId": model, "at": _positions(row["at"])})
    plain = {name: fields[name][0] for name in _DEFAULTS if fields.get(name, [""])[0]}
    try:
        return Completion.model_validate(
            plain
            | {"modelId": model, "features": on, "off": off, "prompt": fields.get("prompt", [""])[0]}
            | {"controls": fields.get("controls", []), "steer_special_tokens": "spare" not in fields, "n_logprobs": 5}
            | {"stop": [_unescaped(line) for line in fields.get("stop", [""])[0].splitlines() if line]}
        )
    except ValueError as error:
        raise BadInput(f"The form holds something that is not usable: {str(error).splitlines()[1]}") from None


def _positions(text: str) -> list[int]:
    """ "1, 4-6" as [1, 4, 5, 6]. Raises BadInput."""
    found: list[int] = []
    for piece in text.replace(" ", "").split(","):
        first, _, last = piece.partition("-")
        if not piece:
            continue
        if not (first.isdigit() and (last or first).isdigit()) or len(piece) > 12:
            raise BadInput(f"{piece[:20]!r} is no position in the prompt; write such as 1, 4-6.")
        found += range(int(first), min(int(last or first), int(first) + 4095) + 1)
    return found


def _escaped(stop: str) -> str:
    """A stop string on a line of its own."""
    return stop.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


def _unescaped(line: str) -> str:
    return re.sub(r"\\([nt\\])", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}[found[1]], line)


def _address(entry: ModelEntry, body: Completion, *added: str) -> str:
    """The page's address with all that a form holds."""
    chosen = [
        ":".join(
            [f.source, f.index, str(f.strength), f.operation or "add", f.positions, ",".join(map(str, f.at)), *off]
        )
        for features, off in ((body.features, []), (body.off, ["off"]))
        for f in features
    ]
    asked = body.model_dump(mode="json")
    same = ("n_tokens", "temperature", "seed", "freq_penalty", "repetition_penalty", "top_p", "top_k", "min_p")
    more = {name: asked[name] for name in (*same, "n_samples", "controls", "stop") if asked[name] != _DEFAULTS[name]}
    if body.strength_multiplier != 1:
        more["multiplier"] = body.strength_multiplier
    if not body.steer_special_tokens:
        more["spare"] = "yes"
    return f"{entry.path}/steer{query({'feature': [*chosen, *added], 'text': body.prompt, **more})}"


@router.get("/{model}/steer/features", dependencies=[VIEWER])
def choices(
    request: Request,
    model: str,
    session: Db,
    q: Annotated[str, Query(max_length=200)] = "",
    source: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    entry = catalog.model_entry(session, model)
    q = q.strip()
    found: list[Steered] = []
    if q.isascii() and q.isdigit():
        found = [
            _steered(session, entry, s.name, q)
            for s in entry.sources
            if int(q[:9]) < s.d_sae and source in ("", s.name) and len(q) < 9
        ]
    elif q:
        hits = search.labels(session, q, model_id=entry.card.id, sources=[source] if source else (), limit=12).hits
        # A feature with several labels may be found by each.
        once = {(hit.source, hit.feature.index): hit for hit in reversed(hits)}
        found = [Steered(hit.source, hit.feature, _usual(hit.feature)) for hit in reversed(once.values())]
    return render(request, "_choices.html", Choices(entry.path, q, tuple(found)))


@dataclass(frozen=True)
class SweepPage:
    """A sweep that has been made, or is being made."""

    entry: ModelEntry
    job: jobs.Job
    names: tuple[str, ...]
    prompt: str
    points: tuple[Point, ...]
    suggested: Suggestion | None
    plot: dict[str, Any]

    @property
    def moving(self) -> bool:
        return self.job.state in ("queued", "running")


@router.get("/{model}/steer/sweep/{job_id}", dependencies=[VIEWER])
def sweep_page(request: Request, model: str, job_id: str, session: Db) -> Response:
    """Show a sweep's table and trade-off; while its job goes on, how far it is."""
    entry = catalog.model_entry(session, model)
    job = jobs.get(session, catalog.parse_index(job_id))
    if job.kind != "sweep" or job.spec.get("modelId") != entry.card.id:
        raise NotFound(f"Job {job_id[:20]} is no sweep of {entry.card.id}.")
    points = tuple(Point.model_validate(p) for p in job.result.get("points", []))
    features = job.spec["features"]
    names = tuple(
        f"{f.get('source') or f.get('layer')}/{f['index']}" for f in (features[a["feature"]] for a in job.spec["axes"])
    )
    suggested = job.result.get("suggested")
    page = SweepPage(
        entry,
        job,
        names,
        job.spec.get("prompt") or job.spec["steeredChatMessages"][-1]["content"],
        points,
        Suggestion.model_validate(suggested) if suggested else None,
        {"points": [p.model_dump() for p in points], "suggested": suggested, "names": names},
    )
    return render(request, "sweep.html", page)


@router.get("/{model}/steer/{run_id}", dependencies=[GUEST])
def replay(request: Request, model: str, run_id: str, session: Db, settings: Config) -> Response:
    """Show a saved run as it was; nothing is generated again."""
    entry = catalog.model_entry(session, model)
    run = steerings.get(session, run_id)
    if run.model_id != entry.card.id:
        raise NotFound(f"Run {run_id[:40]} was made with another model, {run.model_id}.")
    asked: dict[str, Any] = _DEFAULTS | {"prompt": None} | run.request  # a conversation has none
    page = _page(
        session,
        settings,
        entry,
        asked,
        run=run.result,
        run_id=run.id,
        warnings=tuple(_changed(session, entry, asked)),
        sharing=sharing_of(request, "run", run),
        may_delete=_may_delete(actor_of(request), run.owner),
    )
    return render(request, "steer.html", page)


def _may_delete(who: Actor | None, owner: str) -> bool:
    return who is not None and who.role != Role.VIEWER and visibility.may_change(who, owner)


def _changed(session: Session, entry: ModelEntry, asked: dict[str, Any]) -> list[str]:
    """What is no longer what the run was made with."""
    found: list[str] = []
    if asked.get("modelHash") not in (None, entry.card.hash):
        found.append(f"{entry.card.id} has other weights now than when this run was made.")
    for f in asked["features"]:
        source = next((s for s in entry.sources if s.name == f["layer"]), None)
        if source is not None and f.get("saeHash") not in (None, source.sae_hash):
            found.append(f"{source.name} is another SAE now ({source.sae_hash[:12]}) than then ({f['saeHash'][:12]}).")
    return found


def _recorded(session: Session, entry: ModelEntry, f: dict[str, Any]) -> Steered:
    """A feature of a saved run or preset."""
    operation = Operation(f.get("operation") or Operation.ADD)
    positions = Positions(f.get("positions") or Positions.ALL)
    at = ", ".join(map(str, f.get("at") or []))
    source = str(f.get("layer") or f.get("source") or "")
    how = (float(f["strength"]), operation, positions, at)
    try:
        return _steered(session, entry, source, str(f["index"]), *how)
    except NotFound:  # its SAE is gone, or is not shown to whoever looks; the run is still worth reading
        return Steered(source, FeatureRow(int(f["index"]), "", 0.0, 0.0, "", ""), *how)


def _named(session: Session, entry: ModelEntry, text: str) -> Steered:
    """source:index[:strength[:operation[:positions[:at[:off]]]]]. Raises BadInput."""
    source, index, strength, operation, positions, at, off = (text.split(":") + [""] * 7)[:7]
    if not index:
        source, index = "", source
    try:
        found = _steered(
            session,
            entry,
            source,
            index,
            float(strength) if strength else None,
            Operation(operation or "add"),
            Positions(positions or "all"),
            at,
        )
    except ValueError:
        raise BadInput(f"{text[:80]!r} is no feature; write source:index:strength, such as 12-demo:24:8.") from None
    return replace(found, on=off != "off")


def _vector(vector: steering_vectors.SteeringVector, strength: float | None, *more: Any) -> Steered:
    row = FeatureRow(vector.id, vector.label, 0.0, 0.0, "", "")
    own = vector.default_strength if strength is None else strength
    return replace(Steered(steering_vectors.source_of(vector), row, own, *more), is_vector=True)


def _steered(
    session: Session, entry: ModelEntry, source: str, index: str, strength: float | None = None, *more: Any
) -> Steered:
    """Return a chosen feature or vector. Raises NotInCatalog."""
    if steering_vectors.is_address(source):
        return _vector(steering_vectors.get(session, entry.card.id, source, index), strength, *more)
    number = catalog.parse_index(index)
    found = _source(entry, source, number) or catalog.source_card(session, entry.card.id, source)
    if number >= found.d_sae:
        raise catalog.past_the_end(found, number)
    rows = catalog.rows(session, found, [number])
    feature = rows.get(number) or FeatureRow(number, "", 0.0, 0.0, "", "")
    return Steered(found.name, feature, _usual(feature) if strength is None else strength, *more)


def _source(entry: ModelEntry, name: str, index: int) -> SourceCard | None:
    """Return the named source; without a name the only one or the default. Raises NotInCatalog where several fit."""
    if name or not entry.sources:
        return next((s for s in entry.sources if s.name == name), None)
    defaults = [s for s in entry.sources if s.is_default]
    lowest = [s for s in defaults if s.layer == min(d.layer for d in defaults)]
    fitting = list(entry.sources) if len(entry.sources) == 1 else lowest
    if len(fitting) == 1:
        return fitting[0]
    listed = [(f"{entry.path}/steer{query({'source': s.name, 'index': index})}", s.name) for s in entry.sources]
    names = ", ".join(name for _, name in listed)
    raise NotInCatalog(f"Feature {index} of which SAE? Say source=, one of: {names}.", listed)


def _usual(feature: FeatureRow) -> float:
    return round(feature.max_act, 2) if feature.max_act > 0 else 10.0


def _at(values: list[float], i: int) -> float | None:
    return values[i] if i < len(values) and abs(values[i]) < 1e6 else None
