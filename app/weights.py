"""Check and store foreign SAE directories (SAELens' cfg.json + sae_weights.safetensors), trusting nothing in them.

Torch-free and small in memory: the header is judged before any tensor is read, tensors are read once in chunks, for
finiteness and for the hash together. Nothing is unpickled, imported or fetched; a refused SAE leaves nothing behind.
Every refusal is a BadFile that names what is wrong, with both numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from app.errors import BadFile
from app.model_kwargs import KEY, refuse_unknown
from app.protocol import ModelCard
from app.settings import Settings
from app.tensorfile import FLOATS, Entry, chunks, first_not_finite, json_object, read_header

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
MAX_CONFIG_BYTES = 2**20

Progress = Callable[[float, str], None]
_Json = dict[str, Any]

_BASE = ("W_enc", "b_enc", "W_dec", "b_dec")
PARAMETERS: dict[str, tuple[str, ...]] = {
    "standard": _BASE,
    "topk": _BASE,
    "jumprelu": (*_BASE, "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"),
    "transcoder": _BASE,
    "skip_transcoder": (*_BASE, "W_skip"),
    "jumprelu_transcoder": (*_BASE, "threshold"),
    "jumprelu_skip_transcoder": (*_BASE, "threshold", "W_skip"),
}
"""Tensors of each architecture, as SAELens names them."""
_NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")

_HOOK = re.compile(
    r"blocks\.(\d{1,4})\.(hook_resid_(?:pre|mid|post)|hook_(?:mlp_in|mlp_out|attn_out)|attn\.hook_z|mlp\.hook_in)"
)
_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,99}")
_OUTSIDE = re.compile(r"^\s*(?:[/\\~]|[A-Za-z]:[\\/]|[a-z][a-z0-9+.-]*://)|(?:^|[/\\])\.\.(?:[/\\]|$)|\x00")
_FORGOTTEN = frozenset(
    {"checkpoint_path", "cached_activations_path", "from_pretrained_path", "output_path", "save_path"}
)
"""Where the trainer of an SAE kept its own files: never read, so a path there does no harm."""
_METADATA = (
    "model_name",
    "hook_name",
    "hook_head_index",
    "hook_name_out",
    "model_class_name",
    "prepend_bos",
    "context_size",
    "dataset_path",
    "neuronpedia_id",
    KEY,
    "sae_lens_training_version",
)
SHAPE_VERSION = "6.0.0"
"""metadata.sae_lens_version of configs in today's shape: below that, sae-lens looks for the metadata elsewhere."""


@dataclass(frozen=True)
class SaeFacts:
    """An SAE that passed every check."""

    architecture: str
    d_in: int
    d_sae: int
    hook_name: str
    layer: int
    config: _Json
    """cfg.json as it is stored: in SAELens 6's shape, with `metadata.hook_name`."""
    text: str
    """The stored cfg.json, to the byte."""
    hash: str
    """16 hex digits over both stored files; names the directory."""
    source: Path


def check_sae(directory: Path, d_model: int | None, settings: Settings, progress: Progress | None = None) -> SaeFacts:
    """Judge an SAE directory; d_model is that of the model it is for, None when unknown. Raises BadFile."""
    weights = _weights_file(directory)
    raw = _config_text(directory / CONFIG)
    given = json_object(raw, CONFIG)
    _refuse_places(given)
    modern = isinstance(given.get("metadata"), dict) and "hook_name" in given["metadata"]
    config = given if modern else modernised(given)
    text = raw if modern else json.dumps(config, indent=2)
    architecture, d_in, d_sae = _check_config(config, settings)
    hook_name, layer, kind = _hook(config)
    if d_model is not None and kind != "attn.hook_z" and d_in != d_model:
        raise BadFile(f"The SAE reads d_in = {d_in} numbers a token; {hook_name} of this model has {d_model}.")
    d_out = _output(config, architecture, d_in, d_model)
    size = weights.stat().st_size
    if size > settings.max_sae_bytes:
        raise BadFile(f"{WEIGHTS} takes {size:,} bytes; SAE_ATLAS_MAX_SAE_BYTES allows {settings.max_sae_bytes:,}.")
    tensors, data_start = read_header(weights, size)
    _check_tensors(tensors, architecture, d_in, d_sae, d_out)
    digest = _read_once(weights, tensors, data_start, text, progress or (lambda share, status: None))
    return SaeFacts(architecture, d_in, d_sae, hook_name, layer, config, text, digest[:16], directory)


def check_fits(facts: SaeFacts, card: ModelCard, hook: str = "", layer: int | None = None) -> None:
    """Raise BadFile when a checked SAE does not belong to a model, or is not where the person says it is."""
    if hook and hook != facts.hook_name:
        raise BadFile(f"The SAE says that it reads {facts.hook_name}; {hook} was asked for, which contradicts it.")
    wanted = facts.layer if layer is None else layer
    if wanted != facts.layer or facts.layer >= card.n_layers:
        raise BadFile(
            f"The SAE reads {facts.hook_name}; layer {wanted} was asked for, "
            f"and {card.id} has layers 0 to {card.n_layers - 1}."
        )
    refuse_unknown(facts.config, card.architecture)


