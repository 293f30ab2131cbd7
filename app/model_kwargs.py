"""What SAELens' `model_from_pretrained_kwargs` mean for the activations that an SAE was trained on.

sae-lens trains on HookedTransformer.from_pretrained_no_processing(model, **kwargs); some of these kwargs rewrite the
model's weights so that it computes the same text from other activations. Here models stay as transformers has them:
what can be made up for at the hook is (workers.sae.coders does), what cannot is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.errors import BadFile

KEY = "model_from_pretrained_kwargs"
CENTRED = "center_writing_weights"
_LAYER_NORM = frozenset(
    {
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "GPTNeoForCausalLM",
        "GPTJForCausalLM",
        "OPTForCausalLM",
        "PhiForCausalLM",
        "BloomForCausalLM",
        "StableLmForCausalLM",
        "FalconForCausalLM",
    }
)
"""Classes whose residual stream is read through LayerNorms, which do not see its mean: only those can be centred."""
_NO_MATTER = frozenset(
    {
        "center_unembed",  # adds one number to all logits of a position
        "device",
        "device_map",
        "n_devices",
        "move_to_device",
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "cache_dir",
        "local_files_only",
        "force_download",
        "trust_remote_code",
        "token",
        "use_auth_token",
        "default_padding_side",
        "fold_biases",
        "use_attn_result",
        "use_split_qkv_input",
    }
)
"""They change where or how precisely the model is computed, not what it computes at a hook."""
_BEHIND_NORM, _Z = "mlp.hook_in", "attn.hook_z"
_HIDDEN: dict[str, tuple[str, ...]] = {
    "fold_ln": (_BEHIND_NORM,),
    "fold_value_biases": (_Z,),
    "refactor_factored_attn_matrices": (_Z,),
}
"""Kwargs that rewrite weights, and the hooks whose activations they change; all other activations stay."""


def refuse_unknown(config: Mapping[str, Any], architecture: str) -> None:
    """Raise BadFile when an SAE's config says that it was trained on activations that this model does not have.

    architecture is the transformers class of the model it is added to.
    """
    metadata = config["metadata"]
    kwargs = metadata.get(KEY) or {}
    if not isinstance(kwargs, dict):
        raise BadFile(f"cfg.json: {KEY} is {str(kwargs)[:80]!r}; it must be an object.")
    hooks = [str(metadata.get(name) or "") for name in ("hook_name", "hook_name_out")]
    for name, value in kwargs.items():
        if not value or name in _NO_MATTER:
            continue
        if name == CENTRED:
            if architecture not in _LAYER_NORM:
                raise BadFile(
                    f"cfg.json: {KEY} says {CENTRED}, which needs a model of LayerNorms; {architecture} is not known "
                    "as one, and transformer-lens ignores it for models of RMSNorms. Delete it from cfg.json for those."
                )
        elif name in _HIDDEN:
            hit = next((hook for hook in hooks if hook.endswith(_HIDDEN[name])), None)
            if hit:
                raise BadFile(
                    f"cfg.json: {KEY} says {name}, which changes the activations at {hit}; that is not made up for. "
                    "Retrain the SAE on a model loaded without it."
                )
        else:
            raise BadFile(
                f"cfg.json: {KEY} says {str(name)[:60]} = {str(value)[:60]}; what that does to activations is not "
                "known. If the model here is the one meant, delete it from cfg.json."
            )
