"""Where an SAE comes from, in words: the few facts that a reader looks for, out of what was recorded. No database."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

_WORDS = {
    "added_from": "added from the directory",
    "uploaded_as": "uploaded files",
    "folder": "folders they lay in",
    "repo": "repository on the hub",
    "subfolder": "folder there",
    "revision": "commit",
    "release": "SAELens release",
    "format": "format",
    "neuronpedia_id": "on Neuronpedia",
    "job": "job",
}
_TRAINING = ("corpus", "n_tokens", "epochs", "k", "context_size", "batch_size", "lr", "seed")
"""Of a training's settings, those that tell two runs apart; the job shows all of them."""


def words(origin: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return (name, value) pairs to show, known facts first; nested records but a training's settings are left out."""
    shown = [(_WORDS[name], _text(origin[name])) for name in _WORDS if origin.get(name) not in (None, "")]
    if origin.get("kind"):
        shown.insert(0, ("how", _text(origin["kind"])))
    shown += list(_lineage(origin))
    known = {*_WORDS, "kind", "spec", "hours"}
    shown += [
        (name.replace("_", " "), _text(value))
        for name, value in origin.items()
        if name not in known and isinstance(value, str | int | float)
    ]
    spec = origin.get("spec")
    settings = cast(Mapping[str, Any], spec) if isinstance(spec, Mapping) else {}
    return (
        *shown,
        *((name.replace("n_", "").replace("_", " "), _text(settings[name])) for name in _TRAINING if name in settings),
    )


def _lineage(origin: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What was recorded of a training beside its spec: the text, the hours, the software, the SAEs made with it."""
    corpus, software, others = (origin.get(name) for name in ("corpus", "trained_with", "together_with"))
    if isinstance(corpus, Mapping):
        yield "corpus hash", _text(cast(Mapping[str, Any], corpus).get("hash", ""))
    if isinstance(hours := origin.get("hours"), int | float):
        yield "hours", f"{hours:.2f}" if hours >= 0.01 else f"{hours:.4f}"
    if isinstance(software, Mapping):
        versions = dict(cast(Mapping[str, Any], software))
        commit = versions.pop("commit", "")
        yield "trained with", ", ".join(f"{name} {version}" for name, version in versions.items())
        if commit:
            yield "commit", _text(commit)
    if isinstance(others, list) and others:
        yield "trained together with", ", ".join(map(_text, cast(list[Any], others)))


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
