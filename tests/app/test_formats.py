"""Other libraries' files: written as those libraries write them, read into SAELens' format, computing the same."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as theirs
from sae_lens.registry import get_sae_training_class
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from app.errors import BadFile
from app.formats import FORMATS, Hints, in_saelens_format
from app.settings import Settings
from app.weights import PARAMETERS, SaeFacts, check_sae, store_sae
from workers.checkpoints import load_sae

D_IN, D_SAE, K, BATCH = 6, 11, 3, 5
RESID = "blocks.3.hook_resid_post"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", max_d_sae=1000, max_sae_bytes=100_000)


def stored(directory: Path, settings: Settings, **hints: str) -> tuple[SaeFacts, Path]:
    with in_saelens_format(directory, settings, Hints(**hints)) as found:
        facts = check_sae(found.directory, None, settings)
        return facts, store_sae(settings, found.directory, facts)


def refusal(directory: Path, settings: Settings, **hints: str) -> str:
    """The sentence of a refusal, which leaves nothing behind."""
    with pytest.raises(BadFile) as caught:
        stored(directory, settings, **hints)
    assert not [path for path in settings.data_dir.rglob("*") if path.is_file()]
    return caught.value.message


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def inputs() -> Tensor:
    return 2 * rand(BATCH, D_IN, seed=9) + 0.3


def same(directory: Path, x: Tensor, acts: Tensor, x_hat: Tensor) -> None:
    """What was stored computes acts and x_hat, in our coder and in sae-lens."""
    ours, lens = load_sae(directory), SAE.load_from_disk(str(directory))
    assert lens.cfg.metadata.hook_name == ours.hook_name
    with torch.no_grad():
        for got, wanted in (
            (ours.encode(x), acts),
            (ours.reconstruct(x), x_hat),
            (lens.encode(x), acts),
            (lens(x), x_hat),
        ):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (acts > 0).any()
    assert (acts == 0).any()


def choose(pre_acts: Tensor, k: int = K) -> Tensor:
    values, indices = pre_acts.relu().topk(k, dim=-1)
    return torch.zeros_like(pre_acts).scatter_(-1, indices, values)


# SAELens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_training_checkpoint_of_saelens_becomes_what_its_save_inference_model_writes(
    tmp_path: Path, settings: Settings, architecture: str, rescaled: bool
) -> None:
    sae_class, config_class = get_sae_training_class(architecture)
    widths = {"matryoshka_widths": [4, D_SAE]} if "matryoshka" in architecture else {}
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, k=K, rescale_acts_by_decoder_norm=rescaled, **widths))
    sae.cfg.metadata.hook_name = RESID
    sae.load_state_dict({**matrix_names(), "topk_threshold": torch.tensor(0.4)})
    sae.save_model(tmp_path / "sae")
    sae.save_inference_model(tmp_path / "inference")
    facts, directory = stored(tmp_path / "sae", settings)
    assert (facts.architecture, facts.hook_name) == ("jumprelu", RESID)
    expected = SAE.load_from_disk(str(tmp_path / "inference"))
    with torch.no_grad():
        same(directory, inputs(), expected.encode(inputs()), expected(inputs()))


def test_sparsity_beside_the_weights_and_a_scaling_factor_of_ones_are_tolerated(
    tmp_path: Path, settings: Settings
) -> None:
    weights = {"W_enc": rand(D_IN, D_SAE), "b_enc": rand(D_SAE), "W_dec": rand(D_SAE, D_IN), "b_dec": rand(D_IN)}
    (tmp_path / "sae").mkdir()
    old = {"hook_point": RESID, "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "normalize_activations": False}
    (tmp_path / "sae" / "cfg.json").write_text(json.dumps(old))
    save_file({"sparsity": rand(D_SAE)}, tmp_path / "sae" / "sparsity.safetensors")
    save_file(weights | {"scaling_factor": torch.ones(D_SAE)}, tmp_path / "sae" / "sae_weights.safetensors")
    _, directory = stored(tmp_path / "sae", settings)
    acts = ((inputs() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]).relu()
    same(directory, inputs(), acts, acts @ weights["W_dec"] + weights["b_dec"])
    save_file(weights | {"scaling_factor": 2 * torch.ones(D_SAE)}, tmp_path / "sae" / "sae_weights.safetensors")
    with pytest.raises(BadFile, match="scaling_factor from 2 to 2; only 1 is known"):
        stored(tmp_path / "sae", settings)


# sparsify --------------------------------------------------------------------------------------------------------


class SparseCoder(nn.Module):
    """The parameters of a coder of sparsify, under its names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D_IN, D_SAE)
        self.W_dec = nn.Parameter(rand(D_SAE, D_IN))
        self.b_dec = nn.Parameter(rand(D_IN))


