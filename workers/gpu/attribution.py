"""Why the model says what it says: predictions, attribution of a logit to features, ablation, faithfulness.

A logit is linear in the final residual stream once the final norm's scale is frozen at its value there:
logit = u . r + constant with u = (W_U[token] * gain, centred for a LayerNorm) / scale. What a module adds to the
stream passes to r unchanged along the skip connections, so features, bias, error and what is written elsewhere add up
to the logit exactly. What later layers make of a feature is in none of the features' terms: gradient and ablation
count it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from app.errors import BadInput
from app.protocol import (
    AblateReply,
    AttributeReply,
    Contribution,
    FaithfulReply,
    GradientReply,
    Prediction,
    Target,
)
from workers.language_model import Edit, LanguageModel
from workers.sae.coders import Coder, Sparse
from workers.sae.stats import ReconstructionStats

LOGIT_BYTES = 128 * 2**20
"""Most memory the [positions, d_vocab] logits may take at a time."""
WRITE_BYTES = 128 * 2**20
_ADDED = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")
"""Kinds of hooks whose tensor is, or is added to, the residual stream."""


@dataclass(frozen=True)
class Direction:
    """A logit, or a difference of two, as a linear function of the final residual stream at one position."""

    u: Float[Tensor, " d_model"]
    constant: float
    logit: float
    """u . r + constant."""


@torch.inference_mode()
def predict(language: LanguageModel, ids: list[int], top_k: int, position: int | None = None) -> list[Prediction]:
    """Return the likeliest next tokens after each position, or after one, and what the actual next token costs."""
    tensor = torch.tensor([ids], device=language.device)
    normed = language.body(input_ids=tensor, use_cache=False).last_hidden_state[0]
    first, end = (0, len(ids)) if position is None else (position, position + 1)
    chunk = max(1, LOGIT_BYTES // (4 * language.card.d_vocab))
    found: list[Prediction] = []
    for start in range(first, end, chunk):
        stop = min(start + chunk, end)
        logits = language.unembed(normed[start:stop]).float()
        log_probs = logits.log_softmax(dim=-1)
        top = log_probs.topk(min(top_k, logits.shape[-1]), dim=-1)
        following = torch.tensor([*ids[start + 1 : stop + 1], *([0] if stop == len(ids) else [])], device=tensor.device)
        losses = (-log_probs.gather(-1, following[:, None])[:, 0]).tolist()
        raw = logits.gather(-1, top.indices).tolist()
        rows = zip(top.indices.tolist(), top.values.exp().tolist(), raw, losses, strict=True)
        for p, (tokens, probabilities, values, loss) in enumerate(rows, start):
            last = p == len(ids) - 1
            found.append(
                Prediction(ids=tokens, probabilities=probabilities, logits=values, loss=None if last else loss)
            )
    return found


@torch.inference_mode()
def direction(language: LanguageModel, r: Float[Tensor, " d_model"], target: Target) -> Direction:
    """Return the target as a linear function of the residual stream near r, the final norm's scale held fixed."""
    norm, r = language.final_norm(), r.float()
    bias = norm(torch.zeros_like(r, dtype=language.dtype)).float()
    gain, centred = language.final_gain(), isinstance(norm, nn.LayerNorm)
    spread = gain * (r - r.mean() if centred else r)
    # The norm's output less its bias is spread / scale; its own epsilon is in there, whatever it is called.
    normed = norm(r.to(language.dtype)).float() - bias
    inverse = (normed @ spread) / (spread @ spread)
    row, head = _unembedding_row(language, target)
    u = row * gain
    if centred:
        u = u - u.mean()
    constant = float(row @ bias) + head
    u = u * inverse
    return Direction(u, constant, float(u @ r) + constant)


def _unembedding_row(language: LanguageModel, target: Target) -> tuple[Float[Tensor, " d_model"], float]:
    W_U, head = language.unembedding(), language.hf.get_output_embeddings()
    biases = getattr(head, "bias", None)
    assert target.token is not None
    row, bias = W_U[target.token].float(), float(biases[target.token]) if biases is not None else 0.0
    if target.against is not None:
        row = row - W_U[target.against].float()
        bias -= float(biases[target.against]) if biases is not None else 0.0
    return row * language.logit_scale, bias * language.logit_scale


