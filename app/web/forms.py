"""Forms made of a spec's fields: what `app.specs` says of a field is what its form explains, bounds and refuses.

A form's values are the texts that an address or a body holds; a box that is not ticked sends `false` beforehand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from app.specs import Spec

SpecT = TypeVar("SpecT", bound=Spec)
Kind = Literal["text", "number", "box", "choice"]


@dataclass(frozen=True)
class Field:
    """One field as a page shows it (templates/forms.html)."""

    name: str
    label: str
    kind: Kind
    value: str
    about: str
    error: str = ""
    least: str = ""
    most: str = ""
    step: str = "any"
    length: str = ""
    required: bool = False
    hint: str = ""
    """What an empty box stands for, shown in it."""
    options: tuple[tuple[str, str], ...] = ()
    """(value, words) of a choice."""

    @property
    def ticked(self) -> bool:
        return self.value.lower() in ("true", "on", "1", "yes")


def fields(
    spec: type[Spec],
    names: Collection[str],
    values: Mapping[str, str],
    errors: Mapping[str, str] | None = None,
    *,
    labels: Mapping[str, str] | None = None,
    options: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> dict[str, Field]:
    """Return fields of a spec by name, with the values and errors given; a field without a value has its default."""
    schema = spec.model_json_schema()["properties"]
    made: dict[str, Field] = {}
    for name in names:
        about = schema[name]
        choices = (options or {}).get(name) or [(str(value), str(value)) for value in about.get("enum", ())]
        kind = _kind(about.get("type", "string"), bool(choices))
        made[name] = Field(
            name=name,
            label=(labels or {}).get(name, name.replace("_", " ")),
            kind=kind,
            value=values.get(name, _text(about.get("default", ""))),
            about=about.get("description", ""),
            error=(errors or {}).get(name, ""),
            least=_text(about.get("minimum", about.get("exclusiveMinimum", ""))),
            most=_text(about.get("maximum", about.get("exclusiveMaximum", ""))),
            step="1" if about.get("type") == "integer" else "any",
            length=_text(about.get("maxLength", "")),
            required="default" not in about,
            options=tuple(choices),
        )
    return made


def read(spec: type[SpecT], values: Mapping[str, Any]) -> tuple[SpecT | None, dict[str, str]]:
    """Return the spec that some values make, or nothing and what is wrong, by field; numbers lose their commas."""
    numeric = {
        name
        for name, about in spec.model_json_schema()["properties"].items()
        if about.get("type") in ("integer", "number")
    }
    given = {
        name: value.replace(",", "").replace("_", "").strip() if name in numeric and isinstance(value, str) else value
        for name, value in values.items()
        if name in spec.model_fields
    }
    try:
        return spec.model_validate(given), {}
    except ValidationError as error:
        return None, errors_of(error)


def errors_of(error: ValidationError) -> dict[str, str]:
    """Return what is wrong as sentences by field; what concerns several is under the empty name."""
    found: dict[str, str] = {}
    for fault in error.errors():
        name = str(fault["loc"][0]) if fault["loc"] else ""
        sentence = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
        sentence = f"{sentence[:1].upper()}{sentence[1:]}."
        given = fault["input"]
        if isinstance(given, str | int | float) and fault["type"] != "missing" and str(given):
            sentence = f"{sentence[:-1]}; it is {str(given)[:60]!r}."
        found.setdefault(name, sentence)
    return found


def _kind(type_: str, has_choices: bool) -> Kind:
    if has_choices:
        return "choice"
    return "box" if type_ == "boolean" else "number" if type_ in ("integer", "number") else "text"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)
