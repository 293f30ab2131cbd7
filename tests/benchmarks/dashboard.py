"""Harvest of the demo SAE against sae-dashboard 0.8.0 and the bare cost: same tokens, same features, one run, CPU.

`dashboard_wide` does the same with 16,384 latents. Each side is a process of its own: sae-dashboard in its own
environment, made on first use in the cache directory. It takes 128 features at a time; what a batch of them costs is
measured at two batches and two lengths of text, which gives its cost of all features and of a longer text. Ours
computes all features at once, and is measured doing so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

from app.settings import Settings
from app.tables import Source
from tests.benchmarks import servers

REPOSITORY = Path(__file__).resolve().parents[2]
REQUIREMENTS = ["sae-dashboard==0.8.0", "torch==2.13.0", "pyarrow<20"]
UNWANTED = ["torchvision", "torchaudio"]
"""Come with sae-dashboard's nnsight, are not used, and keep transformers from being imported beside this torch."""
N_CONTEXTS, CONTEXT = (64, 128), 128
N_BATCHES, BATCH = 2, 128
WHOLE = 1_200_000
"""Tokens of the demo's harvest, to which both sides are scaled."""


def main() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sae-atlas-bench-") as scratch:
        settings = demo(Path(scratch))
        return compared(settings, servers.installed(settings), Path(scratch))


def demo(scratch: Path) -> Settings:
    """The data directory of SAE_ATLAS_DATA_DIR, or a fresh one where that is not set."""
    given = Settings()
    data_dir = given.data_dir if "data_dir" in given.model_fields_set else scratch / "data"
    return Settings(data_dir=data_dir, device="cpu", log_level="WARNING")


def compared(settings: Settings, source: Source, scratch: Path) -> dict[str, Any]:
    """Have both sides make evidence of a source and return their figures."""
    threads = os.cpu_count() or 1
    own, other = scratch / "own", scratch / "other"
    asked = {
        "data_dir": str(settings.data_dir),
        "model_id": source.model_id,
        "source": source.name,
        "model": str(settings.model_dir(source.model_id)),
        "sae": str(settings.sae_dir(source.sae_hash)),
        "tokens": str(own / "tokens.npy"),
        "hook": source.hook_name,
        "layer": source.layer,
        "threads": threads,
        "n_contexts": N_CONTEXTS,
        "n_features": N_BATCHES * BATCH,
        "n_batches": N_BATCHES,
        "ignore_tokens": [0, 2],  # <|endoftext|> and <|im_end|>
    }
    python = environment() / "bin" / "python"
    ours = _run([sys.executable, "-m", "tests.benchmarks._harvest"], own, asked, threads)
    theirs = _run([str(python), str(REPOSITORY / "tests/benchmarks/_sae_dashboard.py")], other, asked, threads)
    sizes = [path.stat().st_size / BATCH for path in other.glob("batch-*.json")]
    return {**_agreement(own, other), **_figures(source.d_sae, ours, theirs, sum(sizes) / len(sizes))}


def environment() -> Path:
    """Return the directory of sae-dashboard's own environment, made where it is not there yet."""
    cache = platformdirs.user_cache_path("sae-atlas") / "bench" / "sae-dashboard-0.8.0"
    if not (cache / "ready").exists():
        shutil.rmtree(cache, ignore_errors=True)
        venv.create(cache, with_pip=True)
        pip = [str(cache / "bin" / "python"), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", *REQUIREMENTS], check=True)
        subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
        (cache / "ready").touch()
    return cache


def _run(command: list[str], directory: Path, asked: dict[str, Any], threads: int) -> list[dict[str, Any]]:
    directory.mkdir()
    (directory / "asked.json").write_text(json.dumps(asked))
    given = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY)}
    with (directory / "log").open("w") as log:
        done = subprocess.run([*command, str(directory / "asked.json")], cwd=REPOSITORY, env=given, stderr=log)
    if done.returncode:
        sys.exit((directory / "log").read_text()[-3000:])
    return json.loads((directory / "figures.json").read_text())


