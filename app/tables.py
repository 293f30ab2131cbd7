"""The catalog's tables (SQLAlchemy 2 declarative). Queries live in the verb modules; migrations/ builds the schema."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from sqlalchemy import JSON, BigInteger, DateTime, Float, ForeignKey, Index, LargeBinary, MetaData, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """Times are stored in UTC and come back aware, also on SQLite, which forgets the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    return datetime.now(UTC)


class Table(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


Key = Annotated[int, mapped_column(primary_key=True)]
Slug = Annotated[str, mapped_column(String(200))]
Hash = Annotated[str, mapped_column(String(64))]
Moment = Annotated[datetime, mapped_column(UtcDateTime, default=now)]
LaterMoment = Annotated[datetime | None, mapped_column(UtcDateTime)]
Payload = Annotated[dict[str, Any], mapped_column(JSON, default=dict)]
LongText = Annotated[str, mapped_column(Text)]


class Owned:
    """The columns of what somebody owns and may show to others (app.visibility)."""

    owner: Mapped[str] = mapped_column(String(200), default="", server_default="")
    """Name of the person whose it is; empty for what nobody claimed."""
    visibility: Mapped[str] = mapped_column(String(10), default="team", server_default="team")
    """visibility.Visibility"""
    link: Mapped[str] = mapped_column(String(32), default="", server_default="")
    """The secret of its public link; empty while it has none."""


class Binned:
    """The column of what can be deleted and restored (app.trash)."""

    trash_id: Mapped[int | None] = mapped_column(ForeignKey("trash.id"))
    """Its entry in the trash; None for what stands."""


class Trash(Table):
    """Something that was deleted and can be restored for a while."""

    __tablename__ = "trash"

    id: Mapped[Key]
    kind: Mapped[str] = mapped_column(String(20))
    """trash.Kind"""
    key: Mapped[str] = mapped_column(String(40))
    """Its primary key, as text."""
    name: Mapped[Slug]
    """What people called it."""
    owner: Mapped[Slug]
    deleted_by: Mapped[Slug]
    deleted_at: Mapped[Moment]
    details: Mapped[Payload]
    """What restoring gives back besides: the name that was freed."""


class Model(Table):
    """A language model whose directory lies under the data directory."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(200), primary_key=True)
    name: Mapped[Slug]
    hash: Mapped[Hash]
    """sha256 of the weights; evidence and steering runs name it."""
    card: Mapped[Payload]
    """protocol.ModelCard as JSON: sizes, tokenizer, hooks."""
    created_at: Mapped[Moment]
    sources: Mapped[list[Source]] = relationship(back_populates="model", lazy="raise")


class Source(Owned, Binned, Table):
    """An SAE in its place in a model: `{layer}-{set}`."""

    __tablename__ = "sources"
    __table_args__ = (Index("uq_sources_model_id_name", "model_id", "name", unique=True),)

    id: Mapped[Key]
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    name: Mapped[Slug]
    """`12-demo`: the source id of URLs and of the JSON API."""
    layer: Mapped[int]
    set_name: Mapped[Slug]
    is_default: Mapped[bool] = mapped_column(default=False)
    """Where `/{model}/{layer}/{index}` leads when a layer has several."""
    sae_hash: Mapped[Hash]
    """Names the directory of the weights under saes/."""
    architecture: Mapped[Slug]
    hook_name: Mapped[Slug]
    d_in: Mapped[int]
    d_sae: Mapped[int]
    config: Mapped[Payload]
    """cfg.json as stored with the weights."""
    metrics: Mapped[Payload]
    """What evaluate found: l0, explained_variance, ce_loss_score, ... and the tokens seen."""
    origin: Mapped[Payload]
    """Lineage: how and from what it was trained or fetched."""
    harvest_id: Mapped[int | None] = mapped_column(ForeignKey("harvests.id", use_alter=True))
    """The evidence shown by default."""
    created_at: Mapped[Moment]
    description: Mapped[LongText] = mapped_column(Text, default="", server_default="")
    """What it is, in Markdown."""
    replaced_by: Mapped[str] = mapped_column(String(200), default="", server_default="")
    """Name of its newer version in the same model; empty while there is none."""
    model: Mapped[Model] = relationship(back_populates="sources", lazy="raise")
    harvest: Mapped[Harvest | None] = relationship(foreign_keys=[harvest_id], lazy="raise")


class SourceTag(Table):
    """A word that people choose SAEs by."""

    __tablename__ = "source_tags"

    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"), primary_key=True, autoincrement=False)
    tag: Mapped[str] = mapped_column(String(40), primary_key=True, index=True)


class SourceStar(Table):
    """Somebody's favourite."""

    __tablename__ = "source_stars"

    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"), primary_key=True, autoincrement=False)
    who: Mapped[str] = mapped_column(String(200), primary_key=True, index=True)
    created_at: Mapped[Moment]


class SourceVisit(Table):
    """Somebody looked at an SAE, or used it, on a day."""

    __tablename__ = "source_visits"
    __table_args__ = (Index("ix_source_visits_who", "who", "day"),)

    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"), primary_key=True, autoincrement=False)
    who: Mapped[str] = mapped_column(String(200), primary_key=True)
    day: Mapped[str] = mapped_column(String(10), primary_key=True)
    """In UTC, as 2026-11-25."""
    kind: Mapped[str] = mapped_column(String(10), primary_key=True)
    """cards.Visit"""


class Corpus(Binned, Table):
    """A text corpus; its documents and token streams lie under corpora/{hash}/."""

    __tablename__ = "corpora"

    id: Mapped[Key]
    name: Mapped[str] = mapped_column(String(200), unique=True)
    hash: Mapped[Hash]
    n_documents: Mapped[int]
    n_chars: Mapped[int] = mapped_column(BigInteger)
    about: Mapped[LongText]
    """Where it comes from, in words."""
    licence: Mapped[LongText] = mapped_column(Text, default="", server_default="")
    origin: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict, server_default="{}")
    """How it came here: file or dataset, columns, limits."""
    owner: Mapped[str] = mapped_column(String(200), default="", server_default="")
    """Name of the person who added it; empty for what nobody claimed."""
    created_at: Mapped[Moment]


