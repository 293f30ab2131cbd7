"""SAEs as other libraries save them, turned into SAELens' directory format before they are checked and stored.

Torch-free: numpy reads safetensors and npz; a pickled ae.pt is opened by `python -m workers.convert_sae`, which accepts
tensors alone. Tensors are held by a process of its own (`python -m app.formats`), never by the one that asks: a file
larger than the memory ends that process and no server. What a file does not say (Gemma Scope's hook) comes from the
names of its folders or from the person. What comes out is still foreign: app.weights judges it like any directory.
Raises BadFile, and TooLarge where memory does not suffice.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from app import tensorfile
from app.errors import AtlasError, BadFile, TooLarge
from app.settings import Settings
from app.tensorfile import Arrays
from app.weights import CONFIG, SHAPE_VERSION, WEIGHTS, modernised, read_json

Array = npt.NDArray[np.float32]
_Json = dict[str, Any]


@dataclass(frozen=True)
class Hints:
    """What is known of an SAE beside its files."""

    where: str = ""
    """Repo and folders it lies in, such as google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71."""
    hook_name: str = ""
    """Where the person says it reads."""
    norm_scale: float = 0.0
    """What inputs must be multiplied by, where SAELens' list of releases says so; 0 where it does not."""
    overrides: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What that list puts in place of the config's own keys, such as model_from_pretrained_kwargs."""


class Recognised(NamedTuple):
    """A directory in SAELens' format, and the format it came in."""

    directory: Path
    format: str


class Foreign(NamedTuple):
    """An SAE read from another format, in SAELens' names and orientation."""

    architecture: str
    arrays: Arrays
    metadata: _Json
    switches: _Json = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    """Keys of cfg.json beside those that every SAE has."""


@dataclass(frozen=True)
class Format:
    """One way of saving an SAE."""

    name: str
    files: str
    """What a directory must hold, in words."""
    recognises: Callable[[Path], bool]
    read: Callable[[Path, Hints, Settings], Foreign] = field(repr=False)


@contextmanager
def in_saelens_format(directory: Path, settings: Settings, hints: Hints) -> Generator[Recognised]:
    """Yield the directory itself where it is SAELens', otherwise a converted copy that lives as long as the block."""
    found = _format(directory, hints)
    if found is None and not hints.overrides:
        yield Recognised(directory, SAELENS)
        return
    (settings.data_dir / "saes").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.data_dir / "saes", prefix=".new-") as scratch:
        if found:
            _convert_apart(directory, Path(scratch), settings, hints)
            yield Recognised(Path(scratch), found.name)
        else:
            _link(Path(scratch), directory, hints)
            yield Recognised(Path(scratch), SAELENS)


def _format(directory: Path, hints: Hints) -> Format | None:
    found = recognise(directory)
    return _SCALED if found is None and hints.norm_scale and _expects_scaled(directory) else found


def _convert_apart(directory: Path, out: Path, settings: Settings, hints: Hints) -> None:
    """Have another process convert. Raises what it raised, TooLarge where it was ended for the memory it took."""
    order = _Order(
        str(directory.absolute()), str(out.absolute()), str(settings.data_dir), settings.max_sae_bytes, hints
    )
    command = [sys.executable, "-m", "app.formats"]
    done = subprocess.run(command, input=json.dumps(asdict(order)), capture_output=True, text=True, errors="replace")
    if done.returncode in (-signal.SIGKILL, _NO_MEMORY):
        size = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        raise TooLarge(
            f"Converting {size / 2**20:,.0f} MiB to SAELens' format took more memory than this machine has free, "
            f"about {3 * size / 2**20:,.0f} MiB. Convert it on a larger one with SAELens' save_model; files in its "
            "format are read piece by piece."
        )
    if done.returncode != 0:
        said = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        number, _, words = said.partition(" ")
        if done.returncode == _SYSTEM:
            raise OSError(int(number), words)
        raise {_REFUSED: BadFile}.get(done.returncode, AtlasError)(said)


@dataclass(frozen=True)
class _Order:
    """What the converting process is told, as JSON."""

    directory: str
    out: str
    data_dir: str
    max_sae_bytes: int
    hints: Hints


_REFUSED, _FAILED, _SYSTEM, _NO_MEMORY = 10, 11, 12, 13
"""How the converting process ends: BadFile, another AtlasError, OSError, MemoryError; the last line says why."""


