"""How many CPU threads to compute on: what the user asked for, else the cores that this process may use."""

from __future__ import annotations

import os

_asked: int | None = None


def thread_count() -> int:
    """CPU threads to compute on. A job on a shared node may use fewer cores than the machine has."""
    if _asked is not None:
        return _asked
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(count: int | None) -> None:
    """Compute on so many CPU threads from now on, PyTorch and the CPU engine included; None leaves it as it is."""
    if count is None:
        return
    if count < 1:
        raise ValueError(f"--threads must be at least 1, got {count}")
    import torch

    limit_pools(count)
    torch.set_num_threads(count)


def limit_pools(count: int) -> None:
    """Let pools of threads have so many from now on; PyTorch is not imported for it."""
    global _asked
    _asked = count