def sparsify(directory: Path, **changes: Any) -> SparseCoder:
    directory.mkdir(parents=True)
    coder = SparseCoder()
    save_model(coder, str(directory / "sae.safetensors"))
    config = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": D_IN,
    }
    (directory / "cfg.json").write_text(json.dumps(config | changes))
    return coder


@pytest.mark.parametrize(
    ("folder", "hook"),
    [
        ("layers.3", RESID),
        ("layers.3.mlp", "blocks.3.hook_mlp_out"),
        ("h.3.attn", "blocks.3.hook_attn_out"),
        ("gpt_neox.layers.3", RESID),
    ],
)
def test_a_coder_of_sparsify_reads_where_its_folder_says(
    tmp_path: Path, settings: Settings, folder: str, hook: str
) -> None:
    coder = sparsify(tmp_path / folder)
    facts, directory = stored(tmp_path / folder, settings, where=f"EleutherAI/sae-pythia-70m-32k/{folder}")
    assert (facts.architecture, facts.hook_name, facts.config["k"]) == ("topk", hook, K)
    with torch.no_grad():
        acts = choose(coder.encoder(inputs() - coder.b_dec))
        same(directory, inputs(), acts, acts @ coder.W_dec + coder.b_dec)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"transcode": True}, "transcode is set; of sparsify's coders the TopK autoencoder is known"),
        ({"skip_connection": True}, "skip_connection is set"),
        ({"activation": "groupmax"}, "activation 'groupmax' is not known; topk is"),
        ({"k": 0}, "k is 0; it must be a whole number from 1 to 11"),
    ],
)
def test_coders_of_sparsify_that_saelens_has_no_architecture_for_are_refused(
    tmp_path: Path, settings: Settings, changes: dict[str, Any], sentence: str
) -> None:
    sparsify(tmp_path / "layers.3", **changes)
    assert sentence in refusal(tmp_path / "layers.3", settings, where="layers.3")


def test_a_folder_that_names_no_layer_needs_the_hook_from_the_person(tmp_path: Path, settings: Settings) -> None:
    sparsify(tmp_path / "mine")
    assert "name the hook" in refusal(tmp_path / "mine", settings, where="mine")
    facts, _ = stored(tmp_path / "mine", settings, where="mine", hook_name=RESID)
    assert facts.hook_name == RESID


# dictionary_learning ---------------------------------------------------------------------------------------------


def linear_names() -> dict[str, Tensor]:
    return {"encoder.weight": rand(D_SAE, D_IN), "decoder.weight": rand(D_IN, D_SAE)}


def matrix_names() -> dict[str, Tensor]:
    return {"W_enc": rand(D_IN, D_SAE), "W_dec": rand(D_SAE, D_IN), "b_enc": rand(D_SAE), "b_dec": rand(D_IN)}


Maths = Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor]]


