"""Ways to write one training: the texts of a form, the short form that YAML holds, and presets. Pure.

`TrainSpec` is what all of them become; a form or a text that another makes gives the same one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from app.protocol import ModelCard
from app.trainspecs import Architecture, SaeSpec, TrainSpec

HOOKS = {
    "hook_resid_post": "residual stream after the layer (hook_resid_post)",
    "hook_resid_pre": "residual stream before the layer (hook_resid_pre)",
    "hook_resid_mid": "residual stream between attention and MLP (hook_resid_mid)",
    "hook_mlp_out": "what the MLP writes (hook_mlp_out)",
    "hook_attn_out": "what attention writes (hook_attn_out)",
    "attn.hook_z": "attention's heads before they are mixed (attn.hook_z)",
    "mlp.hook_in": "what the MLP reads, normalised (mlp.hook_in)",
    "hook_mlp_in": "what the MLP reads, before the norm (hook_mlp_in)",
}
HOOKS_OUT = ("hook_mlp_out", "hook_attn_out", "hook_resid_mid", "hook_resid_post")
GRID = ("d_sae", "k", "l1_coefficient", "l0_coefficient", "seed", "lr")
"""Fields that take several values with commas between, in a form."""
PLACES = ("layer", "hook", "hook_out")
"""What a form has in place of hook_name and hook_name_out."""
ORDER = "order"
"""What a form keeps unseen: the order of the fields with several values, which names and orders the SAEs."""
FIELDS = tuple(
    name
    for name in (*TrainSpec.model_fields, *SaeSpec.model_fields)
    if name not in ("saes", "hook_name", "hook_name_out")
)
NAMES = frozenset((*FIELDS, *PLACES, ORDER))
"""Everything that a form may send."""
_SAID = (
    "hook_name",
    "hook_name_out",
    "set_name",
    "architecture",
    "d_sae",
    "k",
    "l1_coefficient",
    "l0_coefficient",
    "n_tokens",
    "epochs",
)
"""What a short form says even where it is the default: what people look for first."""
_TEXTS = ("model", "corpus", "set_name", "text_column", "split")
_OWNED = {name for architecture in Architecture for name in architecture.fields} - {"lr", "dead_latents"}
"""Fields that not every architecture has."""
_COMMA = re.compile(r"\s*,\s*")
_NUMBER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]{1,4})?")
_MAX_DIGITS = 30


# The form ----------------------------------------------------------------------------------------------------------


def from_form(values: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a spec from a form's texts.

    What is empty has its default, and fields that the chosen architecture does not have are left out: a form may send
    them without having shown them.
    """
    asked = values.get("architecture", "").strip() or str(Architecture.TOPK)
    own = set(Architecture(asked).fields) if asked in list(Architecture) else _OWNED
    fields: dict[str, Any] = {
        name: _value(name, text)
        for name, text in ((name, values.get(name, "").strip()) for name in FIELDS)
        if text and (name not in _OWNED or name in own)
    }
    layers = [part for part in _COMMA.split(values.get("layer", "").strip()) if part]
    order = [name for name in values.get(ORDER, "").split(",") if name in (*GRID, "hook_name")]
    hooks = [f"blocks.{layer}.{values.get('hook') or 'hook_resid_post'}" for layer in layers]
    if hooks and "hook_name_out" in own and asked in list(Architecture):
        outs = [f"blocks.{layer}.{values.get('hook_out') or HOOKS_OUT[0]}" for layer in layers]
        pairs = [{"hook_name": into, "hook_name_out": out} for into, out in zip(hooks, outs, strict=True)]
        return fields | (pairs[0] if len(pairs) == 1 else {"saes": pairs})
    fields |= {"hook_name": hooks if len(hooks) > 1 else hooks[0]} if hooks else {}
    return {name: fields[name] for name in dict.fromkeys((*order, *fields)) if name in fields}


def _value(name: str, text: str) -> Any:
    if name in _TEXTS:
        return text
    if name in GRID or name == "matryoshka_widths":
        parts = [_number(part) for part in _COMMA.split(text) if part]
        return parts[0] if len(parts) == 1 and name != "matryoshka_widths" else parts or text
    return _number(text.replace(",", ""))


def _number(text: str) -> Any:
    if not _NUMBER.fullmatch(text) or len(text) > _MAX_DIGITS:
        return text
    return float(text) if re.search(r"[.eE]", text) else int(text)