@torch.inference_mode()
def attribute(language: LanguageModel, coder: Coder, ids: list[int], target: Target, top_k: int) -> AttributeReply:
    """Take the logit apart into what the active features of one position write, and everything else."""
    check_direct(language, coder)
    tensor, p = torch.tensor([ids], device=language.device), target.position
    x, y, r = _at_hooks_and_end(language, coder, tensor)
    normed = language.final_norm()(r[None, p : p + 1])[0, 0]
    target = settled(language, normed, target)
    found = direction(language, r[p], target)
    into = _into_stream(language, coder, y[p])
    u = found.u if into is None else into(found.u)
    active, writes, without = coder.parts(x[p : p + 1].float())
    values = writes.float() @ u
    bias = float(without[0].float() @ u)
    error = float((y[p].float() - writes.float().sum(dim=0) - without[0].float()) @ u)
    order = values.abs().argsort(descending=True)[:top_k]
    features = [
        Contribution(latent=int(active.latents[i]), activation=float(active.values[i]), value=float(values[i]))
        for i in order.tolist()
    ]
    whole = float(y[p].float() @ u)
    pieces = float(values.sum())
    return AttributeReply(
        ids=ids,
        token=target.token,
        logit=found.logit,
        capped=float(_value(language, normed, target)),
        features=features,
        rest=pieces - sum(f.value for f in features),
        n_rest=len(values) - len(features),
        bias=bias,
        error=error,
        elsewhere=float(r[p].float() @ found.u) - whole,
        constant=found.constant,
    )


def settled(language: LanguageModel, normed: Float[Tensor, " d_model"], target: Target) -> Target:
    """Return the target with the likeliest token where none was named."""
    if target.token is not None:
        return target
    return target.model_copy(update={"token": int(language.unembed(normed).argmax())})


def check_direct(language: LanguageModel, coder: Coder) -> None:
    """Raise BadInput for an SAE whose output is not part of the residual stream."""
    kind = coder.hook_name_out.split(".", 2)[2]
    if kind not in (*_ADDED, "attn.hook_z"):
        raise BadInput(
            f"An SAE at {coder.hook_name_out} writes to what a module reads, not to the residual stream, so no feature "
            "has a direct part in a logit. Gradient and ablation count its effect."
        )


def _into_stream(language: LanguageModel, coder: Coder, z: Float[Tensor, " d"]) -> Callable[[Tensor], Tensor] | None:
    """For attention z, what turns a direction of the stream into one of z; None where the tensor is in the stream."""
    if not coder.hook_name_out.endswith("attn.hook_z"):
        return None
    module, _ = language.module_of(coder.hook_name_out)
    zero = module(torch.zeros_like(z)[None])
    if _norms_after(language):
        raise BadInput(
            f"{language.card.id} normalises what attention writes, so a feature of z has no fixed direction in the "
            "residual stream. Gradient and ablation count its effect."
        )

    def into(u: Tensor) -> Tensor:
        identity = torch.eye(len(z), device=z.device, dtype=z.dtype)
        return (module(identity) - zero).float() @ u  # rows of W_O

    return into


def _norms_after(language: LanguageModel) -> bool:
    """Whether a norm stands between attention and the stream, as in Gemma 2 and 3."""
    return any(name.endswith("pre_feedforward_layernorm") for name, _ in language.blocks[0].named_modules())


def gradient(
    language: LanguageModel, coder: Coder, ids: list[int], target: Target | None, top_k: int, skip: int = 0
) -> GradientReply:
    """Return gradient x activation of every active feature at every position from `skip` on, of a logit or of the
    mean loss."""
    tensor = torch.tensor([ids], device=language.device)
    value, x, slope = _slopes(language, coder, tensor, target)
    active, effects = _effects(coder, x, slope)
    if skip:
        counted = active.rows >= skip
        active, effects = Sparse(*(column[counted] for column in active)), effects[counted]
    by_latent = torch.zeros(coder.d_sae, device=effects.device).index_add_(0, active.latents, effects)
    order = effects.abs().topk(min(top_k, len(effects))).indices
    columns = (active.rows[order], active.latents[order], active.values[order], effects[order])
    best = by_latent.abs().topk(min(top_k, coder.d_sae))
    summed = [(latent, float(by_latent[latent])) for latent in best.indices.tolist() if by_latent[latent] != 0]
    return GradientReply.model_construct(
        ids=ids,
        value=value,
        positions=list(zip(*(column.tolist() for column in columns), strict=True)),
        latents=summed,
    )


