"""A language model in memory: token ids, activations at hooks, edits at hooks. The only importer of transformer_lens.

transformer-lens knows for each architecture which module a hook name means; its bridge is asked once, on the meta
device.
The forward pass is transformers' own (SDPA attention) with plain PyTorch hooks on those modules: on SmolLM2-135M, 128
tokens to layer 12, that takes 50 ms where the bridge's forward takes 77 ms, with the
same activations to 1e-8 of their size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from app.errors import BadInput
from app.protocol import ModelCard

Edit = Callable[[Float[Tensor, "batch pos d"]], Float[Tensor, "batch pos d"]]


@dataclass(frozen=True)
class HookPoint:
    """Where a hook name lies: which submodule of a block, whether its input or its output, and in which order."""

    kind: str
    component: str
    """The block's part in transformer-lens' words, dotted; empty for the block itself."""
    side: Literal["input", "output"]
    order: int
    """Order of evaluation within a block."""


HOOK_POINTS: dict[str, HookPoint] = {
    point.kind: point
    for point in (
        HookPoint("hook_resid_pre", "", "input", 0),
        HookPoint("attn.hook_z", "attn.o", "input", 1),
        HookPoint("hook_attn_out", "attn", "output", 2),
        HookPoint("hook_resid_mid", "ln2", "input", 3),
        HookPoint("hook_mlp_in", "ln2", "input", 3),
        HookPoint("hook_mlp_out", "mlp", "output", 4),
        HookPoint("hook_resid_post", "", "output", 5),
    )
}
_HOOK_NAME = re.compile(r"blocks\.(\d{1,4})\.(.+)")


class _Stop(Exception):
    """Ends a forward pass once everything wanted has been read."""


class LanguageModel:
    """A causal language model from a directory made by workers.install_model."""

    def __init__(self, card: ModelCard, hf: PreTrainedModel, tokenizer: Any, component_names: dict[str, str]) -> None:
        self.card = card
        self.hf = hf
        self.tokenizer = tokenizer
        self._component_names = component_names

    @classmethod
    def load(cls, path: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
        """Load weights and tokenizer. Reads local safetensors only and runs no code of the model's."""
        card = ModelCard.model_validate_json((path / "card.json").read_text())
        kept: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        hf = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **kept)
        tokenizer = AutoTokenizer.from_pretrained(path, **kept)
        return cls(card, hf.to(device).eval().requires_grad_(False), tokenizer, _component_names(path))

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
        _, point = self._locate(hook_name)
        return self.card.n_heads * self.card.d_head if point.kind == "attn.hook_z" else self.card.d_model

    @torch.inference_mode()
    def read(
        self, ids: Int[Tensor, "batch pos"], hook_names: Sequence[str], mask: Int[Tensor, "batch pos"] | None = None
    ) -> dict[str, Float[Tensor, "batch pos d"]]:
        """Return the activations at the hooks, running the model no further than the deepest of them.

        attn.hook_z comes with its heads flattened: [batch, pos, n_heads * d_head].
        """
        ordered = sorted(set(hook_names), key=self.depth)
        read: dict[str, Tensor] = {}
        readers = {name: _reader(read, name, stop=name == ordered[-1]) for name in ordered}
        with _hooked(self, readers), suppress(_Stop):
            self.body(input_ids=ids, attention_mask=mask, use_cache=False)
        return read

    @contextmanager
    def edited(self, edits: dict[str, Edit]) -> Iterator[None]:
        """Within the context every forward pass has its tensors at these hooks replaced by fn(tensor)."""
        with _hooked(self, edits):
            yield

    @property
    def body(self) -> nn.Module:
        """The model without its unembedding."""
        return self.hf.base_model

    @property
    def blocks(self) -> nn.ModuleList:
        blocks = self.hf.get_submodule(self._component_names["blocks"])
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def depth(self, hook_name: str) -> tuple[int, int]:
        """Order of evaluation: (layer, order within the block)."""
        layer, point = self._locate(hook_name)
        return layer, point.order

    def final_norm(self) -> nn.Module:
        return self.hf.get_submodule(self._component_names["ln_final"])

    def unembedding(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.hf.get_output_embeddings().weight

    def _locate(self, hook_name: str) -> tuple[int, HookPoint]:
        match = _HOOK_NAME.fullmatch(hook_name)
        point = HOOK_POINTS.get(match[2]) if match else None
        if match is None or point is None or (point.component and point.component not in self._component_names):
            raise BadInput(
                f"{self.card.id} has no hook {hook_name!r}; known are blocks.N.{{{', '.join(HOOK_POINTS)}}}."
            )
        layer = int(match[1])
        if layer >= self.card.n_layers:
            raise BadInput(f"Hook {hook_name!r} is in layer {layer}; {self.card.id} has {self.card.n_layers} layers.")
        return layer, point

    def module_of(self, hook_name: str) -> tuple[nn.Module, Literal["input", "output"]]:
        """The module whose input or output is the tensor of a hook name."""
        layer, point = self._locate(hook_name)
        block = self.blocks[layer]
        return (block.get_submodule(self._component_names[point.component]) if point.component else block), point.side


def _reader(read: dict[str, Tensor], name: str, stop: bool) -> Edit:
    def keep(tensor: Tensor) -> Tensor:
        read[name] = tensor
        if stop:
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


def _attach(module: nn.Module, side: Literal["input", "output"], edit: Edit) -> Any:
    """Put an edit on a module's first argument or on its (first) output."""
    if side == "output":

        def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        return module.register_forward_hook(on_output)

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(on_input, with_kwargs=True)


def _component_names(path: Path) -> dict[str, str]:
    """transformer-lens' component name -> this architecture's module name; parts of a block are relative to it."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(path), load_weights=False, device="meta")
    mapping: dict[str, Any] = bridge.adapter.component_mapping
    names = {name: part.name for name, part in mapping.items() if part.name}
    return names | dict(_parts("", "", mapping["blocks"].submodules))


def _parts(prefix: str, path: str, parts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, part in parts.items():
        if part.name:
            yield prefix + name, path + part.name
            yield from _parts(f"{prefix}{name}.", f"{path}{part.name}.", part.submodules or {})
