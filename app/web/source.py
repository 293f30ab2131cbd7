"""A model's page and an SAE's page: what it is, how good it is, and its features as a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, cast, get_args

from fastapi import APIRouter, Form, Query, Request
from markupsafe import Markup
from pydantic import BaseModel, Field, ValidationError, field_validator
from sqlalchemy.orm import Session
from starlette.responses import RedirectResponse, Response, StreamingResponse

from app import (
    cards,
    catalog,
    corpora,
    evaluations,
    harvests,
    jobs,
    maps,
    origins,
    saecharts,
    tablefiles,
    trash,
    validations,
    visibility,
)
from app.cards import Card, Shelf
from app.catalog import FeatureRow, Filter, HarvestCard, Kind, SourceCard, Table
from app.errors import BadInput, NotFound
from app.evaluations import Evaluation
from app.harvests import Gathered
from app.maps import Map
from app.placement import placement
from app.present import amount, percent
from app.protocol import ModelCard
from app.saecharts import Figure, Thumbnail
from app.specs import EvalSpec
from app.tables import Job
from app.validations import Validation
from app.web import visits
from app.web.access import EDITOR, GUEST, VIEWER, Who, actor_of
from app.web.markdown import rendered
from app.web.pages import Config, Db, Gpu, own_session, partial, query, read, render
from app.web.sharing import Sharing, sharing
from app.web.shelf import Choice

router = APIRouter()

Column = Literal["label", "density", "max", "token", "logit"]
COLUMNS: tuple[str, ...] = get_args(Column)
"""What a table shows beside the index, unless its address chooses."""

_METRICS: dict[str, tuple[str, str]] = {
    "explained_variance": (
        "explained variance",
        "1 − Σ|x − x̂|² ÷ Σ|x − mean(x)|²: how much of the activations' variance the reconstruction keeps. "
        "Predicting the mean scores 0, a perfect copy 1.",
    ),
    "l0": ("l0", "Features active on a token, on average."),
    "ce_loss_score": (
        "ce loss score",
        "(CE zero − CE sae) ÷ (CE zero − CE clean): how much of the model's ability to predict text survives when the "
        "SAE's reconstruction replaces the activations. 1 is all, 0 is as bad as removing them.",
    ),
    "kl_div_score": (
        "kl score",
        "The same for the divergence from the model's own predictions: 1 means they do not change, 0 that they change "
        "as much as by removing the activations.",
    ),
    "cosine_similarity": ("cosine", "Mean cosine of the activations with their reconstruction."),
    "dead": ("dead", "Share of features never active on the tokens it was measured on; fewer tokens make it larger."),
    "density": ("mean density", "Fraction of tokens a feature is active on, averaged over features."),
}


@dataclass(frozen=True)
class Metric:
    name: str
    value: str
    about: str


@dataclass(frozen=True)
class Grid:
    """The SAEs of a model, layers down and sets across."""

    sets: tuple[str, ...]
    rows: tuple[tuple[int, tuple[SourceCard | None, ...]], ...]
    """(layer, its SAE of each set), all layers that have one."""


@dataclass(frozen=True)
class ModelPage:
    entry: catalog.ModelEntry
    facts: tuple[tuple[str, str], ...]
    grid: Grid
    set_name: str = ""
    """Only this set's SAEs are shown."""
    shelf: Shelf = field(default_factory=Shelf)

    @property
    def sources(self) -> tuple[SourceCard, ...]:
        return tuple(s for s in self.shown if s.set_name == self.set_name) if self.set_name else ()

    @property
    def shown(self) -> tuple[SourceCard, ...]:
        """The SAEs that are chosen."""
        return tuple(s for s in self.entry.sources if self.shelf.shows(s))