def _agreement(own: Path, other: Path) -> dict[str, Any]:
    """How far the activations of four contexts lie apart, first positions aside: no feature is shown there."""
    ours, theirs = (np.load(path / "acts.npy")[:, 1:] for path in (own, other))
    both = (ours > 0) & (theirs > 0)
    differences = np.abs(ours - theirs)[both] / ours[both]
    return {
        "activations apart, relative: median / largest": f"{np.median(differences):.0e} / {differences.max():.0e}",
        "activations that only one side has": f"{((ours > 0) != (theirs > 0)).sum()} of {(ours > 0).sum():,}",
    }


@dataclass(frozen=True)
class Line:
    """What grows with the tokens, fitted through two lengths of text."""

    fixed: float
    per_token: float

    @classmethod
    def through(cls, n_tokens: list[int], measured: list[float]) -> Line:
        slope = max((measured[1] - measured[0]) / (n_tokens[1] - n_tokens[0]), 0.0)
        return cls(max(measured[1] - slope * n_tokens[1], 0.0), slope)

    def at(self, n_tokens: int) -> float:
        return self.fixed + self.per_token * n_tokens


def _figures(
    d_sae: int, ours: list[dict[str, Any]], theirs: list[dict[str, Any]], their_bytes: float
) -> dict[str, Any]:
    tokens = [part["n_contexts"] * CONTEXT for part in ours]
    n, last, n_some = tokens[-1], ours[-1], N_BATCHES * BATCH

    def fitted(parts: list[float]) -> Line:
        return Line.through(tokens, parts)

    phases = {name: fitted([part[name] for part in ours]) for name in ("read", "assemble", "finish")}
    bare = fitted([part["bare"] for part in ours])
    batch = fitted([part["seconds"][-1] for part in theirs])
    model = fitted([part["seconds"][0] - part["seconds"][-1] for part in theirs])

    def mine(n_tokens: int) -> float:
        return sum(line.at(n_tokens) for line in phases.values())

    def of_all(n_tokens: int) -> float:
        return model.at(n_tokens) + d_sae / BATCH * batch.at(n_tokens)

    some = sum(theirs[-1]["seconds"])
    return {
        f"{n:,} tokens x {n_some} features a second: ours": f"{n * n_some / last['some']:,.0f}",
        f"{n:,} tokens x {n_some} features a second: theirs": f"{n * n_some / some:,.0f} ({some / last['some']:.1f}x)",
        f"x all {d_sae:,}: ours": f"{n * d_sae / mine(n):,.0f}",
        f"x all {d_sae:,}: theirs, from its batches": f"{n * d_sae / of_all(n):,.0f} ({of_all(n) / mine(n):.1f}x)",
        f"scaled to {WHOLE:,} tokens (aim >= 20x)": f"{of_all(WHOLE) / mine(WHOLE):.1f}x",
        "that the bare cost would be": f"{of_all(WHOLE) / bare.at(WHOLE):.1f}x",
        "harvest over bare, scaled so (aim >= 0.75)": round(bare.at(WHOLE) / mine(WHOLE), 2),
        f"s at {n:,} tokens: bare / reading / assembling / into the catalog": " / ".join(
            f"{last[phase]:.1f}" for phase in ("bare", "read", "assemble", "finish")
        ),
        "s of its first batch / of each further one": " / ".join(f"{s:.1f}" for s in theirs[-1]["seconds"]),
        f"peak memory at {tokens[0]:,} and {n:,} tokens: ours": _mib(ours),
        f"peak memory at {tokens[0]:,} and {n:,} tokens: theirs": _mib(theirs),
        "bytes a feature: ours / theirs": f"{last['bytes_a_feature']:,.0f} / {their_bytes:,.0f}",
    }


def _mib(parts: list[dict[str, Any]]) -> str:
    return " / ".join(f"{part['peak_bytes'] / 2**20:,.0f} MiB" for part in parts)
