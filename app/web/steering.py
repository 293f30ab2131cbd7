"""The steering page: features with strengths, a prompt, and two texts side by side. The JSON API generates them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from sqlalchemy.orm import Session
from starlette.responses import Response

from app import catalog, search, steerings
from app.catalog import FeatureRow, ModelEntry, NotInCatalog, SourceCard
from app.errors import NotFound
from app.protocol import SteerMethod
from app.web.pages import Config, Db, query, render

router = APIRouter()

PROMPT = "The most important thing to know about the sea is"
REACH = 4
"""The slider goes to this many times a feature's highest activation, both ways."""

_METHODS = {
    SteerMethod.ADDITIVE: "add strength × direction",
    SteerMethod.ORTHOGONAL: "replace what lies along the direction",
    SteerMethod.CAP: "cap the activation at the strength",
}


@dataclass(frozen=True)
class Steered:
    """A feature chosen for steering."""

    source: str
    feature: FeatureRow
    strength: float

    @property
    def reach(self) -> float:
        """The slider's end: wide enough for the strength at hand and for the feature's own activations."""
        usual = REACH * self.feature.max_act if self.feature.max_act > 0 else 20.0
        return round(max(usual, abs(self.strength)), 2)

    @property
    def step(self) -> float:
        return round(self.reach / 200, 4) or 0.01


@dataclass(frozen=True)
class SteerPage:
    entry: ModelEntry
    features: tuple[Steered, ...]
    source: str
    prompt: str
    temperature: float
    n_tokens: int
    seed: int
    freq_penalty: float
    method: SteerMethod
    max_tokens: int
    default_text: str = ""
    steered_text: str = ""
    run_id: str = ""
    methods: tuple[tuple[str, str], ...] = tuple((method.value, words) for method, words in _METHODS.items())


@dataclass(frozen=True)
class Choices:
    """Features to choose from, for a label or an index that was typed."""

    path: str
    q: str
    found: tuple[Steered, ...]


@router.get("/{model}/steer")
def steer_page(
    request: Request,
    model: str,
    session: Db,
    settings: Config,
    source: Annotated[list[str], Query(max_length=32)] = [],  # noqa: B006 - FastAPI copies it
    index: Annotated[list[str], Query(max_length=32)] = [],  # noqa: B006
    strength: Annotated[list[float], Query(max_length=32)] = [],  # noqa: B006
    prompt: Annotated[str, Query(max_length=20_000)] = PROMPT,
    temperature: Annotated[float, Query(ge=0, le=100)] = 0.5,
    n_tokens: Annotated[int, Query(ge=1)] = 64,
    seed: Annotated[int, Query(ge=-(2**63), lt=2**63)] = 16,
    freq_penalty: Annotated[float, Query(ge=-100, le=100)] = 0,
    method: SteerMethod = SteerMethod.ADDITIVE,
) -> Response:
    entry = catalog.model_entry(session, model)
    chosen = [
        _steered(session, entry, source[min(i, len(source) - 1)] if source else "", index[i], _at(strength, i))
        for i in range(len(index))
    ]
    page = SteerPage(
        entry=entry,
        features=tuple(chosen),
        source=source[0] if source else "",
        prompt=prompt,
        temperature=temperature,
        n_tokens=min(n_tokens, settings.max_new_tokens),
        seed=seed,
        freq_penalty=freq_penalty,
        method=method,
        max_tokens=settings.max_new_tokens,
    )
    return render(request, "steer.html", page)


@router.get("/{model}/steer/features")
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
        found = [Steered(hit.source, hit.feature, _usual(hit.feature)) for hit in hits]
    return render(request, "_choices.html", Choices(entry.path, q, tuple(found)))


@router.get("/{model}/steer/{run_id}")
def replay(request: Request, model: str, run_id: str, session: Db, settings: Config) -> Response:
    """Show a saved run as it was; nothing is generated again."""
    entry = catalog.model_entry(session, model)
    run = steerings.get(session, run_id)
    if run.model_id != entry.card.id:
        raise NotFound(f"Run {run_id[:40]} was made with another model, {run.model_id}.")
    asked: dict[str, Any] = run.request
    page = SteerPage(
        entry=entry,
        features=tuple(
            _steered(session, entry, f["layer"], str(f["index"]), float(f["strength"])) for f in asked["features"]
        ),
        source="",
        prompt=asked["prompt"],
        temperature=asked["temperature"],
        n_tokens=asked["n_tokens"],
        seed=asked["seed"],
        freq_penalty=asked["freq_penalty"],
        method=SteerMethod(asked["steer_method"]),
        max_tokens=settings.max_new_tokens,
        default_text=run.result.get("DEFAULT", ""),
        steered_text=run.result.get("STEERED", ""),
        run_id=run.id,
    )
    return render(request, "steer.html", page)


def _steered(session: Session, entry: ModelEntry, source: str, index: str, strength: float | None = None) -> Steered:
    """Return a chosen feature. Raises NotInCatalog."""
    number = catalog.parse_index(index)
    found = _source(entry, source, number) or catalog.source_card(session, entry.card.id, source)
    if number >= found.d_sae:
        raise catalog.past_the_end(found, number)
    rows = catalog.rows(session, found, [number])
    feature = rows.get(number) or FeatureRow(number, "", 0.0, 0.0, "", "")
    return Steered(found.name, feature, _usual(feature) if strength is None else strength)


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
