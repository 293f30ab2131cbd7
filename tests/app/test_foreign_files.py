"""Every format and every bad SAE file through both doors: the browser's upload and `sae-atlas sae add`.

The command line runs in this process, as its entry point does, so that a hundred cases take seconds.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import signal
import struct
import sys
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from starlette.testclient import TestClient
from torch import Tensor

from app import cli, db, formats, harvests, weights
from app.settings import Settings
from app.web.multipart import SLACK_BYTES
from app.weights import CONFIG, WEIGHTS
from tests.app.test_formats import DICTIONARIES
from tests.app.test_upload import GOOD, JSON, n_sources, sae, send, stored, weights_file
from tests.app.test_weights import config, tensors

Files = dict[str, bytes]
D_IN, D_SAE, K, HOOK = 3, 7, 2, "blocks.1.hook_resid_post"


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def as_json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def torch_saved(state: Any) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def npz(**arrays: Any) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


LINEAR = {"encoder.weight": rand(D_SAE, D_IN), "decoder.weight": rand(D_IN, D_SAE)}
MATRICES = {"W_enc": rand(D_IN, D_SAE), "W_dec": rand(D_SAE, D_IN), "b_enc": rand(D_SAE), "b_dec": rand(D_IN)}
SCOPE = {name: t.numpy() for name, t in {**MATRICES, "threshold": torch.ones(D_SAE)}.items()}
SPARSIFY = {"encoder.weight": rand(D_SAE, D_IN), "encoder.bias": rand(D_SAE), "W_dec": rand(D_SAE, D_IN)}
TRAINER = {"dict_class": "AutoEncoder", "layer": 1, "submodule_name": "resid_post_layer_1"}
DICTIONARY = torch_saved({**LINEAR, "bias": rand(D_IN), "encoder.bias": rand(D_SAE)})


def dictionary(state: bytes = DICTIONARY, **trainer: Any) -> Files:
    return {"ae/config.json": as_json(trainer=TRAINER | trainer), "ae/ae.pt": state}


def sparsify(folder: str = "run/layers.1", about: bytes | None = None, **changes: Tensor) -> Files:
    weights = save({**SPARSIFY, "b_dec": rand(D_IN), **changes})
    return {
        f"{folder}/cfg.json": about or as_json(k=K, d_in=D_IN, num_latents=D_SAE),
        f"{folder}/sae.safetensors": weights,
    }


def llama(**changes: Any) -> Files:
    about = {
        "hook_point_in": HOOK,
        "jump_relu_threshold": 0.3,
        "dataset_average_activation_norm": {"in": 2.0},
    } | changes
    weights = save({**LINEAR, "encoder.bias": rand(D_SAE), "decoder.bias": rand(D_IN)})
    return {"L1R/hyperparams.json": as_json(**about), "L1R/checkpoints/final.safetensors": weights}


READ: dict[str, tuple[Files, str, str, str]] = {
    "SAELens": (sae(), "", "SAELens", "standard"),
    "sparsify": (sparsify(), "", "sparsify", "topk"),
    "dictionary_learning": (dictionary(), "", "dictionary_learning", "standard"),
    "Gemma Scope": (
        {"gemma-scope-2b-pt-res/layer_1/width_16k/params.npz": npz(**SCOPE)},
        "",
        "Gemma Scope",
        "jumprelu",
    ),
    "Gemma Scope, hook given": ({"average_l0_71/params.npz": npz(**SCOPE)}, HOOK, "Gemma Scope", "jumprelu"),
    "Gemma Scope 2": (
        {"resid_post/layer_1_width_16k/params.safetensors": save({k: torch.tensor(v) for k, v in SCOPE.items()})},
        "",
        "Gemma Scope 2",
        "jumprelu",
    ),
    "a transcoder of Gemma Scope 2 whose folder is lost": (
        {"x/params.safetensors": save({k: torch.tensor(v) for k, v in SCOPE.items()})},
        "blocks.1.mlp.hook_in",
        "Gemma Scope 2",
        "jumprelu_transcoder",
    ),
    "Llama Scope": (llama(), "", "Llama Scope", "jumprelu"),
    "OpenAI": (
        {
            "oa/config.json": as_json(activation="TopK", k=K, layer=1, location="resid_post_mlp"),
            "oa/8.safetensors": save({**LINEAR, "pre_bias": rand(D_IN), "latent_bias": rand(D_SAE)}),
        },
        "",
        "OpenAI",
        "topk",
    ),
}


class Evil:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("/tmp/sae-atlas-was-here-too"), "x"))


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def raw_header(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def overlapping() -> bytes:
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return raw_header({"W_enc": one, "b_enc": one}, bytes(8))


def bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(60_000_000))
    return out.getvalue()


def forged_npz() -> bytes:
    """An array that claims 2^60 items and holds none."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**60,)})
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("W_enc.npy", header.getvalue())
    return out.getvalue()


