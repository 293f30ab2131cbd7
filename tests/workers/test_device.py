"""The choice of device and precision, for machines that are not here."""

from __future__ import annotations

import pytest
import torch

from app.errors import BadInput
from workers.device import Machine, choose_device, choose_dtype

CPU = Machine(cuda=False, mps=False, bfloat16=False)
MAC = Machine(cuda=False, mps=True, bfloat16=False)
OLD_GPU = Machine(cuda=True, mps=False, bfloat16=False)
GPU = Machine(cuda=True, mps=False, bfloat16=True)


@pytest.mark.parametrize(("machine", "device"), [(CPU, "cpu"), (MAC, "mps"), (OLD_GPU, "cuda"), (GPU, "cuda")])
def test_the_best_device_there_is_is_chosen(machine: Machine, device: str) -> None:
    assert choose_device("auto", machine) == device
    assert choose_device("cpu", machine) == "cpu"


@pytest.mark.parametrize(("wanted", "machine"), [("cuda", CPU), ("cuda", MAC), ("mps", GPU)])
def test_a_device_that_is_not_there_is_refused_in_words(wanted: str, machine: Machine) -> None:
    with pytest.raises(BadInput, match=f"SAE_ATLAS_DEVICE is {wanted}, which torch does not see here"):
        choose_device(wanted, machine)  # pyright: ignore[reportArgumentType]


def test_float32_is_kept_while_it_fits_since_people_compare_activations_to_the_fourth_digit() -> None:
    assert choose_dtype("auto", "cuda", GPU, 1_000, 4_000) == torch.float32


@pytest.mark.parametrize(
    ("device", "machine", "dtype"),
    [
        ("cuda", GPU, torch.bfloat16),
        ("cuda", OLD_GPU, torch.float32),
        ("cpu", CPU, torch.float32),
        ("mps", MAC, torch.float32),
    ],
)
def test_what_does_not_fit_is_halved_where_the_card_computes_in_bfloat16(
    device: str, machine: Machine, dtype: torch.dtype
) -> None:
    assert choose_dtype("auto", device, machine, 1_000, 3_999) == dtype  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_a_precision_asked_for_is_taken_anywhere(wanted: str) -> None:
    for machine in (CPU, MAC, OLD_GPU, GPU):
        device = choose_device("auto", machine)
        assert choose_dtype(wanted, device, machine, 1_000, 10) == getattr(torch, wanted)  # pyright: ignore
