"""Rows of single frames that are far noisier than the like of them: interference, or data that came garbled.

Whatever is fitted to all of a recording is fitted to its noisiest frames, and one that holds nothing but garbled data
costs all others most of the result. Rows that still show tissue are drawn towards frames around until their noise is as
usual; of others nothing can be told, and their voxels count as lost (:mod:`restormer3d.artefacts.lost_voxels`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import binary_propagation, maximum_filter1d, median_filter

from restormer3d.artefacts.frames_around import NORMAL_MEDIAN, Steadied, mean_around, middle_and_spread, sure_offset
from restormer3d.noise import NoiseEstimate
from restormer3d.views import SomeFrames, each_frame

GARBLED = 0.1
"""Share of a row that is to be kept, below which it shows nothing: its data are lost."""

_LEAST_FRAMES, _LEAST_SIDE = 16, 32  # that tell what is usual
_PAIRS = 64  # of neighbors in a row that are looked at, at most
_WINDOW, _STRIDE = 101, 10  # frames whose median is usual in their middle, and between such middles
_BLOCK = 2000  # frames that are looked at together, with those around
_ROWS = 9  # of a band, whose median counts,
_NOISY = 2.5  # from so many usual deviations on,
_STILL_NOISY = 1.5  # and beside such rows as far as they are so many;
_NOISY_ALONE = 4.0  # of a single row, from so many on
_REACH = 8  # rows that far away, as a part of the field, may have moved there
_MOST = 0.1  # of the frames: more are no accident
_BESIDE = np.array([[False] * 3, [True] * 3, [False] * 3])  # rows of the same frame
_TINY = 1e-30


def noisy_rows(stack: Any, noise: NoiseEstimate) -> dict[int, np.ndarray]:
    """Find rows whose neighbors differ by far more than in other frames, and than their brightness explains.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    noise : NoiseEstimate
        Of this stack.

    Returns
    -------
    dict of int to numpy.ndarray
        By frame, the usual deviation of its rows' noise relative to what they have: what is to be kept of them, (H,), 1
        of rows that are no noisier than others. Empty where there are none or where they are no accident: in more than
        a tenth of the frames; also of fewer than 16 frames or 32 pixels.
    """
    frames, *sides = stack.shape
    if frames < _LEAST_FRAMES or min(sides) < _LEAST_SIDE:
        return {}
    kept: dict[int, np.ndarray] = {}
    for start in range(0, frames, _BLOCK):
        first, last = max(0, start - _WINDOW), min(frames, start + _BLOCK + _WINDOW)
        apart, brightness = _neighbors(SomeFrames(stack, np.arange(first, last)))
        shares = _to_be_kept(apart, brightness, noise)[start - first :][:_BLOCK]
        kept |= {start + int(t): shares[t] for t in np.flatnonzero((shares < 1).any(1))}
    return kept if len(kept) <= _MOST * frames else {}


def without_noise_of_rows(stack: Any, kept: dict[int, np.ndarray]) -> Any:
    """Draw noisy rows towards frames around, but for garbled ones.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    kept : dict of int to numpy.ndarray
        As :func:`noisy_rows` finds it.

    Returns
    -------
    stack of shape (T, H, W)
        The same one where there is nothing to draw.
    """
    usual = np.setdiff1d(np.arange(stack.shape[0]), list(kept))
    drawn = {}
    for t, share in kept.items():
        share = np.where(share < GARBLED, 1, share)
        if (share < 1).any():
            apart = stack[t] - mean_around(stack, usual, t)
            _, spread = middle_and_spread(apart)
            # Of few photons the median lies below the mean, the farther the stronger the noise.
            drawn[t] = np.stack([sure_offset(apart.mean(1), spread, stack.shape[2]), share])
    return Steadied(stack, drawn, usual) if drawn else stack


def _neighbors(stack: Any) -> tuple[np.ndarray, np.ndarray]:
    """Typical difference of neighbors in the rows of a stack (T, H, W), and the rows' mean intensity, (T, H) each."""
    left = np.arange(0, stack.shape[2] - 1, -(-stack.shape[2] // _PAIRS))
    apart, brightness = (np.empty(stack.shape[:2], np.float32) for _ in range(2))
    for t, frame in each_frame(stack):
        first, second = (frame[:, columns].astype(np.float32) for columns in (left, left + 1))
        brightness[t] = first.mean(1)
        apart[t] = np.median(np.abs(second - first), axis=1)
    return apart, brightness


def _to_be_kept(apart: np.ndarray, brightness: np.ndarray, noise: NoiseEstimate) -> np.ndarray:
    """Of rows whose neighbors differ (T, H), what is to be kept, (T, H): 1 of all that are as noisy as usual."""
    reach = 2 * (apart.shape[1] // _REACH) + 1
    usual = maximum_filter1d(_usual(apart), reach, axis=1)
    explained = NORMAL_MEDIAN * np.sqrt(2 * noise.variance(brightness))
    ratio = apart / np.maximum(np.maximum(usual, explained), _TINY)
    of_bands = median_filter(ratio, (1, _ROWS), mode="nearest")
    in_band = np.asarray(binary_propagation(of_bands > _NOISY, _BESIDE, mask=of_bands > _STILL_NOISY), bool)
    typical = np.where(in_band, median_filter(apart, (1, _ROWS), mode="nearest"), apart)
    least = np.maximum(usual, explained.min(0))  # what rounding has left of the noise may be nothing at all
    share = np.minimum(1, least / np.maximum(typical, _TINY))
    return np.where(in_band | (ratio > _NOISY_ALONE), share, 1)


def _usual(values: np.ndarray) -> np.ndarray:
    """Median of (T, H) over the frames around each, before it or after it, whichever is largest: noise may grow."""
    frames = len(values)
    around = np.lib.stride_tricks.sliding_window_view(values, min(_WINDOW, frames), axis=0)[::_STRIDE]
    medians = np.median(around, axis=2)
    starts = np.arange(frames) - np.array([_WINDOW - 1, _WINDOW // 2, 0])[:, None]
    return medians[np.clip(starts // _STRIDE, 0, len(medians) - 1)].max(0)
