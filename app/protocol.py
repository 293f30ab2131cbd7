"""Everything web and gpu worker say to each other. Torch-free; the worker has no database, so requests carry paths.

    POST /load       LoadRequest      -> LoadReply
    POST /tokenize   TokenizeRequest  -> TokenizeReply
    POST /encode     EncodeRequest    -> EncodeReply
    POST /generate   GenerateRequest  -> NDJSON of Start, Token, End; closing the connection cancels
    GET  /status                      -> WorkerStatus

An error is a JSON object {"error": sentence} with the status of its class in app.errors.
Token ids travel, never token strings: app.tokens turns ids into text.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Message(BaseModel):
    model_config = ConfigDict(frozen=True)


class ModelCard(Message):
    """What is known of a model without loading it; card.json in its directory and Model.card in the catalog."""

    id: str
    name: str
    hash: str
    """sha256 over the weight files."""
    architecture: str
    """The transformers class, `LlamaForCausalLM`."""
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    bos_token_id: int | None
    """The token that belongs before every text, or None."""
    special_token_ids: list[int]
    tokenizer_hash: str
    has_chat_template: bool
    n_params: int
    origin: str
    """Where the weights came from, in words."""


class ModelRef(Message):
    id: str
    path: str


class SaeRef(Message):
    id: str
    """`{model}/{source}`, for messages."""
    path: str


class LoadRequest(Message):
    """Make a model and SAEs resident; the answer comes when they are, or after `seconds`."""

    model: ModelRef
    saes: list[SaeRef]
    seconds: float = Field(ge=0, le=30)


class Loading(Message):
    id: str
    bytes: int
    seconds: float
    """How long it has been loading."""


class LoadReply(Message):
    loading: list[Loading]
    """Empty when everything is resident."""


class TokenizeRequest(Message):
    model: ModelRef
    texts: list[str]
    prepend_bos: bool = True


class TokenizeReply(Message):
    ids: list[list[int]]


class SaeQuery(Message):
    """What to read of one SAE: the top k of every position, or the activations of some latents, or both."""

    sae: SaeRef
    top_k: int = Field(default=0, ge=0)
    latents: list[int] = Field(default_factory=list[int])
    totals: bool = False
    """Also the sum of all activations, l0 and the reconstruction's error at every position."""


class EncodeRequest(Message):
    model: ModelRef
    texts: list[str]
    queries: list[SaeQuery]
    prepend_bos: bool = True


class SaeActs(Message):
    """Activations of one SAE on one text; positions include the BOS token where one was prepended."""

    top_indices: list[list[int]]
    """[pos][k'], highest first; only positive activations, so rows may be shorter than k."""
    top_values: list[list[float]]
    latents: list[list[float]]
    """[asked latent][pos]."""
    total: list[float] = Field(default_factory=list[float])
    """[pos] the sum of all activations; with l0 and error only where `totals` was asked."""
    l0: list[float] = Field(default_factory=list[float])
    error: list[float] = Field(default_factory=list[float])
    """[pos] |x - x_hat|^2 / |x|^2, of the output hook for a transcoder."""


class TextActs(Message):
    ids: list[int]
    saes: list[SaeActs]
    """In the order of the queries."""


class EncodeReply(Message):
    texts: list[TextActs]


class SteerMethod(StrEnum):
    ADDITIVE = "SIMPLE_ADDITIVE"
    ORTHOGONAL = "ORTHOGONAL_DECOMP"
    CAP = "PROJECTION_CAP"


class SteerDirection(Message):
    """One feature's part in steering: coefficient x the unit decoder row, at the SAE's (output) hook."""

    sae: SaeRef
    latent: int
    coefficient: float


class GenerateRequest(Message):
    model: ModelRef
    prompt: str
    directions: list[SteerDirection]
    method: SteerMethod = SteerMethod.ADDITIVE
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.7, ge=0)
    """0 is greedy."""
    freq_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it was generated before."""
    seed: int = 16
    n_logprobs: int = Field(default=0, ge=0, le=20)
    prepend_bos: bool = True


class Start(Message):
    event: Literal["start"] = "start"
    prompt_ids: list[int]


class Token(Message):
    event: Literal["token"] = "token"
    row: Literal["default", "steered"]
    id: int
    logprob: float
    """Natural logarithm of the token's probability under its own row, before temperature and penalties."""
    top: list[tuple[int, float]] = Field(default_factory=list[tuple[int, float]])
    more: bool = False
    """The other row's token of the same step follows at once; whoever shows both may wait for it."""


class End(Message):
    event: Literal["end"] = "end"
    error: str = ""
    """Empty when all went well."""
    seconds: float = 0.0


StreamEvent = Annotated[Start | Token | End, Field(discriminator="event")]


class Resident(Message):
    kind: Literal["model", "sae"]
    id: str
    bytes: int


class WorkerStatus(Message):
    device: str
    dtype: str
    memory_bytes: int
    used_bytes: int
    residents: list[Resident]
    loading: list[str]
    waiting: int
    max_queue: int