def archived(name: str, kind: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = (tarfile.SYMTYPE, "/etc/passwd") if kind else (tarfile.REGTYPE, "")
        archive.addfile(entry, io.BytesIO())
    return out.getvalue()


NAN = float("nan")
REFUSED: dict[str, tuple[Files, str]] = {
    "1 .pt": ({"sae.pt": pickle.dumps(Evil()), CONFIG: b"{}"}, "sae.pt is a pickle"),
    "1 .pkl": ({"sae.pkl": pickle.dumps(Evil())}, "sae.pkl is a pickle"),
    "1 .bin": ({"pytorch_model.bin": torch_saved(MATRICES), CONFIG: as_json(**config())}, "is a pickle"),
    "1 renamed": (sae(weights=pickle.dumps([1] * 99, protocol=2)), "renamed pickle"),
    "1 a renamed archive": (sae(weights=torch_saved(MATRICES)), "renamed pickle"),
    "1 ae.pt that runs code": (dictionary(torch_saved({"encoder.weight": Evil()})), "holds more than tensors"),
    "1 ae.pt that is a bare pickle": (dictionary(pickle.dumps(Evil())), "not an archive as torch.save writes it"),
    "1 ae.pt with words": (dictionary(torch_saved({**LINEAR, "note": "x"})), "'note' is a str"),
    "2 a header of 2^62": (sae(weights=struct.pack("<Q", 2**62) + b"{}"), "header claims"),
    "2 a header of 200 MB": (sae(weights=struct.pack("<Q", 200_000_000) + b"{}"), "header claims 200,000,000"),
    "2 in sparsify": ({**sparsify(), "run/layers.1/sae.safetensors": struct.pack("<Q", 2**62)}, "header claims"),
    "3 truncated": (sae(weights=GOOD[:-1]), "cut off"),
    "3 trailing": (sae(weights=GOOD + b"x"), "follow the last tensor"),
    "3 overlapping": (sae(weights=overlapping()), "overlaps the tensor before it"),
    "3 empty": (sae(weights=b""), "ends after 0 bytes"),
    "3 a truncated npz": ({"a/params.npz": npz(**SCOPE)[:200]}, "is no npz of plain arrays"),
    "4 duplicate keys": (sae(weights=struct.pack("<Q", 15) + b'{"a":1,"a":2}  '), "twice"),
    "4 duplicate keys of a config": (sae(b'{"d_in": 3, "d_in": 4}'), "names 'd_in' twice"),
    "5 too wide": (sae(config(d_sae=2**40)), "whole number from 1 to"),
    "5 a forged npz": ({"a/params.npz": forged_npz()}, "claims"),
    "6 d_in of another model": (sae(config(d_in=4), weights_file(W_enc=np.ones((4, 5), "<f4"))), "reads d_in = 4"),
    "6 W_enc turned": (sae(weights=weights_file(W_enc=np.ones((5, 3), "<f4"))), "W_enc has shape [5, 3]"),
    "6 sparsify of another model": (
        sparsify(**{"encoder.weight": rand(D_SAE, 4), "W_dec": rand(D_SAE, 4), "b_dec": rand(4)}),
        "The SAE reads d_in = 4 numbers a token; blocks.1.hook_resid_post of this model has 3",
    ),
    "7 a tensor too many": (sae(weights=weights_file(more=tensors()["b_dec"])), "holds 'more' too"),
    "7 a tensor too few": (sae(weights=raw_header({})), "lacks W_dec, W_enc, b_dec, b_enc"),
    "7 integers": (
        sae(weights=raw_header({"W_enc": {"dtype": "I32", "shape": [3, 5], "data_offsets": [0, 60]}}, bytes(60))),
        "is of type I32",
    ),
    "8 NaN": (sae(weights=weights_file(b_dec=tensors()["b_dec"] * NAN)), "b_dec holds NaN"),
    "8 infinite": (
        sae(weights=weights_file(b_dec=tensors()["b_dec"] * float("inf"))),
        "b_dec holds NaN or an infinite",
    ),
    "8 in sparsify": (sparsify(b_dec=rand(D_IN) * NAN), "b_dec holds NaN"),
    "8 in an npz": ({"layer_1-res/params.npz": npz(**SCOPE | {"b_dec": SCOPE["b_dec"] * NAN})}, "b_dec holds NaN"),
    "8 in ae.pt": (dictionary(torch_saved({**LINEAR, "bias": rand(D_IN) * NAN, "encoder.bias": rand(D_SAE)})), "NaN"),
    "9 unknown": (sae(config(architecture="magic")), "'magic' is not known"),
    "9 k = 0": (sae(config(architecture="topk", k=0)), "k is 0"),
    "9 k below 0": (sae(config(architecture="topk", k=-3)), "k is -3"),
    "9 k of a billion": (sae(config(architecture="topk", k=10**9)), "k is 1000000000"),
    "9 k in sparsify": (sparsify(about=as_json(k=10**9)), "k is 1000000000"),
    "9 an unknown dictionary": (dictionary(dict_class="Magic"), "dict_class 'Magic' is not known"),
    "9 nested": (sae(nested(10_000)), "nested too deeply"),
    "9 50 MB": (sae(b" " * 50_000_000), "at most 1,048,576 are read"),
    "10 a path": (sae(config(dataset="../../etc/passwd")), "names a place"),
    "10 an absolute path": (sae(config(tokenizer="/etc/passwd")), "names a place"),
    "10 an address": (sae(config(url="http://169.254.169.254/")), "names a place"),
    "10 a module": (sae(config(sae_class="os.system")), "names code"),
    "10 in a foreign config": (
        {**dictionary(), "ae/config.json": as_json(trainer=TRAINER | {"lm_name": "../../etc/.."})},
        "names a place",
    ),
    "11 a tar that climbs": ({"sae.tar": archived("../../cfg.json")}, ""),
    "11 a tar with a link": ({"sae.tar": archived("cfg.json", "link")}, ""),
    "11 a zip bomb": (dictionary(bomb()), "unpacks to 60,000,000 bytes"),
    "model kwargs": (
        sae(config(metadata={"hook_name": HOOK, "model_from_pretrained_kwargs": {"center_writing_weights": True}})),
        "needs a model of LayerNorms; LlamaForCausalLM is not known as one",
    ),
    "a layer that is not there": (sparsify("run/layers.9"), "layers 0 to 2"),
    "no hook": ({"x/params.npz": npz(**SCOPE)}, "name the hook, such as blocks.8.hook_resid_post"),
}

Door = Callable[[Files, str], tuple[bool, str]]
"""Files and a hook -> whether they were added, and what was said."""


@pytest.fixture(params=["upload", "command line"])
def door(
    request: pytest.FixtureRequest,
    client: TestClient,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Door:
    def upload(files: Files, hook: str) -> tuple[bool, str]:
        answer = send(client, files, JSON, hook=hook)
        assert answer.status_code in (200, 413, 422, 507), answer.text
        return answer.status_code == 200, answer.json().get("message", "")

    def command(files: Files, hook: str) -> tuple[bool, str]:
        where = written(files, tmp_path / "given")
        monkeypatch.setenv("SAE_ATLAS_DATA_DIR", str(settings.data_dir))
        monkeypatch.setenv("SAE_ATLAS_MAX_SAE_BYTES", str(settings.max_sae_bytes))
        asked = ["sae", "add", str(where), "--model", "tiny", "--set", "up", *(["--hook", hook] if hook else [])]
        monkeypatch.setattr(sys, "argv", ["sae-atlas", *asked])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None, 2)
        return ended.value.code != 2, " ".join(capsys.readouterr().err.split())

    return upload if request.param == "upload" else command


@pytest.fixture
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    return settings.model_copy(update={"max_sae_bytes": getattr(request, "param", 55_000_000)})


@pytest.mark.parametrize("name", READ)
def test_every_format_is_added(door: Door, settings: Settings, name: str) -> None:
    files, hook, form, architecture = READ[name]
    added, said = door(files, hook)
    assert added, said
    with db.sessions(db.connect(settings))() as session:
        source = harvests.source_named(session, "tiny", "1-up")
    assert (source.architecture, source.origin["format"]) == (architecture, form)
    assert source.hook_name == (hook or HOOK)
    assert (settings.sae_dir(source.sae_hash) / WEIGHTS).is_file()


@pytest.mark.parametrize("name", REFUSED)
def test_every_bad_file_is_refused_in_words_and_nothing_is_stored(door: Door, settings: Settings, name: str) -> None:
    files, sentence = REFUSED[name]
    before = stored(settings)
    added, said = door(files, "")
    assert not added
    assert sentence in said
    assert "Traceback" not in said
    assert (stored(settings), n_sources(settings)) == (before, 3)
    assert not Path("/tmp/sae-atlas-was-here-too").exists()


def wide(form: str, n: int) -> Files:
    """An SAE of n latents, as SAELens or as sparsify saves it."""
    parameters = {"W_dec": torch.ones(n, D_IN), "b_dec": torch.ones(D_IN)}
    if form == "sparsify":
        weights = parameters | {"encoder.weight": torch.ones(n, D_IN), "encoder.bias": torch.ones(n)}
        return {"a/layers.1/cfg.json": as_json(k=K), "a/layers.1/sae.safetensors": save(weights)}
    weights = parameters | {"W_enc": torch.ones(D_IN, n), "b_enc": torch.ones(n)}
    return {f"a/{name}": content for name, content in sae(config(d_sae=n), save(weights)).items()}


FORMS = pytest.mark.parametrize("form", ["SAELens", "sparsify"])


@FORMS
@pytest.mark.parametrize("settings", [2**20], indirect=True)
def test_hazard_12_an_sae_over_the_limit_is_refused_and_nothing_is_kept(
    door: Door, settings: Settings, form: str
) -> None:
    before = stored(settings)
    added, said = door(wide(form, 250_000), "")
    assert not added
    assert "1,048,576" in said or f"up to {2**20 + SLACK_BYTES:,} are read" in said
    assert (stored(settings), n_sources(settings)) == (before, 3)


@FORMS
def test_hazard_13_a_full_disk_is_said_leaves_nothing_behind_and_a_retry_works(
    door: Door, settings: Settings, tmp_path: Path, form: str
) -> None:
    files, before = wide(form, 250_000), stored(settings)
    written(files, tmp_path / "given")
    with no_file_over(5_000_000):
        added, said = door(files, "")
    assert not added
    assert "File too large" in said
    assert (stored(settings), n_sources(settings)) == (before, 3)
    added, said = door(files, "")
    assert added, said


@contextmanager
def no_file_over(n_bytes: int) -> Generator[None]:
    """Let the system write no more to a file, for this process and its children: a full disk without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def written(files: Files, root: Path) -> Path:
    """Write files below root, where they do not lie there yet; return their directory."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            (root / name).write_bytes(content)
    return root / min((Path(name).parent for name in files), key=lambda folder: len(folder.parts))


@FORMS
def test_hazard_35_the_process_that_adds_an_sae_never_holds_its_tensors(
    settings: Settings, tmp_path: Path, form: str
) -> None:
    directory = written(wide(form, 1_000_000), tmp_path)
    tracemalloc.start()
    try:
        with formats.in_saelens_format(directory, settings, formats.Hints(str(directory))) as found:
            facts = weights.check_sae(found.directory, D_IN, settings)
            weights.store_sae(settings, found.directory, facts)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert facts.d_sae == 1_000_000  # 28 MB
    assert peak < 20_000_000


def test_hazard_35_a_conversion_that_the_system_ends_for_its_memory_is_told_in_words(
    client: TestClient, settings: Settings
) -> None:
    before = stored(settings)
    killer = threading.Thread(target=kill_the_conversion)
    killer.start()
    answer = send(client, sparsify(), JSON)
    killer.join()
    assert answer.status_code == 413
    assert "took more memory than this machine has free" in answer.json()["message"]
    assert (stored(settings), n_sources(settings)) == (before, 3)
    assert send(client, sparsify(), JSON).status_code == 200


def kill_the_conversion() -> None:
    """End the child process that converts, as the kernel does, while it still imports its modules."""
    while True:
        for task in Path("/proc/self/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"app.formats" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return os.kill(int(child), signal.SIGKILL)


def test_the_classes_of_dictionary_learning_are_those_of_its_tests() -> None:
    from app.formats import DICT_CLASSES

    assert set(DICTIONARIES) == set(DICT_CLASSES)
