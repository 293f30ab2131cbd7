"""Where models are computed and how precisely: chosen from what the machine has, overridden by the settings.

auto is float32 wherever that fits. bfloat16 takes half the memory and is faster on cards that have it, but moves
activations in the second digit (the demo: by 0.7 % at the median, 3 % of the active latents are others), and people
compare them to the fourth: it is taken for a model whose float32 weights do not fit.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from app.errors import BadInput
from app.settings import Settings

Device = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Machine:
    """What torch finds here."""

    cuda: bool
    mps: bool
    bfloat16: bool
    """Whether the device that auto chooses computes in bfloat16 natively."""

    @classmethod
    def here(cls) -> Machine:
        cuda = torch.cuda.is_available()
        return cls(cuda, torch.backends.mps.is_available(), cuda and torch.cuda.is_bf16_supported())


def choose_device(wanted: Literal["auto", "cpu", "cuda", "mps"], machine: Machine) -> Device:
    """Return the device. Raises BadInput when one is asked for that torch does not see."""
    if wanted == "auto":
        return "cuda" if machine.cuda else "mps" if machine.mps else "cpu"
    if (wanted == "cuda" and not machine.cuda) or (wanted == "mps" and not machine.mps):
        raise BadInput(f"SAE_ATLAS_DEVICE is {wanted}, which torch does not see here; unset it, or install its driver.")
    return wanted


def choose_dtype(
    wanted: Literal["auto", "float32", "bfloat16"], device: Device, machine: Machine, n_weights: int, budget_bytes: int
) -> torch.dtype:
    """Return the precision of a model of so many weights."""
    if wanted != "auto":
        return getattr(torch, wanted)
    fits = n_weights * torch.float32.itemsize <= budget_bytes
    return torch.float32 if fits or device != "cuda" or not machine.bfloat16 else torch.bfloat16


def device_of(settings: Settings) -> Device:
    return choose_device(settings.device, Machine.here())


def describe(settings: Settings) -> str:
    """Return the choice for this machine as a sentence, for the doctor."""
    machine, device = Machine.here(), device_of(settings)
    what = torch.cuda.get_device_name() if device == "cuda" else {"mps": "Apple's GPU"}.get(device, "no GPU")
    chosen = "SAE_ATLAS_DEVICE" if settings.device != "auto" else "auto"
    if settings.dtype != "auto":
        precision = f"{settings.dtype} (SAE_ATLAS_DTYPE)"
    elif device == "cuda" and machine.bfloat16:
        precision = "float32, bfloat16 for models that do not fit in it"
    else:
        precision = "float32"
    return f"Device: {device} ({chosen}; {what}), models in {precision}, SAEs in float32."


if __name__ == "__main__":
    try:
        print(describe(Settings()))  # noqa: T201
    except BadInput as error:
        sys.exit(error.message)
