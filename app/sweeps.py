"""Sweeps: one feature over strengths, or a grid of two; what each text costs and what it gains. Pure, no torch.

perplexity    exp(-mean log-probability) of the continuation's tokens under the model left alone
activation    mean of the swept feature over the continuation, read in the model left alone; None for a vector
repetition    share of the continuation's trigrams (bigrams where it is shorter) that stood there before
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from app import steering
from app.errors import BadInput
from app.protocol import GenerateRequest, SaeQuery, SteerRow
from app.settings import Settings
from app.steering import Chat, Completion, Number, Target

HANDFUL = 8
"""So many texts are made while the page waits; more are a job."""
MAX_TEXTS = 400
ALONE = "alone"
"""The row of the model left alone, which the others are compared with."""
MAX_PERPLEXITY_RATIO = 1.5
MAX_MORE_REPETITION = 0.15


class Axis(BaseModel):
    """A feature, by its place among the run's features, and the strengths it takes."""

    feature: int = Field(ge=0, lt=1000)
    strengths: list[Number] = Field(min_length=1, max_length=100)


class Point(BaseModel):
    """One text of a sweep."""

    strengths: list[float]
    """Of the swept features; empty for the model left alone."""
    text: str
    perplexity: float | None
    """None for a text without tokens, or one beyond all numbers."""
    activation: float | None
    repetition: float


class Suggestion(BaseModel):
    strengths: list[float]
    why: str


def points(axes: Sequence[Axis], n_features: int) -> list[tuple[float, ...]]:
    """Return every combination of the axes' strengths. Raises BadInput for too many, or for features not there."""
    if not 1 <= len(axes) <= 2:
        raise BadInput(f"A sweep goes over one feature or two, not {len(axes)}.")
    for axis in axes:
        if axis.feature >= n_features:
            raise BadInput(f"Feature {axis.feature} is to be swept; the run has {n_features}, counted from 0.")
    found = list(product(*(axis.strengths for axis in axes)))
    if len(found) > MAX_TEXTS:
        raise BadInput(f"{len(found)} texts are too many; one sweep makes up to {MAX_TEXTS}.")
    return found


def request(
    session: Session,
    settings: Settings,
    asked: Completion | Chat,
    targets: Sequence[Target],
    axes: Sequence[Axis],
    wanted: Sequence[tuple[float, ...]],
) -> GenerateRequest:
    """Return a request whose rows are the texts at `wanted`, after the model left alone."""
    plain = steering.request(session, settings, asked.model_copy(update={"controls": [], "n_samples": 1}), targets)
    base = plain.rows[1]
    rows = [base.model_copy(update={"name": ALONE, "directions": []})]
    for n, strengths in enumerate(wanted):
        directions = list(base.directions)
        for axis, strength in zip(axes, strengths, strict=True):
            coefficient = strength * asked.strength_multiplier
            if not abs(coefficient) <= steering.MAX_COEFFICIENT:
                raise BadInput(f"Strength {strength:g} is beyond {steering.MAX_COEFFICIENT:g}.")
            directions[axis.feature] = directions[axis.feature].model_copy(update={"coefficient": coefficient})
        rows.append(SteerRow(name=str(n), prompt=base.prompt, messages=base.messages, directions=directions))
    return plain.model_copy(update={"rows": rows})


def queries(plain: GenerateRequest, axes: Sequence[Axis]) -> list[SaeQuery]:
    """What is read of the model: the first swept feature."""
    direction = plain.rows[-1].directions[axes[0].feature]
    return [SaeQuery(sae=direction.sae, latents=[direction.latent])] if direction.sae is not None else []


def point(
    strengths: Sequence[float], text: str, ids: Sequence[int], logprobs: Sequence[float], acts: Sequence[float] | None
) -> Point:
    mean = -sum(logprobs) / len(logprobs) if logprobs else math.inf
    return Point(
        strengths=list(strengths),
        text=text,
        perplexity=math.exp(mean) if mean < 700 else None,
        activation=sum(acts) / len(acts) if acts else None,
        repetition=repetition(ids),
    )


def repetition(ids: Sequence[int]) -> float:
    """Share of trigrams that stood there before: 0 for a text without repetition, near 1 for a loop."""
    n = 3 if len(ids) >= 6 else 2
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def suggest(found: Sequence[Point]) -> Suggestion | None:
    """Return the strengths with the highest activation whose text is still about as fluent as the model's own.

    Fluent: perplexity at most 1.5 times that of the model left alone, and at most 0.15 more repetition.
    """
    alone = next((p for p in found if not p.strengths), None)
    if alone is None or alone.perplexity is None:
        return None
    fluent = [
        p
        for p in found
        if p.strengths
        and p.perplexity is not None
        and p.perplexity <= MAX_PERPLEXITY_RATIO * alone.perplexity
        and p.repetition <= alone.repetition + MAX_MORE_REPETITION
        and p.activation is not None
    ]
    if not fluent:
        return None
    best = max(fluent, key=lambda p: (p.activation or 0.0, -sum(map(abs, p.strengths))))
    if (best.activation or 0.0) <= (alone.activation or 0.0):
        return None
    return Suggestion(
        strengths=best.strengths,
        why=f"highest activation ({best.activation:.3g}; {alone.activation or 0:.3g} alone) at a perplexity of "
        f"{best.perplexity:.3g} ({alone.perplexity:.3g} alone)",
    )


def table(found: Sequence[Point]) -> dict[str, Any]:
    suggested = suggest(found)
    return {
        "points": [p.model_dump() for p in found],
        "suggested": suggested.model_dump() if suggested is not None else None,
    }
