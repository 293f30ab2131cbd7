"""The worker's answers into what the page shows: shaded tokens, ranked features, figures. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app import present, prompts
from app.catalog import FeatureRow, SourceCard
from app.evidence import FeatureEvidence
from app.protocol import AblateReply, AttributeReply, FaithfulReply, GradientReply, Prediction, SaeActs, TextActs
from app.tokens import Vocabulary
from app.web.prompt.state import Lab

N_RANKED = 40
N_GRID = 30
N_STRENGTHS = 50
_VERBS = re.compile(r"(?<=[0-9] )(?:fires on|fires after|promotes) ")
"""What labels made from tokens begin with, and a brief name leaves out."""
_BLANK = re.compile(r"(?:(?<=`)|^)( +)(?=`|$)")
"""Spaces that are a token of their own, alone or in backticks."""
MAX_PREDICTED = 200
"""Positions whose predictions are listed at once, around the chosen one."""


@dataclass(frozen=True)
class Token:
    position: int
    text: str
    special: bool
    level: int
    tip: str
    chosen: bool
    selected: bool = False


@dataclass(frozen=True)
class Strip:
    """The tokens of one text, shaded."""

    nr: int
    tokens: tuple[Token, ...]
    max: float
    caption: str = ""


@dataclass(frozen=True)
class Strength:
    """A feature's activation on a token, and its direct part in the logit of the likeliest next token."""

    feature: FeatureRow
    value: float
    level: int
    effect: float | None


@dataclass(frozen=True)
class Ranked:
    """A feature of the text."""

    feature: FeatureRow
    value: float
    """Its maximum."""
    level: int
    token: str
    position: int
    n_tokens: int
    score: float | None
    """What it was sorted by, where that is not the maximum."""
    pinned: bool


@dataclass(frozen=True)
class Pinned:
    source: str
    feature: FeatureRow
    path: str
    strip: Strip


@dataclass(frozen=True)
class Expected:
    """What the model expects after a token."""

    token: Token
    choices: tuple[tuple[int, str, float], ...]
    """(id, text, probability)."""
    next: str
    share: float | None
    """The probability of the token that does come; None after the last."""


@dataclass(frozen=True)
class Term:
    """One part of a logit."""

    name: str
    value: float
    feature: FeatureRow | None = None
    activation: float = 0.0
    position: int | None = None
    token: str = ""

    @property
    def cold(self) -> bool:
        return self.value < 0


@dataclass(frozen=True)
class Attribution:
    """A logit taken apart."""

    target: str
    position: int
    token: str
    logit: float
    capped: float
    terms: tuple[Term, ...]
    full: float
    """The part whose bar is full."""
    sums: bool
    """Whether the parts add up to the logit; gradients do not."""

    def bar(self, term: Term) -> int:
        return min(100, round(100 * abs(term.value) / self.full)) if self.full else 0


@dataclass(frozen=True)
class Reading:
    """All that is shown of the texts."""

    strips: tuple[Strip, ...]
    token: Token | None
    feature: FeatureRow | None
    strengths: tuple[Strength, ...]
    likeliest: str
    """The token whose logit the strengths' effects are of."""
    ranked: tuple[Ranked, ...]
    n_features: int
    score: str
    """What the ranked features were sorted by, as a heading."""
    cut: int
    """How many features of a token were looked at, where more were active; 0 when all were."""
    pins: tuple[Pinned, ...]
    figure: dict[str, Any] | None = None
    expected: tuple[Expected, ...] = ()
    n_expected: int = 0
    attribution: Attribution | None = None
    ablation: AblateReply | None = None
    ablated: FeatureRow | None = None
    faithful: FaithfulReply | None = None


@dataclass(frozen=True)
class Focus:
    """The text and the source that are looked at closely."""

    lab: Lab
    source: SourceCard
    text: TextActs
    acts: SaeActs
    strings: list[str]
    hidden: list[bool]
    """Positions that do not count: a beginning-of-text token, unless it is kept."""
    rows: Mapping[int, FeatureRow]

    def row(self, index: int) -> FeatureRow:
        return self.rows.get(index) or FeatureRow(index, "", 0.0, 0.0, "", "")

    def active(self, position: int) -> list[tuple[FeatureRow, float]]:
        """The features of a token that the filter lets through, strongest first."""
        if self.hidden[position]:
            return []
        pairs = zip(self.acts.top_indices[position], self.acts.top_values[position], strict=True)
        found = ((self.row(index), value) for index, value in pairs)
        return [(feature, value) for feature, value in found if feature.density <= self.lab.limit]


def hidden_of(text: TextActs, bos: int | None, lab: Lab) -> list[bool]:
    first = bool(text.ids) and text.ids[0] == bos and lab.bos != "keep"
    return [first and position == 0 for position in range(len(text.ids))]


