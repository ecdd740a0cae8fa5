"""Differences of frames, in which noise of the detector shows: the image is not in them, and hardly any activity."""

from __future__ import annotations

from typing import Any

import numpy as np

from restormer3d.normalization import sample_frames

_FARTHEST = 8  # frames: a wave may start with nearly the same phase in those that follow each other
_PAIRS = 128  # of frames, at most,
_VOXELS, _FEWEST = 2**24, 16  # of so many voxels in all, if fields were square, but no fewer pairs


def close_differences(stack: Any) -> np.ndarray:
    """Differences of frames that are one to eight frames apart.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Recorded intensities, of more than eight frames.

    Returns
    -------
    numpy.ndarray
        Divided by the square root of two, so that they are as noisy as a frame: (pairs, H, W) float32, of at most 128
        pairs.
    """
    frames, height, width = stack.shape
    starts = sample_frames(frames - _FARTHEST, min(_PAIRS, max(_FEWEST, _VOXELS // max(height, width) ** 2)))
    differences = np.empty((len(starts), height, width), np.float32)
    for number, (difference, t) in enumerate(zip(differences, starts, strict=True)):
        lag = 1 + number % _FARTHEST
        first, second = stack[int(t) : int(t) + lag + 1 : lag].astype(np.float32)
        np.subtract(second, first, out=difference)
        difference *= np.float32(0.5**0.5)
    return differences
