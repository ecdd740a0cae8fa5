"""What the operators of the CPU engine share: one lock, kept memory, threads, and how a tensor is cut into strips."""

from __future__ import annotations

import threading
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

from restormer3d.ops.cpu.loops import BLOCK
from restormer3d.ops.cpu.memory import Pool
from restormer3d.ops.cpu.tiles import room

_CACHE_BYTES = 1_200_000  # for a ring: a part of a core's second-level cache of 2 MB
_FIRST_CACHE_BYTES = 32_768  # for a channel of it: a part of the first-level one
_REPEATED = 0.4  # share of the work that is done again for the rows and frames around a strip
_FEW_PRODUCTS = 5_000_000  # a twentieth of a millisecond: waking threads would take as long

busy = threading.RLock()
"""Kernels use all cores and the kept memory: one operator at a time."""
pool = Pool()


def start_threads(products: int) -> int:
    """Make Numba use as many threads as PyTorch does, one for few ``products``, and return how many."""
    wanted = torch.get_num_threads()
    threads = min(wanted, numba.config.NUMBA_NUM_THREADS)  # pyright: ignore
    if products < _FEW_PRODUCTS:
        threads = 1
    numba.set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # both may share one OpenMP library, which Numba's first start resets
        torch.set_num_threads(wanted)
    return threads


@lru_cache(maxsize=256)
def plan(shape: torch.Size, hidden: int, threads: int) -> tuple[int, int]:
    """Return rows per strip and pieces of the time axis that should cost the least time.

    High strips repeat less work at their borders, but their ring has to stay in the cache, and there have to be tasks
    for all threads.
    """
    batch, _, frames, height, width = shape

    def cost(rows: int, chunks: int) -> float:
        length = -(-frames // chunks)
        rounds = -(-batch * -(-height // rows) * chunks // threads)
        repeated = (rows + 2) * min(length + 2, frames)
        channel = 12 * (rows + 2) * (width + 1)
        spilled = max(1.0, hidden * channel / _CACHE_BYTES) * max(1.0, channel / _FIRST_CACHE_BYTES)
        return rounds * (_REPEATED * repeated + (1 - _REPEATED) * rows * length) * spilled**0.3

    choices = [
        (rows, chunks)
        for rows in range(BLOCK, height + BLOCK, BLOCK)
        for chunks in range(1, min(frames, 2 * threads) + 1)
    ]
    return min(choices, key=lambda choice: cost(*choice))


def array(x: Tensor) -> np.ndarray:
    """Return a tensor's memory, or that of a contiguous copy, as an array."""
    return x.detach().contiguous().numpy()


def zeros(*shape: int) -> np.ndarray:
    """Return sums to start from."""
    return np.zeros(shape, np.float32)


def scratch(sizes: tuple[int, ...], threads: int) -> np.ndarray:
    """Return scratch for every thread that holds parts of these sizes."""
    return pool.scratch("threads", (threads, sum(room(size) for size in sizes)))
