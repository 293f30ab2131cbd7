"""A language model in memory: token ids, activations at hooks, edits at hooks. The only importer of transformer_lens.

transformer-lens knows for each architecture which module a hook name means; its bridge is asked once, on the meta
device.
The forward pass is transformers' own (SDPA attention) with plain PyTorch hooks on those modules: on SmolLM2-135M, 128
tokens to layer 12, that takes 50 ms where the bridge's forward takes 77 ms, with the
same activations to 1e-8 of their size.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import set_tqdm_hook

from app.errors import BadInput
from app.protocol import ModelCard

Edit = Callable[[Float[Tensor, "batch pos d"]], Float[Tensor, "batch pos d"]]


Side = Literal["input", "output", "stream"]
"""Which tensor of a module: its first argument, its (first) output, or its argument as the residual stream.

An edit of the input reaches this module alone; an edit of the stream also what the block adds to it afterwards.
"""


@dataclass(frozen=True)
class Place:
    """A hook point in one architecture."""

    module: str
    """Relative to the block; empty for the block itself."""
    side: Side


@dataclass(frozen=True)
class Layout:
    """Where an architecture keeps what transformer-lens names."""

    blocks: str
    final_norm: str
    places: dict[str, Place]
    """By kind of hook; a kind that the architecture does not have is missing, as hook_resid_mid in parallel blocks."""


HOOK_POINTS: dict[str, int] = {
    "hook_resid_pre": 0,
    "attn.hook_z": 1,
    "hook_attn_out": 2,
    "hook_resid_mid": 3,
    "hook_mlp_in": 3,
    "mlp.hook_in": 3,
    "hook_mlp_out": 4,
    "hook_resid_post": 5,
}
"""Kinds of hooks, with their order of evaluation within a block."""
_HOOK_NAME = re.compile(r"blocks\.(\d{1,4})\.(.+)")


class _Stop(Exception):
    """Ends a forward pass once everything wanted has been read."""


class LanguageModel:
    """A causal language model from a directory made by workers.install_model."""

    def __init__(self, card: ModelCard, hf: PreTrainedModel, tokenizer: Any, layout: Layout) -> None:
        self.card = card
        self.hf = hf
        self.tokenizer = tokenizer
        self._layout = layout

    @classmethod
    def load(
        cls,
        path: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        loaded: Callable[[float], None] = lambda share: None,
    ) -> LanguageModel:
        """Load weights and tokenizer; `loaded` is told the share of the weights that is there, tensor by tensor.

        Reads local safetensors only and runs no code of the model's.
        """
        card = ModelCard.model_validate_json((path / "card.json").read_text())
        kept: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        with _counted(path, loaded):
            hf = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **kept)
        tokenizer = AutoTokenizer.from_pretrained(path, **kept)
        return cls(card, hf.to(device).eval().requires_grad_(False), tokenizer, _layout(path))

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def nbytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.hf.parameters())

    def to_ids(self, text: str, prepend_bos: bool = True) -> list[int]:
        """Tokenise a text; special tokens written out in it count as such. Raises BadInput for a lone surrogate."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadInput(
                f"The text holds a lone surrogate at character {error.start}; it is not valid text."
            ) from None
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        bos = self.card.bos_token_id
        return [bos, *ids] if prepend_bos and bos is not None else ids

    def chat(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool) -> str:
        """Write (role, content) messages out as the model's chat template has them, without a first BOS token.

        Raises BadInput where there is no template, or where it refuses these roles.
        """
        text = self._templated(messages, add_generation_prompt)
        bos = self.tokenizer.bos_token
        first = self.card.bos_token_id is not None and bos and self.tokenizer.bos_token_id == self.card.bos_token_id
        return text.removeprefix(bos) if first else text

    def chat_ids(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Tokenise (role, content) messages up to where the assistant's next turn begins, exactly as transformers does.

        A beginning-of-text token is there where the template writes one. Raises BadInput as `chat` does.
        """
        return self.to_ids(self._templated(messages, True), prepend_bos=False)

    def _templated(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool) -> str:
        if not self.card.has_chat_template:
            raise BadInput(f"{self.card.id} has no chat template; paste the text as it is.")
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of the model's author and raises what it likes
            raise BadInput(f"The chat template of {self.card.id} refuses these messages: {str(error)[:300]}") from None

    def bos_for(self, config: Mapping[str, Any]) -> int | None:
        """The token before every text read with an SAE of this config: the model's, unless it was trained without."""
        return None if (config.get("metadata") or {}).get("prepend_bos") is False else self.card.bos_token_id

    def pad(self, rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
        """Right-pad rows to one length: ids and attention mask, the mask None when no row needs padding."""
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        return ids, None if bool(mask.all()) else mask

    def hook_size(self, hook_name: str) -> int:
        """The width of the tensor at a hook. Raises BadInput for a hook this model does not have."""
        _, kind = self._locate(hook_name)
        return self.card.n_heads * self.card.d_head if kind == "attn.hook_z" else self.card.d_model

    @torch.inference_mode()
    def read(
        self, ids: Int[Tensor, "batch pos"], hook_names: Sequence[str], mask: Int[Tensor, "batch pos"] | None = None
    ) -> dict[str, Float[Tensor, "batch pos d"]]:
        """Return the activations at the hooks, running the model no further than the deepest of them.

        attn.hook_z comes with its heads flattened: [batch, pos, n_heads * d_head].
        """
        read: dict[str, Tensor] = {}
        readers = {name: _reader(read, name, len(set(hook_names))) for name in hook_names}
        with _hooked(self, readers), suppress(_Stop):
            self.body(input_ids=ids, attention_mask=mask, use_cache=False)
        return read

    @contextmanager
    def edited(self, edits: dict[str, Edit]) -> Iterator[None]:
        """Within the context every forward pass has its tensors at these hooks replaced by fn(tensor).

        fn must not write into its argument: other parts of the block may read it too.
        """
        with _hooked(self, edits):
            yield

    @property
    def body(self) -> nn.Module:
        """The model without its unembedding."""
        return self.hf.base_model

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.hf.get_submodule(self._layout.blocks)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def depth(self, hook_name: str) -> tuple[int, int]:
        """Order of evaluation: (layer, order within the block)."""
        layer, kind = self._locate(hook_name)
        return layer, HOOK_POINTS[kind]

    def final_norm(self) -> nn.Module:
        return self.hf.get_submodule(self._layout.final_norm)

    @torch.inference_mode()
    def final_gain(self) -> Float[Tensor, " d_model"]:
        """Return what the final norm multiplies by; Gemma stores it less one, so the module is asked."""
        norm = self.final_norm()
        weight = getattr(norm, "weight", None)
        stored = weight.float() if weight is not None else torch.ones(self.card.d_model, device=self.device)
        signs = torch.ones(self.card.d_model, device=self.device, dtype=self.dtype)
        signs[1::2] = -1  # mean 0 and variance 1: any norm leaves it as it is
        gain = (norm(signs) - norm(-signs)).float() / (2 * signs.float())
        return min((stored, stored + 1), key=lambda candidate: float((candidate - gain).abs().sum()))

    def unembedding(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.hf.get_output_embeddings().weight

    def unembed(self, normed: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Return logits of what the final norm gives, with the scale and the cap that some architectures have."""
        return self.cap(self.hf.get_output_embeddings()(normed) * self.logit_scale)

    @property
    def logit_scale(self) -> float:
        """What Cohere multiplies and Granite divides logits by."""
        config: Any = self.hf.config
        return float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )

    def cap(self, logits: Tensor) -> Tensor:
        """Gemma 2 bounds logits by a tanh; others leave them as they are."""
        most = getattr(self.hf.config, "final_logit_softcapping", None)
        return logits if not most else most * torch.tanh(logits / most)

    def final_residual(self, ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the residual stream as the final norm reads it."""
        seen: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        handle = self.final_norm().register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with suppress(_Stop):
                self.body(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        return seen[0]

    @property
    def cache_argument(self) -> str:
        """What this model class calls its KV cache: transformers 5.24 renames it, one architecture at a time."""
        return "cache" if "cache" in inspect.signature(self.hf.forward).parameters else "past_key_values"

    def hook_kinds(self) -> list[str]:
        """The kinds of hooks this architecture has, in order of evaluation."""
        return [kind for kind in HOOK_POINTS if kind in self._layout.places]

    def _locate(self, hook_name: str) -> tuple[int, str]:
        match = _HOOK_NAME.fullmatch(hook_name)
        if match is None or match[2] not in self._layout.places:
            raise BadInput(
                f"{self.card.id} has no hook {hook_name!r}; known are blocks.N.{{{', '.join(self.hook_kinds())}}}."
            )
        layer = int(match[1])
        if layer >= self.card.n_layers:
            raise BadInput(f"Hook {hook_name!r} is in layer {layer}; {self.card.id} has {self.card.n_layers} layers.")
        return layer, match[2]

    def module_of(self, hook_name: str) -> tuple[nn.Module, Side]:
        """The module whose input or output is the tensor of a hook name."""
        layer, kind = self._locate(hook_name)
        place = self._layout.places[kind]
        return self.blocks[layer].get_submodule(place.module), place.side


def _reader(read: dict[str, Tensor], name: str, n_wanted: int) -> Edit:
    def keep(tensor: Tensor) -> Tensor:
        read[name] = tensor
        if len(read) == n_wanted:
            raise _Stop
        return tensor

    return keep


@contextmanager
def _hooked(model: LanguageModel, edits: dict[str, Edit]) -> Iterator[None]:
    handles = [_attach(*model.module_of(name), edit) for name, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(module: nn.Module, side: Side, edit: Edit) -> Any:
    """Put an edit on one side of a module."""
    if side == "output":

        def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        return module.register_forward_hook(on_output)

    def edited(tensor: Tensor) -> Tensor:
        # The block keeps the same tensor and adds to it later, so the stream is edited by writing into it.
        return tensor.copy_(edit(tensor)) if side == "stream" else edit(tensor)

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edited(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(on_input, with_kwargs=True)


@contextmanager
def _counted(path: Path, loaded: Callable[[float], None]) -> Iterator[None]:
    """Within the context transformers' progress bar over the tensors it loads tells their share of all bytes."""
    sizes: dict[str, int] = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            sizes |= {name: prod(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118

    def counting(tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        done = 0
        for name, mapping in tensors:
            yield name, mapping
            done += sizes.get(name, 0)
            loaded(done / max(sum(sizes.values()), 1))

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return counting(args[0]) if kwargs.get("desc") == "Loading weights" else factory(*args, **kwargs)

    before = set_tqdm_hook(bar)
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _layout(path: Path) -> Layout:
    """Ask transformer-lens' description of the architecture."""
    from transformer_lens.model_bridge import TransformerBridge

    # For a model that also sees, transformer-lens runs `pip install torchvision`, which would replace torch under us.
    with mock.patch.dict(os.environ, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "UV_OFFLINE": "1"}):
        bridge = TransformerBridge.boot_transformers(str(path), load_weights=False, device="meta")
    mapping: dict[str, Any] = bridge.adapter.component_mapping
    block = mapping["blocks"]
    found = {kind: _place(block, kind) for kind in HOOK_POINTS}
    places = {kind: place for kind, place in found.items() if place is not None}
    return Layout(block.name, mapping["ln_final"].name, places)


def _place(block: Any, kind: str) -> Place | None:
    """Follow transformer-lens' alias for a hook to a module of the block; None where it has none."""
    parts = dict(_parts("", "", block.submodules))
    if kind == "hook_mlp_in":
        part = "mlp" if getattr(block, "mlp_reads_resid_directly", False) else "ln2"
        return Place(parts[part], "input") if part in parts else None
    if kind == "mlp.hook_in":  # behind the norm, where transcoders read
        return Place(parts["mlp"], "input") if "mlp" in parts else None
    if kind == "attn.hook_z":
        return Place(parts["attn.o"], "input") if "attn.o" in parts else None
    alias = block.hook_aliases.get(kind)
    if not isinstance(alias, str):
        return None
    part, _, hook = alias.rpartition(".")
    if hook not in ("hook_in", "hook_out") or (part and part not in parts):
        return None
    side: Side = "output" if hook == "hook_out" else "stream" if kind == "hook_resid_mid" else "input"
    return Place(parts[part] if part else "", side)


def _parts(prefix: str, path: str, parts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """transformer-lens' name of each part of a block -> this architecture's module name."""
    for name, part in parts.items():
        if part.name:
            yield prefix + name, path + part.name
            yield from _parts(f"{prefix}{name}.", f"{path}{part.name}.", part.submodules or {})