class HarvestState(StrEnum):
    PARTIAL = "partial"
    """Evidence of the shards read so far; it grows."""
    COMPLETE = "complete"


class Harvest(Table):
    """Evidence of one source from one corpus: what was read, and the distributions over all features."""

    __tablename__ = "harvests"

    id: Mapped[Key]
    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"), index=True)
    corpus_id: Mapped[int] = mapped_column(ForeignKey("corpora.id"))
    tokenizer_hash: Mapped[Hash]
    context_size: Mapped[int]
    bos_token_id: Mapped[int | None]
    """The token put before every context, or None."""
    n_tokens: Mapped[int] = mapped_column(BigInteger)
    """Tokens whose activations were counted (first positions excluded)."""
    summary: Mapped[Payload]
    """Density histogram and other distributions over the SAE; `progress` {done, total} in shards while partial."""
    state: Mapped[str] = mapped_column(String(20), default=HarvestState.COMPLETE)
    job_id: Mapped[int | None]
    """The job that gathers or gathered it; None for imported evidence."""
    activations: Mapped[Slug] = mapped_column(default="")
    """Directory under activations/ where its sparse activations were kept; empty when they were not."""
    created_at: Mapped[Moment]
    corpus: Mapped[Corpus] = relationship(lazy="raise")


class Feature(Table):
    """What lists of features show and sort by. One row per latent, on SQLite in the order of the key."""

    __tablename__ = "features"
    __table_args__ = (
        Index("ix_features_density", "source_id", "density"),
        Index("ix_features_max_act", "source_id", "max_act"),
        {"sqlite_with_rowid": False},
    )

    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"), primary_key=True)
    index: Mapped[int] = mapped_column("latent", primary_key=True, autoincrement=False)
    density: Mapped[float] = mapped_column(Float)
    """Fraction of tokens on which it is active."""
    max_act: Mapped[float] = mapped_column(Float)
    label: Mapped[LongText]
    """The text of the best explanation; empty when there is none."""
    top_token: Mapped[Slug]
    """The token of its highest activation, as shown."""
    top_logit: Mapped[Slug]
    """The output token it promotes most, as shown."""


class WordKind(StrEnum):
    TOKENS = "tokens"
    """Those its top examples are active on."""
    LOGITS = "logits"
    """The output tokens it promotes most."""


