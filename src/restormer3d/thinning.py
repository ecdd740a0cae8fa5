"""Photon thinning: recordings that look as if less light had been detected, as augmentation over noise levels.

A recording with a share p of its photons, scaled back by 1/p, has the same mean, the same read noise and 1/p times the
shot noise. Intensities are not counts of photons, so nothing is removed: noise of matching moments is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from restormer3d.noise import NoiseEstimate, blind_spot_extent
from restormer3d.normalization import Normalization, estimate_normalization, sample_frames
from restormer3d.simulation.detector import correlate_neighbors

_SHARES = 6  # shares at which the normalization is measured; between them it is interpolated
_FRAMES = 24  # of the stack, for each of them
_MOST_CORRELATION = 0.49  # a filter over two neighbors reaches 0.5


@dataclass(frozen=True, eq=False)
class Thinning:
    """What the thinning of one stack needs to know.

    Attributes
    ----------
    noise : NoiseEstimate
        Of the stack as it was recorded.
    shares : numpy.ndarray
        Kept shares of the photons, increasing to 1; the first is the smallest that is drawn.
    lows, highs : numpy.ndarray
        Normalization of the thinned stack at these shares: percentiles move apart as the noise grows.
    """

    noise: NoiseEstimate
    shares: np.ndarray
    lows: np.ndarray
    highs: np.ndarray

    def draw_share(self, rng: np.random.Generator) -> float:
        """Draw the share of photons to keep, log-uniform from the smallest to 1."""
        return float(np.exp(rng.uniform(np.log(self.shares[0]), 0.0)))

    def normalization(self, share: float) -> Normalization:
        """Normalization of the stack with this share of its photons."""
        place = np.log(share), np.log(self.shares)
        return Normalization(float(np.interp(*place, self.lows)), float(np.interp(*place, self.highs)))


def prepare_thinning(
    stack: Any, mean: np.ndarray, normalization: Normalization, noise: NoiseEstimate, smallest_share: float
) -> Thinning | None:
    """Measure how the normalization of a stack changes as it is thinned.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities; 24 frames are read.
    mean : numpy.ndarray
        Temporal mean, (H, W), in the stack's intensities.
    normalization : Normalization
        Of the stack as it is.
    noise : NoiseEstimate
        Of the stack as it is.
    smallest_share : float
        Smallest share of photons that will be kept, above 0.

    Returns
    -------
    Thinning or None
        None if nothing can be thinned: the share is 1, or the noise does not grow with the intensity.
    """
    if smallest_share >= 1 or noise.gain <= 0:
        return None
    rng = np.random.default_rng(0)
    frames = np.stack([stack[t] for t in sample_frames(stack.shape[0], _FRAMES)])
    shares = np.geomspace(smallest_share, 1, _SHARES)
    measured = [estimate_normalization(thin(frames, mean, noise, share, rng)) for share in shares[:-1]]
    measured.append(normalization)
    return Thinning(noise, shares, np.array([n.low for n in measured]), np.array([n.high for n in measured]))


def thin(
    frames: np.ndarray, mean: np.ndarray, noise: NoiseEstimate, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Add the shot noise that frames would have with a share of their photons, scaled back to their intensity.

    With N photons expected in a pixel, the scaled count of the kept ones has variance N / p and third central moment
    N / p^2 where the full count has N and N. The differences are those of (1 + 1/p) (K - E[K]), K a Poisson number
    with mean N p (1 - p) / (1 + p)^2: the result is exact in mean, variance and, where neighbors are independent,
    skewness, not in shape (a count ends at zero, its lower tail here does not). It is independent of the recorded
    noise and between frames; along rows and columns it is correlated as the recorded noise is with its nearest
    neighbor (up to 0.49), where that correlation is large enough for the blind spot to cover.

    Parameters
    ----------
    frames : numpy.ndarray
        Noisy intensities, (T, H, W).
    mean : numpy.ndarray
        Expected intensity, (H, W); the temporal mean of the stack, hence too little is added where and while a pixel
        is brighter than usual.
    noise : NoiseEstimate
        Its gain is the apparent one, so the variance matches where neighbors are correlated, too.
    share : float
        Of the photons that is kept, p, above 0 and at most 1.
    rng : numpy.random.Generator
        Of the photons.

    Returns
    -------
    numpy.ndarray
        (T, H, W) float32, in the same intensities.
    """
    photons = np.maximum(mean - noise.offset, 0) / noise.gain
    # One more row and column, since the correlating filter wraps around: the far edges must not share their noise.
    expected = np.pad(photons * share * (1 - share) / (1 + share) ** 2, ((1, 0), (1, 0)), mode="edge")
    drawn = rng.poisson(np.broadcast_to(expected, (len(frames), *expected.shape)))
    added = ((drawn - expected) * (noise.gain * (1 + 1 / share))).astype(np.float32)
    _, *reach = blind_spot_extent(noise)
    for axis, name, covered in zip((-2, -1), "yx", reach, strict=True):
        if covered:
            lag_one = float(np.clip(noise.correlation[name][0], -_MOST_CORRELATION, _MOST_CORRELATION))
            added = correlate_neighbors(added, lag_one, axis)
    return frames.astype(np.float32) + added[:, 1:, 1:]
