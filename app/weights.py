"""Check and store foreign SAE directories (SAELens' cfg.json + sae_weights.safetensors), trusting nothing in them.

Torch-free and small in memory: the header is judged before any tensor is read, tensors are read once in chunks, for
finiteness and for the hash together. Nothing is unpickled, imported or fetched; a refused SAE leaves nothing behind.
Every refusal is a BadFile that names what is wrong, with both numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt

from app.errors import BadFile
from app.settings import Settings

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
MAX_CONFIG_BYTES = 2**20
MAX_HEADER_BYTES = 2**20
"""An SAE has at most six tensors; their header takes less than 1 kB."""
CHUNK_BYTES = 2**23

Progress = Callable[[float, str], None]
_Json = dict[str, Any]

_BASE = ("W_enc", "b_enc", "W_dec", "b_dec")
PARAMETERS: dict[str, tuple[str, ...]] = {
    "standard": _BASE,
    "topk": _BASE,
    "jumprelu": (*_BASE, "threshold"),
    "gated": ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"),
}
"""Tensors of each architecture, as SAELens names them."""
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_NORMALISATIONS = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")

_HOOK = re.compile(r"blocks\.(\d{1,4})\.(hook_resid_(?:pre|mid|post)|hook_(?:mlp_in|mlp_out|attn_out)|attn\.hook_z)")
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
    "model_class_name",
    "prepend_bos",
    "context_size",
    "dataset_path",
    "neuronpedia_id",
    "sae_lens_version",
    "sae_lens_training_version",
)


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


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def check_sae(directory: Path, d_model: int | None, settings: Settings, progress: Progress | None = None) -> SaeFacts:
    """Judge an SAE directory; d_model is that of the model it is for, None when unknown. Raises BadFile."""
    weights = _weights_file(directory)
    raw = _config_text(directory / CONFIG)
    given = _parse(raw)
    _refuse_places(given)
    modern = isinstance(given.get("metadata"), dict) and "hook_name" in given["metadata"]
    config = given if modern else _modernised(given)
    text = raw if modern else json.dumps(config, indent=2)
    architecture, d_in, d_sae = _check_config(config, settings)
    hook_name, layer, kind = _hook(config)
    if d_model is not None and kind != "attn.hook_z" and d_in != d_model:
        raise BadFile(f"The SAE reads d_in = {d_in} numbers a token; {hook_name} of this model has {d_model}.")
    size = weights.stat().st_size
    if size > settings.max_sae_bytes:
        raise BadFile(f"{WEIGHTS} takes {size:,} bytes; SAE_ATLAS_MAX_SAE_BYTES allows {settings.max_sae_bytes:,}.")
    tensors, data_start = _read_header(weights, size)
    _check_tensors(tensors, architecture, d_in, d_sae)
    digest = _read_once(weights, tensors, data_start, text, progress or (lambda share, status: None))
    return SaeFacts(architecture, d_in, d_sae, hook_name, layer, config, text, digest[:16], directory)


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
        for chunk in _chunks(copy / WEIGHTS, 0, (copy / WEIGHTS).stat().st_size):
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


def _config_text(path: Path) -> str:
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise BadFile(f"{CONFIG} takes {size:,} bytes; at most {MAX_CONFIG_BYTES:,} are read.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{CONFIG} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}.") from None


def _parse(raw: str) -> _Json:
    try:
        config = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise BadFile(f"{CONFIG} is nested too deeply; an SAE's config has 3 levels.") from None
    except ValueError as error:
        raise BadFile(f"{CONFIG} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise BadFile(f"{CONFIG} holds a {type(config).__name__}; it must hold an object.")
    return cast(_Json, config)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


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


def _modernised(given: _Json) -> _Json:
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
        "reshape_activations": old.get("reshape_activations", "none"),
        "metadata": {name: old[name] for name in _METADATA if old.get(name) is not None},
    }
    return config | ({"k": k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {})


def _check_config(config: _Json, settings: Settings) -> tuple[str, int, int]:
    architecture = config.get("architecture")
    if architecture == "batchtopk":
        raise BadFile(
            "architecture 'batchtopk' is a training checkpoint; SAELens' save_inference_model writes it as jumprelu."
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
    name = cast(_Json, config["metadata"]).get("hook_name")
    match = _HOOK.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise BadFile(f"{CONFIG}: hook_name {str(name)[:80]!r} is not known; an example is blocks.8.hook_resid_pre.")
    return match[0], int(match[1]), match[2]


def _read_header(path: Path, size: int) -> tuple[list[_Tensor], int]:
    """Parse a safetensors header; return its tensors in file order and where their bytes begin."""
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise BadFile(f"{WEIGHTS} ends after {size} bytes; a header's length alone takes 8.")
        if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"):
            raise BadFile(f"{WEIGHTS} is a renamed pickle, which could run code when read. Save it as safetensors.")
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER_BYTES:
            raise BadFile(f"{WEIGHTS}: the header claims {length:,} bytes; at most {MAX_HEADER_BYTES:,} are read.")
        if 8 + length > size:
            raise BadFile(f"{WEIGHTS} is cut off: the header claims {length:,} bytes, {size - 8:,} follow.")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except RecursionError:
        raise BadFile(f"{WEIGHTS}: the header is nested too deeply.") from None
    except ValueError as error:
        raise BadFile(f"{WEIGHTS}: the header is not JSON: {error}.") from None
    if not isinstance(header, dict):
        raise BadFile(f"{WEIGHTS}: the header holds a {type(header).__name__}; it must hold an object.")
    entries = cast(_Json, header)
    tensors = [_tensor(name, entry) for name, entry in entries.items() if name != "__metadata__"]
    tensors.sort(key=lambda t: (t.begin, t.end))
    _check_layout(tensors, size - 8 - length)
    return tensors, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> _Json:
    found: _Json = {}
    for key, value in pairs:
        if key in found:
            raise BadFile(f"{WEIGHTS}: the header names {key[:80]!r} twice.")
        found[key] = value
    return found


def _tensor(name: str, entry: Any) -> _Tensor:
    fields = cast(_Json, entry) if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not (isinstance(dtype, str) and _naturals(shape) and _naturals(offsets) and len(cast(list[int], offsets)) == 2):
        raise BadFile(f"{WEIGHTS}: the header's entry {name[:80]!r} lacks a dtype, a shape or two data_offsets.")
    if dtype not in _ITEM_BYTES:
        raise BadFile(f"{WEIGHTS}: {name[:80]!r} is of type {dtype[:20]}; an SAE has {', '.join(_ITEM_BYTES)}.")
    sizes, (begin, end) = tuple(cast(list[int], shape)), cast(list[int], offsets)
    expected = math.prod(sizes) * _ITEM_BYTES[dtype]
    if end - begin != expected:
        raise BadFile(
            f"{WEIGHTS}: {name[:80]!r} of shape {list(sizes)} takes {expected:,} bytes; "
            f"its offsets span {end - begin:,}."
        )
    return _Tensor(name, dtype, sizes, begin, end)


def _naturals(value: Any) -> bool:
    if not isinstance(value, list) or len(cast(list[Any], value)) > 4:
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**63 for v in cast(list[Any], value))


def _check_layout(tensors: list[_Tensor], data_bytes: int) -> None:
    """Tensors must fill the data exactly: no overlap, no gap, nothing missing, nothing behind."""
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            what = "overlaps the tensor before it" if tensor.begin < position else "leaves a gap before it"
            raise BadFile(f"{WEIGHTS}: {tensor.name[:80]!r} {what}: it begins at {tensor.begin:,}, not {position:,}.")
        position = tensor.end
    if position > data_bytes:
        raise BadFile(f"{WEIGHTS} is cut off: its tensors take {position:,} bytes, {data_bytes:,} are there.")
    if position < data_bytes:
        raise BadFile(f"{WEIGHTS}: {data_bytes - position:,} bytes follow the last tensor, which ends at {position:,}.")


def _check_tensors(tensors: list[_Tensor], architecture: str, d_in: int, d_sae: int) -> None:
    names = PARAMETERS[architecture]
    found = {tensor.name: tensor for tensor in tensors}
    missing, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing:
        raise BadFile(f"{WEIGHTS} lacks {', '.join(missing)}; a {architecture} SAE has {', '.join(names)}.")
    if extra:
        raise BadFile(f"{WEIGHTS} holds {extra[0][:80]!r} too; a {architecture} SAE has {', '.join(names)}.")
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name in names:
        expected = shapes.get(name, (d_sae,))
        if found[name].shape != expected:
            raise BadFile(
                f"{WEIGHTS}: {name} has shape {list(found[name].shape)}; "
                f"d_in = {d_in} and d_sae = {d_sae} need {list(expected)}."
            )


def _read_once(path: Path, tensors: list[_Tensor], data_start: int, text: str, progress: Progress) -> str:
    """Read the file from end to end: hash everything, and refuse tensors with NaN or infinite values."""
    digest = hashlib.sha256(text.encode())
    for chunk in _chunks(path, 0, data_start):
        digest.update(chunk)
    total = max(tensors[-1].end, 1)
    for tensor in tensors:
        seen = 0
        for chunk in _chunks(path, data_start + tensor.begin, tensor.end - tensor.begin):
            digest.update(chunk)
            wrong = _first_not_finite(chunk, tensor.dtype)
            if wrong is not None:
                place = seen // _ITEM_BYTES[tensor.dtype] + wrong
                raise BadFile(f"{WEIGHTS}: {tensor.name} holds NaN or an infinite value, first at item {place:,}.")
            seen += len(chunk)
            progress((tensor.begin + seen) / total, f"Checking {tensor.name}")
    return digest.hexdigest()


def _chunks(path: Path, start: int, length: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        while length > 0:
            chunk = file.read(min(CHUNK_BYTES, length))
            if not chunk:
                raise BadFile(f"{path.name} became shorter while it was read; {length:,} bytes are missing.")
            length -= len(chunk)
            yield chunk


def _first_not_finite(chunk: bytes, dtype: str) -> int | None:
    if dtype == "BF16":
        # numpy has no bfloat16: not finite is an exponent of all ones.
        bad: npt.NDArray[np.bool_] = (np.frombuffer(chunk, "<u2") & 0x7F80) == 0x7F80
    else:
        bad = ~np.isfinite(np.frombuffer(chunk, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]))
    return int(bad.argmax()) if bad.any() else None
