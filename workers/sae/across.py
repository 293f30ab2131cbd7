"""Sums over the processes that train on one batch together (torch.distributed); alone, what is given comes back.

Each process has a share of every batch's rows and all of the weights. Nothing here has gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor


def size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def leads() -> bool:
    """Whether this process writes what is written once: checkpoints, curves, progress."""
    return rank() == 0


def wait() -> None:
    """Go on when all have come here."""
    if size() > 1:
        dist.barrier()


def share(x: Float[Tensor, "batch d"]) -> Float[Tensor, "part d"]:
    """Return this process' rows of a batch."""
    return x.tensor_split(size())[rank()] if size() > 1 else x


@torch.no_grad()
def mean_of_rows(x: Tensor) -> Tensor:
    """Return the mean over the rows (the first axis) of all processes."""
    if size() == 1:
        return x.mean(dim=0)
    total = torch.cat([x.sum(dim=0).flatten(), x.new_tensor([float(len(x))])])
    dist.all_reduce(total)
    return (total[:-1] / total[-1]).view(x.shape[1:])


@torch.no_grad()
def average(tensors: Iterable[Tensor | None]) -> None:
    """Replace each tensor by its mean over the processes, in place."""
    if size() > 1:
        for tensor in tensors:
            if tensor is not None:
                dist.all_reduce(tensor)
                tensor /= size()


@torch.no_grad()
def largest(x: Tensor) -> Tensor:
    """Return the elementwise maximum over the processes; of booleans, whether any is true."""
    if size() == 1:
        return x
    found = x.to(torch.int32) if x.dtype is torch.bool else x.clone()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.to(x.dtype)


@torch.no_grad()
def total(n: int) -> int:
    """Return the sum of a count over the processes."""
    if size() == 1:
        return n
    found = torch.tensor(n, device=_device())
    dist.all_reduce(found)
    return int(found)


@torch.no_grad()
def smallest(value: float) -> float:
    """Return the least of the processes' numbers."""
    if size() == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return float(found)


@torch.no_grad()
def among_largest(values: Float[Tensor, " part"], n: int) -> Bool[Tensor, " part"]:
    """Return which of this process' values are among the n largest of all processes', of which there are n or more.

    Of equal ones at the end, those of the first process that has them stay.
    """
    held, mine = (values, slice(None)) if size() == 1 else _listed(values)
    chosen = torch.zeros(len(held), dtype=torch.bool, device=values.device)
    chosen[held.topk(n, sorted=False).indices] = True
    return chosen[mine]


def _listed(values: Float[Tensor, " part"]) -> tuple[Float[Tensor, " all"], slice]:
    """Return all processes' values, first process first, the same on each; and where this one's are."""
    counts = torch.zeros(size(), dtype=torch.long, device=values.device)
    counts[rank()] = len(values)
    dist.all_reduce(counts)
    starts = [0, *counts.cumsum(0).tolist()]
    mine = slice(starts[rank()], starts[rank() + 1])
    held = values.new_zeros(starts[-1], dtype=torch.float32)
    held[mine] = values.float()
    dist.all_reduce(held)
    return held, mine


def _device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


@torch.no_grad()
def gathered(x: Float[Tensor, "part d"], n_rows: int) -> Float[Tensor, "batch d"]:
    """Return all processes' rows of a batch of n_rows, in its order."""
    if size() == 1:
        return x
    whole = x.new_zeros(n_rows, *x.shape[1:])
    torch.tensor_split(whole, size())[rank()].copy_(x)
    dist.all_reduce(whole)
    return whole