def _convert() -> int:
    """The converting process: read the order, convert, and say how it went."""
    order: _Json = json.load(sys.stdin)
    hints, directory = Hints(**order["hints"]), Path(order["directory"])
    settings = Settings(data_dir=Path(order["data_dir"]), max_sae_bytes=order["max_sae_bytes"])
    with contextlib.suppress(OSError):  # Linux: where memory runs out, this process ends before any other
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        found = _format(directory, hints)
        assert found is not None
        _write(Path(order["out"]), found.read(directory, hints, settings), hints)
    except MemoryError:
        return _NO_MEMORY
    except OSError as error:
        return _ended(_SYSTEM, f"{error.errno} {error.strerror}")
    except AtlasError as error:
        return _ended(_REFUSED if isinstance(error, BadFile) else _FAILED, error.message)
    return 0


def _ended(status: int, words: str) -> int:
    sys.stderr.write("\n" + " ".join(words.split()))
    return status


def _link(scratch: Path, directory: Path, hints: Hints) -> None:
    """Write a config with the overrides beside a link to the weights."""
    (scratch / CONFIG).write_text(json.dumps(_overridden(_modern(directory), hints), indent=2), encoding="utf-8")
    (scratch / WEIGHTS).symlink_to((directory / WEIGHTS).resolve())


def _overridden(config: _Json, hints: Hints) -> _Json:
    own = {key: value for key, value in hints.overrides.items() if key == "normalize_activations"}
    about = {key: value for key, value in hints.overrides.items() if key not in own}
    return {**config, **own, "metadata": {**config["metadata"], **about}}


def recognise(directory: Path) -> Format | None:
    """Tell by its files which format a directory has; None is SAELens' own. Raises BadFile naming what was found."""
    if not directory.is_dir():
        raise BadFile(f"{directory} is not a directory; give the one that holds the SAE.")
    for format in FORMATS:
        if format.recognises(directory):
            return format
    names = sorted(path.name for path in directory.iterdir())
    pickled = any(name.endswith((".pt", ".pth", ".pkl", ".bin", ".ckpt")) for name in names)
    if WEIGHTS in names or pickled:
        return None  # SAELens', or refused by app.weights in its own words
    held = ", ".join(names[:8])[:200] or "nothing"
    if CONFIG in names and not any(name.endswith((".safetensors", ".npz")) for name in names):
        raise BadFile(
            f"{directory} holds {held}, but no weights; {WEIGHTS} (SAELens) or sae.safetensors (sparsify) "
            "belongs there."
        )
    ways = "; ".join(f"{name} ({files})" for name, files in known())
    raise BadFile(f"{directory} holds {held}. Known are {ways}.")


def known() -> tuple[tuple[str, str], ...]:
    """The formats that are read, as (name, files)."""
    return ((SAELENS, f"{CONFIG}, {WEIGHTS}"), *((format.name, format.files) for format in FORMATS if format.files))


