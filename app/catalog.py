"""Reads of the catalog: what the pages and the JSON API show. Takes a Session, commits nothing, knows no HTTP.

Each function returns frozen data ready to format. Feature pages cost two queries; tests count them.
"""

from __future__ import annotations

import difflib
import json
import random
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Integer,
    Select,
    UnaryExpression,
    any_,
    bindparam,
    func,
    literal,
    or_,
    select,
)
from sqlalchemy.orm import Bundle, InstrumentedAttribute, Session

from app import maps, visibility, wording
from app.corpora import IMPORTED, VOCABULARY, tokens_dir
from app.errors import BadInput, NotFound
from app.protocol import ModelCard, ModelRef, SaeRef
from app.settings import Settings
from app.tables import (
    Corpus,
    Evidence,
    Explanation,
    Feature,
    FeatureWords,
    Harvest,
    HarvestState,
    Model,
    Source,
    WordKind,
)
from app.tokens import Vocabulary, vocabulary
from app.visibility import Visibility

RESERVED = frozenset(
    {
        "about",
        "account",
        "activity",
        "admin",
        "api",
        "assets",
        "audit",
        "bookmarks",
        "comments",
        "compare",
        "corpora",
        "docs",
        "events",
        "explanations",
        "export",
        "favicon.ico",
        "harvests",
        "healthz",
        "help",
        "import",
        "invite",
        "jobs",
        "jump",
        "lists",
        "login",
        "logout",
        "map",
        "mentions",
        "metrics",
        "models",
        "new",
        "notes",
        "oidc",
        "open",
        "openapi.json",
        "palette",
        "people",
        "prompt",
        "quick-list",
        "random",
        "readyz",
        "redoc",
        "remotes",
        "robots.txt",
        "search",
        "settings",
        "share",
        "shared",
        "sources",
        "static",
        "steer",
        "teams",
        "train",
        "trash",
        "upload",
        "vectors",
    }
)
"""First segments of addresses that mean something else: no model may be called so."""

DERIVED_COUNTS = "derived_counts"
"""In a harvest's summary: numbers of active tokens were not said, but follow from density and histogram."""
_SAID = ("progress", DERIVED_COUNTS)
"""Of a harvest's summary, what a feature's record holds."""
NO_WEIGHTS = "none-"
"""How the weights' hash of a source begins that has none."""

PAGE_SIZE = 50
DENSE = 0.1
"""Features active on more than this fraction of tokens are called dense."""

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_INDEX = re.compile(r"[0-9]{1,9}", re.ASCII)
_NEAR = 6

_RANGES = re.compile(r"[0-9]{1,9}(-[0-9]{1,9})?(,[0-9]{1,9}(-[0-9]{1,9})?)*", re.ASCII)
_MAX_RANGES, _MAX_LONG_RANGES = 4_000, 400
_SHORT = 64

Sort = Literal["index", "density", "max", "label", "token", "logit"]
Kind = Literal["all", "live", "labelled", "dense", "dead"]
Labelled = Literal["", "yes", "no"]


