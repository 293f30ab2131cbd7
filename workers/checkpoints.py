"""SAE directories in SAELens' format: read into a Coder, written from tensors. Safetensors only, never pickles.

A directory given by a person is checked by app.weights before it is stored; what is loaded here is stored already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from app.errors import BadFile
from workers.sae.coders import CODERS, Coder

Loaded = Callable[[float], None]
"""Told the share of the weights that is in memory."""

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def load_sae(
    directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, loaded: Loaded = lambda share: None
) -> Coder:
    """Return the coder of a stored SAE; `loaded` is told the share that is there, tensor by tensor.

    Raises BadFile naming the architecture or the tensors that do not fit.
    """
    config = json.loads((directory / CONFIG).read_text())
    architecture = config.get("architecture", "standard")
    coder = CODERS.get(architecture)
    if coder is None:
        raise BadFile(f"SAE architecture {architecture!r} is not known; known are {', '.join(sorted(CODERS))}.")
    tensors: dict[str, Tensor] = {}
    with safe_open(directory / WEIGHTS, framework="pt", device=device) as stored:
        missing = [name for name in coder.parameters if name not in stored.keys()]  # noqa: SIM118
        if missing:
            raise BadFile(f"{directory / WEIGHTS} lacks {', '.join(missing)}, which a {architecture} SAE needs.")
        sizes = {name: prod(stored.get_slice(name).get_shape()) for name in coder.parameters}
        for name in coder.parameters:
            tensors[name] = stored.get_tensor(name).to(dtype)
            loaded(sum(sizes[done] for done in tensors) / sum(sizes.values()))
    return coder(tensors=tensors, config=config)


def save_sae(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
) -> None:
    """Write cfg.json and sae_weights.safetensors so that sae-lens' SAE.load_from_disk reads them.

    dtype is that of the file; cfg.json's dtype stays float32, in which it is computed after loading.
    """
    directory.mkdir(parents=True, exist_ok=True)
    scratch = directory / f".{WEIGHTS}.new"
    save_file({name: tensor.detach().to(dtype).contiguous().cpu() for name, tensor in tensors.items()}, scratch)
    os.replace(scratch, directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(dict(config), indent=2))