class FeatureWords(Table):
    """What tables of features are filtered by token with (app.wording).

    Apart from the features, whose rows stay so short that filters by label and density read little, and stored in the
    order of the key, so that looking through the words of one source reads nothing else.
    """

    __tablename__ = "feature_words"
    __table_args__ = ({"sqlite_with_rowid": False},)

    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"), primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(20), primary_key=True)
    """A WordKind."""
    index: Mapped[int] = mapped_column("latent", primary_key=True, autoincrement=False)
    text: Mapped[LongText]
    """Tokens in lower case between separators."""


class Evidence(Table):
    """The blob of app.evidence for one feature of one harvest."""

    __tablename__ = "evidence"

    harvest_id: Mapped[int] = mapped_column(ForeignKey("harvests.id"), primary_key=True)
    index: Mapped[int] = mapped_column("latent", primary_key=True, autoincrement=False)
    blob: Mapped[bytes] = mapped_column(LargeBinary)
    effects: Mapped[bytes | None] = mapped_column(LargeBinary)
    """The causal effects of its top examples (evidence.unpack_effects); None where they were not measured."""


class FeatureMap(Table):
    """A 2-D map of a source's decoder directions (app.maps)."""

    __tablename__ = "feature_maps"

    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"), primary_key=True, autoincrement=False)
    sae_hash: Mapped[Hash]
    """The weights it was drawn from."""
    coordinates: Mapped[bytes] = mapped_column(LargeBinary)
    """float32 LE [d_sae, 2]"""
    cluster: Mapped[bytes] = mapped_column(LargeBinary)
    """u16 LE [d_sae]; 65535 is no cluster."""
    clusters: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
    """[{"name", "x", "y", "n"}], in the order of their numbers."""
    about: Mapped[Payload]
    """How it was made: method, seed, parameters."""
    created_at: Mapped[Moment]


class SourceMatch(Table):
    """For every feature of a source the nearest features of another source of the same model (app.matches)."""

    __tablename__ = "source_matches"

    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"), primary_key=True, autoincrement=False)
    other_id: Mapped[int] = mapped_column(ForeignKey("sources.id"), primary_key=True, autoincrement=False)
    hashes: Mapped[Slug]
    """Hash of both SAEs, `{source}:{other}`: a match of replaced weights is stale."""
    n: Mapped[int]
    """Nearest features of each."""
    indices: Mapped[bytes] = mapped_column(LargeBinary)
    """u32 LE [d_sae, n], nearest first"""
    cosines: Mapped[bytes] = mapped_column(LargeBinary)
    """float16 LE [d_sae, n]"""
    created_at: Mapped[Moment]


class Explanation(Table):
    __tablename__ = "explanations"
    __table_args__ = (Index("ix_explanations_feature", "source_id", "latent"),)

    id: Mapped[Key]
    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"))
    index: Mapped[int] = mapped_column("latent")
    text: Mapped[LongText]
    method: Mapped[Slug]
    """`heuristic` for the automatic labels, a method name or `human` otherwise."""
    author: Mapped[Slug]
    created_at: Mapped[Moment]
    n_votes: Mapped[int] = mapped_column(default=0, server_default="0")
    """How many people find it right; kept with the votes."""


