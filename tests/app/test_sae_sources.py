"""Where SAEs come from, as a person asks on the command line: directories, the hub, SAELens' list of releases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from starlette.testclient import TestClient

from app import hub
from app.errors import BadFile, NotFound
from app.main import create_app
from app.settings import Settings
from tests.app.test_cli import Shell
from tests.hub import COMMIT, Hub
from tests.tiny import D_IN, D_SAE, save_tiny_model, save_tiny_sae

REPO = "team/saes"
TARGET = "layers.1/sae"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the tiny model alone."""
    given = tmp_path_factory.mktemp("given")
    save_tiny_model(given)
    shell = Shell(tmp_path_factory.mktemp("data"))
    shell.says("model", "add", str(given), "--id", "tiny")
    return shell.data_dir


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The repository: an SAELens directory with company, one of sparsify, one of pickles alone."""
    root = tmp_path / "repo"
    save_tiny_sae(root / "mine" / "1", "topk", seed=3)
    (root / "mine" / "1" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    save_file({"sparsity": torch.zeros(D_SAE)}, root / "mine" / "1" / "sparsity.safetensors")
    (root / "layers.1").mkdir()
    generator = torch.Generator().manual_seed(4)
    shapes = {"encoder.weight": (D_SAE, D_IN), "encoder.bias": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    save_file(
        {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()},
        root / "layers.1" / "sae.safetensors",
    )
    (root / "layers.1" / "cfg.json").write_text(json.dumps({"k": 5, "d_in": D_IN, "num_latents": D_SAE}))
    (root / "pickles").mkdir()
    (root / "pickles" / "ae.pt").write_bytes(b"\x80\x04.")
    (root / "pickles" / "config.json").write_text("{}")
    return root


@pytest.fixture
def served(files: Path) -> Generator[Hub]:
    with Hub(files, REPO) as running:
        yield running


def add(shell: Shell, served: Hub, cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    known = {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(cache), "HF_TOKEN": "", "HF_HUB_ETAG_TIMEOUT": "2"}
    return shell.run("sae", "add", "--model", "tiny", *arguments, **{**known, **variables})


def said(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return " ".join((done.stdout if code == 0 else done.stderr).split())


@pytest.fixture
def shell(model: Path) -> Shell:
    return Shell(model)


def test_an_sae_is_fetched_from_the_hub_with_its_commit_and_without_pickles(
    shell: Shell, served: Hub, tmp_path: Path
) -> None:
    added = said(add(shell, served, tmp_path / "cache", "--hf", REPO, "--subfolder", "mine/1", "--set", "hub"))
    assert "Source tiny/1-hub: topk, 40 latents at blocks.1.hook_resid_post." in added
    shown = shell.says("sae", "show", "tiny/1-hub")
    for word in (REPO, "mine/1", COMMIT, "SAELens"):
        assert word in shown
    fetched = {path.rpartition("/")[2] for _, path, _ in served.requests if "/resolve/" in path}
    assert fetched == {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}


def test_a_folder_of_sparsify_on_the_hub_says_where_it_reads(shell: Shell, served: Hub, tmp_path: Path) -> None:
    added = said(add(shell, served, tmp_path / "cache", "--hf", REPO, "--subfolder", "layers.1", "--set", "sparse"))
    assert "Source tiny/1-sparse: topk, 40 latents at blocks.1.hook_resid_post." in added
    assert "sparsify" in shell.says("sae", "show", "tiny/1-sparse")


def test_what_is_in_the_cache_is_enough_when_the_hub_is_off(shell: Shell, served: Hub, tmp_path: Path) -> None:
    asked = ("--hf", REPO, "--subfolder", "mine/1", "--set", "off")
    missing = said(add(shell, served, tmp_path / "cache", *asked, HF_HUB_OFFLINE="1"), 2)
    assert "HF_HUB_OFFLINE is set, and team/saes/mine/1 is not in the hub's cache" in missing
    assert not served.requests
    said(add(shell, served, tmp_path / "cache", *asked))
    served.requests.clear()
    said(add(shell, served, tmp_path / "cache", *asked, HF_HUB_OFFLINE="1"))
    assert not served.requests
    assert COMMIT in shell.says("sae", "show", "tiny/1-off")


def test_a_download_that_was_cut_off_goes_on_where_it_stopped(
    shell: Shell, served: Hub, files: Path, tmp_path: Path
) -> None:
    # huggingface_hub writes what it has received every 10 MiB.
    save_file({"sparsity": torch.zeros(6_000_000)}, files / "mine" / "1" / "sparsity.safetensors")
    asked = ("--hf", REPO, "--subfolder", "mine/1", "--set", "cut")
    served.break_after = 12_000_000
    said(add(shell, served, tmp_path / "cache", *asked))
    assert [(path.rpartition("/")[2], r) for method, path, r in served.requests if method == "GET" and r] == [
        ("sparsity.safetensors", f"bytes={10 * 2**20}-")
    ]
    served.requests.clear()
    said(add(shell, served, tmp_path / "cache", *asked))
    assert not [path for method, path, _ in served.requests if method == "GET" and "/resolve/" in path]


def test_a_private_repository_needs_the_token_of_the_usual_variable(shell: Shell, files: Path, tmp_path: Path) -> None:
    asked = ("--hf", REPO, "--subfolder", "mine/1", "--set", "private")
    with Hub(files, REPO, token="hf_secret") as private:
        refused = said(add(shell, private, tmp_path / "cache", *asked), 2)
        assert "is not on the hub, or is private; set HF_TOKEN" in refused
        done = add(shell, private, tmp_path / "cache", *asked, HF_TOKEN="hf_secret")
        assert "tiny/1-private" in said(done)
        assert "hf_secret" not in done.stdout + done.stderr + shell.says("sae", "show", "tiny/1-private")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--hf", "../../etc"), "is no hub id"),
        (("--hf", "http://169.254.169.254/latest"), "is no hub id"),
        (("--hf", "file:///etc/passwd"), "is no hub id"),
        (("--hf", "team/.."), "is no hub id"),
        (("--hf", REPO, "--subfolder", "../../etc"), "is no folder of a repository"),
        (("--hf", REPO, "--subfolder", "/etc"), "is no folder of a repository"),
        (("--hf", REPO, "--subfolder", "http://169.254.169.254"), "is no folder of a repository"),
        (("--hf", REPO, "--revision", "../main"), "is no revision"),
        (("--hf", REPO, "/tmp"), "Give a directory, --hf or --saelens: one of them, not a directory and --hf"),
        ((), "one of them, not none"),
        (("/tmp", "--subfolder", "x"), "--subfolder and --revision belong to --hf"),
        (("--hf", REPO, "--set", "../x"), "cannot be a set name"),
    ],
)
def test_ids_that_lead_elsewhere_are_refused_before_a_socket_opens(
    shell: Shell, served: Hub, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in said(add(shell, served, tmp_path / "cache", *arguments), 2)
    assert not served.requests


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--hf", REPO, "--subfolder", "pickles"),
            "team/saes/pickles holds no .safetensors or .npz weights, but ae.pt",
        ),
        (("--hf", REPO), "Its folders are layers.1, mine, pickles."),
        (("--hf", REPO, "--subfolder", "none"), "holds no .safetensors or .npz weights, but no files"),
        (("--hf", "team/other"), "team/other is not on the hub, or is private"),
        (("--hf", REPO, "--revision", "v2"), "team/saes has no revision 'v2'"),
        (("--hf", REPO, "--subfolder", "mine/1", "--hook", "blocks.2.hook_resid_post"), "contradicts it"),
    ],
)
def test_what_the_hub_does_not_have_is_said(
    shell: Shell, served: Hub, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    before = sorted((shell.data_dir / "saes").glob("*"))
    assert sentence in said(add(shell, served, tmp_path / "cache", *arguments), 2)
    assert not [path for _, path, _ in served.requests if path.endswith((".pt", ".bin"))]
    assert sorted((shell.data_dir / "saes").glob("*")) == before


def test_a_repository_over_the_limit_is_refused_before_it_is_fetched(shell: Shell, served: Hub, tmp_path: Path) -> None:
    asked = ("--hf", REPO, "--subfolder", "mine/1")
    refused = said(add(shell, served, tmp_path / "cache", *asked, SAE_ATLAS_MAX_SAE_BYTES="1000"), 2)
    assert "SAE_ATLAS_MAX_SAE_BYTES allows 1,000" in refused
    assert not [path for _, path, _ in served.requests if "/resolve/" in path]


def test_a_hub_that_does_not_answer_is_named(shell: Shell, served: Hub, tmp_path: Path) -> None:
    refused = said(add(shell, served, tmp_path / "cache", "--hf", REPO, HF_ENDPOINT="http://127.0.0.1:9"), 2)
    assert "http://127.0.0.1:9 cannot be reached" in refused


# SAELens' list ---------------------------------------------------------------------------------------------------


def test_a_release_of_saelens_names_its_repository_folder_and_neuronpedia_id() -> None:
    found = hub.release("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
    assert (found.repo, found.subfolder) == ("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre")
    assert found.neuronpedia_id == "gpt2-small/8-res-jb"
    assert found.overrides == {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    overridden = hub.release("mistral-7b-res-wg", "blocks.8.hook_resid_pre").overrides
    assert overridden == {"normalize_activations": "constant_norm_rescale"}
    assert hub.release("llama_scope_lxr_8x", "l1r_8x").norm_scale > 1


def test_unknown_releases_ids_and_formats_are_refused_with_what_is_near() -> None:
    with pytest.raises(NotFound, match=r"no release 'gpt2-small-res-jbl'. Near are gpt2-small-res-jb"):
        hub.release("gpt2-small-res-jbl", "x")
    with pytest.raises(NotFound, match=r"has no SAE 'blocks.99.hook_resid_pre', but 13: blocks"):
        hub.release("gpt2-small-res-jb", "blocks.99.hook_resid_pre")
    with pytest.raises(BadFile, match="its converter 'deepseek_r1'; that format is not known here"):
        hub.release("deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post")


def test_the_list_is_read_without_importing_sae_lens_or_torch() -> None:
    code = (
        "import sys; from app import cli, formats, hub; hub.release('gpt2-small-res-jb', 'blocks.8.hook_resid_pre');"
        "import huggingface_hub.hf_api; assert not {'torch', 'sae_lens', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_release_is_fetched_takes_neuronpedias_name_and_is_linked(shell: Shell, files: Path, tmp_path: Path) -> None:
    place = hub.release("gpt2-small-resid-post-v5-32k", "blocks.1.hook_resid_post")
    save_tiny_sae(files / place.subfolder, "topk", seed=6)
    with Hub(files, place.repo) as served:
        asked = ("--saelens", "gpt2-small-resid-post-v5-32k", "blocks.1.hook_resid_post")
        added = said(add(shell, served, tmp_path / "cache", *asked))
    assert f"Source tiny/{place.neuronpedia_id.partition('/')[2]}: topk" in added
    shown = shell.says("sae", "show", f"tiny/{place.neuronpedia_id.partition('/')[2]}")
    assert place.neuronpedia_id in shown
    assert "gpt2-small-resid-post-v5-32k blocks.1.hook_resid_post" in shown
    with TestClient(create_app(Settings(data_dir=shell.data_dir)), base_url="http://127.0.0.1:3000") as client:
        page = client.get(f"/tiny/{place.neuronpedia_id.partition('/')[2]}")
    assert f'href="https://www.neuronpedia.org/{place.neuronpedia_id}"' in page.text


def test_a_dictionary_on_the_hub_is_not_fetched_and_the_way_on_is_said() -> None:
    with pytest.raises(BadFile, match=r"pickles are not fetched. Download that folder yourself and add the directory"):
        hub._chosen(hub.place("a/saes", "layer_3"), ["layer_3/ae.pt", "layer_3/config.json"])


# Directories -----------------------------------------------------------------------------------------------------


def test_gemma_scope_params_are_added_from_a_directory_that_names_the_layer(shell: Shell, tmp_path: Path) -> None:
    directory = tmp_path / "gemma-scope-2b-pt-res" / "layer_1" / "average_l0_9"
    directory.mkdir(parents=True)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": D_SAE, "b_dec": D_IN, "threshold": D_SAE}
    np.savez(directory / "params.npz", **{name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    added = shell.says("sae", "add", str(directory), "--model", "tiny", "--set", "scope")
    assert "Source tiny/1-scope: jumprelu, 40 latents at blocks.1.hook_resid_post." in added


def test_an_archive_is_refused_and_not_unpacked(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with tarfile.open(tmp_path / "sae.tar", "w") as archive:
        archive.add(tmp_path / "secret", "../../cfg.json")
    refused = shell.refuses("sae", "add", str(tmp_path / "sae.tar"), "--model", "tiny")
    assert "sae.tar is not a directory" in refused


@pytest.mark.parametrize("kind", ["saelens", "sparsify"])
def test_a_full_disk_is_said_leaves_nothing_behind_and_a_retry_works(shell: Shell, tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "layers.1"
    directory.mkdir()
    wide = 20_000  # 4 MB, where the database takes less than the 2 MB that there is room for
    parameters = {"W_dec": torch.ones(wide, D_IN), "b_dec": torch.ones(D_IN)}
    if kind == "saelens":
        weights = parameters | {"W_enc": torch.ones(D_IN, wide), "b_enc": torch.ones(wide)}
        config = {"hook_point": "blocks.1.hook_resid_post", "d_in": D_IN, "d_sae": wide}
    else:
        weights = parameters | {"encoder.weight": torch.ones(wide, D_IN), "encoder.bias": torch.ones(wide)}
        config = {"d_in": D_IN, "num_latents": wide, "k": 5}
    save_file(weights, directory / ("sae_weights.safetensors" if kind == "saelens" else "sae.safetensors"))
    (directory / "cfg.json").write_text(json.dumps(config))
    command = ("sae", "add", str(directory), "--model", "tiny", "--set", f"full-{kind}")
    before = sorted((shell.data_dir / "saes").glob("*"))
    full = subprocess.run(
        ["bash", "-c", f"ulimit -f 2000; exec {sys.executable} -m app.cli {' '.join(command)}"],
        env={**os.environ, "SAE_ATLAS_DATA_DIR": str(shell.data_dir), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert "File too large" in said(full, 2)
    assert sorted((shell.data_dir / "saes").glob("*")) == before
    assert f"full-{kind}" not in shell.says("sae", "list")
    shell.says(*command)
