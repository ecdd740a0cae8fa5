"""Noise that grows or fades along the recording: of tissue that bleaches, or whose bleaching was made up for.

Whatever is fitted to all of a recording is fitted to its noisy part as well, and takes noise for signal there, or
signal for noise in the rest. Intensities above the darkest places are divided by how strong noise is at the time, and
denoised ones multiplied by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d, median_filter

from restormer3d.local_noise import noise_along_time
from restormer3d.normalization import temporal_mean
from restormer3d.views import FramesChanged

_LEAST_RUNS = 6  # of twelve frames, that tell of it
_MEDIAN = 3  # runs, of which one may be as noisy as it likes
_AROUND = 2.0  # runs of a Gaussian filter along time
_CHANGED = 1.5  # ratio of the largest variance to the least, from which on it is taken for changing
_DARKEST = 0.02  # quantile of the field, of a mean over some pixels, that is taken for zero light
_SMOOTH = 2.0  # pixels of that mean


@dataclass(frozen=True)
class ChangingNoise:
    """Noise that changes along time.

    Attributes
    ----------
    deviation : numpy.ndarray
        Standard deviation in every frame, relative to the median one, (T,) float32.
    level : float
        Intensity of the darkest places, which stays as it is.
    """

    deviation: np.ndarray
    level: float

    @property
    def ratio(self) -> float:
        """How many times as strong it is when it is strongest as when it is faintest."""
        return float(self.deviation.max() / self.deviation.min())


@dataclass(frozen=True)
class SteadyNoise(FramesChanged):
    """A stack (T, H, W) whose frames are divided by the deviation of their noise.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    noise : ChangingNoise
        Of it.
    """

    noise: ChangingNoise

    def change(self, frame: np.ndarray, t: int, crop: tuple[Any, ...]) -> None:
        """Divide frame `t`, or a part of it, in place."""
        frame -= np.asarray(self.noise.level, frame.dtype)
        frame /= self.noise.deviation[t]
        frame += np.asarray(self.noise.level, frame.dtype)


def changing_noise(stack: Any, frames: np.ndarray | None = None) -> ChangingNoise | None:
    """Measure how strong noise is along time, if it changes.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Recorded intensities.
    frames : numpy.ndarray of int, optional
        Numbers of the frames to look at, as for :func:`restormer3d.noise.estimate_noise`.

    Returns
    -------
    ChangingNoise or None
        None if its variance, averaged over a tenth of the recording, is never half as large again as at another time;
        and of fewer than 72 frames.
    """
    times, variance = noise_along_time(stack, frames)
    if len(times) < _LEAST_RUNS or not (variance > 0).all():
        return None
    slow = gaussian_filter1d(median_filter(np.log(variance), _MEDIAN), _AROUND)
    if slow.max() - slow.min() < np.log(_CHANGED):
        return None
    deviation = np.exp(np.interp(np.arange(stack.shape[0]), times, slow) / 2)
    level = np.quantile(gaussian_filter(temporal_mean(stack), _SMOOTH), _DARKEST)
    return ChangingNoise((deviation / np.median(deviation)).astype(np.float32), float(level))


def put_back(frames: Iterator[np.ndarray], noise: ChangingNoise) -> Iterator[np.ndarray]:
    """Multiply denoised frames (H, W) of :class:`SteadyNoise` by the deviation again, as they come."""
    for frame, deviation in zip(frames, noise.deviation, strict=True):
        level = np.asarray(noise.level, frame.dtype)
        yield (frame - level) * deviation + level
