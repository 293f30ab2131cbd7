"""The command line, run as a person runs it: on a data directory of its own, with a tiny real model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from app import db, jobs
from app.settings import Settings
from tests.tiny import TEXT, save_tiny_model, save_tiny_sae


@dataclass(frozen=True)
class Shell:
    data_dir: Path

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "SAE_ATLAS_DATA_DIR": str(self.data_dir), "COLUMNS": "200", **variables}
        return subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments], env=environment, capture_output=True, text=True, timeout=120
        )

    def says(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def refuses(self, *arguments: str, **variables: str) -> str:
        """The sentence with which a command is refused."""
        result = self.run(*arguments, **variables)
        assert result.returncode == 2, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return " ".join(result.stderr.split())

    def runs(self, job_id: int, state: str = "running") -> None:
        """Put a job into a state, as a trainer that takes it or dies."""
        with db.sessions(db.connect(Settings(data_dir=self.data_dir))).begin() as session:
            job = jobs.get(session, job_id)
            job.state, job.cancel_requested, job.pause_requested = state, False, False


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A data directory with the tiny model, one SAE and a corpus, all added from the command line."""
    given = tmp_path_factory.mktemp("given")
    shell = Shell(tmp_path_factory.mktemp("data"))
    save_tiny_model(given / "hf")
    save_tiny_sae(given / "sae", "topk", seed=1)
    (given / "texts.txt").write_text(f"{TEXT}\n\n" * 50)
    assert "Model tiny: LlamaForCausalLM, 3 layers" in shell.says("model", "add", str(given / "hf"), "--id", "tiny")
    added = shell.says(
        "sae", "add", str(given / "sae"), "--model", "tiny", "--set", "own", "--layer", "1", "--no-check"
    )
    assert "Source tiny/1-own: topk, 40 latents at blocks.1.hook_resid_post." in added
    assert "Corpus texts: " in shell.says("corpus", "add", str(given / "texts.txt"), "--about", "made up")
    return shell


@pytest.fixture
def fresh(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "data")


def test_what_was_added_is_listed_and_shown(shell: Shell) -> None:
    assert "tiny" in shell.says("model", "list")
    assert "tiny/1-own" in shell.says("sae", "list")
    assert "made up" in shell.says("corpus", "list")
    shown = shell.says("sae", "show", "tiny/1-own")
    assert "blocks.1.hook_resid_post" in shown
    assert "none yet" in shown


def test_lists_in_a_pipe_cut_no_id_however_narrow_the_terminal(shell: Shell) -> None:
    assert "tiny/1-own" in shell.run("sae", "list", COLUMNS="20").stdout
    assert "blocks.1.hook_resid_post" in shell.run("sae", "list", COLUMNS="20").stdout
    assert "LlamaForCausalLM" in shell.run("model", "list", COLUMNS="20").stdout


def test_lists_on_a_narrow_terminal_fold_and_cut_nothing(shell: Shell) -> None:
    ours, theirs = os.openpty()
    environment = {**os.environ, "SAE_ATLAS_DATA_DIR": str(shell.data_dir), "COLUMNS": "60", "TERM": "xterm"}
    subprocess.run([sys.executable, "-m", "app.cli", "sae", "list"], env=environment, stdout=theirs, timeout=120)
    shown = os.read(ours, 100_000).decode()
    os.close(theirs)
    os.close(ours)
    assert "…" not in shown


def test_adding_the_same_sae_again_is_no_error_and_stores_nothing_twice(shell: Shell, tmp_path: Path) -> None:
    save_tiny_sae(tmp_path / "sae", "topk", seed=1)
    shell.says("sae", "add", str(tmp_path / "sae"), "--model", "tiny", "--set", "own", "--no-check")
    assert len(list((shell.data_dir / "saes").iterdir())) == 1