def store_sae(settings: Settings, directory: Path, facts: SaeFacts) -> Path:
    """Copy a checked SAE to saes/{hash}, whole or not at all. Raises BadFile if it changed since it was checked."""
    target = settings.sae_dir(facts.hash)
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-") as scratch:
        copy = Path(scratch) / facts.hash
        copy.mkdir()
        (copy / CONFIG).write_text(facts.text, encoding="utf-8")
        shutil.copyfile(directory / WEIGHTS, copy / WEIGHTS)
        digest = hashlib.sha256(facts.text.encode())
        for chunk in chunks(copy / WEIGHTS, 0, (copy / WEIGHTS).stat().st_size):
            digest.update(chunk)
        if digest.hexdigest()[:16] != facts.hash:
            raise BadFile(f"{directory / WEIGHTS} changed while it was read; add it again once it is finished.")
        os.replace(copy, target)
    return target


def _weights_file(directory: Path) -> Path:
    if not directory.is_dir():
        raise BadFile(f"{directory} is not a directory; give the one that holds {CONFIG} and {WEIGHTS}.")
    weights = directory / WEIGHTS
    if not weights.is_file():
        pickles = sorted(p.name for p in directory.iterdir() if p.suffix in {".pt", ".pth", ".pkl", ".bin", ".ckpt"})
        if pickles:
            raise BadFile(f"{pickles[0]} is a pickle, which could run code when read. Save the SAE as {WEIGHTS}.")
        raise BadFile(f"{directory} holds no {WEIGHTS}; SAELens' save_model writes one.")
    if not (directory / CONFIG).is_file():
        raise BadFile(f"{directory} holds no {CONFIG}; SAELens' save_model writes one beside {WEIGHTS}.")
    return weights


def read_json(path: Path) -> _Json:
    """Return the object of a small JSON file, whatever its name. Raises BadFile."""
    return json_object(_config_text(path), path.name)


def _config_text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise BadFile(f"{path.name} takes {size:,} bytes; at most {MAX_CONFIG_BYTES:,} are read.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(
            f"{path.name} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}."
        ) from None


