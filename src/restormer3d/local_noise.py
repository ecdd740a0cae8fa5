"""Noise where and when it is: of every pixel, and of every part of the recording, by differences of its frames.

Where the mean intensity does not tell how strong noise is, as `noise.estimate_noise` takes for granted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter

from restormer3d.noise import NoiseEstimate, evenly_spaced_runs, fine_detail, read_runs

_LOCAL = 4.0  # pixels, over which variances are compared
_MISFIT = 1.5  # ratio of variances, from which on the mean does not tell the one of a pixel
_WRONG = 0.2  # of the pixels, for which it must not
_NEAREST = 3  # pixels along each side, of a mean that what neighbors do together is told from
_QUIETEST = 0.05  # quantile of the field, in which differences of frames are of noise alone
_WITHOUT_MEMORY = 0.5  # of the variance by single frames, that white noise has at least
_TINY = 1e-30


def local_variance(
    stack: Any, noise: NoiseEstimate, mean: np.ndarray, frames: np.ndarray | None = None
) -> tuple[np.ndarray, bool]:
    """Noise variance of every pixel: by its mean, or by differences of frames where the mean does not tell.

    Of dF/F, or after a division by a flat field, the same intensity is noisier where there was less light.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities; T at least 2.
    noise : NoiseEstimate
        Of this stack.
    mean : numpy.ndarray
        Temporal mean, (H, W).
    frames : numpy.ndarray of int, optional
        Numbers of the frames to look at, as for :func:`restormer3d.noise.estimate_noise`.

    Returns
    -------
    tuple of numpy.ndarray and bool
        Variance, (H, W); and whether it is that of differences of frames.
    """
    expected = noise.variance(mean)
    seen, _, changes = seen_noise(stack, frames)
    whole = [gaussian_filter(np.where(changes, image, 0.0), _LOCAL) for image in (seen, expected)]
    ratio = np.where(changes, np.maximum(whole[0], 0) / np.maximum(whole[1], _TINY), 1.0)
    wrong = (ratio > _MISFIT) | (ratio < 1 / _MISFIT)
    if not changes.any() or wrong[changes].mean() < _WRONG:
        return expected, False
    return expected * np.clip(ratio, _TINY, None), True


def seen_noise(stack: Any, frames: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noise variance of every pixel by differences over one and two frames, of runs without a jump.

    Only what the nearest neighbors do not share is looked at, as with many photons activity is stronger than noise. How
    much more noise there is, the quietest places tell. Slow signal, which grows with the delay, is taken off, unless
    that would be half of it: so does noise with a memory.

    Arguments as for :func:`restormer3d.noise.estimate_noise`.

    Returns
    -------
    variance, mean, changes : numpy.ndarray
        Noise variance and mean intensity of the frames looked at, and which pixels change at all; (H, W) each.
    """
    whole, by_lag, means, jumps = [], [], [], []
    for t in evenly_spaced_runs(np.arange(stack.shape[0]) if frames is None else frames):
        block = stack[t[0] : t[-1] + 1][t - t[0]].astype(np.float32)
        steps = np.square(np.diff(block, axis=0))
        whole.append(steps.mean(0) / 2)
        means.append(block.mean(0))
        jumps.append(max(steps.mean((1, 2))))
        fine = fine_detail(block, _NEAREST)
        by_lag.append([np.square(fine[k:] - fine[:-k]).mean(0) / 2 for k in range(1, min(3, len(t)))])
    still = np.array(jumps) <= max(1.5 * np.median(jumps), min(jumps))
    mean, single, by_lag = (np.array(values)[still].mean(0, dtype=np.float64) for values in (means, whole, by_lag))
    changes = single > 0
    variance = 2 * by_lag[0] - by_lag[1] if len(by_lag) > 1 else by_lag[0]
    if variance.sum() < _WITHOUT_MEMORY * by_lag[0].sum():
        variance = by_lag[-1]
    if changes.any():
        around = [gaussian_filter(np.where(changes, image, 0.0), _LOCAL) for image in (single, by_lag[0])]
        variance *= np.quantile(around[0][changes] / np.maximum(around[1][changes], _TINY), _QUIETEST)
    return variance, mean, changes


def noise_along_time(stack: Any, frames: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Typical noise variance of evenly spaced runs of frames: the median over pixels, in units of all runs' mean.

    Arguments as for :func:`restormer3d.noise.estimate_noise`.

    Returns
    -------
    times, variance : numpy.ndarray
        The middle of each run, in frames, and the variance in it; (runs,) each. NaN where pixels do not change.
    """
    looked_at = np.arange(stack.shape[0]) if frames is None else frames
    steps = np.diff(fine_detail(read_runs(stack, looked_at), _NEAREST), axis=1)
    by_run = np.square(steps).mean(1)
    typical = np.mean(by_run, axis=0)
    relative = np.array([image[typical > 0] / typical[typical > 0] for image in by_run])
    variance = np.median(relative, axis=1) if relative.size else np.full(len(by_run), np.nan)
    return np.array([t.mean() for t in evenly_spaced_runs(looked_at)]), variance