def grid(sources: tuple[SourceCard, ...]) -> Grid:
    """Return SAEs by layer and set; where a layer's set has several, its first."""
    sets = tuple(sorted({s.set_name for s in sources}))
    by_place: dict[tuple[int, str], SourceCard] = {}
    for source in sources:
        by_place.setdefault((source.layer, source.set_name), source)
    layers = sorted({s.layer for s in sources})
    return Grid(sets, tuple((layer, tuple(by_place.get((layer, name)) for name in sets)) for layer in layers))


@dataclass(frozen=True)
class TablePage:
    """The feature table and what its links need."""

    source: SourceCard
    table: Table
    columns: tuple[str, ...] = COLUMNS
    drawn_at: int = 0
    """Of the map, where the table shows what a line was drawn around on it."""

    @property
    def drawn_around(self) -> bool:
        return bool(self.table.filter.around)

    @property
    def redrawn(self) -> bool:
        """Tells that the line was drawn on an earlier map."""
        return self.drawn_around and maps.parse_line(self.table.filter.around).drawn_at != self.drawn_at

    @property
    def on_the_map(self) -> str:
        return f"{self.source.path}/map" + query({"around": self.table.filter.around})

    @property
    def addressed(self) -> tuple[str, ...]:
        """The columns as addresses name them: not at all when they are the usual ones."""
        return () if self.columns == COLUMNS else self.columns

    @property
    def filtered(self) -> bool:
        usual = Filter(
            sort=self.table.filter.sort, descending=self.table.filter.descending, page=self.table.filter.page
        )
        return self.table.filter != usual

    @property
    def more(self) -> str:
        """The address of the next page's rows alone, for scrolling on."""
        wanted = _parameters(replace(self.table.filter, page=self.table.filter.page + 1))
        return self.source.path + query(wanted | {"columns": self.addressed, "rows": "true"})

    def export(self, kind: str) -> str:
        wanted = _parameters(replace(self.table.filter, page=1)) | {"columns": self.addressed}
        return f"{self.source.path}/features.{kind}{query(wanted)}"

    def link(self, **changes: Any) -> str:
        """Return the address of this table with some of its filter changed; a change but of page goes to the first."""
        wanted = replace(self.table.filter, **({"page": 1} | changes))
        return self.source.path + query(_parameters(wanted) | {"columns": self.addressed})

    def sorting(self, column: str) -> str:
        """Return the address that sorts by a column, or turns its order round."""
        now = self.table.filter
        # Large values are what one looks for first, except in the column of indices and labels.
        descending = not now.descending if now.sort == column else column in ("density", "max")
        return self.link(sort=column, descending=descending)

    def order(self, column: str) -> str:
        if self.table.filter.sort != column:
            return "none"
        return "descending" if self.table.filter.descending else "ascending"

    @property
    def random(self) -> str:
        wanted = replace(self.table.filter, sort="index", descending=False, page=1)
        return f"{self.source.path}/random{query(_parameters(wanted))}"


@dataclass(frozen=True)
class SourcePage:
    card: ModelCard
    source: SourceCard
    harvest: HarvestCard | None
    metrics: tuple[Metric, ...]
    """Those that have an explanation."""
    more_metrics: tuple[Metric, ...]
    config: tuple[tuple[str, str], ...]
    origin: tuple[tuple[str, str], ...]
    recipe: tuple[tuple[str, str], ...]
    """The spec of its training, where SAE Atlas trained it."""
    trained_by: int
    """The job that trained it, where that is one of this catalog; else 0."""
    figures: tuple[Figure, ...]
    thumbnail: Thumbnail | None
    others: tuple[SourceCard, ...]
    """SAEs of the same model, to compare with."""
    features: TablePage
    evaluations: tuple[Evaluation, ...]
    evaluating: Job | None
    """The evaluation that waits or runs."""
    corpora: tuple[str, ...]
    """Names of those it can be evaluated on, the usual one first."""
    validation: Validation | None
    check: Job | None
    """The check that waits or runs."""
    harvests: tuple[Gathered, ...]
    """All evidence it has, newest first."""
    sharing: Sharing | None
    said: Card
    description: Markup
    """What people wrote of it, as HTML."""
    seen_by: str
    """How many looked at it and used it, in words."""
    shared: tuple[str, ...]
    """Other sources with the same weights, which stay when this one is removed."""
    may_change: bool = True

    @property
    def evaluated_by(self) -> tuple[str, ...]:
        """The metrics that any evaluation has."""
        return tuple(name for name in evaluations.METRICS if any(name in e.metrics for e in self.evaluations))