def test_jobs_are_queued_listed_shown_cancelled_and_resumed(shell: Shell, tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "model: tiny\ncorpus: texts\nhook_name: blocks.1.hook_resid_post\nset_name: mine\nk: 4\nd_sae: 32\n"
        "batch_size: 32\n"
    )
    queued = shell.says("train", str(spec))
    assert "Job 1 queued: Train tiny/1-mine: TopK k=4, d_sae=32" in queued
    assert "No trainer runs" in queued
    assert "Job 2 queued" in shell.says("harvest", "tiny/1-own", "--corpus", "texts", "--tokens", "2000")
    assert "queued" in shell.says("jobs", "list")
    assert re.search(r"^  d_sae: 32$", shell.says("jobs", "show", "1"), re.M)
    assert "Job 1: paused. `sae-atlas jobs resume 1` goes on." in shell.says("jobs", "pause", "1")
    assert "Job 1 queued" in shell.says("jobs", "resume", "1")
    shell.runs(1)
    assert "Job 1 runs; it pauses at its next report" in shell.says("jobs", "pause", "1")
    assert "Job 1 runs; it is cancelled at its next report" in shell.says("jobs", "cancel", "1")
    shell.runs(1, "queued")
    assert "Job 1: cancelled." in shell.says("jobs", "cancel", "1")
    assert "Job 1 has ended: it is cancelled." in shell.says("jobs", "pause", "1")
    assert "Job 1 queued" in shell.says("jobs", "resume", "1")
    assert "is queued; only a failed, cancelled or paused job can be resumed" in shell.refuses("jobs", "resume", "1")
    assert "No job 99." in shell.refuses("jobs", "show", "99")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: tiny\n", "corpus: It is missing."),
        (": : :", "This is no YAML: line 1, column"),
        ("[1, 2]", "this YAML is a list"),
        (
            "model: tiny\ncorpus: texts\nhook_name: blocks.1.hook_resid_post\nset_name: '../x'\n",
            "set_name: It is '../x'; it must be small letters, digits, - and _",
        ),
        ("model: nobody\ncorpus: texts\nhook_name: blocks.1.hook_resid_post\nset_name: x\n", "nobody"),
        ("model: tiny\ncorpus: none\nhook_name: blocks.1.hook_resid_post\nset_name: x\n", "There is no corpus 'none'"),
    ],
)
def test_a_spec_that_cannot_be_meant_is_refused_naming_the_field(
    shell: Shell, tmp_path: Path, text: str, sentence: str
) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    assert sentence in shell.refuses("train", str(tmp_path / "spec.yaml"))


def test_an_sae_for_another_model_or_layer_is_refused_with_both_numbers(shell: Shell, tmp_path: Path) -> None:
    save_tiny_sae(tmp_path / "sae", "topk", seed=1)
    config = tmp_path / "sae" / "cfg.json"
    good = config.read_text()
    add = ("sae", "add", str(tmp_path / "sae"), "--model", "tiny")
    assert "layer 2 was asked for, and tiny has layers 0 to 2" in shell.refuses(*add, "--layer", "2")
    config.write_text(good.replace("blocks.1", "blocks.9"))
    assert "blocks.9.hook_resid_post" in shell.refuses(*add)
    config.write_text(good.replace('"d_in": 24', '"d_in": 25'))
    assert "d_in = 25 numbers a token; blocks.1.hook_resid_post of this model has 24" in shell.refuses(*add)
    config.write_text(good)
    assert "cannot be a set name" in shell.refuses(*add, "--set", "../x")
    assert len(list((shell.data_dir / "saes").iterdir())) == 1


@pytest.mark.parametrize(
    "source", ["../../nowhere", "http://169.254.169.254/latest", "file:///etc/passwd", "a/b/c", "-x/y", "a/..", "ä/b"]
)
def test_a_model_source_that_is_neither_file_nor_hub_id_is_refused_before_anything_is_fetched(
    fresh: Shell, source: str
) -> None:
    assert "is no directory, no .gguf file and no hub id" in fresh.refuses("model", "add", "--", source)
    assert not fresh.data_dir.exists()


@pytest.mark.parametrize("model_id", ["jobs", "API", "a/b", "../x", "", " ", "x" * 101])
def test_a_model_id_that_cannot_be_an_address_is_refused(fresh: Shell, tmp_path: Path, model_id: str) -> None:
    (tmp_path / "jobs").mkdir()
    refused = fresh.refuses("model", "add", str(tmp_path / "jobs"), "--id", model_id)
    assert "cannot be a model id" in refused


