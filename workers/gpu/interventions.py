"""What steering does to one forward pass: each row of the batch with interventions of its own, at its own positions.

No queue, no sampling. The beginning-of-text token is never steered: SAEs are not trained on it, it has no activations
here, and its norm is tens of times the others'. Additive steering is lost in it, so results agree with Neuronpedia's;
projecting it would break the attention sink that the whole model leans on.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.errors import BadInput
from app.protocol import ModelCard, Operation, Positions, SteerDirection
from workers.language_model import Edit, LanguageModel
from workers.sae import steering
from workers.sae.coders import Coder

_NEUTRAL = {(Operation.ADD, 0.0), (Operation.SCALE, 1.0), (Operation.ORTHOGONAL, 1.0)}
"""These change nothing and are left out, so that such a row is the default row to the last bit."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """One feature or vector, what is done with it, and where."""

    hook_name: str
    """Where it writes."""
    operation: Operation
    coefficient: float
    direction: Tensor
    """Unit norm, float32."""
    coder: Coder | None
    latent: int
    positions: Positions
    at: frozenset[int]
    spare_special: bool

    @property
    def reads(self) -> str | None:
        """The hook whose tensor the activation is computed from, where it is not the one that is written to."""
        if self.coder is None or self.operation not in _SHIFTS or self.coder.hook_name == self.hook_name:
            return None
        return self.coder.hook_name

    @property
    def neutral(self) -> bool:
        return (self.operation, self.coefficient) in _NEUTRAL

    def applies(self, card: ModelCard, token: int, position: int, n_prompt: int) -> bool:
        """Tell whether a token of a text is steered."""
        if position == 0 and token == card.bos_token_id:
            return False
        if self.spare_special and token in card.special_token_ids:
            return False
        match self.positions:
            case Positions.ALL:
                return True
            case Positions.GENERATED:
                return position >= n_prompt
            case Positions.PROMPT:
                return position < n_prompt
            case Positions.CHOSEN:
                return position < n_prompt and position in self.at

    def shift(self, x: Tensor) -> Tensor:
        """What is added, from the tensor that the activation is computed from: [n, d_in] -> [n, d_out], float32."""
        if self.operation is Operation.ADD:
            return (self.coefficient * self.direction).expand(x.shape[0], -1)
        scale, value = _SHIFTS[self.operation](self.coefficient)
        if self.coder is None:
            return steering.projection_shift(x.float(), self.direction, scale=scale, value=value)
        return steering.activation_shift(x, self.coder, self.latent, scale=scale, value=value)

    def turn(self, h: Tensor) -> Tensor:
        """What replaces h, [n, d] in float32.

        A projection is that of h as the SAE's own model has it: where that model's residual stream is centred, the mean
        that is left out of the projection is put back behind it. The LayerNorms that read h do not see it.
        """
        h = h.float()
        seen = h if self.coder is None else self.coder.aim(h)
        act = steering.orthogonal if self.operation is Operation.ORTHOGONAL else steering.cap
        return act(seen, self.direction, self.coefficient) + (h - seen)


_SHIFTS = {
    Operation.CLAMP: lambda c: (0.0, c),
    Operation.SCALE: lambda c: (c, 0.0),
    Operation.ABLATE: lambda c: (0.0, 0.0),
}
"""An activation a becomes scale x a + value."""


def intervention(direction: SteerDirection, saes: Mapping[str, Coder], language: LanguageModel) -> Intervention:
    """Make what a request asks for, on the device. Raises BadInput for a vector that does not fit its hook."""
    coder = saes[direction.sae.path] if direction.sae is not None else None
    row = coder.W_dec[direction.latent] if coder is not None else _vector(direction, language)
    return Intervention(
        hook_name=coder.hook_name_out if coder is not None else direction.hook_name,
        operation=direction.operation,
        coefficient=direction.coefficient,
        direction=steering.unit_rows(row.unsqueeze(0))[0],
        coder=coder,
        latent=direction.latent,
        positions=direction.positions,
        at=frozenset(direction.at),
        spare_special=direction.spare_special,
    )


def _vector(direction: SteerDirection, language: LanguageModel) -> Tensor:
    try:
        numbers = np.frombuffer(base64.b64decode(direction.vector, validate=True), "<f4")
    except ValueError as error:
        raise BadInput(f"The vector is not base64 of float32 numbers: {error}") from None
    size = language.hook_size(direction.hook_name)
    if len(numbers) != size:
        raise BadInput(f"The vector has {len(numbers)} numbers, {direction.hook_name} has {size}: not its model.")
    if not np.isfinite(numbers).all():
        raise BadInput("The vector holds NaN or infinite numbers.")
    return torch.tensor(numbers, device=language.device)


class Applied(NamedTuple):
    """An intervention in one row of a batch."""

    row: int
    what: Intervention
    mask: Tensor | None
    """[pos]; None is everywhere."""


def applied(
    card: ModelCard, row: int, what: Intervention, ids: Sequence[int], first: int, n_prompt: int, device: torch.device
) -> Applied | None:
    """Where an intervention acts among the tokens of one row that a pass reads; None where nowhere."""
    hits = [what.applies(card, token, first + i, n_prompt) for i, token in enumerate(ids)]
    if not any(hits):
        return None
    return Applied(row, what, None if all(hits) else torch.tensor(hits, device=device))


def edits(wanted: Sequence[Applied], n_rows: int) -> dict[str, Edit]:
    """One edit per hook of a pass, for language_model.edited."""
    by_hook: dict[str, list[Applied]] = {}
    for item in wanted:
        by_hook.setdefault(item.what.hook_name, []).append(item)
    read: dict[str, Tensor] = {}
    made = {hook: _Hook(items, n_rows, read) for hook, items in by_hook.items()}
    found: dict[str, Edit] = dict(made)
    for hook in {item.what.reads for item in wanted} - {None}:
        assert hook is not None
        found[hook] = _reading(hook, read, made.get(hook))
    return found


def _reading(hook: str, read: dict[str, Tensor], then: Edit | None) -> Edit:
    """Keep what is at a hook, as what comes after it sees it."""

    def keep(h: Tensor) -> Tensor:
        read[hook] = h if then is None else then(h)
        return read[hook]

    return keep


class _Hook:
    """All that happens at one hook in one pass.

    What is added everywhere is summed when it is made, so a token costs one addition however many features are steered.
    """

    def __init__(self, items: list[Applied], n_rows: int, read: Mapping[str, Tensor]) -> None:
        added = [item for item in items if item.what.operation is Operation.ADD and item.mask is None]
        self._delta = _sum(added, n_rows) if added else None
        rest = [item for item in items if item not in added]
        self._shifts = _together([i for i in rest if i.what.operation not in _TURNS])
        self._turns = _together([i for i in rest if i.what.operation in _TURNS])
        self._read = read

    def __call__(self, h: Tensor) -> Tensor:
        # A copy: what the hook reads may be read elsewhere too (hook_mlp_in is the residual stream itself).
        out = h + self._delta.to(h.dtype) if self._delta is not None else h.clone()
        for rows, what, mask in self._shifts:
            x = (h if what.reads is None else self._read[what.reads])[rows]
            shift = what.shift(x.flatten(0, 1)).view(len(rows), h.shape[1], -1)
            shift = shift if mask is None else shift * mask.unsqueeze(-1)
            out[rows] = out[rows] + shift.to(h.dtype)
        for rows, what, mask in self._turns:
            before = out[rows]
            after = what.turn(before.flatten(0, 1)).view_as(before).to(h.dtype)
            out[rows] = after if mask is None else torch.where(mask.unsqueeze(-1), after, before)
        return out


_TURNS = (Operation.ORTHOGONAL, Operation.CAP)


def _sum(added: list[Applied], n_rows: int) -> Tensor:
    first = added[0].what.direction
    delta = torch.zeros(n_rows, 1, len(first), device=first.device)
    for item in added:
        delta[item.row, 0] += item.what.coefficient * item.what.direction
    return delta


def _together(items: list[Applied]) -> list[tuple[list[int], Intervention, Tensor | None]]:
    """Rows with the same intervention everywhere are done at once."""
    groups: dict[tuple[int, int], tuple[list[int], Intervention, Tensor | None]] = {}
    for n, item in enumerate(items):
        key = (id(item.what), -1 if item.mask is None else n)
        groups.setdefault(key, ([], item.what, item.mask))[0].append(item.row)
    return list(groups.values())