def plain(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    acts = ((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    return acts, acts @ t["decoder.weight"].T + t["bias"]


def april(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    acts = (x @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    return acts, acts @ t["decoder.weight"].T + t["decoder.bias"]


def gated(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    pre = (x - t["decoder_bias"]) @ t["encoder.weight"].T
    norms = t["decoder.weight"].norm(dim=0)
    acts = (pre + t["gate_bias"] > 0) * (pre * t["r_mag"].exp() + t["mag_bias"]).relu() * norms
    return acts, (acts / norms) @ t["decoder.weight"].T + t["decoder_bias"]


def topk(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    acts = choose((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    return acts, acts @ t["decoder.weight"].T + t["b_dec"]


def batchtopk(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    acts = ((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    acts = acts * (acts > t["threshold"])
    return acts, acts @ t["decoder.weight"].T + t["b_dec"]


def matryoshka(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    acts = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    acts = acts * (acts > t["threshold"])
    return acts, acts @ t["W_dec"] + t["b_dec"]


def jumprelu(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    pre = x @ t["W_enc"] + t["b_enc"]
    norms = t["W_dec"].norm(dim=1)
    acts = (pre * (pre > t["threshold"])).relu() * norms
    return acts, (acts / norms) @ t["W_dec"] + t["b_dec"]


def counted(threshold: float) -> dict[str, Tensor]:
    return {"k": torch.tensor(K), "threshold": torch.tensor(threshold)}


DICTIONARIES: dict[str, tuple[str, dict[str, Tensor], Maths]] = {
    "AutoEncoder": ("standard", {**linear_names(), "bias": rand(D_IN), "encoder.bias": rand(D_SAE)}, plain),
    "AutoEncoderNew": ("standard", {**linear_names(), "encoder.bias": rand(D_SAE), "decoder.bias": rand(D_IN)}, april),
    "GatedAutoEncoder": (
        "gated",
        {
            **linear_names(),
            "decoder_bias": rand(D_IN),
            "r_mag": 0.2 * rand(D_SAE),
            "gate_bias": rand(D_SAE, seed=1),
            "mag_bias": rand(D_SAE, seed=2),
        },
        gated,
    ),
    "AutoEncoderTopK": (
        "topk",
        {**linear_names(), "b_dec": rand(D_IN), "encoder.bias": rand(D_SAE), **counted(-1.0)},
        topk,
    ),
    "BatchTopKSAE": (
        "jumprelu",
        {**linear_names(), "b_dec": rand(D_IN), "encoder.bias": rand(D_SAE), **counted(0.5)},
        batchtopk,
    ),
    "MatryoshkaBatchTopKSAE": (
        "jumprelu",
        {**matrix_names(), **counted(0.5), "active_groups": torch.tensor(2), "group_sizes": torch.tensor([4, 7])},
        matryoshka,
    ),
    "JumpReluAutoEncoder": ("jumprelu", {**matrix_names(), "threshold": 0.5 * torch.ones(D_SAE)}, jumprelu),
}


def dictionary(directory: Path, dict_class: str, state: Any, **trainer: Any) -> Path:
    directory.mkdir(parents=True)
    torch.save(state, directory / "ae.pt")
    about = {"dict_class": dict_class, "layer": 3, "lm_name": "EleutherAI/pythia-70m-deduped", "k": K}
    config = {"trainer": about | {"submodule_name": "resid_post_layer_3"} | trainer, "buffer": {"ctx_len": 128}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("dict_class", list(DICTIONARIES))
def test_a_dictionary_computes_what_its_library_computes(tmp_path: Path, settings: Settings, dict_class: str) -> None:
    architecture, state, maths = DICTIONARIES[dict_class]
    facts, directory = stored(dictionary(tmp_path / "ae", dict_class, state), settings)
    assert (facts.architecture, facts.hook_name) == (architecture, RESID)
    assert facts.config["metadata"]["model_name"] == "pythia-70m-deduped"
    same(directory, inputs(), *maths(state, inputs()))


class Evil:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("/tmp/sae-atlas-was-here"), "x"))


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"encoder.weight": Evil()}, "holds more than tensors"),
        ({"encoder.weight": rand(2, 2), "note": "hello"}, "'note' is a str; every entry must be a tensor"),
        ({"encoder.weight": {"deeper": rand(2, 2)}}, "'encoder.weight' is a dict"),
        ([rand(2, 2)], "holds a list; a dict of tensors is expected"),
        ({"encoder.weight": torch.zeros(1).expand(2**40)}, "its tensors would take"),
        ({"encoder.weight": torch.zeros(2, 2).to_sparse()}, "is no dense tensor"),
        ({"encoder.weight": rand(2, 2)}, "lacks decoder.weight; it holds encoder.weight"),
        ({"encoder.weight": rand(2, 2, 2), "decoder.weight": rand(2, 2)}, "encoder.weight has shape [2, 2, 2]"),
        (DICTIONARIES["GatedAutoEncoder"][1] | {"gate_bias": rand(3)}, "W_enc has 11 latents, W_dec 11"),
        (DICTIONARIES["GatedAutoEncoder"][1] | {"r_mag": rand(D_SAE) * torch.nan}, "r_mag holds NaN"),
    ],
)
def test_a_pickle_of_anything_but_fitting_tensors_is_refused(
    tmp_path: Path, settings: Settings, state: Any, sentence: str
) -> None:
    assert sentence in refusal(dictionary(tmp_path / "ae", "GatedAutoEncoder", state), settings)
    assert not Path("/tmp/sae-atlas-was-here").exists()


def test_bare_pickles_bombs_and_large_files_are_refused_before_they_are_loaded(
    tmp_path: Path, settings: Settings
) -> None:
    directory = dictionary(tmp_path / "ae", "AutoEncoder", {})
    (directory / "ae.pt").write_bytes(pickle.dumps(Evil()))
    assert "not an archive as torch.save writes it" in refusal(directory, settings)
    with zipfile.ZipFile(directory / "ae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)
    assert "unpacks to 50,000,000 bytes; 100,000 are allowed" in refusal(directory, settings)
    (directory / "ae.pt").write_bytes(b"\0" * 100_001)
    assert "takes 100,001 bytes; 100,000 are allowed" in refusal(directory, settings)
    assert not Path("/tmp/sae-atlas-was-here").exists()


def test_a_dictionary_of_an_unknown_class_is_refused_naming_the_known_ones(tmp_path: Path, settings: Settings) -> None:
    state = DICTIONARIES["AutoEncoder"][1]
    said = refusal(dictionary(tmp_path / "ae", "CrossCoder", state | {"b_enc": rand(D_SAE)}), settings)
    assert "dict_class 'CrossCoder' is not known; known are AutoEncoder," in said


# Gemma Scope -----------------------------------------------------------------------------------------------------


def gemma() -> dict[str, Tensor]:
    return matrix_names() | {"threshold": rand(D_SAE).abs()}


def gemma_maths(t: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    pre = x @ t["W_enc"] + t["b_enc"]
    acts = pre.relu() * (pre > t["threshold"])
    return acts, acts @ t["W_dec"] + t["b_dec"]


@pytest.mark.parametrize(
    ("where", "hook", "model"),
    [
        ("google/gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_71", RESID, "gemma-2-2b"),
        ("google/gemma-scope-9b-it-res/layer_3/width_16k/average_l0_71", RESID, "gemma-2-9b-it"),
        ("google/gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_71", "blocks.3.attn.hook_z", "gemma-2-2b"),
        ("google/gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_71", "blocks.3.hook_mlp_out", "gemma-2-2b"),
    ],
)
def test_gemma_scope_reads_where_repo_and_folder_say(
    tmp_path: Path, settings: Settings, where: str, hook: str, model: str
) -> None:
    params = gemma()
    (tmp_path / "sae").mkdir()
    np.savez(tmp_path / "sae" / "params.npz", **{name: t.numpy() for name, t in params.items()})
    facts, directory = stored(tmp_path / "sae", settings, where=where)
    assert (facts.architecture, facts.hook_name) == ("jumprelu", hook)
    assert facts.config["metadata"]["model_name"] == model
    if hook == RESID:
        same(directory, inputs(), *gemma_maths(params, inputs()))


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2_transcoders_predict_what_their_skip_connection_and_latents_say(
    tmp_path: Path, settings: Settings, affine: bool
) -> None:
    params, skip = gemma(), rand(D_IN, D_IN, seed=5)
    lower = {name.replace("W", "w"): t for name, t in params.items()}
    (tmp_path / "sae").mkdir()
    save_file(lower | ({"affine_skip_connection": skip} if affine else {}), tmp_path / "sae" / "params.safetensors")
    where = "google/gemma-scope-2-270m-pt/transcoder/layer_3_width_16k_l0_small" + "_affine" * affine
    facts, directory = stored(tmp_path / "sae", settings, where=where)
    assert facts.architecture == ("jumprelu_skip_transcoder" if affine else "jumprelu_transcoder")
    assert (facts.hook_name, facts.config["metadata"]["hook_name_out"]) == (
        "blocks.3.mlp.hook_in",
        "blocks.3.hook_mlp_out",
    )
    acts, x_hat = gemma_maths(params, inputs())
    same(directory, inputs(), acts, x_hat + inputs() @ skip if affine else x_hat)


def npz(directory: Path, **arrays: Any) -> Path:
    directory.mkdir()
    np.savez(directory / "params.npz", **arrays)
    return directory


def npy(shape: str) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 16


def test_an_npz_of_objects_bombs_or_false_sizes_is_refused(tmp_path: Path, settings: Settings) -> None:
    objects = npz(tmp_path / "objects", W_enc=np.array([Evil()], dtype=object))
    assert "holds object, not numbers" in refusal(objects, settings)
    (tmp_path / "bomb").mkdir()
    with zipfile.ZipFile(tmp_path / "bomb" / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", b"\0" * 50_000_000)
    assert "unpacks to 50,000,000 bytes" in refusal(tmp_path / "bomb", settings)
    (tmp_path / "false").mkdir()
    with zipfile.ZipFile(tmp_path / "false" / "params.npz", "w") as archive:
        archive.writestr("W_enc.npy", npy("(1099511627776, 1024)"))
    assert "claims 4,503,599,627,370,496 bytes" in refusal(tmp_path / "false", settings)
    (tmp_path / "false" / "params.npz").write_bytes(io.BytesIO(b"\x80\x04.").getvalue())
    assert "is no npz of plain arrays" in refusal(tmp_path / "false", settings)
    assert not Path("/tmp/sae-atlas-was-here").exists()


def test_an_npz_without_a_threshold_or_a_known_folder_is_refused(tmp_path: Path, settings: Settings) -> None:
    params = {name: t.numpy() for name, t in gemma().items()}
    whole = npz(tmp_path / "whole", **params)
    assert "name the hook" in refusal(whole, settings, where="somewhere")
    params.pop("threshold")
    assert "lacks threshold; it holds W_dec, W_enc" in refusal(npz(tmp_path / "part", **params), settings)


# Llama Scope, OpenAI ---------------------------------------------------------------------------------------------


def test_llama_scope_is_folded_as_sae_lens_folds_it(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "Llama3_1-8B-Base-L3R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    hyperparams = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "hook_point_in": RESID,
        "hook_point_out": RESID,
        "jump_relu_threshold": 0.3,
        "dataset_average_activation_norm": {"in": 7.5, "out": 7.5},
    }
    (folder / "hyperparams.json").write_text(json.dumps(hyperparams))
    linear = linear_names() | {"encoder.bias": rand(D_SAE), "decoder.bias": rand(D_IN)}
    save_file(linear, folder / "checkpoints" / "final.safetensors")
    facts, directory = stored(folder, settings)
    assert (facts.architecture, facts.hook_name) == ("jumprelu", RESID)
    monkeypatch.setattr(theirs, "hf_hub_download", lambda _repo="", name=None, **kw: str(_placed(tmp_path, name, **kw)))
    expected = _sae_lens_llama(folder.name)
    with torch.no_grad():
        same(directory, inputs(), expected.encode(inputs()), expected(inputs()))


def _placed(root: Path, name: str | None, filename: str = "", subfolder: str = "", **_: Any) -> Path:
    return root / subfolder / (name or filename)


def _sae_lens_llama(folder: str) -> SAE[Any]:
    def load(**kwargs: Any) -> Any:
        return theirs.llama_scope_sae_huggingface_loader("fnlp/x", **kwargs)

    config, state, _ = load(folder_name=folder, cfg_overrides={"dtype": "float32"})
    sae = SAE.from_dict(theirs.handle_config_defaulting(config))
    sae.load_state_dict(state)
    sae.fold_activation_norm_scaling_factor(D_IN**0.5 / 7.5)
    return sae


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"jump_relu_threshold": 0}, "jump_relu_threshold is 0; it must be a number above 0"),
        ({"dataset_average_activation_norm": None}, "dataset_average_activation_norm.in is 0"),
        ({"hook_point_out": "blocks.3.hook_mlp_out"}, "Llama Scope's transcoders are not read"),
    ],
)
def test_llama_scope_without_its_numbers_is_refused(
    tmp_path: Path, settings: Settings, changes: dict[str, Any], sentence: str
) -> None:
    about = {"jump_relu_threshold": 0.3, "hook_point_in": RESID, "dataset_average_activation_norm": {"in": 7.5}}
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "hyperparams.json").write_text(json.dumps(about | changes))
    save_file(linear_names(), tmp_path / "sae" / "final.safetensors")
    assert sentence in refusal(tmp_path / "sae", settings)


def test_openai_weights_are_normalised_like_a_layer_norm(tmp_path: Path, settings: Settings) -> None:
    state = linear_names() | {"pre_bias": rand(D_IN), "latent_bias": rand(D_SAE)}
    (tmp_path / "sae").mkdir()
    save_file(state | {"stats_last_nonzero": torch.zeros(D_SAE).long()}, tmp_path / "sae" / "8.safetensors")
    assert "config.json must say" in refusal(tmp_path / "sae", settings)
    about = {"activation": "TopK", "k": K, "layer": 3, "location": "resid_post_mlp"}
    (tmp_path / "sae" / "config.json").write_text(json.dumps(about))
    facts, directory = stored(tmp_path / "sae", settings)
    assert (facts.architecture, facts.hook_name) == ("topk", RESID)
    x = inputs()
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    acts = choose(((x - mean) / (std + 1e-5) - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"])
    same(directory, x, acts, (acts @ state["decoder.weight"].T + state["pre_bias"]) * std + mean)


# README ----------------------------------------------------------------------------------------------------------


def test_every_test_that_the_readme_names_exists_and_every_format_is_in_it() -> None:
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", readme)
    assert len(named) > 12
    for file, test in named:
        path = next(root.glob(f"tests/*/{file}"))
        assert f"def {test}(" in path.read_text(), test
    for known in FORMATS:
        assert all(f"`{name}`" in readme for name in known.files.split(", ") if "." in name and " " not in name)
    assert all(f"`{architecture}`" in readme for architecture in PARAMETERS)


# All -------------------------------------------------------------------------------------------------------------


def test_a_directory_of_something_else_is_refused_naming_what_it_holds_and_what_is_known(
    tmp_path: Path, settings: Settings
) -> None:
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "notes.txt").write_text("hello")
    said = refusal(tmp_path / "sae", settings)
    assert "holds notes.txt. Known are SAELens (cfg.json, sae_weights.safetensors); sparsify (cfg.json, sae." in said
    assert "Gemma Scope (params.npz)" in said
    assert "is not a directory" in refusal(tmp_path / "none", settings)


@pytest.mark.parametrize("name", ["sae.pt", "pytorch_model.bin"])
def test_other_pickles_are_refused_in_every_format(tmp_path: Path, settings: Settings, name: str) -> None:
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / name).write_bytes(pickle.dumps(Evil()))
    assert refusal(tmp_path / "sae", settings).startswith(f"{name} is a pickle")


@pytest.mark.parametrize("file", ["sae.safetensors", "params.safetensors", "8.safetensors"])
def test_hostile_headers_are_refused_in_every_safetensors_format(tmp_path: Path, settings: Settings, file: str) -> None:
    directory = tmp_path / "layers.3"
    sparsify(directory)
    (directory / "sae.safetensors").unlink()
    (directory / file).write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert f"{file}: the header claims {2**62:,} bytes" in refusal(directory, settings)
    (directory / file).write_bytes(b"\x80\x04" + pickle.dumps([1] * 100))
    assert f"{file} is a renamed pickle" in refusal(directory, settings)
    (directory / file).write_bytes((2).to_bytes(8, "little") + b"{}trailing")
    assert "8 bytes follow the last tensor" in refusal(directory, settings) if file != "8.safetensors" else True
