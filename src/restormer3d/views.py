"""Stacks that are made of another one when they are sliced: some of its frames or pixels, or its frames changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

_READ_BYTES = 2**25  # of frames that are read at once
_FAR = 2.0**16  # from which on float32 tells steps of less than 1/128 no more


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


@dataclass(frozen=True)
class FramesChanged(ChangedStack, ABC):
    """A stack (T, H, W) some of whose frames are changed one by one, each in a way of its own, by :meth:`change`."""

    @abstractmethod
    def change(self, frame: np.ndarray, t: int, crop: tuple[Any, ...]) -> None:
        """Change frame `t`, of which `frame` are the rows and columns that `crop` says, in place."""

    def __getitem__(self, index: Any) -> np.ndarray:
        """Slice as the stack does."""
        times, *crop = index if isinstance(index, tuple) else (index,)
        frames = np.array(self.stack[index], dtype=self.dtype)
        numbers = np.atleast_1d(np.arange(self.shape[0])[times])
        for frame, t in zip(frames if frames.ndim == 3 else frames[None], numbers, strict=True):
            self.change(frame, int(t), tuple(crop))
        return frames


@dataclass(frozen=True)
class Lowered(ChangedStack):
    """A stack (T, H, W) less one level, so that float32 has room for what differs from it.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    level : float
        What to take away from every voxel.
    """

    level: float

    def __getitem__(self, index: Any) -> np.ndarray:
        """Slice as the stack does."""
        return np.subtract(self.stack[index], self.level, dtype=self.dtype)


def each_frame(stack: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Read a stack (T, H, W) frame by frame, with their numbers, some megabytes at a time."""
    step = _frames_at_once(stack)
    for start in range(0, stack.shape[0], step):
        yield from enumerate(stack[start : start + step], start)


def far_level(stack: Any) -> float:
    """A whole number below the stack's intensities, where these are so large that float32 would round them; else 0.

    As far below as they reach up, for intensity without light may be there, which noise estimates take for positive.
    """
    if np.can_cast(stack.dtype, np.float32):
        return 0.0
    some = {0, stack.shape[0] // 2, stack.shape[0] - 1}  # one of them may be blank
    ranges = [np.percentile(np.asarray(stack[t], np.float64), (0.5, 99.5)) for t in some]
    low, high = np.median(ranges, axis=0)
    level = float(np.floor(low - (high - low)))
    return level if abs(level) > _FAR else 0.0


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

    def __iter__(self) -> Iterator[np.ndarray]:
        """Read frame by frame."""
        return (self[t] for t in range(len(self)))

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read `some[t]`, `some[a:b]` or `some[a:b, y0:y1, x0:x1]`."""
        times, *crop = index if isinstance(index, tuple) else (index,)
        chosen = self.numbers[times]
        if not chosen.size:
            return self.stack[0:0, *crop]
        first, last = int(chosen.min()), int(chosen.max())
        steps = np.unique(np.diff(np.atleast_1d(chosen)))
        if len(steps) == 1 and steps[0] > 0:  # frames between them are not read
            return self.stack[first : last + 1 : int(steps[0]), *crop]
        return self.stack[first : last + 1, *crop][chosen - first]


class SomePixels:
    """Rows and columns of a stack as a stack, read when it is sliced."""

    def __init__(self, stack: Any, rows: slice, columns: slice):
        self.stack, self.rows, self.columns = stack, rows, columns
        self.shape: tuple[int, int, int] = (stack.shape[0], rows.stop - rows.start, columns.stop - columns.start)
        self.dtype: np.dtype = stack.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read `some[t]`, `some[a:b]` or `some[a:b, y0:y1, x0:x1]`."""
        times, *crop = index if isinstance(index, tuple) else (index,)
        return self.stack[times, self.rows, self.columns][(..., *crop, *[slice(None)] * (2 - len(crop)))]

    def read(self) -> np.ndarray:
        """Read all frames, a few at a time: of a compressed file whole frames have to be decoded."""
        values = np.empty(self.shape, self.dtype)
        step = _frames_at_once(self.stack)
        for start in range(0, self.shape[0], step):
            values[start : start + step] = self[start : start + step]
        return values


def _frames_at_once(stack: Any) -> int:
    return max(1, _READ_BYTES // (int(np.prod(stack.shape[1:])) * np.dtype(stack.dtype).itemsize))