class Embedding(Table):
    """The meaning of one text as a unit vector, for search; the same text anywhere has one row."""

    __tablename__ = "embeddings"

    text_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    """app.meaning.text_hash of the text."""
    model: Mapped[str] = mapped_column(String(200), primary_key=True)
    """The embedding model that made it; vectors of different models do not compare."""
    vector: Mapped[bytes] = mapped_column(LargeBinary)
    """float16, little-endian."""


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    """Stopped on request, to be resumed."""

    @property
    def ended(self) -> bool:
        """Nobody works on it, nor will without being asked to."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


class Job(Owned, Table):
    """A durable job as people see it; dbos keeps its steps under `workflow_id`."""

    __tablename__ = "jobs"

    id: Mapped[Key]
    kind: Mapped[Slug]
    title: Mapped[Slug]
    spec: Mapped[Payload]
    state: Mapped[str] = mapped_column(String(20), default=JobState.QUEUED, index=True)
    done: Mapped[float] = mapped_column(Float, default=0.0)
    """Share of the work done, 0..1."""
    status: Mapped[LongText] = mapped_column(Text, default="")
    """The latest line of progress, with its numbers."""
    error: Mapped[LongText] = mapped_column(Text, default="")
    result: Mapped[Payload]
    """Where the outcome is: {"url": ...}, metrics."""
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    pause_requested: Mapped[bool] = mapped_column(default=False)
    workflow_id: Mapped[Slug]
    executor: Mapped[str] = mapped_column(String(200), default="")
    """Which trainer works on it."""
    owner: Mapped[str] = mapped_column(String(200), default="", index=True)
    """Whose job it is. Owners take turns; until there are accounts, a name that each process is set up with."""
    priority: Mapped[int] = mapped_column(default=0)
    """Among the jobs of its owner, higher ones start first."""
    run_next: Mapped[bool] = mapped_column(default=False)
    """Starts before everything else that waits; one job at most has the mark."""
    created_at: Mapped[Moment]
    started_at: Mapped[LaterMoment]
    ended_at: Mapped[LaterMoment]


class JobMetric(Table):
    """One point of a job's curves; written again without harm when a step is repeated."""

    __tablename__ = "job_metrics"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    values: Mapped[Payload]


class JobLine(Table):
    """A line of a job's log."""

    __tablename__ = "job_lines"
    __table_args__ = (Index("ix_job_lines_job", "job_id", "id"),)

    id: Mapped[Key]
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"))
    at: Mapped[Moment]
    level: Mapped[str] = mapped_column(String(20))
    text: Mapped[LongText]


class JobShare(Table):
    """A part of a job's work that any trainer may do, claimed by one of them."""

    __tablename__ = "job_shares"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    executor: Mapped[Slug]
    """Whose it is; a silent trainer's share may be taken over."""
    done: Mapped[bool] = mapped_column(default=False)


class Beat(Table):
    """The sign of life of a trainer process."""

    __tablename__ = "beats"

    executor: Mapped[str] = mapped_column(String(200), primary_key=True)
    host: Mapped[Slug]
    pid: Mapped[int]
    at: Mapped[datetime] = mapped_column(UtcDateTime)
    job_id: Mapped[int | None]


class PromptRun(Table):
    """A prompt kept under an address: what was asked, and of which weights."""

    __tablename__ = "prompt_runs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    request: Mapped[Payload]
    """The page's parameters: {name: [values]}."""
    hashes: Mapped[Payload]
    """{source name: hash of its weights} at the time."""
    created_at: Mapped[Moment]


class SteeringRun(Owned, Binned, Table):
    """A finished steering run, so that its address replays it."""

    __tablename__ = "steering_runs"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"))
    request: Mapped[Payload]
    result: Mapped[Payload]
    created_at: Mapped[Moment]


class SteeringPreset(Table):
    """Features with strengths and settings under a name, to start from or to share."""

    __tablename__ = "steering_presets"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    name: Mapped[Slug]
    settings: Mapped[Payload]
    """What the steering page's form holds."""
    created_at: Mapped[Moment]


class SteeringVector(Owned, Binned, Table):
    """A direction that belongs to no SAE: uploaded, or a mean difference of two sets of texts."""

    __tablename__ = "steering_vectors"

    id: Mapped[Key]
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), index=True)
    layer: Mapped[int]
    hook_name: Mapped[Slug]
    label: Mapped[Slug]
    default_strength: Mapped[float] = mapped_column(Float)
    values: Mapped[bytes] = mapped_column(LargeBinary)
    """float32, little-endian."""
    about: Mapped[LongText]
    """How it was made."""
    created_at: Mapped[Moment]


class Person(Table):
    """Somebody with an account; only in team mode."""

    __tablename__ = "people"

    id: Mapped[Key]
    name: Mapped[str] = mapped_column(String(64), unique=True)
    """Lower case; signs in with it and is shown by it."""
    password_hash: Mapped[LongText]
    """argon2id with its parameters and salt."""
    role: Mapped[str] = mapped_column(String(20))
    """people.Role"""
    created_at: Mapped[Moment]
    disabled_at: Mapped[LaterMoment]
    """Since when the account signs nobody in; what it owns stays."""


