"""Frames that show nothing of their own: blank ones, and repeats of the frame before.

Shutters, lost frames, aborted acquisitions and resampling leave them behind. How frames differ tells of noise and
activity; so these are set aside before, and put back afterwards as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from restormer3d.views import SomeFrames

_READ_BYTES = 2**25  # of frames that are read at once
_APART = 16  # rows of which one is compared first


def frames_shown(stack: Any) -> np.ndarray:
    """Which frame each one shows: its own number, an earlier one's that it repeats, or -1 where it is blank.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.

    Returns
    -------
    numpy.ndarray
        (T,) int.
    """
    shown = np.arange(stack.shape[0])
    step = max(1, _READ_BYTES // (int(np.prod(stack.shape[1:])) * np.dtype(stack.dtype).itemsize))
    before = None
    for start in range(0, stack.shape[0], step):
        block = stack[start : start + step]
        for t, frame in enumerate(block, start):
            if _equal(frame, np.broadcast_to(frame.flat[0], frame.shape)):
                shown[t] = -1
            elif before is not None and _equal(frame, before):
                shown[t] = shown[t - 1]
            before = frame
    return shown


def without_idle(stack: Any, shown: np.ndarray) -> Any:
    """Give a stack of the frames that show something of their own; the same one where all do."""
    own = np.flatnonzero(shown == np.arange(len(shown)))
    return stack if len(own) == len(shown) else SomeFrames(stack, own)


def put_back(frames: Iterator[np.ndarray], stack: Any, shown: np.ndarray) -> Iterator[np.ndarray]:
    """Put blank frames of a stack among denoised ones (H, W), and repeat what has been made of repeated ones."""
    last = np.empty(0)
    for t, number in enumerate(shown):
        if number == t:
            last = next(frames)
        yield stack[t] if number < 0 else last


def _equal(frame: np.ndarray, other: np.ndarray) -> bool:
    return bool((frame[::_APART] == other[::_APART]).all() and (frame == other).all())
