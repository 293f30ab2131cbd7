"""SAE architectures: one class each, with its equation. Registered by name in CODERS. No files, no language model.

Canonical orientation: W_enc [d_in, d_sae], W_dec [d_sae, d_out]; d_out is d_in but for transcoders. All follow
sae-lens' definitions to the last switch. Attention z comes with its heads flattened, as
reshape_activations "hook_z" wants it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

LAYER_NORM_EPSILON = 1e-5
"""Added to the standard deviation on the way in only, as sae-lens does."""

_WRITTEN = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_in", "hook_mlp_out", "hook_attn_out")
"""Hooks on the residual stream or on what is added to it: transformer-lens' center_writing_weights centres these."""

Normalisation = Literal["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]


class TopK(NamedTuple):
    """The k largest activations of each row."""

    values: Float[Tensor, "batch k"]
    indices: Int[Tensor, "batch k"]


class Sparse(NamedTuple):
    """The non-zero activations of a batch."""

    rows: Int[Tensor, " n"]
    latents: Int[Tensor, " n"]
    values: Float[Tensor, " n"]


@dataclass(frozen=True)
class Switches:
    """The parts of an SAELens config that change the arithmetic."""

    apply_b_dec_to_input: bool = True
    normalize_activations: Normalisation = "none"
    """expected_average_only_in is folded into the weights by whoever trained; at inference it does nothing."""
    rescale_acts_by_decoder_norm: bool = False
    k: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        known = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        return cls(**known)


@dataclass(frozen=True)
class Coder:
    """x -> acts -> x_hat = acts W_dec + b_dec, with acts = sigma((x - b_dec) W_enc + b_enc).

    b_dec is subtracted from the input only with apply_b_dec_to_input. Subclasses say what sigma is.
    """

    architecture: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]] = ("W_enc", "b_enc", "W_dec", "b_dec")
    """Names of the tensors in a checkpoint."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    switches: Switches = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "switches", Switches.of(self.config))

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.tensors["W_enc"]

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        return self.tensors["b_enc"]

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:
        return self.tensors["W_dec"]

    @property
    def b_dec(self) -> Float[Tensor, " d_out"]:
        return self.tensors["b_dec"]

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def hook_name(self) -> str:
        """Where the input is read."""
        return str(self.config["metadata"]["hook_name"])

    @property
    def hook_name_out(self) -> str:
        """Where the reconstruction and the decoder rows belong: hook_name, but for transcoders."""
        return self.hook_name

    def seen(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Return activations at hook_name as the model that the SAE was trained on has them.

        Loaded with center_writing_weights, a model of LayerNorms computes the same text, but nothing it adds to the
        residual stream has a mean over d_model: here that is taken off. Other kwargs are judged in app.model_kwargs.
        """
        return _centred(x) if self._centres(self.hook_name) else x

    def aim(self, target: Float[Tensor, "batch d_out"]) -> Float[Tensor, "batch d_out"]:
        """Return activations at hook_name_out as that model has them: what `predict` is held against."""
        return _centred(target) if self._centres(self.hook_name_out) else target

    def _centres(self, hook_name: str) -> bool:
        kwargs = self.config["metadata"].get("model_from_pretrained_kwargs") or {}
        return bool(kwargs.get("center_writing_weights")) and hook_name.endswith(_WRITTEN)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Return the activations of all latents."""
        return self._activate(self._pre_acts(self._input(x)))

    def encode_latents(
        self, x: Float[Tensor, "batch d_in"], latents: Int[Tensor, " latent"]
    ) -> Float[Tensor, "batch latent"]:
        """Return the activations of some latents, at the cost of their columns of W_enc alone where that is exact."""
        return self._activate(self._pre_acts(self._input(x), latents), latents)

    def encode_topk(self, x: Float[Tensor, "batch d_in"], k: int) -> TopK:
        """Return the k largest activations of each row, highest first; zeros where fewer are active."""
        values, indices = self.encode(x).topk(min(k, self.d_sae), dim=-1)
        return TopK(values, indices)

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> Sparse:
        """Return the non-zero activations alone, by row."""
        acts = self.encode(x)
        rows, latents = acts.nonzero(as_tuple=True)
        return Sparse(rows, latents, acts[rows, latents])

    def decode(self, acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_out"]:
        """Return the reconstruction, in the units of the (normalised) input."""
        return self._scaled_for_decoder(acts) @ self.W_dec + self.b_dec

    def reconstruct(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Return what may stand in the place of x: `predict`, with the mean that `seen` took off put back."""
        x_hat = self.predict(x)
        return x_hat + x.mean(dim=-1, keepdim=True) if self._centres(self.hook_name) else x_hat

    def predict(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Encode and decode, and undo the normalisation of the input: what sae-lens returns for `seen(x)`."""
        x_hat = self.decode(self.encode(x))
        match self.switches.normalize_activations:
            case "constant_norm_rescale":
                return x_hat * self.seen(x).norm(dim=-1, keepdim=True) / self.d_in**0.5
            case "layer_norm":
                mean, std = _moments(self.seen(x))
                return x_hat * std + mean
            case _:
                return x_hat

    def parts(
        self, x: Float[Tensor, "batch d_in"]
    ) -> tuple[Sparse, Float[Tensor, "n d_out"], Float[Tensor, "batch d_out"]]:
        """Take the reconstruction of x apart: active latents, what each writes, and what is written without any.

        Summed by row they are `reconstruct(x)`: decoder rows with whatever undoes the normalisation, and the biases.
        """
        active = self.encode_sparse(x)
        writes = self.writes(x, active)
        return active, writes, self._without_latents(x)

    def writes(self, x: Float[Tensor, "batch d_in"], active: Sparse) -> Float[Tensor, "n d_out"]:
        """Return what each activation adds to the reconstruction of its row."""
        values = active.values
        if self.switches.rescale_acts_by_decoder_norm:
            values = values / self._decoder_norms()[active.latents]
        return (values * self._output_scale(x)[active.rows, 0])[:, None] * self.W_dec[active.latents]

    def _output_scale(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch 1"]:
        """Return what the decoded row is multiplied by to undo the normalisation of the input."""
        match self.switches.normalize_activations:
            case "constant_norm_rescale":
                return self.seen(x).norm(dim=-1, keepdim=True) / self.d_in**0.5
            case "layer_norm":
                return _moments(x)[1]
            case _:
                return torch.ones_like(x[:, :1])

    def _without_latents(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        bias = self.b_dec * self._output_scale(x)
        # One mean in either case: after `seen` took it off, layer_norm finds none.
        puts_mean_back = self.switches.normalize_activations == "layer_norm" or self._centres(self.hook_name)
        return bias + _moments(x)[0] if puts_mean_back else bias

    def error(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"] | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """Return what the prediction misses of the target: of x itself, or of hook_name_out for a transcoder."""
        return self.aim(x if target is None else target) - self.predict(x)

    def unit_direction(self, latent: int) -> Float[Tensor, " d_out"]:
        """Return the decoder row of a latent, scaled to norm 1."""
        row = self.W_dec[latent]
        return row / row.norm()

    def unit_of(self, x: Float[Tensor, "batch d_in"], latent: int) -> Float[Tensor, "batch d_out"]:
        """Return what one unit of a latent's activation adds to the reconstruction of each x."""
        row = self.W_dec[latent]
        if self.switches.rescale_acts_by_decoder_norm:
            row = row / row.norm()
        return row.expand(x.shape[0], -1) * self._output_scale(x.to(row.dtype))

    def _input(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        x = self.seen(x.to(self.W_enc.dtype))
        match self.switches.normalize_activations:
            case "constant_norm_rescale":
                x = x * (self.d_in**0.5 / x.norm(dim=-1, keepdim=True))
            case "layer_norm":
                mean, std = _moments(x)
                x = (x - mean) / (std + LAYER_NORM_EPSILON)
            case _:
                pass
        return x - self.b_dec if self._subtracts_b_dec() else x

    def _subtracts_b_dec(self) -> bool:
        return self.switches.apply_b_dec_to_input

    def _pre_acts(
        self, x: Float[Tensor, "batch d_in"], latents: Int[Tensor, " latent"] | None = None
    ) -> Float[Tensor, "batch latent"]:
        if latents is None:
            return torch.addmm(self.b_enc, x, self.W_enc)
        return torch.addmm(self.b_enc[latents], x, self.W_enc[:, latents])

    def _activate(
        self, pre_acts: Float[Tensor, "batch latent"], latents: Int[Tensor, " latent"] | None = None
    ) -> Float[Tensor, "batch latent"]:
        raise NotImplementedError

    def _decoder_norms(self) -> Float[Tensor, " d_sae"]:
        return self.W_dec.norm(dim=-1)

    def _scaled_for_decoder(self, acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        return acts / self._decoder_norms() if self.switches.rescale_acts_by_decoder_norm else acts


def _centred(x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
    return x - x.mean(dim=-1, keepdim=True)


def _moments(x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch 1"], Float[Tensor, "batch 1"]]:
    """Mean and (unbiased) standard deviation of each row."""
    mean = x.mean(dim=-1, keepdim=True)
    return mean, (x - mean).std(dim=-1, keepdim=True)


def _pick(parameter: Tensor, latents: Tensor | None) -> Tensor:
    return parameter if latents is None else parameter[latents]


class StandardCoder(Coder):
    """acts = ReLU(pre_acts). Bricken et al. 2023."""

    architecture = "standard"

    def _activate(self, pre_acts: Tensor, latents: Tensor | None = None) -> Tensor:
        return pre_acts.relu()


class JumpReLUCoder(Coder):
    """acts = pre_acts * [pre_acts > threshold]. Rajamanoharan et al. 2024; also BatchTopK at inference."""

    architecture = "jumprelu"
    parameters = (*Coder.parameters, "threshold")

    def _activate(self, pre_acts: Tensor, latents: Tensor | None = None) -> Tensor:
        return pre_acts.relu() * (pre_acts > _pick(self.tensors["threshold"], latents))


class GatedCoder(Coder):
    """acts = [x W_enc + b_gate > 0] * ReLU(x W_enc exp(r_mag) + b_mag). Rajamanoharan et al. 2024."""

    architecture = "gated"
    parameters = ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec")

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """The part of the bias that belongs before the activation: none, gates have their own."""
        return torch.zeros_like(self.tensors["b_gate"])

    def _activate(self, pre_acts: Tensor, latents: Tensor | None = None) -> Tensor:
        b_gate, r_mag, b_mag = (_pick(self.tensors[name], latents) for name in ("b_gate", "r_mag", "b_mag"))
        return (pre_acts + b_gate > 0) * (pre_acts * r_mag.exp() + b_mag).relu()


class TopKCoder(Coder):
    """acts = ReLU(pre_acts) of the k largest pre_acts of a row, 0 elsewhere. Gao et al. 2024.

    With rescale_acts_by_decoder_norm the pre_acts are multiplied by the decoder rows' norms before the choice.
    """

    architecture = "topk"

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        chosen = self.encode_topk(x, self.switches.k)
        acts = torch.zeros(x.shape[0], self.d_sae, dtype=chosen.values.dtype, device=x.device)
        return acts.scatter_(-1, chosen.indices, chosen.values)

    def encode_latents(self, x: Tensor, latents: Tensor) -> Tensor:
        # Whether a latent is among the k largest depends on all the others.
        return self.encode(x)[:, latents]

    def encode_topk(self, x: Float[Tensor, "batch d_in"], k: int) -> TopK:
        pre_acts = self._pre_acts(self._input(x))
        if self.switches.rescale_acts_by_decoder_norm:
            pre_acts = pre_acts * self._decoder_norms()
        values, indices = pre_acts.topk(min(k, self.switches.k, self.d_sae), dim=-1)
        return TopK(values.relu(), indices)

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> Sparse:
        values, indices = self.encode_topk(x, self.switches.k)
        rows, places = (values > 0).nonzero(as_tuple=True)
        return Sparse(rows, indices[rows, places], values[rows, places])


class TranscoderCoder(Coder):
    """acts = ReLU(x W_enc + b_enc), y_hat = acts W_dec + b_dec: reads hook_name, predicts hook_name_out.

    Nothing is subtracted from the input and no normalisation undone: input and output differ. Dunefsky et al. 2024.
    """

    architecture = "transcoder"

    @property
    def hook_name_out(self) -> str:
        metadata = self.config["metadata"]
        return str(metadata.get("hook_name_out") or metadata["hook_name"])

    def reconstruct(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Return what may stand at hook_name_out; a mean that the model does not see is not known from the input."""
        return self.predict(x)

    def predict(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        """Return the prediction of what is at hook_name_out."""
        y_hat = self.decode(self.encode(x))
        W_skip = self.tensors.get("W_skip")  # [d_out, d_in]
        return y_hat if W_skip is None else y_hat + self.seen(x.to(W_skip.dtype)) @ W_skip.T

    def _activate(self, pre_acts: Tensor, latents: Tensor | None = None) -> Tensor:
        return pre_acts.relu()

    def _output_scale(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[:, :1])

    def _without_latents(self, x: Tensor) -> Tensor:
        bias = self.b_dec.expand(len(x), -1)
        W_skip = self.tensors.get("W_skip")
        return bias if W_skip is None else bias + self.seen(x.to(W_skip.dtype)) @ W_skip.T

    def _subtracts_b_dec(self) -> bool:
        return False


class SkipTranscoderCoder(TranscoderCoder):
    """acts = ReLU(x W_enc + b_enc), y_hat = acts W_dec + x W_skip^T + b_dec. Paulo et al. 2025."""

    architecture = "skip_transcoder"
    parameters = (*Coder.parameters, "W_skip")


class JumpReLUTranscoderCoder(TranscoderCoder):
    """acts = pre_acts * [pre_acts > threshold], y_hat = acts W_dec + b_dec: Gemma Scope's transcoders."""

    architecture = "jumprelu_transcoder"
    parameters = (*Coder.parameters, "threshold")

    def _activate(self, pre_acts: Tensor, latents: Tensor | None = None) -> Tensor:
        return pre_acts.relu() * (pre_acts > _pick(self.tensors["threshold"], latents))


class JumpReLUSkipTranscoderCoder(JumpReLUTranscoderCoder):
    """acts = pre_acts * [pre_acts > threshold], y_hat = acts W_dec + x W_skip^T + b_dec: Gemma Scope 2."""

    architecture = "jumprelu_skip_transcoder"
    parameters = (*JumpReLUTranscoderCoder.parameters, "W_skip")


CODERS: dict[str, type[Coder]] = {
    coder.architecture: coder
    for coder in (
        StandardCoder,
        JumpReLUCoder,
        GatedCoder,
        TopKCoder,
        TranscoderCoder,
        SkipTranscoderCoder,
        JumpReLUTranscoderCoder,
        JumpReLUSkipTranscoderCoder,
    )
}


def fold_decoder_norms(coder: Coder) -> Coder:
    """Return the same SAE with decoder rows of norm 1: activations grow by the norms, reconstructions stay.

    Raises ValueError for a TopK SAE that chooses by unscaled pre_acts: folding would change which latents it chooses.
    """
    norms = coder.W_dec.norm(dim=-1).clamp(min=1e-8)
    if coder.architecture == "topk" and not coder.switches.rescale_acts_by_decoder_norm:
        raise ValueError("Folding decoder norms changes the choice of a TopK SAE without rescale_acts_by_decoder_norm.")
    folded = {name: t * norms if name in _GROW_WITH_NORMS else t for name, t in coder.tensors.items()}
    folded["W_dec"] = coder.W_dec / norms[:, None]
    config = {key: value for key, value in coder.config.items() if key != "rescale_acts_by_decoder_norm"}
    return type(coder)(tensors=folded, config=config)


_GROW_WITH_NORMS = frozenset({"W_enc", "b_enc", "threshold", "b_gate", "b_mag"})
"""What is multiplied by the norms, latent by latent; r_mag is a ratio and stays."""
