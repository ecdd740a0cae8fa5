"""Stacks that are made of another one when they are sliced: some of its frames, or its frames changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ChangedStack:
    """A stack (T, H, W) whose intensities differ from those of another one, in floating point: integers might wrap.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    """

    stack: Any

    @property
    def shape(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        return self.stack.shape

    @property
    def dtype(self) -> np.dtype:
        """Of what slicing gives: float32, or float64 for integers of 32 bits and more."""
        return np.result_type(self.stack.dtype, np.float32)


class SomeFrames:
    """Frames of a stack by their numbers, increasing, as a stack that reads them when they are sliced."""

    def __init__(self, stack: Any, numbers: np.ndarray):
        self.stack, self.numbers = stack, numbers
        self.shape: tuple[int, int, int] = (len(numbers), *stack.shape[1:])
        self.dtype: np.dtype = stack.dtype
        self.ndim = 3

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read `some[t]`, `some[a:b]` or `some[a:b, y0:y1, x0:x1]`."""
        times, *crop = index if isinstance(index, tuple) else (index,)
        chosen = self.numbers[times]
        if not chosen.size:
            return self.stack[0:0, *crop]
        first = int(chosen.min())
        return self.stack[first : int(chosen.max()) + 1, *crop][chosen - first]
