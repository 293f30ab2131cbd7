"""65,536 latents and a vocabulary of 256,000: logit effects, evidence, and the map, with the most memory each took.

Every part is a process of its own. Weights are random: neither time nor memory depends on them. The aim is 24 GiB.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from tests.benchmarks.servers import peak, seconds

D_SAE, D_MODEL, VOCABULARY = 65_536, 576, 256_000
N_ROWS = D_SAE // 8
"""Latents whose logit effects are computed: they come in chunks that are all alike, so the rest adds time alone."""


def main() -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, about in (
        ("logits", f"logit effects of {N_ROWS:,} of {D_SAE:,} latents"),
        ("map", f"map and clusters of {D_SAE:,} latents"),
    ):
        command = [sys.executable, "-c", f"from tests.benchmarks import wide; wide.run_{name}()"]
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        took, most = done.stdout.split()[-2:]
        figures[about] = f"{float(took):,.0f} s, {int(most) / 2**30:.1f} GiB at most"
    return figures


def run_logits() -> None:
    """The promoted and suppressed tokens, histograms and moments."""
    import torch

    from workers.memory import keep_freed_memory
    from workers.sae.logits import logit_effects

    keep_freed_memory()
    unembedding, rows = torch.randn(VOCABULARY, D_MODEL), torch.randn(D_SAE, D_MODEL)
    print(seconds(lambda: logit_effects(rows[:N_ROWS], unembedding)), peak())


def run_map() -> None:
    """The layout by UMAP and its clusters, of directions that come in families, as decoder rows do."""
    import numpy as np

    from app.specs import MapSpec
    from workers.trainer.map import clustered, layout

    rng = np.random.default_rng(0)
    families = rng.standard_normal((400, D_MODEL))
    rows = families[rng.integers(400, size=D_SAE)] + rng.standard_normal((D_SAE, D_MODEL))
    spec = MapSpec(model="m", source="s")  # pyright: ignore[reportCallIssue]
    print(seconds(lambda: clustered(layout(rows.astype(np.float32), spec))), peak())
