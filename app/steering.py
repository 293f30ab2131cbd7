"""What a steering run asks for, and the gpu worker's messages made of it. No HTTP, no torch.

Field names are Neuronpedia's where it has them; the rest is our own and optional.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field
from sqlalchemy.orm import Session

from app import catalog, steering_vectors
from app.catalog import SourceCard
from app.errors import BadInput, NotFound
from app.protocol import (
    ChatMessage,
    GenerateRequest,
    ModelCard,
    Operation,
    Positions,
    SteerDirection,
    SteerMethod,
    SteerRow,
)
from app.settings import Settings
from app.tables import SteeringVector

MAX_COEFFICIENT = 1e6
"""Beyond this a float16 residual stream overflows whatever its model; residual norms of large models reach 1e4."""
DEFAULT, STEERED = "default", "steered"
Control = Literal["random_direction", "random_feature"]

Number = Annotated[float, Field(allow_inf_nan=False)]
_OPERATIONS = {
    SteerMethod.ADDITIVE: Operation.ADD,
    SteerMethod.ORTHOGONAL: Operation.ORTHOGONAL,
    SteerMethod.CAP: Operation.CAP,
}


class SteerFeature(BaseModel):
    """A feature, or a custom vector, and what is done with it."""

    modelId: str = Field(max_length=200)
    source: str = Field(max_length=200, validation_alias=AliasChoices("source", "layer"))
    index: Annotated[str, BeforeValidator(lambda i: str(i) if type(i) is int else i), Field(max_length=40)]
    strength: Number | None = None
    """None takes a vector's own default strength, and for a feature 10."""
    operation: Operation | None = None
    """None takes the run's steer_method."""
    positions: Positions = Positions.ALL
    at: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(default_factory=list[int], max_length=4096)
    """Positions in the prompt, for positions=chosen; the beginning-of-text token is 0."""


class Steering(BaseModel):
    """What all runs have in common."""

    modelId: str = Field(max_length=200)
    features: list[SteerFeature]
    off: list[SteerFeature] = Field(default_factory=list[SteerFeature], max_length=32)
    """Features that are switched off: kept with the run for its page, nothing is done with them."""
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.5
    n_tokens: Annotated[int, Field(ge=1)] = 48
    freq_penalty: Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1
    top_p: Annotated[float, Field(gt=0, le=1)] = 1
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 16
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=list[str], max_length=8)
    n_samples: Annotated[int, Field(ge=1, le=16)] = 1
    strength_multiplier: Number = 1
    steer_method: SteerMethod = SteerMethod.ADDITIVE
    steer_special_tokens: bool = True
    n_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    controls: list[Control] = Field(default_factory=list[Control], max_length=2)
    """Further texts beside the steered one: along a random direction of the same norm, along another feature."""


class Message(BaseModel):
    role: str = Field(max_length=40)
    content: str


class Completion(Steering):
    prompt: str


class Chat(Steering):
    """A conversation each for the default and the steered text."""

    defaultChatMessages: list[Message] = Field(min_length=1, max_length=200)
    steeredChatMessages: list[Message] = Field(min_length=1, max_length=200)


@dataclass(frozen=True)
class Target:
    """A feature or a vector as the catalog knows it."""

    asked: SteerFeature
    source: SourceCard | None
    latent: int
    vector: SteeringVector | None

    @property
    def hook_name(self) -> str:
        """Where it writes."""
        if self.source is None:
            return self.vector.hook_name if self.vector is not None else ""
        metadata: dict[str, Any] = self.source.config.get("metadata") or {}
        return str(metadata.get("hook_name_out") or self.source.hook_name)

    @property
    def strength(self) -> float:
        if self.asked.strength is not None:
            return self.asked.strength
        return self.vector.default_strength if self.vector is not None else 10.0


def targets(session: Session, settings: Settings, asked: Steering) -> list[Target]:
    """Find what is steered. Raises NotFound, and BadInput for too much of it."""
    catalog.model_entry(session, asked.modelId)
    if len(asked.features) > settings.max_steer_features:
        raise BadInput(
            f"{len(asked.features)} features are too many; one run steers up to {settings.max_steer_features}."
        )
    found = [_target(session, asked, feature) for feature in asked.features]
    for target in found:
        coefficient = target.strength * asked.strength_multiplier
        if not abs(coefficient) <= MAX_COEFFICIENT:
            raise BadInput(
                f"Strength {target.strength:g} times {asked.strength_multiplier:g} is {coefficient:g}; "
                f"it may be from -{MAX_COEFFICIENT:g} to {MAX_COEFFICIENT:g}."
            )
    return found


