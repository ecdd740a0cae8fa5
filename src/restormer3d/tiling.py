"""Where windows lie and how they blend: pure geometry of one axis at a time, in numpy.

A frame's blend is separable: every temporal position has the same spatial windows, so the weights along time and
in the plane can be normalized apart.
"""

from __future__ import annotations

import numpy as np


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """First pixels of the windows that cover an axis; the last window ends where the axis ends.

    Parameters
    ----------
    length : int
        Pixels along the axis.
    window : int
        Pixels of a window, at most `length`.
    overlap : float
        Share of a window that the next one covers again, in [0, 1).

    Returns
    -------
    list of int
        Increasing, evenly spread: no two neighbors overlap by less than `overlap`.
    """
    assert 1 <= window <= length
    stride = max(1, round(window * (1 - overlap)))
    count = -(-(length - window) // stride) + 1
    return [int(start) for start in np.linspace(0, length - window, count).round()]


def even_window(length: int, window: int, longest: int, overlap: float) -> int:
    """Pixels of windows that cover an axis by as few as the `longest` would, with little more overlap than needed.

    Parameters
    ----------
    length : int
        Pixels along the axis.
    window, longest : int
        Between these it is chosen, in steps of eight, which networks of four levels do not have to fill up; `longest`
        is at most `length`.
    overlap : float
        As for :func:`window_starts`.
    """
    fewest = len(window_starts(length, longest, overlap))
    sizes = range(window, longest, 8)
    return next((size for size in sizes if len(window_starts(length, size, overlap)) == fewest), longest)


def temporal_starts(frames: int, window: int, overlap: float) -> list[int]:
    """First frames of the windows along time; frames below 0 and from `frames` on are mirrored.

    The first window starts at least half a window before the stack, and windows go on behind its end, so that every
    frame lies in as many windows as any other.
    """
    stride = max(1, round(window * (1 - overlap)))
    first = -max(window // 2, window - stride)
    return list(range(first, max(first, frames - stride) + stride, stride))


def mirror_indices(start: int, stop: int, length: int) -> np.ndarray:
    """Frames `start` to `stop` of a stack that is mirrored at its ends as often as needed (ends not repeated).

    >>> mirror_indices(-2, 5, 3)
    array([2, 1, 0, 1, 2, 1, 0])
    """
    period = max(1, 2 * (length - 1))
    position = np.arange(start, stop) % period
    return np.minimum(position, period - position) if length > 1 else np.zeros(stop - start, dtype=np.int64)


def hann_weights(window: int) -> np.ndarray:
    """Hann weights along time, (window,) float32: never exactly zero, and two at 50 % overlap add up to one."""
    return (np.sin(np.pi * (np.arange(window) + 0.5) / window) ** 2).astype(np.float32)


def gaussian_weights(window: int) -> np.ndarray:
    """Gaussian weights along a spatial axis, (window,) float32, 0.3 of the window wide."""
    position = (np.arange(window) + 0.5) / window - 0.5
    return np.exp(-0.5 * (position / 0.3) ** 2).astype(np.float32)
