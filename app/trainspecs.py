"""What a training job is asked to do: one pass of a model over some text, and the SAEs that learn from it.

A flat form with one SAE, a list under `saes`, and lists of values in place of single ones (a grid) all become the same
TrainSpec: every SAE spelled out, with a name of its own. No torch, no database.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator

from app.specs import MIN_HARVEST_TOKENS, Spec

HOOKS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_in",
    "hook_mlp_out",
    "attn.hook_z",
    "mlp.hook_in",
)
HOOK_PATTERN = r"^blocks\.\d{1,4}\.(" + "|".join(re.escape(hook) for hook in HOOKS) + ")$"
HookName = Annotated[str, Field(pattern=HOOK_PATTERN)]
SET_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,63}$"
PLAIN_PATTERN = r"^[^\x00-\x1f\x7f]*$"
HUB = "hf:"
"""What the name of a corpus begins with that is a dataset of the Hugging Face hub."""
RESAMPLING_ENDS = 2 / 3
"""Share of the steps after which nothing is resampled: what is new needs time to settle."""
MAX_SAES = 64
MAX_TOKENS = 10**11
MAX_STEPS = 10**9


class Architecture(StrEnum):
    """What can be trained."""

    STANDARD = "standard"
    GATED = "gated"
    TOPK = "topk"
    JUMPRELU = "jumprelu"
    BATCHTOPK = "batchtopk"
    MATRYOSHKA = "matryoshka_batchtopk"
    TRANSCODER = "transcoder"
    SKIP_TRANSCODER = "skip_transcoder"

    @property
    def label(self) -> str:
        """Its name for people."""
        return _TITLES[self]

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of SaeSpec that only some architectures have, and this one does."""
        return tuple(_DEFAULTS[self])

    @property
    def defaults(self) -> Mapping[str, Any]:
        """What those fields are where nothing is said; None where that depends on others."""
        return _DEFAULTS[self]

    @property
    def is_transcoder(self) -> bool:
        return self in (Architecture.TRANSCODER, Architecture.SKIP_TRANSCODER)

    @property
    def chooses_k(self) -> bool:
        """The number of active latents is set, not won from a penalty."""
        return "k" in self.fields


_TITLES = {
    Architecture.STANDARD: "Standard (ReLU, L1)",
    Architecture.GATED: "Gated",
    Architecture.TOPK: "TopK",
    Architecture.JUMPRELU: "JumpReLU",
    Architecture.BATCHTOPK: "BatchTopK",
    Architecture.MATRYOSHKA: "Matryoshka BatchTopK",
    Architecture.TRANSCODER: "Transcoder",
    Architecture.SKIP_TRANSCODER: "Skip transcoder",
}
_L1: dict[str, Any] = {
    "lr": 1e-3,
    "l1_coefficient": 3.0,
    "l1_warmup_steps": 500,
    "dead_latents": "resample",
    "resample_every_steps": 2500,
}
_TOPK: dict[str, Any] = {"lr": 1e-3, "k": 32, "aux_k": 256, "aux_coefficient": 1 / 32, "dead_latents": "aux_k"}
_BATCHTOPK: dict[str, Any] = {**_TOPK, "threshold_lr": 0.01}
_DEFAULTS: dict[Architecture, dict[str, Any]] = {
    Architecture.STANDARD: _L1,
    Architecture.GATED: {**_L1, "l1_coefficient": 5.0},
    Architecture.TOPK: _TOPK,
    Architecture.JUMPRELU: {
        "lr": 1e-3,
        "l0_coefficient": 1.0,
        "l0_warmup_steps": 500,
        "penalty": "tanh",
        "bandwidth": 2.0,
        "initial_threshold": 0.1,
        "tanh_scale": 4.0,
        "pre_act_coefficient": 3e-4,
        "dead_latents": "pre_act",
    },
    Architecture.BATCHTOPK: _BATCHTOPK,
    Architecture.MATRYOSHKA: {**_BATCHTOPK, "matryoshka_widths": None},
    Architecture.TRANSCODER: {**_L1, "hook_name_out": None},
    Architecture.SKIP_TRANSCODER: {**_L1, "hook_name_out": None},
}
"""The fields of each architecture with their defaults; lr is everyone's, with a default of its own."""
_TREATMENTS = {
    Architecture.TOPK: ("aux_k", "none"),
    Architecture.BATCHTOPK: ("aux_k", "none"),
    Architecture.MATRYOSHKA: ("aux_k", "none"),
    Architecture.JUMPRELU: ("pre_act", "none"),
}
GHOST_GRADS = (
    "ghost_grads was superseded: it costs a second forward pass, and Anthropic's later work and SAELens dropped it for "
    "treatments that revive more. This SAE uses {instead} in its place."
)