def test_a_model_directory_without_safetensors_is_refused_in_one_sentence(fresh: Shell, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "holds no .safetensors weights" in fresh.refuses("model", "add", str(tmp_path / "m"))


def test_a_variable_that_makes_no_sense_is_named(fresh: Shell) -> None:
    refused = fresh.refuses("jobs", "list", SAE_ATLAS_PORT="many")
    assert refused.startswith("Error: SAE_ATLAS_PORT: Input should be a valid integer")
    assert "many" in refused


def test_doctor_has_no_complaint_about_a_good_installation_and_names_what_is_broken(fresh: Shell) -> None:
    fresh.says("migrate")
    queue = fresh.data_dir / "jobs.sqlite"
    queue.touch(mode=0o600)
    healthy = fresh.run("doctor", SAE_ATLAS_PORT="1")
    assert healthy.returncode == 0, healthy.stdout
    for name in (
        "python",
        "packages",
        "data directory",
        "disk",
        "database",
        "job queue",
        "web",
        "gpu worker",
        "trainer",
    ):
        assert f"  {name}: " in healthy.stdout
    queue.chmod(0o644)
    broken = fresh.run("doctor", SAE_ATLAS_PORT="1")
    assert broken.returncode == 1
    assert f"broken  job queue: {queue} is readable by others (mode 644). Run: chmod 600 {queue}" in broken.stdout


def test_help_lists_every_command(fresh: Shell) -> None:
    listed = fresh.says("--help")
    for command in (
        "demo",
        "serve",
        "model",
        "sae",
        "corpus",
        "harvest",
        "train",
        "jobs",
        "export",
        "import",
        "doctor",
    ):
        assert f" {command} " in listed


def test_another_sae_under_a_taken_name_is_refused_unless_asked_for(shell: Shell, tmp_path: Path) -> None:
    save_tiny_sae(tmp_path / "first", "standard", seed=9)
    save_tiny_sae(tmp_path / "second", "standard", seed=10)
    shell.says("sae", "add", str(tmp_path / "first"), "--model", "tiny", "--set", "name", "--no-check")
    again = ("sae", "add", str(tmp_path / "second"), "--model", "tiny", "--set", "name", "--no-check")
    assert "holds another SAE already" in shell.refuses(*again)
    assert "tiny/1-name" in shell.says(*again, "--replace")


def test_a_new_sae_is_checked_and_removing_it_asks_and_keeps_shared_weights(shell: Shell, tmp_path: Path) -> None:
    save_tiny_sae(tmp_path / "sae", "standard", seed=9)
    for name in ("one", "two"):
        added = shell.says("sae", "add", str(tmp_path / "sae"), "--model", "tiny", "--set", name)
        assert "queued: Check tiny/1-" in added
    weights = set((shell.data_dir / "saes").iterdir())
    shown = shell.says("sae", "show", "tiny/1-one")
    assert "KiB in memory; the gpu worker does not answer" in shown
    unanswered = shell.run("sae", "remove", "tiny/1-one")
    assert unanswered.returncode == 1
    assert "its weights stay, tiny/1-two use them" in unanswered.stdout
    assert "1-one" in shell.says("sae", "list")
    assert "Removed tiny/1-one." in shell.says("sae", "remove", "tiny/1-one", "--yes")
    assert set((shell.data_dir / "saes").iterdir()) == weights
    assert "its weights go with it" in shell.says("sae", "remove", "tiny/1-two", "--yes")
    assert "Deleted 0 for good" in shell.says("trash", "purge", "--yes")
    assert set((shell.data_dir / "saes").iterdir()) == weights
    assert "Deleted 2 for good" in shell.says("trash", "purge", "--days", "0", "--yes")
    assert len(set((shell.data_dir / "saes").iterdir())) == len(weights) - 1
    assert "has no SAE called '1-one'" in shell.refuses("sae", "remove", "tiny/1-one", "--yes")
