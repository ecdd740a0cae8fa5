"""Noise of a recording measured from the recording itself: gain, read noise, and correlation of neighbors.

Consecutive frames show almost the same signal, so their differences are almost pure noise. How the variance of
the differences grows with the mean gives gain and read noise (the photon transfer line); how neighboring voxels of
the differences go together tells which voxels a blind spot has to cover.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import uniform_filter

from restormer3d.photon_transfer import bins_by_mean, robust_line, usual_variance

LEAK_THRESHOLD = 0.08
UNKNOWN_LIGHT = 0.5
"""Deviations of the noise, that light is taken for where intensities do not tell how much there is."""

_TAIL = 0.025  # correlation of farther neighbors that counts, where that of nearer ones does
_RUN = 12  # consecutive frames read together
_MAX_LAG = 6  # frames between which differences are taken
_LEAST_ANCHORS = 4  # frames of a run that differences of all lags start from: fewer do not tell of noise with a memory
_TINY = 1e-30
_MOST_FRAMES, _MOST_SIDE = 240, 256  # that are looked at
_TIME_LAGS = 2
_SPACE_LAGS = 3
_ALIKE = 0.05  # correlation of the means of halves, below which they show no image
_BELOW = 0.3  # of the samples, that are negative then
_AROUND = 5  # pixels along each side, of a mean that fine detail is told from


@dataclass(frozen=True)
class NoiseEstimate:
    """What `estimate_noise` found; intensities in units of the stack (ADU).

    Parameters
    ----------
    gain : float
        ADU per photon, the slope of the photon transfer line; 0 if the variance does not grow with the mean.
        Where neighbors are correlated it is the *apparent* gain: smoothing lowers the variance of a pixel, so
        the true gain is larger and the photons fewer by up to `smoothing_factor`.
    read_noise_variance : float
        Variance at zero light, ADU^2 (0 if the line crosses zero variance at a positive intensity).
    offset : float
        Intensity at zero light, ADU: where the line meets `read_noise_variance`. A line alone cannot tell a
        positive offset from a smaller read noise; the smaller of the two possible corrections is reported. Where
        pixels are below 0 on average, the offset is, too, and the read noise counts as 0: a level that is too low
        costs little, one that is too high much. Where the mean of each pixel was taken away, there is no line, and
        the offset lies half a deviation of the noise below.
    photons_per_pixel : float or None
        Median over pixels of the mean intensity in photons; None if the gain is 0.
    correlation : dict of str to tuple of float
        Correlation coefficients of the noise: ``"t"`` lags 1-2, ``"y"`` and ``"x"`` lags 1-3. NaN where the
        stack is too short or too narrow to tell.
    standard_error : float
        Sampling error of the correlations, rounded up over axes and lags.
    clipped_fraction : float
        Fraction of the samples at the lowest or highest value that occurs.
    """

    gain: float
    read_noise_variance: float
    offset: float
    photons_per_pixel: float | None
    correlation: dict[str, tuple[float, ...]]
    standard_error: float
    clipped_fraction: float

    @property
    def smoothing_factor(self) -> float:
        """Ratio of true to apparent gain if the correlation comes from smoothing along x and y."""
        sums = [1 + 2 * max(0.0, float(np.nansum(self.correlation[axis]))) for axis in "yx"]
        return sums[0] * sums[1]

    def variance(self, mean: np.ndarray) -> np.ndarray:
        """Return the noise variance expected at intensities ``mean``, never below the read noise."""
        return self.gain * np.maximum(mean - self.offset, 0) + self.read_noise_variance


def estimate_noise(stack: Any, frames: np.ndarray | None = None) -> NoiseEstimate:
    """Estimate gain, read noise and noise correlation from differences of frames.

    Up to 20 evenly spaced runs of 12 consecutive frames are read, from the central 256 x 256 pixels, without those that
    never change. Runs with a jump of the field are left out. Active pixels and moving edges are outvoted by medians;
    bins of intensity that clipping has narrowed are left out of the line. The variance is extrapolated from differences
    over one and more frames to no delay at all, so that slow signal does not count as noise.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities; T at least 2.
    frames : numpy.ndarray of int, optional
        Numbers of the frames to look at, increasing, at least 2; all by default. Runs go on over what is left out.

    Returns
    -------
    NoiseEstimate

    Raises
    ------
    ValueError
        If the stack has fewer than two frames.

    References
    ----------
    J. R. Janesick, *Photon Transfer* (SPIE, 2007).
    """
    if stack.shape[0] < 2:
        raise ValueError(f"the noise is estimated from differences of frames: got {stack.shape[0]} frame, need 2")
    looked_at = np.arange(stack.shape[0]) if frames is None else frames
    sample = _still_runs(read_runs(stack, looked_at))  # (runs, frames of a run, h, w)
    mean = sample.mean(axis=(0, 1), dtype=np.float64)
    growth = _squared_differences(sample)  # (lags, h, w)
    changes = growth[0] > 0
    if not changes.any():
        changes[:] = True
    clipped = ((sample == sample.min()) | (sample == sample.max())).mean(axis=(0, 1))
    pairs = _pairs(sample)
    usual = usual_variance(mean, growth[0], pairs)
    fine = _squared_differences(fine_detail(sample))
    all_and_fine = [(growth / usual)[:, changes], (fine / usual_variance(mean, fine[0], pairs))[:, changes]]
    # Noise with a memory shows in both; what is smooth in the plane shows in the first, fast ripple more in the second.
    over_time = tuple(min(both, key=abs) for both in zip(*map(_time_correlation, all_and_fine), strict=True))
    if sample.shape[1] - _MAX_LAG < _LEAST_ANCHORS:
        over_time = (float("nan"),) * _TIME_LAGS
    memory = max(np.abs(over_time)) > LEAK_THRESHOLD
    means, variances, clipped_bins = _photon_transfer(sample, clipped, changes, memory)
    no_image = _shows_no_image(sample, changes)
    gain, intercept = (0.0, float(np.median(variances))) if no_image else robust_line(means, variances, clipped_bins)
    offset = max(0.0, -intercept / gain) if gain > 0 else 0.0
    lowest, by_chance = np.quantile(mean[changes], 0.01), 4 * np.sqrt(max(intercept, 0.0) / np.prod(sample.shape[:2]))
    if lowest < -by_chance:  # noise around zero light does not explain it
        offset = -intercept / gain if gain > 0 else float(lowest)
    if no_image:
        offset = float(np.median(mean[changes]) - UNKNOWN_LIGHT * np.sqrt(max(intercept, 0.0)))
    differences = np.diff(sample, axis=1).reshape(-1, *mean.shape) / np.sqrt(2 * usual, dtype=np.float32)
    return NoiseEstimate(
        gain=gain,
        read_noise_variance=max(0.0, intercept + gain * offset) if offset <= 0 or no_image else 0.0,
        offset=offset,
        photons_per_pixel=(float(np.median(mean[changes])) - offset) / gain if gain > 0 else None,
        correlation={
            "t": over_time,
            "y": _space_correlation(differences.swapaxes(1, 2), changes.T),
            "x": _space_correlation(differences, changes),
        },
        standard_error=4 / float(np.sqrt(differences.size)),
        clipped_fraction=float(clipped.mean()),
    )


def blind_spot_extent(estimate: NoiseEstimate) -> tuple[int, int, int]:
    """Return how many neighbors on each side the blind spot has to cover along t, y and x.

    A hidden voxel whose two neighbors carry its noise with correlation r can be predicted from them up to a share
    of 2 r^2 of its noise variance, and a network learns to keep that share. :data:`LEAK_THRESHOLD`, 0.08, bounds the
    share by 1.3 %. Residual signal in the differences moves the estimate by up to about 0.04, well below it; for stacks
    so small that the sampling error is larger, twice that error is the bound. Where a detector smears along y or x, the
    next lags are what its filter leaves there, and count from 0.025 on: less than that held-out voxels do not reward.

    Parameters
    ----------
    estimate : NoiseEstimate
        From `estimate_noise`.

    Returns
    -------
    tuple of int
        Half-extents (t, y, x): 0 covers the voxel alone, 1 one neighbor on each side.
    """
    bound = max(LEAK_THRESHOLD, 2 * estimate.standard_error)
    tail = max(_TAIL, 2 * estimate.standard_error)
    extents = []
    for axis in "tyx":
        correlation = estimate.correlation[axis]
        extent = max((lag for lag, r in enumerate(correlation, start=1) if abs(r) > bound), default=0)
        while extent and axis != "t" and extent < len(correlation) and abs(correlation[extent]) > tail:
            extent += 1
        extents.append(extent)
    return extents[0], extents[1], extents[2]


def neighbor_correlation(
    estimate: NoiseEstimate, extent: tuple[int, int, int]
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    """Return the correlations of the noise along t, y and x, from lag 0 to what a blind spot of `extent` covers.

    Where they could not be measured they are taken for 0.
    """
    t, y, x = (
        (1.0, *(float(np.nan_to_num(r)) for r in estimate.correlation[axis][:reach]))
        for axis, reach in zip("tyx", extent, strict=True)
    )
    return t, y, x


def read_runs(stack: Any, frames: np.ndarray) -> np.ndarray:
    """Read evenly spaced runs of some frames, and of these the pixels at the center, (runs, frames, h, w) float32."""
    height, width = stack.shape[1:]
    top, left = max(0, height - _MOST_SIDE) // 2, max(0, width - _MOST_SIDE) // 2
    field = slice(top, top + min(height, _MOST_SIDE)), slice(left, left + min(width, _MOST_SIDE))
    return np.stack([stack[t[0] : t[-1] + 1, *field][t - t[0]].astype(np.float32) for t in evenly_spaced_runs(frames)])


def evenly_spaced_runs(frames: np.ndarray) -> list[np.ndarray]:
    """Choose runs of consecutive ones of some frames, at most twenty of twelve each."""
    run = min(_RUN, len(frames))
    starts = np.linspace(0, len(frames) - run, max(1, min(_MOST_FRAMES, len(frames)) // run)).astype(int)
    return [frames[start : start + run] for start in starts]


def _still_runs(sample: np.ndarray) -> np.ndarray:
    """Leave out runs that never change, or with frames that differ far more than usual: a jump, an outlier."""
    pairs = np.square(np.diff(sample, axis=1)).mean(axis=(2, 3))
    if (changes := pairs.any(axis=1)).any():
        sample, pairs = sample[changes], pairs[changes]
    worst = pairs.max(axis=1)
    still = worst <= 1.5 * np.median(pairs)
    if 4 * still.sum() < len(sample):
        still = worst <= np.median(worst)
    return sample[still]


def _photon_transfer(
    sample: np.ndarray, clipped: np.ndarray, changes: np.ndarray, memory: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, typical variance and clipped fraction of pixels of like mean, each (bins,).

    Of one half of the runs (runs, frames, h, w) pixels are sorted by the mean of the other: by their own, dark pixels
    would be sorted by nothing but their noise, show a slope that is none, and outvote a few bright ones.
    """
    parts = [sample[part::2] for part in (0, 1)] if len(sample) > 1 else [sample]
    means = [part.mean(axis=(0, 1), dtype=np.float64)[changes] for part in parts]
    bins = []
    for part, mean, sorted_by in zip(parts, means, reversed(means), strict=True):
        variance = _at_lag_zero(_squared_differences(part), memory)[changes]
        bins.append(bins_by_mean(mean, variance, clipped[changes], _pairs(part), sorted_by))
    m, v, c = (np.concatenate(values) for values in zip(*bins, strict=True))
    return m, v, c


