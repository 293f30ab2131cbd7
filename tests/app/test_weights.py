"""Foreign SAE files: good ones are read, bad ones are refused with a sentence, quickly, and leave nothing behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from app.errors import BadFile
from app.settings import Settings
from app.weights import CONFIG, PARAMETERS, WEIGHTS, check_sae, store_sae

D_IN, D_SAE, K = 3, 5, 2
Header = dict[str, Any]


def config(**changes: Any) -> dict[str, Any]:
    return {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {
            "hook_name": "blocks.1.hook_resid_post",
            "model_name": "tiny",
            "model_class_name": "HookedTransformer",
        },
        **changes,
    }


def tensors(**changes: Any) -> dict[str, np.ndarray]:
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return {name: np.ones(shape, "<f4") for name, shape in shapes.items()} | changes


def encode(arrays: dict[str, np.ndarray], dtype: str = "F32") -> tuple[Header, bytes]:
    header: Header = {}
    data = b""
    for name, array in arrays.items():
        raw = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def write(directory: Path, cfg: Any, header: Header | bytes, data: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG).write_text(cfg if isinstance(cfg, str) else json.dumps(cfg))
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return directory


def good(directory: Path, **changes: Any) -> Path:
    return write(directory, config(**changes), *encode(tensors()))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_d_sae=1000, max_sae_bytes=10_000)


def refusal(directory: Path, settings: Settings, d_model: int | None = D_IN) -> str:
    """The sentence with which an SAE is refused; nothing may be stored, and it must not take long."""
    started = time.monotonic()
    with pytest.raises(BadFile) as caught:
        store_sae(settings, directory, check_sae(directory, d_model, settings))
    assert time.monotonic() - started < 1.0
    assert not list(settings.data_dir.rglob("*.safetensors"))
    return caught.value.message


def test_a_good_sae_is_described_and_stored_under_the_hash_of_its_files(tmp_path: Path, settings: Settings) -> None:
    source = good(tmp_path / "sae")
    facts = check_sae(source, D_IN, settings)
    assert (facts.architecture, facts.d_in, facts.d_sae) == ("standard", D_IN, D_SAE)
    assert (facts.hook_name, facts.layer) == ("blocks.1.hook_resid_post", 1)
    stored = store_sae(settings, source, facts)
    both = (stored / CONFIG).read_bytes() + (stored / WEIGHTS).read_bytes()
    assert stored == settings.sae_dir(hashlib.sha256(both).hexdigest()[:16])
    assert (stored / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    assert store_sae(settings, source, facts) == stored


@pytest.mark.parametrize("architecture", list(PARAMETERS))
def test_what_sae_lens_saves_is_accepted_and_reads_the_same_after_storing(
    tmp_path: Path, settings: Settings, architecture: str
) -> None:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    extra = {"k": K} if architecture == "topk" else {}
    if "transcoder" in architecture:
        extra = {"d_out": 4, "apply_b_dec_to_input": False}
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, **extra))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    sae.save_model(tmp_path / "sae")
    stored = store_sae(settings, tmp_path / "sae", check_sae(tmp_path / "sae", None, settings))
    again = SAE.load_from_disk(str(stored))
    assert again.cfg.architecture() == architecture
    assert again.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert all((again.state_dict()[name] == value).all() for name, value in sae.state_dict().items())


def transcoder(**changes: Any) -> dict[str, Any]:
    hooks = {"hook_name": "blocks.1.mlp.hook_in", "hook_name_out": "blocks.1.hook_mlp_out"}
    return config(architecture="skip_transcoder", d_out=4, apply_b_dec_to_input=False, metadata=hooks, **changes)


def transcoder_tensors() -> dict[str, np.ndarray]:
    outward = {"W_dec": (D_SAE, 4), "b_dec": (4,), "W_skip": (4, D_IN)}
    return tensors(**{name: np.ones(shape, "<f4") for name, shape in outward.items()})


def test_a_transcoder_is_stored_with_both_hooks(tmp_path: Path, settings: Settings) -> None:
    source = write(tmp_path / "sae", transcoder(), *encode(transcoder_tensors()))
    facts = check_sae(source, None, settings)
    assert (facts.architecture, facts.hook_name) == ("skip_transcoder", "blocks.1.mlp.hook_in")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"d_out": 5}, "W_dec has shape [5, 4]; d_in = 3 and d_sae = 5 need [5, 5]"),
        ({"d_out": None}, "d_out is None"),
        ({"apply_b_dec_to_input": True}, "a transcoder's b_dec belongs to its output"),
        ({"metadata": {"hook_name": "blocks.1.hook_mlp_in"}}, "hook_name_out 'None' is not known"),
    ],
)
def test_a_transcoder_whose_output_does_not_fit_is_refused(
    tmp_path: Path, settings: Settings, changes: dict[str, Any], sentence: str
) -> None:
    source = write(tmp_path / "sae", transcoder() | changes, *encode(transcoder_tensors()))
    assert sentence in refusal(source, settings, None)


def test_a_transcoder_for_another_width_is_refused_with_both_numbers(tmp_path: Path, settings: Settings) -> None:
    source = write(tmp_path / "sae", transcoder(), *encode(transcoder_tensors()))
    assert "writes d_out = 4 numbers a token; blocks.1.hook_mlp_out of this model has 3" in refusal(source, settings, 3)


def test_the_workers_load_what_was_stored(tmp_path: Path, settings: Settings) -> None:
    from workers.checkpoints import load_sae

    stored = store_sae(settings, good(tmp_path / "sae"), check_sae(tmp_path / "sae", D_IN, settings))
    assert load_sae(stored).d_sae == D_SAE


def test_a_config_from_before_sae_lens_6_is_stored_in_todays_shape(tmp_path: Path, settings: Settings) -> None:
    old = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "hook_point": "blocks.2.hook_resid_pre",
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
        "checkpoint_path": "/scratch/someone/checkpoints",
    }
    facts = check_sae(write(tmp_path / "sae", old, *encode(tensors())), D_IN, settings)
    assert (facts.architecture, facts.layer, facts.config["k"]) == ("topk", 2, K)
    assert facts.config["metadata"] == {"hook_name": "blocks.2.hook_resid_pre", "sae_lens_version": "6.0.0"}
    assert "/scratch" not in facts.text


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_float_type_is_read_and_its_nan_found(tmp_path: Path, settings: Settings, dtype: str) -> None:
    kind, nan = {"F64": ("<f8", np.nan), "F32": ("<f4", np.inf), "F16": ("<f2", np.nan), "BF16": ("<u2", 0x7F81)}[dtype]
    arrays = {name: np.ones(array.shape, kind) for name, array in tensors().items()}
    facts = check_sae(write(tmp_path / "fine", config(), *encode(arrays, dtype)), D_IN, settings)
    assert facts.d_sae == D_SAE
    arrays["W_dec"][3, 1] = nan
    message = refusal(write(tmp_path / "sae", config(), *encode(arrays, dtype)), settings)
    assert message == f"{WEIGHTS}: W_dec holds NaN or an infinite value, first at item 10."


@pytest.mark.parametrize("name", ["sae.pt", "sae_weights.pkl", "pytorch_model.bin"])
def test_a_pickle_is_refused_and_never_loaded(tmp_path: Path, settings: Settings, name: str) -> None:
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / name).write_bytes(pickle.dumps({"W_enc": 1}))
    assert refusal(tmp_path / "sae", settings).startswith(f"{name} is a pickle")


def test_a_pickle_renamed_to_safetensors_is_refused(tmp_path: Path, settings: Settings) -> None:
    good(tmp_path / "sae")
    (tmp_path / "sae" / WEIGHTS).write_bytes(pickle.dumps({"W_enc": list(range(100))}))
    assert "renamed pickle" in refusal(tmp_path / "sae", settings)


@pytest.mark.parametrize("claimed", [2**62, 200 * 2**20])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, settings: Settings, claimed: int) -> None:
    good(tmp_path / "sae")
    with (tmp_path / "sae" / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", claimed))
        file.truncate(min(claimed, 200 * 2**20) + 8)
    roomy = settings.model_copy(update={"max_sae_bytes": 2**40})
    tracemalloc.start()
    assert f"claims {claimed:,} bytes" in refusal(tmp_path / "sae", roomy)
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()


def _shift(name: str, by: int) -> Callable[[Header], None]:
    def change(header: Header) -> None:
        header[name]["data_offsets"] = [offset + by for offset in header[name]["data_offsets"]]

    return change


def _set(name: str, key: str, value: Any) -> Callable[[Header], None]:
    return lambda header: header[name].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_shift("W_dec", -4), "'W_dec' overlaps the tensor before it: it begins at 76, not 80"),
        (_shift("b_enc", 4), "'b_enc' leaves a gap before it: it begins at 64, not 60"),
        (_set("W_enc", "dtype", "I32"), "'W_enc' is of type I32"),
        (_set("W_enc", "shape", [5, 3]), "W_enc has shape [5, 3]; d_in = 3 and d_sae = 5 need [3, 5]"),
        (_set("W_enc", "shape", [2**40, 2**40]), "its offsets span 60"),
        (_set("W_enc", "shape", [-3, -5]), "lacks a dtype, a shape"),
        (_set("W_enc", "data_offsets", [0, 2**63]), "lacks a dtype, a shape"),
        (lambda h: h.__setitem__("../b_enc", h.pop("b_enc")), "lacks b_enc"),
        (lambda h: h.__setitem__("W_enc", 7), "lacks a dtype, a shape"),
    ],
)
def test_a_header_that_does_not_fit_is_refused_with_both_numbers(
    tmp_path: Path, settings: Settings, change: Callable[[Header], None], sentence: str
) -> None:
    header, data = encode(tensors())
    change(header)
    assert sentence in refusal(write(tmp_path / "sae", config(), header, data), settings)


def test_truncated_and_trailing_bytes_are_refused(tmp_path: Path, settings: Settings) -> None:
    header, data = encode(tensors())
    short = refusal(write(tmp_path / "sae", config(), header, data[:-5]), settings)
    assert short == f"{WEIGHTS} is cut off: its tensors take 152 bytes, 147 are there."
    assert "7 bytes follow" in refusal(write(tmp_path / "sae", config(), header, data + b"trailer"), settings)
    (tmp_path / "sae" / WEIGHTS).write_bytes(b"\x10\x00")
    assert "ends after 2 bytes" in refusal(tmp_path / "sae", settings)


def test_duplicate_names_and_deep_headers_are_refused(tmp_path: Path, settings: Settings) -> None:
    header, data = encode(tensors())
    doubled = (json.dumps(header)[:-1] + ', "W_enc": ' + json.dumps(header["b_enc"]) + "}").encode()
    assert "names 'W_enc' twice" in refusal(write(tmp_path / "sae", config(), doubled, data), settings)
    deep = b"[" * 4_500 + b"]" * 4_500
    assert "nested too deeply" in refusal(write(tmp_path / "sae", config(), deep, data), settings)


def test_missing_and_extra_tensors_are_named(tmp_path: Path, settings: Settings) -> None:
    fewer = {name: array for name, array in tensors().items() if name != "b_enc"}
    assert "lacks b_enc; a standard SAE has" in refusal(write(tmp_path / "a", config(), *encode(fewer)), settings)
    more = tensors(scaling_factor=np.ones(D_SAE, "<f4"))
    assert "holds 'scaling_factor' too" in refusal(write(tmp_path / "b", config(), *encode(more)), settings)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architecture": "os.system"}, "architecture = 'os.system'"),
        (
            {"architecture": "crosscoder"},
            "'crosscoder' is not known; known are standard, topk, jumprelu, gated, transcoder",
        ),
        ({"architecture": "batchtopk"}, "save_inference_model"),
        ({"architecture": None}, "'None' is not known"),
        ({"architecture": "topk", "k": 0}, "k is 0; it must be a whole number from 1 to 5"),
        ({"architecture": "topk", "k": -3}, "k is -3"),
        ({"architecture": "topk", "k": 10**9}, "k is 1000000000"),
        ({"architecture": "topk", "k": True}, "k is True"),
        ({"architecture": "topk"}, "k is None"),
        ({"d_sae": 1001}, "d_sae is 1001; it must be a whole number from 1 to 1,000"),
        ({"d_in": "3"}, "d_in is 3; it must be a whole number"),
        ({"d_in": 4}, "reads d_in = 4 numbers a token; blocks.1.hook_resid_post of this model has 3"),
        ({"normalize_activations": "covariance_whitening"}, "is not known; known are none"),
        ({"apply_b_dec_to_input": "yes"}, "must be true or false"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_post", "model_class_name": "os.system"}}, "names code"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_post", "dataset_path": "/etc/passwd"}}, "names a place"),
        ({"metadata": {"hook_name": "../../etc/passwd"}}, "names a place"),
        ({"metadata": {"hook_name": "blocks.1.hook_everything"}}, "hook_name 'blocks.1.hook_everything' is not known"),
        ({"weights_path": "sub/../../elsewhere"}, "names a place"),
        ({"tokenizer": ["file:///etc/passwd"]}, "names a place"),
        ({"deep": {"er": "C:\\windows"}}, "names a place"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(
    tmp_path: Path, settings: Settings, changes: dict[str, Any], sentence: str
) -> None:
    assert sentence in refusal(good(tmp_path / "sae", **changes), settings)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{" * 3, "is not JSON"),
        ("[1]", "holds a list; it must hold an object"),
        ('{"d_in": NaN}', "NaN is no number of JSON"),
        ('{"a":' * 10_000 + "1" + "}" * 10_000, "nested too deeply"),
        ('{"d_in": ' + "9" * 5000 + "}", "is not JSON"),
        (" " * (50 * 2**20), "takes 52,428,800 bytes; at most 1,048,576 are read"),
    ],
)
def test_a_config_that_is_no_config_is_refused(tmp_path: Path, settings: Settings, text: str, sentence: str) -> None:
    assert sentence in refusal(write(tmp_path / "sae", text, *encode(tensors())), settings)


def test_bytes_that_are_no_text_and_files_over_the_limit_are_refused(tmp_path: Path, settings: Settings) -> None:
    directory = good(tmp_path / "sae")
    small = settings.model_copy(update={"max_sae_bytes": 100})
    assert "SAE_ATLAS_MAX_SAE_BYTES allows 100" in refusal(directory, small)
    (directory / CONFIG).write_bytes(b'{"d_in": "\xff"}')
    assert "is not UTF-8 text: byte 10 is 0xff" in refusal(directory, settings)


def test_weights_that_change_between_check_and_store_are_refused(tmp_path: Path, settings: Settings) -> None:
    source = good(tmp_path / "sae")
    facts = check_sae(source, D_IN, settings)
    raw = bytearray((source / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (source / WEIGHTS).write_bytes(bytes(raw))
    with pytest.raises(BadFile, match="changed while it was read"):
        store_sae(settings, source, facts)
    assert not list(settings.data_dir.rglob("*.safetensors"))


@given(position=st.integers(0, 700), value=st.integers(0, 255))
@examples(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_read_or_refused_but_never_crashes(
    tmp_path: Path, settings: Settings, position: int, value: int
) -> None:
    source = good(tmp_path / "sae")
    raw = bytearray((source / WEIGHTS).read_bytes())
    raw[position % len(raw)] = value
    (source / WEIGHTS).write_bytes(bytes(raw))
    with contextlib.suppress(BadFile):
        assert check_sae(source, D_IN, settings).d_sae == D_SAE


@given(
    config_text=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda v: st.dictionaries(
            st.sampled_from(
                ["architecture", "d_in", "d_sae", "k", "metadata", "hook_name", "hook_point", "activation_fn"]
            ),
            v,
        ),
    )
)
@examples(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_config_is_read_or_refused_but_never_crashes(tmp_path: Path, settings: Settings, config_text: Any) -> None:
    source = write(tmp_path / "sae", json.dumps(config_text), *encode(tensors()))
    with pytest.raises(BadFile):
        check_sae(source, D_IN, settings)


def test_checking_needs_neither_torch_nor_safetensors() -> None:
    code = "import app.weights, sys; assert not {'torch', 'safetensors'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
