"""Noise that rows share: while a row is read, the level of the detector's signal is not that of the row before.

Each row of each frame is then brighter or darker as a whole, by an amount of its own, which no average along x takes
away. How much there is of it, differences of frames tell: they have more of it in common along rows than waves of a few
cycles, which are as much of pixels' own noise. How much a row has of it, all of its pixels tell together. What goes on
over several frames or rows is left to the tissue, as far as it is more than such noise would show.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from scipy.ndimage import uniform_filter1d
from scipy.stats import trim_mean

from restormer3d.artefacts.differences import close_differences
from restormer3d.normalization import temporal_mean
from restormer3d.views import FramesChanged, each_frame

_LEAST_FRAMES, _LEAST_SIDE = 32, 32  # that tell of it
_CYCLES = (2, 7)  # in the field along x, of waves that have as much of pixels' own noise, from and to
_DETAIL = 1 / 16  # cycles per row, above which rows are compared: tissue is larger
_STANDS_OUT = 1.3  # by which the variance that rows share exceeds that of such waves
_OUTSIDE = 0.25  # of the pixels of a row, the darkest and as many of the brightest, that do not count: cells are active
_AROUND = (15, 7)  # frequencies along time and along y, over which the power of what rows share is averaged
_TISSUE = 1.5  # times the power that is usual: by more than chance


@dataclass(frozen=True)
class WithoutRowNoise(FramesChanged):
    """A stack (T, H, W) less the noise that rows share.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded.
    noise : numpy.ndarray
        Of each row, (T, H) float32, as :func:`row_noise` finds it.
    """

    noise: np.ndarray

    def change(self, frame: np.ndarray, t: int, crop: tuple[Any, ...]) -> None:
        """Take the noise of its rows away from frame `t`, or from the part of it that `crop` says, in place."""
        frame -= self.noise[(t, *crop[:1])][:, None]


def row_noise(stack: Any) -> np.ndarray | None:
    """Estimate the noise that the pixels of each row share.

    Its variance is what rows of differences of frames have in common, in detail along y, beyond waves of a few cycles
    along x. What each row has of it is the mean of its pixels less their temporal means, without the most extreme,
    weighted by its share of the power; where there is more power, at some frequencies along time and along y, by less.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Recorded intensities, of one image.

    Returns
    -------
    numpy.ndarray or None
        Intensities to take away, (T, H) float32; None if rows share no more than three tenths beyond what the noise
        of their pixels explains, and of fewer than 32 frames or 32 pixels.
    """
    frames, height, width = stack.shape
    if frames < _LEAST_FRAMES or min(height, width) < _LEAST_SIDE:
        return None
    shared, own = _variances(close_differences(stack))
    if not shared > _STANDS_OUT * own:
        return None
    mean = temporal_mean(stack)
    rows = np.stack([trim_mean(frame - mean, _OUTSIDE, axis=1) for _, frame in each_frame(stack)])
    return white_part(np.asarray(scipy.fft.dctn(rows, norm="ortho")), shared - own, shared, _AROUND)


def white_part(waves: np.ndarray, noise: float, usual: float, around: tuple[int, ...]) -> np.ndarray:
    """Estimate white noise in values whose discrete cosine transform is known, float32.

    Parameters
    ----------
    waves : numpy.ndarray
        The transform, orthonormal along all axes.
    noise, usual : float
        Variance of the noise, and power that is usual with it; where there is more, less of it is noise.
    around : tuple of int
        Frequencies along each axis, over which power is averaged.
    """
    power = np.square(waves)
    for axis, width in enumerate(around):
        power = uniform_filter1d(power, width, axis, mode="reflect")
    weights = noise / np.where(power > _TISSUE * usual, power, usual)
    return np.asarray(scipy.fft.idctn(waves * weights, norm="ortho")).astype(np.float32)


def _variances(differences: np.ndarray) -> tuple[float, float]:
    """Variance of means of rows, and of means of their products with waves that have no part in what rows share."""
    height, width = differences.shape[1:]
    window = (1 - np.cos(2 * np.pi * (np.arange(width) + 0.5) / width)) / width
    cycles = np.array([0, *range(*_CYCLES)])
    along = window[:, None] * np.exp(2j * np.pi * np.outer(np.arange(width), cycles) / width)
    down = np.hanning(height + 2)[1:-1, None]
    means = (differences @ along.astype(np.complex64)) * down / np.sqrt(np.square(down).mean())
    spectrum = np.square(np.abs(np.fft.fft(means, axis=1, norm="ortho")))
    # Medians, for a few frames may be outliers; of such squares they are this part of the mean.
    power = np.median(spectrum, 0)[np.abs(np.fft.fftfreq(height)) >= _DETAIL].mean(0) / np.log(2)
    return float(power[0]), float(power[1:].mean())