def _shows_no_image(sample: np.ndarray, changes: np.ndarray) -> bool:
    """Whether runs (runs, frames, h, w) lack the mean of each pixel: means of one half tell nothing of the other's.

    Nor do those of a few photons, but these are not below zero.
    """
    if len(sample) < 2 or (sample[..., changes] < 0).mean() < _BELOW:
        return False
    first, second = (sample[part::2].mean(axis=(0, 1), dtype=np.float64)[changes] for part in (0, 1))
    first, second = first - first.mean(), second - second.mean()
    return float(first @ second) < _ALIKE * float(np.sqrt((first @ first) * (second @ second)))


def _pairs(sample: np.ndarray) -> int:
    """Differences of each lag in runs (runs, frames, h, w)."""
    return sample.shape[0] * max(1, sample.shape[1] - _MAX_LAG)


def fine_detail(sample: np.ndarray, side: int = _AROUND) -> np.ndarray:
    """What a mean over the pixels around, of a square of some side, leaves of frames (..., h, w).

    Breathing, ripple of the mains and neuropil are the same there, and would be taken for noise with a memory.
    """
    if min(sample.shape[-2:]) < side:
        return sample
    return sample - uniform_filter(sample, side, axes=(-2, -1))


def _squared_differences(sample: np.ndarray) -> np.ndarray:
    """Return the mean of (x[t+k] - x[t])^2 / 2 per pixel for lags k = 1 to 6, from the same t; (6, h, w).

    Runs too short for lag 6 give lag 1 alone, (1, h, w).
    """
    anchors = sample.shape[1] - _MAX_LAG
    if anchors < 1:
        return np.square(np.diff(sample, axis=1)).mean(axis=(0, 1), dtype=np.float64)[None] / 2
    steps = (sample[:, k : k + anchors] - sample[:, :anchors] for k in range(1, _MAX_LAG + 1))
    return np.stack([np.square(step).mean(axis=(0, 1), dtype=np.float64) / 2 for step in steps])