class SaeSpec(Spec):
    """One SAE of a training job: where it reads, what it is, how it learns."""

    hook_name: HookName = Field(description="Where activations are read, such as blocks.12.hook_resid_post.")
    hook_name_out: HookName | None = Field(
        None,
        description="Transcoders: what is predicted; blocks.12.hook_mlp_out from blocks.12.mlp.hook_in is usual.",
    )
    set_name: str = Field(pattern=SET_PATTERN, description="The source will be {layer}-{set_name}, such as 12-demo.")
    architecture: Architecture = Field(
        Architecture.TOPK,
        description="topk and batchtopk reach a given sparsity without tuning; jumprelu reconstructs best at a tuned "
        "penalty; matryoshka_batchtopk splits features less; standard (L1) and gated are for comparison.",
    )
    d_sae: int = Field(
        4096,
        ge=8,
        le=2**20,
        description="Latents; typically 4 to 16 times d_model. More find rarer features; memory and time grow with it.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the initial weights; the same gives the same weights.")
    lr: float = Field(
        1e-3,
        gt=0,
        le=1,
        description="Adam's peak learning rate; 1e-4 to 1e-3 is usual, less for wider SAEs. Too high: the loss "
        "oscillates and latents die; too low: it is still falling at the end. 1e-3 learned most in runs of 500 "
        "steps; longer ones commonly take less.",
    )
    warmup_steps: int = Field(
        100, ge=0, le=MAX_STEPS, description="Steps over which the learning rate rises; 100 to 1000."
    )
    decay_share: float = Field(
        0.3, ge=0, le=1, description="Last share of the steps over which it falls to zero; 0.2 to 0.3 is usual."
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's memory of the gradient; 0.9, or 0 for jumprelu.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's memory of its square; 0.999.")
    max_grad_norm: float = Field(
        0.01,
        gt=0,
        description="Gradients are scaled down to this norm; 0.01, with the loss in units of the variance, holds "
        "nearly every step to it, so that Adam weighs late steps as much as the first. 1 leaves most as they are and "
        "learns more slowly.",
    )
    dead_after_tokens: int = Field(
        200_000,
        ge=1,
        le=MAX_TOKENS,
        description="Tokens without an activation after which a latent counts as dead; 200 thousand for short runs, "
        "10 million for runs of a billion tokens.",
    )
    dead_latents: Literal["aux_k", "resample", "pre_act", "none", "ghost_grads"] | None = Field(
        None,
        description="What revives dead latents: aux_k for the topk family, resample for standard, gated and "
        "transcoders, pre_act for jumprelu. ghost_grads is understood and replaced by the architecture's own.",
    )
    k: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="topk family: latents active on a token, on average for batchtopk; 16 to 64 is usual.",
    )
    aux_k: int | None = Field(
        None,
        ge=0,
        le=2**20,
        description="topk family: dead latents that learn from the residual error in each step; about d_model / 2.",
    )
    aux_coefficient: float | None = Field(None, ge=0, description="topk family: weight of that AuxK loss; 1/32.")
    threshold_lr: float | None = Field(
        None,
        gt=0,
        le=1,
        description="batchtopk and matryoshka_batchtopk: how fast the threshold used at inference follows the least "
        "activation of the batches; 0.01.",
    )
    matryoshka_widths: tuple[int, ...] | None = Field(
        None,
        max_length=16,
        description="matryoshka_batchtopk: numbers of first latents that must reconstruct alone, rising; d_sae is "
        "added at the end. Default d_sae / 16, / 4 and / 1.",
    )
    l1_coefficient: float | None = Field(
        None,
        ge=0,
        description="standard, gated and transcoders: weight of the L1 penalty against the squared error summed over "
        "d_in, on activations of mean norm sqrt(d_in). 1 to 10; 3, and 5 for gated, leave 25 to 50 active. Higher is "
        "sparser and reconstructs less. (5e-5 to 1e-4 in older recipes, whose error is a mean over other units.)",
    )
    l1_warmup_steps: int | None = Field(
        None,
        ge=0,
        le=MAX_STEPS,
        description="standard, gated and transcoders: steps over which the penalty rises, about 5 % of all. Without "
        "it many latents die at the start.",
    )
    resample_every_steps: int | None = Field(
        None,
        ge=10,
        le=MAX_STEPS,
        description="standard, gated and transcoders: steps between resamplings of dead latents; 2,500. None happens "
        "in the last third of the training.",
    )
    l0_coefficient: float | None = Field(
        None, ge=0, description="jumprelu: weight of the L0 penalty, in the same units as the L1 one; 0.3 to 5."
    )
    l0_warmup_steps: int | None = Field(
        None,
        ge=0,
        le=MAX_STEPS,
        description="jumprelu: steps over which the penalty rises; about 5 % of all, or all of them.",
    )
    penalty: Literal["step", "tanh"] | None = Field(
        None,
        description="jumprelu: tanh is smooth and also moves the encoder (Anthropic); step counts active latents and "
        "moves thresholds alone (DeepMind), which takes tens of thousands of steps: after 500 it left 305 active where "
        "tanh left 30. Default tanh.",
    )
    bandwidth: float | None = Field(
        None,
        gt=0,
        description="jumprelu: width around the threshold in which it gets a gradient, in units in which activations "
        "have norm sqrt(d_in); 2 for tanh, 0.1 to 2 for step.",
    )
    initial_threshold: float | None = Field(None, ge=0, description="jumprelu: threshold at the start; 0.01 to 0.1.")
    tanh_scale: float | None = Field(None, gt=0, description="jumprelu with tanh: how steep it is; 4.")
    pre_act_coefficient: float | None = Field(
        None,
        ge=0,
        description="jumprelu: weight of the loss that pulls dead latents up to their threshold; 3e-6 to 3e-4.",
    )

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, given: Any) -> Any:
        """Refuse fields of other architectures in words, and write out the defaults of this one."""
        if not isinstance(given, dict):
            return given
        fields = {name: value for name, value in cast(dict[str, Any], given).items() if value is not None}
        try:
            architecture = Architecture(fields.get("architecture", Architecture.TOPK))
        except ValueError:
            return fields  # refused by the field itself, which lists the known ones
        for name in fields:
            owners = _owners(name)
            if owners and architecture not in owners:
                raise ValueError(
                    f"{name} is a field of {_listed(owners)}; this SAE is {architecture}. Leave it out, or change the "
                    "architecture."
                )
        return {**_DEFAULTS[architecture], **fields}

    @field_validator("matryoshka_widths")
    @classmethod
    def _rising(cls, widths: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if widths is not None and (min(widths, default=1) < 1 or list(widths) != sorted(set(widths))):
            raise ValueError(f"matryoshka_widths must rise from at least 1; they are {list(widths)}")
        return widths

    @model_validator(mode="after")
    def _consistent(self) -> SaeSpec:
        if self.k is not None and self.k >= self.d_sae:
            raise ValueError(f"k is {self.k} and d_sae {self.d_sae}; k must be smaller")
        self._check_hooks()
        self._check_treatment()
        if self.matryoshka_widths and self.matryoshka_widths[-1] > self.d_sae:
            raise ValueError(f"matryoshka_widths reach {self.matryoshka_widths[-1]}; d_sae is only {self.d_sae}")
        return self

    def _check_hooks(self) -> None:
        if self.architecture.is_transcoder and self.hook_name_out is None:
            raise ValueError(f"hook_name_out is missing: a {self.architecture} predicts what is there from hook_name")
        if self.hook_name_out == self.hook_name:
            raise ValueError(f"hook_name_out is hook_name itself, {self.hook_name}; an SAE does that")

    def _check_treatment(self) -> None:
        known = (*_TREATMENTS.get(self.architecture, ("resample", "none")), "ghost_grads")
        if self.dead_latents not in known:
            raise ValueError(
                f"dead_latents of {self.architecture} is one of {', '.join(known)}; not {self.dead_latents}"
            )

    @property
    def layer(self) -> int:
        """The layer in whose list the source stands: where the SAE reads."""
        return int(self.hook_name.split(".")[1])

    @property
    def source(self) -> str:
        return f"{self.layer}-{self.set_name}"

    @property
    def hooks(self) -> tuple[str, ...]:
        """Where activations must be read for it."""
        return (self.hook_name,) if self.hook_name_out is None else (self.hook_name, self.hook_name_out)

    @property
    def treatment(self) -> str:
        """What revives dead latents: dead_latents, with ghost_grads replaced."""
        asked = self.dead_latents or "none"
        return str(_DEFAULTS[self.architecture]["dead_latents"]) if asked == "ghost_grads" else asked

    @property
    def widths(self) -> tuple[int, ...]:
        """The nested widths of a matryoshka SAE, d_sae last; d_sae alone for others."""
        if self.architecture is not Architecture.MATRYOSHKA:
            return (self.d_sae,)
        asked = self.matryoshka_widths or tuple(max(1, self.d_sae // part) for part in (16, 4))
        return (*(width for width in asked if width < self.d_sae), self.d_sae)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the person who asked should know, in words."""
        return (GHOST_GRADS.format(instead=self.treatment),) if self.dead_latents == "ghost_grads" else ()


class TrainSpec(Spec):
    """Train SAEs on one pass of a model over some text, evaluate them and put them into the catalog."""

    model: str = Field(max_length=200, pattern=PLAIN_PATTERN, description="Model id in the catalog.")
    corpus: str = Field(
        max_length=200,
        pattern=PLAIN_PATTERN,
        description="Corpus in the catalog; or `hf:OWNER/NAME`, `hf:OWNER/NAME:CONFIG`, for a dataset of the Hugging "
        "Face hub, of whose text the job first stores as much as the tokens need.",
    )
    text_column: str = Field(
        "text",
        min_length=1,
        max_length=200,
        pattern=PLAIN_PATTERN,
        description="Of a dataset of the hub: the column that holds the text, such as `text` or `content`.",
    )
    split: str = Field(
        "train",
        min_length=1,
        max_length=100,
        pattern=PLAIN_PATTERN,
        description="Of a dataset of the hub: the split that is read, such as `train`.",
    )
    saes: tuple[SaeSpec, ...] = Field(
        min_length=1,
        max_length=MAX_SAES,
        description="The SAEs; fields given outside are defaults of all, and a list of values makes one SAE of each.",
    )
    context_size: int = Field(
        128, ge=8, le=4096, description="Tokens the model sees at once; 128 to 1024. Longer costs more in attention."
    )
    n_tokens: int = Field(
        2_000_000,
        ge=2_000,
        le=MAX_TOKENS,
        description="Distinct tokens to learn from; millions for a first look, 100 million to a billion for a "
        "finished SAE. Where the corpus has fewer, all of it.",
    )
    epochs: int = Field(2, ge=1, le=100, description="How often each is seen; 1 where there is text enough.")
    batch_size: int = Field(
        4096,
        ge=8,
        le=2**20,
        description="Tokens of one optimiser step; 2048 to 8192. Batches differ by a token or two.",
    )
    data_seed: int = Field(0, ge=0, lt=2**31, description="Seed of the order in which tokens are seen.")
    max_norm_ratio: float = Field(
        6.0,
        gt=1,
        description="Tokens whose activation norm exceeds this multiple of the median at any of the hooks are left "
        "out of the loss; 6 leaves out attention sinks only.",
    )
    held_out: float = Field(0.05, gt=0, lt=0.5, description="Last share of the corpus, kept for evaluation.")
    cache: Literal["auto", "disk", "buffer"] = Field(
        "auto",
        description="disk keeps all activations in 16 bits, for several epochs and later jobs on the same text; buffer "
        "shuffles them in a bounded buffer and runs the model again in each epoch; auto takes disk where it fits.",
    )
    buffer_tokens: int = Field(
        524_288,
        ge=1_024,
        le=2**26,
        description="Tokens shuffled together in the buffer; 500 thousand. More costs disk.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Of the large matrix products; weights stay in float32. auto is bfloat16 where it is faster.",
    )
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="Processes that share each batch, on one machine: as many as it has GPUs for a wide SAE, "
        "else 1. The weights are those of one process, up to the order of sums.",
    )
    steps_per_checkpoint: int = Field(
        40, ge=1, le=MAX_STEPS, description="Optimiser steps between checkpoints; seconds of work."
    )
    evaluate_every_steps: int = Field(
        200,
        ge=1,
        le=MAX_STEPS,
        description="Steps between looks at held-out text: ce_loss_score, histograms, a few features.",
    )
    n_eval_tokens: int = Field(
        20_000, ge=1_000, le=10**9, description="Held-out tokens for the losses with the SAE spliced in, at the end."
    )
    weights_dtype: Literal["float32", "float16"] = Field("float16", description="Precision of the weights on disk.")
    harvest_tokens: int = Field(
        1_000_000,
        ge=0,
        le=10**11,
        description="Tokens of the harvest queued at the end, which makes the dashboards; 0 queues none.",
    )
    visibility: Literal["team", "private"] = Field(
        "team",
        description="Who sees the job, its SAEs and their dashboards: everybody here, or only you and the admins. "
        "Their pages can change it later.",
    )

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, given: Any) -> Any:
        """Lift the flat form into `saes`, apply defaults given outside, and expand lists into a grid."""
        if not isinstance(given, dict):
            return given
        fields = cast(dict[str, Any], given)
        outside = {name: value for name, value in fields.items() if name in SaeSpec.model_fields}
        common = {name: value for name, value in fields.items() if name not in outside}
        listed: Any = common.get("saes")
        if isinstance(listed, Mapping):
            listed = [listed]
        if isinstance(listed, str) or not isinstance(listed, Sequence | None):
            return fields
        entries: list[Any] = list(cast(Sequence[Any], listed)) if listed is not None else [{}]
        merged = [dict(_merged(outside, cast(dict[str, Any], e))) if isinstance(e, dict) else e for e in entries]
        spelled = [sae for e in merged for sae in (expanded(cast(dict[str, Any], e)) if isinstance(e, dict) else [e])]
        _check_outside(outside, spelled)
        return {**common, "saes": spelled}

    @field_validator("saes", mode="before")
    @classmethod
    def _few(cls, saes: Any, _info: ValidationInfo) -> Any:
        if isinstance(saes, Sequence) and len(cast(Sequence[Any], saes)) > MAX_SAES:
            raise ValueError(f"this makes {len(cast(Sequence[Any], saes))} SAEs; a job trains at most {MAX_SAES}")
        return cast(Any, saes)

    @model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        names = [sae.source for sae in self.saes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two SAEs would be called {twice[0]}; give them different values of set_name")
        for name, value in (("text_column", self.text_column), ("split", self.split)):
            if not self.corpus.startswith(HUB) and value != TrainSpec.model_fields[name].default:
                raise ValueError(
                    f"{name} is of datasets of the hub (`hf:OWNER/NAME`); {self.corpus} is stored already. "
                    "Leave it out."
                )
        if self.batch_size < 8 * self.processes:
            raise ValueError(
                f"batch_size is {self.batch_size}, too small to be shared by {self.processes} processes; "
                f"it must be at least {8 * self.processes}"
            )
        if 0 < self.harvest_tokens < MIN_HARVEST_TOKENS:
            raise ValueError(
                f"harvest_tokens is {self.harvest_tokens}; a harvest reads at least {MIN_HARVEST_TOKENS:,} tokens, "
                "and 0 makes none"
            )
        if self.buffer_tokens < 8 * self.batch_size and self.cache == "buffer":
            raise ValueError(
                f"buffer_tokens is {self.buffer_tokens:,}, which holds fewer than 8 batches of {self.batch_size:,}; "
                f"it must be at least {8 * self.batch_size:,}"
            )
        return self

    @property
    def hooks(self) -> tuple[str, ...]:
        """All hooks that the job reads, each once."""
        return tuple(dict.fromkeys(hook for sae in self.saes for hook in sae.hooks))

    @property
    def title(self) -> str:
        first = self.saes[0]
        what = first.architecture.label + (f" k={first.k}" if first.k else "") + f", d_sae={first.d_sae:,}"
        if len(self.saes) == 1:
            return f"Train {self.model}/{first.source}: {what}"
        return f"Train {len(self.saes)} SAEs of {self.model}: {first.source}, {self.saes[1].source}" + (
            ", …" if len(self.saes) > 2 else ""
        )

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(note for sae in self.saes for note in sae.notes))


def expanded(entry: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one SAE for every combination of the values given as lists, in the order given.

    Its set_name says which it is: `demo` with k [16, 32] gives demo-k16 and demo-k32. A hook needs no word where its
    layer, which the source's name begins with, tells it from the others.
    """
    axes = {name: list(cast(Sequence[Any], value)) for name, value in entry.items() if _is_axis(name, value)}
    if (n := math.prod(len(values) for values in axes.values())) > MAX_SAES:
        raise ValueError(f"this makes {n:,} SAEs; a job trains at most {MAX_SAES}")
    hooks = [str(hook) for hook in axes.get("hook_name", [])]
    own_layers = len({_layer_of(hook) for hook in hooks}) == len(hooks)
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        words = [_word(name, value, own_layers) for name, value in chosen.items() if len(axes[name]) > 1]
        name = "-".join([str(entry.get("set_name", "")), *filter(None, words)])
        named = {**entry, **chosen, **({"set_name": name} if "set_name" in entry else {})}
        # With several architectures in one grid, each takes the fields that it has.
        yield {n: v for n, v in named.items() if "architecture" not in axes or _applies(n, named)}


def _is_axis(name: str, value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value or name == "set_name":
        return False
    values = cast(Sequence[Any], value)
    return isinstance(values[0], list | tuple) if name == "matryoshka_widths" else True


_WORDS = {"d_sae": "d", "l1_coefficient": "l1-", "l0_coefficient": "l0-", "seed": "s", "architecture": ""}


def _word(name: str, value: Any, own_layers: bool) -> str:
    if name in ("hook_name", "hook_name_out"):
        kind = str(value).split(".", 2)[-1].replace("hook_", "").replace(".", "-").replace("_", "-")
        return "" if own_layers else f"{kind}{_layer_of(str(value)) if name == 'hook_name_out' else ''}"
    if isinstance(value, list | tuple):
        return "w" + "-".join(map(str, cast(Sequence[Any], value)))
    shown = f"{value:g}" if isinstance(value, int | float) and abs(value) < 1e5 else str(value)
    prefix = _WORDS.get(name, name.replace("_", "-"))
    return prefix + re.sub(r"[^a-z0-9_-]", "", shown.lower().replace(".", "p"))


def _layer_of(hook_name: str) -> str:
    return [*hook_name.split("."), ""][1]


def _merged(outside: Mapping[str, Any], entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Defaults given outside, where the entry's architecture knows them, under the entry's own fields."""
    for name, value in {**outside, **entry}.items():
        if name in entry or _applies(name, {**outside, **entry}):
            yield name, value


def _applies(name: str, fields: Mapping[str, Any]) -> bool:
    asked = fields.get("architecture", Architecture.TOPK)
    architectures = cast(Sequence[Any], asked) if isinstance(asked, list | tuple) else [asked]
    owners = _owners(name)
    return not owners or any(str(architecture) in owners for architecture in architectures)


def _check_outside(outside: Mapping[str, Any], saes: Sequence[Any]) -> None:
    """Raise for a field given for all SAEs that none of them has."""
    used = [
        str(cast(dict[str, Any], sae).get("architecture", Architecture.TOPK)) for sae in saes if isinstance(sae, dict)
    ]
    for name, value in outside.items():
        owners = _owners(name)
        if value is not None and owners and used and not set(used) & {*owners, *_unknown(used)}:
            raise ValueError(
                f"{name} is a field of {_listed(owners)}; this job trains {_listed(sorted(set(used)))}. Leave it "
                "out, or change the architecture."
            )


def _unknown(architectures: Sequence[str]) -> set[str]:
    """Those that are none: the field itself says so."""
    return set(architectures) - {str(architecture) for architecture in Architecture}


def _owners(name: str) -> tuple[str, ...]:
    """The architectures that have a field; none where it is everyone's."""
    if name not in SaeSpec.model_fields or name in ("lr", "dead_latents"):
        return ()
    return tuple(str(architecture) for architecture in Architecture if name in _DEFAULTS[architecture])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