def to_form(fields: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the form's texts of a spec's short form; None where a form cannot hold it: SAEs that differ freely."""
    given = dict(fields)
    pairs = _hook_pairs(given)
    if pairs is None or isinstance(given.get("architecture"), list):
        return None
    if any(isinstance(value, list) and name not in (*GRID, "matryoshka_widths") for name, value in given.items()):
        return None
    ins = [hook.split(".", 2) for hook, _ in pairs]
    outs = [out.split(".", 2) for _, out in pairs if out]
    if any(len(hook) < 3 for hook in (*ins, *outs)) or len({hook[2] for hook in ins}) > 1:
        return None
    if outs and ([out[1] for out in outs] != [hook[1] for hook in ins] or len({out[2] for out in outs}) > 1):
        return None
    values = {name: _text(value) for name, value in given.items() if name in FIELDS}
    axes = [name for name, value in fields.items() if isinstance(value, list) and name in (*GRID, "hook_name")]
    values |= {ORDER: ",".join(axes)} if len(axes) > 1 else {}
    if ins:
        values |= {"layer": ",".join(hook[1] for hook in ins), "hook": ins[0][2]}
    return values | ({"hook_out": outs[0][2]} if outs else {})


def _hook_pairs(given: dict[str, Any]) -> list[tuple[str, str]] | None:
    """Take (hook_name, hook_name_out) of all SAEs out of a short form; None where SAEs differ in more than those."""
    into: Any = given.pop("hook_name", None)
    out: Any = given.pop("hook_name_out", None)
    listed: Any = given.pop("saes", None)
    if listed is not None:
        entries = cast(list[dict[str, Any]], listed)
        if any(set(entry) - {"hook_name", "hook_name_out"} for entry in entries):
            return None
        return [(str(e.get("hook_name", into)), str(e.get("hook_name_out", out) or "")) for e in entries]
    if isinstance(out, list):
        return None
    hooks = cast(list[Any], into) if isinstance(into, list) else [into]
    return [(str(hook), str(out or "")) for hook in hooks if hook is not None]


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_text, cast(Sequence[Any], value)))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def usual(name: str) -> str:
    """Return what a field is where its box is empty and that depends on the architecture; else nothing."""
    found = [a.defaults[name] for a in Architecture if a.defaults.get(name) is not None]
    return " or ".join(dict.fromkeys(_text(value) for value in found))


# The short form ----------------------------------------------------------------------------------------------------


def short(spec: TrainSpec) -> dict[str, Any]:
    """Return the fewest fields that make this spec: defaults left out, what SAEs share outside, grids as lists."""
    common = spec.model_dump(mode="json", exclude={"saes"})
    common = {
        name: value
        for name, value in common.items()
        if name in _SAID or TrainSpec.model_fields[name].is_required() or TrainSpec.model_fields[name].default != value
    }
    first = {name: common.pop(name) for name in ("model", "corpus")}
    saes = [_spare(sae) for sae in spec.saes]
    shared = {n: v for n, v in saes[0].items() if all(n in sae and sae[n] == v for sae in saes)}
    if len(saes) == 1:
        return first | shared | common
    grid = _as_grid(spec, first, common, saes, shared)
    if grid is not None:
        return grid
    return first | shared | common | {"saes": [{n: v for n, v in sae.items() if n not in shared} for sae in saes]}


def _spare(sae: SaeSpec) -> dict[str, Any]:
    given = sae.model_dump(mode="json", exclude_none=True)
    needed = {n: given[n] for n in _SAID if n in given}
    usual = SaeSpec.model_validate(needed).model_dump(mode="json", exclude_none=True)
    return needed | {n: v for n, v in given.items() if n not in needed and usual.get(n) != v}


def _as_grid(
    spec: TrainSpec, first: dict[str, Any], common: dict[str, Any], saes: list[dict[str, Any]], shared: dict[str, Any]
) -> dict[str, Any] | None:
    """The spec as lists of values, where some order of them makes these SAEs with these names."""
    full = [sae.model_dump(mode="json", exclude_none=True) for sae in spec.saes]
    sets = [sae["set_name"] for sae in full]
    start = "".join(a[0] for a in itertools.takewhile(lambda a: len(set(a)) == 1, zip(*sets, strict=False)))
    bases = [start[:end] for end in range(len(start), 0, -1) if start[end:][:1] in ("", "-")]
    for axes in _axes(full):
        for base in bases:
            rest = {n: v for n, v in shared.items() if n not in axes and n != "set_name"}
            hooks = {n: v for n, v in axes.items() if n == "hook_name"}
            made = first | hooks | {"set_name": base} | rest | axes | common
            if _makes(made, spec):
                return made
    paired = [{n: sae[n] for n in ("hook_name", "hook_name_out") if n in sae} for sae in full]
    made = first | {n: v for n, v in shared.items() if n not in paired[0]} | common | {"saes": paired}
    return made if len(paired[0]) == 2 and _makes(made, spec) else None


def _axes(full: list[dict[str, Any]]) -> list[dict[str, list[Any]]]:
    """The fields that differ with their values, in every order; none where too many or some SAEs lack one."""
    names = [n for n in full[0] if n != "set_name" and any(sae.get(n) != full[0][n] for sae in full)]
    if not 0 < len(names) <= 4 or any(n not in sae for sae in full for n in names):
        return []
    values = {n: [v for i, v in enumerate(col) if v not in col[:i]] for n in names for col in [[s[n] for s in full]]}
    return [{n: values[n] for n in order} for order in itertools.permutations(names)]


def _makes(fields: dict[str, Any], spec: TrainSpec) -> bool:
    try:
        return TrainSpec.model_validate(fields).saes == spec.saes
    except ValidationError:
        return False


# Presets -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """A starting point for a model."""

    key: str
    name: str
    about: str
    values: Mapping[str, str]
    """Of the form, without model and corpus."""


def presets(card: ModelCard) -> tuple[Preset, ...]:
    """Return starting points for a model: its middle layer, widths in multiples of its d_model."""
    middle, d = card.n_layers // 2, card.d_model
    base = {"layer": str(middle), "hook": "hook_resid_post", "harvest_tokens": "1000000"}
    depths = dict.fromkeys(str(round(i * (card.n_layers - 1) / 4)) for i in range(5))
    long = {"n_tokens": "200000000", "epochs": "1", "dead_after_tokens": "10000000"}
    wide = str(min(_power(16 * d), 2**20))
    usual, narrow = str(_power(8 * d)), str(_power(4 * d))
    return (
        Preset(
            "quick",
            "Quick try",
            "TopK, 2 million tokens: minutes on a GPU, and good enough to look around in",
            base | {"architecture": "topk", "set_name": "quick", "d_sae": narrow, "k": "32"},
        ),
        Preset(
            "standard",
            "Standard quality",
            "BatchTopK, 8 x d_model, 200 million tokens: what is usually published",
            base | long | {"architecture": "batchtopk", "set_name": "std", "d_sae": usual, "k": "50"},
        ),
        Preset(
            "wide",
            "Wide",
            "Matryoshka BatchTopK, 16 x d_model: rarer features that split less",
            base | long | {"architecture": "matryoshka_batchtopk", "set_name": "wide", "d_sae": wide, "k": "50"},
        ),
        Preset(
            "sparsities",
            "Four sparsities",
            "TopK with k from 16 to 128 over the same activations",
            base | {"architecture": "topk", "set_name": "sparse", "d_sae": usual, "k": "16,32,64,128"},
        ),
        Preset(
            "layers",
            "Through the layers",
            f"TopK at {len(depths)} depths from first to last, in one run of the model",
            base | {"architecture": "topk", "set_name": "deep", "d_sae": narrow, "k": "32", "layer": ",".join(depths)},
        ),
        Preset(
            "jumprelu",
            "JumpReLU",
            "three penalties side by side; pick the l0 you want afterwards",
            base | {"architecture": "jumprelu", "set_name": "jump", "d_sae": usual, "l0_coefficient": "0.5,1,2"},
        ),
        Preset(
            "l1",
            "Classic L1",
            "a ReLU SAE with L1 warm-up and resampling, for comparison with older work",
            base | {"architecture": "standard", "set_name": "l1", "d_sae": usual, "l1_coefficient": "2,5"},
        ),
        Preset(
            "transcoder",
            "MLP transcoder",
            "from what an MLP reads to what it writes",
            base
            | {"architecture": "transcoder", "set_name": "tc", "d_sae": usual, "l1_coefficient": "3"}
            | {"hook": "mlp.hook_in", "hook_out": "hook_mlp_out"},
        ),
    )


def _power(n: int) -> int:
    """The power of two nearest above n; small models get 256, so that k of every preset fits."""
    return max(256, 1 << (n - 1).bit_length())