def _refuse_places(config: _Json) -> None:
    """Refuse strings that name files outside, addresses or modules: nothing in a config may lead anywhere."""
    for path, value in _strings(config, ""):
        key = path.rpartition(".")[2]
        if key in _FORGOTTEN:
            continue
        if _OUTSIDE.search(value):
            raise BadFile(f"{CONFIG} names a place, {path} = {value[:80]!r}; absolute paths, ../ and URLs are refused.")
        names_code = key.endswith(("class_name", "_class", "module", "_fn", "activation_fn_str", "architecture"))
        if names_code and not all(_IDENTIFIER.fullmatch(part) for part in value.split("-")):
            raise BadFile(f"{CONFIG} names code, {path} = {value[:80]!r}; a plain name is expected there.")


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Walk all strings of a parsed config with their dotted paths, without recursion."""
    stack: list[tuple[str, Any]] = [(path, value)]
    while stack:
        where, item = stack.pop()
        if isinstance(item, str):
            yield where, item
        elif isinstance(item, dict):
            stack += [(f"{where}.{key}" if where else str(key), v) for key, v in cast(_Json, item).items()]
        elif isinstance(item, list):
            stack += [(where, v) for v in cast(list[Any], item)]


def modernised(given: _Json) -> _Json:
    """Put a config from before SAELens 6 (hook_point, activation_fn_str) into today's shape."""
    old = {**given, **cast(_Json, given.get("metadata") if isinstance(given.get("metadata"), dict) else {})}
    old["hook_name"] = old.get("hook_name", old.get("hook_point"))
    old["hook_head_index"] = old.get("hook_head_index", old.get("hook_point_head_index"))
    activation = old.get("activation_fn", old.get("activation_fn_str", "relu"))
    architecture = old.get("architecture", "standard")
    k = old.get("k")
    if activation == "topk":
        arguments = old.get("activation_fn_kwargs")
        k = cast(_Json, arguments).get("k") if isinstance(arguments, dict) else k
        architecture = "topk"
    elif activation != "relu":
        raise BadFile(f"{CONFIG}: activation_fn {str(activation)[:80]!r} is not known; known are relu and topk.")
    normalise = old.get("normalize_activations") or "none"
    config: _Json = {
        "architecture": architecture,
        "d_in": old.get("d_in"),
        "d_sae": old.get("d_sae"),
        "dtype": old.get("dtype", "float32"),
        "device": "cpu",
        "apply_b_dec_to_input": old.get("apply_b_dec_to_input", True),
        "normalize_activations": "expected_average_only_in" if normalise is True else normalise,
        "reshape_activations": old.get(
            "reshape_activations", "hook_z" if "hook_z" in str(old["hook_name"]) else "none"
        ),
        "metadata": {name: old[name] for name in _METADATA if old.get(name) is not None}
        | {"sae_lens_version": SHAPE_VERSION},
    }
    if old.get("d_out") is not None:
        config |= {"d_out": old["d_out"], "apply_b_dec_to_input": False}
    return config | ({"k": k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {})


def _check_config(config: _Json, settings: Settings) -> tuple[str, int, int]:
    architecture = config.get("architecture")
    if architecture in ("batchtopk", "matryoshka_batchtopk"):
        raise BadFile(
            f"architecture {architecture!r} is a training checkpoint; save_inference_model writes it as jumprelu."
        )
    if not isinstance(architecture, str) or architecture not in PARAMETERS:
        raise BadFile(f"SAE architecture {str(architecture)[:80]!r} is not known; known are {', '.join(PARAMETERS)}.")
    d_in = _count(config, "d_in", 2**20)
    d_sae = _count(config, "d_sae", settings.max_d_sae)
    if architecture == "topk":
        _count(config, "k", d_sae)
    normalise = config.get("normalize_activations", "none")
    if normalise not in _NORMALISATIONS:
        raise BadFile(
            f"{CONFIG}: normalize_activations {str(normalise)[:80]!r} is not known; "
            f"known are {', '.join(_NORMALISATIONS)}."
        )
    for name in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        if not isinstance(config.get(name, False), bool):
            raise BadFile(f"{CONFIG}: {name} is {str(config[name])[:80]!r}; it must be true or false.")
    return architecture, d_in, d_sae


def _count(config: _Json, name: str, most: int) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise BadFile(f"{CONFIG}: {name} is {str(value)[:80]}; it must be a whole number from 1 to {most:,}.")
    return value


def _hook(config: _Json) -> tuple[str, int, str]:
    return _hook_named(cast(_Json, config["metadata"]).get("hook_name"), "hook_name")


def _output(config: _Json, architecture: str, d_in: int, d_model: int | None) -> int:
    """Return how many numbers the decoder writes: d_in, but for transcoders, which name them and where."""
    if "transcoder" not in architecture:
        return d_in
    if config.get("apply_b_dec_to_input", False):
        raise BadFile(f"{CONFIG}: apply_b_dec_to_input is true; a transcoder's b_dec belongs to its output.")
    d_out = _count(config, "d_out", 2**20)
    name, _, kind = _hook_named(cast(_Json, config["metadata"]).get("hook_name_out"), "hook_name_out")
    if d_model is not None and kind != "attn.hook_z" and d_out != d_model:
        raise BadFile(f"The transcoder writes d_out = {d_out} numbers a token; {name} of this model has {d_model}.")
    return d_out


def _hook_named(name: Any, what: str) -> tuple[str, int, str]:
    match = _HOOK.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise BadFile(f"{CONFIG}: {what} {str(name)[:80]!r} is not known; an example is blocks.8.hook_resid_pre.")
    return match[0], int(match[1]), match[2]


def _check_tensors(tensors: list[Entry], architecture: str, d_in: int, d_sae: int, d_out: int) -> None:
    names = PARAMETERS[architecture]
    found = {tensor.name: tensor for tensor in tensors}
    missing, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing:
        raise BadFile(f"{WEIGHTS} lacks {', '.join(missing)}; a {architecture} SAE has {', '.join(names)}.")
    if extra:
        raise BadFile(f"{WEIGHTS} holds {extra[0][:80]!r} too; a {architecture} SAE has {', '.join(names)}.")
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
    for name in names:
        expected = shapes.get(name, (d_sae,))
        if found[name].shape != expected:
            raise BadFile(
                f"{WEIGHTS}: {name} has shape {list(found[name].shape)}; "
                f"d_in = {d_in} and d_sae = {d_sae} need {list(expected)}."
            )


def _read_once(path: Path, tensors: list[Entry], data_start: int, text: str, progress: Progress) -> str:
    """Read the file from end to end: hash everything, and refuse tensors with NaN or infinite values."""
    digest = hashlib.sha256(text.encode())
    for chunk in chunks(path, 0, data_start):
        digest.update(chunk)
    total = max(tensors[-1].end, 1)
    for tensor in tensors:
        seen = 0
        for chunk in chunks(path, data_start + tensor.begin, tensor.end - tensor.begin):
            digest.update(chunk)
            wrong = first_not_finite(chunk, tensor.dtype)
            if wrong is not None:
                place = seen // FLOATS[tensor.dtype] + wrong
                raise BadFile(f"{WEIGHTS}: {tensor.name} holds NaN or an infinite value, first at item {place:,}.")
            seen += len(chunk)
            progress((tensor.begin + seen) / total, f"Checking {tensor.name}")
    return digest.hexdigest()