def _target(session: Session, asked: Steering, feature: SteerFeature) -> Target:
    if feature.modelId != asked.modelId:
        raise BadInput(f"A feature of {feature.modelId[:60]} cannot steer {asked.modelId[:60]}.")
    if steering_vectors.is_address(feature.source):
        vector = steering_vectors.get(session, feature.modelId, feature.source, feature.index)
        return Target(feature, None, 0, vector)
    source = catalog.source_card(session, feature.modelId, feature.source)
    latent = catalog.parse_index(feature.index)
    if latent >= source.d_sae:
        raise NotFound(
            f"{source.model_id}/{source.name} has features 0 to {source.d_sae - 1}; there is no feature {latent}."
        )
    return Target(feature, source, latent, None)


def request(
    session: Session, settings: Settings, asked: Completion | Chat, found: Sequence[Target], user: str = ""
) -> GenerateRequest:
    """Return the worker's request: the default row, the steered one, and the controls asked for."""
    if asked.n_tokens > settings.max_new_tokens:
        raise BadInput(f"{asked.n_tokens} new tokens are too many; one run makes up to {settings.max_new_tokens}.")
    card = catalog.model_entry(session, asked.modelId).card
    steered = [direction(settings, asked, target) for target in found]
    rows = [_row(asked, DEFAULT, []), _row(asked, STEERED, steered)]
    for control in asked.controls:
        rows.append(_row(asked, control, _control(session, settings, asked, found, card, control)))
    return GenerateRequest(
        model=catalog.model_ref(settings, asked.modelId),
        prompt=asked.prompt if isinstance(asked, Completion) else "",
        rows=rows,
        n_samples=asked.n_samples,
        max_new_tokens=asked.n_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        repetition_penalty=asked.repetition_penalty,
        freq_penalty=asked.freq_penalty,
        seed=asked.seed,
        stop=asked.stop,
        n_logprobs=asked.n_logprobs,
        user=user,
    )


def _row(asked: Completion | Chat, name: str, directions: list[SteerDirection]) -> SteerRow:
    if isinstance(asked, Completion):
        return SteerRow(name=name, directions=directions)
    said = asked.defaultChatMessages if name == DEFAULT else asked.steeredChatMessages
    messages = [ChatMessage(role=message.role, content=message.content) for message in said]
    return SteerRow(name=name, messages=messages, directions=directions)


def direction(settings: Settings, asked: Steering, target: Target) -> SteerDirection:
    common = _how(asked, target)
    if target.vector is not None:
        return SteerDirection(
            hook_name=target.vector.hook_name, vector=base64.b64encode(target.vector.values).decode(), **common
        )
    assert target.source is not None
    return SteerDirection(sae=catalog.sae_ref(settings, target.source), latent=target.latent, **common)


def _how(asked: Steering, target: Target) -> dict[str, Any]:
    return {
        "coefficient": target.strength * asked.strength_multiplier,
        "operation": target.asked.operation or _OPERATIONS[asked.steer_method],
        "positions": target.asked.positions,
        "at": target.asked.at,
        "spare_special": not asked.steer_special_tokens,
    }


def _control(
    session: Session,
    settings: Settings,
    asked: Steering,
    found: Sequence[Target],
    card: ModelCard,
    control: Control,
) -> list[SteerDirection]:
    """The same interventions with something else in the place of each feature; the seed says with what."""
    made: list[SteerDirection] = []
    for n, target in enumerate(found):
        if control == "random_feature" and target.source is not None:
            chance = random.Random(f"{asked.seed}/{n}/{target.latent}")  # noqa: S311 - no secrets
            other = _other_latent(session, target.source, target.latent, chance)
            made.append(
                SteerDirection(sae=catalog.sae_ref(settings, target.source), latent=other, **_how(asked, target))
            )
            continue
        size = card.n_heads * card.d_head if target.hook_name.endswith("attn.hook_z") else card.d_model
        numbers = np.random.default_rng([abs(asked.seed), n]).standard_normal(size).astype("<f4")
        made.append(
            SteerDirection(
                hook_name=target.hook_name, vector=base64.b64encode(numbers.tobytes()).decode(), **_how(asked, target)
            )
        )
    return made


def _other_latent(session: Session, source: SourceCard, latent: int, chance: random.Random) -> int:
    """Another latent, one that has been seen active where that is known."""
    candidates = [i for i in (chance.randrange(source.d_sae) for _ in range(40)) if i != latent]
    rows = catalog.rows(session, source, candidates)
    alive = [i for i in candidates if i in rows and rows[i].max_act > 0]
    return next(iter(alive or candidates), (latent + 1) % source.d_sae)


def record(asked: Completion | Chat, found: Sequence[Target]) -> dict[str, Any]:
    """What is saved of a request: enough to run it again on the same weights."""
    features = [
        {
            "modelId": asked.modelId,
            "layer": target.asked.source,
            "index": target.asked.index,
            "strength": target.strength,
            "operation": target.asked.operation,
            "positions": target.asked.positions,
            "at": target.asked.at,
            "saeHash": target.source.sae_hash if target.source is not None else None,
        }
        for target in found
    ]
    return asked.model_dump(mode="json", exclude={"features", "stream"}) | {"features": features}
