"""Automatic labels without a language model: from the tokens a feature peaks on and the tokens it promotes.

Heuristic, and shown as such until somebody writes something better. Pure: knows evidence and tokens, no database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from app.corpora import Stream
from app.evidence import Example, FeatureEvidence
from app.tokens import Vocabulary


@dataclass(frozen=True)
class Text:
    """The corpus as a harvest read it: what turns an example into tokens."""

    stream: Stream
    vocabulary: Vocabulary
    context_size: int
    bos: int | None

    def token_at(self, context: int, position: int) -> int:
        return self.stream.token(context, max(position, 0), self.context_size, self.bos)

    def string_at(self, example: Example, offset: int = 0) -> str:
        """The token at an example's peak, or `offset` from it."""
        return self.vocabulary.string(self.token_at(example.context, example.peak + offset))


def row_of(evidence: FeatureEvidence, text: Text) -> tuple[str, str, str]:
    """Return the automatic label, the token of the highest activation and the token promoted most."""
    peaks = [text.string_at(example) for example in evidence.top]
    before = [text.string_at(example, -1) for example in evidence.top]
    promoted = [text.vocabulary.string(int(token)) for token in evidence.top_logit_ids]
    label = heuristic_label(peaks, before, promoted)
    return label, peaks[0] if peaks else "", promoted[0] if promoted else ""


def heuristic_label(peaks: Sequence[str], before: Sequence[str], promoted: Sequence[str]) -> str:
    """Return a short label, or "" when there is nothing to go by.

    peaks: the token at the peak of each top example; before: the token in front of it; promoted: top output tokens.
    """
    if not peaks:
        return ""
    on = _common(peaks)
    if on:
        return f"fires on {on}"
    after = _common(before)
    if after:
        return f"fires after {after}"
    stem = _shared_beginning(peaks)
    if stem:
        return f"fires on words in {_quoted(stem)}…, such as {_list(Counter(peaks), 3)}"
    if promoted:
        return f"promotes {', '.join(_quoted(p) for p in promoted[:3])}; fires on {_list(Counter(peaks), 2)}, …"
    return f"fires on {_list(Counter(peaks), 3)}, …"


def _common(tokens: Sequence[str]) -> str:
    """Up to three tokens that make up at least 60 % of all, case and leading space aside."""
    counts = Counter(t.strip().lower() or t for t in tokens)
    commonest = counts.most_common(3)
    for n in (1, 2, 3):
        if sum(c for _, c in commonest[:n]) >= 0.6 * len(tokens) and commonest[:n][-1][1] > 1:
            spelled = {t.strip().lower() or t: t.strip() or t for t in reversed(tokens)}
            return ", ".join(_quoted(spelled[t]) for t, _ in commonest[:n])
    return ""


def _shared_beginning(tokens: Sequence[str]) -> str:
    counts = Counter(t.strip().lower()[:3] for t in tokens if len(t.strip()) >= 4)
    if not counts:
        return ""
    stem, n = counts.most_common(1)[0]
    return stem if n >= 0.7 * len(tokens) else ""


def _list(counts: Counter[str], n: int) -> str:
    return ", ".join(_quoted(t.strip() or t) for t, _ in counts.most_common(n))


def _quoted(token: str) -> str:
    return "`" + token.replace("\n", "↵").replace("\t", "⇥") + "`"
