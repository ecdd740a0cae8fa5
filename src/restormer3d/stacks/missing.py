"""Voxels that hold no value (NaN), as registration leaves them at the borders of frames of floats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from restormer3d.stacks.check import StackCheck
from restormer3d.views import FramesChanged, each_frame


@dataclass(frozen=True)
class WithoutMissing(FramesChanged):
    """A stack (T, H, W) of floats whose missing voxels hold the mean of what other frames show there.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    image : numpy.ndarray
        Mean of the values of each pixel, the lowest value of all where it has none, (H, W) float64.
    blank : frozenset of int
        Numbers of frames without any value; they hold one everywhere.
    count : int
        Missing voxels.
    """

    image: NDArray[Any]
    blank: frozenset[int]
    count: int

    def change(self, frame: NDArray[Any], t: int, crop: tuple[Any, ...]) -> None:
        """Give missing voxels of a frame a value."""
        if t in self.blank:
            frame[...] = self.image.min()
        else:
            np.copyto(frame, self.image[crop], "same_kind", where=np.isnan(frame))


def without_missing(stack: Any, check: StackCheck) -> Any:
    """Give missing voxels of a stack (T, H, W) a value; the same stack if none are missing."""
    if not check.missing:
        return stack
    total, count, blank = np.zeros(stack.shape[1:]), np.zeros(stack.shape[1:], int), []
    for t, frame in each_frame(stack):
        there = ~np.isnan(frame)
        total += np.where(there, frame, 0)
        count += there
        if not there.any():
            blank.append(t)
    image = np.where(count > 0, total / np.maximum(count, 1), check.minimum)
    return WithoutMissing(stack, image, frozenset(blank), check.missing)


def missing_again(frames: Iterable[NDArray[Any]], stack: Any) -> Iterator[NDArray[Any]]:
    """Leave no value in denoised frames (H, W) where the stack has none, as they come; those of integers are as is."""
    for t, frame in enumerate(frames):
        yield np.where(np.isnan(stack[t]), np.asarray(np.nan, frame.dtype), frame) if frame.dtype.kind == "f" else frame
