"""Settings of all processes, read once from SAE_ATLAS_* variables. No I/O beyond the environment."""

from __future__ import annotations

import getpass
import hashlib
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import platformdirs
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """One frozen object, made at a process's start and passed down. Each field is `SAE_ATLAS_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="SAE_ATLAS_", frozen=True, extra="ignore")

    data_dir: Path = Field(
        default_factory=lambda: platformdirs.user_data_path("sae-atlas"),
        description="Everything SAE Atlas stores: database, models, SAEs, corpora, job checkpoints.",
    )
    host: str = Field(
        default="127.0.0.1", description="Address the web server binds; one that is not loopback needs team mode."
    )
    local_access: Literal["user", "link", "anyone"] = Field(
        default="user",
        description=(
            "Who is let in without team mode: user, programs of the user who runs the server, and the link that it "
            "prints; link, that alone; anyone, everybody on this machine."
        ),
    )
    team: bool = Field(default=False, description="Team mode: people sign in, and roles say what they may do.")
    public_url: str = Field(
        default="",
        description="Address that a team opens, such as https://atlas.example.org; it answers to no other.",
    )
    trusted_proxies: str = Field(
        default="127.0.0.1",
        description="Addresses or networks whose X-Forwarded-* headers are believed, with commas.",
    )
    proxy_user_header: str = Field(
        default="",
        description="Header by which a trusted proxy says who has signed in there, such as x-forwarded-user.",
    )
    oidc_issuer: str = Field(
        default="", description="Address of an OpenID Connect provider at which people may sign in."
    )
    oidc_client_id: str = Field(default="", description="What that provider calls this server.")
    oidc_client_secret: str = Field(default="", repr=False, description="The secret that it gave this server.")
    oidc_name: str = Field(default="your organisation", description="What that provider is called on pages.")
    oidc_domains: str = Field(
        default="",
        description="Domains of e-mail addresses that come in as viewers without an invitation, with commas.",
    )
    requests_per_minute: int = Field(
        default=1200,
        ge=1,
        description="Requests a minute of one person, or one address without one, in team mode, by web process.",
    )
    port: int = Field(default=3000, ge=0, le=65535, description="Port of the web server.")
    database_url: str = Field(
        default="", description="SQLAlchemy URL of the catalog; empty means SQLite in the data directory."
    )
    jobs_database_url: str = Field(
        default="",
        description="URL of the dbos job queue; empty means the catalog's Postgres, or SQLite in the data directory.",
    )
    worker_socket: str = Field(
        default="", description="Unix socket of the gpu worker; empty means one derived from the data directory."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto", description="Where models and SAEs are computed."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of the language model; auto is float32, bfloat16 on CUDA where only that fits.",
    )
    threads: int = Field(default=0, ge=0, description="CPU threads torch uses in each worker; 0 leaves torch's choice.")
    memory_bytes: int = Field(
        default=0, ge=0, description="Byte budget for resident models and SAEs; 0 means 60 % of the device's memory."
    )
    residual_bytes: int = Field(
        default=256 * 2**20,
        ge=0,
        description="Memory for activations of texts read lately, so that a second question skips the model.",
    )
    max_text_tokens: int = Field(default=4096, ge=1, description="Longest text accepted for activations, in tokens.")
    max_text_bytes: int = Field(
        default=200_000, ge=1, description="Longest text accepted before it is tokenised, in bytes."
    )
    max_texts: int = Field(default=64, ge=1, description="Most texts in one request.")
    max_new_tokens: int = Field(default=512, ge=1, description="Most tokens one steering run generates.")
    max_steer_features: int = Field(default=32, ge=1, description="Most features steered in one run.")
    max_queue: int = Field(
        default=64, ge=1, description="Requests that may wait for the gpu worker; one more is answered 429."
    )
    request_seconds: float = Field(
        default=60.0, gt=0, description="Deadline of a request to the gpu worker, in seconds."
    )
    loading_seconds: float = Field(
        default=0.7, ge=0, le=30, description="How long a page waits for a model to load before it shows that it loads."
    )
    max_sae_bytes: int = Field(default=16 * 2**30, ge=1, description="Largest SAE file accepted, in bytes.")
    max_corpus_bytes: int = Field(default=64 * 2**30, ge=1, description="Most text one corpus may hold, in bytes.")
    max_import_bytes: int = Field(
        default=64 * 2**30, ge=1, description="Largest import that a browser may send, packed and unpacked, in bytes."
    )
    remote_networks: str = Field(
        default="",
        description="Private networks that remote catalogs may lie in, such as 10.0.0.0/8, with commas.",
    )
    max_d_sae: int = Field(default=2**20, ge=1, description="Widest SAE accepted, in latents.")
    cache_bytes: int = Field(
        default=50 * 2**30,
        ge=1,
        description="Most disk that cached activations may take, of all running jobs together, in bytes.",
    )
    beat_seconds: float = Field(default=5.0, gt=0, description="How often a trainer says that it is alive.")
    takeover_seconds: float = Field(
        default=30.0, gt=0, description="Silence after which another trainer takes a job over."
    )
    slot: int = Field(
        default=0, ge=0, description="Number of this trainer on its machine; one trainer process per GPU."
    )
    max_waiting_jobs: int = Field(
        default=1000, ge=1, description="Jobs that may wait in the queue; one more is answered 429."
    )
    owner: str = Field(
        default="", max_length=200, description="Whose jobs this process queues; empty means the login name."
    )
    max_waiting_jobs_per_owner: int = Field(
        default=200, ge=1, description="Jobs of one owner that may wait in the queue; one more is answered 429."
    )
    max_running_jobs_per_owner: int = Field(
        default=0, ge=0, description="Jobs of one owner that may run at once; 0 sets no limit."
    )
    tensorboard_dir: str = Field(
        default="", description="Where the trainer writes jobs' curves as TensorBoard event files; empty writes none."
    )
    wandb_project: str = Field(
        default="", max_length=128, description="Weights & Biases project that gets jobs' curves; empty sends none."
    )
    metrics_token: str = Field(
        default="",
        repr=False,
        description="Bearer token that /metrics wants; without one it answers programs on this machine only.",
    )
    otel_endpoint: str = Field(
        default="",
        description="OpenTelemetry collector that gets traces over HTTP, such as http://127.0.0.1:4318; needs [otel].",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least severity that is logged."
    )
    log_format: Literal["console", "json"] = Field(
        default="console", description="Log lines for people or for machines."
    )

    def changed(self, **values: Any) -> Settings:
        """Return settings with other values. `model_copy` would keep what was derived from the old ones."""
        return Settings.model_validate(self.model_dump(exclude_unset=True) | values)

    @cached_property
    def catalog_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'atlas.sqlite'}"

    @cached_property
    def queue_url(self) -> str:
        """Postgres serves the queue too, so that several machines share it; SQLite gets a file of its own."""
        if self.jobs_database_url:
            return self.jobs_database_url
        if self.database_url.startswith("postgresql"):
            return self.database_url
        return f"sqlite:///{self.data_dir / 'jobs.sqlite'}"

    @property
    def owner_name(self) -> str:
        """Until there are accounts: who started the process."""
        if self.owner:
            return self.owner
        try:
            return getpass.getuser()[:200]
        except (OSError, KeyError):  # a container's user without a name
            return "somebody"

    @cached_property
    def socket_path(self) -> Path:
        """The worker's socket. Unix limits its path to 107 bytes: a deep data directory gets one in the temp folder."""
        if self.worker_socket:
            return Path(self.worker_socket)
        path = self.data_dir / "run" / "worker.sock"
        if len(str(path).encode()) <= 100:
            return path
        digest = hashlib.sha256(str(path).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"sae-atlas-{digest}.sock"

    def model_dir(self, model_id: str) -> Path:
        return self.data_dir / "models" / model_id

    def sae_dir(self, sae_hash: str) -> Path:
        return self.data_dir / "saes" / sae_hash

    def corpus_dir(self, corpus_hash: str) -> Path:
        return self.data_dir / "corpora" / corpus_hash

    def activations_dir(self, key: str) -> Path:
        return self.data_dir / "activations" / key

    def job_dir(self, job_id: int) -> Path:
        return self.data_dir / "jobs" / str(job_id)