class NotInCatalog(NotFound):
    """Nothing lies at this address; `suggestions` are (address, words) of what may have been meant."""

    def __init__(self, message: str, suggestions: Collection[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.suggestions = tuple(suggestions)


class NoWeights(BadInput):
    """What was asked needs a model or an SAE whose weights are not here."""


@dataclass(frozen=True)
class SourceCard:
    """A source as lists show it, and as pages head it."""

    id: int
    model_id: str
    name: str
    layer: int
    set_name: str
    is_default: bool
    sae_hash: str
    architecture: str
    hook_name: str
    d_in: int
    d_sae: int
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    origin: Mapping[str, Any]
    harvest_id: int | None
    created_at: str
    owner: str = ""
    visibility: str = Visibility.TEAM
    link: str = ""
    """The secret of its public link."""
    description: str = ""
    """Markdown."""
    replaced_by: str = ""
    """Name of its newer version."""

    @property
    def path(self) -> str:
        return f"/{self.model_id}/{self.name}"

    @property
    def has_weights(self) -> bool:
        """False for evidence that was imported without its SAE."""
        return not self.sae_hash.startswith(NO_WEIGHTS)

    @property
    def prepend_bos(self) -> bool:
        """Whether a text it reads begins with the model's token for that, where there is one: its config says."""
        metadata = self.config.get("metadata")
        return not (isinstance(metadata, Mapping) and cast(Mapping[str, Any], metadata).get("prepend_bos") is False)


@dataclass(frozen=True)
class ModelEntry:
    """A model with its sources, lowest layer first."""

    card: ModelCard
    sources: tuple[SourceCard, ...]

    @property
    def path(self) -> str:
        return f"/{self.card.id}"

    @property
    def weightless(self) -> bool:
        """Nothing can be computed: the model, or every SAE of it, is known from imported evidence alone."""
        return not self.card.hash or (bool(self.sources) and not any(s.has_weights for s in self.sources))


@dataclass(frozen=True)
class HarvestCard:
    """Which tokens the evidence was gathered on."""

    id: int
    corpus: str
    corpus_hash: str
    about: str
    tokenizer_hash: str
    context_size: int
    bos_token_id: int | None
    n_tokens: int
    summary: Mapping[str, Any]
    """Of a feature's record only what _SAID names."""
    created_at: str
    state: str = HarvestState.COMPLETE
    job_id: int | None = None
    activations: str = ""
    """Directory under activations/ with its sparse activations, or nothing."""

    @property
    def imported(self) -> bool:
        """Its tokens are strings that came with it, not ids of the model's tokenizer."""
        return self.tokenizer_hash == IMPORTED

    @property
    def derived_counts(self) -> bool:
        """Numbers of active tokens are derived: about right."""
        return bool(self.summary.get(DERIVED_COUNTS))

    @property
    def partial(self) -> bool:
        """Tells that the harvest still runs, or stopped, and this is what was read so far."""
        return self.state == HarvestState.PARTIAL

    @property
    def progress(self) -> tuple[int, int] | None:
        """Shards read and shards in all, while partial."""
        found = self.summary.get("progress") if self.partial else None
        return (int(found["done"]), int(found["total"])) if found else None


@dataclass(frozen=True)
class FeatureRow:
    """A feature as tables and lists show it."""

    index: int
    label: str
    density: float
    max_act: float
    top_token: str
    top_logit: str

    @property
    def dead(self) -> bool:
        return self.max_act <= 0


@dataclass(frozen=True)
class ExplanationRow:
    id: int
    text: str
    method: str
    author: str
    n_votes: int = 0


@dataclass(frozen=True)
class FeatureRecord:
    """Everything stored of one feature, its evidence still packed."""

    card: ModelCard
    source: SourceCard
    harvest: HarvestCard | None
    feature: FeatureRow
    blob: bytes | None
    effects: bytes | None = None
    """The packed causal effects of its top examples, where they were measured."""

    @property
    def path(self) -> str:
        return f"{self.source.path}/{self.feature.index}"

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that mark no text in the evidence's own tokens."""
        imported = self.harvest is not None and self.harvest.imported
        return frozenset() if imported else frozenset(self.card.special_token_ids)


@dataclass(frozen=True)
class Filter:
    """Which features of a source a table shows, in which order. Texts match anywhere, whatever their case.

    `token` is looked for in all tokens that the top examples are active on, `logit` in the ten that are promoted most;
    in quotes they mean a whole token.
    """

    sort: Sort = "index"
    descending: bool = False
    page: int = 1
    label: str = ""
    token: str = ""
    logit: str = ""
    kind: Kind = "all"
    labelled: Labelled = ""
    min_density: float | None = None
    max_density: float | None = None
    min_act: float | None = None
    max_act: float | None = None
    """Bounds of a feature's maximum activation."""
    features: str = ""
    """Only these, as `3,7-12`."""
    cluster: int | None = None
    """Only those of this cluster of the map."""
    around: str = ""
    """Only those inside a line drawn on the map (maps.parse_line)."""


@dataclass(frozen=True)
class Table:
    """One page of a filtered feature table."""

    rows: tuple[FeatureRow, ...]
    total: int
    filter: Filter

    @property
    def pages(self) -> int:
        return max(1, -(-self.total // PAGE_SIZE))

    @property
    def first(self) -> int:
        return (self.filter.page - 1) * PAGE_SIZE + 1 if self.rows else 0

    @property
    def last(self) -> int:
        return self.first + len(self.rows) - 1 if self.rows else 0


@dataclass(frozen=True)
class Home:
    models: tuple[ModelEntry, ...]
    samples: tuple[tuple[SourceCard, FeatureRow], ...] = field(default=())
    """A few labelled features, other ones each time."""

    @property
    def n_features(self) -> int:
        return sum(source.d_sae for entry in self.models for source in entry.sources)


def home(session: Session) -> Home:
    models = tuple(_entries(session))
    with_evidence = [s for m in models for s in m.sources if s.harvest_id is not None]
    if not with_evidence:
        return Home(models)
    source = random.choice(with_evidence)  # noqa: S311
    rows_by_index = {row.index: row for row in (*_named_by_people(session, source, 12), *_sample(session, source, 12))}
    return Home(models, tuple((source, row) for row in list(rows_by_index.values())[:12]))


def _named_by_people(session: Session, source: SourceCard, n: int) -> list[FeatureRow]:
    """Return up to n features, at random, whose label somebody wrote: the ones worth a first look."""
    written = select(Explanation.index).where(Explanation.source_id == source.id, Explanation.method != "heuristic")
    indices = list(session.scalars(written.distinct().limit(2_000)))
    chosen = random.sample(indices, min(n, len(indices)))
    return [row for row in rows(session, source, chosen).values() if not row.dead and row.label]


def model_entry(session: Session, model_id: str) -> ModelEntry:
    """Return one model with its sources. Raises NotInCatalog with the nearest names."""
    if _SLUG.fullmatch(model_id):
        for entry in _entries(session, Model.id == model_id):
            return entry
    raise _unknown_model(session, model_id)


def entries(session: Session) -> tuple[ModelEntry, ...]:
    return tuple(_entries(session))


def source_card(session: Session, model_id: str, name: str) -> SourceCard:
    """Return one source. Raises NotInCatalog with the nearest names."""
    if _SLUG.fullmatch(model_id) and _SLUG.fullmatch(name):
        found = session.execute(select(Source).where(Source.model_id == model_id, Source.name == name)).scalar()
        if found is not None:
            return card_of(found)
    raise _unknown_source(session, model_id, name)


def trained_by(session: Session, job_id: int, model_id: str, names: Collection[str]) -> tuple[SourceCard, ...]:
    """Return those of a model's sources that a training job put there, in the order of the names."""
    found = session.scalars(select(Source).where(Source.model_id == model_id, Source.name.in_(names)))
    cards = {source.name: card_of(source) for source in found if source.origin.get("job") == job_id}
    return tuple(cards[name] for name in names if name in cards)


def harvests_of(session: Session, source: SourceCard) -> tuple[HarvestCard, ...]:
    """Return all evidence there is of a source, one card a corpus; the one shown by default first."""
    found = session.execute(
        select(Harvest, Corpus)
        .join(Corpus, Corpus.id == Harvest.corpus_id)
        .where(Harvest.source_id == source.id)
        .order_by((Harvest.id == source.harvest_id).desc(), Harvest.id)
    ).all()
    return tuple(card for harvest, corpus in found if (card := _harvest(harvest, corpus)) is not None)


def source_page(session: Session, model_id: str, name: str) -> tuple[ModelCard, SourceCard, HarvestCard | None]:
    """Return a source with its model and the harvest whose evidence is shown, in one query."""
    if _SLUG.fullmatch(model_id) and _SLUG.fullmatch(name):
        row = session.execute(_page_query(), {"model": model_id, "name": name}).first()
        if row is not None:
            return card(row[0]), card_of(row[1]), _harvest(row[2], row[3])
    raise _unknown_source(session, model_id, name)


@lru_cache(maxsize=1)
def _page_query() -> Select[*tuple[Any, ...]]:
    return (
        select(Model, Source, Harvest, Corpus)
        .join(Source, Source.model_id == Model.id)
        .outerjoin(Harvest, Harvest.id == Source.harvest_id)
        .outerjoin(Corpus, Corpus.id == Harvest.corpus_id)
        .where(Model.id == bindparam("model"), Source.name == bindparam("name"))
        .execution_options(**{visibility.ONCE: True})
    )


def default_source(session: Session, model_id: str, layer: int) -> SourceCard:
    """Return the default source of a layer, or its first. Raises NotInCatalog naming the layers there are."""
    if not _SLUG.fullmatch(model_id):
        raise _unknown_model(session, model_id)
    rows = session.execute(
        select(Source)
        .where(Source.model_id == model_id, Source.layer == layer)
        .order_by(Source.is_default.desc(), Source.id)
        .limit(1)
    ).scalars()
    for found in rows:
        return card_of(found)
    raise _unknown_source(session, model_id, str(layer))


def table(session: Session, source: SourceCard, wanted: Filter) -> Table:
    """Return a page of a source's features and how many there are in all; a page past the end is empty."""
    where = _conditions(session, source, wanted)
    start = (wanted.page - 1) * PAGE_SIZE
    page = select(Feature.index).where(*where).order_by(*_order(wanted)).limit(PAGE_SIZE).offset(start)
    if wanted.label or wanted.token or wanted.logit:
        # Texts are looked for row by row: counting on the way saves a second pass.
        counted = session.execute(page.add_columns(func.count().over())).all()
        indices = [row[0] for row in counted]
        total = counted[0][1] if counted else count(session, source, wanted) if start else 0
    else:
        # The page's indices first, so that a page far down the order reads no row but its own.
        indices, total = session.execute(page).scalars().all(), count(session, source, wanted)
    return Table(tuple(rows(session, source, indices).values()), total, wanted)


def count(session: Session, source: SourceCard, wanted: Filter) -> int:
    """Return how many features a filter lets through."""
    where = _conditions(session, source, wanted)
    return session.execute(select(func.count()).select_from(Feature).where(*where)).scalar_one()


def densities(session: Session, source: SourceCard) -> npt.NDArray[np.float64]:
    """Return the density of every latent, [d_sae]; 0 where none is stored."""
    found = np.zeros(source.d_sae)
    query = select(Feature.index, Feature.density).where(Feature.source_id == source.id)
    for row in session.execute(query):
        if row[0] < source.d_sae:
            found[row[0]] = row[1]
    return found


def every_row(session: Session, source: SourceCard, wanted: Filter) -> Iterator[FeatureRow]:
    """Yield all features a filter lets through, in its order, without holding them all."""
    query = select(Feature).where(*_conditions(session, source, wanted)).order_by(*_order(wanted))
    for feature in session.scalars(query.execution_options(yield_per=1000)):
        yield _row(feature)


def random_feature(session: Session, source: SourceCard, wanted: Filter | None = None) -> int:
    """Return a live feature of a source, each equally likely, out of those a filter lets through."""
    if wanted is None or wanted == Filter(sort=wanted.sort, descending=wanted.descending, page=wanted.page):
        for row in _sample(session, source, 1, labelled=False):
            return row.index
    where = [*_conditions(session, source, wanted or Filter())]
    if wanted is None or wanted.kind != "dead":
        where.append(Feature.max_act > 0)
    total = session.execute(select(func.count()).select_from(Feature).where(*where)).scalar_one()
    if not total:
        raise NotInCatalog(
            f"No feature of {source.model_id}/{source.name} fits; loosen the filter.", [(source.path, source.name)]
        )
    offset = random.randrange(total)  # noqa: S311
    return session.execute(
        select(Feature.index).where(*where).order_by(Feature.index).offset(offset).limit(1)
    ).scalar_one()


def random_source(session: Session) -> SourceCard:
    """Return a source that has evidence. Raises NotInCatalog when there is none."""
    rows = session.execute(select(Source).where(Source.harvest_id.is_not(None))).scalars().all()
    if not rows:
        raise NotInCatalog("No SAE has evidence yet. Run `sae-atlas harvest` for one first.", [("/", "Catalog")])
    return card_of(random.choice(rows))  # noqa: S311


def parse_index(text: str) -> int:
    """Return a feature's index from an address. Raises NotInCatalog for anything but a plain number."""
    if not _INDEX.fullmatch(text):
        raise NotInCatalog(f"{text[:40]!r} is no feature: an address ends in a number such as 17.")
    return int(text)


def feature_record(
    session: Session, model_id: str, name: str, index: int, evidence: int | None = None
) -> FeatureRecord:
    """Return one feature with source, harvest and packed evidence, in one query. Raises NotInCatalog.

    evidence is the id of one of the source's harvests; without it, the one shown by default is read. Density and
    label in the feature's row are the default's: the blob has those of the other.
    """
    if _SLUG.fullmatch(model_id) and _SLUG.fullmatch(name) and 0 <= index < 2**31:
        asked = {"model": model_id, "name": name, "latent": index, "evidence": evidence}
        row = session.execute(_record_query(evidence is None), asked).first()
        if row is not None and index < row.source.d_sae:
            source = card_of(row.source)
            said = {name: value for name in _SAID if (value := getattr(row.harvest, name)) is not None}
            harvest = _harvest(row.harvest, row.corpus, said) if row.harvest.id is not None else None
            if evidence is not None and harvest is None:
                raise NotInCatalog(
                    f"{source.path} has no evidence {evidence}; it may have been replaced.",
                    [(f"{source.path}/{index}", f"{source.path}/{index}")],
                )
            figures = (
                FeatureRow(*row.feature) if row.feature[0] is not None else FeatureRow(index, "", 0.0, 0.0, "", "")
            )
            return FeatureRecord(ModelCard.model_validate(row.card), source, harvest, figures, row.blob, row.effects)
        if row is not None:
            raise past_the_end(card_of(row.source), index)
    raise _unknown_source(session, model_id, name, index)


@lru_cache(maxsize=2)
def _record_query(shown: bool) -> Select[*tuple[Any, ...]]:
    """The query of a feature's record, made once: putting it together takes as long as running it.

    It asks for columns, not for objects, and of the harvest's distributions only for what is said of each feature:
    half of the time went there.
    """
    latent = bindparam("latent", type_=Integer())
    chosen = (Harvest.id == bindparam("evidence")) & (Harvest.source_id == Source.id)
    summary = [Harvest.summary[name].label(name) for name in _SAID]
    return (
        select(
            Model.card,
            Bundle("source", *_columns(Source)),
            Bundle("harvest", *_columns(Harvest, "summary"), *summary),
            Bundle("corpus", Corpus.id, Corpus.name, Corpus.hash, Corpus.about),
            Bundle("feature", *(getattr(Feature, name) for name in FeatureRow.__dataclass_fields__)),
            Evidence.blob,
            Evidence.effects,
        )
        .select_from(Model)
        .join(Source, Source.model_id == Model.id)
        .outerjoin(Harvest, Harvest.id == Source.harvest_id if shown else chosen)
        .outerjoin(Corpus, Corpus.id == Harvest.corpus_id)
        .outerjoin(Feature, (Feature.source_id == Source.id) & (Feature.index == latent))
        .outerjoin(Evidence, (Evidence.harvest_id == Harvest.id) & (Evidence.index == latent))
        .where(Model.id == bindparam("model"), Source.name == bindparam("name"))
        .execution_options(**{visibility.ONCE: True})
    )


def _columns(table: type[Source] | type[Harvest], *without: str) -> list[InstrumentedAttribute[Any]]:
    return [getattr(table, a.key) for a in table.__mapper__.column_attrs if a.key not in without]


def rows(session: Session, source: SourceCard, indices: Collection[int]) -> dict[int, FeatureRow]:
    """Return features of a source by index, in the order asked for, in as few queries as parameter limits allow."""
    wanted = list(dict.fromkeys(indices))
    found: dict[int, FeatureRow] = {}
    for start in range(0, len(wanted), 5000):
        chunk = select(Feature).where(Feature.source_id == source.id, Feature.index.in_(wanted[start : start + 5000]))
        found |= {feature.index: _row(feature) for feature in session.execute(chunk).scalars()}
    return {index: found[index] for index in wanted if index in found}


def sae_ref(settings: Settings, source: SourceCard) -> SaeRef:
    """Return what the worker loads. Raises NoWeights for a source that came as evidence only."""
    if not source.has_weights:
        raise NoWeights(
            f"No weights here: browsing only. {source.model_id}/{source.name} was imported as evidence; "
            "add the SAE with `sae-atlas sae add` under another set name to compute with it."
        )
    return SaeRef(id=f"{source.model_id}/{source.name}", path=str(settings.sae_dir(source.sae_hash)))


def model_ref(settings: Settings, model_id: str) -> ModelRef:
    """Return what the worker loads. Raises NoWeights for a model that is only described."""
    if not has_model_weights(settings, model_id):
        raise NoWeights(
            f"No weights here: browsing only. Install {model_id} with `sae-atlas model add ... --id {model_id}` "
            "to compute with it."
        )
    return ModelRef(id=model_id, path=str(settings.model_dir(model_id)))


def has_model_weights(settings: Settings, model_id: str) -> bool:
    """Tell whether a model has a directory, or is only known from an import."""
    return settings.model_dir(model_id).is_dir()


def vocabulary_of(settings: Settings, model_id: str) -> Vocabulary:
    """Return the tokens of an installed or bundled model. Raises NoWeights for one known from imports only."""
    path = settings.model_dir(model_id) / "vocabulary.json"
    if not path.is_file():
        model_ref(settings, model_id)
    return vocabulary(path)


def words_of(settings: Settings, model_id: str, harvest: HarvestCard | None) -> Vocabulary:
    """Return the tokens that some evidence speaks of: its own where it was imported, else the model's."""
    if harvest is not None and harvest.imported:
        return vocabulary(tokens_dir(settings, harvest.corpus_hash, harvest.tokenizer_hash) / VOCABULARY)
    return vocabulary_of(settings, model_id)


def card(model: Model) -> ModelCard:
    return ModelCard.model_validate(model.card)


def _entries(session: Session, *where: ColumnElement[bool]) -> list[ModelEntry]:
    models = session.execute(select(Model).where(*where).order_by(Model.name)).scalars().all()
    if not models:
        return []
    ids = [model.id for model in models]
    found = session.execute(
        select(Source).where(Source.model_id.in_(ids)).order_by(Source.layer, Source.is_default.desc(), Source.name)
    ).scalars()
    by_model: dict[str, list[SourceCard]] = {}
    for source in found:
        by_model.setdefault(source.model_id, []).append(card_of(source))
    return [ModelEntry(card(model), tuple(by_model.get(model.id, ()))) for model in models]


def card_of(source: Source) -> SourceCard:
    """Return a source's row as pages take it."""
    return SourceCard(
        id=source.id,
        model_id=source.model_id,
        name=source.name,
        layer=source.layer,
        set_name=source.set_name,
        is_default=source.is_default,
        sae_hash=source.sae_hash,
        architecture=source.architecture,
        hook_name=source.hook_name,
        d_in=source.d_in,
        d_sae=source.d_sae,
        config=source.config,
        metrics=source.metrics,
        origin=source.origin,
        harvest_id=source.harvest_id,
        created_at=source.created_at.isoformat(),
        owner=source.owner,
        visibility=source.visibility,
        link=source.link,
        description=source.description,
        replaced_by=source.replaced_by,
    )


def _harvest(
    harvest: Harvest | None, corpus: Corpus | None, summary: Mapping[str, Any] | None = None
) -> HarvestCard | None:
    if harvest is None or corpus is None:
        return None
    return HarvestCard(
        id=harvest.id,
        corpus=corpus.name,
        corpus_hash=corpus.hash,
        about=corpus.about,
        tokenizer_hash=harvest.tokenizer_hash,
        context_size=harvest.context_size,
        bos_token_id=harvest.bos_token_id,
        n_tokens=harvest.n_tokens,
        summary=harvest.summary if summary is None else summary,
        created_at=harvest.created_at.isoformat(),
        state=harvest.state,
        job_id=harvest.job_id,
        activations=harvest.activations,
    )


def _row(feature: Feature) -> FeatureRow:
    return FeatureRow(
        feature.index, feature.label, feature.density, feature.max_act, feature.top_token, feature.top_logit
    )


def like(column: ColumnElement[str] | Any, text: str) -> ColumnElement[bool]:
    """Return a condition: the text occurs in the column, whatever wildcards or case it holds."""
    return _holds(func.lower(column), text.lower().replace("\0", ""))


def _holds(column: ColumnElement[str] | InstrumentedAttribute[str], text: str) -> ColumnElement[bool]:
    escaped = re.sub(r"([\\%_])", r"\\\1", text)
    return column.like(f"%{escaped}%", escape="\\")


def parse_ranges(text: str) -> list[tuple[int, int]]:
    """Return `3,7-12` as pairs of first and last. Raises BadInput for what is no such list, or a very long one."""
    if not _RANGES.fullmatch(text):
        raise BadInput(f"{text[:40]!r} is no list of features: write numbers and ranges such as 3,7-12.")
    parts = [part.partition("-") for part in text.split(",")]
    long = sum(1 for first, _, last in parts if last and int(last) - int(first) >= _SHORT)
    if len(parts) > _MAX_RANGES or long > _MAX_LONG_RANGES:
        raise BadInput(
            f"The list has {len(parts):,} ranges of features, {long:,} of them long; up to {_MAX_RANGES:,} and "
            f"{_MAX_LONG_RANGES} are looked up at once."
        )
    return [(int(first), int(last or first)) for first, _, last in parts]


def ranges(indices: Collection[int]) -> str:
    """Return indices as `3,7-12`, the shortest list that parse_ranges reads."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and runs[-1][1] == index - 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _order(wanted: Filter) -> tuple[ColumnElement[Any] | UnaryExpression[Any], ...]:
    columns: dict[Sort, Any] = {
        "index": Feature.index,
        "density": Feature.density,
        "max": Feature.max_act,
        "label": Feature.label,
        "token": Feature.top_token,
        "logit": Feature.top_logit,
    }
    column = columns[wanted.sort]
    return (column.desc() if wanted.descending else column.asc(), Feature.index.asc())


def _conditions(session: Session, source: SourceCard, wanted: Filter) -> list[ColumnElement[bool]]:
    where: list[ColumnElement[bool]] = [Feature.source_id == source.id]
    if wanted.label:
        where.append(like(Feature.label, wanted.label))
    if wanted.token:
        where.append(_worded(session, source, WordKind.TOKENS, wanted.token))
    if wanted.logit:
        where.append(_worded(session, source, WordKind.LOGITS, wanted.logit))
    where += _bounds(wanted)
    if wanted.labelled:
        where.append(Feature.label != "" if wanted.labelled == "yes" else Feature.label == "")
    if wanted.features:
        where.append(_among(session, parse_ranges(wanted.features)))
    if wanted.cluster is not None:
        where.append(_one_of(session, maps.members(session, source.id, wanted.cluster)))
    if wanted.around:
        where.append(_one_of(session, maps.around(session, source.id, wanted.around)))
    kinds: dict[Kind, ColumnElement[bool]] = {
        "live": Feature.max_act > 0,
        "labelled": Feature.label != "",
        "dense": Feature.density > DENSE,
        "dead": Feature.max_act <= 0,
    }
    return [*where, kinds[wanted.kind]] if wanted.kind in kinds else where


def _bounds(wanted: Filter) -> Iterator[ColumnElement[bool]]:
    for attribute, least, most in (
        (Feature.density, wanted.min_density, wanted.max_density),
        (Feature.max_act, wanted.min_act, wanted.max_act),
    ):
        # A text is looked for in all rows anyway: reading them in the order of an index would only take longer.
        column = attribute + 0.0 if wanted.label or wanted.token or wanted.logit else attribute.expression
        if least is not None:
            yield column >= least
        if most is not None:
            yield column <= most


def _worded(session: Session, source: SourceCard, kind: WordKind, text: str) -> ColumnElement[bool]:
    text = wording.wanted(text)
    if session.execute(select(wording.gathered(source.id))).scalar():
        words = select(FeatureWords.index).where(FeatureWords.source_id == source.id, FeatureWords.kind == kind)
        return Feature.index.in_(words.where(_holds(FeatureWords.text, text)))
    # A source whose words were not gathered yet is searched by what its rows show.
    shown = Feature.top_token if kind == WordKind.TOKENS else Feature.top_logit
    return _holds(wording.SEPARATOR + func.lower(shown) + wording.SEPARATOR, text)


def _among(session: Session, wanted: list[tuple[int, int]]) -> ColumnElement[bool]:
    # Short ranges as numbers: SQLite's expressions may not be a thousand conditions deep.
    single = [index for first, last in wanted if last - first < _SHORT for index in range(first, last + 1)]
    wide = [Feature.index.between(first, last) for first, last in wanted if last - first >= _SHORT]
    return or_(_one_of(session, single), *wide)


def _one_of(session: Session, indices: list[int]) -> ColumnElement[bool]:
    """Return a condition on any number of indices, as one parameter: statements hold no more than some ten thousand."""
    if session.get_bind().dialect.name == "sqlite":
        return Feature.index.in_(select(func.json_each(json.dumps(indices)).table_valued("value").c.value))
    return Feature.index == any_(literal(indices, ARRAY(Integer)))


def _sample(session: Session, source: SourceCard, n: int, *, labelled: bool = True) -> list[FeatureRow]:
    """Return up to n live features at random indices; cheap however wide the SAE is, since few latents are dead."""
    indices = random.sample(range(source.d_sae), min(source.d_sae, 8 * n + 32))
    found = [row for row in rows(session, source, indices).values() if not row.dead]
    if labelled:
        found = [row for row in found if row.label] or found
    random.shuffle(found)
    return found[:n]


def past_the_end(source: SourceCard, index: int) -> NotInCatalog:
    """Return the error for an index that is not below d_sae."""
    last = source.d_sae - 1
    return NotInCatalog(
        f"{source.model_id}/{source.name} has {source.d_sae} features, 0 to {last}; there is no feature {index}.",
        [(f"{source.path}/{last}", f"Feature {last}"), (source.path, f"All features of {source.name}")],
    )


def _unknown_model(session: Session, model_id: str) -> NotInCatalog:
    names = list(session.execute(select(Model.id).order_by(Model.id)).scalars())
    near = difflib.get_close_matches(model_id[:200], names, _NEAR, 0.3) or names[:_NEAR]
    return NotInCatalog(
        f"No model is called {model_id[:60]!r}."
        if names
        else "The catalog is empty. Run `sae-atlas demo`, or `sae-atlas model add`.",
        [(f"/{name}", name) for name in near] or [("/", "Catalog")],
    )


def _unknown_source(session: Session, model_id: str, name: str, index: int | None = None) -> NotInCatalog:
    usable = _SLUG.fullmatch(model_id) is not None
    known = usable and session.execute(select(Model.id).where(Model.id == model_id)).scalar() is not None
    if not known:
        return _unknown_model(session, model_id)
    names = list(
        session.execute(
            select(Source.name).where(Source.model_id == model_id).order_by(Source.layer, Source.name)
        ).scalars()
    )
    near = difflib.get_close_matches(name[:200], names, _NEAR, 0.3) or names[:_NEAR]
    end = "" if index is None else f"/{index}"
    return NotInCatalog(
        f"{model_id} has no SAE called {name[:60]!r}.",
        [(f"/{model_id}/{n}{end}", f"{model_id}/{n}{end}") for n in near] or [(f"/{model_id}", model_id)],
    )