def strip(
    focus: Focus, nr: int, chosen: int | None, asked: int | None, full: float, selected: Collection[int]
) -> Strip:
    """Shade a text by what the state says: the chosen feature (the n-th asked latent), or a figure of the whole SAE."""
    values, tips = _shades(focus, asked)
    top = max(values, default=0.0)
    return Strip(nr, _tokens(focus, values, tips, max(full, top), chosen, selected), top)


def _shades(focus: Focus, asked: int | None) -> tuple[list[float], list[str]]:
    acts, n = focus.acts, len(focus.strings)
    if asked is not None:
        values = [0.0 if focus.hidden[p] else value for p, value in enumerate(acts.latents[asked])]
        return values, [f"{present.amount(v)} · position {p}" for p, v in enumerate(values)]
    if focus.lab.by == "strongest":
        best = [focus.active(p)[:1] for p in range(n)]
        tips = [f"{present.amount(b[0][1])} · {name_of(b[0][0])}" if b else "" for b in best]
        return [b[0][1] if b else 0.0 for b in best], tips
    source = {"total": acts.total, "l0": acts.l0, "error": acts.error}[focus.lab.by]
    values = [0.0 if focus.hidden[p] else v for p, v in enumerate(source)]
    return values, [f"{_said(focus.lab.by, v)} · position {p}" for p, v in enumerate(values)]


def _said(by: str, value: float) -> str:
    if by == "total":
        return f"all activations together {present.amount(value)}"
    return f"{value:.0f} features active" if by == "l0" else f"{value:.1%} of the squared norm is missed"


def _tokens(
    focus: Focus,
    values: Sequence[float],
    tips: Sequence[str],
    full: float,
    chosen: int | None,
    selected: Collection[int],
) -> tuple[Token, ...]:
    levels = [present.level(value, full) for value in values]
    return tuple(
        Token(p, string, focus.hidden[p], levels[p], tips[p] if levels[p] else "", p == chosen, p in selected)
        for p, string in enumerate(focus.strings)
    )


Scores = Mapping[int, float]


def ranked(focus: Focus, scores: Scores | None) -> tuple[tuple[Ranked, ...], int]:
    """Return the first features of the text in the order asked, and how many there are in all."""
    best: dict[int, tuple[FeatureRow, float, int, int]] = {}
    for position in range(len(focus.strings)):
        for feature, value in focus.active(position):
            _, highest, where, n = best.get(feature.index, (feature, 0.0, position, 0))
            best[feature.index] = (feature, max(value, highest), position if value > highest else where, n + 1)
    full = max((found[1] for found in best.values()), default=0.0)

    def rank(found: tuple[FeatureRow, float, int, int]) -> tuple[float, float]:
        return (abs(scores.get(found[0].index, 0.0)) if scores is not None else 0.0, found[1])

    pins = {index for name, index in focus.lab.pinned() if name == focus.source.name}
    ordered = sorted(best.values(), key=rank, reverse=True)[:N_RANKED]
    return (
        tuple(
            Ranked(
                f,
                value,
                present.level(value, full),
                focus.strings[where],
                where,
                n,
                None if scores is None else scores.get(f.index, 0.0),
                f.index in pins,
            )
            for f, value, where, n in ordered
        ),
        len(best),
    )


HEADINGS = {
    "max": "",
    "sum": "sum",
    "density": "value × log(1 / density)",
    "quantile": "quantile",
    "loss": "loss",
}


def maxima(focus: Focus) -> dict[int, float]:
    highest: dict[int, float] = {}
    for position in range(len(focus.strings)):
        for feature, value in focus.active(position):
            highest[feature.index] = max(value, highest.get(feature.index, 0.0))
    return highest


def sums(focus: Focus, positions: Collection[int]) -> dict[int, float]:
    total: dict[int, float] = {}
    for position in positions:
        for feature, value in focus.active(position):
            total[feature.index] = total.get(feature.index, 0.0) + value
    return total


def density_weighted(focus: Focus) -> dict[int, float]:
    """A rare feature's activation says more: each maximum times the log of how rare the feature is."""
    return {
        index: value * math.log(1 / min(max(focus.row(index).density, 1e-9), 1.0))
        for index, value in maxima(focus).items()
    }


def quantiles(focus: Focus, evidence: Mapping[int, FeatureEvidence]) -> dict[int, float]:
    found = {
        index: prompts.quantile(evidence[index], value) for index, value in maxima(focus).items() if index in evidence
    }
    return {index: share for index, share in found.items() if share is not None}


def grid(focus: Focus, features: Sequence[FeatureRow]) -> dict[str, Any]:
    """Features by tokens as a plotly heat map, pinned features first as they come."""
    places = {feature.index: row for row, feature in enumerate(features)}
    z = [[0.0] * len(focus.strings) for _ in features]
    for position in range(len(focus.strings)):
        if not focus.hidden[position]:
            for index, value in zip(focus.acts.top_indices[position], focus.acts.top_values[position], strict=True):
                if index in places:
                    z[places[index]][position] = value
    return heat_map(z, focus.strings, [name_of(feature) for feature in features], "activation")