def _slopes(
    language: LanguageModel, coder: Coder, ids: Int[Tensor, "1 pos"], target: Target | None
) -> tuple[float, Float[Tensor, "pos d_in"], Float[Tensor, "pos d_out"]]:
    """The value, x at the SAE's hook, and the gradient of the value with respect to the tensor at its output hook."""
    kept: dict[str, Tensor] = {}

    def leaf(y: Tensor) -> Tensor:
        kept["y"] = y.detach().clone().requires_grad_()
        kept.setdefault("x", y.detach().clone())
        return kept["y"] * 1.0  # not the leaf itself: a stream hook writes into its tensor

    def keep(x: Tensor) -> Tensor:
        kept["x"] = x.detach().clone()
        return x

    edits = {coder.hook_name: keep, coder.hook_name_out: leaf}  # one hook: the leaf alone
    with torch.enable_grad(), language.edited(edits):
        normed = language.body(input_ids=ids, use_cache=False).last_hidden_state[0]
        if target is None:
            value = cross_entropy(language.unembed(normed[:-1]).float(), ids[0, 1:])
        else:
            value = _value(language, normed[target.position], target)
        (slope,) = torch.autograd.grad(value, kept["y"])
    return float(value.detach()), kept["x"][0].float(), slope[0].float()


@torch.inference_mode()
def _effects(coder: Coder, x: Tensor, slope: Tensor) -> tuple[Sparse, Float[Tensor, " n"]]:
    """What each activation writes, times the slope there. In pieces: [n, d_out] may be large."""
    rows = max(1, WRITE_BYTES // (4 * coder.d_sae))
    found: list[tuple[Sparse, Tensor]] = []
    for start in range(0, len(x), rows):
        part, below = x[start : start + rows], slope[start : start + rows]
        active = coder.encode_sparse(part)
        per_piece = max(1, WRITE_BYTES // (4 * coder.d_out))
        pieces = [
            _dot(coder, part, Sparse(*(column[a : a + per_piece] for column in active)), below)
            for a in range(0, len(active.values), per_piece)
        ]
        effects = torch.cat(pieces) if pieces else active.values.float()
        found.append((Sparse(active.rows + start, active.latents, active.values), effects))
    whole = Sparse(*(torch.cat(column) for column in zip(*(active for active, _ in found), strict=True)))
    return whole, torch.cat([effects for _, effects in found])


def _dot(coder: Coder, x: Tensor, active: Sparse, slope: Tensor) -> Tensor:
    return (coder.writes(x, active).float() * slope[active.rows]).sum(dim=-1)


def ablate(
    language: LanguageModel, coder: Coder, ids: list[int], latent: int, target: Target, position: int | None
) -> AblateReply:
    """Run the model with one feature's writing taken out, and hold the change against both estimates of it."""
    tensor = torch.tensor([ids], device=language.device)
    if target.token is None:  # the same token in all runs
        with torch.inference_mode():
            normed = language.body(input_ids=tensor, use_cache=False).last_hidden_state[0, target.position]
        target = settled(language, normed, target)
    _, x, slope = _slopes(language, coder, tensor, target)
    where = torch.arange(len(ids), device=x.device) if position is None else torch.tensor([position], device=x.device)
    with torch.inference_mode():
        acts = coder.encode_latents(x, torch.tensor([latent], device=x.device))[where, 0]
        where, acts = where[acts > 0], acts[acts > 0]
        active = Sparse(where, torch.full_like(where, latent), acts)
        writes = coder.writes(x, active).float()
        estimate = float((writes * slope[where]).sum())

        def without(y: Tensor) -> Tensor:
            changed = y.clone()
            changed[0, where] -= writes.to(y.dtype)
            return changed

        before, loss_before = _run(language, tensor, {}, target)
        after, loss_after = _run(language, tensor, {coder.hook_name_out: without}, target)
    return AblateReply(
        before=before,
        after=after,
        direct=_direct_estimate(language, coder, ids, target, where, writes),
        gradient=estimate,
        loss_before=loss_before,
        loss_after=loss_after,
        n_active=len(where),
    )


@torch.inference_mode()
def _direct_estimate(
    language: LanguageModel, coder: Coder, ids: list[int], target: Target, where: Tensor, writes: Tensor
) -> float | None:
    try:
        check_direct(language, coder)
        r = language.final_residual(torch.tensor([ids], device=language.device))[0, target.position]
        here = writes[where == target.position]
        into = _into_stream(language, coder, here.new_zeros(coder.d_out).to(language.dtype))
    except BadInput:
        return None
    u = direction(language, r, target).u
    return float((here @ (u if into is None else into(u))).sum())


def _run(language: LanguageModel, ids: Tensor, edits: dict[str, Edit], target: Target) -> tuple[float, float]:
    """The target's value and the mean loss, with edits."""
    with language.edited(edits):
        normed = language.body(input_ids=ids, use_cache=False).last_hidden_state[0]
    return float(_value(language, normed[target.position], target)), _loss(language, normed, ids[0])


def _value(language: LanguageModel, normed: Float[Tensor, " d_model"], target: Target) -> Float[Tensor, ""]:
    logits = language.unembed(normed).float()
    target = settled(language, normed.detach(), target)
    return logits[target.token] if target.against is None else logits[target.token] - logits[target.against]


def _loss(language: LanguageModel, normed: Float[Tensor, "pos d_model"], ids: Int[Tensor, " pos"]) -> float:
    """Mean nats of all tokens but the first, whose distribution nobody asked for."""
    if len(ids) < 2:
        return 0.0
    chunk = max(1, LOGIT_BYTES // (4 * language.card.d_vocab))
    total = 0.0
    for start in range(0, len(ids) - 1, chunk):
        end = min(start + chunk, len(ids) - 1)
        logits = language.unembed(normed[start:end]).float()
        total += float(cross_entropy(logits, ids[start + 1 : end + 1], reduction="sum"))
    return total / (len(ids) - 1)


@torch.inference_mode()
def faithful(language: LanguageModel, coder: Coder, ids: list[int]) -> FaithfulReply:
    """Return reconstruction metrics and the losses clean, with the reconstruction, and with zeros at the hook."""
    if len(ids) < 3:
        raise BadInput(f"The text is {len(ids)} tokens with its first one; 3 are the least that can be measured.")
    tensor = torch.tensor([ids], device=language.device)
    x, y, _ = _at_hooks_and_end(language, coder, tensor)
    stats = ReconstructionStats()
    chunk = max(1, WRITE_BYTES // (4 * coder.d_sae))
    for part, aim in zip(x[1:].float().split(chunk), y[1:].float().split(chunk), strict=True):
        stats.add(part, coder, aim)
    found = stats.metrics()
    spliced = torch.cat([coder.reconstruct(part) for part in x.float().split(chunk)])

    def put(fresh: Tensor) -> Edit:
        return lambda old: torch.cat([old[:, :1], fresh[None, 1:].to(old.dtype)], dim=1)

    def loss(edits: dict[str, Edit]) -> float:
        with language.edited(edits):
            normed = language.body(input_ids=tensor, use_cache=False).last_hidden_state[0]
        return _loss(language, normed, tensor[0])

    out = coder.hook_name_out
    return FaithfulReply(
        n_tokens=len(ids) - 1,
        explained_variance=found["explained_variance"],
        cosine=found["cosine_similarity"],
        l0=found["l0"],
        loss_clean=loss({}),
        loss_spliced=loss({out: put(spliced)}),
        loss_ablated=loss({out: put(torch.zeros_like(spliced))}),
    )


def _at_hooks_and_end(
    language: LanguageModel, coder: Coder, ids: Int[Tensor, "1 pos"]
) -> tuple[Float[Tensor, "pos d_in"], Float[Tensor, "pos d_out"], Float[Tensor, "pos d_model"]]:
    """The SAE's input, the tensor its output stands for, and the final residual stream, in one pass."""
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Edit:
        def keep(tensor: Tensor) -> Tensor:
            kept[name] = tensor.clone()
            return tensor

        return keep

    with language.edited({name: keeper(name) for name in {coder.hook_name, coder.hook_name_out}}):
        r = language.final_residual(ids)
    return kept[coder.hook_name][0], kept[coder.hook_name_out][0], r[0]