class FilterQuery(BaseModel):
    """A table's filter as it stands in addresses; an empty field filters nothing."""

    sort: catalog.Sort = "index"
    descending: bool = False
    page: int = Field(1, ge=1, le=10**7)
    label: str = Field("", max_length=200)
    token: str = Field("", max_length=100)
    logit: str = Field("", max_length=100)
    kind: Kind = "all"
    labelled: catalog.Labelled = ""
    min_density: float | None = Field(None, ge=0, le=1)
    max_density: float | None = Field(None, ge=0, le=1)
    min_act: float | None = Field(None, ge=0, allow_inf_nan=False)
    max_act: float | None = Field(None, ge=0, allow_inf_nan=False)
    features: str = Field("", max_length=50_000)
    cluster: int | None = Field(None, ge=0, lt=2**16)
    around: str = Field("", max_length=6_000)
    columns: list[Column] = Field(default_factory=list[Column], max_length=20)
    """Beside the index, which is always there; none means all."""
    rows: bool = False
    """Only the rows, for scrolling on."""

    @field_validator("min_density", "max_density", "min_act", "max_act", "cluster", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    def filter(self) -> Filter:
        return Filter(**self.model_dump(exclude={"columns", "rows"}))

    @property
    def shown(self) -> tuple[str, ...]:
        return tuple(name for name in COLUMNS if name in self.columns) or COLUMNS


@router.get("/{model}/{source}/random", dependencies=[GUEST])
def random_in_source(model: str, source: str, session: Db, wanted: Annotated[FilterQuery, Query()]) -> Response:
    found = catalog.source_card(session, model, source)
    return RedirectResponse(f"{found.path}/{catalog.random_feature(session, found, wanted.filter())}", 302)


@router.get("/{model}/{source}/features.{kind}", dependencies=[GUEST])
def export(
    request: Request,
    model: str,
    source: str,
    kind: Literal["csv", "json"],
    session: Db,
    wanted: Annotated[FilterQuery, Query()],
) -> Response:
    """Stream the filtered table, however long, in its order and with its columns."""
    found = catalog.source_card(session, model, source)
    # Before the first byte is sent, while a refusal can still be one.
    catalog.count(session, found, wanted.filter())

    def rows() -> Iterator[FeatureRow]:
        # A session of its own: the request's may be closed before the last row is sent.
        with own_session(request) as own:
            yield from catalog.every_row(own, found, wanted.filter())

    write = tablefiles.csv_lines if kind == "csv" else tablefiles.json_lines
    headers = {"content-disposition": f'attachment; filename="{found.model_id}-{found.name}-features.{kind}"'}
    media = "text/csv; charset=utf-8" if kind == "csv" else "application/json"
    return StreamingResponse(write(found, rows(), wanted.shown), media_type=media, headers=headers)


@router.get("/{model}/{source}/memory", dependencies=[VIEWER])
async def memory(request: Request, model: str, source: str, session: Db, settings: Config, worker: Gpu) -> Response:
    """The line that says where the SAE's weights are, fetched after the page so that no page waits for the worker."""
    found = await read(session, catalog.source_card, session, model, source)
    return render(request, "_memory.html", await placement(worker, settings, found))


@router.post("/{model}/{source}/remove", dependencies=[EDITOR])
def remove(model: str, source: str, who: Who, session: Db) -> Response:
    """Move an SAE to the trash, with all that belongs to it."""
    found = catalog.source_card(session, model, source)
    visibility.check_may_change(who, found.owner, f"{found.model_id}/{found.name}")
    trash.put(session, who, harvests.source_named(session, found.model_id, found.name))
    session.commit()
    return RedirectResponse(f"/{found.model_id}", 303)


@router.post("/{model}/{source}/evaluate", dependencies=[EDITOR])
def evaluate(
    model: str,
    source: str,
    session: Db,
    settings: Config,
    corpus: Annotated[str, Form(max_length=100)] = "",
    n_tokens: Annotated[str, Form(max_length=20)] = "50000",
) -> Response:
    """Ask for the SAE's metrics on a corpus; the job's page shows them as they settle."""
    if not n_tokens.strip().isascii() or not n_tokens.strip().isdigit():
        raise BadInput(f"{n_tokens[:20]!r} is no number of tokens.")
    spec = _spec({"model": model, "source": source, "corpus": corpus, "n_tokens": int(n_tokens)})
    job = evaluations.queue(session, settings, spec)
    session.commit()
    return RedirectResponse(f"/jobs/{job.id}", 303)


def _spec(fields: dict[str, Any]) -> EvalSpec:
    try:
        return EvalSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadInput(f"{first['loc'][0]}: {first['msg']}; it is {str(first['input'])[:40]}.") from None


@router.get("/{model}", dependencies=[VIEWER])
def model_page(
    request: Request,
    model: str,
    session: Db,
    chosen: Choice,
    only: Annotated[str, Query(alias="set", max_length=200)] = "",
) -> Response:
    """A model with its SAEs; with `?set=` a set of them, layer by layer."""
    entry = catalog.model_entry(session, model)
    shelf = cards.shelf(session, actor_of(request), entry.sources, chosen)
    sets = dict.fromkeys(source.set_name for source in entry.sources)
    if only and only not in sets:
        near = [(f"{entry.path}?set={name}", name) for name in sets] or [(entry.path, entry.card.id)]
        raise catalog.NotInCatalog(f"{entry.card.id} has no set of SAEs called {only[:60]!r}.", near)
    card = entry.card
    facts = (
        ("architecture", card.architecture),
        ("parameters", f"{card.n_params:,}"),
        ("layers", str(card.n_layers)),
        ("d_model", str(card.d_model)),
        ("heads", f"{card.n_heads} × {card.d_head}"),
        ("vocabulary", f"{card.d_vocab:,}"),
        ("context", f"{card.n_ctx:,} tokens"),
        ("origin", card.origin),
        ("weights", card.hash[:16]),
    )
    return render(request, "model.html", ModelPage(entry, facts, grid(entry.sources), only, shelf))


@router.get("/{model}/{source}", dependencies=[GUEST])
def source_page(
    request: Request, model: str, source: str, session: Db, wanted: Annotated[FilterQuery, Query()]
) -> Response:
    if source.isascii() and source.isdigit() and len(source) < 6:
        return RedirectResponse(catalog.default_source(session, model, int(source)).path, 302)
    if partial(request) and not request.headers.get("hx-target", "").endswith("#check"):  # that one wants the verdict
        found = catalog.source_card(session, model, source)
        drawn = maps.map_of(session, found.id) if wanted.around else None
        shown = _table(session, found, wanted, drawn)
        return render(request, "_rows.html" if wanted.rows else "_features.html", shown)
    card, found, harvest = catalog.source_page(session, model, source)
    measured = metrics(found.metrics)
    who = actor_of(request)
    said, team = cards.card(session, who, found), who is not None and who.id is not None
    if not partial(request):
        visits.note(request, [found.id], "view")
    drawn = maps.map_of(session, found.id)
    page = SourcePage(
        card=card,
        source=found,
        harvest=harvest,
        metrics=tuple(m for m in measured if m.about),
        more_metrics=tuple(m for m in measured if not m.about),
        config=facts(found.config),
        origin=origins.words({key: value for key, value in found.origin.items() if key != "spec"}),
        recipe=facts(_recipe(found)),
        trained_by=_trained_by(session, found),
        figures=saecharts.figures(harvest.summary) if harvest else (),
        thumbnail=saecharts.thumbnail(drawn) if drawn else None,
        others=tuple(s for s in catalog.model_entry(session, model).sources if s.id != found.id),
        features=_table(session, found, wanted, drawn),
        evaluations=evaluations.found(found.metrics),
        evaluating=evaluations.pending(session, found.model_id, found.name),
        corpora=_corpora(session, found),
        validation=validations.found(found.metrics),
        check=validations.pending(session, found.model_id, found.name),
        harvests=tuple(harvests.gathered(session, source_id=found.id)),
        said=said,
        description=rendered(found.description),
        seen_by=_seen_by(said) if team else "",
        sharing=sharing(request, "sae", found.id, found.owner, found.visibility, found.link),
        may_change=visibility.may_change(actor_of(request), found.owner),
        shared=tuple(harvests.shared_with(session, found.model_id, found.name)),
    )
    return render(request, "source.html", page)


def _recipe(source: SourceCard) -> Mapping[str, Any]:
    """The settings of its training, those of this SAE among those of the job."""
    spec: Any = source.origin.get("spec")
    if not isinstance(spec, Mapping):
        return {}
    whole = dict(cast(Mapping[str, Any], spec))
    saes = whole.pop("saes", None)
    return {**whole, **saes[0]} if isinstance(saes, list) and saes else whole


def _trained_by(session: Session, source: SourceCard) -> int:
    """A bundle brings the number of a job of elsewhere: one of this catalog made this SAE, or is none of it."""
    number: Any = source.origin.get("job")
    if source.origin.get("kind") != "trained" or not isinstance(number, int):
        return 0
    try:
        job = jobs.get(session, number)
    except NotFound:
        return 0
    made: Any = job.spec.get("saes")
    names = {f"{source.layer}-{sae['set_name']}" for sae in made if "set_name" in sae} if isinstance(made, list) else ()
    return number if job.kind == "train" and source.name in names and job.spec["model"] == source.model_id else 0


def _corpora(session: Session, source: SourceCard) -> tuple[str, ...]:
    names = [corpus.name for corpus in corpora.corpora(session)]
    usual = evaluations.corpus_for(session, source, "").name if names else ""
    return tuple(sorted(names, key=lambda name: name != usual))


def _seen_by(said: Card) -> str:
    people = f"{said.n_viewers} {'person has' if said.n_viewers == 1 else 'people have'} looked at it"
    return f"{people}, {said.n_users} used it"


def _table(session: Session, source: SourceCard, wanted: FilterQuery, drawn: Map | None) -> TablePage:
    table = catalog.table(session, source, wanted.filter())
    return TablePage(source, table, wanted.shown, drawn.drawn_at if drawn else 0)


def metrics(found: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Return the metrics with their explanations, the known ones first."""
    names = [name for name in _METRICS if name in found] + sorted(name for name in found if name not in _METRICS)
    return tuple(
        Metric(
            _METRICS.get(name, (name.replace("_", " "), ""))[0],
            _value(name, found[name]),
            _METRICS.get(name, ("", ""))[1],
        )
        for name in names
        if not isinstance(found[name], dict | list)
    )


def facts(found: Mapping[str, Any], prefix: str = "") -> tuple[tuple[str, str], ...]:
    """Return nested settings flat, in order, as texts."""
    flat: list[tuple[str, str]] = []
    for key, value in found.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat += facts(value, f"{name}.")
        else:
            flat.append((name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)[:500]))
    return tuple(flat)


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if name in ("dead", "density") and isinstance(value, float):
        return percent(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}" if abs(value) <= 1 else amount(value)


def _parameters(wanted: Filter) -> dict[str, Any]:
    usual = vars(Filter())
    return {key: _text(value) for key, value in vars(wanted).items() if value != usual[key]}


def _text(value: Any) -> Any:
    return "true" if value is True else value