def _write(directory: Path, foreign: Foreign, hints: Hints) -> None:
    arrays, transcoder = foreign.arrays, "transcoder" in foreign.architecture
    hook_name = hints.hook_name or foreign.metadata.get("hook_name")
    if not hook_name:
        raise BadFile(
            "Neither files nor folder names say where this SAE reads; name the hook, such as blocks.8.hook_resid_post "
            "(--hook on the command line)."
        )
    config: _Json = {
        "architecture": foreign.architecture,
        "d_in": arrays["W_enc"].shape[0],
        "d_sae": arrays["W_enc"].shape[1],
        **({"d_out": arrays["W_dec"].shape[1]} if transcoder else {}),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if str(hook_name).endswith("hook_z") else "none",
        **foreign.switches,
        "metadata": {
            **{key: value for key, value in foreign.metadata.items() if value is not None},
            "hook_name": hook_name,
            "sae_lens_version": SHAPE_VERSION,
        },
    }
    config = _overridden(config, hints)
    (directory / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    tensorfile.write(directory / WEIGHTS, arrays)


# SAELens, but not yet for inference ------------------------------------------------------------------------------

SAELENS = "SAELens"
_TRAINING = ("batchtopk", "matryoshka_batchtopk")


def _is_training_checkpoint(directory: Path) -> bool:
    return _has(directory, CONFIG, WEIGHTS) and read_json(directory / CONFIG).get("architecture") in _TRAINING


def _read_training_checkpoint(directory: Path, _hints: Hints, settings: Settings) -> Foreign:
    """BatchTopK keeps one threshold for all latents; at inference it is a JumpReLU SAE, as SAELens saves it too."""
    config = read_json(directory / CONFIG)
    arrays = tensorfile.load(directory / WEIGHTS, settings.max_sae_bytes)
    kept = {name: _take(arrays, name, n) for name, n in (("W_enc", 2), ("b_enc", 1), ("W_dec", 2), ("b_dec", 1))}
    if config.get("rescale_acts_by_decoder_norm"):
        kept = _fold_norms(kept)
    kept["threshold"] = np.full(kept["b_enc"].shape, _take(arrays, "topk_threshold", 0), np.float32)
    switches = {name: config[name] for name in ("apply_b_dec_to_input", "normalize_activations") if name in config}
    metadata = config.get("metadata")
    return Foreign("jumprelu", kept, cast(_Json, metadata) if isinstance(metadata, dict) else {}, switches)


def _has_scaling_factor(directory: Path) -> bool:
    weights = directory / WEIGHTS
    if not _has(directory, CONFIG, WEIGHTS) or weights.stat().st_size > 2**40:
        return False
    entries, _ = tensorfile.read_header(weights, weights.stat().st_size, tensorfile.FLOATS | tensorfile.INTEGERS)
    return any(entry.name == "scaling_factor" for entry in entries)


def _read_without_scaling_factor(directory: Path, _hints: Hints, settings: Settings) -> Foreign:
    """SAELens saved a factor of ones with every SAE for a while. Raises BadFile for any other factor."""
    arrays = tensorfile.load(directory / WEIGHTS, settings.max_sae_bytes)
    factor = arrays.pop("scaling_factor")
    if not np.allclose(factor, 1):
        raise BadFile(
            f"{WEIGHTS} holds a scaling_factor from {factor.min():.3g} to {factor.max():.3g}; only 1 is known."
        )
    return _as_they_are(directory, arrays)


def _expects_scaled(directory: Path) -> bool:
    return _has(directory, CONFIG) and _modern(directory).get("normalize_activations") == "expected_average_only_in"


def _read_scaled(directory: Path, hints: Hints, settings: Settings) -> Foreign:
    """Fold the factor that inputs were multiplied by in training, as SAELens does when it loads such a release."""
    arrays = tensorfile.load(directory / WEIGHTS, settings.max_sae_bytes)
    scale = np.float32(hints.norm_scale)
    arrays = {name: array * scale if name == "W_enc" else array for name, array in arrays.items()}
    arrays |= {name: _take(arrays, name, rank) / scale for name, rank in (("W_dec", 2), ("b_dec", 1))}
    foreign = _as_they_are(directory, arrays)
    return foreign._replace(switches={**foreign.switches, "normalize_activations": "none"})


def _as_they_are(directory: Path, arrays: Arrays) -> Foreign:
    arrays |= {name: _take(arrays, name, 2) for name in ("W_enc", "W_dec")}
    config = _modern(directory)
    metadata = cast(_Json, config.pop("metadata"))
    architecture = str(config.pop("architecture", "standard"))
    return Foreign(architecture, arrays, metadata, {k: v for k, v in config.items() if k not in ("d_in", "d_sae")})


def _modern(directory: Path) -> _Json:
    config = read_json(directory / CONFIG)
    return config if isinstance(config.get("metadata"), dict) else modernised(config)


# EleutherAI sparsify ---------------------------------------------------------------------------------------------


def _is_sparsify(directory: Path) -> bool:
    return _has(directory, CONFIG, "sae.safetensors")


def _read_sparsify(directory: Path, hints: Hints, settings: Settings) -> Foreign:
    """encoder.weight [d_sae, d_in], encoder.bias, W_dec [d_sae, d_in], b_dec; TopK of (x - b_dec) W_enc + b_enc."""
    config = read_json(directory / CONFIG)
    for name in ("transcode", "skip_connection", "signed", "matching_pursuit"):
        if config.get(name):
            raise BadFile(
                f"{CONFIG}: {name} is set; of sparsify's coders the TopK autoencoder is known. "
                "SAELens has no architecture for the others; add the autoencoder of the same layer instead."
            )
    if config.get("activation", "topk") != "topk":
        raise BadFile(
            f"{CONFIG}: activation {str(config['activation'])[:40]!r} is not known; topk is. "
            "SAELens has no architecture for it; add a coder of the same layer trained with topk."
        )
    arrays = tensorfile.load(directory / "sae.safetensors", settings.max_sae_bytes)
    kept = {
        "W_enc": _take(arrays, "encoder.weight", 2).T,
        "b_enc": _take(arrays, "encoder.bias", 1),
        "W_dec": _take(arrays, "W_dec", 2),
        "b_dec": _take(arrays, "b_dec", 1),
    }
    metadata = {"hook_name": _module_hook(hints.where)}
    return Foreign("topk", kept, metadata, {"k": config.get("k"), "apply_b_dec_to_input": True})


_MODULE = re.compile(r"(?:^|[./])(?:layers|h|blocks)[._](\d{1,4})(?:\.(\w+))?(?=/|$)")
_MODULE_HOOKS = {
    "": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "attn": "hook_attn_out",
    "self_attn": "hook_attn_out",
    "attention": "hook_attn_out",
}


def _module_hook(where: str) -> str | None:
    """transformers' module whose output was read -> hook: layers.8 is resid_post, layers.8.mlp is mlp_out."""
    found = list(_MODULE.finditer(where))
    if not found or (found[-1][2] or "") not in _MODULE_HOOKS:
        return None
    return f"blocks.{int(found[-1][1])}.{_MODULE_HOOKS[found[-1][2] or '']}"


# dictionary_learning ---------------------------------------------------------------------------------------------


def _is_dictionary_learning(directory: Path) -> bool:
    return _has(directory, "config.json", "ae.pt")


def _read_dictionary_learning(directory: Path, _hints: Hints, settings: Settings) -> Foreign:
    """One class of dictionary_learning each; its gated and jumprelu ones multiply activations by the decoder norms."""
    config = read_json(directory / "config.json")
    trainer = cast(_Json, config["trainer"]) if isinstance(config.get("trainer"), dict) else config
    arrays = _unpickled(directory / "ae.pt", settings)
    dict_class = str(trainer.get("dict_class"))
    metadata = {"hook_name": _trainer_hook(trainer), "model_name": _plain(trainer.get("lm_name"))}
    W_enc = _take(arrays, "W_enc", 2) if "W_enc" in arrays else _take(arrays, "encoder.weight", 2).T
    W_dec = _take(arrays, "W_dec", 2) if "W_dec" in arrays else _take(arrays, "decoder.weight", 2).T
    kept: Arrays = {
        "W_enc": W_enc,
        "W_dec": W_dec,
        "b_dec": _first(arrays, "b_dec", "bias", "decoder_bias", "decoder.bias"),
    }
    if dict_class == "GatedAutoEncoder":
        kept |= {
            "b_gate": _take(arrays, "gate_bias", 1),
            "r_mag": _take(arrays, "r_mag", 1),
            "b_mag": _take(arrays, "mag_bias", 1),
        }
        return Foreign("gated", _fold_norms(kept), metadata, {"apply_b_dec_to_input": True})
    kept["b_enc"] = _first(arrays, "b_enc", "encoder.bias")
    match dict_class:
        case "AutoEncoder" | "AutoEncoderNew":
            return Foreign("standard", kept, metadata, {"apply_b_dec_to_input": dict_class == "AutoEncoder"})
        case "AutoEncoderTopK":
            return Foreign("topk", kept, metadata, {"k": trainer.get("k"), "apply_b_dec_to_input": True})
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            # Untrained thresholds are -1, which no activation is below: 0 means the same.
            threshold = np.maximum(_take(arrays, "threshold", 0), 0)
            kept["threshold"] = np.full(kept["b_enc"].shape, threshold, np.float32)
            return Foreign("jumprelu", kept, metadata, {"apply_b_dec_to_input": True})
        case "JumpReluAutoEncoder":
            kept["threshold"] = _take(arrays, "threshold", 1)
            return Foreign("jumprelu", _fold_norms(kept), metadata)
        case _:
            raise BadFile(
                f"config.json: dict_class {dict_class[:60]!r} is not known; known are {', '.join(DICT_CLASSES)}."
            )


DICT_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def _trainer_hook(trainer: _Json) -> str | None:
    layer, module = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    if not isinstance(layer, int):
        return None
    kind = "hook_mlp_out" if "mlp" in module else "hook_attn_out" if "att" in module else "hook_resid_post"
    return f"blocks.{layer}.{kind}"


def _unpickled(file: Path, settings: Settings) -> Arrays:
    """Have another process open a pickle that may hold tensors alone, and return them."""
    if file.stat().st_size > settings.max_sae_bytes:
        raise BadFile(f"{file.name} takes {file.stat().st_size:,} bytes; {settings.max_sae_bytes:,} are allowed.")
    (settings.data_dir / "saes").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.data_dir / "saes", prefix=".new-") as scratch:
        out = Path(scratch) / "tensors.safetensors"
        command = [sys.executable, "-m", "workers.convert_sae", str(file), str(out), str(settings.max_sae_bytes)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            said = (done.stderr.strip() or "nothing was said").splitlines()[-1]
            if "No module named" in said:
                raise AtlasError(f"{said}. Opening a .pt file needs torch: pip install 'sae-atlas[worker]'.")
            raise BadFile(f"{file.name}: {said}")
        return tensorfile.load(out, 2 * settings.max_sae_bytes)


# Gemma Scope and Gemma Scope 2 -----------------------------------------------------------------------------------


def _is_gemma_scope(directory: Path) -> bool:
    return _has(directory, "params.npz")


def _is_gemma_scope_2(directory: Path) -> bool:
    return _has(directory, "params.safetensors")


def _read_gemma_scope(directory: Path, hints: Hints, settings: Settings) -> Foreign:
    """JumpReLU of x W_enc + b_enc; site, layer and model are in the names of repo and folder."""
    return _gemma(_npz(directory / "params.npz", settings.max_sae_bytes), hints)


def _read_gemma_scope_2(directory: Path, hints: Hints, settings: Settings) -> Foreign:
    """The same with names in lower case; an affine transcoder's skip connection is [d_in, d_out]."""
    return _gemma(tensorfile.load(directory / "params.safetensors", settings.max_sae_bytes), hints)


def _gemma(given: Arrays, hints: Hints) -> Foreign:
    where = hints.where
    if "transcoder" not in where and hints.hook_name.endswith(("mlp.hook_in", "hook_mlp_in")):
        where += "/transcoder"  # only those read the MLP's input
    if not re.search(r"layer_\d", where) and (named := re.match(r"blocks\.(\d{1,4})\.", hints.hook_name)):
        where += f"/layer_{named[1]}"
    arrays = {name.replace("w_", "W_"): array for name, array in given.items()}
    ranks = {"W_enc": 2, "b_enc": 1, "W_dec": 2, "b_dec": 1, "threshold": 1}
    kept = {name: _take(arrays, name, n) for name, n in ranks.items()}
    layer = re.search(r"layer_(\d{1,4})", where)
    site = next((hook for words, hook in _GEMMA_SITES if any(word in where for word in words)), None)
    size = re.search(r"gemma-scope-(2-)?(\d+[mb])-(pt|it)", where)
    metadata: _Json = {"prepend_bos": True}
    if size:
        metadata["model_name"] = f"gemma-{3 if size[1] else 2}-{size[2]}" + ("-it" if size[3] == "it" else "")
    if layer and site:
        metadata["hook_name"] = f"blocks.{int(layer[1])}.{site}"
    if "transcoder" not in where:
        return Foreign("jumprelu", kept, metadata)
    if layer:
        metadata["hook_name_out"] = f"blocks.{int(layer[1])}.hook_mlp_out"
    if "affine_skip_connection" in arrays:
        kept["W_skip"] = _take(arrays, "affine_skip_connection", 2).T
        return Foreign("jumprelu_skip_transcoder", kept, metadata)
    return Foreign("jumprelu_transcoder", kept, metadata)


_GEMMA_SITES = (
    (("transcoder",), "mlp.hook_in"),
    (("-res", "resid_post"), "hook_resid_post"),
    (("-att", "attn_out"), "attn.hook_z"),
    (("-mlp", "mlp_out"), "hook_mlp_out"),
)
"""Words in the names of Gemma Scope's repos and Gemma Scope 2's folders. Its attention SAEs read z, not attn_out."""


def _npz(file: Path, max_bytes: int) -> Arrays:
    """Read an npz without pickles; sizes are compared with what the archive holds before anything is allocated."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > max_bytes:
                raise BadFile(f"{file.name} unpacks to {total:,} bytes; {max_bytes:,} are allowed.")
            for member in members:
                with archive.open(member) as stream:
                    _check_npy(cast(Any, stream), member, file.name)
        with np.load(file, allow_pickle=False, max_header_size=10_000) as data:
            return {name: np.asarray(data[name], np.float32) for name in data.files}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise BadFile(f"{file.name} is no npz of plain arrays: {str(error).splitlines()[0][:160]}") from None


def _check_npy(stream: Any, member: zipfile.ZipInfo, file: str) -> None:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream, max_header_size=10_000)
    if dtype.kind not in "fiu":
        raise BadFile(f"{file}: {member.filename[:80]!r} holds {dtype!s:.40}, not numbers.")
    n_bytes = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
    if n_bytes > member.file_size:
        raise BadFile(f"{file}: {member.filename[:80]!r} claims {n_bytes:,} bytes; {member.file_size:,} are there.")


# Llama Scope and OpenAI ------------------------------------------------------------------------------------------


def _is_llama_scope(directory: Path) -> bool:
    return _has(directory, "hyperparams.json") and _llama_weights(directory) is not None


def _llama_weights(directory: Path) -> Path | None:
    places = (directory / "checkpoints" / "final.safetensors", directory / "final.safetensors")
    return next((path for path in places if path.is_file()), None)


def _read_llama_scope(directory: Path, _hints: Hints, settings: Settings) -> Foreign:
    """It scales inputs to a mean norm of sqrt(d_in); that is folded in, into its one threshold too, like sae-lens."""
    config = read_json(directory / "hyperparams.json")
    weights = _llama_weights(directory)
    assert weights is not None
    norms = config.get("dataset_average_activation_norm")
    norm = _positive(
        "dataset_average_activation_norm.in", cast(_Json, norms).get("in") if isinstance(norms, dict) else 0
    )
    if config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in"):
        raise BadFile(
            "hyperparams.json: hook_point_out differs from hook_point_in; Llama Scope's transcoders are not read. "
            "Its SAEs are, and transcoders saved by SAELens."
        )
    threshold = _positive("jump_relu_threshold", config.get("jump_relu_threshold"))
    arrays = tensorfile.load(weights, settings.max_sae_bytes)
    W_enc, b_enc = _take(arrays, "encoder.weight", 2).T, _take(arrays, "encoder.bias", 1)
    scale = np.float32(W_enc.shape[0] ** 0.5 / norm)
    kept = {
        "W_enc": W_enc * scale,
        "b_enc": b_enc,
        "W_dec": _take(arrays, "decoder.weight", 2).T / scale,
        "b_dec": _take(arrays, "decoder.bias", 1) / scale,
        "threshold": np.full(b_enc.shape, threshold * scale, np.float32),
    }
    return Foreign("jumprelu", kept, {"hook_name": config.get("hook_point_in"), "prepend_bos": True})


def _is_openai(directory: Path) -> bool:
    return _openai_weights(directory) is not None


def _openai_weights(directory: Path) -> Path | None:
    files = [path for path in directory.glob("*.safetensors") if path.name not in (WEIGHTS, "sparsity.safetensors")]
    if len(files) != 1 or not (0 < files[0].stat().st_size < 2**40):
        return None
    entries, _ = tensorfile.read_header(files[0], files[0].stat().st_size, tensorfile.FLOATS | tensorfile.INTEGERS)
    return files[0] if {"pre_bias", "latent_bias"} <= {entry.name for entry in entries} else None


_LOCATIONS = {
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
}


def _read_openai(directory: Path, _hints: Hints, settings: Settings) -> Foreign:
    """activation((x - pre_bias) W_enc + latent_bias), decoded with pre_bias added; its TopK SAEs normalise like LN."""
    config = next((read_json(directory / name) for name in ("config.json", CONFIG) if _has(directory, name)), None)
    if config is None:
        raise BadFile(
            'Beside OpenAI\'s weights, config.json must say {"activation": "TopK", "k": 32, "layer": 8, ...}.'
        )
    weights = _openai_weights(directory)
    assert weights is not None
    arrays = tensorfile.load(weights, settings.max_sae_bytes)
    W_enc = _take(arrays, "encoder.weight", 2).T
    kept = {
        "W_enc": W_enc,
        "b_enc": _take(arrays, "latent_bias", 1),
        "W_dec": _take(arrays, "decoder.weight", 2).T if "decoder.weight" in arrays else W_enc.T,
        "b_dec": _take(arrays, "pre_bias", 1),
    }
    topk = config.get("activation") == "TopK"
    if not topk and config.get("activation") != "ReLU":
        raise BadFile(
            f"config.json: activation {str(config.get('activation'))[:40]!r} is not known; known are TopK and ReLU."
        )
    normalised = config.get("normalize", topk)
    switches: _Json = {
        "apply_b_dec_to_input": True,
        "normalize_activations": "layer_norm" if normalised else "none",
        **({"k": config.get("k")} if topk else {}),
    }
    hook = _LOCATIONS.get(str(config.get("location")))
    placed = f"blocks.{config['layer']}.{hook}" if hook and isinstance(config.get("layer"), int) else None
    return Foreign("topk" if topk else "standard", kept, {"hook_name": config.get("hook_name") or placed}, switches)


_SCALED = Format("SAELens", "", lambda _: False, _read_scaled)
FORMATS: tuple[Format, ...] = (
    Format("SAELens training checkpoint", "", _is_training_checkpoint, _read_training_checkpoint),
    Format("SAELens before 4", "", _has_scaling_factor, _read_without_scaling_factor),
    Format("sparsify", f"{CONFIG}, sae.safetensors", _is_sparsify, _read_sparsify),
    Format("dictionary_learning", "config.json, ae.pt", _is_dictionary_learning, _read_dictionary_learning),
    Format("Gemma Scope", "params.npz", _is_gemma_scope, _read_gemma_scope),
    Format("Gemma Scope 2", "params.safetensors", _is_gemma_scope_2, _read_gemma_scope_2),
    Format("Llama Scope", "hyperparams.json, checkpoints/final.safetensors", _is_llama_scope, _read_llama_scope),
    Format("OpenAI", "config.json, one safetensors with pre_bias and latent_bias", _is_openai, _read_openai),
)


# Shared ----------------------------------------------------------------------------------------------------------


def _has(directory: Path, *names: str) -> bool:
    return all((directory / name).is_file() for name in names)


def _take(arrays: Arrays, name: str, rank: int) -> Array:
    if name not in arrays:
        raise BadFile(f"The file lacks {name}; it holds {', '.join(sorted(arrays))[:200] or 'nothing'}.")
    if arrays[name].ndim != rank:
        raise BadFile(f"{name} has shape {list(arrays[name].shape)}; {rank} axes are expected.")
    return arrays[name]


def _first(arrays: Arrays, *names: str) -> Array:
    return _take(arrays, next((name for name in names if name in arrays), names[0]), 1)


def _fold_norms(arrays: Arrays) -> Arrays:
    """Make decoder rows of norm 1 and activations larger by the norms; reconstructions stay."""
    n_encoded, n_decoded = arrays["W_enc"].shape[1], arrays["W_dec"].shape[0]
    if any(len(arrays[name]) != n_decoded for name in _PER_LATENT & set(arrays)) or n_encoded != n_decoded:
        raise BadFile(f"W_enc has {n_encoded} latents, W_dec {n_decoded}; biases and thresholds need as many.")
    norms = np.maximum(np.linalg.norm(arrays["W_dec"], axis=1), np.float32(1e-8))
    grown = {name: array * norms if name in _PER_LATENT or name == "W_enc" else array for name, array in arrays.items()}
    return grown | {"W_dec": arrays["W_dec"] / norms[:, None]}


_PER_LATENT = frozenset({"b_enc", "threshold", "b_gate", "b_mag"})


def _plain(name: Any) -> str | None:
    """The last part of a hub id or path: a config may name no places."""
    return re.split(r"[/\\]", name)[-1] or None if isinstance(name, str) else None


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
        raise BadFile(f"hyperparams.json: {name} is {str(value)[:40]}; it must be a number above 0.")
    return float(value)


if __name__ == "__main__":
    sys.exit(_convert())
