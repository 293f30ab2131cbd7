"""What the address of a prompt holds, and the changes that buttons and links make to it. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, cast, get_args
from urllib.parse import parse_qs

from app.errors import BadInput
from app.web.pages import query

Kind = Literal["text", "lines", "chat"]
View = Literal["tokens", "grid", "layers", "next", "faithful"]
Shade = Literal["strongest", "total", "l0", "error"]
Sort = Literal["max", "sum", "density", "quantile", "loss"]
How = Literal["direct", "gradient"]

ROLES = ("user", "assistant", "system")
MAX_PINS = 20
MAX_SOURCES = 64
_AT = re.compile(r"([0-9]{1,6})?(?:\.([0-9]{1,9}))?", re.ASCII)
_PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,199}):([0-9]{1,9})", re.ASCII)
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", re.ASCII)
_LISTS = ("sae", "pin", "role", "say")


@dataclass(frozen=True)
class Lab:
    """The state of the page; every field is a parameter of its address, left out where it has its usual value."""

    text: str = ""
    kind: Kind = "text"
    role: tuple[str, ...] = ()
    say: tuple[str, ...] = ()
    """Messages of a chat: roles, and what each says."""
    sae: tuple[str, ...] = ()
    """Sources, or `*-set` for all layers of a set."""
    on: str = ""
    """The source whose features are listed; the first of those chosen otherwise."""
    nr: int = 1
    """The text looked at, of several."""
    at: str = ""
    """`{position}.{feature}`, both optional."""
    view: View = "tokens"
    by: Shade = "strongest"
    sort: Sort = "max"
    select: str = ""
    """Positions whose sum sorts, such as 3-7,9; empty means all."""
    below: str = ""
    """Features active on more than this share of the corpus are left out."""
    bos: str = ""
    """`keep` lets the beginning-of-text token count."""
    pin: tuple[str, ...] = ()
    """`{source}:{feature}` whose rows stay."""
    token: str = ""
    against: str = ""
    """The logit to explain, and one to subtract: `#{id}`, or text that is one token."""
    how: How = "direct"
    ablate: str = ""
    """A feature to take out."""

    @property
    def position(self) -> int | None:
        found = _AT.fullmatch(self.at)
        return int(found[1]) if found and found[1] else None

    @property
    def feature(self) -> int | None:
        found = _AT.fullmatch(self.at)
        return int(found[2]) if found and found[2] else None

    @property
    def limit(self) -> float:
        try:
            value = float(self.below) if self.below else 1.0
        except ValueError:
            return 1.0
        return value if 0 < value <= 1 else 1.0

    @property
    def messages(self) -> list[tuple[str, str]]:
        return [(role, say) for role, say in zip(self.role, self.say, strict=False) if say.strip()]

    @property
    def empty(self) -> bool:
        return not (self.messages if self.kind == "chat" else self.text.strip())

    @property
    def ablated(self) -> int | None:
        return int(self.ablate) if re.fullmatch(r"[0-9]{1,9}", self.ablate, re.ASCII) else None

    def texts(self) -> list[str]:
        """The texts pasted: one, or a line each. A chat's text is made by the model's template."""
        if self.kind == "lines":
            return [line for line in self.text.split("\n") if line.strip()]
        return [self.text]

    def pinned(self) -> list[tuple[str, int]]:
        return [(found[1], int(found[2])) for pin in self.pin if (found := _PIN.fullmatch(pin))]

    def selected(self, n: int) -> list[int]:
        """The positions whose sum sorts, of n. Raises BadInput for what is no list of ranges."""
        if not self.select.strip():
            return list(range(n))
        chosen: set[int] = set()
        for part in self.select.replace(" ", "").split(","):
            found = _RANGE.fullmatch(part)
            if found is None:
                raise BadInput(f"{part[:20]!r} is no range of tokens; write such as 3-7,9.")
            first, last = int(found[1]), int(found[2] or found[1])
            if first > last or last >= n:
                raise BadInput(f"Tokens {part} were chosen; the text has 0 to {n - 1}.")
            chosen.update(range(first, last + 1))
        return sorted(chosen)

    def to(self, position: int | None, feature: int | None) -> str:
        """Return the value of `at` that chooses a token and a feature."""
        return f"{'' if position is None else position}{'' if feature is None else f'.{feature}'}"

    def parameters(self) -> dict[str, list[str]]:
        """Return what an address must hold to show the same."""
        kept: dict[str, list[str]] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                kept[field.name] = list(value) if isinstance(value, tuple) else [str(value)]
        return kept

    def address(self, path: str) -> str:
        return path + query(self.parameters())


def lab_of(parameters: Mapping[str, Sequence[str]]) -> Lab:
    """Return the state that parameters describe, with the change of a pressed button, `go`, made to it."""
    lab = _plain(parameters)
    changes = parse_qs(parameters["go"][-1], keep_blank_values=True) if parameters.get("go") else {}
    for name, values in changes.items():
        if name == "toggle":
            pins = lab.pin
            lab = replace(
                lab, pin=tuple(p for p in pins if p != values[-1]) if values[-1] in pins else (*pins, values[-1])
            )
        elif name != "go":
            lab = replace(lab, **{name: getattr(_plain({name: values}), name)}) if name in _NAMES else lab
    if len(lab.pin) > MAX_PINS:
        raise BadInput(f"{len(lab.pin)} features are pinned; up to {MAX_PINS} are. Take one off first.")
    return lab


_NAMES = {field.name for field in fields(Lab)}
_CHOICES = {"kind": Kind, "view": View, "by": Shade, "sort": Sort, "how": How}


def _plain(parameters: Mapping[str, Sequence[str]]) -> Lab:
    """Read parameters leniently: an address with a value that means nothing shows the usual."""
    found: dict[str, object] = {}
    for name in _NAMES & parameters.keys():
        values = list(parameters[name])
        if name in _LISTS:
            found[name] = tuple(values if name in ("role", "say") else dict.fromkeys(v for v in values if v))
        elif name == "nr":
            last = values[-1] if values else ""
            found[name] = max(1, int(last)) if re.fullmatch(r"[0-9]{1,6}", last, re.ASCII) else 1
        elif values:
            found[name] = values[-1].replace("\r\n", "\n") if name == "text" else values[-1][:400]
    for name, choices in _CHOICES.items():
        if name in found and found[name] not in get_args(choices):
            del found[name]
    return Lab(**cast(dict[str, str], found))  # pyright: ignore[reportArgumentType]
