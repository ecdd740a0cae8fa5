"""Noise that differs from place to place more than intensities tell: of dF/F, or after a division by a flat field.

Where there was little light, such recordings are mostly noise, and whatever is fitted to all of the field is fitted to
that. Intensities are divided by the noise around them before denoising, and denoised ones multiplied by it. Changes
relative to the mean have no image of the tissue left, but how much noise there is tells of it: they are raised before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from restormer3d.local_noise import seen_noise
from restormer3d.noise import UNKNOWN_LIGHT
from restormer3d.photon_transfer import usual_variance
from restormer3d.views import ChangedStack

_LEAST_FRAMES, _LEAST_SIDE = 16, 32  # that tell of it
_AROUND = 4.0  # pixels of a Gaussian filter, over which the noise is measured
_MOST, _LEAST = 0.95, 0.05  # quantiles of the field, in which the variance relative to the usual one
_UNEVEN = 4.0  # differs by this factor, from which on it is uneven
_FAINTEST = 0.05  # of the median deviation, that intensities are divided by
_PAIRS = 200  # of frames, that the variance is averaged over, about, of recordings that have so many
_TINY = 1e-30


@dataclass(frozen=True)
class UnevenNoise:
    """Noise that differs from place to place.

    Attributes
    ----------
    deviation : numpy.ndarray
        Standard deviation at every pixel, relative to its median, (H, W) float32.
    level : float
        What to add to intensities, so that dividing them leaves an image: as much as their median lacks of
        `noise.UNKNOWN_LIGHT`.
    """

    deviation: np.ndarray
    level: float

    @property
    def ratio(self) -> float:
        """How many times as strong it is where it is strongest as where it is faintest, but for a few pixels."""
        low, high = np.quantile(self.deviation, (_LEAST, _MOST))
        return float(high / low)

    def made_even(self, intensities: np.ndarray, dtype: np.dtype, crop: tuple[Any, ...] = ()) -> np.ndarray:
        """Of frames (..., H, W), or of the part of their rows and columns that `crop` says."""
        return (intensities + np.asarray(self.level, dtype)) / self.deviation[crop].astype(dtype, copy=False)


@dataclass(frozen=True)
class EvenNoise(ChangedStack):
    """A stack (T, H, W) divided by the deviation of its noise.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    noise : UnevenNoise
        Of it.
    """

    noise: UnevenNoise

    def __getitem__(self, index: Any) -> np.ndarray:
        """Slice as the stack does."""
        crop = index[1:] if isinstance(index, tuple) else ()
        return self.noise.made_even(self.stack[index], self.dtype, crop)


def uneven_noise(stack: Any, frames: np.ndarray | None = None) -> UnevenNoise | None:
    """Measure the noise at every pixel, if it is uneven.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Recorded intensities.
    frames : numpy.ndarray of int, optional
        Numbers of the frames to look at, as for :func:`restormer3d.noise.estimate_noise`.

    Returns
    -------
    UnevenNoise or None
        None if its variance, averaged over some pixels, is what is usual for their mean intensity, but for a factor of
        four between the places where it is most and least so; and of fewer than 16 frames or 32 pixels.
    """
    count = stack.shape[0] if frames is None else len(frames)
    if count < _LEAST_FRAMES or min(stack.shape[1:]) < _LEAST_SIDE:
        return None
    variance, mean, changes = seen_noise(stack, frames)
    if not changes.any():
        return None
    usual = usual_variance(mean, np.where(changes, np.maximum(variance, _TINY), 0.0), min(_PAIRS, count - 1))
    seen, expected, share = (gaussian_filter(np.where(changes, x, 0.0), _AROUND) for x in (variance, usual, changes))
    seen = np.maximum(seen, _TINY)
    low, high = np.quantile((seen / np.maximum(expected, _TINY))[changes], (_LEAST, _MOST))
    if high < _UNEVEN * low:
        return None
    deviation = np.sqrt(seen / np.maximum(share, _TINY))
    typical = float(np.median(deviation[changes]))
    relative = np.where(changes, np.maximum(deviation / typical, _FAINTEST), 1.0).astype(np.float32)
    return UnevenNoise(relative, max(0.0, UNKNOWN_LIGHT * typical - float(np.median(mean[changes]))))


def put_back(frames: Iterator[np.ndarray], noise: UnevenNoise) -> Iterator[np.ndarray]:
    """Multiply denoised frames (H, W) of :class:`EvenNoise` by the deviation again, as they come."""
    return (frame * noise.deviation - np.asarray(noise.level, frame.dtype) for frame in frames)