def _at_lag_zero(growth: np.ndarray, memory: bool) -> np.ndarray:
    """Noise variance per pixel, free of signal that grows linearly with the lag.

    From lags 1 and 2, or, for noise with a memory of a frame or two, from the line through lags 3 to 6, which is
    less precise.
    """
    if len(growth) < _MAX_LAG:
        return growth[0]
    if memory:
        return np.tensordot((1.6, 0.7, -0.2, -1.1), growth[2:], axes=1)  # least squares on lags 3, 4, 5, 6
    return 2 * growth[0] - growth[1]


def _middle_mean(values: np.ndarray) -> float:
    """Mean of the middle half: nearly as precise as the mean, and deaf to a minority of active pixels."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(values[(values >= low) & (values <= high)].mean())


def _space_correlation(differences: np.ndarray, changes: np.ndarray) -> tuple[float, ...]:
    """Correlation along the last axis of unit-variance differences, less what stays at lags 5 to 8.

    Of pixels (H, W) that change, in the differences (n, H, W); a border that is black tells nothing.

    What stays there is common to whole regions (flicker, neuropil, line noise), not the detector's smearing of one
    pixel into the next.
    """
    width = differences.shape[2]

    def at(lag: int) -> float:
        both = changes[:, lag:] & changes[:, :-lag]
        products = (differences[..., lag:] * differences[..., :-lag]).mean(axis=0)
        return _middle_mean(products[both]) if both.any() else float("nan")

    far = [at(lag) for lag in range(5, 9) if 2 * lag <= width]
    slow = float(np.nanmean(far)) if np.isfinite(far).any() else 0.0
    return tuple(at(lag) - slow if lag < width else float("nan") for lag in range(1, _SPACE_LAGS + 1))


def _time_correlation(growth: np.ndarray) -> tuple[float, ...]:
    """Correlation along time from squared differences in units of the usual variance, by lag.

    growth[k] = (noise variance) * (1 - r[k]) + signal[k], and a slow signal grows linearly at first: the line through
    lags 3 to 6 tells what lags 1 and 2 would show if the noise were white.
    """
    if len(growth) < _MAX_LAG:
        return (float("nan"),) * _TIME_LAGS
    typical = [_middle_mean(image) for image in growth]
    slope, level = np.polyfit(range(3, _MAX_LAG + 1), typical[2:], 1)
    white = [max(level + slope * lag, _TINY) for lag in range(1, _TIME_LAGS + 1)]
    return tuple(float(max(-1.0, 1 - seen / expected)) for seen, expected in zip(typical, white, strict=False))
