"""Everything web and gpu worker say to each other. Torch-free; the worker has no database, so requests carry paths.

    POST /load       LoadRequest      -> LoadReply
    POST /tokenize   TokenizeRequest  -> TokenizeReply
    POST /encode     EncodeRequest    -> EncodeReply
    POST /predict    PredictRequest    -> PredictReply
    POST /attribute  AttributeRequest  -> AttributeReply
    POST /gradient   GradientRequest   -> GradientReply
    POST /ablate     AblateRequest     -> AblateReply
    POST /faithful   FaithfulRequest   -> FaithfulReply
    POST /chat       ChatRequest       -> ChatReply
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


class TextRef(Message):
    """One text in one model: what the requests below are about."""

    model: ModelRef
    text: str
    prepend_bos: bool = True


class PredictRequest(TextRef):
    top_k: int = Field(default=5, ge=1, le=100)
    position: int | None = None
    """One position alone; None means all."""


class Prediction(Message):
    """What the model expects after a position."""

    ids: list[int]
    """The likeliest next tokens, likeliest first."""
    probabilities: list[float]
    logits: list[float]
    loss: float | None
    """Nats that the token which does come next costs; None after the last."""


class PredictReply(Message):
    ids: list[int]
    positions: list[Prediction]


class Target(Message):
    """A logit at a position, or the difference of two."""

    position: int
    token: int
    against: int | None = None


class AttributeRequest(TextRef):
    """Which active features of an SAE at the target's position write how much of the logit, past later layers."""

    sae: SaeRef
    target: Target
    top_k: int = Field(default=50, ge=1, le=1000)


class Contribution(Message):
    latent: int
    activation: float
    value: float


class AttributeReply(Message):
    """Terms of the (uncapped) logit: features + rest + bias + error + elsewhere + constant = logit."""

    ids: list[int]
    logit: float
    """Of the token, less that of `against`; before a cap on logits, and in float32."""
    capped: float
    """As the model gives it."""
    features: list[Contribution]
    """The strongest, by size."""
    rest: float
    """All other active features together."""
    n_rest: int
    bias: float
    """b_dec, and what undoes a normalisation or skips a transcoder."""
    error: float
    """What the SAE misses of the tensor at its hook."""
    elsewhere: float
    """Everything else that is written to the residual stream: later layers, for an SAE of the stream itself."""
    constant: float
    """Biases of the final norm and of the unembedding."""


class GradientRequest(TextRef):
    """gradient x activation: to first order, what every activation at any position does to a logit or to the loss."""

    sae: SaeRef
    target: Target | None = None
    """None means the mean loss of the text."""
    top_k: int = Field(default=50, ge=1, le=1000)


class GradientReply(Message):
    ids: list[int]
    value: float
    """The logit, difference or loss itself."""
    positions: list[tuple[int, int, float, float]]
    """(position, latent, activation, effect), largest effects first."""
    latents: list[tuple[int, float]]
    """(latent, effect summed over positions), largest first."""


class AblateRequest(TextRef):
    """Take one feature's writing out, everywhere or at one position, and run the model again."""

    sae: SaeRef
    latent: int
    target: Target
    position: int | None = None


class AblateReply(Message):
    before: float
    after: float
    direct: float | None
    """Estimate of before - after by direct attribution; None where the SAE has no direct path to the logits."""
    gradient: float
    """Estimate of before - after by gradient x activation."""
    loss_before: float
    loss_after: float
    n_active: int
    """Positions where the feature was active and taken out."""


class FaithfulRequest(TextRef):
    sae: SaeRef


class FaithfulReply(Message):
    """How much of a text survives the SAE; the first position is in no figure and stays as it is when spliced."""

    n_tokens: int
    explained_variance: float
    cosine: float
    l0: float
    loss_clean: float
    loss_spliced: float
    loss_ablated: float
    """Mean nats a token, with zeros at the hook."""


class ChatMessage(Message):
    role: str
    content: str


class ChatRequest(Message):
    """Write messages out as the model's chat template has them."""

    model: ModelRef
    messages: list[ChatMessage]
    add_generation_prompt: bool = True


class ChatReply(Message):
    text: str
    """Without a beginning-of-text token, which `prepend_bos` adds."""


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
