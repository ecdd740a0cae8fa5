"""Times of variants, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

_WARM_UP = {"cuda": 6}  # on a GPU: autotuning, and steps before and while a CUDA graph is recorded


def alternate(
    variants: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Return the seconds of every repeat; each round runs every variant once, after rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    warm_up = _WARM_UP.get(device.type, 1)
    for turn in range(repeats + warm_up):
        for name, run in variants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize()
