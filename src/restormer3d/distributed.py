"""One training in several processes under torchrun: each computes its part of the batch, gradients are averaged.

All processes draw the same patches and masks and hold the same weights; the first alone writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The other processes wait while the first validates and writes.
_PATIENCE = timedelta(hours=2)


@contextmanager
def joined_processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, for as long as the context lasts; alone, do nothing.

    Parameters
    ----------
    device : torch.device
        Of the single process: "cuda" becomes one GPU per process (talking over nccl), all else talks over gloo.

    Yields
    ------
    torch.device
        The device of this process.

    Raises
    ------
    ValueError
        If this machine has fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        number, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if number >= gpus:
            raise ValueError(f"process {number} of this machine has no GPU: start at most {gpus} (--nproc-per-node)")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes files and reports."""
    return processes() == 1 or dist.get_rank() == 0


def part_of_batch(batch_size: int) -> slice:
    """The patches of a batch that this process computes.

    Raises
    ------
    ValueError
        If the batch cannot be shared out in equal parts: an average over unequal ones would weight patches unequally.
    """
    count = processes()
    if batch_size % count:
        raise ValueError(
            f"a batch of {batch_size} patches cannot be shared equally by {count} processes: "
            f"give a --batch-size that {count} divides, or start fewer processes"
        )
    share = batch_size // count
    first = share * dist.get_rank() if count > 1 else 0
    return slice(first, first + share)


def average_gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Replace the gradients of all processes by their average, and return the average of their losses."""
    count = processes()
    if count == 1:
        return loss.detach()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    bucket = torch.cat([loss.detach().reshape(1), *(gradient.flatten() for gradient in gradients)])
    dist.all_reduce(bucket)
    bucket /= count
    averages = bucket[1:].split([gradient.numel() for gradient in gradients])
    for gradient, average in zip(gradients, averages, strict=True):
        gradient.copy_(average.view_as(gradient))
    return bucket[0]