class Identity(Table):
    """Who a person is at an OpenID Connect provider, or to a proxy that signs people in."""

    __tablename__ = "identities"
    __table_args__ = (Index("uq_identities_issuer_subject", "issuer", "subject", unique=True),)

    id: Mapped[Key]
    person_id: Mapped[int] = mapped_column(ForeignKey("people.id"), index=True)
    issuer: Mapped[Slug]
    """The provider's address, or identities.PROXY."""
    subject: Mapped[Slug]
    """The provider's own name for the person, which never changes."""
    email: Mapped[str] = mapped_column(String(320), default="")
    created_at: Mapped[Moment]


class SignIn(Table):
    """A sign-in that has gone to a provider and may come back, to whichever web process."""

    __tablename__ = "sign_ins"

    state_hash: Mapped[str] = mapped_column(String(64), primary_key=True)
    browser_hash: Mapped[Hash]
    data: Mapped[Payload]
    next: Mapped[LongText]
    invitation: Mapped[Slug] = mapped_column(default="")
    person_id: Mapped[int | None] = mapped_column(ForeignKey("people.id"))
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)


class Remote(Table):
    """A folder or web address of bundles that is subscribed to (app.remotes)."""

    __tablename__ = "remotes"

    id: Mapped[Key]
    name: Mapped[str] = mapped_column(String(64), unique=True)
    place: Mapped[LongText]
    added_by: Mapped[str] = mapped_column(String(64), default="")
    created_at: Mapped[Moment]
    listing: Mapped[list[dict[str, Any]]] = mapped_column(JSON, default=list)
    """remotes.Entry of each bundle, as of `checked_at`."""
    imported: Mapped[Payload]
    """Path of a bundle -> sha256 of the manifest whose import was asked for last."""
    checked_at: Mapped[LaterMoment]
    problem: Mapped[str] = mapped_column(Text, default="")
    """Why it could not be listed the last time."""


class Invitation(Table):
    """A link by which one person makes an account. Its secret is shown once; here lies the sha256."""

    __tablename__ = "invitations"

    id: Mapped[Key]
    secret_hash: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(20))
    invited_by: Mapped[str] = mapped_column(String(64), default="")
    """Name of the admin, or empty when it was made on the command line."""
    created_at: Mapped[Moment]
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    used_by: Mapped[int | None] = mapped_column(ForeignKey("people.id"))


class Login(Table):
    """A browser that is signed in. The cookie holds the secret, this table its sha256."""

    __tablename__ = "logins"

    id: Mapped[Key]
    person_id: Mapped[int] = mapped_column(ForeignKey("people.id"), index=True)
    secret_hash: Mapped[str] = mapped_column(String(64), unique=True)
    browser: Mapped[Slug]
    address: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[Moment]
    seen_at: Mapped[Moment]
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ApiToken(Table):
    """A key for programs that act for a person, never beyond the person's role."""

    __tablename__ = "api_tokens"

    id: Mapped[Key]
    person_id: Mapped[int] = mapped_column(ForeignKey("people.id"), index=True)
    name: Mapped[str] = mapped_column(String(100))
    secret_hash: Mapped[str] = mapped_column(String(64), unique=True)
    start: Mapped[str] = mapped_column(String(16))
    """Its first characters, to tell tokens apart."""
    role: Mapped[str] = mapped_column(String(20))
    """The most it may do: people.Role."""
    created_at: Mapped[Moment]
    expires_at: Mapped[LaterMoment]
    used_at: Mapped[LaterMoment]


class FailedLogins(Table):
    """Wrong passwords of late, by name and by address: every web process counts here."""

    __tablename__ = "failed_logins"

    key: Mapped[str] = mapped_column(String(160), primary_key=True)
    n: Mapped[int]
    since: Mapped[datetime] = mapped_column(UtcDateTime)


class FeatureList(Binned, Table):
    """Features somebody put together, in an order, under an address."""

    __tablename__ = "feature_lists"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    """Random: who has the address of a list that is shared by link may see it."""
    name: Mapped[Slug]
    description: Mapped[LongText]
    test_text: Mapped[LongText]
    """Tried on all features when the list is opened; may be empty."""
    owner: Mapped[Slug]
    """Name of the person who made it."""
    visibility: Mapped[str] = mapped_column(String(10))
    """lists.Visibility"""
    created_at: Mapped[Moment]
    updated_at: Mapped[Moment]


