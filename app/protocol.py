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
    POST /generate   GenerateRequest  -> NDJSON of Queued, Start, Token, End; closing the connection cancels
    POST /next       NextRequest      -> NextReply
    POST /score      ScoreRequest     -> ScoreReply
    POST /difference DifferenceRequest -> DifferenceReply
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
    loaded: int
    """How many of the bytes are there already."""
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
    loading: list[Loading] = Field(default_factory=list[Loading])
    """What is not resident even after some seconds. Then there are no texts, and the request is sent again."""


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
    token: int | None
    """None means the likeliest next token."""
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
    token: int
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
    skip: int = Field(default=0, ge=0)
    """Positions at the beginning whose activations are left out: those of the first token are unlike all others."""


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
    """Neuronpedia's names for what is done with all features of a run."""

    ADDITIVE = "SIMPLE_ADDITIVE"
    ORTHOGONAL = "ORTHOGONAL_DECOMP"
    CAP = "PROJECTION_CAP"


class Operation(StrEnum):
    """What is done with one feature; workers.sae.steering has the equations."""

    ADD = "add"
    CLAMP = "clamp"
    SCALE = "scale"
    ABLATE = "ablate"
    ORTHOGONAL = "orthogonal"
    CAP = "cap"


class Positions(StrEnum):
    """Which tokens a feature is steered on. The beginning-of-text token never is."""

    ALL = "all"
    GENERATED = "generated"
    PROMPT = "prompt"
    CHOSEN = "chosen"


class SteerDirection(Message):
    """One feature's part in steering, at the hook its SAE writes to; or a vector's, at a hook of its own."""

    sae: SaeRef | None = None
    latent: int = 0
    hook_name: str = ""
    """Of a vector; empty for a feature."""
    vector: str = ""
    """Base64 of float32 little-endian numbers, as many as the hook has; scaled to norm 1 before it is used."""
    coefficient: float
    operation: Operation = Operation.ADD
    positions: Positions = Positions.ALL
    at: list[int] = Field(default_factory=list[int])
    """Positions in the prompt, the first token being 0; read with Positions.CHOSEN."""
    spare_special: bool = False
    """Leave special tokens as they are."""


class SteerRow(Message):
    """One of the texts of a run that grow side by side."""

    name: str = Field(max_length=40)
    prompt: str | None = None
    """None takes the request's."""
    messages: list[ChatMessage] = Field(default_factory=list[ChatMessage])
    """A conversation to go on with, instead of a prompt; written with the model's chat template."""
    directions: list[SteerDirection] = Field(default_factory=list[SteerDirection])


class GenerateRequest(Message):
    model: ModelRef
    prompt: str = ""
    rows: list[SteerRow] = Field(min_length=1, max_length=32)
    n_samples: int = Field(default=1, ge=1, le=16)
    """How many texts of each row; the nth of every row draws the same random numbers."""
    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.7, ge=0)
    """0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Only the likeliest tokens that together have this probability."""
    top_k: int = Field(default=0, ge=0)
    """Only so many of the likeliest tokens; 0 is all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Only tokens with at least this share of the likeliest one's probability."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides (or multiplies, below zero) the logit of every token of the prompt or the text so far."""
    freq_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it was generated before."""
    seed: int = 16
    stop: list[str] = Field(default_factory=list[str], max_length=8)
    """A text ends where one of these begins."""
    n_logprobs: int = Field(default=0, ge=0, le=20)
    prepend_bos: bool = True
    user: str = ""
    """Who asks; users take turns when runs have to wait."""


class Queued(Message):
    event: Literal["queued"] = "queued"
    place: int
    """1 is next; 0 says that it was let in."""


class Start(Message):
    event: Literal["start"] = "start"
    prompt_ids: list[int]
    """Of the first row."""
    rows: list[list[int]] = Field(default_factory=list[list[int]])
    """Prompt ids of every row."""


class Token(Message):
    event: Literal["token"] = "token"
    row: str
    sample: int = 0
    id: int
    logprob: float
    """Natural logarithm of the token's probability under its own row, before temperature and penalties."""
    top: list[tuple[int, float]] = Field(default_factory=list[tuple[int, float]])
    more: bool = False
    """Another row's token of the same step follows at once; whoever shows all may wait for it."""
    keep: int | None = None
    """Only so many characters of it belong to the text: a stop string begins inside."""


class End(Message):
    event: Literal["end"] = "end"
    error: str = ""
    """Empty when all went well."""
    seconds: float = 0.0
    finish: list[tuple[str, int, str]] = Field(default_factory=list[tuple[str, int, str]])
    """Row, sample and why it ended: `length`, `eos` or `stop`."""


StreamEvent = Annotated[Queued | Start | Token | End, Field(discriminator="event")]


class NextRequest(Message):
    """What the next token would be in each row, by one forward pass."""

    model: ModelRef
    prompt: str = ""
    rows: list[SteerRow] = Field(min_length=1, max_length=32)
    n_top: int = Field(default=10, ge=1, le=50)
    prepend_bos: bool = True


class NextReply(Message):
    ids: list[int]
    """The likeliest tokens of any row, each once."""
    logprobs: list[list[float]]
    """[row][token]."""


class Scored(Message):
    """A text to look at again: prompt and continuation."""

    ids: list[int] = Field(min_length=2)
    start: int = Field(ge=1)
    """Where the continuation begins."""


class ScoreRequest(Message):
    """Read finished texts once more under several conditions, each a list of directions."""

    model: ModelRef
    texts: list[Scored] = Field(min_length=1, max_length=64)
    conditions: list[list[SteerDirection]] = Field(min_length=1, max_length=8)
    """The first should be the empty list, the model left alone; activations are read there."""
    queries: list[SaeQuery] = Field(default_factory=list[SaeQuery])
    n_top: int = Field(default=0, ge=0, le=20)


class ScoredText(Message):
    logprobs: list[list[float]]
    """[condition][token of the continuation]."""
    tops: list[list[list[tuple[int, float]]]]
    """[condition][token] -> the likeliest tokens in its place."""
    acts: list[list[list[float]]]
    """[query][asked latent][token of the continuation], in the model left alone."""


class ScoreReply(Message):
    texts: list[ScoredText]


class DifferenceRequest(Message):
    """The mean activation over some texts less that over others: a direction to steer along."""

    model: ModelRef
    hook_name: str
    plus: list[str] = Field(min_length=1, max_length=256)
    minus: list[str] = Field(min_length=1, max_length=256)
    last_only: bool = False
    """Only each text's last token instead of the mean over its tokens."""
    prepend_bos: bool = True


class DifferenceReply(Message):
    vector: str
    """Base64 of float32, not scaled."""
    norm: float
    usual_norm: float
    """Mean norm of the activations themselves, to compare it with."""


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