def layers(
    sources: Sequence[SourceCard], text: TextActs, strings: Sequence[str], hidden: Sequence[bool], lab: Lab
) -> dict[str, Any]:
    """SAEs by tokens as a plotly heat map: the figure by which tokens are shaded, deepest layer on top."""
    figures: dict[str, Callable[[SaeActs], list[float]]] = {
        "strongest": lambda acts: [values[0] if values else 0.0 for values in acts.top_values],
        "total": lambda acts: acts.total,
        "l0": lambda acts: acts.l0,
        "error": lambda acts: acts.error,
    }
    figure = figures[lab.by]
    z = [[0.0 if hidden[p] else v for p, v in enumerate(figure(acts))] for acts in text.saes]
    words = {
        "strongest": "strongest activation",
        "total": "sum of activations",
        "l0": "active features",
        "error": "share missed",
    }
    return heat_map(z[::-1], strings, [source.name for source in reversed(sources)], words[lab.by])


def heat_map(z: list[list[float]], columns: Sequence[str], rows: Sequence[str], what: str) -> dict[str, Any]:
    """Return a plotly figure. Texts are escaped: plotly reads tags in labels and hovers."""
    labels = [plain(text, 12) for text in columns]
    names = [plain(text, 44) for text in rows]
    numbers = list(range(len(columns)))
    hover = [
        [f"{names[i]}<br>{labels[p]} · position {p}<br>{what} {present.amount(v)}" for p, v in enumerate(row)]
        for i, row in enumerate(z)
    ]
    return {
        "name": what,
        "kind": "heatmap",
        "brief": [plain(_VERBS.sub("", text), 13) for text in rows],
        "height": 60 + 22 * max(len(rows), 3),
        "data": [
            {"type": "heatmap", "z": z, "x": numbers, "y": list(range(len(rows))), "text": hover, "hoverinfo": "text"}
        ],
        "layout": {
            "xaxis": {"tickvals": numbers, "ticktext": labels, "tickangle": -60},
            "yaxis": {"tickvals": list(range(len(rows))), "ticktext": names, "autorange": "reversed"},
        },
    }


def plain(text: str, most: int) -> str:
    """Return words for a plotly label: short, with what cannot be seen named, and no markup in it."""
    marked = _BLANK.sub(lambda blank: "␣" * len(blank[1]), text)
    seen = "".join(_seen(character) for character in marked.replace("`", ""))
    short = seen if len(seen) <= most else seen[: most - 1] + "…"
    return short.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("$", "&#36;")


def _seen(character: str) -> str:
    if character == "\n":
        return "↵"
    return f"U+{ord(character):04X}" if present.hidden(character) else character


def expected(focus: Focus, predictions: Sequence[Prediction], words: Vocabulary) -> tuple[Expected, ...]:
    """What the model expects after each token, around the chosen one where the text is long."""
    n = len(predictions)
    middle = focus.lab.position or 0
    start = 0 if n <= MAX_PREDICTED else max(0, min(middle - MAX_PREDICTED // 2, n - MAX_PREDICTED))
    found: list[Expected] = []
    for p in range(start, min(n, start + MAX_PREDICTED)):
        prediction = predictions[p]
        surprise = prediction.loss or 0.0
        token = Token(p, focus.strings[p], focus.hidden[p], present.level(surprise, 12.0), "", p == focus.lab.position)
        choices = zip(prediction.ids, prediction.probabilities, strict=True)
        share = None if prediction.loss is None else math.exp(-prediction.loss)
        following = focus.strings[p + 1] if p + 1 < n else ""
        found.append(Expected(token, tuple((i, words.string(i), q) for i, q in choices), following, share))
    return tuple(found)


def attribution(focus: Focus, found: AttributeReply, target: str, position: int, later: str) -> Attribution:
    terms = [
        Term(name_of(focus.row(f.latent)), f.value, focus.row(f.latent), f.activation, position) for f in found.features
    ]
    others = [
        Term(f"the other {found.n_rest} active features", found.rest),
        Term("the SAE's bias", found.bias),
        Term("error: what the SAE misses", found.error),
        Term(later, found.elsewhere),
        Term("biases of the final norm and the unembedding", found.constant),
    ]
    shown = (*terms, *(term for term in others if term.value != 0))
    # What later layers write, and often the SAE's bias, is many times larger; bars compare features and leave it out.
    full = max((abs(term.value) for term in [*terms, others[0]]), default=0.0)
    return Attribution(target, position, focus.strings[position], found.logit, found.capped, shown, full, True)


def slopes(focus: Focus, found: GradientReply, target: str, position: int) -> Attribution:
    terms = tuple(
        Term(name_of(focus.row(latent)), effect, focus.row(latent), activation, p, focus.strings[p])
        for p, latent, activation, effect in found.positions
    )
    full = max((abs(term.value) for term in terms), default=0.0)
    return Attribution(target, position, focus.strings[position], found.value, found.value, terms, full, False)


def name_of(feature: FeatureRow) -> str:
    return f"{feature.index} {feature.label}" if feature.label else str(feature.index)