class ListedFeature(Table):
    """A feature in a list, by its address: it stays when its SAE is removed and comes back with it."""

    __tablename__ = "listed_features"
    __table_args__ = (Index("ix_listed_features_feature", "model_id", "source", "latent"),)

    list_id: Mapped[str] = mapped_column(ForeignKey("feature_lists.id"), primary_key=True)
    model_id: Mapped[str] = mapped_column(String(200), primary_key=True)
    source: Mapped[str] = mapped_column(String(200), primary_key=True)
    index: Mapped[int] = mapped_column("latent", primary_key=True, autoincrement=False)
    position: Mapped[int]
    note: Mapped[LongText]


class Comment(Table):
    """What somebody said about a feature or a list, under its address."""

    __tablename__ = "comments"

    id: Mapped[Key]
    subject: Mapped[str] = mapped_column(String(500), index=True)
    """`/{model}/{source}/{index}` or `/lists/{id}`."""
    author: Mapped[Slug]
    text: Mapped[LongText]
    created_at: Mapped[Moment]


class Mention(Table):
    """Somebody is named in a comment."""

    __tablename__ = "mentions"
    __table_args__ = (Index("ix_mentions_who", "who", "comment_id"),)

    comment_id: Mapped[int] = mapped_column(ForeignKey("comments.id"), primary_key=True, autoincrement=False)
    who: Mapped[str] = mapped_column(String(64), primary_key=True)
    seen_at: Mapped[LaterMoment]


class Bookmark(Table):
    """A feature somebody wants to find again, by its address."""

    __tablename__ = "bookmarks"

    who: Mapped[str] = mapped_column(String(200), primary_key=True)
    model_id: Mapped[str] = mapped_column(String(200), primary_key=True)
    source: Mapped[str] = mapped_column(String(200), primary_key=True)
    index: Mapped[int] = mapped_column("latent", primary_key=True, autoincrement=False)
    created_at: Mapped[Moment]


class SourceSet(Table):
    """A set that somebody announced over the API, to send evidence of its sources in batches."""

    __tablename__ = "source_sets"

    model_id: Mapped[str] = mapped_column(ForeignKey("models.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    description: Mapped[LongText]
    url: Mapped[str] = mapped_column(String(500))
    owner: Mapped[Slug]
    created_at: Mapped[Moment]


class AuditEntry(Table):
    """Something a person changed, in team mode. Written when the change was answered as done, and never changed."""

    __tablename__ = "audit"
    __table_args__ = (Index("ix_audit_who", "who", "id"),)

    id: Mapped[Key]
    at: Mapped[Moment]
    who: Mapped[Slug]
    key: Mapped[bool]
    """Whether an API key acted for the person."""
    action: Mapped[Slug]
    """Method and route, such as `POST /{model}/{source}/remove`."""
    path: Mapped[str] = mapped_column(String(500))
    """What it was done to: the address asked for, or of the thing that a form or a program named."""
    address: Mapped[str] = mapped_column(String(64))


class ExplanationVote(Table):
    """Somebody finds an explanation right."""

    __tablename__ = "explanation_votes"

    explanation_id: Mapped[int] = mapped_column(ForeignKey("explanations.id"), primary_key=True, autoincrement=False)
    who: Mapped[str] = mapped_column(String(200), primary_key=True)
    created_at: Mapped[Moment]


class RetiredExplanation(Table):
    """An explanation that was taken back, for the history of a feature and to bring it back."""

    __tablename__ = "retired_explanations"
    __table_args__ = (Index("ix_retired_explanations_feature", "source_id", "latent"),)

    id: Mapped[Key]
    source_id: Mapped[int] = mapped_column(ForeignKey("sources.id"))
    index: Mapped[int] = mapped_column("latent")
    text: Mapped[LongText]
    method: Mapped[Slug]
    author: Mapped[Slug]
    created_at: Mapped[Moment]
    retired_by: Mapped[Slug]
    retired_at: Mapped[Moment]
    was_id: Mapped[int | None]
    """Its id while it stood."""
    votes: Mapped[list[Any]] = mapped_column(JSON, default=list, server_default="[]")
    """Who agreed with it and since when, [name, time]."""
