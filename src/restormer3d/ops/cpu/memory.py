"""Memory that the CPU engine keeps between calls, so that no training step pays for fresh pages.

Fresh large allocations cost a page fault every 4 kB, as much time as the arithmetic on them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 16
_IDLE_REQUESTS = 512  # more than one training step makes


@dataclass
class _Block:
    array: np.ndarray
    last_request: int
    own_references: int = 0


class Pool:
    """Tensors whose memory is used again once the last tensor or view on it is gone, and named scratch buffers.

    Not thread safe: its owner holds a lock.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._scratch: dict[str, np.ndarray] = {}
        self._requests = 0

    def empty(self, shape: Sequence[int]) -> Tensor:
        """Return an uninitialized float32 tensor that nobody else uses."""
        size = math.prod(shape)
        if size < _SMALL:
            return torch.empty(tuple(shape), dtype=torch.float32)
        self._requests += 1
        block = next((b for b in self._blocks if b.array.size == size and self._is_free(b)), None)
        if block is None:
            block = self._add(size)
        block.last_request = self._requests
        return torch.from_numpy(block.array).view(tuple(shape))

    def scratch(self, name: str, shape: Sequence[int]) -> np.ndarray:
        """Return the buffer of that name, grown where it is too small; its content is arbitrary."""
        size = math.prod(shape)
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = np.zeros(size, np.float32)
        return self._scratch[name][:size].reshape(tuple(shape))

    def _add(self, size: int) -> _Block:
        oldest = self._requests - _IDLE_REQUESTS
        self._blocks = [b for b in self._blocks if b.last_request > oldest or not self._is_free(b)]
        block = _Block(np.empty(size, np.float32), self._requests)
        block.own_references = sys.getrefcount(block.array)
        self._blocks.append(block)
        return block

    @staticmethod
    def _is_free(block: _Block) -> bool:
        return sys.getrefcount(block.array) <= block.own_references
