"""sae-dashboard's side of the comparison. Runs in sae-dashboard's own environment and knows nothing of this project.

Reads what is asked from the JSON file that is its argument and writes figures.json beside it. It does what
sae-dashboard's NeuronpediaRunner does, with its defaults: 128 features at a time, the model's activations cached on
disk after the first batch. That runner itself wants a model and a dataset that it knows by name.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sae_dashboard.components_config import (
    ActsHistogramConfig,
    Column,
    FeatureTablesConfig,
    LogitsHistogramConfig,
    LogitsTableConfig,
    SequencesConfig,
)
from sae_dashboard.layout import SaeVisLayoutConfig
from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights

N_FEATURES_AT_A_TIME = 128
CONTEXTS_PER_FORWARD = 32


def main() -> None:
    file = Path(sys.argv[1])
    asked = json.loads(file.read_text())
    torch.set_num_threads(asked["threads"])
    torch.set_grad_enabled(False)
    model, sae = hooked_model(Path(asked["model"])), SAE.load_from_disk(_folding(Path(asked["sae"]), file.parent))
    sae.fold_W_dec_norm()
    tokens = torch.from_numpy(np.load(asked["tokens"]))
    hook = asked["hook"]
    _, cache = model.run_with_cache(tokens[:4], names_filter=hook, stop_at_layer=asked["layer"] + 1)
    np.save(file.parent / "acts.npy", sae.encode(cache[hook]).numpy())
    figures = []
    for n_contexts in asked["n_contexts"]:
        shutil.rmtree(file.parent / "cache", ignore_errors=True)
        _reset_peak()
        seconds = [
            _batch(model, sae, tokens[:n_contexts], first, asked, file.parent / f"batch-{n_contexts}-{first}.json")
            for first in range(0, asked["n_batches"] * N_FEATURES_AT_A_TIME, N_FEATURES_AT_A_TIME)
        ]
        figures.append({"n_contexts": n_contexts, "seconds": seconds, "peak_bytes": _peak()})
        (file.parent / "figures.json").write_text(json.dumps(figures))


def hooked_model(directory: Path) -> HookedSAETransformer:
    """A Llama that transformer-lens 2 does not know by name, with its final norm folded as from_pretrained does."""
    config = json.loads((directory / "config.json").read_text())
    cfg = HookedTransformerConfig(
        n_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        d_head=config["head_dim"],
        n_heads=config["num_attention_heads"],
        n_key_value_heads=config["num_key_value_heads"],
        d_mlp=config["intermediate_size"],
        n_ctx=2048,
        d_vocab=config["vocab_size"],
        act_fn=config["hidden_act"],
        eps=config["rms_norm_eps"],
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=config["head_dim"],
        rotary_base=config["rope_parameters"]["rope_theta"],
        original_architecture="LlamaForCausalLM",
        device="cpu",
        dtype=torch.float32,
    )
    model = HookedSAETransformer(cfg)
    state = convert_llama_weights(_as_modules(load_file(directory / "model.safetensors")), cfg)
    model.load_and_process_state_dict(
        state, fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()


def _as_modules(weights: dict[str, torch.Tensor]) -> Any:
    """Weights by name as the attributes that transformer-lens' conversion reads: llama.model.layers[3].mlp..."""
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    root: dict[str, Any] = {}
    for name, weight in weights.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            at = at.setdefault(part, {})
        at[last] = weight
    layers = root["model"]["layers"]
    root["model"]["layers"] = [layers[str(i)] for i in range(len(layers))]
    return _namespace(root)


def _namespace(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{name: _namespace(item) for name, item in value.items()})
    return [_namespace(item) for item in value] if isinstance(value, list) else value


def _folding(sae: Path, scratch: Path) -> Path:
    """A copy of a TopK SAE that scales by its decoder norms: all are 1, and sae-dashboard takes no other."""
    copy = scratch / "sae"
    shutil.copytree(sae, copy)
    config = json.loads((copy / "cfg.json").read_text())
    (copy / "cfg.json").write_text(json.dumps(config | {"rescale_acts_by_decoder_norm": True}))
    return copy


def _batch(
    model: HookedSAETransformer, sae: Any, tokens: torch.Tensor, first: int, asked: dict[str, Any], out: Path
) -> float:
    """Compute and write the dashboards of 128 features, and return the seconds that took."""
    began = time.perf_counter()
    data = SaeVisRunner(
        SaeVisConfig(
            hook_point=asked["hook"],
            features=list(range(first, first + N_FEATURES_AT_A_TIME)),
            minibatch_size_features=N_FEATURES_AT_A_TIME,
            minibatch_size_tokens=CONTEXTS_PER_FORWARD,
            feature_centric_layout=_layout(),
            ignore_tokens=set(asked["ignore_tokens"]),
            ignore_positions=[0],
            cache_dir=out.parent / "cache",
        )
    ).run(encoder=sae, model=model, tokens=tokens)
    about = NeuronpediaRunnerConfig("set", "sae", str(out.parent), model_id="model", layer=asked["layer"])
    vocabulary = Tokenizer.from_file(str(Path(asked["model"]) / "tokenizer.json")).get_vocab()
    words = {number: word for word, number in vocabulary.items()}
    out.write_text(NeuronpediaConverter.convert_to_np_json(model, data, about, words))
    return time.perf_counter() - began


def _layout() -> SaeVisLayoutConfig:
    sequences = SequencesConfig(
        stack_mode="stack-all",
        buffer=None,  # type: ignore[arg-type]
        compute_buffer=True,
        n_quantiles=5,
        top_acts_group_size=20,
        quantile_group_size=5,
    )
    tables = FeatureTablesConfig(n_rows=3)
    parts = [sequences, ActsHistogramConfig(), LogitsHistogramConfig(), LogitsTableConfig(), tables]
    return SaeVisLayoutConfig(columns=[Column(*parts)])


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
